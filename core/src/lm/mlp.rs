//! Multilayer perceptrons of a layer.

use std::f64::consts::SQRT_2;

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::blocks::{Activation, Linear};
use super::build::Builder;
use super::model::{Hooks, Stop};
use crate::error::InputError;

/// MLP of a layer.
#[derive(Debug, Clone)]
pub struct MlpConfig {
    /// Path in a layer; empty if the projections are modules of the layer.
    pub path: &'static str,
    /// Width.
    pub width: i64,
    /// Projections.
    pub layout: MlpLayout,
    /// Path of the activation function in the MLP.
    pub act_path: &'static str,
    /// Activation function.
    pub act: Activation,
    /// Fraction of gates to set to 0, of the layout [`MlpLayout::Gated`]: a gate passes as far as it exceeds this
    /// quantile of a normal distribution with the gates' mean and variance (Gemma 3n). 0 for none.
    pub sparsity: f64,
    /// Whether the projections have biases.
    pub bias: bool,
    /// Whether weights are stored transposed, [in, out], as in GPT-2.
    pub transposed: bool,
}

impl MlpConfig {
    /// Returns an MLP with biases and without a gate: module `mlp`, activation function in `act`.
    pub fn plain(width: i64, (up, down): (&'static str, &'static str), act: Activation) -> Self {
        let layout = MlpLayout::Plain { up, down };
        MlpConfig { path: "mlp", width, layout, act_path: "act", act, sparsity: 0.0, bias: true, transposed: false }
    }

    /// Returns an MLP with a gate and without biases: module `mlp`, activation function in `act_fn`.
    pub fn gated(width: i64, act: Activation) -> Self {
        let layout = MlpLayout::Gated { gate: "gate_proj", up: "up_proj", down: "down_proj" };
        MlpConfig { path: "mlp", width, layout, act_path: "act_fn", act, sparsity: 0.0, bias: false, transposed: false }
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.width < 1 {
            bail!(InputError::new(format!("config.json: the width of the MLP is {}", self.width)));
        }
        if !(0.0..1.0).contains(&self.sparsity) {
            bail!(InputError::new(format!(
                "config.json: `activation_sparsity_pattern` has {}, not from 0 to below 1",
                self.sparsity
            )));
        }
        Ok(())
    }
}

/// Projections of an MLP, by name.
#[derive(Debug, Clone, Copy)]
pub enum MlpLayout {
    /// down(act(up(x))).
    Plain {
        /// To the MLP's width.
        up: &'static str,
        /// Back to the residual stream's width.
        down: &'static str,
    },
    /// down(act(gate(x)) · up(x)) (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).
    Gated {
        /// Gate projection.
        gate: &'static str,
        /// Up projection.
        up: &'static str,
        /// Back to the residual stream's width.
        down: &'static str,
    },
    /// `Gated` with gate and up in one projection, in this order.
    GatedJoined {
        /// Gate and up projection.
        gate_up: &'static str,
        /// Back to the residual stream's width.
        down: &'static str,
    },
}

impl MlpLayout {
    /// Returns the first projection, the one that an activated gate is multiplied with, and the last.
    pub(super) fn names(self) -> (Option<&'static str>, Option<&'static str>, &'static str) {
        match self {
            MlpLayout::Plain { up, down } => (Some(up), None, down),
            MlpLayout::Gated { gate, up, down } => (Some(gate), Some(up), down),
            MlpLayout::GatedJoined { down, .. } => (None, None, down),
        }
    }
}

/// An MLP with its weights.
pub(super) struct Mlp {
    config: MlpConfig,
    up: Linear,
    gate: Option<Linear>,
    down: Linear,
}

impl Mlp {
    /// Builds the MLP of a layer at the path `at`, for a residual stream of width `d`.
    pub fn build(config: &MlpConfig, at: &str, d: i64, builder: &mut Builder) -> Result<Self> {
        let path = if config.path.is_empty() { at.to_owned() } else { format!("{at}.{}", config.path) };
        let mut project = |name: &str, output: i64, input: i64| {
            let path = format!("{path}.{name}");
            match config.transposed {
                true => builder.transposed(&path, output, input, config.bias),
                false => builder.linear(&path, output, input, config.bias),
            }
        };
        let width = config.width;
        let (gate, up, down) = match config.layout {
            MlpLayout::Plain { up, down } => (None, project(up, width, d)?, project(down, d, width)?),
            MlpLayout::Gated { gate, up, down } => {
                (Some(project(gate, width, d)?), project(up, width, d)?, project(down, d, width)?)
            }
            MlpLayout::GatedJoined { gate_up, down } => {
                (None, project(gate_up, 2 * width, d)?, project(down, d, width)?)
            }
        };
        Ok(Mlp { config: config.clone(), up, gate, down })
    }

    /// Returns the output for x [B, L, d], as the module at the MLP's path.
    pub fn forward(&self, x: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let config = &self.config;
        let act = |hooks: &mut Hooks, x: &Tensor| hooks.module(config.act_path, x, |_, x| Ok(config.act.forward(x)));
        let (wide, down) = match (config.layout, &self.gate) {
            (MlpLayout::Gated { gate, up, down }, Some(to_gate)) => {
                let gate = self.sparse(hooks.linear(gate, x, to_gate)?);
                // No hook reads the activation, so no tensor is made for it.
                if !hooks.sees(config.act_path) {
                    let up = hooks.linear(up, x, &self.up)?;
                    return hooks.linear(down, &config.act.gated(&gate, &up), &self.down);
                }
                let gate = act(hooks, &gate)?;
                (gate * hooks.linear(up, x, &self.up)?, down)
            }
            (MlpLayout::GatedJoined { gate_up, down }, _) => {
                let both = hooks.linear(gate_up, x, &self.up)?.chunk(2, -1);
                (&both[1] * act(hooks, &both[0])?, down)
            }
            (MlpLayout::Plain { up, down } | MlpLayout::Gated { up, down, .. }, _) => {
                let wide = hooks.linear(up, x, &self.up)?;
                (act(hooks, &wide)?, down)
            }
        };
        hooks.linear(down, &wide, &self.down)
    }
    /// Returns the gates [B, L, width] with a fraction of them set to 0, and the rest lowered by what they must exceed.
    fn sparse(&self, gate: Tensor) -> Tensor {
        if self.config.sparsity == 0.0 {
            return gate;
        }
        // The operations and roundings of transformers: few gates pass, by differences of nearly equal numbers.
        let fraction = Tensor::from(self.config.sparsity as f32);
        let quantile = ((fraction * 2.0 - 1.0).erfinv() * SQRT_2).double_value(&[]);
        let wide = gate.to_kind(Kind::Float);
        let mean = wide.mean_dim([-1].as_slice(), true, Kind::Float);
        let cutoff = mean + wide.std_dim([-1].as_slice(), false, true) * quantile;
        (wide - cutoff).relu().to_kind(gate.kind())
    }
}
