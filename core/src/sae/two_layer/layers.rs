//! The weights of a dictionary of two affine maps.

use tch::Tensor;

use crate::machine::device::Precision;

/// A weight or bias by its state-dict name.
#[derive(Debug)]
pub struct Weight {
    /// Its state-dict name.
    pub name: &'static str,
    /// Its numbers, without history, sharing memory with the parameter.
    pub tensor: Tensor,
    /// Which of a matrix's two dimensions counts the features; 0 for a vector.
    pub feature_dim: i64,
}

impl Weight {
    /// A vector.
    pub fn vector(name: &'static str, tensor: &Tensor) -> Self {
        Weight { name, tensor: tensor.detach(), feature_dim: 0 }
    }

    /// A matrix, of which this dimension counts the features.
    pub fn matrix(name: &'static str, tensor: &Tensor, feature_dim: i64) -> Self {
        Weight { name, tensor: tensor.detach(), feature_dim }
    }

    /// Of a matrix, the features as rows: [F, d].
    pub(crate) fn rows(&self) -> Tensor {
        self.turned(&self.tensor)
    }

    pub(crate) fn turned(&self, tensor: &Tensor) -> Tensor {
        if self.feature_dim == 0 { tensor.shallow_clone() } else { tensor.tr() }
    }

    /// A gradient of rows in the parameter's shape.
    pub(crate) fn of_rows(&self, rows: Tensor) -> (&'static str, Tensor) {
        (self.name, if self.feature_dim == 0 { rows } else { rows.tr() })
    }
}

/// The weights of a dictionary of two layers.
#[derive(Debug)]
pub struct TwoLayer {
    /// W_e.
    pub encoder: Weight,
    /// b_e; none where the activation has biases of its own.
    pub encoder_bias: Option<Weight>,
    /// W_d.
    pub decoder: Weight,
    /// b, which the reconstruction ends with.
    pub bias: Weight,
    /// Whether b is taken from what the encoder reads.
    pub centred: bool,
    /// The type of the products.
    pub precision: Precision,
}
