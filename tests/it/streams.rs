//! Gemma 3n and Gemma 4: several residual streams, layers that share keys and values, fields of single layers.

use dictlearn_core::prelude::*;
use serde_json::json;

use crate::families::{changed, computed, load, open, refusal};

#[test]
fn replacing_a_layers_output_leaves_the_other_streams() {
    // The active stream is the last of three.
    let (model, tokens, _) = open("gemma3n_shared");
    let start = model.begin(&tokens, &mut Hooks::none()).unwrap();
    let whole = model.layer(0, &start, &mut Hooks::none()).unwrap();
    let (point, _) = model.hook_point("model.layers.0", Io::Out).unwrap();
    let replaced = model.layer(0, &start, &mut Hooks::replace(&point, Tensor::zeros_like)).unwrap();
    assert_eq!(replaced.x.size(), [3, 4, 12, 32]);
    assert_eq!(replaced.x.narrow(0, 0, 2), whole.x.narrow(0, 0, 2));
    assert_eq!(replaced.x.get(2), whole.x.get(2).zeros_like());
    // Hooks on `altup` see all streams.
    let (all, width) = model.hook_point("model.layers.0.altup", Io::Out).unwrap();
    assert_eq!((model.value_at(&tokens, &all), width), (whole.x, 32));
    let replaced = model.layer(0, &start, &mut Hooks::replace(&all, Tensor::zeros_like)).unwrap();
    assert_eq!(replaced.x.abs().max().double_value(&[]), 0.0);
}

#[test]
fn keys_of_layers_that_use_those_of_others_are_ignored() {
    for (case, first) in [("gemma3n_shared", 3), ("gemma4_moe_shared", 3)] {
        let (model, tokens, _) = open(case);
        let dir = changed(
            case,
            |_| {},
            |tensors| {
                for name in ["k_proj", "v_proj", "k_norm"] {
                    let name = format!("model.layers.{first}.self_attn.{name}.weight");
                    tensors.push((name, Tensor::ones([16, 32], (Kind::Float, Device::Cpu))));
                }
            },
        );
        let same = load(dir.path(), Precision::Float32).unwrap();
        assert_eq!(computed(&*same, &tokens), computed(&*model, &tokens), "{case}");
        let other = changed(
            case,
            |_| {},
            |tensors| {
                tensors.push((
                    "model.layers.2.self_attn.other.weight".to_owned(),
                    Tensor::ones([1], (Kind::Float, Device::Cpu)),
                ));
            },
        );
        assert!(refusal(other.path()).contains("does not describe: `model.layers.2.self_attn.other.weight`"), "{case}");
    }
}

#[test]
fn every_key_that_releases_of_transformers_write_is_read() {
    let (model, tokens, _) = open("gemma3n");
    let expected = computed(&*model, &tokens);
    for spelling in [
        |name: &str| name.replace("model.language_model.", "model."),
        // transformers 4.57 writes this for `Gemma3nForCausalLM`.
        |name: &str| name.replace("per_layer_model_projection", "per_layer_model.language_model_projection"),
    ] {
        let dir = changed("gemma3n", |_| {}, |tensors| tensors.iter_mut().for_each(|(name, _)| *name = spelling(name)));
        assert_eq!(computed(&*load(dir.path(), Precision::Float32).unwrap(), &tokens), expected);
    }
}

#[test]
fn fields_equal_to_the_default_may_be_absent() {
    for (case, fields) in [
        ("gemma3n", &["altup_num_inputs", "altup_active_idx", "altup_correct_scale", "final_logit_softcapping"][..]),
        ("gemma3n", &["rope_theta", "rope_local_base_freq", "hidden_activation", "attention_bias"]),
        ("gemma4", &["rope_parameters", "attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp"]),
    ] {
        let (model, tokens, _) = open(case);
        let without =
            |config: &mut Value| fields.iter().for_each(|field| drop(config.as_object_mut().unwrap().remove(*field)));
        let dir = changed(case, without, |_| {});
        let same = load(dir.path(), Precision::Float32).unwrap();
        assert_eq!(computed(&*same, &tokens), computed(&*model, &tokens), "{case}: {fields:?}");
    }
}

#[test]
fn unsupported_values_are_refused_by_name() {
    for (case, key, value, expected) in [
        ("gemma3n", "altup_active_idx", json!(4), "`altup_active_idx` is 4, but there are 4 streams"),
        ("gemma3n", "altup_num_inputs", json!(0), "`altup_num_inputs` is 0"),
        ("gemma3n", "altup_num_inputs", json!(1_000_000_000_000_i64), "`altup_num_inputs` is 1000000000000"),
        ("gemma3n", "laurel_rank", json!(0), "`laurel_rank` is 0"),
        ("gemma3n", "activation_sparsity_pattern", json!([0.5, 0.5, 0.5]), "has 3 entries for 4 layers"),
        ("gemma3n", "activation_sparsity_pattern", json!([0.5, 0.5, 1.0, 0.0]), "`activation_sparsity_pattern` has 1"),
        ("gemma3n", "intermediate_size", json!([40, 40]), "`intermediate_size` has 2 entries for 4 layers"),
        (
            "gemma3n",
            "intermediate_size",
            json!(["wide"]),
            "`intermediate_size` is [\"wide\"], expected integer or array",
        ),
        ("gemma3n", "num_kv_shared_layers", json!(3), "`num_kv_shared_layers` is 3 of 4 layers"),
        ("gemma3n", "num_kv_shared_layers", json!(9), "`num_kv_shared_layers` is 9 of 4 layers"),
        ("gemma3n", "use_bidirectional_attention", json!(true), "use_bidirectional_attention"),
        ("gemma3n", "query_pre_attn_scalar", json!(16.0), "`query_pre_attn_scalar` is 16"),
        ("gemma3n", "hidden_size_per_layer_input", json!(-1), "`hidden_size_per_layer_input` is -1"),
        ("gemma4", "per_layer_config", json!({"4": {"head_dim": 16}}), "`per_layer_config.4` is"),
        ("gemma4", "per_layer_config", json!({"1": {"sliding_window": 3}}), "`per_layer_config.1.sliding_window` is 3"),
        ("gemma4", "per_layer_config", json!({"1": {"head_dim": null}}), "`per_layer_config.1.head_dim` is null"),
        ("gemma4", "per_layer_config", json!({"1": {"head_dim": 16}}), "gives layer 3 other heads"),
        ("gemma4", "use_bidirectional_attention", json!("all"), "use_bidirectional_attention"),
        ("gemma4_moe", "num_experts", json!(null), "`enable_moe_block` is true"),
        ("gemma4_moe", "top_k_experts", json!(5), "5 of 4 experts"),
        ("llama", "num_kv_shared_layers", json!(2), "`num_kv_shared_layers` is 2, which llama models do not implement"),
    ] {
        let dir = changed(case, |config| config[key] = value.clone(), |_| {});
        let message = refusal(dir.path());
        assert!(message.contains(expected), "{case} {key}: {message}");
    }
}
