//! Golden runs: the program reproduces the reference's results.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use dictlearn_core::files::from_yaml;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::inventory;
use dictlearn_core::machine::device::Precision;
use dictlearn_core::registry::{Component, ComponentKind, components};
use dictlearn_core::sae::{SavedClass, saved};
use dictlearn_core::train::TaggedTrainer;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::common::{Desk, fixture, folders, read_json, tensor_file_config_of};
use crate::python::Library;

fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    TensorFile::open(path).unwrap().tensors().unwrap()
}

/// The config name of the trainer that has this class in the reference.
fn trainer_name(class: &str) -> &'static str {
    let of = |component: &Component| from_yaml::<Box<dyn TaggedTrainer>>(component.example).unwrap().class();
    let found = components(ComponentKind::Trainer).into_iter().find(|component| of(component) == class);
    found.unwrap_or_else(|| panic!("no trainer has the reference's class {class}")).name
}

fn dictionary_name(class: &str) -> &'static str {
    let found = inventory::iter::<SavedClass>.into_iter().find(|saved| saved.class == class);
    found.unwrap_or_else(|| panic!("no dictionary has the reference's class {class}")).name
}

/// Asserts that every tensor of `run/sae` is the reference's final one, up to a relative tolerance.
fn same_weights(desk: &Desk, reference: &Path, tolerance: f64) {
    let own = tensors(&desk.path("run/sae/ae.safetensors"));
    let theirs = tensors(&reference.join("final.safetensors"));
    assert_eq!(own.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    for (name, theirs) in &theirs {
        let own = &own[name];
        assert_eq!((own.size(), own.kind()), (theirs.size(), theirs.kind()), "{name}");
        let (own, theirs) = (own.to_kind(Kind::Double), theirs.to_kind(Kind::Double));
        let difference = (own - &theirs).norm().double_value(&[]) / theirs.norm().double_value(&[]).max(1e-12);
        eprintln!("{}: {name} differs by {difference:.1e}", reference.display());
        assert!(difference < tolerance, "{}: {name} differs by {difference:e}", reference.display());
    }
}

/// A recorded run of the reference: settings and results.
struct Recorded {
    dir: PathBuf,
    batches: PathBuf,
    settings: Value,
}

impl Recorded {
    fn open(dir: PathBuf, batches: PathBuf) -> Self {
        let settings = read_json(&dir.join("case.json"));
        Recorded { dir, batches, settings }
    }

    fn method(&self) -> &'static str {
        trainer_name(self.settings["trainer"].as_str().unwrap())
    }

    /// Trains with the recorded settings.
    fn repeat(&self) -> Desk {
        let desk = Desk::new();
        let dictionary = dictionary_name(self.settings["dict_class"].as_str().unwrap());
        // The constructor's arguments are our trainer's fields, except those that belong elsewhere.
        let elsewhere = ["steps", "activation_dim", "dict_size", "dict_class", "layer", "lm_name", "device", "seed"];
        let on_dictionary = ["k", "group_fractions"];
        let fields = |on_the_dictionary: bool| -> String {
            let all = ["args", "overrides"].into_iter().flat_map(|part| self.settings[part].as_object().unwrap());
            all.filter(|(name, _)| !elsewhere.contains(&name.as_str()))
                .filter(|(name, _)| on_dictionary.contains(&name.as_str()) == on_the_dictionary)
                .map(|(name, value)| format!(", {name}: {value}"))
                .collect()
        };
        let (dictionary_fields, trainer_fields) = (fields(true), fields(false));
        let args = &self.settings["args"];
        let more = format!(
            "seed: {}\ncheckpoint_every: null\nsave_every: 1\nsaes:\n- name: sae\n  init_from: {:?}\n  \
             dictionary: {{type: {dictionary}, dict_size: {}{dictionary_fields}}}\n  \
             trainer: {{type: {}{trainer_fields}}}\n\
             loggers: [{{type: jsonl}}]\n",
            args["seed"],
            self.dir.join("init.safetensors"),
            args["dict_size"],
            self.method(),
        );
        let count = |value: &Value| value.as_u64().unwrap();
        let config =
            tensor_file_config_of(&self.batches, count(&self.settings["batch_size"]), count(&args["steps"]), &more);
        desk.write("config.yaml", &config);
        desk.ok(&["train", "config.yaml"]);
        desk
    }

    /// Compares each step's figures with the reference's: logged values, the next step's learning rate, and the error
    /// and L0 of the batch under the updated weights. Every step must have at least one figure.
    fn same_log(&self, desk: &Desk) {
        let (log, reference) = (desk.log("run/metrics.jsonl"), read_json(&self.dir.join("log.json")));
        let reference = reference.as_array().unwrap();
        assert_eq!(log.len(), reference.len());
        let mut dictionary = saved::read(&desk.path("run/sae"), Device::Cpu, Precision::Float32).unwrap().dictionary;
        let batches = tensors(&self.batches).remove("activations").unwrap();
        let batches = batches.split(self.settings["batch_size"].as_i64().unwrap(), 0);
        for (step, (own, theirs)) in log.iter().zip(reference).enumerate() {
            assert_eq!(own["step"], theirs["step"]);
            let weights = desk.path(&format!("run/sae/checkpoints/ae_{}.safetensors", step + 1));
            dictionary.load(&tensors(&weights), &weights).unwrap();
            let (x_hat, features) = tch::no_grad(|| dictionary.reconstruct(&batches[step]));
            let mean_of_sums = |x: Tensor| x.sum(Kind::Double).double_value(&[]) / batches[step].size()[0] as f64;
            let mut compared = 0;
            for (name, theirs) in theirs.as_object().unwrap() {
                let (Some(theirs), false) = (theirs.as_f64(), name == "step") else { continue };
                let own = match name.as_str() {
                    "mse_after" => mean_of_sums((&batches[step] - &x_hat).square()),
                    "l0_after" => mean_of_sums(features.not_equal(0.0)),
                    // The last one belongs to a step after the run's end.
                    "lr_next" if step + 1 == log.len() => continue,
                    "lr_next" => log[step + 1]["lr"].as_f64().unwrap(),
                    logged => {
                        own[logged].as_f64().unwrap_or_else(|| panic!("{:?}: step {step} logs no {name}", self.dir))
                    }
                };
                // One feature at its threshold changes L0, and only L0, by more than rounding does.
                let tolerance = if name.contains("l0") { 1e-3 } else { 1e-4 };
                assert!(
                    (own - theirs).abs() <= tolerance * theirs.abs() + 1e-9,
                    "{:?}: step {step}: {name}: {own} {theirs}",
                    self.dir
                );
                compared += 1;
            }
            assert!(compared > 0, "{:?}: step {step}: no figure was recorded", self.dir);
        }
    }

    /// Asserts that config.json describes the trainer as the reference's does.
    fn same_config(&self, desk: &Desk) {
        let (own, theirs) = (desk.json("run/sae/config.json"), read_json(&self.dir.join("config.json")));
        for (name, value) in theirs["trainer"].as_object().unwrap() {
            // The reference's April update writes `AutoEncoder` for every class.
            let wrong = name == "dict_class" && self.method() == "standard_april_update";
            if name == "device" {
                // The device depends on the tester's machine.
                let own = own["trainer"][name].as_str().unwrap();
                assert!(own == "cpu" || own.starts_with("cuda:"), "{own}");
            } else if !["layer", "lm_name", "wandb_name"].contains(&name.as_str()) && !wrong {
                let own = &own["trainer"][name];
                let same = match (own.as_f64(), value.as_f64()) {
                    // Annealed values are only as exact as the losses that drive them.
                    (Some(own), Some(theirs)) => (own - theirs).abs() <= 1e-5 * theirs.abs(),
                    _ => own == value,
                };
                assert!(same, "{:?}: config.json: {name}: {own}, the reference has {value}", self.dir);
            }
        }
    }
}

/// Repeats a golden run and compares weights, log and config.
fn golden_run(case: &str) {
    let run = Recorded::open(fixture("trainers").join(case), fixture("trainers/batches.safetensors"));
    let desk = run.repeat();
    same_weights(&desk, &run.dir, run.settings["tolerance"].as_f64().unwrap());
    run.same_log(&desk);
    run.same_config(&desk);
}

/// One test per case, named after it.
macro_rules! each_case {
    ($test:ident: $($case:ident)*) => {
        $(#[test]
        fn $case() {
            $test(stringify!($case));
        })*
    };
}

macro_rules! golden_runs {
    ($($case:ident)*) => {
        each_case! { golden_run: $($case)* }

        #[test]
        fn every_golden_run_is_tested() {
            let cases = std::fs::read_dir(fixture("trainers")).unwrap().map(|entry| entry.unwrap());
            for case in cases.filter(|entry| entry.path().is_dir()) {
                assert!([$(stringify!($case)),*].contains(&case.file_name().to_str().unwrap()), "{case:?}");
            }
        }
    };
}

golden_runs! {
    batch_top_k gated gated_anneal jump_relu matryoshka_batch_top_k p_anneal p_anneal_lp standard
    standard_april_update top_k top_k_anneal
}

/// Runs with random settings against the installed reference (see python.rs). `DICTLEARN_TEST_RUNS` is their number,
/// by default 40.
#[test]
#[cfg_attr(not(has_dictionary_learning), ignore = "needs DICTLEARN_TEST_PYTHON, a Python with dictionary_learning")]
fn random_runs_match_the_reference() {
    let reference = Library::installed("dictionary_learning");
    let desk = Desk::new();
    let count = std::env::var("DICTLEARN_TEST_RUNS").unwrap_or_else(|_| "40".to_owned());
    reference.run("trains.py", desk.dir.path(), &[&count]);
    let count: usize = count.parse().unwrap();
    assert!(count > 0, "DICTLEARN_TEST_RUNS is 0");
    let (mut compared, mut drawn, mut methods) = (0, BTreeSet::new(), BTreeSet::new());
    for dir in folders(desk.dir.path()) {
        let batches = dir.join("batches.safetensors");
        let run = Recorded::open(dir, batches);
        let noise = run.settings["noise"].as_f64().unwrap();
        println!("{} {}: noise {noise:.1e}", run.dir.display(), run.method());
        drawn.insert(run.method());
        // Runs that rounding alone changes by more show nothing: Adam scales gradients of pure rounding to full steps.
        if noise > 1e-5 {
            continue;
        }
        let desk = run.repeat();
        same_weights(&desk, &run.dir, 2e-4);
        run.same_log(&desk);
        run.same_config(&desk);
        compared += 1;
        methods.insert(run.method());
    }
    println!("{compared} of {count} runs could be compared");
    assert!(5 * compared >= 4 * count, "only {compared} of {count} runs could be compared");
    assert_eq!(methods, drawn, "no run of some trainers could be compared");
}

/// Repeats a run of the reference's early experiments: `standard` with the residual's norm as loss, modifiers, and
/// pairs of inputs and targets.
fn experimental_run(case: &str) {
    let desk = Desk::new();
    let dir = fixture("experimental").join(case);
    let settings = read_json(&dir.join("case.json"));
    let tensors = if settings["in_to_out"] == true { "tensor: in, target_tensor: out" } else { "tensor: in" };
    let penalty = &settings["sparsity_penalty"];
    let mut modifiers = Vec::new();
    if settings["entropy"] == true {
        modifiers.push(format!("{{type: entropy_penalty, weight: {penalty}, replace_sparsity: true}}"));
    }
    if let Some(threshold) = settings["ghost_threshold"].as_u64() {
        modifiers.push(format!("{{type: ghost_grads, threshold: {threshold}, unit: steps}}"));
    }
    let config = format!(
        "steps: {}\noutput_dir: run\nprecision: float32\nlog_every: 1\n\
         source: {{type: tensor_file, path: {:?}, {tensors}, batch_size: {}, shuffle: false}}\n\
         saes:\n- name: sae\n  init_from: {:?}\n  dictionary: {{type: auto_encoder, dict_size: 96}}\n  \
         trainer: {{type: standard, reconstruction: l2_norm, lr: {}, l1_penalty: {penalty}, warmup_steps: {}, \
         sparsity_warmup_steps: null}}\n  modifiers: [{}]\n",
        settings["steps"],
        fixture("experimental/pairs.safetensors"),
        settings["batch_size"],
        dir.join("init.safetensors"),
        settings["lr"],
        settings["warmup_steps"],
        modifiers.join(", ")
    );
    desk.write("config.yaml", &config);
    desk.ok(&["train", "config.yaml"]);

    let tolerance = settings["tolerance"].as_f64().unwrap();
    same_weights(&desk, &dir, tolerance);
    let (log, reference) = (desk.log("run/metrics.jsonl"), read_json(&dir.join("log.json")));
    let reference = reference.as_array().unwrap();
    assert_eq!(log.len(), reference.len());
    let has_ghosts = !settings["ghost_threshold"].is_null();
    for (own, theirs) in log.iter().zip(reference) {
        let (loss, expected) = (own["loss"].as_f64().unwrap(), theirs["loss"].as_f64().unwrap());
        assert!((loss - expected).abs() <= tolerance * expected, "{case}: step {}: {loss} {expected}", own["step"]);
        assert_eq!(own.get("ghosts"), theirs.get("ghosts").filter(|_| has_ghosts), "{case}: {own} {theirs}");
    }
    // Features must die in these runs, or ghost gradients would not be compared.
    assert!(!has_ghosts || log.iter().any(|row| row["ghosts"] != 0), "{case}");
}

each_case! { experimental_run: entropy ghost_grads mlp_stretcher mlp_stretcher_ghost_entropy }

/// Asserts equality to 1e-4. `frac_recovered` is a ratio of loss differences, so it adds their float32 rounding.
fn close(own: &Value, theirs: &Value, what: &str) {
    let loss = |name: &str| theirs.get(name).and_then(Value::as_f64);
    let apart = loss("loss_original").zip(loss("loss_zero")).map_or(f64::INFINITY, |(a, b)| (a - b).abs());
    for (name, theirs) in theirs.as_object().unwrap() {
        if ["batch_size", "n_batches"].contains(&name.as_str()) {
            continue;
        }
        let (own, theirs) = (own[name].as_f64().unwrap_or(f64::NAN), theirs.as_f64().unwrap());
        let rounding = if name == "frac_recovered" { 2e-6 / apart } else { 0.0 };
        assert!(
            (own - theirs).abs() <= 1e-4 * theirs.abs() + rounding,
            "{what}: {name}: {own}, the reference has {theirs}"
        );
    }
}

fn reference_eval(part: &str) -> serde_json::Map<String, Value> {
    read_json(&fixture("eval.json"))[part].as_object().unwrap().clone()
}

#[test]
fn evaluation_of_activations_matches_the_reference() {
    let desk = Desk::new();
    for case in ["standard", "top_k"] {
        let expected = &reference_eval("activations")[case];
        desk.golden_sae(case);
        desk.write(
            "eval.yaml",
            &format!(
                "source: {{type: tensor_file, path: {:?}, batch_size: {}, shuffle: false}}\nprecision: float32\n\
                 metrics: [{{type: reconstruction, n_batches: {}}}]\n",
                fixture("trainers/batches.safetensors"),
                expected["batch_size"],
                expected["n_batches"]
            ),
        );
        let own = desk.ok(&["eval", case, "--config", "eval.yaml", "--json"]);
        close(&serde_json::from_str(&own).unwrap(), expected, case);
    }
}

#[test]
fn evaluation_in_a_language_model_matches_the_reference() {
    let desk = Desk::new();
    let mut checked = 0;
    for (case, expected) in reference_eval("loss_recovered") {
        let parts: Vec<&str> = case.split(':').collect();
        let [model, submodule, io, sae] = parts[..] else { panic!("{case}") };
        if model != "gpt_neox" {
            continue;
        }
        desk.golden_sae(sae);
        let folder = fixture("models").join(model);
        desk.write(
            "eval.yaml",
            &format!(
                "source:\n  type: language_model\n  model: {folder:?}\n  submodule: {submodule}\n  io: {io}\n  \
                 text: {{type: token_file, path: {:?}}}\nprecision: float32\n\
                 metrics: [{{type: loss_recovered, n_batches: 1, batch_size: 3}}]\n",
                folder.join("io.safetensors")
            ),
        );
        let own = desk.ok(&["eval", sae, "--config", "eval.yaml", "--json"]);
        close(&serde_json::from_str(&own).unwrap(), &expected, &case);
        checked += 1;
    }
    assert_eq!(checked, 8);
}
