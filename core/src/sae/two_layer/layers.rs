//! The weights of a dictionary of two affine maps.

use tch::Tensor;

use crate::machine::device::Precision;
use crate::sae::affine::Affine;

/// A weight or bias by its state-dict name.
#[derive(Debug)]
pub struct Weight {
    /// Its state-dict name.
    pub name: &'static str,
    /// Its numbers, without history, sharing memory with the parameter.
    pub tensor: Tensor,
    /// Which of a matrix's two dimensions counts the features; 0 for a vector.
    pub feature_dim: i64,
    /// The gradient of the step before, undefined if there is none, to be written over.
    pub(crate) gradient: Tensor,
}

impl Weight {
    /// A vector.
    pub fn vector(name: &'static str, tensor: &Tensor) -> Self {
        Weight { name, tensor: tensor.detach(), feature_dim: 0, gradient: tensor.grad() }
    }

    /// A matrix, of which this dimension counts the features.
    pub fn matrix(name: &'static str, tensor: &Tensor, feature_dim: i64) -> Self {
        Weight { name, tensor: tensor.detach(), feature_dim, gradient: tensor.grad() }
    }

    /// Of a matrix, the features as rows: [F, d].
    pub(crate) fn rows(&self) -> Tensor {
        self.turned(&self.tensor)
    }

    pub(crate) fn turned(&self, tensor: &Tensor) -> Tensor {
        if self.feature_dim == 0 { tensor.shallow_clone() } else { tensor.tr() }
    }

    /// Room for its gradient as rows, where the last one was if possible.
    pub(crate) fn room(&self) -> Tensor {
        let rows = self.rows();
        if self.gradient.defined() {
            let room = self.turned(&self.gradient);
            if room.size() == rows.size() && room.is_contiguous() && room.kind() == rows.kind() {
                return room;
            }
        }
        rows.empty_like()
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

impl From<&Affine> for TwoLayer {
    fn from(affine: &Affine) -> Self {
        let matrix = |weight: crate::sae::Decoder| Weight::matrix(weight.name, &weight.weight, weight.feature_dim);
        let vector = |(name, bias): (&'static str, &Tensor)| Weight::vector(name, bias);
        TwoLayer {
            encoder: matrix(affine.encoder()),
            encoder_bias: affine.encoder_bias().map(vector),
            decoder: matrix(affine.decoder()),
            bias: vector(affine.bias()),
            centred: affine.is_centred(),
            precision: affine.precision(),
        }
    }
}
