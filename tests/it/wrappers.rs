//! Text models inside multimodal models: every prefix of published files, other towers, module names.

use dictlearn_core::prelude::*;
use serde_json::json;

use crate::families::{changed, computed, load, open, refusal};

/// Renames the tensors of the text model, which the file has under `language_model.`.
fn renamed(root: &str, head: &str) -> impl Fn(&mut Vec<(String, Tensor)>) {
    move |tensors| {
        let embedding = tensors.iter().find(|(name, _)| name.ends_with("embed_tokens.weight")).unwrap().1.copy();
        for (name, _) in tensors.iter_mut() {
            if let Some(rest) = name.strip_prefix("language_model.model.") {
                *name = format!("{root}.{rest}");
            }
        }
        tensors.push((head.to_owned(), embedding));
    }
}

#[test]
fn every_published_prefix_of_the_text_model_is_read() {
    let (model, tokens, _) = open("gemma3");
    let expected = computed(&*model, &tokens);
    for (root, head) in [
        ("language_model.model", "language_model.lm_head.weight"),
        ("model.language_model", "lm_head.weight"),
        ("model.language_model.model", "model.language_model.lm_head.weight"),
        ("text_model.model", "text_model.lm_head.weight"),
        ("model", "lm_head.weight"),
    ] {
        let dir = changed("gemma3", |_| {}, renamed(root, head));
        let same = load(dir.path(), Precision::Float32).unwrap_or_else(|error| panic!("{root}: {error:#}"));
        assert_eq!(computed(&*same, &tokens), expected, "{root}");
    }
}

#[test]
fn a_module_of_the_text_model_is_found_under_any_of_its_names() {
    for (case, full) in [("gemma3", "model.language_model.layers.1.mlp"), ("llama", "model.layers.1.mlp")] {
        let (model, ..) = open(case);
        for name in [
            "layers.1.mlp",
            "model.layers.1.mlp",
            "language_model.layers.1.mlp",
            "language_model.model.layers.1.mlp",
            "model.language_model.layers.1.mlp",
            "blocks.1.hook_mlp_out",
        ] {
            let (point, _) = model.hook_point(name, Io::Out).unwrap_or_else(|error| panic!("{case} {name}: {error:#}"));
            let added =
                if name.starts_with("blocks") && case == "gemma3" { "post_feedforward_layernorm" } else { "mlp" };
            assert_eq!(point.module, full.replace("mlp", added), "{case} {name}");
        }
    }
    let (model, ..) = open("mixtral");
    let (point, _) = model.hook_point("model.layers.1.mlp.gate", Io::Out).unwrap();
    assert_eq!(point.module, "model.layers.1.block_sparse_moe.gate", "its name since transformers 5");
}

#[test]
fn other_towers_are_ignored_by_name_and_take_no_memory() {
    let (model, tokens, _) = open("qwen3_vl");
    let expected = (computed(&*model, &tokens), model.memory());
    let tower = |name: &'static str| {
        changed(
            "qwen3_vl",
            |_| {},
            move |tensors| tensors.push((name.to_owned(), Tensor::zeros([500, 500], (Kind::Float, Device::Cpu)))),
        )
    };
    for name in ["model.visual.blocks.7.norm1.weight", "visual.merger.weight"] {
        let same = load(tower(name).path(), Precision::Float32).unwrap();
        assert_eq!((computed(&*same, &tokens), same.memory()), expected, "{name}");
    }
    for name in ["model.language_model.layers.9.input_layernorm.weight", "model.visuals.weight", "audio.weight"] {
        let message = refusal(tower(name).path());
        assert!(message.contains(&format!("does not describe: `{name}`")), "{message}");
    }
}

#[test]
fn a_wrapper_without_its_text_model_is_refused() {
    let dir = changed("llava", |_| {}, |tensors| tensors.retain(|(name, _)| !name.contains("language_model")));
    let message = refusal(dir.path());
    assert!(message.contains("has no text model"), "{message}");
    assert!(message.contains("it has: vision_tower, multi_modal_projector"), "{message}");

    let message = refusal(changed("llava", |config| config["text_config"] = json!([1]), |_| {}).path());
    assert!(message.contains("`text_config` is [1], not a map"), "{message}");
    let phi = |config: &mut Value| config["text_config"]["model_type"] = "phi-msft".into();
    let message = refusal(changed("llava", phi, |_| {}).path());
    assert!(message.contains("unsupported family `phi-msft`"), "{message}");
    let field = |config: &mut Value| config["text_config"]["clip_qkv"] = 8.0.into();
    let message = refusal(changed("llava", field, |_| {}).path());
    assert!(message.contains("`clip_qkv` is 8.0, which llama models do not implement"), "{message}");
}

#[test]
fn a_text_model_may_have_its_fields_at_the_top_or_in_text_config() {
    let (model, tokens, _) = open("qwen2_5_vl");
    let expected = computed(&*model, &tokens);
    let nested = |config: &mut Value| {
        let mut text = config.clone();
        text["model_type"] = "qwen2_5_vl_text".into();
        text.as_object_mut().unwrap().remove("vision_config");
        *config = json!({"model_type": "qwen2_5_vl", "text_config": text});
    };
    let same = load(changed("qwen2_5_vl", nested, |_| {}).path(), Precision::Float32).unwrap();
    assert_eq!(computed(&*same, &tokens), expected);
}
