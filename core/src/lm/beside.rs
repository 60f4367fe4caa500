//! Experts beside a layer's MLP, as in Gemma 4: both read the residual stream, and the sum of their outputs enters it.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::blocks::residual;
use super::build::Builder;
use super::experts::{Experts, ExpertsConfig};
use super::model::{Hooks, Stop};
use super::norm::{Norm, NormConfig};

/// Experts beside the MLP of a layer.
#[derive(Debug, Clone)]
pub struct BesideConfig {
    /// The experts; their router reads the residual stream.
    pub experts: ExpertsConfig,
    /// Norm of the MLP's output.
    pub after_mlp: &'static str,
    /// Norm of the experts' input.
    pub before_experts: &'static str,
    /// Norm of the experts' output.
    pub after_experts: &'static str,
}

/// Experts beside an MLP, with their weights.
pub(super) struct Beside {
    config: BesideConfig,
    experts: Experts,
    after_mlp: Norm,
    before_experts: Norm,
    after_experts: Norm,
}

impl Beside {
    /// Builds the experts of a layer at the path `at`, for a residual stream of width `d`.
    pub fn build(config: &BesideConfig, at: &str, d: i64, norm: NormConfig, builder: &mut Builder) -> Result<Self> {
        let experts = Experts::build(&config.experts, at, d, builder)?;
        let mut norm = |name: &str| builder.norm(&format!("{at}.{name}"), d, norm);
        Ok(Beside {
            after_mlp: norm(config.after_mlp)?,
            before_experts: norm(config.before_experts)?,
            after_experts: norm(config.after_experts)?,
            config: config.clone(),
            experts,
        })
    }

    /// Returns the experts.
    pub fn experts(&self) -> &Experts {
        &self.experts
    }

    /// Returns the sum of both branches' outputs, float32 [B, L, d], for the MLP's output and the residual stream x.
    pub fn join(&self, mlp: &Tensor, x: &Tensor, kind: Kind, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let config = &self.config;
        let mlp = hooks.norm(config.after_mlp, mlp, &self.after_mlp, Kind::Float)?;
        let logits = self.experts.route(x, hooks)?;
        let read = hooks.norm(config.before_experts, x, &self.before_experts, kind)?;
        let output = self.experts.sum(&read, &logits, hooks)?;
        let output = hooks.norm(config.after_experts, &output, &self.after_experts, Kind::Float)?;
        Ok(residual(&mlp, &output))
    }
}
