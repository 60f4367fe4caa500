//! GPT-NeoX against what Hugging Face's models computed: every recorded site, logits and loss.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dictlearn_core::lm::open_model;
use dictlearn_core::model::Visit;
use dictlearn_core::prelude::*;
use dictlearn_core::tensors::TensorFile;
use dictlearn_model_gpt_neox as _;

const CASES: [&str; 2] = ["gpt_neox", "gpt_neox_sequential"];

fn fixture(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(case)
}

fn open(case: &str) -> (Box<dyn LanguageModel>, Tokens, BTreeMap<String, Tensor>) {
    let (model, _) = open_model(&fixture(case).to_string_lossy(), Device::Cpu, Precision::Float32).unwrap();
    let mut io = TensorFile::open(&fixture(case).join("io.safetensors")).unwrap().tensors().unwrap();
    let ids = io.remove("input_ids").unwrap();
    let mask = io.remove("attention_mask").unwrap().to_kind(Kind::Bool);
    (model, Tokens { ids, mask }, io)
}

/// Relative difference at the text positions.
fn difference(found: &Tensor, expected: &Tensor, mask: &Tensor) -> f64 {
    let mask = mask.unsqueeze(-1).to_kind(Kind::Float);
    let difference = ((found - expected) * &mask).norm() / (expected * &mask).norm();
    difference.double_value(&[])
}

#[test]
fn every_site_logits_and_loss() {
    for case in CASES {
        let (model, tokens, io) = open(case);
        let mut compared = 0;
        for (name, expected) in io.iter().filter(|(name, _)| !["logits", "loss"].contains(&name.as_str())) {
            let (module, side) = name.rsplit_once('.').unwrap();
            let io = if side == "in" { Io::In } else { Io::Out };
            let (point, width) = model.hook_point(module, io).unwrap();
            assert_eq!(width, 32, "{case} {name}");
            let difference = difference(&model.value_at(&tokens, &point), expected, &tokens.mask);
            assert!(difference < 1e-5, "{case} {name}: {difference}");
            compared += 1;
        }
        assert_eq!(compared, 18, "{case}");
        let logits = model.forward(&tokens, &mut Hooks::none()).unwrap();
        let difference = difference(&logits, &io["logits"], &tokens.mask);
        assert!(difference < 1e-5, "{case} logits: {difference}");
        let loss = dictlearn_core::model::cross_entropy(&logits, &tokens).0;
        let expected = io["loss"].double_value(&[0]);
        assert!((loss / expected - 1.0).abs() < 1e-5, "{case} loss: {loss}, expected {expected}");
    }
}

#[test]
fn padding_on_either_side_changes_no_text_position() {
    // Rotary attention knows only distances, so a row shifted by left padding computes the same.
    let (model, _, _) = open("gpt_neox");
    let row = [5_i64, 17, 40, 3, 99];
    let tokens = |ids: &[i64], mask: &[i64]| Tokens {
        ids: Tensor::from_slice(ids).unsqueeze(0),
        mask: Tensor::from_slice(mask).to_kind(Kind::Bool).unsqueeze(0),
    };
    let (point, _) = model.hook_point("gpt_neox.layers.2", Io::Out).unwrap();
    let alone = model.value_at(&tokens(&row, &[1; 5]), &point);
    let right = [&row[..], &[0, 0]].concat();
    let right = model.value_at(&tokens(&right, &[1, 1, 1, 1, 1, 0, 0]), &point).narrow(1, 0, 5);
    let left = [&[0, 0], &row[..]].concat();
    let left = model.value_at(&tokens(&left, &[0, 0, 1, 1, 1, 1, 1]), &point).narrow(1, 2, 5);
    for padded in [right, left] {
        assert!((padded - &alone).abs().max().double_value(&[]) < 1e-5);
    }
}

#[test]
fn a_pass_stops_after_the_last_hook() {
    let (model, tokens, _) = open("gpt_neox");
    let (point, _) = model.hook_point("gpt_neox.layers.0.mlp", Io::Out).unwrap();
    let mut hooks = Hooks::read(std::slice::from_ref(&point), true);
    assert!(model.forward(&tokens, &mut hooks).is_err(), "the pass went on after the hook");
    assert!(hooks.take(&point).is_some());
    let mut hooks = Hooks::read(&[point], false);
    assert!(model.forward(&tokens, &mut hooks).is_ok());
}

#[test]
fn continuing_from_a_layer_is_the_whole_pass() {
    for case in CASES {
        let (model, tokens, _) = open(case);
        let whole = model.forward(&tokens, &mut Hooks::none()).unwrap();
        for module in ["gpt_neox.embed_in", "gpt_neox.layers.1.attention", "gpt_neox.final_layer_norm"] {
            let (point, _) = model.hook_point(module, Io::Out).unwrap();
            let prefix = model.before(&tokens, &point);
            assert_eq!(prefix.forward(&mut Hooks::none()).unwrap(), whole, "{module}");
            let zero = |x: &Tensor| x.zeros_like();
            let replaced = prefix.forward(&mut Hooks::replace(&point, zero)).unwrap();
            assert_ne!(replaced, whole, "{module}");
            assert_eq!(replaced, model.forward(&tokens, &mut Hooks::replace(&point, zero)).unwrap(), "{module}");
        }
    }
}

#[test]
fn transformer_lens_names_are_the_same_places() {
    let (model, _, _) = open("gpt_neox_sequential");
    for (name, module, io) in [
        ("blocks.1.hook_resid_post", "gpt_neox.layers.1", Io::Out),
        ("blocks.1.hook_resid_pre", "gpt_neox.layers.1", Io::In),
        ("blocks.1.hook_mlp_out", "gpt_neox.layers.1.mlp", Io::Out),
        ("blocks.1.hook_attn_out", "gpt_neox.layers.1.attention", Io::Out),
        ("blocks.1.attn.hook_z", "gpt_neox.layers.1.attention.dense", Io::In),
        ("blocks.1.hook_resid_mid", "gpt_neox.layers.1.post_attention_layernorm", Io::In),
    ] {
        let (point, _) = model.hook_point(name, Io::Out).unwrap();
        assert_eq!(point, HookPoint { module: module.to_owned(), io }, "{name}");
    }
    // With a parallel residual there is no stream in the middle.
    let (model, _, _) = open("gpt_neox");
    assert!(model.hook_point("blocks.1.hook_resid_mid", Io::Out).is_err());
}

#[test]
fn every_module_can_be_hooked() {
    let (model, tokens, _) = open("gpt_neox");
    let modules = model.modules();
    assert_eq!(modules.len(), 3 * 10 + 3);
    for Visit { module, output, .. } in modules {
        let (point, width) = model.hook_point(&module, Io::Out).unwrap();
        assert_eq!(width, output);
        assert_eq!(model.value_at(&tokens, &point).size().last(), Some(&output), "{module}");
    }
    let wrong = model.hook_point("gpt_neox.layer.1.mlp", Io::Out).unwrap_err().to_string();
    assert!(wrong.contains("did you mean `gpt_neox.layers.1.mlp`"), "{wrong}");
}
