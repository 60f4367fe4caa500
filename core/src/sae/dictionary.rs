//! Dictionaries: the architectures that encode activations as sparse features and decode them again.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::affine::{Affine, SavedTensors};
use super::code::Code;
use super::init::{DictionaryCx, Dims};
use super::selection::Selection;
use super::two_layer::ActivationFunction;
use super::weight::{Encoder, Weight};
use crate::data::Batch;
use crate::error::InputError;
use crate::registry;

/// The config of a dictionary.
pub trait DictionaryConfig: Debug + Send + Sync {
    /// A new dictionary with random initial weights, drawn from libtorch's generator.
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>>;
}

crate::tagged::tagged! {
    /// A dictionary's config, by `type`.
    TaggedDictionary: DictionaryConfig => Dictionary {}
}

/// What lies between the two affine maps of a dictionary, where an analytic step knows its derivative.
pub enum Between<'a> {
    /// A function of one pre-activation at a time.
    Elementwise(Box<dyn ActivationFunction + 'a>),
    /// The selection of the greatest pre-activations above 0, of each activation ([`Selection::of_each`]) or of the batch
    /// ([`Selection::of_batch`]).
    Selection(&'a Selection),
}

/// A dictionary: its weights, and how it encodes and decodes.
///
/// Nearly every dictionary is two affine maps and says so with [`Dictionary::affine`]; what it then implements is what lies between
/// them, [`Dictionary::code`]. Any other implements `class`, `dims`, `parameters`, `encode`, `decode`, `decoder` and `scale_biases`,
/// whose defaults panic where there is no `affine`.
///
/// Names of tensors and the meaning of `class` are the reference's, so that its `load_dictionary` reads what is saved.
pub trait Dictionary: Any + Send {
    /// The two affine maps, where the dictionary is z = W_e (x − b) + b_e and x̂ = W_d f + b with something between z and f.
    fn affine(&self) -> Option<&Affine> {
        None
    }

    /// The features f of pre-activations z [.., F] as training computes them, with what the loss needs beside them. ReLU by
    /// default.
    fn code(&self, pre_activations: Tensor) -> Code {
        Code::new(pre_activations.relu()).with("pre_activations", pre_activations)
    }

    /// What [`Dictionary::code`] does, for analytic steps. `None`, the default, leaves steps to autograd. It must be `None`
    /// where something of the activations reaches the reconstruction past the features, or where the loss has an
    /// [`Dictionary::auxiliary_loss`] that is not [`ActivationFunction::auxiliary`].
    fn between(&self) -> Option<Between<'_>> {
        None
    }

    /// The reference's class: `AutoEncoder`, `AutoEncoderTopK`, ...
    fn class(&self) -> &'static str {
        maps(self).layout().class
    }

    /// The widths.
    fn dims(&self) -> Dims {
        maps(self).dims()
    }

    /// The trained tensors by their state-dict names, sharing memory with the dictionary's own.
    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        maps(self).parameters()
    }

    /// The saved tensors that no optimiser trains (`k`, `threshold`), sharing memory with the dictionary's own.
    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.selection().map(Selection::buffers).unwrap_or_default()
    }

    /// Features [.., F] of activations [.., d], as a user of the trained dictionary gets them.
    fn encode(&self, x: &Tensor) -> Tensor {
        let pre_activations = maps(self).pre_activations(x);
        match self.selection().filter(|selection| selection.by_threshold()) {
            Some(selection) => selection.above_threshold(&pre_activations),
            None => self.code(pre_activations).features,
        }
    }

    /// Reconstruction [.., d_out] of features [.., F].
    fn decode(&self, features: &Tensor) -> Tensor {
        maps(self).decode(features)
    }

    /// Reconstruction [.., d_out] of features [.., F] that were encoded from activations [.., d]: what the features decode
    /// to, unless something of an activation reaches it past the features (a skip connection, a norm).
    fn reconstruction(&self, features: &Tensor, x: &Tensor) -> Tensor {
        let _ = x;
        self.decode(features)
    }

    /// The [`Dictionary::code`] of activations [B, d].
    fn forward(&self, x: &Tensor) -> Code {
        match self.affine() {
            Some(affine) => self.code(affine.pre_activations(x)),
            None => Code::new(self.encode(x)),
        }
    }

    /// The decoder's weight, where the dictionary has one.
    fn decoder(&self) -> Option<Weight> {
        Some(maps(self).decoder())
    }

    /// What each feature adds to the reconstruction, [F, d_out]: the decoder's rows, unless what they write is scaled.
    fn directions(&self) -> Option<Tensor> {
        self.decoder().map(|decoder| decoder.rows())
    }

    /// The parts of the encoder that belong to one feature, where features can be resampled.
    fn encoder(&self) -> Option<Encoder> {
        self.affine().map(|affine| Encoder {
            weight: affine.encoder(),
            biases: affine.encoder_bias().map(|(name, _)| name).into_iter().collect(),
        })
    }

    /// How many features are selected, and from which value on, in dictionaries of the TopK family.
    fn selection(&self) -> Option<&Selection> {
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

    /// Scales everything that is added to activations or compared with them by `scale`, so that the dictionary does for
    /// activations times `scale` what it did for activations: features and reconstructions come out times `scale`. By default the
    /// biases of the affine maps and the threshold of the selection.
    fn scale_biases(&mut self, scale: f64) {
        maps(self).scale_biases(scale);
        if let Some(selection) = self.selection() {
            selection.scale(scale);
        }
    }

    /// Called after tensors were loaded in place, for what is derived from them.
    fn loaded(&mut self) {
        if let Some(selection) = self.selection() {
            selection.loaded();
        }
    }

    /// Moves the norms of the features' directions from the decoder to the encoder: directions get norm 1 and
    /// reconstructions stay as they are. False, and nothing has changed, where that would change which features fire.
    fn fold_norms(&mut self) -> bool {
        false
    }

    /// Called after the reference's own file was loaded, for what its `from_pretrained` does to the weights then.
    fn pretrained(&mut self) {}
}

/// What the defaults of [`Dictionary`] are calculated with.
fn maps<D: Dictionary + ?Sized>(dictionary: &D) -> &Affine {
    let Some(affine) = dictionary.affine() else {
        panic!(
            "a dictionary without `affine` must implement `class`, `dims`, `parameters`, `encode`, `decode`, `decoder` and `scale_biases`"
        )
    };
    affine
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
    pub fn default_trainers(&self) -> String {
        let own = inventory::iter::<SavedClass>.into_iter().find(|saved| saved.class == self.class());
        let trainers = registry::components(registry::ComponentKind::Trainer).into_iter();
        let names: Vec<_> = trainers
            .filter(|trainer| own.is_some() && trainer.default_dictionary == own.map(|saved| saved.name))
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
    /// An empty dictionary of the shape that the tensors show; the caller loads the tensors into it.
    pub shaped: fn(&SavedTensors) -> Result<Box<dyn Dictionary>>,
}

inventory::collect!(SavedClass);
