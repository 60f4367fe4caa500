//! What stands between activations and a dictionary: a normalisation of each by itself, and the numbers it computes in.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::affine::Affine;
use super::code::Code;
use super::dictionary::Dictionary;
use super::init::Dims;
use super::selection::Selection;
use super::weight::{Encoder, Weight};
use crate::data::Batch;

/// What is done to an activation before a dictionary reads it, and undone in its reconstruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalization {
    /// What is done.
    #[serde(rename = "type")]
    pub kind: NormalizationKind,
    /// Leave the reconstruction as it is: of what a transcoder predicts the input's norm says nothing.
    #[serde(default)]
    pub input_only: bool,
}

/// The ways to normalise an activation by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormalizationKind {
    /// (x − μ) / (σ + 1e-5), with the mean and the unbiased standard deviation over the d values (openai's and
    /// sae_lens's `layer_norm`).
    LayerNorm,
    /// x √d / ‖x‖ (sae_lens's `constant_norm_rescale`).
    ConstantNormRescale,
}

impl Normalization {
    /// An activation [.., d] normalised.
    pub fn apply(self, x: &Tensor) -> Tensor {
        self.apply_as(x, x)
    }

    /// A reconstruction [.., d_out] of the normalised activation `x` [.., d], as one of the activation itself.
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
    /// A batch as the dictionary inside trains on it.
    pub fn batch(self, batch: &Batch) -> Batch {
        let x = self.apply(&batch.x);
        if batch.is_autoencoding() {
            return Batch::of(x);
        }
        let target =
            if self.input_only { batch.target.shallow_clone() } else { self.apply_as(&batch.target, &batch.x) };
        Batch { x, target }
    }

    /// What is to be reconstructed, on the scale of the activation `x` normalised: what [`Normalization::undo`] undoes.
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

/// Mean and unbiased standard deviation over the last dimension, [.., 1].
fn moments(x: &Tensor) -> (Tensor, Tensor) {
    let mean = x.mean_dim([-1].as_slice(), true, x.kind());
    let deviation = (x - &mean).std_dim([-1].as_slice(), true, true);
    (mean, deviation)
}

/// √d / ‖x‖, [.., 1].
fn coefficient(x: &Tensor) -> Tensor {
    let width = x.size().last().copied().unwrap_or(1) as f64;
    // An activation of nothing but zeros stays one.
    let norm = x.norm_scalaropt_dim(2.0, [-1], true).clamp_min(1e-30);
    norm.reciprocal() * width.sqrt()
}

/// A dictionary, and what stands before it.
pub struct Adapted {
    inner: Box<dyn Dictionary>,
    normalization: Option<Normalization>,
    kind: Option<Kind>,
}

impl Adapted {
    /// The dictionary as one that normalises what it reads, if it is to, and computes in numbers of half the width, as
    /// its publishers did, if it is to: near a threshold, rounding decides which features fire. What goes in and comes out
    /// is float32.
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

    /// Normalised activations have no scale: then there is nothing to do.
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
