//! A run killed at any moment and resumed ends on the same bytes; other failures are survived or reported.

use std::fs;
use std::path::{Path, PathBuf};

use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use dictlearn as _;
use dictlearn_core::files::tensors;
use dictlearn_core::prelude::*;

use crate::common::{Desk, Disk, Run, fixture, tensor_file_config};
use crate::hub_server::HubServer;

/// A small SAE that trains fast.
const TOP_K: &str = "saes: [{trainer: {type: top_k, warmup_steps: 2}, dictionary: {dict_size: 64, k: 4}}]\n";

/// Every trainer and modifier, with every kind of state: resampling, annealing, dead features, thresholds.
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

/// SAEs whose target differs from their input.
const TRANSCODERS: &str = "saes:\n\
    - {name: transcoder, dictionary: {type: transcoder, dict_size: 96}, \
       trainer: {type: standard, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9}}\n\
    - {name: skip, dictionary: {type: skip_transcoder, dict_size: 96, k: 6}, \
       trainer: {type: top_k, warmup_steps: 2, threshold_start_step: 4, dead_feature_threshold: 500}}\n\
    - {name: jump_relu, dictionary: {dict_size: 96}, \
       trainer: {type: jump_relu, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9}}\n";
/// SAEs on activations of several sources.
const CROSSCODERS: &str = "saes:\n\
    - {name: crosscoder, dictionary: {dict_size: 96}, \
       trainer: {type: crosscoder, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9}}\n\
    - {name: batch_top_k, dictionary: {dict_size: 96, k: 6}, \
       trainer: {type: batch_top_k_crosscoder, warmup_steps: 2, threshold_start_step: 4, dead_feature_threshold: 500}}\n\
    - {name: standard, dictionary: {dict_size: 96}, trainer: {type: standard, lr: 1e-3, warmup_steps: 2, sparsity_warmup_steps: 9}}\n";

/// The bundled model, with a buffer that is refilled every few steps.
fn model(more: &str) -> String {
    format!(
        "{{type: language_model, model: 'embedded:austen', ctx_len: 32, n_ctxs: 48, refresh_batch_size: 8, \
         out_batch_size: 192, {more}}}"
    )
}

/// Kills a run [`KILLS`] times, resumes it each time, and compares it with an undisturbed run.
fn killed_and_resumed(desk: &Desk, source: &str, saes: &str, more: &str) {
    desk.write(
        "config.yaml",
        &format!(
            "steps: 24\nlog_every: 1\ncheckpoint_every: 3\nsave_every: 10\nsave_steps: [0, 3, 9, 24]\nnormalize_activations: true\n{more}\
             source: {source}\n{saes}metrics: [{{type: reconstruction, n_batches: 2}}]\n"
        ),
    );
    let started = Instant::now();
    desk.ok(&["train", "config.yaml", "--output-dir", "whole"]);
    let whole = started.elapsed();
    let seed = source.bytes().map(u64::from).sum();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut kills = 0;
    while kills < KILLS {
        let mut child = start(desk, &["train", "config.yaml", "--output-dir", "killed", "--resume"]);
        // At any moment, also before the first step and during evaluation.
        let until = Instant::now() + whole.mul_f64(random.f64());
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
            // Starts again for the remaining kills.
            same(desk, "whole", "killed");
            fs::remove_dir_all(desk.path("killed")).unwrap();
        }
    }
    desk.ok(&["train", "config.yaml", "--output-dir", "killed", "--resume"]);
    same(desk, "whole", "killed");
}

/// Number of kills per run; nine sources make 63.
const KILLS: usize = 7;

/// Asserts that two runs wrote the same files, except checkpoints and config.yaml.
pub fn same(desk: &Desk, one: &str, other: &str) {
    let files = |run: &str| -> Vec<String> {
        let prefix = format!("{run}/");
        let own = desk.files().into_iter().filter_map(|file| Some(file.strip_prefix(&prefix)?.to_owned()));
        own.filter(|file| !file.starts_with("checkpoints/") && file != "config.yaml").collect()
    };
    assert_eq!(files(one), files(other));
    for file in files(one) {
        let read = |run: &str| fs::read(desk.path(&format!("{run}/{file}"))).unwrap();
        assert!(read(one) == read(other), "{one}/{file} and {other}/{file} differ");
    }
}

pub fn start(desk: &Desk, args: &[&str]) -> Child {
    use std::os::unix::process::CommandExt;
    let mut program = desk.program();
    program.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: `signal` is async-signal-safe, so it may be called between fork and exec.
    unsafe {
        program.pre_exec(|| {
            // Under `nohup` the tests ignore SIGHUP, and their children would inherit that.
            for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        });
    }
    program.spawn().unwrap()
}

/// Writes a text and tokens for sources that read files.
fn prepare(desk: &Desk) {
    desk.write("documents.jsonl", &documents("documents.jsonl", 400));
    tch::manual_seed(3);
    let ids = Tensor::randint(500, [60, 20], (Kind::Int64, Device::Cpu));
    tensors::write(&desk.path("tokens.safetensors"), &[("input_ids", ids)]).unwrap();
}

fn documents(of: &str, count: usize) -> String {
    let document = |n| format!("Document {n} of {of} says that {n} is a number, and {} another one.", n * 7);
    (0..count).map(|n| json_line(&document(n))).collect()
}

fn json_line(text: &str) -> String {
    serde_json::json!({"text": text}).to_string() + "\n"
}

macro_rules! killed_and_resumed {
    ($($name:ident: $source:expr_2021, $saes:expr_2021, $more:expr_2021;)*) => {
        $(
            #[test]
            fn $name() {
                let desk = Desk::new();
                prepare(&desk);
                killed_and_resumed(&desk, &$source, $saes, $more);
            }
        )*
    };
}

killed_and_resumed! {
    a_killed_run_resumes_with_a_model_buffer:
        model("submodule: gpt_neox.layers.2, pack: true, text: {type: embedded, name: austen}"), SAES, "";
    a_killed_run_resumes_with_a_replayed_buffer:
        model("submodule: gpt_neox.layers.1, remove_bos: true, max_activation_norm_multiple: 2, \
               text: {type: text_files, path: documents.jsonl}"), SAES, "checkpoint_buffer: replay\n";
    a_killed_run_resumes_with_an_unshuffled_model:
        model("submodule: [gpt_neox.layers.0, gpt_neox.layers.1.mlp], io: in_to_out, shuffle: false, \
               text: {type: mix, streams: [{weight: 2, text: {type: text_files, path: documents.jsonl}}, \
                                           {weight: 1, text: {type: embedded, name: austen}}]}"), TRANSCODERS, "";
    a_killed_run_resumes_with_token_ids:
        model("submodule: gpt_neox.layers.3, text: {type: token_file, path: tokens.safetensors}"), SAES,
        "checkpoint_buffer: replay\n";
    a_killed_run_resumes_with_tensor_files:
        format!("{{type: tensor_file, path: {:?}, batch_size: 192}}", fixture("trainers/batches.safetensors")), SAES, "";
    a_killed_run_resumes_with_synthetic_activations:
        "{type: synthetic, activation_dim: 24, n_features: 64, n_active: 4, batch_size: 192}", SAES, "";
    a_killed_run_resumes_with_joined_sources:
        format!("{{type: joined, sources: {{a: {}, b: {}}}}}",
            model("submodule: gpt_neox.layers.1, pack: true, text: {type: embedded, name: austen}"),
            model("submodule: gpt_neox.layers.2, pack: true, text: {type: embedded, name: austen}")), CROSSCODERS,
        "checkpoint_buffer: replay\n";
}

#[test]
fn a_killed_run_resumes_with_an_activation_cache() {
    let desk = Desk::new();
    let source = model("submodule: gpt_neox.layers.2, pack: true, text: {type: embedded, name: austen}");
    desk.write("model.yaml", &format!("source: {source}\n"));
    desk.ok(&["activations", "model.yaml", "--out", "cache", "--limit", "3000"]);
    let cache = desk.path("cache");
    let source = format!("{{type: activation_cache, path: {cache:?}, batch_size: 192, buffer_size: 1024}}");
    killed_and_resumed(&desk, &source, SAES, "");
}

/// A Hub with a dataset.
fn hub_with_texts() -> HubServer {
    let server = HubServer::start();
    let head = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: '*.jsonl'}\n---\n";
    server.put("datasets/someone/texts", "README.md", head);
    for part in ["a.jsonl", "b.jsonl"] {
        server.put("datasets/someone/texts", part, documents(part, 200));
    }
    server
}

#[test]
fn a_killed_run_resumes_with_a_hub_dataset() {
    let server = hub_with_texts();
    let source = model("submodule: gpt_neox.layers.1, text: {type: hub_dataset, repo: someone/texts}");
    killed_and_resumed(&Desk::with_hub(&server.endpoint), &source, SAES, "");
}

#[test]
fn a_resumed_run_keeps_its_hub_commits() {
    let server = hub_with_texts();
    let austen = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins/embedded-austen/model");
    server.put_folder("someone/austen", &austen);
    let desk = Desk::with_hub(&server.endpoint);
    desk.write(
        "config.yaml",
        &format!(
            "steps: 20\nlog_every: 1\noutput_dir: run\nsource: {{type: language_model, model: someone/austen, submodule: gpt_neox.layers.1, ctx_len: 32, \
             n_ctxs: 48, refresh_batch_size: 8, out_batch_size: 192, text: {{type: hub_dataset, repo: someone/texts}}}}\n{TOP_K}"
        ),
    );
    desk.ok(&["train", "config.yaml", "--output-dir", "whole"]);
    desk.ok(&["train", "config.yaml", "--set", "stop_after=4"]);
    let model = fs::read(fixture("models/gpt2/model.safetensors")).unwrap();
    server.replace("someone/austen", "model.safetensors", model);
    server.replace("datasets/someone/texts", "a.jsonl", documents("a new one", 100));
    // Twice, because a resumed run's checkpoint must hold the commits too.
    desk.ok(&["train", "config.yaml", "--resume", "--set", "stop_after=8"]);
    desk.ok(&["train", "config.yaml", "--resume"]);
    same(&desk, "whole", "run");
    let cache = desk.path("hf/hub/models--someone--austen");
    assert_eq!(fs::read_dir(cache.join("snapshots")).unwrap().count(), 1, "the new model must not be downloaded");
    // A new run reads the new commits.
    let said = desk.refused(&["train", "config.yaml", "--output-dir", "new"]);
    assert!(said.contains("has neither `gpt_neox.embed_in.weight` nor `embed_out.weight`"), "{said}");
}

/// Waits for a condition, at most two minutes.
pub fn wait_for(what: &str, mut there: impl FnMut() -> bool) {
    let started = Instant::now();
    while !there() {
        assert!(started.elapsed() < Duration::from_secs(120), "timed out waiting for {what}");
        sleep(Duration::from_millis(2));
    }
}

pub fn send(signal: &str, child: &Child) {
    let sent = std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

fn logged_steps(desk: &Desk) -> usize {
    fs::read_to_string(desk.path("run/metrics.jsonl")).map_or(0, |log| log.lines().count())
}

/// The run's checkpoints, newest first.
fn checkpoints(desk: &Desk) -> Vec<PathBuf> {
    let step = |path: &Path| -> Option<u64> { path.file_stem()?.to_str()?.strip_prefix("step_")?.parse().ok() };
    let entries = fs::read_dir(desk.path("run/checkpoints")).into_iter().flatten();
    let mut found: Vec<PathBuf> =
        entries.map(|entry| entry.unwrap().path()).filter(|path| step(path).is_some()).collect();
    found.sort_by_key(|path| std::cmp::Reverse(step(path)));
    found
}

#[test]
fn a_damaged_checkpoint_is_skipped() {
    let desk = Desk::with_config(&tensor_file_config(40, &format!("checkpoint_every: 10\n{TOP_K}")));
    desk.ok(&["train", "config.yaml", "--output-dir", "whole"]);
    let stopped = || {
        let _ = fs::remove_dir_all(desk.path("run"));
        desk.ok(&["train", "config.yaml", "--set", "stop_after=15"]);
        let found = checkpoints(&desk);
        assert_eq!(found.len(), 2, "{found:?}");
        found
    };
    for damage in ["a bit", "cut", "empty", "another file"] {
        let found = stopped();
        let mut bytes = fs::read(&found[0]).unwrap();
        match damage {
            // Within a tensor's data, where only a checksum shows it.
            "a bit" => *bytes.iter_mut().nth_back(5000).unwrap() ^= 1,
            "cut" => bytes.truncate(bytes.len() - 1),
            "empty" => bytes.clear(),
            _ => bytes = fs::read(desk.path("whole/top_k/ae.safetensors")).unwrap(),
        }
        fs::write(&found[0], bytes).unwrap();
        let run = desk.run(&["train", "config.yaml", "--resume"]);
        assert_eq!(run.code, 0, "{damage}: {}", run.stderr);
        assert!(run.stderr.contains("step_15.safetensors"), "{damage}: {}", run.stderr);
        assert!(run.stderr.contains("trying the checkpoint before it"), "{damage}: {}", run.stderr);
        assert!(run.stderr.contains("resuming at step 1"), "{damage}: {}", run.stderr);
        same(&desk, "whole", "run");
        assert!(!found[0].exists(), "the damaged checkpoint must be deleted");
    }
    // A checkpoint named for another step, and a pipe.
    let found = stopped();
    fs::rename(&found[0], desk.path("run/checkpoints/step_39.safetensors")).unwrap();
    let pipe = std::process::Command::new("mkfifo").arg(desk.path("run/checkpoints/step_38.safetensors")).status();
    assert!(pipe.unwrap().success());
    let run = desk.run(&["train", "config.yaml", "--resume"]);
    assert!(run.code == 0 && run.stderr.contains("step_39.safetensors is the checkpoint of step 15"), "{}", run.stderr);
    same(&desk, "whole", "run");
    // Without a valid checkpoint the run does not silently restart.
    for path in stopped() {
        fs::write(path, "nothing").unwrap();
    }
    let said = desk.refused(&["train", "config.yaml", "--resume"]);
    assert!(said.contains("no checkpoint of") && said.contains("can be read"), "{said}");
}

#[test]
fn failed_writes_are_retried() {
    let desk = Desk::new();
    let two = "saes: [{name: a, trainer: {type: top_k, warmup_steps: 2}, dictionary: {dict_size: 64, k: 4}}, \
               {name: b, trainer: {type: standard, warmup_steps: 2}, dictionary: {dict_size: 64}}]\n";
    let config = format!("checkpoint_every: 20\nsave_every: 500\n{two}");
    desk.write("config.yaml", &tensor_file_config(2500, &config));
    desk.ok(&["train", "config.yaml", "--output-dir", "whole"]);
    let child = start(&desk, &["train", "config.yaml"]);
    wait_for("a checkpoint", || !checkpoints(&desk).is_empty());
    // The folder disappears, as with an unmounted file system, and a file takes its place.
    fs::rename(desk.path("run"), desk.path("away")).unwrap();
    fs::write(desk.path("run"), "").unwrap();
    sleep(Duration::from_millis(700));
    fs::remove_file(desk.path("run")).unwrap();
    let at = desk.log("away/metrics.jsonl").last().unwrap()["step"].as_u64().unwrap();
    assert!(at > 0 && at < 2490, "step {at}");
    fs::rename(desk.path("away"), desk.path("run")).unwrap();
    let run = Run::of(child.wait_with_output().unwrap());
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(
        run.stderr.contains("warning: cannot create") && run.stderr.contains("training continues"),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains("writing succeeds again"), "{}", run.stderr);
    same(&desk, "whole", "run");
}

#[test]
fn a_small_disk_still_gets_the_weights() {
    let desk = Desk::new();
    let sae = "saes: [{trainer: {type: top_k, warmup_steps: 2}, dictionary: {dict_size: 2048, k: 4}}]\n";
    desk.write("config.yaml", &tensor_file_config(60, &format!("checkpoint_every: 10\n{sae}")));
    desk.ok(&["train", "config.yaml"]);
    let checkpoint = checkpoints(&desk)[0].metadata().unwrap().len() / 1000;
    let at = desk.path("disk");
    // Room for two checkpoints and the SAE, which is two thirds of one, but not for three checkpoints.
    let Some(disk) = Disk::mount(&at, checkpoint * 285 / 100) else {
        assert!(std::env::var_os("CI").is_none(), "cannot mount a tmpfs, which needs root");
        println!("skipped: cannot mount a tmpfs");
        return;
    };
    let run = desk.run(&["train", "config.yaml", "--output-dir", "disk/run"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let mut warnings = run.stderr.lines().filter(|line| line.starts_with("warning"));
    assert!(warnings.all(|line| line.contains("the metrics are computed on")), "{}", run.stderr);
    same(&desk, "run", "disk/run");
    drop(disk);

    // Room for the SAE only.
    let _disk = Disk::mount(&at, checkpoint * 85 / 100).unwrap();
    let child = start(&desk, &["train", "config.yaml", "--output-dir", "disk/run"]);
    wait_for("weights", || desk.path("disk/run/top_k/ae.safetensors").exists());
    send("-TERM", &child);
    let run = Run::of(child.wait_with_output().unwrap());
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.contains("No space left") && run.stderr.contains("step_60"), "{}", run.stderr);
    for file in ["metrics.jsonl", "top_k/ae.safetensors"] {
        let read = |dir: &str| fs::read(desk.path(dir).join(file)).unwrap();
        assert!(read("run") == read("disk/run"), "{file}");
    }
}

#[test]
fn a_lost_log_or_config_is_reported() {
    let desk = Desk::with_config(&tensor_file_config(20, &format!("checkpoint_every: 10\n{TOP_K}")));
    for (lost, said) in [("", "has no rows of earlier steps"), ("gone\n", "has lines that are not JSON")] {
        let _ = fs::remove_dir_all(desk.path("run"));
        desk.ok(&["train", "config.yaml", "--set", "stop_after=15"]);
        desk.write("run/metrics.jsonl", lost);
        let run = desk.run(&["train", "config.yaml", "--resume"]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(run.stderr.contains(said), "{}", run.stderr);
    }
    for (lost, why) in [("", "it has no keys"), ("saes: [", " at line ")] {
        desk.write("run/config.yaml", lost);
        let said = desk.refused(&["train", "config.yaml", "--resume"]);
        assert!(said.contains(why) && said.contains("`--dry-run` prints it"), "{said}");
    }
    fs::remove_file(desk.path("run/config.yaml")).unwrap();
    let said = desk.refused(&["train", "config.yaml", "--resume"]);
    assert!(said.contains("run/config.yaml: No such file"), "{said}");
}

#[test]
fn a_signal_near_the_end_loses_no_progress() {
    let desk = Desk::new();
    let source = model("submodule: gpt_neox.layers.0, text: {type: embedded, name: austen}");
    let config = format!("steps: 5\noutput_dir: run\nsource: {source}\neval_source: {{shuffle: false}}\n{TOP_K}");
    desk.write("config.yaml", &format!("{config}metrics: [{{type: reconstruction, n_batches: 10}}]\n"));
    desk.ok(&["train", "config.yaml", "--output-dir", "whole"]);
    for (awaited, pause) in [("checkpoints/step_5", 0), ("top_k/ae.safetensors", 0), ("top_k/ae.safetensors", 100)] {
        let _ = fs::remove_dir_all(desk.path("run"));
        let child = start(&desk, &["train", "config.yaml", "--set", "metrics[0].n_batches=100_000"]);
        wait_for(awaited, || desk.files().iter().any(|file| file.starts_with(&format!("run/{awaited}"))));
        sleep(Duration::from_millis(pause));
        send("-TERM", &child);
        let run = Run::of(child.wait_with_output().unwrap());
        assert_eq!(run.code, 143, "{}", run.stderr);
        assert!(run.stderr.contains("saved"), "{}", run.stderr);
        desk.ok(&["train", "config.yaml", "--resume"]);
        same(&desk, "whole", "run");
    }
}

#[test]
fn a_finished_run_that_was_interrupted_has_nothing_left_to_do() {
    let desk = Desk::with_config(&tensor_file_config(3000, &format!("checkpoint_every: null\n{TOP_K}")));
    let child = start(&desk, &["train", "config.yaml"]);
    wait_for("a step", || logged_steps(&desk) > 5);
    send("-TERM", &child);
    assert_eq!(Run::of(child.wait_with_output().unwrap()).code, 143);
    desk.ok(&["train", "config.yaml", "--resume"]);
    let again = desk.run(&["train", "config.yaml", "--resume"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(again.stderr.contains("the run is finished already"), "{}", again.stderr);
}

#[test]
fn signals_stop_a_run_after_saving() {
    let desk = Desk::with_config(&tensor_file_config(100_000, &format!("checkpoint_every: null\n{TOP_K}")));
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        let child = start(&desk, &["train", "config.yaml", "--resume"]);
        let before = logged_steps(&desk);
        wait_for("a step", || logged_steps(&desk) > before + 5);
        let sent = Instant::now();
        send(signal, &child);
        let run = Run::of(child.wait_with_output().unwrap());
        assert_eq!(run.code, code, "{}", run.stderr);
        assert!(sent.elapsed() < Duration::from_secs(10));
        assert!(run.stderr.contains("everything is saved"), "{}", run.stderr);
        assert!(checkpoints(&desk).first().unwrap().metadata().unwrap().len() > 1000);
    }
    // A second signal stops the run at once; earlier checkpoints stay.
    let before = checkpoints(&desk);
    let child = start(&desk, &["train", "config.yaml", "--resume"]);
    let logged = logged_steps(&desk);
    wait_for("a step", || logged_steps(&desk) > logged);
    send("-TERM", &child);
    send("-TERM", &child);
    let run = Run::of(child.wait_with_output().unwrap());
    assert_eq!(run.code, 143, "{}", run.stderr);
    assert!(checkpoints(&desk).iter().any(|path| before.contains(path)));
    desk.ok(&["train", "config.yaml", "--resume", "--set", "stop_after=1"]);
    // Under `nohup` a run survives SIGHUP.
    let mut command = std::process::Command::new("nohup");
    let program = desk.program();
    command.arg(program.get_program()).args(["train", "config.yaml", "--resume"]).current_dir(desk.dir.path());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let logged = logged_steps(&desk);
    wait_for("a step", || logged_steps(&desk) > logged + 5);
    send("-HUP", &child);
    let logged = logged_steps(&desk);
    wait_for("a step", || logged_steps(&desk) > logged + 50);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_second_process_in_the_same_folder_is_refused() {
    let desk = Desk::with_config(&tensor_file_config(100_000, &format!("checkpoint_every: 10\n{TOP_K}")));
    let mut first = start(&desk, &["train", "config.yaml"]);
    wait_for("a checkpoint", || !checkpoints(&desk).is_empty());
    for args in [&["train", "config.yaml"][..], &["train", "config.yaml", "--resume"]] {
        let said = desk.refused(args);
        assert!(said.contains("another process is training in"), "{said}");
    }
    assert!(first.try_wait().unwrap().is_none(), "the first process stopped");
    first.kill().unwrap();
    first.wait().unwrap();
    // A killed process holds no lock.
    desk.ok(&["train", "config.yaml", "--resume", "--set", "stop_after=1"]);
}

#[test]
fn resume_can_start_continue_and_finish_a_run() {
    let desk = Desk::with_config(&tensor_file_config(30, &format!("metrics: [{{type: reconstruction}}]\n{TOP_K}")));
    fs::create_dir(desk.path("run")).unwrap();
    let first = desk.run(&["train", "config.yaml", "--resume"]);
    assert_eq!(first.code, 0, "{}", first.stderr);
    let before = desk.files();
    // A finished run is started again.
    let again = desk.run(&["train", "config.yaml", "--resume"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(again.stderr.contains("finished already"), "{}", again.stderr);
    assert_eq!((&again.stdout, desk.files()), (&first.stdout, before));
    // Changed metrics do not make another experiment.
    desk.write(
        "config.yaml",
        &tensor_file_config(30, &format!("metrics: [{{type: reconstruction, n_batches: 3}}]\n{TOP_K}")),
    );
    assert_ne!(desk.ok(&["train", "config.yaml", "--resume"]), first.stdout);
}

#[test]
fn a_run_can_be_extended_if_its_schedule_allows() {
    let desk = Desk::new();
    let config = |steps, decay: &str| {
        tensor_file_config(
            steps,
            &format!(
                "saes: [{{trainer: {{type: top_k, warmup_steps: 2, threshold_start_step: 3, dead_feature_threshold: 1e7{decay}}}, \
                 dictionary: {{dict_size: 64, k: 4}}}}]\n"
            ),
        )
    };
    desk.write("short.yaml", &config(20, ""));
    desk.write("long.yaml", &config(35, ""));
    desk.ok(&["train", "long.yaml", "--output-dir", "whole"]);
    desk.ok(&["train", "short.yaml"]);
    desk.ok(&["train", "long.yaml", "--resume"]);
    same(&desk, "whole", "run");
    let said = desk.refused(&["train", "short.yaml", "--resume"]);
    assert!(said.contains("`steps` is 20, but the run has taken 35 already"), "{said}");
    let said = desk.refused(&["train", "long.yaml", "--resume", "--set", "seed=1", "--set", "log_every=7"]);
    assert!(
        said.contains("the run was started with another config: `seed`: 42 -> 1") && !said.contains("log_every"),
        "{said}"
    );
    for (steps, file) in [(20, "short.yaml"), (35, "long.yaml")] {
        desk.write(file, &config(steps, ", decay_start: 10"));
    }
    desk.ok(&["train", "short.yaml", "--output-dir", "decays"]);
    let said = desk.refused(&["train", "long.yaml", "--output-dir", "decays", "--resume"]);
    assert!(said.contains("the schedule of SAE `top_k` depends on it"), "{said}");
    // The help names the way that works.
    let weights = desk.path("decays/top_k").display().to_string();
    assert!(said.contains("init_from: ") && said.contains("decays/top_k"), "{said}");
    let init = format!("saes[0].init_from={weights}");
    desk.ok(&["train", "long.yaml", "--output-dir", "longer", "--set", &init]);
}

#[test]
fn an_extended_run_keeps_its_original_defaults() {
    let desk = Desk::new();
    let sae = "saes: [{trainer: {type: batch_top_k}, dictionary: {dict_size: 64, k: 4}}]\n";
    desk.write("short.yaml", &tensor_file_config(20, sae));
    desk.write("long.yaml", &tensor_file_config(40, sae));
    desk.ok(&["train", "short.yaml"]);
    let trainer = |run: &str| {
        let config: serde_yaml::Value = serde_yaml::from_str(&desk.read(&format!("{run}/config.yaml"))).unwrap();
        config["saes"][0]["trainer"].clone()
    };
    let begun = trainer("run");
    assert_eq!(begun["warmup_steps"], serde_yaml::Value::from(2));
    let run = desk.run(&["train", "long.yaml", "--resume"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(!run.stderr.contains("adapted"), "{}", run.stderr);
    assert_eq!(trainer("run"), begun);
    // The saved config, with its defaults written out, gives the same run.
    desk.ok(&["train", "run/config.yaml", "--output-dir", "whole"]);
    same(&desk, "whole", "run");
}

#[test]
fn resuming_on_other_hardware_is_reported() {
    let desk = Desk::with_config(&tensor_file_config(30, TOP_K));
    desk.ok(&["train", "config.yaml", "--set", "stop_after=10"]);
    let threads = |count: &str| {
        let args = ["train", "config.yaml", "--resume", "--set", "device=cpu"];
        let run = desk.program().args(args).env("OMP_NUM_THREADS", count).output().unwrap();
        let run = Run::of(run);
        assert_eq!(run.code, 0, "{}", run.stderr);
        run.stderr
    };
    let said = threads("1");
    assert!(said.contains("resuming with another machine or version (threads ") && said.contains(" -> 1)"), "{said}");
    assert!(said.contains("will not be bit-identical"), "{said}");
}

#[test]
fn a_diverging_sae_stops_without_stopping_others() {
    let desk = Desk::new();
    let saes = "checkpoint_every: 5\nmetrics: [{type: reconstruction}]\nsaes:\n\
        - {name: wild, trainer: {type: standard, lr: 1e30, warmup_steps: 3, sparsity_warmup_steps: null}, \
           dictionary: {dict_size: 64}}\n\
        - {name: tame, trainer: {type: top_k, warmup_steps: 2}, dictionary: {dict_size: 64, k: 4}}\n";
    desk.write("config.yaml", &tensor_file_config(40, saes));
    let whole = desk.run(&["train", "config.yaml", "--output-dir", "whole"]);
    assert_eq!(whole.code, 2, "{}", whole.stderr);
    assert!(whole.stdout.contains("tame") && !whole.stdout.contains("wild"), "{}", whole.stdout);
    let said = "the loss of SAE `wild` is";
    assert!(whole.stderr.contains(&format!("warning: step 2: {said}")), "{}", whole.stderr);
    assert!(whole.stderr.contains(&format!("error: step 2: {said}")), "{}", whole.stderr);
    assert!(whole.stderr.contains("(term `"), "{}", whole.stderr);
    // Its weights from before that step are kept, but not as a trained SAE.
    assert!(desk.path("whole/wild/checkpoints/ae_2.safetensors").exists());
    assert!(!desk.path("whole/wild/ae.safetensors").exists() && desk.path("whole/tame/eval.json").exists());
    // The other SAE does not depend on it.
    desk.write(
        "alone.yaml",
        &tensor_file_config(40, &saes.replace("- {name: wild", "- {name: other").replace("1e30", "1e-3")),
    );
    desk.ok(&["train", "alone.yaml", "--output-dir", "alone"]);
    let weights = |run: &str| fs::read(desk.path(&format!("{run}/tame/ae.safetensors"))).unwrap();
    assert!(weights("whole") == weights("alone"));
    // In a resumed run it stays stopped.
    let parts = desk.run(&["train", "config.yaml", "--set", "stop_after=17"]);
    assert_eq!(parts.code, 2, "{}", parts.stderr);
    let resumed = desk.run(&["train", "config.yaml", "--resume"]);
    assert_eq!(resumed.code, 2, "{}", resumed.stderr);
    assert!(resumed.stderr.contains(&format!("error: step 2: {said}")), "{}", resumed.stderr);
    same(&desk, "whole", "run");
    // If every SAE diverges, nothing is left to train.
    let alone = saes
        .replace("- {name: tame, trainer: {type: top_k, warmup_steps: 2}, dictionary: {dict_size: 64, k: 4}}\n", "");
    desk.write("alone.yaml", &tensor_file_config(40, &alone));
    let said = desk.refused(&["train", "alone.yaml", "--output-dir", "none"]);
    assert!(said.contains("step 2: the loss of SAE `wild`") && !desk.path("none").exists(), "{said}");
}

#[test]
fn nonfinite_batches_are_skipped() {
    let desk = Desk::new();
    let x = tensors::TensorFile::open(&fixture("trainers/batches.safetensors")).unwrap().tensor("activations").unwrap();
    for row in [64 * 5 + 3, 64 * 9 + 60] {
        let _ = x.get(row).get(4).fill_(f64::INFINITY);
    }
    tensors::write(&desk.path("x.safetensors"), &[("activations", x)]).unwrap();
    let config = tensor_file_config(30, &format!("checkpoint_every: 4\n{TOP_K}"))
        .replace(&format!("{:?}", fixture("trainers/batches.safetensors")), "x.safetensors");
    desk.write("config.yaml", &config);
    let said = desk.refused(&["train", "config.yaml", "--output-dir", "refused"]);
    assert!(said.contains("step 5") && said.contains("x.safetensors: row 323 of tensor `activations`"), "{said}");
    assert!(said.contains("on_nonfinite: skip_batch"), "{said}");
    desk.write("config.yaml", &format!("on_nonfinite: skip_batch\n{config}"));
    let run = desk.run(&["train", "config.yaml", "--output-dir", "whole"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("step 5: the batch has values that are not finite"), "{}", run.stderr);
    assert!(run.stderr.contains("x.safetensors: row 323"), "{}", run.stderr);
    assert!(run.stderr.contains("2 batches were skipped"), "{}", run.stderr);
    let steps: Vec<u64> = desk.log("whole/metrics.jsonl").iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (0..30).filter(|step| ![5, 9].contains(step)).collect::<Vec<_>>());
    desk.ok(&["train", "config.yaml", "--set", "stop_after=7"]);
    desk.ok(&["train", "config.yaml", "--resume"]);
    same(&desk, "whole", "run");
    // Skipping ends after 100 batches in a row.
    let saes = "saes: [{trainer: {type: standard, lr: 1e30, warmup_steps: 0, sparsity_warmup_steps: null}, \
                on_nonfinite: skip_batch}]\n";
    desk.write("config.yaml", &tensor_file_config(300, saes));
    let said = desk.refused(&["train", "config.yaml", "--output-dir", "wild"]);
    assert!(said.contains("as in the 99 before it"), "{said}");
}

#[test]
fn truncation_during_read_is_an_error() {
    let desk = Desk::new();
    prepare(&desk);
    let source = model("submodule: gpt_neox.layers.1, text: {type: text_files, path: documents.jsonl}");
    let config = format!("steps: 60\nlog_every: 1\noutput_dir: run\ncheckpoint_every: 5\nsource: {source}\n{TOP_K}");
    desk.write("config.yaml", &config);
    desk.ok(&["train", "config.yaml", "--output-dir", "whole"]);
    let child = start(&desk, &["train", "config.yaml"]);
    wait_for("a checkpoint", || !checkpoints(&desk).is_empty());
    let documents = desk.read("documents.jsonl");
    fs::OpenOptions::new().write(true).open(desk.path("documents.jsonl")).unwrap().set_len(900).unwrap();
    let run = Run::of(child.wait_with_output().unwrap());
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains("documents.jsonl was truncated while being read: it has 900 bytes"), "{}", run.stderr);
    let said = desk.refused(&["train", "config.yaml", "--resume"]);
    assert!(said.contains("the text has changed since the run started") && said.contains("900 bytes"), "{said}");
    desk.write("documents.jsonl", &documents);
    desk.ok(&["train", "config.yaml", "--resume"]);
    same(&desk, "whole", "run");
}

#[test]
fn a_checkpoint_holds_the_buffer_as_activations_or_tokens() {
    let desk = Desk::new();
    let source = model("submodule: gpt_neox.layers.2, pack: true, text: {type: embedded, name: austen}");
    desk.write("config.yaml", &format!("steps: 24\nlog_every: 1\noutput_dir: run\nsource: {source}\n{TOP_K}"));
    desk.ok(&["train", "config.yaml", "--output-dir", "whole"]);
    let half = |kept: &str| {
        let _ = fs::remove_dir_all(desk.path("run"));
        let kept = format!("checkpoint_buffer={kept}");
        desk.ok(&["train", "config.yaml", "--set", &kept, "--set", "stop_after=12"]);
        checkpoints(&desk)[0].metadata().unwrap().len()
    };
    let resume = |kept: &str| {
        let kept = format!("checkpoint_buffer={kept}");
        let run = desk.run(&["train", "config.yaml", "--resume", "--set", &kept]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        same(&desk, "whole", "run");
        run.stderr
    };
    let replays = "running the model again to restore the buffer";
    // An activation has 192 values. The checkpoint's own content counts, not the new setting.
    let replayed = half("replay");
    assert!(resume("contents").contains(replays));
    let whole = half("contents");
    assert!(!resume("replay").contains(replays));
    assert!(whole > 500_000 && replayed < whole / 3, "{whole} and {replayed} bytes");
}
