//! Exports an SAE so that sae_lens 6 can load it.

use std::path::Path;

use dictlearn_core::files::tensors;
use dictlearn_core::formats::through;
use dictlearn_core::prelude::*;
use dictlearn_core::sae::saved::Saved;
use serde_json::json;

use crate::models;

/// The sae_lens version whose cfg.json form is written.
const VERSION: &str = "6.54.12";

pub fn write(sae: &Saved, dir: &Path) -> Result<()> {
    let class = sae.dictionary.class();
    let state = sae.dictionary.state_dict();
    let get = |name: &str| {
        let found = state.iter().find(|(known, _)| *known == name).map(|(_, tensor)| tensor.detach());
        found.with_context(|| format!("the class {class} has no tensor `{name}`"))
    };
    let dims = sae.dictionary.dims();
    let features = dims.features;
    let mut cfg = Map::new();
    let mut architecture = match class {
        "AutoEncoder" | "AutoEncoderNew" => "standard",
        "GatedAutoEncoder" => "gated",
        "AutoEncoderTopK" => "topk",
        "AbsTopKSAE" => "abstopk",
        "MatchingPursuitSAE" => "matching_pursuit",
        "BatchTopKSAE" | "MatryoshkaBatchTopKSAE" | "JumpReluAutoEncoder" => "jumprelu",
        "Transcoder" | "SkipTranscoder" if sae.dictionary.selection().is_none() => {
            match (class, get("threshold").is_ok()) {
                ("Transcoder", false) => "transcoder",
                ("Transcoder", true) => "jumprelu_transcoder",
                (_, false) => "skip_transcoder",
                (_, true) => "jumprelu_skip_transcoder",
            }
        }
        "Transcoder" | "SkipTranscoder" => {
            bail!(
                InputError::new("sae_lens has no TopK transcoder").help("only transcoders without `k` can be exported")
            )
        }
        other => bail!(InputError::new(format!("sae_lens has no equivalent of the class {other}")).help(
            "supported: AutoEncoder, AutoEncoderNew, GatedAutoEncoder, AutoEncoderTopK, AbsTopKSAE, BatchTopKSAE, \
             MatryoshkaBatchTopKSAE, JumpReluAutoEncoder, MatchingPursuitSAE, Transcoder and SkipTranscoder"
        )),
    };
    let mut subtracts = sae.dictionary.affine().is_none_or(|affine| affine.layout().is_centred());
    let mut weights = match sae.dictionary.affine() {
        Some(affine) => vec![
            ("W_enc", affine.encoder().columns().detach().contiguous()),
            ("W_dec", affine.decoder().rows().detach().contiguous()),
            ("b_dec", affine.bias().1.detach()),
        ],
        None => vec![("W_dec", get("W_dec")?), ("b_dec", get("b_dec")?)],
    };
    let bias = sae.dictionary.affine().and_then(|affine| affine.encoder_bias());
    weights.extend(bias.map(|(_, bias)| ("b_enc", bias.detach())));
    if class == "MatchingPursuitSAE" {
        cfg.insert("residual_threshold".to_owned(), get("residual_threshold")?.double_value(&[]).into());
        cfg.insert("max_iterations".to_owned(), get("max_iterations")?.int64_value(&[]).into());
        let stops = get("stop_on_duplicate_support")?.int64_value(&[]) != 0;
        cfg.insert("stop_on_duplicate_support".to_owned(), stops.into());
    }
    if class == "GatedAutoEncoder" {
        weights.extend([("b_gate", get("gate_bias")?), ("b_mag", get("mag_bias")?), ("r_mag", get("r_mag")?)]);
    }
    if ["AutoEncoderTopK", "AbsTopKSAE"].contains(&class) {
        cfg.insert("k".to_owned(), get("k")?.int64_value(&[]).into());
        cfg.insert("rescale_acts_by_decoder_norm".to_owned(), false.into());
    }
    if architecture.contains("jumprelu") {
        // The TopK family has one threshold for all features. It is negative until training sets it; every positive
        // feature then fires.
        let threshold = match sae.dictionary.selection() {
            Some(_) => get("threshold")?.clamp_min(0.0).expand([features], false).contiguous(),
            None => get("threshold")?,
        };
        weights.push(("threshold", threshold));
    }
    if let Ok(w_skip) = get("W_skip") {
        weights.push(("W_skip", w_skip));
    }
    if transcodes(sae) && !architecture.ends_with("transcoder") {
        architecture = match architecture {
            "standard" => "transcoder",
            "jumprelu" => "jumprelu_transcoder",
            other => bail!(
                InputError::new(format!("sae_lens has no `{other}` transcoder"))
                    .help("supported: transcoders with ReLU or JumpReLU")
            ),
        };
        if subtracts && dims.input == dims.output {
            // sae_lens's transcoders do not subtract b_dec from the input, so it is folded into the encoder's bias.
            let of =
                |name: &str| weights.iter().find(|(known, _)| *known == name).map(|(_, tensor)| tensor.shallow_clone());
            if let (Some(w_enc), Some(b_enc), Some(b_dec)) = (of("W_enc"), of("b_enc"), of("b_dec")) {
                let moved = b_enc.to_kind(Kind::Double) - through(&b_dec, &w_enc);
                weights.retain(|(name, _)| *name != "b_enc");
                weights.push(("b_enc", moved.to_kind(b_enc.kind())));
            }
        }
        subtracts = false;
    }
    if architecture.ends_with("transcoder") && sae.normalization.is_some_and(|normalization| !normalization.input_only)
    {
        bail!(InputError::new("sae_lens's transcoders normalise their input but not their target"));
    }
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
    let on_heads = metadata["hook_name"].as_str().is_some_and(|name| name.ends_with("hook_z"))
        && metadata["hook_head_index"].is_null();
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

/// Whether the SAE predicts something other than its input.
fn transcodes(sae: &Saved) -> bool {
    let (buffer, dims) = (&sae.config["buffer"], sae.dictionary.dims());
    dims.input != dims.output
        || sae.config["trainer"]["transcodes"] == true
        || buffer["io"] == "in_to_out"
        || buffer["target"].is_string()
        || buffer["target_tensor"].is_string()
}

/// The SAE's metadata under sae_lens's keys.
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
    if buffer["center"] == true {
        add("model_from_pretrained_kwargs", json!({"center_writing_weights": true}));
    }
    add("dictlearn_class", sae.dictionary.class().into());
    for key in ["trainer_class", "lr", "steps", "k", "target_l0", "l1_penalty", "seed"] {
        add(&format!("dictlearn_{key}"), trainer[key].clone());
    }
    metadata
}
