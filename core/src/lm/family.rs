//! Families of language models, and opening a model by name.

use anyhow::{Context, Result, bail};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tch::Device;

use super::arithmetic::refuse_unknown_arithmetic;
use super::decoder::{Decoder, DecoderConfig};
use super::files::ModelFiles;
use super::model::LanguageModel;
use super::weights::{ModelCx, Weights};
use crate::error::InputError;
use crate::machine::device::Precision;

/// A family of language models, named by `model_type` in config.json. [`component`](macro@crate::component) submits it.
pub struct ModelFamily {
    /// The `model_type`.
    pub model_type: &'static str,
    /// Builds a model of the family.
    pub load: fn(&Value, Weights, &ModelCx) -> Result<Box<dyn LanguageModel>>,
}

inventory::collect!(ModelFamily);

/// Config of a family: the fields of its config.json that affect the computation.
pub trait ModelConfig: DeserializeOwned + JsonSchema {
    /// Builds the model with its weights.
    fn load(self, weights: Weights, cx: &ModelCx) -> Result<Box<dyn LanguageModel>>;
}

/// Config of a family whose models are a [`Decoder`], as in every bundled family.
pub trait DecoderFamily: DeserializeOwned + JsonSchema {
    /// Returns the config of the decoder.
    ///
    /// # Errors
    /// Fails if the config has a value that is not supported.
    fn decoder(self) -> Result<DecoderConfig>;
}

impl<T: DecoderFamily> ModelConfig for T {
    fn load(self, weights: Weights, cx: &ModelCx) -> Result<Box<dyn LanguageModel>> {
        Ok(Box::new(Decoder::open(self.decoder()?, weights, cx)?))
    }
}

/// Opens a model by name. Returns the model and its files, which include the tokenizer.
pub fn open_model(name: &str, device: Device, precision: Precision) -> Result<(Box<dyn LanguageModel>, ModelFiles)> {
    let cx = ModelCx { device, precision };
    let files = ModelFiles::find(name)?;
    let Some(config) = files.json("config.json")? else {
        if let Some(adapter) = files.json("adapter_config.json")? {
            let base = adapter.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or("its base model");
            bail!(InputError::new(format!("{name} is an adapter of {base} (PEFT, LoRA), not a model")).help(
                "merge them in Python with `model.merge_and_unload().save_pretrained(DIR)`, and give that folder"
            ));
        }
        bail!(
            InputError::new(format!("the model {name} has no config.json"))
                .help("give a folder in Hugging Face's layout: config.json, model.safetensors, tokenizer.json")
        );
    };
    let family = family(name, &config)?;
    let model = build(family, &config, || Weights::open(&files, device), &cx);
    Ok((model.with_context(|| format!("cannot load the model {name}"))?, files))
}

/// Builds a model with deterministic random weights from a config.json, to try a family without its files.
pub fn random_model(config: &Value, cx: &ModelCx) -> Result<Box<dyn LanguageModel>> {
    const NAME: &str = "with random weights";
    build(family(NAME, config)?, config, || Ok(Weights::drawn(NAME, cx.device)), cx)
}

/// Returns the family that a model's config.json names.
fn family(name: &str, config: &Value) -> Result<&'static ModelFamily> {
    let Some(family) = config.get("model_type").and_then(Value::as_str) else {
        bail!(
            InputError::new(format!("the config.json of the model {name} has no `model_type`"))
                .help("is it the config of a Hugging Face model?")
        );
    };
    let mut known: Vec<&str> = inventory::iter::<ModelFamily>.into_iter().map(|family| family.model_type).collect();
    known.sort_unstable();
    let Some(found) = inventory::iter::<ModelFamily>.into_iter().find(|known| known.model_type == family) else {
        bail!(
            InputError::new(format!("the model {name} has the unsupported family `{family}`"))
                .help(format!("supported families: {} (`dictlearn list models`)", known.join(", ")))
        );
    };
    Ok(found)
}

fn build(
    family: &ModelFamily,
    config: &Value,
    weights: impl FnOnce() -> Result<Weights>,
    cx: &ModelCx,
) -> Result<Box<dyn LanguageModel>> {
    for name in ["num_hidden_layers", "n_layer", "num_layers"] {
        if let Some(layers) = config.get(name).and_then(Value::as_u64).filter(|layers| *layers > MOST_LAYERS) {
            bail!(InputError::new(format!("config.json: `{name}` is {layers}, more than any model has")));
        }
    }
    refuse_unknown_arithmetic(config, family.model_type)?;
    (family.load)(config, weights()?, cx)
}

/// Upper bound on layers. Allocating for a bogus number would exhaust memory before the first missing tensor is found.
const MOST_LAYERS: u64 = 10_000;
