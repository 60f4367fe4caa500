//! Killed at any moment and resumed, a run ends on the same bytes; what goes wrong on a bad day is survived or said.

use std::fs;

use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use dictlearn as _;
use dictlearn_core::prelude::*;
use dictlearn_core::tensors;

use crate::common::{fixture, tensor_file_config, Desk, Run};

/// Every trainer, every modifier, and what a trainer has to remember: resampling, annealing, dead features, thresholds.
const SAES: &str = "saes:\n\
    - {name: standard, dictionary: {dict_size: 96}, \
       trainer: {type: standard, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9, resample_steps: 7}}\n\
    - {name: april, dictionary: {dict_size: 96}, \
       trainer: {type: standard_april_update, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9}}\n\
    - {name: new, dictionary: {type: auto_encoder_new, dict_size: 96}, \
       trainer: {type: standard, lr: 1e-3, warmup_steps: 2, decay_start: 12, sparsity_warmup_steps: 9}}\n\
    - {name: gated, dictionary: {dict_size: 96}, \
       trainer: {type: gated, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9}}\n\
    - {name: p_anneal, dictionary: {dict_size: 96}, \
       trainer: {type: p_anneal, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 4, anneal_start: 5, anneal_end: 18, \
                 n_sparsity_updates: 5, sparsity_queue_length: 3, p_end: 0.5}}\n\
    - {name: gated_anneal, dictionary: {dict_size: 96}, \
       trainer: {type: gated_anneal, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 4, anneal_start: 5, anneal_end: 18, \
                 n_sparsity_updates: 5, sparsity_queue_length: 3, p_end: 0.5}}\n\
    - {name: top_k, dictionary: {dict_size: 96, k: 6}, \
       trainer: {type: top_k, warmup_steps: 2, threshold_start_step: 4, dead_feature_threshold: 500, k_anneal_steps: 9}}\n\
    - {name: batch_top_k, dictionary: {dict_size: 96, k: 6}, \
       trainer: {type: batch_top_k, warmup_steps: 2, threshold_start_step: 4, dead_feature_threshold: 500}}\n\
    - {name: matryoshka, dictionary: {dict_size: 96, k: 6, group_fractions: [0.25, 0.75]}, \
       trainer: {type: matryoshka_batch_top_k, warmup_steps: 2, threshold_start_step: 4, dead_feature_threshold: 500}}\n\
    - {name: jump_relu, dictionary: {dict_size: 96}, \
       trainer: {type: jump_relu, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9, dead_feature_threshold: 500}}\n\
    - {name: ghosts, dictionary: {dict_size: 96}, modifiers: [{type: ghost_grads, threshold: 5}], \
       trainer: {type: standard, lr: 1e-2, l1_penalty: 0.5, warmup_steps: 2, sparsity_warmup_steps: null}}\n\
    - {name: entropy, dictionary: {dict_size: 96, k: 6}, \
       modifiers: [{type: resample, every: 6}, {type: entropy_penalty, weight: 0.1}], \
       trainer: {type: batch_top_k, warmup_steps: 2, threshold_start_step: 4}}\n";

/// What predicts another vector than it reads, or reads several.
const TRANSCODERS: &str = "saes:\n\
    - {name: transcoder, dictionary: {type: transcoder, dict_size: 96}, \
       trainer: {type: standard, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9}}\n\
    - {name: skip, dictionary: {type: skip_transcoder, dict_size: 96, k: 6}, \
       trainer: {type: top_k, warmup_steps: 2, threshold_start_step: 4, dead_feature_threshold: 500}}\n\
    - {name: jump_relu, dictionary: {dict_size: 96}, \
       trainer: {type: jump_relu, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9}}\n";
const CROSSCODERS: &str = "saes:\n\
    - {name: crosscoder, dictionary: {dict_size: 96}, \
       trainer: {type: crosscoder, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9}}\n\
    - {name: batch_top_k, dictionary: {dict_size: 96, k: 6}, \
       trainer: {type: batch_top_k_crosscoder, warmup_steps: 2, threshold_start_step: 4, dead_feature_threshold: 500}}\n\
    - {name: standard, dictionary: {dict_size: 96}, trainer: {type: standard, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9}}\n";

/// The bundled model, its buffer filled again every few steps.
fn model(more: &str) -> String {
    format!(
        "{{type: language_model, model: 'embedded:austen', ctx_len: 32, n_ctxs: 48, refresh_batch_size: 8, \
         out_batch_size: 192, {more}}}"
    )
}

/// Kills a run again and again while it is under way, resumes it each time, and compares it with one that was let be.
/// Returns how often it was killed.
fn killed_and_resumed(source: &str, saes: &str, more: &str, trials: usize) {
    let desk = Desk::new();
    prepare(&desk);
    desk.write(
        "config.yaml",
        &format!(
            "steps: 24\nlog_every: 1\ncheckpoint_every: 3\nsave_every: 10\nnormalize_activations: true\n{more}\
             source: {source}\n{saes}metrics: [{{type: reconstruction, n_batches: 2}}]\n"
        ),
    );
    let started = Instant::now();
    desk.ok(&["train", "config.yaml", "--output-dir", "whole"]);
    let whole = started.elapsed();
    let seed = source.bytes().map(u64::from).sum();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut kills = 0;
    while kills < trials {
        let _ = fs::remove_dir_all(desk.path("killed"));
        loop {
            let mut child = start(&desk, &["train", "config.yaml", "--output-dir", "killed", "--resume"]);
            // Anywhere in it, also before its first step and in its evaluation.
            let until = Instant::now() + whole.mul_f64(random.f64() * 1.1);
            while Instant::now() < until && child.try_wait().unwrap().is_none() {
                sleep(Duration::from_millis(1));
            }
            if child.try_wait().unwrap().is_none() {
                child.kill().unwrap();
                kills += 1;
            }
            let run = Run::of(child.wait_with_output().unwrap());
            assert!(run.code == 0 || run.code == -1, "{}", run.stderr);
            if run.code == 0 {
                break;
            }
        }
        same(&desk, "whole", "killed");
    }
}

/// Whether two runs have left the same.
fn same(desk: &Desk, one: &str, other: &str) {
    let files = |run: &str| -> Vec<String> {
        let prefix = format!("{run}/");
        let own = desk.files().into_iter().filter_map(|file| Some(file.strip_prefix(&prefix)?.to_owned()));
        own.filter(|file| !file.starts_with("checkpoints/") && file != "config.yaml").collect()
    };
    assert_eq!(files(one), files(other));
    assert_eq!(desk.read(&format!("{one}/metrics.jsonl")), desk.read(&format!("{other}/metrics.jsonl")));
    for file in files(one) {
        let read = |run: &str| fs::read(desk.path(&format!("{run}/{file}"))).unwrap();
        assert!(read(one) == read(other), "{file} differs");
    }
}

fn start(desk: &Desk, args: &[&str]) -> Child {
    desk.program().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Texts, tokens and activations, for sources that read files.
fn prepare(desk: &Desk) {
    let documents: String = (0..400)
        .map(|n| json_line(&format!("Document {n} says that {n} is a number, and {} another one.", n * 7)))
        .collect();
    desk.write("documents.jsonl", &documents);
    tch::manual_seed(3);
    let ids = Tensor::randint(500, [60, 20], (Kind::Int64, Device::Cpu));
    tensors::write(&desk.path("tokens.safetensors"), &[("input_ids", ids)]).unwrap();
}

fn json_line(text: &str) -> String {
    serde_json::json!({"text": text}).to_string() + "\n"
}

macro_rules! killed_and_resumed {
    ($($name:ident: $source:expr, $saes:expr, $more:expr;)*) => {
        $(
            #[test]
            fn $name() {
                killed_and_resumed(&$source, $saes, $more, 6);
            }
        )*
    };
}

killed_and_resumed! {
    killed_with_a_buffer_of_a_model:
        model("submodule: gpt_neox.layers.2, pack: true, text: {type: embedded, name: austen}"), SAES, "";
    killed_with_a_buffer_that_is_replayed:
        model("submodule: gpt_neox.layers.1, remove_bos: true, max_activation_norm_multiple: 2, \
               text: {type: text_files, path: documents.jsonl}"), SAES, "checkpoint_buffer: replay\n";
    killed_with_a_model_in_order:
        model("submodule: [gpt_neox.layers.0, gpt_neox.layers.1.mlp], io: in_to_out, shuffle: false, \
               text: {type: mix, streams: [{weight: 2, text: {type: text_files, path: documents.jsonl}}, \
                                           {weight: 1, text: {type: embedded, name: austen}}]}"), TRANSCODERS, "";
    killed_with_tokens:
        model("submodule: gpt_neox.layers.3, text: {type: token_file, path: tokens.safetensors}"), SAES,
        "checkpoint_buffer: replay\n";
    killed_with_files:
        format!("{{type: tensor_file, path: {:?}, batch_size: 192}}", fixture("trainers/batches.safetensors")), SAES, "";
    killed_with_synthetic_activations:
        "{type: synthetic, activation_dim: 24, n_features: 64, n_active: 4, batch_size: 192}", SAES, "";
    killed_with_joined_sources:
        format!("{{type: joined, sources: {{a: {}, b: {}}}}}",
            model("submodule: gpt_neox.layers.1, pack: true, text: {type: embedded, name: austen}"),
            model("submodule: gpt_neox.layers.2, pack: true, text: {type: embedded, name: austen}")), CROSSCODERS,
        "checkpoint_buffer: replay\n";
}

#[test]
fn killed_with_activations_from_disk() {
    let desk = Desk::new();
    let source = model("submodule: gpt_neox.layers.2, pack: true, text: {type: embedded, name: austen}");
    desk.write("model.yaml", &format!("source: {source}\n"));
    desk.ok(&["activations", "model.yaml", "--out", "cache", "--limit", "3000"]);
    let cache = desk.path("cache");
    killed_and_resumed(
        &format!("{{type: activation_cache, path: {cache:?}, batch_size: 192, buffer_size: 1024}}"),
        SAES,
        "",
        6,
    );
}
