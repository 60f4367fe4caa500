//! The program as a process: files, output and exit status.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;
use tch::{Device, Kind, Tensor};

use crate::common::{Desk, Run, fixture, tensor_file_config};

const TWO_SAES: &str = "saes:\n- trainer: {type: standard, warmup_steps: 2, sparsity_warmup_steps: 4}\n  \
                        dictionary: {dict_size: 64}\n- trainer: {type: top_k, warmup_steps: 2}\n  \
                        dictionary: {k: 4, dict_size: 64}\nmetrics: [{type: reconstruction, n_batches: 2}]\n\
                        loggers: [{type: jsonl}]\n";

#[test]
fn a_run_writes_the_documented_files() {
    let desk = Desk::with_config(&tensor_file_config(20, &format!("save_every: 10\ncheckpoint_every: 8\n{TWO_SAES}")));
    let run = desk.run(&["train", "config.yaml"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    // The table and the output folder go to standard output.
    assert!(run.stdout.contains("Variance explained") && run.stdout.contains("| standard |"), "{}", run.stdout);
    assert!(run.stdout.contains("saved to ") && run.stdout.contains("/run"), "{}", run.stdout);
    let expected: Vec<String> = ["config.yaml", "metrics.jsonl"]
        .into_iter()
        .map(str::to_owned)
        .chain(["standard", "top_k"].into_iter().flat_map(|sae| {
            let own = ["ae.pt", "ae.safetensors", "config.json", "eval.json"].map(|name| format!("{sae}/{name}"));
            own.into_iter().chain([10, 20].map(|step| format!("{sae}/checkpoints/ae_{step}.safetensors")))
        }))
        .map(|name| format!("run/{name}"))
        .collect();
    let mut found = desk.files();
    found.retain(|name| name != "config.yaml");
    // Others may have been due while one was being written.
    let checkpoints: Vec<String> = found.extract_if(.., |name| name.starts_with("run/checkpoints/")).collect();
    assert!(checkpoints.contains(&"run/checkpoints/step_20.safetensors".to_owned()), "{checkpoints:?}");
    assert!(checkpoints.len() <= 2, "{checkpoints:?}");
    let mut expected = expected;
    expected.sort();
    assert_eq!(found, expected);

    let weights = TensorFile::open(&desk.path("run/top_k/ae.safetensors")).unwrap();
    assert_eq!(weights.shape("encoder.weight").unwrap(), [64, 32]);
    assert_eq!(weights.tensor("k").unwrap().kind(), Kind::Int);
    let last = fs::read(desk.path("run/top_k/checkpoints/ae_20.safetensors")).unwrap();
    assert_eq!(last, fs::read(desk.path("run/top_k/ae.safetensors")).unwrap());
    let config = desk.json("run/top_k/config.json");
    assert_eq!(config["trainer"]["dict_class"], "AutoEncoderTopK");
    assert_eq!(config["trainer"]["trainer_class"], "TopKTrainer");
    assert_eq!(config["trainer"]["activation_dim"], 32);
    assert!(config["buffer"].is_object());
    // One object for each logged step of each SAE, with figures that the reference logs.
    let log = desk.log("run/metrics.jsonl");
    assert_eq!(log.len(), 40);
    assert!(log[0]["mse_loss"].is_number() && log[0]["sparsity_loss"].is_number() && log[0]["l0"].is_number());
    assert!(log[39]["auxk_loss"].is_number() && log[39]["sae"] == "top_k" && log[39]["step"] == 19);
}

#[test]
fn saes_of_a_sweep_share_a_stream_and_train_independently() {
    let desk = Desk::new();
    let sae = "- name: a\n  trainer: {type: batch_top_k, warmup_steps: 2, threshold_start_step: 2}\n  \
               dictionary: {dict_size: 64}\n";
    let swept = format!("saes:\n{sae}  sweep: {{trainer.lr: [1e-3, 3e-3], dictionary.k: [4, 8]}}\n");
    let rest = "metrics: [{type: reconstruction}, {type: ground_truth_recovery}]\nloggers: [{type: jsonl}]\n";
    let head = "steps: 20\nlog_every: 5\nsource: {type: synthetic, activation_dim: 16, n_features: 32, n_active: 4, \
                batch_size: 64}\n";
    desk.write("sweep.yaml", &format!("{head}output_dir: sweep\n{swept}{rest}"));
    let table = desk.ok(&["train", "sweep.yaml"]);
    assert!(table.contains("% True features") && !table.contains("CE diff"), "{table}");
    let log = desk.log("sweep/metrics.jsonl");
    let mut names: Vec<&str> = log.iter().map(|row| row["sae"].as_str().unwrap()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 4);
    for name in &names {
        assert!(table.contains(&format!("| {name} ")), "{table}");
        let steps: Vec<_> = log.iter().filter(|row| row["sae"] == *name).map(|row| &row["step"]).collect();
        assert_eq!(steps, [0, 5, 10, 15, 19]);
        assert!(desk.json(&format!("sweep/{name}/eval.json"))["frac_features_recovered"].is_number());
    }
    // Trained alone, an SAE ends on the same weights: SAEs share only the stream.
    let name = names.iter().find(|name| name.contains("k=8") && name.contains("lr=0.003")).unwrap();
    let alone =
        format!("saes:\n{sae}").replace("warmup_steps", "lr: 3e-3, warmup_steps").replace("{dict", "{k: 8, dict");
    desk.write("alone.yaml", &format!("{head}output_dir: alone\n{alone}{rest}"));
    desk.ok(&["train", "alone.yaml"]);
    let weights = |sae: &str| fs::read(desk.path(&format!("{sae}/ae.safetensors"))).unwrap();
    assert!(weights(&format!("sweep/{name}")) == weights("alone/a"), "another SAE changed the weights");
}

#[test]
fn an_endless_source_is_written_up_to_the_limit() {
    let desk = Desk::with_config("source: {type: synthetic, batch_size: 64}\n");
    let said = desk.refused(&["activations", "config.yaml", "--out", "acts"]);
    assert!(said.contains("has no end") && said.contains("--limit"), "{said}");
    assert_eq!(desk.files(), ["config.yaml"]);
    desk.ok(&["activations", "config.yaml", "--out", "acts", "--limit", "100"]);
    let written = TensorFile::open(&desk.path("acts/activations-00000.safetensors")).unwrap();
    assert_eq!(written.shape("activations").unwrap(), [100, 64]);
}

#[test]
fn a_batch_of_equal_activations_leaves_weights_finite() {
    // The auxiliary loss is divided by the residual's variance, which is 0 here.
    let desk = Desk::new();
    let x = Tensor::ones([40, 8], (Kind::Float, Device::Cpu));
    tensors::write(&desk.path("x.safetensors"), &[("activations", x)]).unwrap();
    desk.write(
        "config.yaml",
        "steps: 8\noutput_dir: run\nsource: {type: tensor_file, path: x.safetensors, batch_size: 4, shuffle: false}\n\
         saes:\n- trainer: {type: top_k, warmup_steps: 1, lr: 1e-3, dead_feature_threshold: 4}\n  \
         dictionary: {k: 2, dict_size: 16}\nmetrics: []\n",
    );
    desk.ok(&["train", "config.yaml"]);
    let weights = TensorFile::open(&desk.path("run/top_k/ae.safetensors")).unwrap().tensors().unwrap();
    for (name, tensor) in weights {
        assert!(bool::try_from(tensor.isfinite().all()).unwrap(), "{name}");
    }
}

#[test]
fn an_annealed_k_is_saved_and_loaded() {
    let desk = Desk::new();
    tensors::write(&desk.path("x.safetensors"), &[("x", Tensor::randn([4, 32], (Kind::Float, Device::Cpu)))]).unwrap();
    for method in ["top_k", "batch_top_k"] {
        let fields = "warmup_steps: 2, threshold_start_step: 2, k_anneal_steps: 15";
        let saes = format!(
            "saes:\n- trainer: {{type: {method}, {fields}}}\n  dictionary: {{dict_size: 64, k: 4}}\nmetrics: []\n\
             stop_after: 9\n"
        );
        desk.write("config.yaml", &tensor_file_config(20, &saes));
        desk.ok(&["train", "config.yaml", "--output-dir", method]);
        let sae = format!("{method}/{method}");
        let k =
            |sae: &str| TensorFile::open(&desk.path(&format!("{sae}/ae.safetensors"))).unwrap().tensor("k").unwrap();
        // After step 8 of 15: 32 · 7/15 + 4 · 8/15.
        assert_eq!(k(&sae).int64_value(&[]), 17);
        assert_eq!(desk.json(&format!("{sae}/config.json"))["trainer"]["k"], 17);
        desk.ok(&["encode", &sae, "--input", "x.safetensors", "--output", "y.safetensors"]);
        // A new run that starts from these weights has the k of its config.
        let init = format!("saes[0].init_from={sae}");
        let fields = ["--set", &init, "--set", "saes[0].trainer.k_anneal_steps=null"];
        desk.ok(&[&["train", "config.yaml", "--output-dir", "new"], &fields[..]].concat());
        assert_eq!(k(&format!("new/{method}")).int64_value(&[]), 4);
        std::fs::remove_dir_all(desk.path("new")).unwrap();
        desk.ok(&["train", "config.yaml", "--output-dir", method, "--resume", "--set", "stop_after=null"]);
        assert_eq!(k(&sae).int64_value(&[]), 4);
    }
}

#[test]
fn an_identity_baseline_trains_beside_other_saes() {
    let desk = Desk::new();
    let baseline = "- {name: baseline, dictionary: {type: identity}, trainer: {type: standard, warmup_steps: 1, sparsity_warmup_steps: null}}";
    desk.write("config.yaml", &tensor_file_config(20, &TWO_SAES.replace("saes:\n", &format!("saes:\n{baseline}\n"))));
    desk.ok(&["train", "config.yaml"]);
    assert_eq!(desk.json("run/baseline/eval.json")["frac_variance_explained"], 1.0);
    let again: serde_json::Value = serde_json::from_str(&desk.ok(&["eval", "run/baseline", "--json"])).unwrap();
    assert_eq!(again["l2_loss"], 0.0);
}

#[test]
fn a_failed_evaluation_keeps_the_weights() {
    let desk = Desk::new();
    poisoned(&desk, 3, f64::NAN);
    let eval_source = "eval_source: {path: x.safetensors}\n";
    desk.write("config.yaml", &tensor_file_config(20, &format!("checkpoint_every: null\n{eval_source}{TWO_SAES}")));
    let said = desk.refused(&["train", "config.yaml"]);
    assert!(said.contains("row 3"), "{said}");
    for sae in ["standard", "top_k"] {
        TensorFile::open(&desk.path(&format!("run/{sae}/ae.safetensors"))).unwrap();
    }
}

#[test]
fn init_from_weights_are_for_unnormalised_activations() {
    let desk = Desk::new();
    let sae = desk.golden_sae("standard");
    let trainer = "trainer: {type: standard, lr: 0, warmup_steps: 1, sparsity_warmup_steps: null}";
    let saes = format!("saes: [{{name: a, {trainer}, dictionary: {{dict_size: 96}}, init_from: standard}}]\n");
    desk.write("config.yaml", &tensor_file_config(4, &format!("normalize_activations: true\n{saes}")));
    desk.ok(&["train", "config.yaml"]);
    // With a learning rate of 0, the saved weights are the loaded ones.
    let (own, from) = (
        TensorFile::open(&desk.path("run/a/ae.safetensors")).unwrap(),
        TensorFile::open(&sae.join("ae.safetensors")).unwrap(),
    );
    for name in ["bias", "encoder.bias"] {
        let apart = (own.tensor(name).unwrap() - from.tensor(name).unwrap()).abs().max().double_value(&[]);
        assert!(apart < 1e-6, "{name}: {apart}");
    }
}

#[test]
fn a_closed_stdout_is_not_an_error() {
    let desk = Desk::new();
    let mut child = desk.program().arg("schema").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn eval_repeats_the_figures_of_training() {
    let desk = Desk::new();
    // Training's metrics would read the rows that 20 steps leave; with an `eval_source` they and `eval` read the same.
    let eval_source = "eval_source: {batch_size: 128}\n";
    desk.write(
        "config.yaml",
        &tensor_file_config(20, &format!("normalize_activations: true\n{eval_source}{TWO_SAES}")),
    );
    desk.ok(&["train", "config.yaml"]);
    let trained = desk.json("run/top_k/eval.json");
    let again: serde_json::Value = serde_json::from_str(&desk.ok(&["eval", "run/top_k", "--json"])).unwrap();
    assert_eq!(again, trained);
    let table = desk.ok(&["eval", "run/top_k"]);
    assert!(table.contains("| top_k |"), "{table}");
    // `--set` changes the metrics.
    let fewer = desk.ok(&["eval", "run/top_k", "--json", "--set", "metrics[0].n_batches=1"]);
    assert_ne!(serde_json::from_str::<serde_json::Value>(&fewer).unwrap(), trained);
}

#[test]
fn eval_without_metrics_uses_all_that_apply() {
    let desk = Desk::new();
    desk.golden_sae("top_k");
    let model = fixture("models/gpt_neox");
    desk.write(
        "eval.yaml",
        &format!(
            "source: {{type: language_model, model: {model:?}, submodule: gpt_neox.layers.1, out_batch_size: 8, shuffle: \
             false, text: {{type: token_file, path: {:?}}}}}\n",
            model.join("io.safetensors")
        ),
    );
    let found: serde_json::Value =
        serde_json::from_str(&desk.ok(&["eval", "top_k", "--config", "eval.yaml", "--json"])).unwrap();
    for name in [
        "l2_loss",
        "l1_loss",
        "l0",
        "frac_variance_explained",
        "cossim",
        "l2_ratio",
        "relative_reconstruction_bias",
        "frac_alive",
        "loss_original",
        "loss_reconstructed",
        "loss_zero",
        "frac_recovered",
    ] {
        assert!(found[name].is_number(), "{name}: {found}");
    }
}

#[test]
fn encode_writes_features_and_reconstructions() {
    let desk = Desk::new();
    desk.golden_sae("top_k");
    let x = TensorFile::open(&fixture("trainers/batches.safetensors")).unwrap().tensor("activations").unwrap();
    tensors::write(&desk.path("x.safetensors"), &[("x", x.shallow_clone())]).unwrap();
    desk.ok(&["encode", "top_k", "--input", "x.safetensors", "--output", "y.safetensors"]);
    let y = TensorFile::open(&desk.path("y.safetensors")).unwrap();
    let (features, recon) = (y.tensor("features").unwrap(), y.tensor("recon").unwrap());
    assert_eq!(features.size(), [5120, 96]);
    assert_eq!(recon.size(), x.size());
    // k = 6 features fire.
    let active = features.not_equal(0.0).sum_dim_intlist(1, false, Kind::Int64);
    assert_eq!(active.max().int64_value(&[]), 6);
    let weights = TensorFile::open(&desk.path("top_k/ae.safetensors")).unwrap();
    let by_hand = features.matmul(&weights.tensor("decoder.weight").unwrap().tr()) + weights.tensor("b_dec").unwrap();
    assert!((by_hand - recon).abs().max().double_value(&[]) < 1e-4);
}

#[test]
fn encode_refuses_unsuitable_input() {
    let desk = Desk::new();
    desk.golden_sae("top_k");
    let write = |name: &str, tensor: Tensor| tensors::write(&desk.path("x.safetensors"), &[(name, tensor)]).unwrap();
    let args = ["encode", "top_k", "--input", "x.safetensors", "--output", "y.safetensors"];
    write("x", Tensor::zeros([4, 31], (Kind::Float, Device::Cpu)));
    assert!(desk.refused(&args).contains("has shape [4, 31]"));
    write("activations", Tensor::zeros([4, 32], (Kind::Float, Device::Cpu)));
    assert!(desk.refused(&args).contains("it has: activations"));
    fs::write(desk.path("x.safetensors"), "no tensors").unwrap();
    assert!(desk.refused(&args).contains("not a complete safetensors file"));
    write("x", Tensor::from_slice(&[0.0, f32::NAN]).repeat([3, 16]));
    assert!(desk.refused(&args).contains("row 0 of tensor `x`"));
    assert!(
        desk.refused(&["encode", "top_k", "--input", "x.safetensors", "--output", "./x.safetensors"])
            .contains("--input")
    );
    assert!(desk.refused(&["encode", "nowhere", "--input", "x", "--output", "y"]).contains("nowhere does not exist"));
    // A run's folder is not an SAE; the error names the SAEs in it.
    fs::create_dir(desk.path("run")).unwrap();
    fs::rename(desk.path("top_k"), desk.path("run/top_k")).unwrap();
    assert!(desk.refused(&["encode", "run", "--input", "x", "--output", "y"]).contains("run/top_k"));
    assert!(!desk.path("y.safetensors").exists());
}

#[test]
fn damaged_saes_are_refused() {
    let desk = Desk::new();
    let dir = desk.golden_sae("top_k");
    let args = ["encode", "top_k", "--input", "x.safetensors", "--output", "y.safetensors"];
    let whole = fs::read(dir.join("ae.safetensors")).unwrap();
    fs::write(dir.join("ae.safetensors"), &whole[..whole.len() / 2]).unwrap();
    assert!(desk.refused(&args).contains("ae.safetensors: not a complete safetensors file"));
    fs::write(dir.join("ae.safetensors"), &whole).unwrap();
    let config = fs::read_to_string(dir.join("config.json")).unwrap();
    fs::write(dir.join("config.json"), config.replace("AutoEncoderTopK", "AutoEncoderTopk")).unwrap();
    assert!(desk.refused(&args).contains("did you mean `AutoEncoderTopK`?"));
    fs::write(dir.join("config.json"), "{").unwrap();
    assert!(desk.refused(&args).contains("config.json: not JSON"));
    fs::remove_file(dir.join("config.json")).unwrap();
    assert!(desk.refused(&args).contains("config.json"));
}

#[test]
fn activations_are_written_in_order() {
    let desk = Desk::with_config(&tensor_file_config(3, "").replace("shuffle: false", "shuffle: true"));
    desk.ok(&["activations", "config.yaml", "--out", "all"]);
    let expected = TensorFile::open(&fixture("trainers/batches.safetensors")).unwrap().tensor("activations").unwrap();
    let all = TensorFile::open(&desk.path("all/activations-00000.safetensors")).unwrap().tensor("activations").unwrap();
    assert_eq!(all, expected);
    assert_eq!(desk.json("all/meta.json")["activations"], 5120);
    assert_eq!(desk.json("all/meta.json")["shards"][0]["file"], "activations-00000.safetensors");

    desk.ok(&["activations", "config.yaml", "--out", "some", "--limit", "100"]);
    let some = TensorFile::open(&desk.path("some/activations-00000.safetensors")).unwrap();
    assert_eq!(some.tensor("activations").unwrap(), expected.narrow(0, 0, 100));
    assert!(desk.refused(&["activations", "config.yaml", "--out", "all"]).contains("already holds activations"));
}

#[test]
fn another_run_is_not_overwritten() {
    let desk = Desk::with_config(&tensor_file_config(
        4,
        "saes: [{trainer: {type: standard, warmup_steps: 1, sparsity_warmup_steps: null}}]\n",
    ));
    desk.ok(&["train", "config.yaml", "--set", "checkpoint_every=null"]);
    let before = fs::read(desk.path("run/standard/ae.safetensors")).unwrap();
    let said = desk.refused(&["train", "config.yaml", "--set", "seed=3"]);
    assert!(said.contains("already holds a run") && said.contains("--output-dir"), "{said}");
    // The finished run kept no checkpoint, so resuming it would train it again.
    let said = desk.refused(&["train", "config.yaml", "--resume"]);
    assert!(said.contains("no checkpoint to resume from"), "{said}");
    assert_eq!(fs::read(desk.path("run/standard/ae.safetensors")).unwrap(), before);
}

/// Writes the fixtures' activations with all values of one row replaced by `number`.
fn poisoned(desk: &Desk, row: i64, number: f64) {
    let x = TensorFile::open(&fixture("trainers/batches.safetensors")).unwrap().tensor("activations").unwrap();
    let _ = x.get(row).fill_(number);
    tensors::write(&desk.path("x.safetensors"), &[("activations", x)]).unwrap();
}

/// A config that trains on the activations of [`poisoned`].
fn on_poisoned(steps: u64, more: &str) -> String {
    tensor_file_config(steps, more).replace(&format!("{:?}", fixture("trainers/batches.safetensors")), "x.safetensors")
}

#[test]
fn nonfinite_activations_stop_the_run() {
    let desk = Desk::new();
    poisoned(&desk, 64 * 5 + 3, f64::NAN);
    desk.write("config.yaml", &on_poisoned(20, TWO_SAES));
    let said = desk.refused(&["train", "config.yaml"]);
    assert!(said.contains("step 5") && said.contains("row 323"), "{said}");
    // No folder is left that would stop the next run.
    assert!(!desk.path("run").exists());
    desk.write("run/mine.txt", "a file of the user's");
    desk.refused(&["train", "config.yaml"]);
    assert_eq!(desk.files(), ["config.yaml", "run/mine.txt", "x.safetensors"]);
    // `activations` does not write them to disk either.
    assert!(desk.refused(&["activations", "config.yaml", "--out", "all"]).contains("row 323"));
    assert!(!desk.path("all").exists());
}

#[test]
fn a_nonfinite_loss_stops_the_run_and_keeps_the_checkpoint() {
    let sae =
        "checkpoint_every: 2\nsaes: [{trainer: {type: standard, warmup_steps: 1, sparsity_warmup_steps: null}}]\n";
    let desk = Desk::with_config(&on_poisoned(20, sae));
    let row = 64 * 5 + 3;
    poisoned(&desk, row, 1.0);
    desk.ok(&["train", "config.yaml", "--output-dir", "whole"]);
    // Finite, but its square is not.
    poisoned(&desk, row, 1e25);
    let said = desk.refused(&["train", "config.yaml"]);
    assert!(said.contains("step 5: the loss of SAE `standard` is inf"), "{said}");
    assert!(!desk.path("run/standard/ae.safetensors").exists());
    // With repaired data it resumes from the checkpoint of step 2 or 4 and ends on the same weights.
    poisoned(&desk, row, 1.0);
    let run = desk.run(&["train", "config.yaml", "--resume"]);
    assert!(run.code == 0 && run.stderr.contains("resuming at step "), "{}", run.stderr);
    let weights = |run: &str| fs::read(desk.path(&format!("{run}/standard/ae.safetensors"))).unwrap();
    assert!(weights("run") == weights("whole"));
}

/// Starts a run, signals it once it has logged five rows, and waits for it.
fn signal(desk: &Desk, args: &[&str], signal: &str) -> Run {
    let child = desk.program().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while fs::read_to_string(desk.path("run/metrics.jsonl")).map_or(0, |log| log.lines().count()) < 5 {
        assert!(started.elapsed() < Duration::from_secs(120), "the run did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    Run::of(child.wait_with_output().unwrap())
}

#[test]
fn an_interrupted_run_is_saved_and_resumes_to_the_same_weights() {
    let desk = Desk::new();
    // Long enough to be interrupted; the log is flushed at each checkpoint.
    desk.write("config.yaml", &tensor_file_config(3000, &format!("checkpoint_every: 50\n{TWO_SAES}")));
    let run = signal(&desk, &["train", "config.yaml"], "-INT");
    assert_eq!(run.code, 130, "{}", run.stderr);
    assert!(run.stderr.contains("--resume"), "{}", run.stderr);
    for sae in ["standard", "top_k"] {
        TensorFile::open(&desk.path(&format!("run/{sae}/ae.safetensors"))).unwrap();
    }
    let at = desk.log("run/metrics.jsonl").last().unwrap()["step"].as_u64().unwrap() + 1;
    assert!(at < 3000);
    // 20 more steps suffice to compare the resumed run.
    let end = (at + 20).to_string();
    let resumed = desk.run(&["train", "config.yaml", "--resume", "--set", &format!("stop_after={end}")]);
    assert_eq!(resumed.code, 0, "{}", resumed.stderr);
    assert!(resumed.stderr.contains(&format!("resuming at step {at}")), "{}", resumed.stderr);
    desk.ok(&["train", "config.yaml", "--output-dir", "whole", "--set", &format!("stop_after={end}")]);
    for sae in ["standard", "top_k"] {
        let weights = |run: &str| fs::read(desk.path(&format!("{run}/{sae}/ae.safetensors"))).unwrap();
        assert_eq!(weights("run"), weights("whole"), "{sae}");
    }
    assert_eq!(desk.read("run/metrics.jsonl"), desk.read("whole/metrics.jsonl"));
    let changed = desk.refused(&["train", "config.yaml", "--resume", "--set", "saes[0].trainer.lr=1"]);
    assert!(changed.contains("`saes[0].trainer.lr`: 0.001 -> 1"), "{changed}");
}

/// A run on the bundled model whose buffer is slow to fill and soon used up.
const LONG_FILLS: &str = "steps: 200\noutput_dir: run\nprecision: float32\nlog_every: 1\ncheckpoint_every: 2\n\
    source: {type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.2, pack: true, ctx_len: 64, \
    n_ctxs: N_CTXS, refresh_batch_size: 4, out_batch_size: BATCH, text: {type: embedded, name: austen}}\n\
    saes: [{trainer: {type: top_k, warmup_steps: 1}, dictionary: {k: 4, dict_size: 64}}]\n";

#[test]
fn a_run_can_be_interrupted_before_its_first_step() {
    let desk = Desk::with_config(&LONG_FILLS.replace("N_CTXS", "20000").replace("BATCH", "256"));
    for (args, normalize) in
        [(vec!["train", "config.yaml"], "true"), (vec!["train", "config.yaml", "--resume"], "false")]
    {
        let set = format!("normalize_activations={normalize}");
        let args = [args, vec!["--set", &set]].concat();
        let child = desk.program().args(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while !desk.path("run/config.yaml").exists() {
            assert!(started.elapsed() < Duration::from_secs(120), "the run did not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(300));
        let sent = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let run = Run::of(child.wait_with_output().unwrap());
        assert_eq!(run.code, 143, "{}", run.stderr);
        assert!(run.stderr.contains("stopped before the first step"), "{}", run.stderr);
        assert!(!desk.path("run").exists(), "{:?}", desk.files());
    }
}

#[test]
fn a_run_interrupted_while_filling_the_buffer_resumes() {
    let desk = Desk::new();
    // Each step uses half of the buffer, so nearly all time goes into filling it.
    desk.write("config.yaml", &LONG_FILLS.replace("N_CTXS", "512").replace("BATCH", "16000"));
    let run = signal(&desk, &["train", "config.yaml"], "-INT");
    assert_eq!(run.code, 130, "{}", run.stderr);
    let at = desk.log("run/metrics.jsonl").last().unwrap()["step"].as_u64().unwrap() + 1;
    let end = format!("stop_after={}", at + 2);
    desk.ok(&["train", "config.yaml", "--resume", "--set", &end]);
    desk.ok(&["train", "config.yaml", "--output-dir", "whole", "--set", &end]);
    let weights = |run: &str| fs::read(desk.path(&format!("{run}/top_k/ae.safetensors"))).unwrap();
    assert_eq!(weights("run"), weights("whole"));
}

#[test]
fn a_killed_run_leaves_no_partial_files() {
    let desk = Desk::new();
    // Saves at every step, so that the kill meets a write.
    let more = "checkpoint_every: 1\nsave_every: 1\n";
    desk.write("config.yaml", &tensor_file_config(3000, &format!("{more}{TWO_SAES}")));
    for _ in 0..3 {
        let run = signal(&desk, &["train", "config.yaml"], "-KILL");
        assert_eq!(run.code, -1);
        for name in desk.files() {
            let path = desk.path(&name);
            if name.ends_with(".safetensors") {
                TensorFile::open(&path).unwrap_or_else(|error| panic!("{error:#}"));
            } else {
                assert!(name.ends_with(".yaml") || name.ends_with(".jsonl"), "{name} was left behind");
            }
        }
        let resumed = desk.run(&["train", "config.yaml", "--resume", "--set", "stop_after=1"]);
        assert_eq!(resumed.code, 0, "{}", resumed.stderr);
        fs::remove_dir_all(desk.path("run")).unwrap();
    }
}

#[test]
fn list_and_describe_show_registered_components() {
    let desk = Desk::new();
    let all = desk.ok(&["list"]);
    for name in ["auto_encoder", "top_k", "language_model", "token_file", "reconstruction", "jsonl", "gpt_neox"] {
        assert!(all.contains(name), "{name}: {all}");
    }
    assert_eq!(desk.ok(&["list", "trainer"]), desk.ok(&["list", "trainers"]));
    let top_k = desk.ok(&["describe", "trainer", "top_k"]);
    assert!(top_k.contains("Gao et al. 2024") && top_k.contains("auxk_alpha (number, default 0.03125)"), "{top_k}");
    assert!(desk.refused(&["describe", "trainer", "topk"]).contains("did you mean `top_k`?"));
    assert!(desk.refused(&["list", "traners"]).contains("did you mean `trainers`?"));
    let schema: serde_json::Value = serde_json::from_str(&desk.ok(&["schema"])).unwrap();
    assert!(schema["properties"]["source"].is_object());
}

#[test]
fn a_run_that_cannot_fit_in_memory_is_refused() {
    let desk = Desk::new();
    let config = "saes: [{trainer: {type: standard}, dictionary: {dict_size: 1e14}}]\n";
    desk.write("config.yaml", &tensor_file_config(3000, config));
    let said = desk.refused(&["train", "config.yaml"]);
    assert!(said.contains("100000000000000 features of width 32 would take") && said.contains("dict_size"), "{said}");
    // The run is refused before anything is read or written, and the error names what to change.
    desk.write("config.yaml", &LONG_FILLS.replace("N_CTXS", "500000000").replace("BATCH", "256"));
    let said = desk.refused(&["train", "config.yaml"]);
    assert!(said.contains("the run needs") && said.contains("change `n_ctxs`"), "{said}");
    let lean = ["train", "config.yaml", "--set", "checkpoint_buffer=replay", "--set", "source.n_ctxs=2000"];
    let plan = desk.ok(&[&lean[..], &["--dry-run"]].concat());
    assert!(plan.contains("# expected peak memory (cpu): ") && plan.contains("the buffer of activations"), "{plan}");
    assert!(!desk.path("run").exists());
    let first = desk.run(&[&lean[..], &["--set", "stop_after=1"]].concat());
    let mut lines = first.stderr.lines().skip_while(|line| line.starts_with("defaults adapted to "));
    assert!(lines.next().is_some_and(|line| line.starts_with("expected peak memory (cpu): ")), "{}", first.stderr);
}

/// A step must reuse the memory that the step before it freed, also with many small selections. Memory must not be kept
/// for every size of product that the number of dead features gives.
#[test]
#[cfg(target_os = "linux")]
fn memory_does_not_grow_with_steps() {
    let many_rows = "precision: float32\n\
         source: {type: synthetic, activation_dim: 16, n_features: 32, n_active: 4, batch_size: 2048}\n\
         saes: [{trainer: {type: top_k}, dictionary: {k: 64, dict_size: 1024}}]\n";
    let dying = "precision: bfloat16\n\
         source: {type: synthetic, activation_dim: 64, n_features: 8, n_active: 2, batch_size: 512}\n\
         saes: [{trainer: {type: top_k, dead_feature_threshold: 1500}, dictionary: {k: 16, dict_size: 2048}}]\n";
    let dense = many_rows.replace("k: 64", "k: 400");
    for config in [many_rows, dying, &dense] {
        let (few, many) = (peak_memory(config, "20"), peak_memory(config, "150"));
        assert!(many < few + 8_000, "{few} kB in 20 steps, {many} in 150: {config}");
    }
}

/// Peak memory of a run of `steps` steps in kB. Asserts that it stays below the program's estimate.
#[cfg(target_os = "linux")]
fn peak_memory(config: &str, steps: &str) -> u64 {
    let desk = Desk::new();
    let usual = "steps: 100000\ncheckpoint_every: null\noutput_dir: run\nloggers: []\nmetrics: []\n";
    desk.write("config.yaml", &format!("{usual}{config}stop_after: {steps}\n"));
    let plan = desk.ok(&["train", "config.yaml", "--dry-run"]);
    let expected = plan.lines().find_map(|line| line.strip_prefix("# expected peak memory (cpu): ")).unwrap();
    assert!(expected.contains(" MB of "), "{expected}");
    let expected = expected.split(' ').next().unwrap().parse::<f64>().unwrap() * 1e6;
    let mut child =
        desk.program().args(["train", "config.yaml"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut kb = 0;
    loop {
        let status = fs::read_to_string(&status).unwrap_or_default();
        let so_far = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().split(' ').next());
        kb = so_far.map_or(kb, |number| number.parse::<u64>().unwrap());
        if let Some(ended) = child.try_wait().unwrap() {
            assert!(ended.success() && kb > 0);
            let bytes = kb as f64 * 1024.0;
            assert!(bytes < expected, "{bytes} bytes exceed the expected {expected}: {config}");
            return kb;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn wrong_arguments_exit_with_status_2() {
    let desk = Desk::new();
    assert_eq!(desk.run(&["trian"]).code, 2);
    assert_eq!(desk.run(&["train"]).code, 2);
    assert_eq!(desk.run(&["--help"]).code, 0);
    assert!(desk.refused(&["train", "nowhere.yaml"]).contains("there is no file nowhere.yaml"));
    assert!(desk.refused(&["eval", "nowhere"]).contains("nowhere does not exist"));
}

/// A short run on the bundled model, measured on text that training does not read.
const ON_A_MODEL: &str = "steps: 10\noutput_dir: run\nprecision: float32\ncheckpoint_every: null\n\
    source: {type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.2, pack: true, ctx_len: 64, \
    n_ctxs: 32, refresh_batch_size: 8, out_batch_size: 256, text: {type: embedded, name: austen}}\n\
    eval_source: {text: {type: embedded, name: austen, split: held_out}, shuffle: false}\n\
    saes:\n- trainer: {type: top_k, warmup_steps: 1, threshold_start_step: 2}\n  dictionary: {k: 8, dict_size: 128}\n\
    metrics: [{type: reconstruction, n_batches: 5}, {type: loss_recovered, n_batches: 1, batch_size: 8}]\n";

fn parsed(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The commands on the indented lines after a heading.
fn commands_after<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
    let lines = text.lines().skip_while(|line| line.trim() != word).skip(1);
    lines.take_while(|line| line.starts_with("  ")).map(str::trim).collect()
}

#[test]
fn eval_overrides_of_the_source_apply_to_eval_source() {
    let desk = Desk::with_config(ON_A_MODEL);
    let trained = desk.ok(&["train", "config.yaml"]);
    let on = "measured on embedded austen held_out: 1280 tokens in 20 contexts (reconstruction), 512 tokens in 8 contexts \
              (loss_recovered)\n";
    assert!(trained.contains(on), "{trained}");
    assert!(desk.ok(&["eval", "run/top_k"]).contains(on));
    let own = parsed(&desk.ok(&["eval", "run/top_k", "--json"]));
    assert_eq!(own["measured"]["text"]["split"], "held_out");
    assert_eq!(own, desk.json("run/top_k/eval.json"));

    desk.write("mine.txt", &"She was not in the least like a machine, and said so to everybody.\n\n".repeat(100));
    // The example in the help text.
    let help = desk.ok(&["eval", "--help"]);
    let example = help.split("`--set '").nth(1).unwrap_or_else(|| panic!("{help}")).split("'`").next().unwrap();
    let example = example.split_whitespace().collect::<Vec<_>>().join(" ");
    let mine = parsed(&desk.ok(&["eval", "run/top_k", "--json", "--set", &example]));
    let path = desk.path("mine.txt");
    let here = |json: &serde_json::Value| fs::canonicalize(json.as_str().unwrap()).unwrap();
    assert_eq!(here(&mine["measured"]["text"]["path"]), fs::canonicalize(&path).unwrap());
    assert_ne!(mine["loss_original"], own["loss_original"]);
    // A variable works too; a setting of `eval_source` itself takes precedence.
    let mut program = desk.program();
    program.env("DICTLEARN_SOURCE__TEXT", "{type: text_files, path: mine.txt}");
    let run = Run::of(program.args(["eval", "run/top_k", "--json"]).output().unwrap());
    assert_eq!(parsed(&run.stdout), mine, "{}", run.stderr);
    let held_out = "eval_source.text={type: embedded, name: austen, split: held_out}";
    let said = parsed(&desk.ok(&["eval", "run/top_k", "--json", "--set", &example, "--set", held_out]));
    assert_eq!(said, own);
    // Keys other than the text.
    let shorter = parsed(&desk.ok(&["eval", "run/top_k", "--json", "--set", "source.ctx_len=32"]));
    assert_eq!(shorter["measured"]["by_metric"]["loss_recovered"]["tokens"], 256);
    // Errors of the data point to the `--set` that chose them.
    desk.write("empty.txt", "");
    let said = desk.refused(&["eval", "run/top_k", "--set", "source.text={type: text_files, path: empty.txt}"]);
    assert!(said.contains("--set source.text={type: text_files, path: empty.txt}"), "{said}");
    let said = desk.refused(&["eval", "run/top_k", "--set", "source.ctx_len=100000"]);
    assert!(said.contains(" --> --set source.ctx_len=100000 (source.ctx_len)\n"), "{said}");
}

#[test]
fn settings_that_eval_does_not_use_are_refused() {
    let desk = Desk::with_config(&tensor_file_config(20, TWO_SAES));
    desk.ok(&["train", "config.yaml"]);
    for set in ["saes[0].dictionary.dict_size=32", "steps=10"] {
        let said = desk.refused(&["eval", "run/top_k", "--set", set]);
        assert!(said.contains("does not affect evaluation") && said.contains("eval_source"), "{said}");
    }
    assert!(desk.refused(&["eval", "run/top_k", "--set", "sorce.batch_size=1"]).contains("did you mean `source`"));
    let said = desk.refused(&["eval", "run/top_k", "--set", "metrics=[]"]);
    assert!(said.contains("`--set metrics=[]` leaves no metrics to compute"), "{said}");
}

#[test]
fn too_little_data_for_a_figure_gives_a_warning() {
    let desk = Desk::with_config(&tensor_file_config(20, TWO_SAES));
    let run = desk.run(&["train", "config.yaml"]);
    assert!(run.stderr.contains("the metrics are computed on 128 tokens (reconstruction)"), "{}", run.stderr);
    let run = desk.run(&["eval", "run/top_k", "--set", "metrics[0].n_batches=20"]);
    assert!(!run.stderr.contains("tokens (reconstruction)"), "{}", run.stderr);
    assert!(run.stdout.contains("batches.safetensors: 1280 tokens\n"), "{}", run.stdout);
    // So few tokens give most of many features no chance to fire.
    let wide = "saes[1].dictionary.dict_size=1024";
    desk.ok(&["train", "config.yaml", "--output-dir", "wide", "--set", wide]);
    let run = desk.run(&["eval", "wide/top_k", "--set", "metrics[0].n_batches=20"]);
    assert!(run.stderr.contains("frac_alive is too low: in 1280 tokens"), "{}", run.stderr);
}

#[test]
fn eval_measures_whole_runs_and_several_at_once() {
    let desk = Desk::with_config(&tensor_file_config(20, TWO_SAES));
    desk.ok(&["train", "config.yaml", "--output-dir", "runs/a"]);
    desk.ok(&["train", "config.yaml", "--output-dir", "runs/b", "--set", "saes[1].dictionary.k=8"]);
    let of_run = parsed(&desk.ok(&["eval", "runs/a", "--json"]));
    assert_eq!(of_run.as_array().unwrap().len(), 2);
    assert_eq!(of_run[0]["sae"], "runs/a/standard");
    // Several runs, another config and a repeated SAE: each row has the SAE's own figures.
    desk.write("other.yaml", &tensor_file_config(20, &TWO_SAES.replace("n_batches: 2", "n_batches: 3")));
    desk.ok(&["train", "other.yaml", "--output-dir", "c"]);
    let all = parsed(&desk.ok(&["eval", "runs", "c", "runs/a/top_k", "--json"]));
    let names: Vec<&str> = all.as_array().unwrap().iter().map(|row| row["sae"].as_str().unwrap()).collect();
    assert_eq!(names, ["runs/a/standard", "runs/a/top_k", "runs/b/standard", "runs/b/top_k", "c/standard", "c/top_k"]);
    for mut row in all.as_array().unwrap().clone() {
        let sae = row.as_object_mut().unwrap().remove("sae").unwrap();
        assert_eq!(row, parsed(&desk.ok(&["eval", sae.as_str().unwrap(), "--json"])), "{sae}");
    }
    let table = desk.ok(&["eval", "runs/a", "c"]);
    assert!(table.contains("| runs/a/top_k ") && table.contains("c/standard, c/top_k: measured on "), "{table}");
    assert!(desk.refused(&["eval", "runs/a", "nowhere"]).contains("nowhere does not exist"));
    fs::create_dir(desk.path("empty")).unwrap();
    assert!(desk.refused(&["eval", "empty"]).contains("empty holds no ae.safetensors"));
}

#[test]
fn compare_shows_runs_in_one_table() {
    let desk = Desk::new();
    let swept = TWO_SAES.replace(
        "trainer: {type: top_k, warmup_steps: 2}",
        "sweep: {dictionary.k: [4, 16]}\n  trainer: {type: top_k, warmup_steps: 2}",
    );
    desk.write("config.yaml", &tensor_file_config(20, &swept));
    desk.ok(&["train", "config.yaml"]);
    let golden = desk.golden_sae("top_k");
    fs::rename(golden, desk.path("theirs")).unwrap();

    let run = desk.run(&["compare", "run", "theirs", "--sort", "k"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let rows: Vec<Vec<&str>> = run
        .stdout
        .lines()
        .map(|line| line.split('|').map(str::trim).collect::<Vec<_>>())
        .filter(|row| row.len() > 2)
        .collect();
    let column =
        |name: &str| rows[0].iter().position(|title| *title == name).unwrap_or_else(|| panic!("{name}: {rows:?}"));
    let (k, l0) = (column("k"), column("L0"));
    let found: Vec<(&str, &str)> = rows[2..].iter().map(|row| (row[1], row[k])).collect();
    assert_eq!(found, [("top_k-k=4", "4"), ("theirs", "6"), ("top_k-k=16", "16"), ("standard", "–")]);
    assert_eq!((rows[2][l0], rows[3][l0]), ("4.00", "–"));
    assert!(run.stdout.contains("measured on "), "{}", run.stdout);
    assert!(run.stderr.contains("1 of 4 SAEs have no eval.json"), "{}", run.stderr);

    let json = parsed(&desk.ok(&["compare", "run", "--json", "--sort=-l0"]));
    assert_eq!(json[0]["sae"], "run/standard");
    assert_eq!(json[1]["config"]["k"], 16);
    assert_eq!(json[1]["figures"], desk.json("run/top_k-k=16/eval.json"));
    let csv = desk.ok(&["compare", "run", "--csv", "--sort", "sae"]);
    let lines: Vec<&str> = csv.lines().collect();
    assert!(lines.len() == 4 && lines[0].starts_with("sae,") && lines[0].contains(",frac_alive"), "{csv}");
    assert!(lines.iter().all(|line| line.split(',').count() == lines[0].split(',').count()), "{csv}");

    let said = desk.refused(&["compare", "run", "--sort", "frac_alife"]);
    assert!(said.contains("did you mean `frac_alive`?") && said.contains("sort by one of: "), "{said}");
    assert!(desk.refused(&["compare", "nowhere"]).contains("nowhere does not exist"));
    fs::write(desk.path("run/standard/eval.json"), "{\"l0\":").unwrap();
    let said = desk.refused(&["compare", "run"]);
    assert!(said.contains("run/standard/eval.json: not JSON") && said.contains("--save"), "{said}");
    desk.ok(&["eval", "run/standard", "--save"]);
    desk.ok(&["compare", "run"]);
}

#[test]
fn eval_shows_valid_saes_when_others_are_damaged() {
    let desk = Desk::with_config(&tensor_file_config(20, TWO_SAES));
    desk.ok(&["train", "config.yaml", "--output-dir", "runs/a"]);
    desk.ok(&["train", "config.yaml", "--output-dir", "runs/b", "--set", "seed=7"]);
    fs::write(desk.path("runs/a/top_k/ae.safetensors"), "").unwrap();
    let run = desk.run(&["eval", "runs"]);
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains("runs/a/top_k/ae.safetensors"), "{}", run.stderr);
    assert!(
        run.stdout.contains("a/standard") && run.stdout.contains("b/top_k") && !run.stdout.contains("a/top_k"),
        "{}",
        run.stdout
    );
}

#[test]
fn comparing_figures_of_different_data_gives_a_warning() {
    let desk = Desk::with_config(&tensor_file_config(20, TWO_SAES));
    desk.ok(&["train", "config.yaml", "--output-dir", "a"]);
    desk.ok(&["train", "config.yaml", "--output-dir", "b", "--set", "metrics[0].n_batches=3"]);
    let run = desk.run(&["compare", "a", "b"]);
    assert!(run.stderr.contains("were evaluated on different data"), "{}", run.stderr);
    assert!(!desk.run(&["compare", "a"]).stderr.contains("different data"));
    // The command suggested for missing figures works as printed.
    fs::remove_file(desk.path("a/top_k/eval.json")).unwrap();
    let run = desk.run(&["compare", "a"]);
    let command = run.stderr.split("to create one: ").nth(1).unwrap_or_else(|| panic!("{}", run.stderr));
    in_a_shell(&desk, command.trim());
    assert!(desk.json("a/top_k/eval.json")["l0"].is_number());
    assert!(!desk.run(&["compare", "a"]).stderr.contains("eval.json"));
}

/// Runs a printed command in a shell; it must succeed.
fn in_a_shell(desk: &Desk, command: &str) {
    let of_ours = desk.program();
    let mut shell = std::process::Command::new("sh");
    shell.current_dir(desk.dir.path()).args(["-c", command]);
    for (name, value) in of_ours.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    let run = Run::of(shell.output().unwrap());
    assert_eq!(run.code, 0, "{command}\n{}\n{}", run.stdout, run.stderr);
}

#[test]
fn commands_printed_after_a_run_work() {
    let desk = Desk::with_config(ON_A_MODEL);
    desk.write("files.yaml", &tensor_file_config(20, TWO_SAES).replace("output_dir: run", "output_dir: 'a run'"));
    for (config, commands) in
        [("config.yaml", ["encode", "export", "eval"]), ("files.yaml", ["export", "eval", "compare"])]
    {
        let said = desk.ok(&["train", config]);
        for file in ["config.yaml", "metrics.jsonl", "ae.safetensors", "eval.json"] {
            assert!(said.contains(file), "{file}: {said}");
        }
        let next = commands_after(&said, "next:");
        let named: Vec<&str> = next
            .iter()
            .map(|command| commands.into_iter().find(|name| command.contains(&format!(" {name} "))).unwrap())
            .collect();
        assert_eq!(named, commands, "{said}");
        next.iter().for_each(|command| in_a_shell(&desk, command));
    }
    // Also for a finished run.
    desk.ok(&["train", "files.yaml", "--resume"]);
}

#[test]
fn doctor_reports_a_healthy_machine() {
    let desk = Desk::new();
    let mut program = desk.program();
    program
        .args(["doctor", "--json"])
        .env("HF_TOKEN", "hf_nobodys_business")
        .env("HF_ENDPOINT", "https://me:pass@mirror.org");
    let run = Run::of(program.output().unwrap());
    assert_eq!(run.code, 0, "{}\n{}", run.stdout, run.stderr);
    let report = parsed(&run.stdout);
    assert_eq!(report["healthy"], true);
    assert_eq!(report["hub"]["token"], true);
    assert_eq!(report["hub"]["endpoint"], "https://mirror.org");
    assert!(!run.stdout.contains("nobodys_business") && !run.stdout.contains("me:pass"), "{}", run.stdout);
    assert_eq!(report["dictlearn"]["version"], env!("CARGO_PKG_VERSION"));
    assert!(report["libtorch"]["version"].as_str().unwrap().starts_with("2.11"), "{report}");
    assert!(report["libtorch"]["path"].as_str().unwrap().contains("libtorch"), "{report}");
    for kind in ["float32", "bfloat16"] {
        let own = report["products"].as_array().unwrap().iter().find(|product| product["type"] == kind).unwrap();
        assert!(own["gflops"].as_f64().unwrap() > 0.0);
    }
    let trainers: Vec<_> = report["training"].as_array().unwrap().iter().map(|check| &check["trainer"]).collect();
    assert!(trainers.len() >= 9, "{trainers:?}");
    assert!(report["threads"]["libtorch"].as_u64().unwrap() > 0 && report["memory"]["free"].as_u64().unwrap() > 0);
    assert!(["float32", "bfloat16"].contains(&report["precision"]["auto"].as_str().unwrap()));
}

#[test]
fn doctor_names_the_problem_and_its_fix() {
    let desk = Desk::new();
    desk.write("file", "");
    let file = desk.path("file/hf").display().to_string();
    let broken = [
        ("HF_ENDPOINT", "mirror.org", "HF_ENDPOINT is `mirror.org`"),
        ("HF_HOME", file.as_str(), "is not writable"),
        ("TMPDIR", file.as_str(), "no temporary file can be created"),
    ];
    for (name, value, what) in broken {
        let mut program = desk.program();
        program.arg("doctor").env_remove("HF_HUB_OFFLINE").env(name, value);
        let run = Run::of(program.output().unwrap());
        assert_eq!(run.code, 1, "{name}: {}\n{}", run.stdout, run.stderr);
        let problem = run.stdout.split("\nerror: ").nth(1).unwrap_or_else(|| panic!("{}", run.stdout));
        assert!(problem.contains(what) && problem.contains("\nhelp: "), "{problem}");
    }
}

#[test]
fn a_closed_stderr_does_not_change_the_exit_status() {
    let desk = Desk::with_config(&tensor_file_config(20, TWO_SAES));
    let code = |config: &str| {
        let mut program = desk.program();
        let mut child = program.args(["train", config]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stderr.take());
        child.wait().unwrap().code()
    };
    assert_eq!(code("config.yaml"), Some(0));
    assert!(desk.path("run/top_k/eval.json").exists());
    assert_eq!(code("nowhere.yaml"), Some(2));
}
