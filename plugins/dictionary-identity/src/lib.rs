//! The identity dictionary: its features are the activations themselves. It is a baseline for metrics and a check of a
//! pipeline: it reconstructs everything and explains nothing.
//!
//! Add it to a run as `{name: identity, dictionary: {type: identity}, trainer: {type: standard}}`. It has nothing to
//! train, and the metrics evaluate it like every other SAE.

use dictlearn_core::prelude::*;

/// The identity dictionary. It has no parameters and no settings.
#[component(dictionary "identity", summary = "Features are the activations: a baseline without parameters",
    example = "{type: identity}")]
pub struct IdentityConfig {}

impl DictionaryConfig for IdentityConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        Ok(Box::new(Identity { dim: cx.activation_dim }))
    }
}

/// The reference's `IdentityDict`.
#[derive(Debug)]
struct Identity {
    dim: i64,
}

inventory::submit! {
    SavedClass {
        class: "IdentityDict",
        name: IdentityConfig::NAME,
        shaped: |saved| match saved.trainer.get("activation_dim").and_then(Value::as_i64) {
            Some(dim) => Ok(Box::new(Identity { dim })),
            None => bail!(InputError::new("the config of an IdentityDict has no `activation_dim`")),
        },
    }
}

impl Dictionary for Identity {
    fn class(&self) -> &'static str {
        "IdentityDict"
    }

    fn dims(&self) -> Dims {
        Dims { input: self.dim, features: self.dim, output: self.dim }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }

    fn encode(&self, x: &Tensor) -> Tensor {
        x.shallow_clone()
    }

    fn forward(&self, x: &Tensor) -> Code {
        Code::new(x.shallow_clone()).penalize(x.abs())
    }

    fn decode(&self, features: &Tensor) -> Tensor {
        features.shallow_clone()
    }

    fn decoder(&self) -> Option<Weight> {
        None
    }

    fn scale_biases(&mut self, _: f64) {}
}
