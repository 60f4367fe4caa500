//! A dictionary of two affine maps, for architectures that differ in what lies between them: a plugin implements
//! [`Nonlinearity`], and [`Autoencoder`] does the rest of [`Dictionary`].
//!
//! ```text
//! f = σ(W_e (x − b_dec) + b_e)
//! x̂ = W_d f + b_dec
//! ```

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::code::Code;
use super::dictionary::{Decoder, Dictionary, DictionaryCx, Dims, Encoder, SavedClass, saved_shape};
use super::init::{decoder_for, random_directions, trained, trained_matrix, without_bias};
use super::selection::Selection;
use crate::machine::device::Precision;

/// What an architecture computes between its two affine maps, σ. It has no trained tensors.
pub trait Nonlinearity: Send + Sized + 'static {
    /// The class that a saved config.json names.
    const CLASS: &'static str;

    /// The name of the dictionary in a config.
    const NAME: &'static str;

    /// The features of pre-activations [.., F], with what trainers need beside them.
    fn code(&self, pre_activations: Tensor) -> Code;

    /// The features as a user of the trained dictionary gets them, where training computes others.
    fn encode(&self, pre_activations: Tensor) -> Tensor {
        self.code(pre_activations).features
    }

    /// The nonlinearity of a saved dictionary: of its tensors, the `trainer` entry of its config.json and its widths.
    fn saved(tensors: &BTreeMap<String, Tensor>, trainer: &Value, dims: Dims, device: Device) -> Result<Self>;

    /// How many features are selected, where that is its way to sparsity: the trainers of the TopK family need it.
    fn selection(&self) -> Option<&Selection> {
        None
    }

    /// The same, for a trainer that anneals k.
    fn selection_mut(&mut self) -> Option<&mut Selection> {
        None
    }
}

/// A dictionary of two affine maps with a [`Nonlinearity`] between them. Its tensors have the names and shapes of the
/// reference's `AutoEncoderTopK`: `b_dec` `[d]`, `encoder.weight` [F, d], `encoder.bias` `[F]`, `decoder.weight` [d, F].
pub struct Autoencoder<N> {
    b_dec: Tensor,
    encoder_weight: Tensor,
    encoder_bias: Tensor,
    decoder_weight: Tensor,
    nonlinearity: N,
    precision: Precision,
}

impl<N: Nonlinearity> Autoencoder<N> {
    /// How a saved one is read back, for `inventory::submit!`.
    pub const SAVED: SavedClass = SavedClass { class: N::CLASS, name: N::NAME, shaped: Self::shaped };

    /// A dictionary of `features` random directions of norm 1; the encoder is the decoder's transpose, biases are 0.
    pub fn new(nonlinearity: N, features: i64, cx: &DictionaryCx) -> Self {
        let dims = Dims { input: cx.activation_dim, features, output: cx.output_dim };
        let mut new = Self::zeros(nonlinearity, dims, cx.device, cx.precision);
        let directions = random_directions([dims.input, features], 1.0, cx.device);
        tch::no_grad(|| {
            new.encoder_weight.copy_(&directions.tr());
            new.decoder_weight.copy_(&decoder_for(directions, 1.0, cx));
        });
        new
    }

    /// What lies between its layers.
    pub fn nonlinearity(&self) -> &N {
        &self.nonlinearity
    }

    fn zeros(nonlinearity: N, dims: Dims, device: Device, precision: Precision) -> Self {
        let zeros = |size: i64| trained(Tensor::zeros([size], (Kind::Float, device)));
        Autoencoder {
            b_dec: zeros(dims.output),
            encoder_weight: trained_matrix([dims.features, dims.input], 0, device),
            encoder_bias: zeros(dims.features),
            decoder_weight: trained_matrix([dims.output, dims.features], 1, device),
            nonlinearity,
            precision,
        }
    }

    fn shaped(
        tensors: &BTreeMap<String, Tensor>,
        trainer: &Value,
        device: Device,
        precision: Precision,
    ) -> Result<Box<dyn Dictionary>> {
        let [features, input] = saved_shape(tensors, "encoder.weight")?;
        let [output, _] = saved_shape(tensors, "decoder.weight")?;
        let dims = Dims { input, features, output };
        Ok(Box::new(Self::zeros(N::saved(tensors, trainer, dims, device)?, dims, device, precision)))
    }

    /// W_e (x − b_dec) + b_e, [.., F]. Where the output's width is not the input's, b_dec is not taken from x.
    fn pre_activations(&self, x: &Tensor) -> Tensor {
        self.precision.linear(&without_bias(x, &self.b_dec), &self.encoder_weight, Some(&self.encoder_bias))
    }
}

impl<N: Nonlinearity> Dictionary for Autoencoder<N> {
    fn class(&self) -> &'static str {
        N::CLASS
    }

    fn dims(&self) -> Dims {
        let encoder = self.encoder_weight.size();
        Dims { input: encoder[1], features: encoder[0], output: self.decoder_weight.size()[0] }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![
            ("b_dec", self.b_dec.shallow_clone()),
            ("encoder.weight", self.encoder_weight.shallow_clone()),
            ("encoder.bias", self.encoder_bias.shallow_clone()),
            ("decoder.weight", self.decoder_weight.shallow_clone()),
        ]
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.selection().map_or_else(Vec::new, Selection::buffers)
    }

    fn loaded(&mut self) {
        if let Some(selection) = self.selection_mut() {
            selection.loaded();
        }
    }

    fn encode(&self, x: &Tensor) -> Tensor {
        self.nonlinearity.encode(self.pre_activations(x))
    }

    fn decode(&self, features: &Tensor) -> Tensor {
        self.precision.linear(features, &self.decoder_weight, None) + &self.b_dec
    }

    fn forward(&self, x: &Tensor) -> Code {
        self.nonlinearity.code(self.pre_activations(x))
    }

    fn decoder(&self) -> Option<Decoder> {
        Some(Decoder { name: "decoder.weight", weight: self.decoder_weight.shallow_clone(), feature_dim: 1 })
    }

    fn encoder(&self) -> Option<Encoder> {
        Some(Encoder { weight: "encoder.weight", feature_dim: 0, biases: &["encoder.bias"] })
    }

    fn selection(&self) -> Option<&Selection> {
        self.nonlinearity.selection()
    }

    fn selection_mut(&mut self) -> Option<&mut Selection> {
        self.nonlinearity.selection_mut()
    }

    fn scale_biases(&mut self, scale: f64) {
        tch::no_grad(|| {
            let _ = self.b_dec.g_mul_scalar_(scale);
            let _ = self.encoder_bias.g_mul_scalar_(scale);
        });
        if let Some(selection) = self.selection_mut() {
            selection.scale(scale);
        }
    }
}
