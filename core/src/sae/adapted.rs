//! Preprocessing around a dictionary: per-activation normalisation and reduced-precision arithmetic.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::affine::Affine;
use super::code::Code;
use super::dictionary::Dictionary;
use super::init::Dims;
use super::selection::Selection;
use super::weight::{Encoder, Weight};
use crate::data::Batch;

/// Normalisation of each activation before a dictionary reads it, undone on its reconstruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalization {
    /// Type of normalisation.
    #[serde(rename = "type")]
    pub kind: NormalizationKind,
    /// Do not undo it on the reconstruction. For transcoders, whose targets do not share the input's norm.
    #[serde(default)]
    pub input_only: bool,
}

/// Types of per-activation normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormalizationKind {
    /// (x − μ) / (σ + 1e-5), with the mean and unbiased standard deviation over the d values (`layer_norm` of openai
    /// and sae_lens).
    LayerNorm,
    /// x √d / ‖x‖ (`constant_norm_rescale` of sae_lens).
    ConstantNormRescale,
}

impl Normalization {
    /// Normalises activations `[.., d]`.
    pub fn apply(self, x: &Tensor) -> Tensor {
        self.apply_as(x, x)
    }

    /// Maps the reconstruction `[.., d_out]` of a normalised activation back to the scale of the activation `x` `[..,
    /// d]`.
    pub fn undo(self, x_hat: Tensor, x: &Tensor) -> Tensor {
        if self.input_only {
            return x_hat;
        }
        match self.kind {
            NormalizationKind::LayerNorm => {
                let (mean, deviation) = moments(x);
                x_hat * deviation + mean
            }
            NormalizationKind::ConstantNormRescale => x_hat / coefficient(x),
        }
    }
}

impl Normalization {
    /// Returns the batch on the scale that the inner dictionary trains on.
    pub fn batch(self, batch: &Batch) -> Batch {
        let x = self.apply(&batch.x);
        if batch.is_autoencoding() {
            return Batch::of(x);
        }
        let target =
            if self.input_only { batch.target.shallow_clone() } else { self.apply_as(&batch.target, &batch.x) };
        Batch { x, target }
    }

    /// Maps a target to the scale of the normalised activation `x`; the inverse of [`Normalization::undo`].
    fn apply_as(self, target: &Tensor, x: &Tensor) -> Tensor {
        match self.kind {
            NormalizationKind::LayerNorm => {
                let (mean, deviation) = moments(x);
                (target - mean) / (deviation + 1e-5)
            }
            NormalizationKind::ConstantNormRescale => target * coefficient(x),
        }
    }
}

/// Mean and unbiased standard deviation over the last dimension, both `[.., 1]`.
fn moments(x: &Tensor) -> (Tensor, Tensor) {
    let mean = x.mean_dim([-1].as_slice(), true, x.kind());
    let deviation = (x - &mean).std_dim([-1].as_slice(), true, true);
    (mean, deviation)
}

/// √d / ‖x‖, `[.., 1]`.
fn coefficient(x: &Tensor) -> Tensor {
    let width = x.size().last().copied().unwrap_or(1) as f64;
    // Avoids division by zero for an all-zero activation.
    let norm = x.norm_scalaropt_dim(2.0, [-1], true).clamp_min(1e-30);
    norm.reciprocal() * width.sqrt()
}

/// A dictionary with its preprocessing.
pub struct Adapted {
    inner: Box<dyn Dictionary>,
    normalization: Option<Normalization>,
    kind: Option<Kind>,
}

impl Adapted {
    /// Wraps a dictionary so that it normalises its input, if `normalization` is given, and computes in the dtype
    /// `kind`, if given. Features near a threshold depend on rounding, so the publisher's half precision must be kept.
    /// Inputs and outputs stay float32.
    pub fn new(inner: Box<dyn Dictionary>, normalization: Option<Normalization>, kind: Option<Kind>) -> Self {
        if let Some(kind) = kind {
            for (_, mut tensor) in inner.state_dict() {
                if tensor.is_floating_point() {
                    let narrow = tensor.detach().to_kind(kind);
                    tch::no_grad(|| tensor.set_data(&narrow));
                }
            }
        }
        Adapted { inner, normalization, kind }
    }

    fn input(&self, x: &Tensor) -> Tensor {
        let x = self.narrow(x);
        self.normalization.map_or_else(|| x.shallow_clone(), |normalization| normalization.apply(&x))
    }

    fn narrow(&self, tensor: &Tensor) -> Tensor {
        self.kind.map_or_else(|| tensor.shallow_clone(), |kind| tensor.to_kind(kind))
    }

    fn widen(&self, tensor: Tensor) -> Tensor {
        if self.kind.is_some() { tensor.to_kind(Kind::Float) } else { tensor }
    }
}

impl Dictionary for Adapted {
    fn affine(&self) -> Option<&Affine> {
        self.inner.affine()
    }

    fn class(&self) -> &'static str {
        self.inner.class()
    }

    fn dims(&self) -> Dims {
        self.inner.dims()
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.inner.parameters()
    }

    fn encode(&self, x: &Tensor) -> Tensor {
        self.widen(self.inner.encode(&self.input(x)))
    }

    fn reads_contexts(&self) -> bool {
        self.inner.reads_contexts()
    }

    fn decode(&self, features: &Tensor) -> Tensor {
        self.widen(self.inner.decode(&self.narrow(features)))
    }

    fn reconstruction(&self, features: &Tensor, x: &Tensor) -> Tensor {
        let x_hat = self.inner.reconstruction(&self.narrow(features), &self.input(x));
        self.widen(match self.normalization {
            Some(normalization) => normalization.undo(x_hat, &self.narrow(x)),
            None => x_hat,
        })
    }

    fn forward(&self, x: &Tensor) -> Code {
        let mut code = self.inner.forward(&self.input(x));
        code.features = self.widen(code.features);
        code
    }

    fn decoder(&self) -> Option<Weight> {
        self.inner.decoder()
    }

    fn directions(&self) -> Option<Tensor> {
        self.inner.directions().map(|directions| self.widen(directions))
    }

    fn encoder(&self) -> Option<Encoder> {
        self.inner.encoder()
    }

    fn selection(&self) -> Option<&Selection> {
        self.inner.selection()
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.inner.buffers()
    }

    fn begin(&mut self, batch: &Batch) {
        self.inner.begin(batch);
    }

    /// A normalised input has no scale, so there is nothing to rescale.
    fn scale_biases(&mut self, scale: f64) {
        if self.normalization.is_none() {
            self.inner.scale_biases(scale);
        }
    }

    fn loaded(&mut self) {
        self.inner.loaded();
    }

    fn fold_norms(&mut self) -> bool {
        self.inner.fold_norms()
    }

    fn pretrained(&mut self) {
        self.inner.pretrained();
    }
}
