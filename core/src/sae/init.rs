//! Widths and initial weights.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::data::SitePart;
use crate::error::InputError;
use crate::machine::device::Precision;
use crate::machine::memory::{self, MemoryNeed};

/// The widths of a dictionary's input, features and output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dims {
    /// Width of an activation, d.
    pub input: i64,
    /// Number of features, F.
    pub features: i64,
    /// Width of what is reconstructed; the input's, unless the dictionary predicts something else.
    pub output: i64,
}

/// What a dictionary is built for.
#[derive(Debug, Clone, Copy)]
pub struct DictionaryCx<'a> {
    /// Width of the activations, d.
    pub activation_dim: i64,
    /// Width of what is to be reconstructed.
    pub output_dim: i64,
    /// What the activations are joined of, side by side; empty where they are of one place.
    pub parts: &'a [SitePart],
    /// Where its tensors live.
    pub device: Device,
    /// The type of its matrix products.
    pub precision: Precision,
}

impl DictionaryCx<'_> {
    /// The widths of a dictionary with so many features.
    pub fn dims(&self, features: i64) -> Dims {
        Dims { input: self.activation_dim, features, output: self.output_dim }
    }

    /// The same for a dictionary that can only reconstruct what it reads.
    #[must_use]
    pub fn autoencoding(&self) -> Self {
        DictionaryCx { output_dim: self.activation_dim, ..*self }
    }
}

/// How many features a dictionary has, as a config says it.
///
/// `fields(width)` of [`component`](macro@crate::component) writes the two fields into a config, and `features`, which calls
/// this.
pub fn dict_size(dict_size: Option<i64>, expansion_factor: Option<f64>, activation_dim: i64) -> Result<i64> {
    let size = match (dict_size, expansion_factor) {
        (Some(_), Some(_)) => {
            bail!(
                InputError::new("both `dict_size` and `expansion_factor` are given")
                    .field("dict_size")
                    .help("give one of them")
            )
        }
        (Some(size), None) => size,
        (None, factor) => (factor.unwrap_or(8.0) * activation_dim as f64).round() as i64,
    };
    if size < 1 {
        let field = if dict_size.is_some() { "dict_size" } else { "expansion_factor" };
        bail!(
            InputError::new(format!("a dictionary of {size} features")).field(field).help("it must have at least one")
        );
    }
    // Two matrices and what they are made from: what it takes to be there at all, long before it is trained.
    let bytes = (size as u64).saturating_mul(activation_dim.max(1) as u64).saturating_mul(4 * 4);
    let field = if dict_size.is_some() { "dict_size" } else { "expansion_factor" };
    memory::check(&MemoryNeed::lasting(format!("{size} features of width {activation_dim}"), bytes, field))?;
    Ok(size)
}

/// A matrix of zeros to be trained, of which dimension `feature_dim` counts the features. In memory the numbers of a
/// feature lie in one piece whichever it is, which is how a training step goes through them.
pub fn trained_matrix(size: [i64; 2], feature_dim: i64, device: Device) -> Tensor {
    let zeros = |size: [i64; 2]| Tensor::zeros(size, (Kind::Float, device));
    trained(if feature_dim == 0 { zeros(size) } else { zeros([size[1], size[0]]).tr() })
}

/// A tensor as a parameter, to be trained.
pub fn trained(tensor: Tensor) -> Tensor {
    tensor.detach().set_requires_grad(true)
}

/// Random directions of that norm, the columns of a decoder [d, F]: uniform on the sphere (some of the reference's
/// dictionaries draw from a cube and normalise).
pub fn random_directions(dims: [i64; 2], norm: f64, device: Device) -> Tensor {
    let directions = randn(dims, device);
    &directions / directions.norm_scalaropt_dim(2.0, [0], true) * norm
}

/// The decoder [d_out, F] to go with an encoder whose rows are these directions, [d, F], of that norm: the same, where
/// what is reconstructed is the input's width, and random directions otherwise.
pub fn decoder_for(directions: Tensor, norm: f64, cx: &DictionaryCx) -> Tensor {
    if cx.output_dim == cx.activation_dim {
        return directions;
    }
    random_directions([cx.output_dim, directions.size()[1]], norm, cx.device)
}

/// A matrix [rows, columns] of independent normal numbers.
fn randn(size: [i64; 2], device: Device) -> Tensor {
    // Drawn on the CPU, so that a seed means the same weights on every device.
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_device(device)
}
