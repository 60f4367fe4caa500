//! A weight matrix, a direction for each feature.

use tch::Tensor;

/// A decoder's weight, and which of its two dimensions counts the features.
#[derive(Debug)]
pub struct Decoder {
    /// Its state-dict name.
    pub name: &'static str,
    /// The weight, sharing memory with the dictionary's.
    pub weight: Tensor,
    /// 1 for [d, F] (`decoder.weight`), 0 for [F, d] (`W_dec`).
    pub feature_dim: i64,
}

impl Decoder {
    /// The other dimension: along which a feature's direction lies.
    pub fn direction_dim(&self) -> i64 {
        1 - self.feature_dim
    }

    /// The features' directions as rows, [F, d], sharing memory with the weight.
    pub fn rows(&self) -> Tensor {
        if self.feature_dim == 0 { self.weight.shallow_clone() } else { self.weight.tr() }
    }

    /// The features' directions as columns, [d, F], sharing memory with the weight.
    pub fn columns(&self) -> Tensor {
        if self.feature_dim == 1 { self.weight.shallow_clone() } else { self.weight.tr() }
    }

    /// Norms of the features' directions, `[F]`.
    pub fn norms(&self) -> Tensor {
        self.weight.norm_scalaropt_dim(2.0, [self.direction_dim()], false)
    }
}

impl Decoder {
    /// Divides the features' directions by their norms, and gives these, `[F]`; `None` where they are 1 already. A
    /// direction of zeros stays.
    pub fn normalize(mut self) -> Option<Tensor> {
        tch::no_grad(|| {
            let norms = self.norms();
            let norms = norms.where_self(&norms.gt(0.0), &norms.ones_like());
            if norms.allclose(&norms.ones_like(), 1e-5, 1e-8, false) {
                return None;
            }
            let _ = self.weight.g_div_(&norms.unsqueeze(self.direction_dim()));
            Some(norms)
        })
    }
}

/// What feeds a feature: a row of the encoder's weight, and entries of vectors of length F. For resampling.
#[derive(Debug)]
pub struct Encoder {
    /// The weight.
    pub weight: Decoder,
    /// State-dict names of the vectors `[F]` that become 0 when a feature is resampled.
    pub biases: Vec<&'static str>,
}
