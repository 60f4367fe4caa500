//! Dictionaries: the architectures that encode activations as sparse features and decode them again.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::code::Code;
use super::selection::Selection;
use super::two_layer::{ActivationFunction, TwoLayer};
use crate::data::{Batch, SitePart};
use crate::error::InputError;
use crate::machine::device::Precision;
use crate::registry;

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

/// The config of a dictionary.
pub trait DictionaryConfig: Debug + Send + Sync {
    /// A new dictionary with random initial weights, drawn from libtorch's generator.
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>>;
}

crate::component::tagged! {
    /// A dictionary's config, by `type`.
    TaggedDictionary: DictionaryConfig => Dictionary {}
}

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
        if self.feature_dim == 0 { self.weight.shallow_clone() } else { self.weight.transpose(0, 1) }
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

    /// [`Dictionary::fold_norms`] where features are proportional to an encoder's weight, whose dimension `feature_dim`
    /// counts them, and to vectors `[F]`: biases and thresholds.
    pub fn fold_into<'a>(
        self,
        encoder: &mut Tensor,
        feature_dim: i64,
        vectors: impl IntoIterator<Item = &'a mut Tensor>,
    ) {
        let Some(norms) = self.normalize() else { return };
        tch::no_grad(|| {
            let _ = encoder.g_mul_(&norms.unsqueeze(1 - feature_dim));
            for vector in vectors {
                let _ = vector.g_mul_(&norms);
            }
        });
    }
}

/// What feeds a feature: a row or column of the encoder's weight, and entries of vectors of length F. For resampling.
#[derive(Debug)]
pub struct Encoder {
    /// State-dict name of the weight.
    pub weight: &'static str,
    /// Which dimension of the weight counts the features: 0 for [F, d] (`encoder.weight`), 1 for [d, F] (`W_enc`).
    pub feature_dim: i64,
    /// State-dict names of the vectors `[F]` that become 0 when a feature starts anew.
    pub biases: &'static [&'static str],
}

/// A dictionary: its weights, and how it encodes and decodes.
///
/// Names of tensors and the meaning of `class` are the reference's, so that its `load_dictionary` reads what is saved.
pub trait Dictionary: Any + Send {
    /// The reference's class: `AutoEncoder`, `AutoEncoderTopK`, ...
    fn class(&self) -> &'static str;

    /// Its widths.
    fn dims(&self) -> Dims;

    /// The trained tensors by their state-dict names, sharing memory with the dictionary's own.
    fn parameters(&self) -> Vec<(&'static str, Tensor)>;

    /// The saved tensors that no optimiser trains (`k`, `threshold`), sharing memory with the dictionary's own.
    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }

    /// Features [.., F] of activations [.., d], as a user of the trained dictionary gets them.
    fn encode(&self, x: &Tensor) -> Tensor;

    /// Reconstruction [.., d_out] of features [.., F].
    fn decode(&self, features: &Tensor) -> Tensor;

    /// Reconstruction [.., d_out] of features [.., F] that were encoded from activations [.., d]: what the features decode
    /// to, unless something of an activation reaches it past the features (a skip connection, a norm).
    fn reconstruction(&self, features: &Tensor, x: &Tensor) -> Tensor {
        let _ = x;
        self.decode(features)
    }

    /// Features [B, F] as training computes them, with what the loss needs beside them.
    fn forward(&self, x: &Tensor) -> Code {
        Code::new(self.encode(x))
    }

    /// The decoder, where the dictionary has one.
    fn decoder(&self) -> Option<Decoder>;

    /// What each feature adds to the reconstruction, [F, d_out]: the decoder's rows, unless what they write is scaled.
    fn directions(&self) -> Option<Tensor> {
        self.decoder().map(|decoder| decoder.rows())
    }

    /// The parts of the encoder that belong to one feature, where features can be resampled.
    fn encoder(&self) -> Option<Encoder> {
        None
    }

    /// The weights, where the dictionary is two affine maps with something between that looks at one number at a time, so
    /// that trainers can take its steps by hand ([`crate::sae::two_layer`]). Such steps know no [`Dictionary::auxiliary_loss`] but
    /// the activation function's, and no reconstruction past the features.
    fn two_layer(&self) -> Option<TwoLayer> {
        None
    }

    /// What lies between the two layers, unless it is a [`Dictionary::selection`].
    fn activation_function(&self) -> Option<Box<dyn ActivationFunction + '_>> {
        None
    }

    /// How many features are selected, and from which value on, in dictionaries of the TopK family.
    fn selection(&self) -> Option<&Selection> {
        None
    }

    /// The same, for the trainer that anneals it.
    fn selection_mut(&mut self) -> Option<&mut Selection> {
        None
    }

    /// Called with the first batch before anything is computed, for what is initialised from data; not if weights were
    /// loaded (`init_from`).
    fn begin(&mut self, batch: &Batch) {
        let _ = batch;
    }

    /// A term that the architecture adds to the loss of whichever trainer, with its name in the log, where it cannot
    /// learn without (the gated one's: what its gate alone reconstructs).
    fn auxiliary_loss(&self, batch: &Batch, code: &Code) -> Option<(&'static str, Tensor)> {
        let _ = (batch, code);
        None
    }

    /// Scales everything that adds to activations by `scale`, so that the dictionary does for activations times
    /// `scale` what it did for activations: features and reconstructions come out times `scale`.
    fn scale_biases(&mut self, scale: f64);

    /// Called after tensors were loaded in place, for what is derived from them.
    fn loaded(&mut self) {}

    /// Moves the norms of the features' directions from the decoder to the encoder: directions get norm 1 and
    /// reconstructions stay as they are. False, and nothing has changed, where that would change which features fire.
    fn fold_norms(&mut self) -> bool {
        false
    }

    /// Called after the reference's own file was loaded, for what its `from_pretrained` does to the weights then.
    fn pretrained(&mut self) {}
}

impl dyn Dictionary + '_ {
    /// The dictionary as one of a particular architecture, if it is, for trainers that need that one.
    pub fn downcast<T: Dictionary>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }

    /// The same, to change it.
    pub fn downcast_mut<T: Dictionary>(&mut self) -> Option<&mut T> {
        (self as &mut dyn Any).downcast_mut()
    }

    /// Where its tensors live.
    pub fn device(&self) -> Device {
        self.parameters().first().map_or(Device::Cpu, |(_, parameter)| parameter.device())
    }

    /// Whether its forward pass exposes something by name (`gate`, `pre_activations`), for trainers and modifiers that
    /// need it.
    pub fn exposes(&self, name: &str) -> bool {
        let x = Tensor::zeros([1, self.dims().input], (Kind::Float, self.device()));
        tch::no_grad(|| self.forward(&x).get(name).is_some())
    }

    /// The trainers that usually train it, for messages: "the trainer `a` or `b`".
    pub fn usual_trainers(&self) -> String {
        let own = inventory::iter::<SavedClass>.into_iter().find(|saved| saved.class == self.class());
        let trainers = registry::components(registry::Kind::Trainer).into_iter();
        let names: Vec<_> = trainers
            .filter(|trainer| own.is_some() && trainer.usual_dictionary == own.map(|saved| saved.name))
            .map(|trainer| format!("`{}`", trainer.name))
            .collect();
        if names.is_empty() { "another trainer".to_owned() } else { format!("the trainer {}", names.join(" or ")) }
    }

    /// Every saved tensor: parameters, then buffers.
    pub fn state_dict(&self) -> Vec<(&'static str, Tensor)> {
        let mut all = self.parameters();
        all.extend(self.buffers());
        all
    }

    /// Copies tensors into the dictionary by name; all must be there, of the right shape, and no others.
    ///
    /// `origin` is for messages.
    pub fn load(&mut self, tensors: &BTreeMap<String, Tensor>, origin: &Path) -> Result<()> {
        let mut own = self.state_dict();
        let refused = |message: String| InputError::new(format!("{}: {message}", origin.display()));
        for name in tensors.keys() {
            if !own.iter().any(|(known, _)| known == name) {
                let known: Vec<_> = own.iter().map(|(known, _)| *known).collect();
                bail!(
                    refused(format!("tensor `{name}` does not belong to the class {}", self.class()))
                        .help(format!("it has: {}", known.join(", ")))
                );
            }
        }
        for (name, target) in &mut own {
            let Some(tensor) = tensors.get(*name) else {
                bail!(
                    refused(format!("tensor `{name}` of the class {} is missing", self.class()))
                        .help(format!("it has: {}", tensors.keys().cloned().collect::<Vec<_>>().join(", ")))
                );
            };
            if tensor.size() != target.size() {
                bail!(
                    refused(format!("tensor `{name}` has shape {:?}, not {:?}", tensor.size(), target.size()))
                        .help("the config's dictionary and the source's activation_dim decide the shape")
                );
            }
            tch::no_grad(|| target.copy_(tensor));
        }
        self.loaded();
        Ok(())
    }

    /// Reconstruction and features of activations.
    pub fn reconstruct(&self, x: &Tensor) -> (Tensor, Tensor) {
        let features = self.encode(x);
        (self.reconstruction(&features, x), features)
    }
}

/// How a saved dictionary of one class is read back. Submitted by the plugin that owns the class.
pub struct SavedClass {
    /// The reference's class name.
    pub class: &'static str,
    /// The name of the dictionary in a config.
    pub name: &'static str,
    /// An empty dictionary of the shape that the tensors (and the saved config's `trainer` entry) show; the caller
    /// loads the tensors into it.
    pub shaped: Shaped,
}

/// [`SavedClass::shaped`].
pub type Shaped = fn(&BTreeMap<String, Tensor>, &serde_json::Value, Device, Precision) -> Result<Box<dyn Dictionary>>;

inventory::collect!(SavedClass);

/// The shape of a tensor of a saved dictionary, or an error that names it.
pub fn saved_shape<const N: usize>(tensors: &BTreeMap<String, Tensor>, name: &str) -> Result<[i64; N]> {
    let Some(tensor) = tensors.get(name) else {
        bail!(
            InputError::new(format!("tensor `{name}` is missing"))
                .help(format!("the file has: {}", tensors.keys().cloned().collect::<Vec<_>>().join(", ")))
        );
    };
    let size = tensor.size();
    if size.contains(&0) {
        bail!(InputError::new(format!("tensor `{name}` has shape {size:?}: there is nothing in it")));
    }
    size.as_slice().try_into().map_err(|_| {
        InputError::new(format!("tensor `{name}` has shape {size:?}, which does not have {N} dimensions")).into()
    })
}
