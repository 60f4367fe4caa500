//! Families of language models, and opening a model by name.

use anyhow::{Context, Result, bail};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tch::Device;

use super::arithmetic::refuse_unknown_arithmetic;
use super::decoder::{Decoder, DecoderConfig};
use super::files::ModelFiles;
use super::model::LanguageModel;
use super::weights::{ModelCx, Weights};
use crate::error::InputError;
use crate::machine::device::Precision;
use crate::registry::{ComponentKind, find};
use crate::suggest::nearest;

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
    /// Values of the fields that a config.json may leave out, as JSON: the library's defaults, where fields that
    /// families share have others.
    const DEFAULTS: &'static str = "{}";

    /// Builds the model with its weights.
    fn load(self, weights: Weights, cx: &ModelCx) -> Result<Box<dyn LanguageModel>>;
}

/// Config of a family whose models are a [`Decoder`], as in every bundled family.
pub trait DecoderFamily: DeserializeOwned + JsonSchema {
    /// See [`ModelConfig::DEFAULTS`].
    const DEFAULTS: &'static str = "{}";

    /// Returns the config of the decoder.
    ///
    /// # Errors
    /// Fails if the config has a value that is not supported.
    fn decoder(self) -> Result<DecoderConfig>;
}

impl<T: DecoderFamily> ModelConfig for T {
    const DEFAULTS: &'static str = T::DEFAULTS;

    fn load(self, weights: Weights, cx: &ModelCx) -> Result<Box<dyn LanguageModel>> {
        Ok(Box::new(Decoder::open(self.decoder()?, weights, cx)?))
    }
}

/// Opens a model by name. Returns the model and its files, which include the tokenizer.
pub fn open_model(name: &str, device: Device, precision: Precision) -> Result<(Box<dyn LanguageModel>, ModelFiles)> {
    let cx = ModelCx::new(device, precision);
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

/// Opens the text model of a multimodal model, which has it at `root`; tensors of the modules `towers` are ignored.
/// `family` implements the text model if `text_config` names no family, or one of its own (`qwen3_vl_text`).
///
/// # Errors
/// Fails if the text model is of an unsupported family, or as that family does.
pub fn text_model(
    config: &Map<String, Value>,
    (root, towers): (&'static str, &'static [&'static str]),
    family: &str,
    weights: Weights,
    cx: &ModelCx,
) -> Result<Box<dyn LanguageModel>> {
    // Older files have the fields of the text model among those of the whole.
    let mut text = match config.get("text_config") {
        None | Some(Value::Null) => config.clone(),
        Some(Value::Object(text)) => text.clone(),
        Some(other) => bail!(InputError::new(format!("config.json: `text_config` is {other}, not a map"))),
    };
    // Some files tie head and embedding in one of the two places only; in the end, the weights decide.
    if config.get("tie_word_embeddings") == Some(&Value::Bool(true)) {
        text.insert("tie_word_embeddings".to_owned(), true.into());
    }
    let own = text.get("model_type").and_then(Value::as_str).map(str::to_owned);
    let outer = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    match own {
        Some(own) if own != outer && own != format!("{outer}_text") => {}
        _ => {
            text.insert("model_type".to_owned(), family.into());
        }
    }
    let text = Value::Object(text);
    let cx = ModelCx { text_root: Some(root), ..*cx };
    build(self::family(&format!("inside {outer}"), &text)?, &text, || Ok(weights.of_text(root, towers)), &cx)
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
        let near = nearest(family, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
        bail!(InputError::new(format!("the model {name} has the unsupported family `{family}`")).help(format!(
            "{}`dictlearn list models` shows the supported families. To use another model, write its activations with \
             examples/write_activations.py and train with the source `activation_cache` (docs/models.md), or write a plugin \
             (`dictlearn new-plugin model NAME`)",
            near.unwrap_or_default()
        )));
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
    let weights = weights()?;
    (family.load)(config, weights, cx).map_err(|error| match absent_sizes(config, family.model_type) {
        sizes if sizes.is_empty() => error,
        sizes => error.context(format!("config.json has no {}, so transformers' default applies", sizes.join(", "))),
    })
}

/// Returns the sizes that a config.json leaves to the library's defaults.
fn absent_sizes(config: &Value, family: &str) -> Vec<String> {
    let schema = find(ComponentKind::Model, family).map(|component| (component.schema)()).unwrap_or_default();
    let known = |name: &&&str| schema.get("properties").is_some_and(|fields| fields.get(**name).is_some());
    let absent = SIZES.iter().filter(|names| names.iter().all(|name| config.get(*name).is_none()));
    absent.filter_map(|names| Some(format!("`{}`", names.iter().find(known)?))).collect()
}

/// Sizes that every complete config.json has, under one of these names.
const SIZES: [&[&str]; 4] = [
    &["vocab_size"],
    &["hidden_size", "n_embd"],
    &["num_hidden_layers", "num_layers", "n_layer"],
    &["num_attention_heads", "num_heads", "n_head"],
];

/// Upper bound on layers. Allocating for a bogus number would exhaust memory before the first missing tensor is found.
const MOST_LAYERS: u64 = 10_000;
