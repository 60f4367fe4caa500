//! A weight matrix, a direction for each feature.

use tch::Tensor;

/// The weight matrix of an encoder or decoder: a direction for each feature.
#[derive(Debug)]
pub struct Weight {
    /// Its state-dict name.
    pub name: &'static str,
    /// Its numbers, sharing memory with the dictionary's.
    pub tensor: Tensor,
    /// Which of the two dimensions counts the features: 0 of [F, d] (`encoder.weight`, `W_dec`), 1 of [d, F] (`decoder.weight`,
    /// `W_enc`).
    pub feature_dim: i64,
}

impl Weight {
    /// The other dimension: along which a feature's direction lies.
    pub fn direction_dim(&self) -> i64 {
        1 - self.feature_dim
    }

    /// The features' directions as rows, [F, d], sharing memory with the weight.
    pub fn rows(&self) -> Tensor {
        self.like_rows(&self.tensor)
    }

    /// Turns a tensor of this one's shape to rows, [F, d], or rows to this one's shape.
    pub(crate) fn like_rows(&self, tensor: &Tensor) -> Tensor {
        if self.feature_dim == 0 { tensor.shallow_clone() } else { tensor.tr() }
    }

    /// The features' directions as columns, [d, F], sharing memory with the weight.
    pub fn columns(&self) -> Tensor {
        if self.feature_dim == 1 { self.tensor.shallow_clone() } else { self.tensor.tr() }
    }

    /// Norms of the features' directions, `[F]`.
    pub fn norms(&self) -> Tensor {
        self.tensor.norm_scalaropt_dim(2.0, [self.direction_dim()], false)
    }
}

impl Weight {
    /// Divides the features' directions by their norms, and gives these, `[F]`; `None` where they are 1 already. A
    /// direction of zeros stays.
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

/// What feeds a feature: a row of the encoder's weight, and entries of vectors of length F. For resampling.
#[derive(Debug)]
pub struct Encoder {
    /// The weight.
    pub weight: Weight,
    /// State-dict names of the vectors `[F]` that become 0 when a feature is resampled.
    pub biases: Vec<&'static str>,
}
