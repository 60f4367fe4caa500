//! Mixtures of experts: routing, sites, the layouts of their files, and what is read and computed.

use std::collections::BTreeSet;

use dictlearn_core::prelude::*;

use crate::families::{changed, computed, difference, load, open, refusal};

/// Stacks the experts of each layer, as newer files have them.
fn stacked(tensors: &mut Vec<(String, Tensor)>) {
    let take = |layer: usize, projection: &str| -> Vec<Tensor> {
        let name = |expert: usize| format!("model.layers.{layer}.mlp.experts.{expert}.{projection}.weight");
        (0..4).map(|expert| tensors.iter().find(|(known, _)| *known == name(expert)).unwrap().1.copy()).collect()
    };
    let layers: Vec<[Vec<Tensor>; 3]> =
        (0..3).map(|layer| ["gate_proj", "up_proj", "down_proj"].map(|name| take(layer, name))).collect();
    tensors.retain(|(name, _)| !name.contains(".experts."));
    for (layer, [gate, up, down]) in layers.into_iter().enumerate() {
        let path = format!("model.layers.{layer}.mlp.experts");
        let gate_up = Tensor::cat(&[Tensor::stack(&gate, 0), Tensor::stack(&up, 0)], 1);
        tensors.push((format!("{path}.gate_up_proj"), gate_up));
        tensors.push((format!("{path}.down_proj"), Tensor::stack(&down, 0)));
    }
}

#[test]
fn stacked_experts_give_the_same_numbers() {
    let (model, tokens, _) = open("qwen3_moe");
    let expected = computed(&*model, &tokens);
    let same = load(changed("qwen3_moe", |_| {}, stacked).path(), Precision::Float32).unwrap();
    for (found, expected) in computed(&*same, &tokens).iter().zip(&expected) {
        assert!(found.allclose(expected, 1e-5, 1e-6, false));
    }
}

#[test]
fn router_and_experts_are_sites() {
    for (case, mlp, router) in [
        ("qwen3_moe", "model.layers.1.mlp", "gate"),
        ("mixtral", "model.layers.1.block_sparse_moe", "gate"),
        ("gpt_oss", "model.layers.1.mlp", "router"),
    ] {
        let (model, tokens, io) = open(case);
        let at = |name: &str| model.value_at(&tokens, &model.hook_point(name, Io::Out).unwrap().0);
        let logits = at(&format!("{mlp}.{router}"));
        assert_eq!(logits.size()[2], 4, "{case}: one logit per expert");
        let apart = difference(&at(&format!("{mlp}.experts")), &io[&format!("{mlp}.out")], &tokens.mask);
        assert!(apart < 1e-5, "{case}: {apart}");
        // A replaced router changes which experts are chosen.
        let (point, _) = model.hook_point(&format!("{mlp}.{router}"), Io::Out).unwrap();
        let mut hooks = Hooks::replace(&point, |logits| logits.neg());
        let other = model.forward(&tokens, &mut hooks).unwrap();
        assert!(!other.allclose(&io["logits"], 1e-3, 1e-3, false), "{case}");
    }
}

/// The experts of a layer that some token reaches.
fn reached(model: &dyn LanguageModel, tokens: &Tokens, layer: usize) -> BTreeSet<i64> {
    let (point, _) = model.hook_point(&format!("model.layers.{layer}.mlp.gate"), Io::Out).unwrap();
    let (_, chosen) = model.value_at(tokens, &point).topk(2, -1, true, true);
    Vec::<i64>::try_from(chosen.flatten(0, -1)).unwrap().into_iter().collect()
}

#[test]
fn experts_that_no_token_reaches_are_not_computed() {
    let (model, tokens, _) = open("qwen3_moe");
    // One token reaches two of the four experts.
    let one =
        Tokens { ids: tokens.ids.narrow(0, 0, 1).narrow(1, 5, 1), mask: tokens.mask.narrow(0, 0, 1).narrow(1, 5, 1) };
    let expected = model.forward(&one, &mut Hooks::none()).unwrap();
    let spoilt = |spoil: bool| {
        let of_layer: Vec<BTreeSet<i64>> = (0..3).map(|layer| reached(&*model, &one, layer)).collect();
        let dir = changed(
            "qwen3_moe",
            |_| {},
            |tensors| {
                for (name, tensor) in tensors.iter_mut() {
                    let Some((layer, rest)) = name.split_once(".mlp.experts.") else { continue };
                    let layer: usize = layer.rsplit('.').next().unwrap().parse().unwrap();
                    let expert: i64 = rest.split('.').next().unwrap().parse().unwrap();
                    if of_layer[layer].contains(&expert) == spoil {
                        *tensor = tensor.full_like(f64::NAN);
                    }
                }
            },
        );
        load(dir.path(), Precision::Float32).unwrap().forward(&one, &mut Hooks::none()).unwrap()
    };
    assert_eq!(spoilt(false), expected, "only experts that are not reached were changed");
    assert!(spoilt(true).isnan().any().int64_value(&[]) == 1, "experts that are reached were changed");
}

#[test]
fn wrong_mixtures_are_refused_by_name() {
    let without = |part: &'static str| {
        move |tensors: &mut Vec<(String, Tensor)>| tensors.retain(|(name, _)| !name.contains(part))
    };
    let set = |key: &'static str, value: i64| move |config: &mut Value| config[key] = value.into();
    let same = |_: &mut Value| {};
    let cut = |name: &'static str, dim: i64| {
        move |tensors: &mut Vec<(String, Tensor)>| {
            for (known, tensor) in tensors.iter_mut().filter(|(known, _)| known.ends_with(name)) {
                let less = tensor.size()[dim as usize] - 1;
                *tensor = tensor.narrow(dim, 0, less).contiguous();
                assert!(!known.is_empty());
            }
        }
    };
    let blocks = "gate_up_proj_blocks";
    let plain = |tensors: &mut Vec<(String, Tensor)>| {
        let (name, shape) = ("model.layers.0.mlp.experts.down_proj", [4, 32, 64]);
        tensors.push((name.to_owned(), Tensor::zeros(shape, (Kind::Float, Device::Cpu))));
    };
    for (message, expected) in [
        (
            refusal(changed("gpt_oss_mxfp4", same, plain).path()),
            "does not describe: `model.layers.0.mlp.experts.down_proj_blocks`",
        ),
        (
            refusal(changed("qwen3_moe", same, without("layers.1.mlp.experts.2.up_proj")).path()),
            "no tensor `model.layers.1.mlp.experts.2.up_proj.weight`",
        ),
        (
            refusal(changed("qwen3_moe", set("num_experts", 3), |_| {}).path()),
            "shape [4, 32], but config.json says [3, 32]",
        ),
        (refusal(changed("qwen3_moe", set("num_experts_per_tok", 5), |_| {}).path()), "a token reaches 5 of 4 experts"),
        (refusal(changed("qwen3_moe", set("moe_intermediate_size", 0), |_| {}).path()), "is 0"),
        (refusal(changed("qwen3_moe", set("num_experts", 1 << 40), |_| {}).path()), "more than any model has"),
        (
            refusal(changed("gpt_oss", same, without("layers.1.mlp.experts.down_proj_bias")).path()),
            "no tensor `model.layers.1.mlp.experts.down_proj_bias`",
        ),
        (
            refusal(changed("gpt_oss_mxfp4", same, cut(blocks, 2)).path()),
            "gate_up_proj_blocks` has shape [4, 64, 1, 16], but config.json says [4, 64, 2, 16]",
        ),
        (
            refusal(changed("gpt_oss_mxfp4", same, without("down_proj_scales")).path()),
            "no tensor `model.layers.0.mlp.experts.down_proj_scales`",
        ),
        (
            refusal(changed("gpt_oss_mxfp4", set("intermediate_size", 40), |_| {}).path()),
            "gate_up_proj_blocks` has shape [4, 64, 2, 16], but config.json says [4, 80, 2, 16]",
        ),
        (
            refusal(
                changed(
                    "gpt_oss",
                    |config| config["quantization_config"] = serde_json::json!({"quant_method": "awq"}),
                    |_| {},
                )
                .path(),
            ),
            "`quantization_config` is {\"quant_method\":\"awq\"}",
        ),
    ] {
        assert!(message.contains(expected), "{expected}: {message}");
    }
}
