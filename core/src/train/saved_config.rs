//! The config.json of a trained SAE.

use anyhow::Result;
use serde_json::{Map, Value};
use tch::Kind;

use crate::machine::device;
use crate::train::config::SaeConfig;
use crate::train::training::{Training, TrainingCx};

/// Returns an SAE's config.json, with the keys of the reference's trainer and buffer.
pub fn saved_config(config: &SaeConfig, training: &Training, cx: &TrainingCx, buffer: &Value) -> Result<Value> {
    let dims = training.dictionary.dims();
    let mut trainer = Map::new();
    let mut add = |name: &str, value: Value| {
        trainer.insert(name.to_owned(), value);
    };
    add("dict_class", training.dictionary.class().into());
    add("trainer_class", config.trainer.class().into());
    add("activation_dim", dims.input.into());
    add("dict_size", dims.features.into());
    if dims.output != dims.input {
        add("output_dim", dims.output.into());
    }
    for component in [serde_json::to_value(&config.trainer)?, serde_json::to_value(&config.dictionary)?] {
        for (name, value) in component.as_object().into_iter().flatten() {
            if !["type", "dict_size", "expansion_factor"].contains(&name.as_str()) {
                add(name, value.clone());
            }
        }
    }
    training.trainer.settings(&mut trainer);
    // Values after annealing.
    for (name, tensor) in training.dictionary.buffers() {
        if trainer.contains_key(name) && tensor.numel() == 1 && tensor.kind() == Kind::Int {
            trainer.insert(name.to_owned(), tensor.int64_value(&[]).into());
        }
    }
    let mut add = |name: &str, value: Value| {
        trainer.insert(name.to_owned(), value);
    };
    if let Some(normalization) = training.normalization() {
        add("normalization", serde_json::to_value(normalization)?);
    }
    add("steps", cx.steps.into());
    add("seed", cx.seed.into());
    add("device", device::name(cx.device).into());
    let submodule = buffer.get("submodule").cloned().unwrap_or(Value::Null);
    let layer = submodule.as_str().and_then(|path| path.split('.').find_map(|part| part.parse::<u64>().ok()));
    add("layer", layer.map_or(Value::Null, Value::from));
    add("lm_name", buffer.get("model").cloned().unwrap_or(Value::Null));
    add("wandb_name", training.name.as_str().into());
    add("submodule_name", submodule);
    let mut saved = serde_json::json!({"trainer": trainer, "buffer": buffer});
    if !config.modifiers.is_empty() {
        saved["modifiers"] = serde_json::to_value(&config.modifiers)?;
    }
    Ok(saved)
}
