//! AltUp: several residual streams, of which a layer computes one and predicts the others (Baykal et al. 2023,
//! <https://arxiv.org/abs/2301.13310>).

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::blocks::Linear;
use super::build::Builder;
use super::model::{Hooks, Stop};
use super::norm::{Norm, NormConfig};
use crate::error::InputError;

/// Residual streams of a model, [A, B, L, d].
#[derive(Debug, Clone, Copy)]
pub struct AltUpConfig {
    /// Number of streams A.
    pub count: i64,
    /// Index of the stream that layers compute. Hooks on a layer see this one; those on its module `altup` see all.
    pub active: i64,
    /// Whether the inputs of layers ([`PerLayerConfig`](super::PerLayerConfig)) are gated by the active stream times a
    /// learned scale, instead of the stream itself.
    pub scaled: bool,
}

/// Name of a layer's module.
const MODULE: &str = "altup";

impl AltUpConfig {
    pub(super) fn check(&self) -> Result<()> {
        let AltUpConfig { count, active, .. } = *self;
        if !(1..=MOST_STREAMS).contains(&count) {
            bail!(InputError::new(format!("config.json: `altup_num_inputs` is {count}, not from 1 to {MOST_STREAMS}")));
        }
        if !(0..count).contains(&active) {
            bail!(InputError::new(format!(
                "config.json: `altup_active_idx` is {active}, but there are {count} streams"
            )));
        }
        Ok(())
    }

    /// Returns the active stream, [B, L, d].
    pub(super) fn active(&self, streams: &Tensor) -> Tensor {
        streams.select(0, self.active)
    }

    /// Returns the streams with another active one.
    fn with_active(&self, streams: &Tensor, active: &Tensor) -> Tensor {
        let before = streams.narrow(0, 0, self.active);
        let after = streams.narrow(0, self.active + 1, self.count - self.active - 1);
        Tensor::cat(&[before, active.unsqueeze(0), after], 0)
    }

    /// Runs a layer, which maps streams to streams. Hooks on it see the active stream.
    pub(super) fn layer(
        &self,
        hooks: &mut Hooks,
        path: &str,
        streams: &Tensor,
        run: impl FnOnce(&mut Hooks, &Tensor) -> Result<Tensor, Stop>,
    ) -> Result<Tensor, Stop> {
        let mut output = None;
        let active = hooks.module(path, &self.active(streams), |hooks, active| {
            let streams = hooks.around(MODULE, &self.with_active(streams, active), run)?;
            let active = self.active(&streams);
            output = Some(streams);
            Ok(active)
        })?;
        Ok(self.with_active(&output.expect("the layer ran"), &active))
    }
}

/// Upper bound on streams. Allocating for a bogus number would exhaust memory before a missing tensor is found.
const MOST_STREAMS: i64 = 1_000;

/// Linear maps between the first stream and the others. Their results have the first stream's root mean square.
pub(super) struct StreamMaps {
    path: String,
    maps: Vec<Linear>,
}

impl StreamMaps {
    /// Builds the maps `PATH.0`, `PATH.1`, ..., for streams of width `d`.
    pub fn build(config: &AltUpConfig, path: String, d: i64, builder: &mut Builder) -> Result<Self> {
        let map = |index: i64| builder.linear(&format!("{path}.{index}"), d, d, false);
        let maps = (0..config.count - 1).map(map).collect::<Result<_>>()?;
        Ok(StreamMaps { path, maps })
    }

    /// Returns the streams for embeddings x [B, L, d].
    pub fn spread(&self, x: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        self.mapped(x, |_| x.shallow_clone(), hooks)
    }

    /// Returns the mean of the streams, [B, L, d].
    pub fn merge(&self, streams: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let streams = self.mapped(&streams.get(0), |index| streams.get(index), hooks)?;
        Ok(streams.mean_dim([0].as_slice(), false, Kind::Float))
    }

    /// Returns the first stream, and a map's result for each of the others.
    fn mapped(&self, first: &Tensor, other: impl Fn(i64) -> Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let mean_square = |x: &Tensor| x.square().mean_dim([-1].as_slice(), true, Kind::Float);
        let size = mean_square(first).sqrt();
        let mut streams = vec![first.shallow_clone()];
        for (index, map) in self.maps.iter().enumerate() {
            let x = hooks.linear(&format!("{}.{index}", self.path), &other(index as i64 + 1), map)?;
            let x = x.to_kind(Kind::Float);
            streams.push(&x * &size / mean_square(&x).clamp_min(1e-5).sqrt());
        }
        Ok(Tensor::stack(&streams, 0))
    }
}

/// AltUp of a layer, with its weights. Its router runs twice, so that its modules are no hook points.
pub(super) struct AltUp {
    config: AltUpConfig,
    router_norm: Norm,
    router: Linear,
    prediction: Linear,
    correction: Linear,
    scale: Tensor,
}

impl AltUp {
    /// Builds the AltUp of a layer at the path `at`, for streams of width `d`.
    pub fn build(config: AltUpConfig, at: &str, d: i64, norm: NormConfig, builder: &mut Builder) -> Result<Self> {
        let (path, count) = (|name: &str| format!("{at}.{MODULE}.{name}"), config.count);
        Ok(AltUp {
            config,
            router_norm: builder.norm(&path("router_norm"), d, norm)?,
            router: builder.linear(&path("modality_router"), count, d, false)?,
            prediction: builder.linear(&path("prediction_coefs"), count * count, count, false)?,
            correction: builder.linear(&path("correction_coefs"), count, count, false)?,
            scale: builder.tensor(&path("correct_output_scale"), &[d])?,
        })
    }

    /// Returns the router's output [B, L, A] for a stream x [B, L, d].
    fn route(&self, x: &Tensor) -> Tensor {
        let read = self.router_norm.forward(x, Kind::Float) / *x.size().last().expect("a stream has a width");
        self.router.forward(&read).to_kind(Kind::Float).tanh()
    }

    /// Returns the predicted streams: each plus a mixture of all, with coefficients from the active one.
    pub fn predict(&self, streams: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let routed = self.route(&self.config.active(streams));
        let mixture = hooks.linear("altup.prediction_coefs", &routed, &self.prediction)?.to_kind(Kind::Float);
        let mixture = mixture.unflatten(-1, [self.config.count, self.config.count]);
        Ok(streams + mixture.matmul(&streams.permute([1, 2, 0, 3])).permute([2, 0, 1, 3]))
    }

    /// Returns the corrected streams, given the computed active one [B, L, d]: each plus a multiple of the prediction's
    /// error.
    pub fn correct(&self, predicted: &Tensor, computed: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let routed = self.route(computed);
        let factors = hooks.linear("altup.correction_coefs", &routed, &self.correction)?.to_kind(Kind::Float) + 1.0;
        let error = computed - self.config.active(predicted);
        Ok(predicted + factors.permute([2, 0, 1]).unsqueeze(-1) * error)
    }

    /// Returns what gates the layer's input: the active stream, scaled if the config says so.
    pub fn gating(&self, streams: &Tensor) -> Tensor {
        let active = self.config.active(streams);
        if self.config.scaled { active * &self.scale } else { active }
    }

    /// Adds x [B, L, d] to all streams but the first.
    pub fn add_to_others(&self, streams: &Tensor, x: &Tensor) -> Tensor {
        let others = streams.narrow(0, 1, self.config.count - 1) + x;
        Tensor::cat(&[streams.narrow(0, 0, 1), others], 0)
    }

    /// Returns the active stream, [B, L, d].
    pub fn active(&self, streams: &Tensor) -> Tensor {
        self.config.active(streams)
    }
}
