//! The step by hand: no graph is built, and where few features fire, most products are taken of these alone.
//!
//! Core takes the step of any dictionary of two layers, whatever lies between them, for a trainer that says what its
//! penalty is and what its derivative:
//!
//! ```text
//! P = λ mean Σ tanh(f / s)        ∂P/∂f = λ (1 − tanh²(f / s)) / (s B)
//! ```

use dictlearn_core::prelude::*;
use dictlearn_core::train::analytic;
use dictlearn_core::train::analytic::{Penalty, squared_error};

use crate::TanhConfig;

/// λ, and what it falls on.
struct Tanh<'a> {
    config: &'a TanhConfig,
    /// Σ tanh(f / s) of each activation, [B].
    sums: Tensor,
}

impl Tanh<'_> {
    fn saturated(&self, activations: &Tensor) -> Tensor {
        (activations.to_kind(Kind::Float) / self.config.scale).tanh()
    }
}

impl Penalty for Tanh<'_> {
    fn see(&mut self, block: &Block, activations: &Tensor) {
        self.sums += block.sum_by_row(&self.saturated(activations));
    }

    fn terms(&mut self, terms: &mut Terms) -> Result<()> {
        terms.add_sparsity("sparsity_loss", self.sums.mean(Kind::Float), self.config.sparsity_penalty);
        Ok(())
    }

    fn slope(&self, _: &Block, activations: &dyn Fn() -> Tensor) -> Slope {
        let scale = self.config.sparsity_penalty / (self.config.scale * self.sums.numel() as f64);
        Slope::Each((self.saturated(&activations()).square() - 1.0) * -scale)
    }
}

/// The step; a dictionary of another kind is left to autograd.
pub fn by_hand(config: &TanhConfig, pass: &HandPass, terms: &mut Terms) -> Result<Option<ByHand>> {
    let Some(Between::Elementwise(mut activation)) = pass.dictionary.between() else { return Ok(None) };
    let sums = Tensor::zeros([pass.batch.len()], (Kind::Float, pass.batch.x.device()));
    let mut penalty = Tanh { config, sums };
    analytic::step(pass, terms, &mut *activation, &squared_error("mse_loss"), &mut penalty, false)
}
