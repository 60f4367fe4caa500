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
    /// Width of the reconstruction; equal to `input` unless the dictionary predicts other activations.
    pub output: i64,
}

/// Context in which a dictionary is built.
#[derive(Debug, Clone, Copy)]
pub struct DictionaryCx<'a> {
    /// Width of the activations, d.
    pub activation_dim: i64,
    /// Width of the reconstruction target.
    pub output_dim: i64,
    /// Parts that are concatenated into one activation; empty if the site has only one.
    pub parts: &'a [SitePart],
    /// Device of the dictionary's tensors.
    pub device: Device,
    /// Precision of the matrix products.
    pub precision: Precision,
}

impl DictionaryCx<'_> {
    /// Returns the dims of a dictionary with this many features.
    pub fn dims(&self, features: i64) -> Dims {
        Dims { input: self.activation_dim, features, output: self.output_dim }
    }

    /// Returns the same context with the output width set to the input width, for dictionaries that can only
    /// autoencode.
    #[must_use]
    pub fn autoencoding(&self) -> Self {
        DictionaryCx { output_dim: self.activation_dim, ..*self }
    }
}

/// Returns the number of features F that a config asks for; `expansion_factor` is relative to `activation_dim` (default
/// 8).
///
/// The `fields(width)` argument of [`component`](macro@crate::component) adds both fields to a config, and a method
/// `features` that calls this function.
///
/// Fails if both are given, or if F is below 1 or cannot fit in memory.
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
    // Lower bound: two matrices and the temporaries that initialise them, before any training state.
    let bytes = (size as u64).saturating_mul(activation_dim.max(1) as u64).saturating_mul(4 * 4);
    let field = if dict_size.is_some() { "dict_size" } else { "expansion_factor" };
    memory::check(&MemoryNeed::lasting(format!("{size} features of width {activation_dim}"), bytes, field))?;
    Ok(size)
}

/// Returns a trainable matrix of zeros whose dimension `feature_dim` indexes the features. Each feature's values are
/// contiguous in memory either way, because a training step reads them feature by feature.
pub fn trained_matrix(size: [i64; 2], feature_dim: i64, device: Device) -> Tensor {
    let zeros = |size: [i64; 2]| Tensor::zeros(size, (Kind::Float, device));
    trained(if feature_dim == 0 { zeros(size) } else { zeros([size[1], size[0]]).tr() })
}

/// Detaches a tensor and makes it a trainable parameter.
pub fn trained(tensor: Tensor) -> Tensor {
    tensor.detach().set_requires_grad(true)
}

/// Returns random directions of this norm as columns `[d, F]` of a decoder, uniform on the sphere (some of the
/// reference's dictionaries draw from a cube and normalise).
pub fn random_directions(dims: [i64; 2], norm: f64, device: Device) -> Tensor {
    let directions = randn(dims, device);
    &directions / directions.norm_scalaropt_dim(2.0, [0], true) * norm
}

/// Returns a decoder `[d_out, F]` for an encoder that reads these `directions` `[d, F]` of this norm: the same
/// directions if input and output have one width, random ones otherwise.
pub fn decoder_for(directions: Tensor, norm: f64, cx: &DictionaryCx) -> Tensor {
    if cx.output_dim == cx.activation_dim {
        return directions;
    }
    random_directions([cx.output_dim, directions.size()[1]], norm, cx.device)
}

/// Returns a matrix `[rows, columns]` of independent standard normal values.
fn randn(size: [i64; 2], device: Device) -> Tensor {
    // Drawn on the CPU so that a seed gives the same weights on every device.
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_device(device)
}
