//! Measures one training step of every trainer, and the parts of a step: `cargo bench --bench step`.
//!
//! Activations of width 512, 8192 features, batches of 2048, k 64. `cargo bench --bench step -- top_k` selects
//! benchmarks by name. The learning rate is 0, so that all steps are alike. Half of the features fire at the initial
//! weights; further benchmarks lower the biases until one in a hundred fires, as later in training.

mod common;

use criterion::{BenchmarkId, Criterion};
use dictlearn_core::data::Batch;
use dictlearn_core::files::from_yaml;
use dictlearn_core::machine::device::Precision;
use dictlearn_core::registry::{Component, ComponentKind, components, find};
use dictlearn_core::train::Adam;
use dictlearn_core::train::Constraints;
use dictlearn_core::train::Gradients;
use dictlearn_core::train::analytic::AnalyticParts;
use dictlearn_core::train::analytic::AnalyticPass;
use dictlearn_core::train::{Training, TrainingCx};
use tch::{Device, Kind, Tensor};

use common::silence;

// Links the plugins.
use dictlearn as _;
use dictlearn_process as _;

const D: i64 = 512;
const FEATURES: i64 = 8192;
const BATCH: i64 = 2048;
const K: i64 = 64;
const STEPS: u64 = 1_000_000;

fn main() {
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    for trainer in components(ComponentKind::Trainer) {
        steps(&mut criterion, trainer);
    }
    parts(&mut criterion);
    criterion.final_summary();
}

/// Returns the example of a dictionary or trainer as YAML, with some fields changed.
fn example(component: &Component, fields: &[(&str, i64)]) -> String {
    let mut example: serde_yaml::Mapping = serde_yaml::from_str(component.example).expect("an example is YAML");
    example.remove("expansion_factor");
    let known = |field: &str| (component.schema)().get("properties").is_some_and(|known| known.get(field).is_some());
    for (field, value) in fields.iter().filter(|(field, _)| known(field)) {
        example.insert((*field).into(), (*value).into());
    }
    // JSON is YAML on one line.
    serde_json::to_string(&example).expect("an example is plain")
}

fn training(trainer: &Component) -> Option<Training> {
    let usual = find(ComponentKind::Dictionary, trainer.default_dictionary?)?;
    let dictionary = example(usual, &[("dict_size", FEATURES), ("k", K)]);
    // Annealed values keep their initial value.
    let still =
        [("lr", 0), ("anneal_start", STEPS as i64 - 2), ("anneal_end", STEPS as i64 - 1), ("n_sparsity_updates", 1)];
    let sae = format!("{{name: a, dictionary: {dictionary}, trainer: {}}}", example(trainer, &still));
    let cx = TrainingCx {
        widths: (D, D),
        parts: Vec::new(),
        steps: STEPS,
        seed: 0,
        device: Device::Cpu,
        precision: Precision::Float32,
    };
    // Skip trainers that need another source.
    let training = Training::new(&from_yaml(&sae).expect("a config of examples"), &cx);
    training.inspect_err(|error| eprintln!("skipping {}: {error:#}", trainer.name)).ok()
}

fn batches() -> Vec<Batch> {
    tch::manual_seed(0);
    (0..4).map(|_| Batch::of(Tensor::randn([BATCH, D], (Kind::Float, Device::Cpu)))).collect()
}

fn steps(criterion: &mut Criterion, trainer: &Component) {
    let batches = batches();
    for few in [false, true] {
        let Some(mut training) = training(trainer) else { return };
        if few && !silence(&training, &batches[0]) {
            continue;
        }
        let name = if few { "step, one feature in a hundred" } else { "step" };
        let mut step = 0;
        criterion.bench_with_input(BenchmarkId::new(name, trainer.name), &(), |bencher, ()| {
            bencher.iter(|| {
                step += 1;
                training.step(step, &batches[step as usize % batches.len()], false).expect("a step")
            });
        });
    }
}

fn parts(criterion: &mut Criterion) {
    let batches = batches();
    let Some(batch) = batches.first() else { return };
    for name in ["top_k", "batch_top_k"] {
        let Some(training) = find(ComponentKind::Trainer, name).and_then(training) else { continue };
        let dictionary = &*training.dictionary;
        let gradients = Gradients::new(dictionary.parameters());
        let pass = AnalyticPass { step: 1, batch, dictionary, gradients: &gradients, logging: false };
        let hand = || AnalyticParts::new(&pass).expect("two layers");
        let selection = dictionary.selection().expect("k");
        criterion.bench_function(&format!("part/encode and select, {name}"), |bencher| {
            bencher.iter(|| tch::no_grad(|| hand().select(selection)));
        });
        if name == "top_k" {
            let (block, _) = tch::no_grad(|| hand().select(selection));
            criterion.bench_function("part/decode selected", |bencher| {
                let (hand, mut error) = (hand(), hand().begin(batch));
                bencher.iter(|| tch::no_grad(|| hand.decode(&block, &block.z, &mut error)));
            });
            criterion.bench_function("part/gradients of selected", |bencher| {
                let mut hand = hand();
                bencher.iter(|| tch::no_grad(|| hand.backward_of_selected(&block, &batch.x)));
            });
        }
    }
    let Some(training) = find(ComponentKind::Trainer, "standard").and_then(training) else { return };
    let dictionary = &*training.dictionary;
    let gradients = Gradients::new(dictionary.parameters());
    let pass = AnalyticPass { step: 1, batch, dictionary, gradients: &gradients, logging: false };
    criterion.bench_function("part/encode, half of the features", |bencher| {
        bencher.iter(|| tch::no_grad(|| AnalyticParts::new(&pass).expect("two layers").encode(None)));
    });
    for (name, constraints) in [
        ("Adam", Constraints::default()),
        ("Adam, unit norms, clipped", Constraints { unit_norm_decoder: true, clip_gradients: Some(1.0) }),
    ] {
        let mut adam = Adam::new(training.trainer.adam(), dictionary.parameters());
        let gradients = adam.gradients();
        for (_, gradient) in gradients.iter() {
            let _ = gradient.shallow_clone().fill_(1e-3);
        }
        criterion.bench_function(&format!("part/{name}"), |bencher| {
            bencher.iter(|| adam.step_within(1e-6, &constraints, dictionary, &gradients, true));
        });
    }
}
