//! What lies between the two affine maps.

use tch::Tensor;

use super::block::{Block, Input};
use crate::machine::device::on_host;

/// What a dictionary of two layers makes of its pre-activations, one by one. [`Elementwise`] implements it for a function of one
/// number, [`Pointwise`].
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

/// A function of one pre-activation z and of `P` numbers of its feature (thresholds, biases), with its derivative.
pub trait Pointwise<const P: usize, const G: usize>: Sync {
    /// Whether a sparsity penalty falls on [`Pointwise::penalized`] instead of the feature.
    const PENALIZED: bool = false;

    /// [`ActivationFunction::auxiliary`].
    const AUXILIARY: bool = false;

    /// [`ActivationFunction::bounds`], of the vectors `[F]` of the features' numbers.
    fn bounds(&self, of_features: [&Tensor; P]) -> Option<Tensor>;

    /// The feature, never negative.
    fn feature(&self, z: f32, of_feature: [f32; P]) -> f32;

    /// What a sparsity penalty falls on, never negative.
    fn penalized(&self, z: f32, of_feature: [f32; P]) -> f32 {
        self.feature(z, of_feature)
    }

    /// ∂L/∂z and what this pre-activation adds to the gradients of the feature's `G` parameters, given ∂L/∂f by the feature
    /// (with a penalty on it) and the loss's derivative by [`Pointwise::penalized`], 0 where the penalty falls on the feature.
    fn backward(&self, z: f32, of_feature: [f32; P], by_feature: f32, by_penalized: f32) -> (f32, [f32; G]);
}

/// A [`Pointwise`] function over the blocks of a batch, in one pass each, on a CPU.
#[derive(Debug)]
pub struct Elementwise<T, const P: usize, const G: usize> {
    function: T,
    of_features: [Tensor; P],
    gradients: [(&'static str, Tensor); G],
}

impl<T: Pointwise<P, G>, const P: usize, const G: usize> Elementwise<T, P, G> {
    /// The function with the vectors `[F]` that it reads, and the state-dict names of the parameters `[F]` of which
    /// [`Pointwise::backward`] gives gradients.
    pub fn new(function: T, of_features: [&Tensor; P], parameters: [(&'static str, &Tensor); G]) -> Self {
        let gradients = parameters.map(|(name, parameter)| (name, parameter.detach().zeros_like()));
        Elementwise { function, of_features: of_features.map(Tensor::detach), gradients }
    }

    fn map(&self, block: &Block, of: impl Fn(f32, [f32; P]) -> f32 + Sync) -> Tensor {
        let inputs = [Input::Each(&block.z)];
        let ([values], []) = block.map(inputs, self.of_features(), |[z], of_feature| ([of(z, of_feature)], []));
        values
    }

    fn of_features(&self) -> [&Tensor; P] {
        self.of_features.each_ref()
    }
}

impl<T: Pointwise<P, G>, const P: usize, const G: usize> ActivationFunction for Elementwise<T, P, G> {
    fn bounds(&self) -> Option<Tensor> {
        self.function.bounds(self.of_features())
    }

    fn features(&self, block: &Block) -> Tensor {
        let function = &self.function;
        self.map(block, |z, of_feature| function.feature(z, of_feature))
    }

    fn penalized(&self, block: &Block) -> Option<Tensor> {
        let function = &self.function;
        T::PENALIZED.then(|| self.map(block, |z, of_feature| function.penalized(z, of_feature)))
    }

    fn auxiliary(&self) -> bool {
        T::AUXILIARY
    }

    fn backward(&mut self, block: &Block, by: &Derivatives) -> Tensor {
        let function = &self.function;
        let by_auxiliary = by.auxiliary.as_ref().map_or(Input::Same(0.0), Input::Each);
        let inputs = [Input::Each(&block.z), Input::Each(&by.features), by_auxiliary, by.penalized.input()];
        let ([by_z], sums) =
            block.map(inputs, self.of_features(), |[z, by_feature, by_auxiliary, slope], of_feature| {
                let (by_feature, by_penalized) =
                    if T::PENALIZED { (by_feature, by_auxiliary + slope) } else { (by_feature + slope, 0.0) };
                let (by_z, gradients) = function.backward(z, of_feature, by_feature, by_penalized);
                ([by_z], gradients)
            });
        sums.iter().zip(&self.gradients).for_each(|(found, (_, gradient))| block.add_sums(found, gradient));
        by_z
    }

    fn gradients(&mut self) -> Vec<(&'static str, Tensor)> {
        self.gradients.iter().map(|(name, gradient)| (*name, gradient.shallow_clone())).collect()
    }
}

/// ReLU that propagates NaN.
pub fn relu(value: f32) -> f32 {
    if value <= 0.0 { 0.0 } else { value }
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
        let ([features], []) = block.map([Input::Each(&block.z)], [], |[z], []| ([relu(z)], []));
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
            block.map(inputs, [], |[z, by_feature, slope], []| ([if z > 0.0 { by_feature + slope } else { 0.0 }], []));
        by_z
    }
}
