//! LAuReL: a learned residual connection of low rank beside attention (Menghani et al. 2024,
//! <https://arxiv.org/abs/2411.07501>).

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::blocks::{Linear, residual};
use super::build::Builder;
use super::model::{Hooks, Stop};
use super::norm::{Norm, NormConfig};
use crate::error::InputError;

/// Learned residual connection of a layer, the module `laurel`.
#[derive(Debug, Clone, Copy)]
pub struct LaurelConfig {
    /// Rank of its map.
    pub rank: i64,
}

impl LaurelConfig {
    pub(super) fn check(&self) -> Result<()> {
        if self.rank < 1 {
            bail!(InputError::new(format!("config.json: `laurel_rank` is {}, not positive", self.rank)));
        }
        Ok(())
    }
}

/// A learned residual connection with its weights.
pub(super) struct Laurel {
    left: Linear,
    right: Linear,
    norm: Norm,
}

impl Laurel {
    /// Builds the connection of a layer at the path `at`, for a residual stream of width `d`.
    pub fn build(config: LaurelConfig, at: &str, d: i64, norm: NormConfig, builder: &mut Builder) -> Result<Self> {
        let path = |name: &str| format!("{at}.laurel.{name}");
        Ok(Laurel {
            left: builder.linear(&path("linear_left"), config.rank, d, false)?,
            right: builder.linear(&path("linear_right"), d, config.rank, false)?,
            norm: builder.norm(&path("post_laurel_norm"), d, norm)?,
        })
    }

    /// Returns x + norm(right(left(x))), float32, for attention's input x [B, L, d].
    fn forward(&self, x: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        hooks.module("laurel", x, |hooks, x| {
            let low = hooks.linear("linear_left", x, &self.left)?;
            let map = hooks.linear("linear_right", &low, &self.right)?;
            Ok(residual(x, &hooks.norm("post_laurel_norm", &map, &self.norm, Kind::Float)?))
        })
    }

    /// Returns (middle + laurel(read)) / √2, where `middle` is the residual stream after attention, and `read` is
    /// attention's input.
    pub fn join(&self, middle: &Tensor, read: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        Ok(residual(middle, &self.forward(read, hooks)?) / std::f64::consts::SQRT_2)
    }
}
