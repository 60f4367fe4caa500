//! Families of language models, and opening a model by its name.

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

/// A family of language models: what `model_type` in a config.json names. [`component`](macro@crate::component) submits it.
pub struct ModelFamily {
    /// The `model_type`.
    pub model_type: &'static str,
    /// Builds a model of the family.
    pub load: fn(&Value, Weights, &ModelCx) -> Result<Box<dyn LanguageModel>>,
}

inventory::collect!(ModelFamily);

/// The config of a family: the fields of its config.json that change what the model computes.
pub trait ModelConfig: DeserializeOwned + JsonSchema {
    /// The model that the config describes, with weights.
    fn load(self, weights: Weights, cx: &ModelCx) -> Result<Box<dyn LanguageModel>>;
}

/// The config of a family whose models are a [`Decoder`]: each of ours.
pub trait DecoderFamily: DeserializeOwned + JsonSchema {
    /// The decoder that the config describes, or why it cannot be computed.
    fn decoder(self) -> Result<DecoderConfig>;
}

impl<T: DecoderFamily> ModelConfig for T {
    fn load(self, weights: Weights, cx: &ModelCx) -> Result<Box<dyn LanguageModel>> {
        Ok(Box::new(Decoder::open(self.decoder()?, weights, cx)?))
    }
}

/// Opens a model by its name, with its files (the tokenizer is one of them).
pub fn open_model(name: &str, device: Device, precision: Precision) -> Result<(Box<dyn LanguageModel>, ModelFiles)> {
    let cx = ModelCx { device, precision };
    let files = ModelFiles::find(name)?;
    let Some(config) = files.json("config.json")? else {
        if let Some(adapter) = files.json("adapter_config.json")? {
            let base = adapter.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or("its base model");
            bail!(InputError::new(format!("{name} is an adapter of {base} (PEFT, LoRA), not a model")).help(
                "merge the two in Python, `model.merge_and_unload().save_pretrained(DIR)`, and name that folder"
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

/// A model with random weights, the same ones every time, from what a config.json holds: to try a family without its files.
pub fn random_model(config: &Value, cx: &ModelCx) -> Result<Box<dyn LanguageModel>> {
    const NAME: &str = "with random weights";
    build(family(NAME, config)?, config, || Ok(Weights::drawn(NAME, cx.device)), cx)
}

/// The family that a model's config.json names.
fn family(name: &str, config: &Value) -> Result<&'static ModelFamily> {
    let Some(family) = config.get("model_type").and_then(Value::as_str) else {
        bail!(
            InputError::new(format!("the config.json of the model {name} names no `model_type`"))
                .help("is it the config of a Hugging Face model?")
        );
    };
    let mut known: Vec<&str> = inventory::iter::<ModelFamily>.into_iter().map(|family| family.model_type).collect();
    known.sort_unstable();
    let Some(found) = inventory::iter::<ModelFamily>.into_iter().find(|known| known.model_type == family) else {
        bail!(
            InputError::new(format!("the model {name} is of the family `{family}`, which is not supported"))
                .help(format!("supported are: {} (`dictlearn list models`)", known.join(", ")))
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
            bail!(InputError::new(format!("config.json: `{name}` is {layers}, which no model has")));
        }
    }
    refuse_unknown_arithmetic(config, family.model_type)?;
    (family.load)(config, weights()?, cx)
}

/// More layers than any model has: what is made for each of them would fill the memory before the first is found missing.
const MOST_LAYERS: u64 = 10_000;
