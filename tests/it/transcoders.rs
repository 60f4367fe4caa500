//! Transcoders and crosscoders, trained with the program.

use std::fs;

use dictlearn as _;
use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::prelude::*;

use crate::common::Desk;

/// The bundled model's second MLP, from input to output.
const SOURCE: &str = "source: {type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.1.mlp, \
                      io: in_to_out, pack: true, ctx_len: 64, n_ctxs: 64, out_batch_size: 256, \
                      text: {type: embedded, name: austen}}\n\
                      eval_source: {text: {split: held_out}}\n";

#[test]
fn transcoders_replace_an_mlp() {
    let desk = Desk::new();
    let saes = "saes:\n\
        - {name: plain, dictionary: {type: transcoder, expansion_factor: 4}, \
           trainer: {type: standard, lr: 2e-3, l1_penalty: 0.01, warmup_steps: 10, sparsity_warmup_steps: 50}}\n\
        - {name: top_k, dictionary: {type: transcoder, expansion_factor: 4, k: 16}, \
           trainer: {type: top_k, lr: 2e-3, warmup_steps: 10}}\n\
        - {name: skip, dictionary: {type: skip_transcoder, expansion_factor: 4, k: 16}, \
           trainer: {type: top_k, lr: 2e-3, warmup_steps: 10}}\n\
        - {name: stretcher, dictionary: {type: auto_encoder, expansion_factor: 4}, modifiers: \
           [{type: ghost_grads, threshold: 20}, {type: entropy_penalty, weight: 0.01, replace_sparsity: true}], \
           trainer: {type: standard, lr: 2e-3, warmup_steps: 10, sparsity_warmup_steps: 50}}\n\
        metrics: [{type: reconstruction, n_batches: 4}, {type: loss_recovered, n_batches: 2, batch_size: 8}]\n";
    desk.write("config.yaml", &format!("steps: 150\noutput_dir: run\nnormalize_activations: true\n{SOURCE}{saes}"));
    desk.ok(&["train", "config.yaml"]);
    let explained = |sae: &str| desk.json(&format!("run/{sae}/eval.json"))["frac_variance_explained"].as_f64().unwrap();
    for sae in ["plain", "top_k", "skip", "stretcher"] {
        let eval = desk.json(&format!("run/{sae}/eval.json"));
        // The reconstruction, in place of the module's output, must be better than zeros.
        assert!(eval["frac_recovered"].as_f64().unwrap() > 0.3, "{sae}: {eval}");
        assert!(explained(sae) > 0.2, "{sae}: {eval}");
        // `eval` measures the saved SAE on the same text.
        let again: Value = serde_json::from_str(&desk.ok(&["eval", &format!("run/{sae}"), "--json"])).unwrap();
        assert_eq!(again["frac_recovered"], eval["frac_recovered"], "{sae}");
    }
    assert!(explained("skip") > explained("top_k"), "the skip connection must take over the linear part");
    let modifiers = &desk.json("run/stretcher/config.json")["modifiers"];
    assert_eq!((&modifiers[0]["type"], &modifiers[1]["weight"]), (&"ghost_grads".into(), &0.01.into()));
}

#[test]
fn a_transcoder_predicts_targets_of_another_width() {
    let desk = Desk::new();
    tch::manual_seed(3);
    let options = (Kind::Float, Device::Cpu);
    let x = Tensor::randn([2000, 16], options);
    let y = x.matmul(&Tensor::randn([16, 24], options)).relu();
    tensors::write(&desk.path("pairs.safetensors"), &[("in", x.shallow_clone()), ("out", y)]).unwrap();
    let config = "steps: 600\noutput_dir: run\nsource: {type: tensor_file, path: pairs.safetensors, tensor: in, \
                  target_tensor: out, batch_size: 200}\nmetrics: [{type: reconstruction}]\nsaes:\n";
    let mut names = Vec::new();
    let mut saes = String::new();
    for dictionary in ["transcoder", "skip_transcoder", "auto_encoder_new", "jump_relu"] {
        names.push(dictionary);
        saes += &format!(
            "- {{name: {dictionary}, dictionary: {{type: {dictionary}, dict_size: 64}}, trainer: {{type: standard, \
             lr: 5e-3, l1_penalty: 0.001, warmup_steps: 10, sparsity_warmup_steps: null}}}}\n"
        );
    }
    desk.write("config.yaml", &format!("{config}{saes}"));
    desk.ok(&["train", "config.yaml"]);
    tensors::write(&desk.path("x.safetensors"), &[("x", x)]).unwrap();
    for name in names {
        let eval = desk.json(&format!("run/{name}/eval.json"));
        assert!(eval["frac_variance_explained"].as_f64().unwrap() > 0.6, "{name}: {eval}");
        desk.ok(&["encode", &format!("run/{name}"), "--input", "x.safetensors", "--output", "y.safetensors"]);
        let encoded = TensorFile::open(&desk.path("y.safetensors")).unwrap();
        assert_eq!(encoded.tensor("recon").unwrap().size(), [2000, 24], "{name}");
        fs::remove_file(desk.path("y.safetensors")).unwrap();
    }
    // `auto_encoder` cannot predict another width.
    let refused = desk.write(
        "refused.yaml",
        &format!("{config}- {{dictionary: {{type: auto_encoder, dict_size: 64}}, trainer: {{type: standard}}}}\n"),
    );
    let said = desk.refused(&["train", refused.to_str().unwrap(), "--output-dir", "other"]);
    assert!(said.contains("reconstructs vectors of width 16, but the source's targets have width 24"), "{said}");
}

/// Writes activations of two models: 12 features are shared, 4 are exclusive to each model. Each model has its own
/// directions; the second's activations are ten times as large.
fn two_models(desk: &Desk) {
    tch::manual_seed(4);
    let options = (Kind::Float, Device::Cpu);
    let features = Tensor::rand([20_000, 20], options) * Tensor::rand([20_000, 20], options).less(0.1);
    let directions = |d: i64| {
        let directions = Tensor::randn([20, d], options);
        &directions / directions.norm_scalaropt_dim(2.0, [1], true)
    };
    let (first, second) = (directions(24), directions(32) * 10.0);
    let _ = (first.narrow(0, 16, 4).zero_(), second.narrow(0, 12, 4).zero_());
    let write = |name: &str, activations: Tensor| {
        tensors::write(&desk.path(name), &[("activations", activations)]).unwrap();
    };
    write("base.safetensors", features.matmul(&first));
    write("chat.safetensors", features.matmul(&second));
}

#[test]
fn crosscoders_separate_shared_and_exclusive_features() {
    let desk = Desk::new();
    two_models(&desk);
    let source = "source:\n  type: joined\n  sources:\n    \
                  base: {type: tensor_file, path: base.safetensors, batch_size: 500}\n    \
                  chat: {type: tensor_file, path: chat.safetensors, batch_size: 500}\n";
    let saes = "saes:\n\
        - {name: l1, dictionary: {type: crosscoder, dict_size: 40}, \
           trainer: {type: crosscoder, lr: 5e-3, l1_penalty: 0.08, warmup_steps: 50, sparsity_warmup_steps: 200}}\n\
        - {name: batch_top_k, dictionary: {type: batch_top_k_crosscoder, dict_size: 20, k: 3}, \
           trainer: {type: batch_top_k_crosscoder, lr: 5e-3, warmup_steps: 50, threshold_start_step: 500}}\n\
        metrics: [{type: reconstruction}, {type: crosscoder}]\n";
    desk.write("config.yaml", &format!("steps: 1500\noutput_dir: run\nlog_every: 500\n{source}{saes}"));
    desk.ok(&["train", "config.yaml"]);
    for sae in ["l1", "batch_top_k"] {
        let eval = desk.json(&format!("run/{sae}/eval.json"));
        for part in ["base", "chat"] {
            let part = &eval["parts"][part];
            assert!(part["frac_variance_explained"].as_f64().unwrap() > 0.8, "{sae}: {eval}");
            assert_eq!(part["relative_decoder_norms"].as_array().unwrap().len(), 20);
            let alone = part["features_alone"].as_u64().unwrap();
            // Four are exclusive; spare features may duplicate some, too few may merge some.
            assert!((2..=8).contains(&alone), "{sae}: {eval}");
        }
        let again: Value = serde_json::from_str(&desk.ok(&["eval", &format!("run/{sae}"), "--json"])).unwrap();
        assert_eq!(again["parts"].as_object().unwrap().len(), 2);
        let config = desk.json(&format!("run/{sae}/config.json"));
        assert_eq!(config["buffer"]["parts"], serde_json::json!(["base", "chat"]));
    }
    // Parts with other names might be swapped.
    desk.write("swapped.yaml", &desk.read("config.yaml").replace("base:", "other:"));
    let said = desk.refused(&["eval", "run/l1", "--config", "swapped.yaml"]);
    assert!(said.contains("was trained on the parts base, chat, but the source has chat, other"), "{said}");
    desk.write("typo.yaml", &desk.read("config.yaml").replace("base: {type: tensor_file", "base: {type: tensorfile"));
    let said = desk.refused(&["train", "typo.yaml", "--output-dir", "other"]);
    assert!(said.contains("did you mean `tensor_file`?") && said.contains("(source.sources.base.type)"), "{said}");
    // A crosscoder's features cannot be resampled: each part has its own scale.
    let saes = "saes: [{trainer: {type: crosscoder}, modifiers: [{type: resample, every: 50}]}]\n";
    desk.write("resample.yaml", &format!("steps: 3000\n{source}{saes}"));
    let said = desk.refused(&["train", "resample.yaml"]);
    assert!(said.contains("the modifier `resample` needs features that can be resampled"), "{said}");
}

#[test]
fn layers_of_one_model_can_form_one_site() {
    let desk = Desk::new();
    let source = "source:\n  type: joined\n  sources:\n    model:\n      type: language_model\n      \
                  model: embedded:austen\n      submodule: [gpt_neox.layers.0, gpt_neox.layers.2]\n      \
                  text: {type: embedded, name: austen}\n      pack: true\n      ctx_len: 64\n      n_ctxs: 64\n      \
                  out_batch_size: 256\n";
    let saes = "saes:\n\
        - {trainer: {type: crosscoder, warmup_steps: 5, sparsity_warmup_steps: 5}, dictionary: {expansion_factor: 2}}\n\
        metrics: [{type: crosscoder}]\n";
    desk.write(
        "config.yaml",
        &format!("steps: 30\noutput_dir: run\nprecision: float32\nnormalize_activations: true\n{source}{saes}"),
    );
    desk.ok(&["train", "config.yaml"]);
    let whole = fs::read(desk.path("run/crosscoder/ae.safetensors")).unwrap();
    let eval = desk.json("run/crosscoder/eval.json");
    let parts: Vec<&String> = eval["parts"].as_object().unwrap().keys().collect();
    assert_eq!(parts, ["gpt_neox.layers.0", "gpt_neox.layers.2"]);

    // Stopped and resumed, the run ends on the same bytes.
    desk.ok(&["train", "config.yaml", "--output-dir", "parted", "--set", "stop_after=13"]);
    desk.ok(&["train", "config.yaml", "--output-dir", "parted", "--resume"]);
    assert!(whole == fs::read(desk.path("parted/crosscoder/ae.safetensors")).unwrap());
}

#[test]
fn sources_with_different_tokens_are_not_joined() {
    let desk = Desk::new();
    let model = |ctx_len: u64| {
        format!(
            "{{type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.1, pack: true, \
             text: {{type: embedded, name: austen}}, ctx_len: {ctx_len}, n_ctxs: 64, out_batch_size: 256}}"
        )
    };
    desk.write(
        "config.yaml",
        &format!(
            "steps: 10\noutput_dir: run\nsource: {{type: joined, sources: {{a: {}, b: {}}}}}\n\
             saes: [{{trainer: {{type: crosscoder, warmup_steps: 2, sparsity_warmup_steps: 2}}}}]\n",
            model(64),
            model(32)
        ),
    );
    let said = desk.refused(&["train", "config.yaml"]);
    assert!(said.contains("the source `b` returned different tokens from the first source"), "{said}");
    assert!(!desk.path("run").exists());
}
