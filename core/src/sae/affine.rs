//! The two affine maps of nearly every dictionary. Names, axes, shapes and products are defined only here: parameters,
//! saving, loading, import and export follow from a class's [`Layout`].
//!
//! ```text
//! z = W_e (x − b) + b_e        x̂ = W_d f + b
//! ```

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::init::{DictionaryCx, Dims, decoder_for, random_directions, trained, trained_matrix};
use super::weight::Weight;
use crate::error::InputError;
use crate::machine::device::Precision;

/// How a class of dictionaries stores its two affine maps: state-dict names and axes of their tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Class name in a saved config.json, the reference's if it has one: `AutoEncoderTopK`.
    pub class: &'static str,
    encoder: &'static str,
    encoder_bias: Option<&'static str>,
    decoder: &'static str,
    bias: &'static str,
    /// Dimension of the encoder's weight that indexes the features; the decoder's weight uses the other one.
    feature_dim: i64,
    centred: bool,
}

impl Layout {
    /// Tensors of two PyTorch linear layers: `encoder.weight` `[F, d]`, `encoder.bias` `[F]`, `decoder.weight` `[d_out,
    /// F]`, and the decoder's bias `[d_out]`, whose name depends on the class.
    pub const fn modules(class: &'static str, bias: &'static str) -> Self {
        let encoder_bias = Some("encoder.bias");
        let (encoder, decoder) = ("encoder.weight", "decoder.weight");
        Layout { class, encoder, encoder_bias, decoder, bias, feature_dim: 0, centred: false }
    }

    /// Two matrices and two vectors: `W_enc` `[d, F]`, `b_enc` `[F]`, `W_dec` `[F, d_out]`, `b_dec` `[d_out]`.
    pub const fn matrices(class: &'static str) -> Self {
        let encoder_bias = Some("b_enc");
        Layout {
            class,
            encoder: "W_enc",
            encoder_bias,
            decoder: "W_dec",
            bias: "b_dec",
            feature_dim: 1,
            centred: false,
        }
    }

    /// Subtracts the decoder's bias from the encoder's input, if input and output have one width.
    #[must_use]
    pub const fn centred(mut self) -> Self {
        self.centred = true;
        self
    }

    /// Omits the encoder's bias, for classes that add their own.
    #[must_use]
    pub const fn without_encoder_bias(mut self) -> Self {
        self.encoder_bias = None;
        self
    }

    /// Whether the decoder's bias is subtracted from the encoder's input.
    pub fn is_centred(&self) -> bool {
        self.centred
    }

    /// Names W_enc `[d, F]`, b_enc `[F]`, W_dec `[F, d_out]` and b_dec `[d_out]` as the class does, transposed to its
    /// axes.
    pub fn named(&self, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor) -> Vec<(&'static str, Tensor)> {
        let turned = |weight: Tensor| if self.feature_dim == 1 { weight } else { weight.tr() };
        self.ordered(turned(w_enc), Some(b_enc), turned(w_dec), b_dec)
    }

    /// Returns the tensors by name in PyTorch's order: the module's own before those of its submodules.
    fn ordered(
        &self,
        encoder: Tensor,
        encoder_bias: Option<Tensor>,
        decoder: Tensor,
        bias: Tensor,
    ) -> Vec<(&'static str, Tensor)> {
        let mut tensors = vec![(self.encoder, encoder)];
        tensors.extend(self.encoder_bias.zip(encoder_bias));
        tensors.extend([(self.decoder, decoder), (self.bias, bias)]);
        tensors.sort_by_key(|(name, _)| name.contains('.'));
        tensors
    }
}

/// The two trainable affine maps of a dictionary.
#[derive(Debug)]
pub struct Affine {
    layout: Layout,
    encoder: Tensor,
    encoder_bias: Option<Tensor>,
    decoder: Tensor,
    bias: Tensor,
    precision: Precision,
}

impl Affine {
    /// Makes maps of zeros.
    pub fn zeros(layout: Layout, dims: Dims, device: Device, precision: Precision) -> Self {
        let Dims { input, features, output } = dims;
        let vector = |size: i64| trained(Tensor::zeros([size], (Kind::Float, device)));
        let matrix = |width: i64, feature_dim: i64| {
            trained_matrix(if feature_dim == 0 { [features, width] } else { [width, features] }, feature_dim, device)
        };
        Affine {
            encoder: matrix(input, layout.feature_dim),
            encoder_bias: layout.encoder_bias.map(|_| vector(features)),
            decoder: matrix(output, 1 - layout.feature_dim),
            bias: vector(output),
            layout,
            precision,
        }
    }

    /// Initialises encoder and decoder with random directions of this norm, drawn from libtorch's generator. The
    /// encoder is the decoder's transpose if input and output have one width. Biases are 0.
    pub fn random(layout: Layout, features: i64, norm: f64, cx: &DictionaryCx) -> Self {
        let affine = Affine::zeros(layout, cx.dims(features), cx.device, cx.precision);
        let read = random_directions([cx.activation_dim, features], norm, cx.device);
        affine.set_directions(&read, &decoder_for(read.shallow_clone(), norm, cx));
        affine
    }

    /// Sets the directions that features read (columns of `read`, `[d, F]`) and write (columns of `write`, `[d_out,
    /// F]`).
    pub fn set_directions(&self, read: &Tensor, write: &Tensor) {
        tch::no_grad(|| {
            self.encoder().rows().copy_(&read.tr());
            self.decoder().rows().copy_(&write.tr());
        });
    }

    /// Names and axes of the tensors.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Precision of the products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Returns the widths d, F and d_out.
    pub fn dims(&self) -> Dims {
        let encoder = self.encoder.size();
        let (features, input) = if self.layout.feature_dim == 0 { (0, 1) } else { (1, 0) };
        Dims { input: encoder[input], features: encoder[features], output: self.bias.size()[0] }
    }

    /// Returns the trained tensors by state-dict name, sharing memory.
    pub fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let [encoder, decoder, bias] = [&self.encoder, &self.decoder, &self.bias].map(Tensor::shallow_clone);
        self.layout.ordered(encoder, self.encoder_bias.as_ref().map(Tensor::shallow_clone), decoder, bias)
    }

    /// Returns the same with a dictionary's own parameters appended.
    pub fn parameters_and<const N: usize>(&self, own: [(&'static str, &Tensor); N]) -> Vec<(&'static str, Tensor)> {
        let own = own.into_iter().map(|(name, tensor)| (name, tensor.shallow_clone()));
        self.parameters().into_iter().chain(own).collect()
    }

    /// Encoder weight W_e.
    pub fn encoder(&self) -> Weight {
        let tensor = self.encoder.shallow_clone();
        Weight { name: self.layout.encoder, tensor, feature_dim: self.layout.feature_dim }
    }

    /// Decoder weight W_d.
    pub fn decoder(&self) -> Weight {
        let tensor = self.decoder.shallow_clone();
        Weight { name: self.layout.decoder, tensor, feature_dim: 1 - self.layout.feature_dim }
    }

    /// b_e `[F]` with its state-dict name, if the class has one.
    pub fn encoder_bias(&self) -> Option<(&'static str, &Tensor)> {
        self.layout.encoder_bias.zip(self.encoder_bias.as_ref())
    }

    /// b `[d_out]` with its state-dict name.
    pub fn bias(&self) -> (&'static str, &Tensor) {
        (self.layout.bias, &self.bias)
    }

    /// Whether b is subtracted from the encoder's input; never if input and output widths differ.
    pub fn is_centred(&self) -> bool {
        let Dims { input, output, .. } = self.dims();
        self.layout.centred && input == output
    }

    /// Returns z = W_e (x − b) + b_e, `[.., F]`, of activations `[.., d]`.
    pub fn pre_activations(&self, x: &Tensor) -> Tensor {
        let weight = self.encoder().rows();
        match self.is_centred() {
            true => self.precision.linear(&(x - &self.bias), &weight, self.encoder_bias.as_ref()),
            false => self.precision.linear(x, &weight, self.encoder_bias.as_ref()),
        }
    }

    /// Returns W_d f, `[.., d_out]`, of features `[.., F]`.
    pub fn decode_without_bias(&self, features: &Tensor) -> Tensor {
        self.precision.linear(features, &self.decoder().columns(), None)
    }

    /// Returns x̂ = W_d f + b, `[.., d_out]`, of features `[.., F]`.
    pub fn decode(&self, features: &Tensor) -> Tensor {
        self.decode_without_bias(features) + &self.bias
    }

    /// Scales the biases, for [`Dictionary::scale_biases`](super::Dictionary::scale_biases).
    pub fn scale_biases(&self, scale: f64) {
        self.encoder_bias.iter().chain([&self.bias]).for_each(|bias| scale_in_place(bias, scale));
    }

    /// Moves the norms of the features' directions from the decoder to the encoder and its bias. Returns the norms
    /// `[F]`, with which the caller scales its own per-feature parameters, or `None` if all are already 1.
    pub fn fold_norms(&self) -> Option<Tensor> {
        let norms = self.decoder().normalize()?;
        tch::no_grad(|| {
            let _ = self.encoder().rows().g_mul_(&norms.unsqueeze(1));
            if let Some(bias) = &self.encoder_bias {
                let _ = bias.shallow_clone().g_mul_(&norms);
            }
        });
        Some(norms)
    }
}

/// Multiplies a parameter in place.
pub fn scale_in_place(parameter: &Tensor, scale: f64) {
    let _ = tch::no_grad(|| parameter.shallow_clone().g_mul_scalar_(scale));
}

/// Tensors of a saved dictionary, from which an empty one takes its shapes.
#[derive(Debug, Clone, Copy)]
pub struct SavedTensors<'a> {
    /// Tensors by name.
    pub tensors: &'a BTreeMap<String, Tensor>,
    /// The `trainer` entry of config.json.
    pub trainer: &'a Value,
    /// Device of the dictionary.
    pub device: Device,
    /// Precision of the matrix products.
    pub precision: Precision,
}

impl SavedTensors<'_> {
    /// Returns the shape of a tensor, or an error that names it if it is missing, empty or has another number of
    /// dimensions.
    pub fn shape<const N: usize>(&self, name: &str) -> Result<[i64; N]> {
        let Some(tensor) = self.tensors.get(name) else {
            bail!(
                InputError::new(format!("tensor `{name}` is missing"))
                    .help(format!("the file has: {}", self.tensors.keys().cloned().collect::<Vec<_>>().join(", ")))
            );
        };
        let size = tensor.size();
        if size.contains(&0) {
            bail!(InputError::new(format!("tensor `{name}` is empty: its shape is {size:?}")));
        }
        size.as_slice().try_into().map_err(|_| {
            InputError::new(format!("tensor `{name}` has shape {size:?}, but must have {N} dimensions")).into()
        })
    }

    /// Makes maps of zeros with the shapes of a class's tensors, or returns an error that names the missing one.
    pub fn affine(&self, layout: Layout) -> Result<Affine> {
        let encoder: [i64; 2] = self.shape(layout.encoder)?;
        let [output] = self.shape(layout.bias)?;
        let [features, input] = if layout.feature_dim == 0 { encoder } else { [encoder[1], encoder[0]] };
        Ok(Affine::zeros(layout, Dims { input, features, output }, self.device, self.precision))
    }

    /// Makes a parameter of zeros, for classes with tensors besides the affine maps.
    pub fn zeros(&self, size: &[i64]) -> Tensor {
        trained(Tensor::zeros(size, (Kind::Float, self.device)))
    }
}
