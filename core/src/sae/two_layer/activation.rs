//! Activation functions between the two affine maps.

use tch::Tensor;

use super::block::{Block, Input};
use crate::machine::device::on_host;

/// Elementwise activation function of a two-layer dictionary. [`Elementwise`] implements it for any [`Pointwise`]
/// function.
pub trait ActivationFunction {
    /// Whether it works on a GPU, without [`Block::map`], on pre-activations already clamped at 0. Otherwise a GPU step
    /// uses autograd.
    fn on_gpu(&self) -> bool {
        false
    }

    /// Returns the bounds `[F]` up to which a pre-activation gives no feature and takes no gradient; `None` if all are
    /// 0.
    fn bounds(&self) -> Option<Tensor> {
        None
    }

    /// Returns a block's features, in the shape of z.
    fn features(&self, block: &Block) -> Tensor;

    /// Returns the penalised activations, in the shape of z and never negative; `None` if they are the features.
    fn penalized(&self, block: &Block) -> Option<Tensor> {
        let _ = block;
        None
    }

    /// Whether the loss has a term `aux_loss`: the squared error of the penalised activations' reconstruction, without
    /// a gradient to the decoder.
    fn auxiliary(&self) -> bool {
        false
    }

    /// Returns ∂L/∂z, in the shape of z, given the derivatives of the loss. Accumulates the gradients of its own
    /// parameters.
    fn backward(&mut self, block: &Block, by: &Derivatives) -> Tensor;

    /// Returns the gradients of its own parameters by state-dict name.
    fn gradients(&mut self) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }
}

/// Derivatives of the loss.
#[derive(Debug)]
pub struct Derivatives {
    /// ∂(reconstruction error)/∂(features), in the shape of z.
    pub features: Tensor,
    /// ∂(penalty)/∂(penalised activations).
    pub penalized: Slope,
    /// ∂(auxiliary loss)/∂(penalised activations), in the shape of z.
    pub auxiliary: Option<Tensor>,
}

/// Derivative of a penalty with respect to the penalised activations.
#[derive(Debug)]
pub enum Slope {
    /// One value for all entries.
    Same(f64),
    /// One value per entry, in the shape of z.
    Each(Tensor),
}

impl Slope {
    /// Returns the slope as an input of [`Block::map`].
    pub fn input(&self) -> Input<'_> {
        match self {
            Slope::Same(value) => Input::Same(*value),
            Slope::Each(tensor) => Input::Each(tensor),
        }
    }
}

/// Function of one pre-activation z and of `P` parameters of its feature (thresholds, biases), with its derivative.
pub trait Pointwise<const P: usize, const G: usize>: Sync {
    /// Whether a sparsity penalty applies to [`Pointwise::penalized`] instead of the feature.
    const PENALIZED: bool = false;

    /// See [`ActivationFunction::auxiliary`].
    const AUXILIARY: bool = false;

    /// See [`ActivationFunction::bounds`]; takes the features' parameters as vectors `[F]`.
    fn bounds(&self, of_features: [&Tensor; P]) -> Option<Tensor>;

    /// Returns the feature, never negative.
    fn feature(&self, z: f32, of_feature: [f32; P]) -> f32;

    /// Returns the activation that a sparsity penalty applies to, never negative.
    fn penalized(&self, z: f32, of_feature: [f32; P]) -> f32 {
        self.feature(z, of_feature)
    }

    /// Returns ∂L/∂z, and this entry's contribution to the gradients of the feature's `G` parameters. `by_feature` is
    /// ∂L/∂f, including a penalty on the feature. `by_penalized` is the derivative by [`Pointwise::penalized`], or 0 if
    /// the penalty applies to the feature.
    fn backward(&self, z: f32, of_feature: [f32; P], by_feature: f32, by_penalized: f32) -> (f32, [f32; G]);
}

/// Applies a [`Pointwise`] function to a batch's blocks on a CPU, in one pass over each.
#[derive(Debug)]
pub struct Elementwise<T, const P: usize, const G: usize> {
    function: T,
    of_features: [Tensor; P],
    gradients: [(&'static str, Tensor); G],
}

impl<T: Pointwise<P, G>, const P: usize, const G: usize> Elementwise<T, P, G> {
    /// Combines the function with the vectors `[F]` that it reads, and the parameters `[F]`, by state-dict name, whose
    /// gradients [`Pointwise::backward`] returns.
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
        // At 0 the gradient is 0, as in libtorch.
        let ([by_z], []) =
            block.map(inputs, [], |[z, by_feature, slope], []| ([if z > 0.0 { by_feature + slope } else { 0.0 }], []));
        by_z
    }
}
