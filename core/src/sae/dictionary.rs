//! Dictionaries: architectures that encode activations as sparse features and decode them again.

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
    /// Builds a dictionary with random initial weights, drawn from libtorch's generator.
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>>;
}

crate::tagged::tagged! {
    /// A dictionary's config, tagged by `type`.
    TaggedDictionary: DictionaryConfig => Dictionary {}
}

/// Step between the two affine maps of a dictionary, with a derivative known to analytic steps.
pub enum Between<'a> {
    /// A function of one pre-activation at a time.
    Elementwise(Box<dyn ActivationFunction + 'a>),
    /// Selection of the largest positive pre-activations, per activation ([`Selection::of_each`]) or per batch
    /// ([`Selection::of_batch`]).
    Selection(&'a Selection),
}

/// A dictionary: its weights, and how it encodes and decodes.
///
/// Nearly every dictionary is two affine maps. It returns them from [`Dictionary::affine`] and implements the step
/// between them, [`Dictionary::code`]. Any other dictionary must implement `class`, `dims`, `parameters`, `encode`,
/// `decode`, `decoder` and `scale_biases`, whose defaults panic without `affine`.
///
/// Tensor names and `class` follow the reference, so that its `load_dictionary` reads saved dictionaries.
pub trait Dictionary: Any + Send {
    /// Returns the two affine maps of a dictionary of the form z = W_e (x − b) + b_e, x̂ = W_d f + b, with f computed
    /// from z.
    fn affine(&self) -> Option<&Affine> {
        None
    }

    /// Computes the training-time features f from pre-activations z `[.., F]`, with any extra tensors that the loss
    /// needs. Default: ReLU.
    fn code(&self, pre_activations: Tensor) -> Code {
        Code::new(pre_activations.relu()).with("pre_activations", pre_activations)
    }

    /// Returns [`Dictionary::code`] in the form that analytic steps use. `None`, the default, leaves steps to autograd.
    /// Must be `None` if the reconstruction depends on the activations other than through the features, or if the
    /// [`Dictionary::auxiliary_loss`] is not [`ActivationFunction::auxiliary`].
    fn between(&self) -> Option<Between<'_>> {
        None
    }

    /// Returns the reference's class name: `AutoEncoder`, `AutoEncoderTopK`, ...
    fn class(&self) -> &'static str {
        maps(self).layout().class
    }

    /// Returns the widths d, F and d_out.
    fn dims(&self) -> Dims {
        maps(self).dims()
    }

    /// Returns the trained tensors by state-dict name, sharing memory with the dictionary's own.
    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        maps(self).parameters()
    }

    /// Returns the saved tensors that are not trained (`k`, `threshold`), sharing memory with the dictionary's own.
    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.selection().map(Selection::buffers).unwrap_or_default()
    }

    /// Encodes activations `[.., d]` as features `[.., F]` at inference.
    fn encode(&self, x: &Tensor) -> Tensor {
        let pre_activations = maps(self).pre_activations(x);
        match self.selection().filter(|selection| selection.by_threshold()) {
            Some(selection) => selection.above_threshold(&pre_activations),
            None => self.code(pre_activations).features,
        }
    }

    /// Returns whether features depend on the activations of earlier positions. [`Dictionary::encode`] then takes whole
    /// contexts `[.., L, d]`, with positions in order. Such a dictionary cannot be trained or measured on shuffled
    /// activations.
    fn reads_contexts(&self) -> bool {
        false
    }

    /// Decodes features `[.., F]` to a reconstruction `[.., d_out]`.
    fn decode(&self, features: &Tensor) -> Tensor {
        maps(self).decode(features)
    }

    /// Reconstructs `[.., d_out]` from features `[.., F]` and the activations `x` `[.., d]` that they encode. Equals
    /// [`Dictionary::decode`] unless the reconstruction also depends on `x` (a skip connection, a norm).
    fn reconstruction(&self, features: &Tensor, x: &Tensor) -> Tensor {
        let _ = x;
        self.decode(features)
    }

    /// Returns the [`Dictionary::code`] of activations `[B, d]`.
    fn forward(&self, x: &Tensor) -> Code {
        match self.affine() {
            Some(affine) => self.code(affine.pre_activations(x)),
            None => Code::new(self.encode(x)),
        }
    }

    /// Returns the decoder's weight, if the dictionary has one.
    fn decoder(&self) -> Option<Weight> {
        Some(maps(self).decoder())
    }

    /// Returns what each feature adds to the reconstruction, `[F, d_out]`: the decoder's rows, scaled if the
    /// architecture scales them.
    fn directions(&self) -> Option<Tensor> {
        self.decoder().map(|decoder| decoder.rows())
    }

    /// Returns the encoder's parameters of each feature, if features can be resampled.
    fn encoder(&self) -> Option<Encoder> {
        self.affine().map(|affine| Encoder {
            weight: affine.encoder(),
            biases: affine.encoder_bias().map(|(name, _)| name).into_iter().collect(),
        })
    }

    /// Returns k and threshold, for dictionaries of the TopK family.
    fn selection(&self) -> Option<&Selection> {
        None
    }

    /// Initialises data-dependent parameters from the first batch, before anything is computed. Not called if weights
    /// were loaded (`init_from`).
    fn begin(&mut self, batch: &Batch) {
        let _ = batch;
    }

    /// Returns a loss term that the architecture needs whichever trainer trains it, with its name in the log (the gated
    /// dictionary's reconstruction from its gate alone).
    fn auxiliary_loss(&self, batch: &Batch, code: &Code) -> Option<(&'static str, Tensor)> {
        let _ = (batch, code);
        None
    }

    /// Scales everything that is added to or compared with activations by `scale`. Activations times `scale` then give
    /// features and reconstructions times `scale`. By default scales the biases of the affine maps and the selection's
    /// threshold.
    fn scale_biases(&mut self, scale: f64) {
        maps(self).scale_biases(scale);
        if let Some(selection) = self.selection() {
            selection.scale(scale);
        }
    }

    /// Updates derived values after tensors were loaded in place.
    fn loaded(&mut self) {
        if let Some(selection) = self.selection() {
            selection.loaded();
        }
    }

    /// Moves the norms of the features' directions from the decoder to the encoder; directions get norm 1 and
    /// reconstructions stay the same. Returns false and changes nothing if that would change which features fire.
    fn fold_norms(&mut self) -> bool {
        false
    }

    /// Applies what the reference's `from_pretrained` does to weights, after a file of the reference was loaded.
    fn pretrained(&mut self) {}
}

/// Returns the affine maps that the defaults of [`Dictionary`] need.
fn maps<D: Dictionary + ?Sized>(dictionary: &D) -> &Affine {
    let Some(affine) = dictionary.affine() else {
        panic!(
            "a dictionary without `affine` must implement `class`, `dims`, `parameters`, `encode`, `decode`, `decoder` and `scale_biases`"
        )
    };
    affine
}

impl dyn Dictionary + '_ {
    /// Downcasts to a particular architecture, for trainers that need it.
    pub fn downcast<T: Dictionary>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }

    /// Downcasts mutably to a particular architecture.
    pub fn downcast_mut<T: Dictionary>(&mut self) -> Option<&mut T> {
        (self as &mut dyn Any).downcast_mut()
    }

    /// Returns the device of the dictionary's tensors.
    pub fn device(&self) -> Device {
        self.parameters().first().map_or(Device::Cpu, |(_, parameter)| parameter.device())
    }

    /// Returns whether the forward pass exposes a tensor by this name (`gate`, `pre_activations`), for trainers and
    /// modifiers that need it.
    pub fn exposes(&self, name: &str) -> bool {
        let x = Tensor::zeros([1, self.dims().input], (Kind::Float, self.device()));
        tch::no_grad(|| self.forward(&x).get(name).is_some())
    }

    /// Names the trainers whose default dictionary this is, for messages: "the trainer `a` or `b`".
    pub fn default_trainers(&self) -> String {
        let own = inventory::iter::<SavedClass>.into_iter().find(|saved| saved.class == self.class());
        let trainers = registry::components(registry::ComponentKind::Trainer).into_iter();
        let names: Vec<_> = trainers
            .filter(|trainer| own.is_some() && trainer.default_dictionary == own.map(|saved| saved.name))
            .map(|trainer| format!("`{}`", trainer.name))
            .collect();
        if names.is_empty() { "another trainer".to_owned() } else { format!("the trainer {}", names.join(" or ")) }
    }

    /// Returns every saved tensor: parameters, then buffers.
    pub fn state_dict(&self) -> Vec<(&'static str, Tensor)> {
        let mut all = self.parameters();
        all.extend(self.buffers());
        all
    }

    /// Copies tensors into the dictionary by name. Names and shapes must match exactly.
    ///
    /// `origin` names the source in error messages.
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

    /// Returns the reconstruction `[.., d_out]` and the features `[.., F]` of activations `[.., d]`.
    pub fn reconstruct(&self, x: &Tensor) -> (Tensor, Tensor) {
        let features = self.encode(x);
        (self.reconstruction(&features, x), features)
    }
}

/// Reader of the saved dictionaries of one class. Submitted by the plugin that owns the class.
pub struct SavedClass {
    /// The reference's class name.
    pub class: &'static str,
    /// Name of the dictionary in a config.
    pub name: &'static str,
    /// Makes an empty dictionary with the shapes of these tensors; the caller then loads them.
    pub shaped: fn(&SavedTensors) -> Result<Box<dyn Dictionary>>,
}

inventory::collect!(SavedClass);
