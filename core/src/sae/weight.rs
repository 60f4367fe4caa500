//! A weight matrix with one direction per feature.

use tch::Tensor;

/// The weight matrix of an encoder or decoder, with one direction per feature.
#[derive(Debug)]
pub struct Weight {
    /// State-dict name.
    pub name: &'static str,
    /// Values, sharing memory with the dictionary's tensor.
    pub tensor: Tensor,
    /// Dimension that indexes the features: 0 for `[F, d]` (`encoder.weight`, `W_dec`), 1 for `[d, F]`
    /// (`decoder.weight`, `W_enc`).
    pub feature_dim: i64,
}

impl Weight {
    /// Returns the other dimension, along which a feature's direction lies.
    pub fn direction_dim(&self) -> i64 {
        1 - self.feature_dim
    }

    /// Returns the features' directions as rows `[F, d]`, sharing memory with the weight.
    pub fn rows(&self) -> Tensor {
        self.like_rows(&self.tensor)
    }

    /// Transposes a tensor of the weight's shape to rows `[F, d]` if needed, or rows back to the weight's shape.
    pub(crate) fn like_rows(&self, tensor: &Tensor) -> Tensor {
        if self.feature_dim == 0 { tensor.shallow_clone() } else { tensor.tr() }
    }

    /// Returns the features' directions as columns `[d, F]`, sharing memory with the weight.
    pub fn columns(&self) -> Tensor {
        if self.feature_dim == 1 { self.tensor.shallow_clone() } else { self.tensor.tr() }
    }

    /// Returns the norms of the features' directions, `[F]`.
    pub fn norms(&self) -> Tensor {
        self.tensor.norm_scalaropt_dim(2.0, [self.direction_dim()], false)
    }
}

impl Weight {
    /// Divides the features' directions by their norms in place and returns the norms `[F]`, or `None` if all are
    /// already 1. A zero direction is left unchanged.
    pub fn normalize(mut self) -> Option<Tensor> {
        tch::no_grad(|| {
            let norms = self.norms();
            let norms = norms.where_self(&norms.gt(0.0), &norms.ones_like());
            if norms.allclose(&norms.ones_like(), 1e-5, 1e-8, false) {
                return None;
            }
            let _ = self.tensor.g_div_(&norms.unsqueeze(self.direction_dim()));
            Some(norms)
        })
    }
}

/// The encoder's parameters of each feature: a row of its weight and entries of vectors of length F. Used for
/// resampling.
#[derive(Debug)]
pub struct Encoder {
    /// Weight.
    pub weight: Weight,
    /// State-dict names of the vectors `[F]` whose entry is set to 0 when a feature is resampled.
    pub biases: Vec<&'static str>,
}
