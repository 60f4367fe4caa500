//! Inputs that tokens give to each layer, beside the residual stream (per-layer embeddings, Gemma 3n,
//! <https://ai.google.dev/gemma/docs/gemma-3n>).

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::blocks::{Activation, Linear};
use super::build::Builder;
use super::model::{Hooks, Stop};
use super::norm::{Norm, NormConfig};
use crate::error::InputError;

/// Inputs of N layers, [B, L, N, p].
#[derive(Debug, Clone, Copy)]
pub struct PerLayerConfig {
    /// Width p of a layer's input.
    pub width: i64,
    /// Number of token ids with an embedding of their own; the others have that of id 0.
    pub vocab_size: i64,
    /// Activation function of the layers' gates.
    pub act: Activation,
}

impl PerLayerConfig {
    pub(super) fn check(&self) -> Result<()> {
        let named = [("hidden_size_per_layer_input", self.width), ("vocab_size_per_layer_input", self.vocab_size)];
        if let Some((name, found)) = named.iter().find(|(_, number)| *number < 1) {
            bail!(InputError::new(format!("config.json: `{name}` is {found}, not positive")));
        }
        Ok(())
    }
}

/// The inputs of all layers: an embedding of the token, and a map of its embedding in the residual stream.
pub(super) struct PerLayerInputs {
    config: PerLayerConfig,
    root: &'static str,
    layers: i64,
    tokens: Tensor,
    project: Linear,
    norm: Norm,
}

impl PerLayerInputs {
    /// Builds the inputs of a number of layers, in the module `root`, for embeddings of width `d`.
    pub fn build(
        config: PerLayerConfig,
        (root, layers): (&'static str, usize),
        d: i64,
        norm: NormConfig,
        builder: &mut Builder,
    ) -> Result<Self> {
        let layers = layers as i64;
        let all = layers.saturating_mul(config.width);
        Ok(PerLayerInputs {
            config,
            root,
            layers,
            tokens: builder.matrix(&format!("{root}.embed_tokens_per_layer.weight"), &[config.vocab_size, all])?,
            project: builder.linear(&format!("{root}.per_layer_model_projection"), all, d, false)?,
            norm: builder.norm(&format!("{root}.per_layer_projection_norm"), config.width, norm)?,
        })
    }

    /// Returns the inputs [B, L, N, p], float32, for token ids [B, L] and their embeddings x [B, L, d].
    pub fn forward(&self, ids: &Tensor, x: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let PerLayerConfig { width, vocab_size, .. } = self.config;
        let path = |name: &str| format!("{}.{name}", self.root);
        let ids = ids.masked_fill(&ids.ge(vocab_size), 0);
        let own = hooks.module(&path("embed_tokens_per_layer"), &ids, |_, ids| {
            let x = Tensor::embedding(&self.tokens, ids, -1, false, false).to_kind(Kind::Float);
            Ok(x * (width as f64).sqrt())
        })?;
        let d = *x.size().last().expect("embeddings have a width") as f64;
        let mapped = hooks.linear(&path("per_layer_model_projection"), x, &self.project)?.to_kind(Kind::Float);
        let mapped = (mapped / d.sqrt()).unflatten(-1, [self.layers, width]);
        let mapped = hooks.norm(&path("per_layer_projection_norm"), &mapped, &self.norm, Kind::Float)?;
        Ok((mapped + own.unflatten(-1, [self.layers, width])) / std::f64::consts::SQRT_2)
    }
}

/// What a layer does with its input; its modules are the layer's.
pub(super) struct PerLayer {
    act: Activation,
    gate: Linear,
    project: Linear,
    norm: Norm,
}

impl PerLayer {
    /// Builds the modules of a layer at the path `at`, for a residual stream of width `d`.
    pub fn build(config: PerLayerConfig, at: &str, d: i64, norm: NormConfig, builder: &mut Builder) -> Result<Self> {
        Ok(PerLayer {
            act: config.act,
            gate: builder.linear(&format!("{at}.per_layer_input_gate"), config.width, d, false)?,
            project: builder.linear(&format!("{at}.per_layer_projection"), d, config.width, false)?,
            norm: builder.norm(&format!("{at}.post_per_layer_input_norm"), d, norm)?,
        })
    }

    /// Returns norm(project(act(gate(x)) · input)), float32 [B, L, d], for the layer's input [B, L, p].
    pub fn forward(&self, x: &Tensor, input: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let gate = hooks.linear("per_layer_input_gate", x, &self.gate)?;
        let gate = hooks.module("act_fn", &gate, |_, x| Ok(self.act.forward(x)))?;
        let output = hooks.linear("per_layer_projection", &(gate * input), &self.project)?;
        hooks.norm("post_per_layer_input_norm", &output, &self.norm, Kind::Float)
    }
}
