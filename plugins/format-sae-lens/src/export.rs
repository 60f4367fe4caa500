//! An SAE of ours as sae_lens 6 loads it.

use std::path::Path;

use dictlearn_core::prelude::*;
use dictlearn_core::saved::Saved;
use dictlearn_core::tensors;
use serde_json::json;

use crate::models;

/// The version whose form of cfg.json this is.
const VERSION: &str = "6.54.12";

pub fn write(sae: &Saved, dir: &Path) -> Result<()> {
    let class = sae.dictionary.class();
    let state = sae.dictionary.state_dict();
    let get = |name: &str| {
        let found = state.iter().find(|(known, _)| *known == name).map(|(_, tensor)| tensor.detach());
        found.with_context(|| format!("the class {class} has no tensor `{name}`"))
    };
    let turned = |name: &str| get(name).map(|tensor| tensor.transpose(0, 1).contiguous());
    let threshold = |features: i64| -> Result<Tensor> {
        // Before it is known it is negative, and every positive feature fires.
        Ok(get("threshold")?.clamp_min(0.0).expand([features], false).contiguous())
    };
    let dims = sae.dictionary.dims();
    let features = dims.features;
    let mut cfg = Map::new();
    let (architecture, subtracts, weights) = match class {
        "AutoEncoder" => ("standard", true, vec![
            ("W_enc", turned("encoder.weight")?), ("b_enc", get("encoder.bias")?), ("W_dec", turned("decoder.weight")?), ("b_dec", get("bias")?),
        ]),
        "AutoEncoderNew" => ("standard", false, vec![
            ("W_enc", turned("encoder.weight")?), ("b_enc", get("encoder.bias")?), ("W_dec", turned("decoder.weight")?), ("b_dec", get("decoder.bias")?),
        ]),
        "GatedAutoEncoder" => ("gated", true, vec![
            ("W_enc", turned("encoder.weight")?), ("W_dec", turned("decoder.weight")?), ("b_dec", get("decoder_bias")?),
            ("b_gate", get("gate_bias")?), ("b_mag", get("mag_bias")?), ("r_mag", get("r_mag")?),
        ]),
        "AutoEncoderTopK" => {
            cfg.insert("k".to_owned(), get("k")?.int64_value(&[]).into());
            cfg.insert("rescale_acts_by_decoder_norm".to_owned(), false.into());
            ("topk", true, vec![
                ("W_enc", turned("encoder.weight")?), ("b_enc", get("encoder.bias")?), ("W_dec", turned("decoder.weight")?), ("b_dec", get("b_dec")?),
            ])
        }
        "BatchTopKSAE" => ("jumprelu", true, vec![
            ("W_enc", turned("encoder.weight")?), ("b_enc", get("encoder.bias")?), ("W_dec", turned("decoder.weight")?), ("b_dec", get("b_dec")?),
            ("threshold", threshold(features)?),
        ]),
        "MatryoshkaBatchTopKSAE" => ("jumprelu", true, vec![
            ("W_enc", get("W_enc")?), ("b_enc", get("b_enc")?), ("W_dec", get("W_dec")?), ("b_dec", get("b_dec")?),
            ("threshold", threshold(features)?),
        ]),
        "JumpReluAutoEncoder" => (if dims.input == dims.output { "jumprelu" } else { "jumprelu_transcoder" }, false, vec![
            ("W_enc", get("W_enc")?), ("b_enc", get("b_enc")?), ("W_dec", get("W_dec")?), ("b_dec", get("b_dec")?),
            ("threshold", get("threshold")?),
        ]),
        "Transcoder" | "SkipTranscoder" if sae.dictionary.selection().is_none() => {
            let mut weights = vec![("W_enc", get("W_enc")?), ("b_enc", get("b_enc")?), ("W_dec", get("W_dec")?), ("b_dec", get("b_dec")?)];
            let jumps = get("threshold").ok();
            let skips = get("W_skip").ok();
            let architecture = match (&jumps, &skips) {
                (None, None) => "transcoder",
                (None, Some(_)) => "skip_transcoder",
                (Some(_), None) => "jumprelu_transcoder",
                (Some(_), Some(_)) => "jumprelu_skip_transcoder",
            };
            weights.extend(jumps.map(|tensor| ("threshold", tensor)));
            weights.extend(skips.map(|tensor| ("W_skip", tensor)));
            (architecture, false, weights)
        }
        "Transcoder" | "SkipTranscoder" => bail!(InputError::new("sae_lens has no transcoder that keeps the k largest features")
            .help("those without `k` can be exported")),
        other => bail!(InputError::new(format!("sae_lens has nothing that does what the class {other} does"))
            .help("it has AutoEncoder, AutoEncoderNew, GatedAutoEncoder, AutoEncoderTopK, BatchTopKSAE, \
                   MatryoshkaBatchTopKSAE, JumpReluAutoEncoder, Transcoder and SkipTranscoder")),
    };
    let normalize = match sae.normalization {
        None => "none",
        Some(Normalization { kind: NormalizationKind::LayerNorm, .. }) => "layer_norm",
        Some(Normalization { kind: NormalizationKind::ConstantNormRescale, .. }) => "constant_norm_rescale",
    };
    if architecture.ends_with("transcoder") {
        cfg.insert("d_out".to_owned(), dims.output.into());
    }
    let dtype = sae.config["trainer"]["dtype"].as_str().unwrap_or("float32");
    let metadata = metadata(sae);
    let on_heads = metadata["hook_name"].as_str().is_some_and(|name| name.ends_with("hook_z")) && metadata["hook_head_index"].is_null();
    for (key, value) in [
        ("architecture", json!(architecture)),
        ("d_in", dims.input.into()),
        ("d_sae", features.into()),
        ("dtype", dtype.into()),
        ("device", "cpu".into()),
        ("apply_b_dec_to_input", subtracts.into()),
        ("normalize_activations", normalize.into()),
        ("reshape_activations", if on_heads { "hook_z" } else { "none" }.into()),
        ("metadata", metadata),
    ] {
        cfg.insert(key.to_owned(), value);
    }
    tensors::write(&dir.join("sae_weights.safetensors"), &weights)?;
    tensors::write_file(&dir.join("cfg.json"), serde_json::to_string_pretty(&cfg)?.as_bytes())?;
    let sparsity = sae.dir.join("sparsity.safetensors");
    if sparsity.is_file() {
        let sparsity = tensors::TensorFile::open(&sparsity)?.tensor("sparsity")?;
        tensors::write(&dir.join("sparsity.safetensors"), &[("sparsity", sparsity)])?;
    }
    Ok(())
}

/// What the run says of the SAE, in sae_lens's words.
fn metadata(sae: &Saved) -> Value {
    let (buffer, trainer) = (&sae.config["buffer"], &sae.config["trainer"]);
    let mut metadata = json!({"sae_lens_version": VERSION, "sae_lens_training_version": null});
    let mut add = |key: &str, value: Value| {
        if !value.is_null() {
            metadata[key] = value;
        }
    };
    let model = buffer["model"].as_str().map(|model| model.split('@').next().unwrap_or_default());
    add("model_name", model.into());
    if let Some(submodule) = buffer["submodule"].as_str() {
        let io = buffer["io"].as_str().unwrap_or("out");
        let end = |io: &str| if io == "out" { "output" } else { "input" };
        let target = buffer["target"].as_str();
        let of = |module: &str, io: &str| models::transformer_lens(module, io);
        let pairs = io == "in_to_out" || target.is_some();
        let reads = if pairs && target.is_none() { "in" } else { io };
        add("hook_name", of(submodule, reads).into());
        if !models::is_transformer_lens(submodule) {
            add("hf_hook_name", format!("{submodule}.{}", end(reads)).into());
        }
        if pairs {
            let target = target.unwrap_or(submodule);
            add("hook_name_out", of(target, "out").into());
            if !models::is_transformer_lens(target) {
                add("hf_hook_name_out", format!("{target}.output").into());
            }
        }
    }
    add("hook_layer", trainer["layer"].clone());
    add("hook_head_index", buffer["head"].clone());
    add("context_size", buffer["ctx_len"].clone());
    add("prepend_bos", buffer["prepend_bos"].clone());
    let dataset = [&buffer["text"]["repo"], &trainer["dataset_path"]].into_iter().find(|repo| repo.is_string());
    add("dataset_path", dataset.cloned().unwrap_or(Value::Null));
    add("neuronpedia_id", trainer["neuronpedia_id"].clone());
    add("dictlearn_class", sae.dictionary.class().into());
    for key in ["trainer_class", "lr", "steps", "k", "target_l0", "l1_penalty", "seed"] {
        add(&format!("dictlearn_{key}"), trainer[key].clone());
    }
    metadata
}
