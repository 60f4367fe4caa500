//! What lies between the two affine maps.

use tch::Tensor;

use super::block::{Block, Input};
use crate::machine::device::on_host;

/// What a dictionary of two layers makes of its pre-activations, one by one. Implementations calculate with
/// [`Block::map`], in one pass.
pub trait ActivationFunction {
    /// Whether it can be calculated where there is no [`Block::map`], on a GPU, of pre-activations that were raised to 0. Otherwise a
    /// step there is autograd's.
    fn on_gpu(&self) -> bool {
        false
    }

    /// Up to where pre-activations are no features, and take no gradient: `[F]`; none if that is 0 for all.
    fn bounds(&self) -> Option<Tensor> {
        None
    }

    /// Features of a block, as z.
    fn features(&self, block: &Block) -> Tensor;

    /// What a penalty falls on, as z and never negative, where that is not the features.
    fn penalized(&self, block: &Block) -> Option<Tensor> {
        let _ = block;
        None
    }

    /// Whether the loss has a term `aux_loss`, the squared error of what the penalised activations decode to, which the
    /// decoder takes no gradient of.
    fn auxiliary(&self) -> bool {
        false
    }

    /// ∂L/∂z, as z, for the derivatives of the loss. It adds the gradients of parameters of its own.
    fn backward(&mut self, block: &Block, by: &Derivatives) -> Tensor;

    /// The gradients of parameters of its own, by state-dict names.
    fn gradients(&mut self) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }
}

/// Derivatives of the loss.
#[derive(Debug)]
pub struct Derivatives {
    /// Of the reconstruction, by the features, as z.
    pub features: Tensor,
    /// Of the penalty, by what it falls on.
    pub penalized: Slope,
    /// Of the auxiliary loss, by the penalised activations, as z.
    pub auxiliary: Option<Tensor>,
}

/// A penalty's derivative by what it falls on.
#[derive(Debug)]
pub enum Slope {
    /// The same everywhere.
    Same(f64),
    /// One number each, as z.
    Each(Tensor),
}

impl Slope {
    /// To calculate with.
    pub fn input(&self) -> Input<'_> {
        match self {
            Slope::Same(value) => Input::Same(*value),
            Slope::Each(tensor) => Input::Each(tensor),
        }
    }
}

/// f = ReLU(z).
#[derive(Debug)]
pub struct Relu;

impl ActivationFunction for Relu {
    fn on_gpu(&self) -> bool {
        true
    }

    fn features(&self, block: &Block) -> Tensor {
        if !on_host(block.z.device()) {
            return block.z.shallow_clone();
        }
        let ([features], []) = block.map([Input::Each(&block.z)], |[z]| ([if z <= 0.0 { 0.0 } else { z }], []));
        features
    }

    fn backward(&mut self, block: &Block, by: &Derivatives) -> Tensor {
        if !on_host(block.z.device()) {
            let by_feature = match &by.penalized {
                Slope::Same(value) => &by.features + *value,
                Slope::Each(slope) => &by.features + slope,
            };
            return block.z.threshold_backward(&by_feature.to_kind(block.z.kind()), 0);
        }
        let inputs = [Input::Each(&block.z), Input::Each(&by.features), by.penalized.input()];
        // At 0 ReLU passes nothing on, in libtorch either.
        let ([by_z], []) =
            block.map(inputs, |[z, by_feature, slope]| ([if z > 0.0 { by_feature + slope } else { 0.0 }], []));
        by_z
    }
}
