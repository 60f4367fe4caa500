//! What every component keeps, whoever wrote it: the test of a plugin is one call of [`keep`].
//!
//! ```ignore
//! #[test]
//! fn it_keeps_the_contract() {
//!     dictlearn_core::contract::keep(Kind::Dictionary, "mine");
//! }
//! ```
//!
//! The test must link the plugins that the component's example names (`use dictlearn as _;`), and its own crate. A
//! dictionary is tried with every trainer that is linked, a trainer with every dictionary: each pair learns or is refused
//! with the reason.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::config::{self, from_yaml, SaeConfig, Sources};
use crate::interrupt::Interrupt;
use crate::prelude::*;
use crate::registry::{self, component, components, Component, Kind as Slot};
use crate::top_k::Selection;
use crate::training::{NotFinite, OnNonfinite, Training, TrainingCx};
use crate::two_layer;
use crate::{device, evaluate, format, harvest, run, saved, tensors};

/// Tests a registered component.
///
/// # Panics
/// Where it breaks the contract, saying how.
pub fn keep(kind: Slot, name: &str) {
    let Some(component) = component(kind, name) else {
        panic!("no {kind} `{name}` is registered: is its crate linked (`use my_plugin as _;`)?");
    };
    enter_the_examples_folder();
    is_described(component);
    example_trains(component);
    match kind {
        Slot::Dictionary => {
            encodes_decodes_and_is_read_back(component);
            predicts_another_width(component);
            scaled_biases_take_scaled_activations(component);
            components(Slot::Trainer).into_iter().for_each(|trainer| learns_or_is_refused(trainer, component));
        }
        Slot::Trainer => {
            learns_logs_and_resumes(component);
            trains_as_on_a_gpu(component);
            refuses_what_is_not_finite(component);
            refuses_a_gradient_that_is_not_finite(component);
            may_be_longer_if_it_says_so(component);
            has_gradients_of_finite_differences(component);
            has_the_terms_that_it_declares(component);
            finds_by_hand_what_autograd_finds(component);
            resampling_revives_the_dead(component);
            components(Slot::Dictionary).into_iter().for_each(|dictionary| learns_or_is_refused(component, dictionary));
        }
        Slot::Modifier => composes_with_trainers(component),
        Slot::Source => delivers_resumes_and_rewinds(component),
        Slot::Text => says_the_same_from_any_position(component),
        Slot::Metric => measures_each_dictionary(component),
        Slot::Logger => writes_and_goes_on(component),
        Slot::Format => {
            refuses_a_folder_with_nothing_in_it(component);
            reads_what_it_writes(component);
        }
        Slot::Model => {}
    }
}

const D: i64 = 32;

/// A folder with the files that examples name, into which this process changes: examples run as they stand.
fn enter_the_examples_folder() {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let dir = TempDir::new().unwrap();
        example_files(dir.path());
        std::env::set_current_dir(dir.path()).unwrap();
        std::env::set_var("HF_HOME", dir.path().join("hf"));
        std::env::set_var("HF_HUB_OFFLINE", "1");
        dir
    });
}

/// The files that examples name, to be put into a folder in which they run.
pub fn example_files(dir: &Path) {
    tch::manual_seed(1);
    tensors::write(&dir.join("activations.safetensors"), &[("activations", activations(1000))]).unwrap();
    let ids = Tensor::randint(100, [16, 24], (Kind::Int64, Device::Cpu));
    tensors::write(&dir.join("tokens.safetensors"), &[("input_ids", ids)]).unwrap();
    let text = "A first paragraph.\n\nA second one.\n\nAnd a third.\n\n".repeat(100);
    std::fs::write(dir.join("corpus.txt"), text).unwrap();
    // A dataset in the Hub's cache.
    let dataset = dir.join("hf/hub/datasets--monology--pile-uncopyrighted");
    std::fs::create_dir_all(dataset.join("refs")).unwrap();
    std::fs::write(dataset.join("refs/main"), "c0").unwrap();
    std::fs::create_dir_all(dataset.join("snapshots/c0/train")).unwrap();
    let record = |n: u32| format!("{{\"text\": \"Record {n}, of several words, in a file of records.\"}}\n");
    let records: String = (0..500).map(record).collect();
    std::fs::write(dataset.join("snapshots/c0/train/00.jsonl"), records).unwrap();
    let mut source = Once(Some(activations(1000)));
    let (out, interrupt) = (dir.join("activations"), Interrupt::default());
    harvest::write(&mut source, &out, None, harvest::Dtype::Float32, &interrupt).unwrap();
}

/// A source of one batch.
struct Once(Option<Tensor>);

impl ActivationSource for Once {
    fn sites(&self) -> Vec<Site> {
        vec![Site::new("activations", (D, D))]
    }

    fn next_batch(&mut self) -> Result<Option<Activations>> {
        Ok(self.0.take().map(|x| Batch::of(x).into()))
    }

    fn rewind(&mut self) -> Result<()> {
        bail!("the batch was given")
    }

    fn mean_squared_norms(&mut self) -> Result<Vec<f64>> {
        bail!("nobody asks for its norm")
    }

    fn describe(&self) -> Value {
        Value::Object(Map::new())
    }

    fn state(&self) -> Result<State> {
        Ok(State::new())
    }

    fn restore(&mut self, _: &State) -> Result<()> {
        Ok(())
    }
}

fn source_cx() -> SourceCx {
    SourceCx { seed: 1, ..SourceCx::default() }
}

/// Activations [n, D] of a few directions each, so that there is something to learn.
fn activations(n: i64) -> Tensor {
    let options = (Kind::Float, Device::Cpu);
    let features = Tensor::rand([n, 64], options).relu() * Tensor::rand([n, 64], options).less(0.1);
    features.matmul(&Tensor::randn([64, D], options)) + 0.1
}

fn dictionary_cx() -> DictionaryCx<'static> {
    DictionaryCx { activation_dim: D, output_dim: D, parts: &[], device: Device::Cpu, precision: Precision::Float32 }
}

fn dictionary(component: &Component) -> Box<dyn Dictionary> {
    tch::manual_seed(5);
    let config: Box<dyn DictionaryConfig> = from_yaml(component.example).unwrap();
    config.build(&dictionary_cx()).unwrap()
}

/// Parses an example in the slot of its kind, writes it as YAML again, and both once more.
fn round_trip(component: &Component) -> (Value, Value) {
    macro_rules! as_config {
        ($config:ty) => {{
            let read = |yaml: &str| {
                let config: Box<$config> = from_yaml(yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"));
                serde_json::to_value(&config).unwrap()
            };
            let once = read(component.example);
            let twice = read(&serde_yaml::to_string(&once).unwrap());
            (once, twice)
        }};
    }
    match component.kind {
        Slot::Dictionary => as_config!(dyn DictionaryConfig),
        Slot::Trainer => as_config!(dyn TrainerConfig),
        Slot::Modifier => as_config!(dyn ModifierConfig),
        Slot::Source => as_config!(dyn SourceConfig),
        Slot::Text => as_config!(dyn TextConfig),
        Slot::Metric => as_config!(dyn MetricConfig),
        Slot::Logger => as_config!(dyn LoggerConfig),
        // Named by files, not by configs.
        Slot::Model | Slot::Format => (Value::Null, Value::Null),
    }
}

fn is_described(component: &Component) {
    registry::check().unwrap();
    let Component { kind, name, summary, .. } = component;
    assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'), "{kind} {name}");
    assert!(!summary.is_empty() && summary.len() <= 90 && !summary.contains('\n'), "{kind} {name}: {summary}");
    if matches!(kind, Slot::Model | Slot::Format) {
        return;
    }
    let schema = (component.schema)().to_value();
    for (field, schema) in schema["properties"].as_object().into_iter().flatten() {
        assert!(schema["description"].is_string(), "{kind} {name}: `{field}` has no doc comment");
    }
    let (once, twice) = round_trip(component);
    assert_eq!(once["type"], *name, "the example of {kind} {name} is of another type");
    assert_eq!(once, twice, "{kind} {name}");
}

/// What `dictlearn describe` shows runs as it stands.
fn example_trains(component: &Component) {
    let Some(example) = config::example(component) else { return };
    let dir = TempDir::new().unwrap();
    // Relative paths are the config file's: it lies beside the files of the examples.
    let file = std::env::current_dir().unwrap().join(format!("{}-{}.yaml", component.kind, component.name));
    std::fs::write(&file, &example).unwrap();
    // Fewer steps, for the test's sake; the schedules of examples fit in.
    let sources = Sources { file, profile: None, set: vec!["steps=50".to_owned()], variables: Vec::new() };
    let mut config = config::load(&sources).unwrap_or_else(|error| panic!("{error:?}\n{example}"));
    let out = dir.path().join("run");
    if let Err(error) = run::train(&mut config, &out, false, &Interrupt::default()) {
        panic!("{} {}: {error:#}\n{example}", component.kind, component.name);
    }
}

fn encodes_decodes_and_is_read_back(component: &Component) {
    let x = activations(50);
    let dir = TempDir::new().unwrap();
    let (name, dictionary) = (component.name, dictionary(component));
    let dims = dictionary.dims();
    let (x_hat, features) = tch::no_grad(|| dictionary.reconstruct(&x));
    assert_eq!(features.size(), [50, dims.features], "{name}");
    assert_eq!(x_hat.size(), [50, dims.output], "{name}");
    assert_eq!(
        dictionary.reconstruction(&dictionary.encode(&x), &x),
        x_hat,
        "{name}: reconstruct is not decode after encode"
    );
    // Training encodes as users do, but for what is selected over a batch, which users select by a threshold.
    if !dictionary.selection().is_some_and(Selection::by_threshold) {
        assert_eq!(dictionary.forward(&x).features, features, "{name}: forward is not encode");
    }
    // Three dimensions, as a model has them, are as good as two.
    let three = dictionary.reconstruct(&x.view([5, 10, D])).0.view([50, dims.output]);
    assert!((three - &x_hat).abs().max().double_value(&[]) < 1e-5, "{name}: [B, L, d]");

    let config = serde_json::json!({"trainer": {"dict_class": dictionary.class(), "activation_dim": D}});
    saved::write(&dir.path().join(name), &*dictionary, &config).unwrap();
    let read = saved::read(&dir.path().join(name), Device::Cpu, Precision::Float32).unwrap();
    assert_eq!(read.dictionary.reconstruct(&x).0, x_hat, "{name}: what is read back is another dictionary");
    let names = |dictionary: &dyn Dictionary| dictionary.state_dict().iter().map(|(name, _)| *name).collect::<Vec<_>>();
    assert_eq!(names(&*read.dictionary), names(&*dictionary));
}

/// Or is refused, if its output must be as wide as its input.
fn predicts_another_width(component: &Component) {
    let (name, output_dim) = (component.name, D + 3);
    let config: Box<dyn DictionaryConfig> = from_yaml(component.example).unwrap();
    let Ok(dictionary) = config.build(&DictionaryCx { output_dim, ..dictionary_cx() }) else { return };
    if dictionary.dims().output != output_dim {
        return;
    }
    let x = activations(50);
    let (x_hat, _) = tch::no_grad(|| dictionary.reconstruct(&x));
    assert_eq!(x_hat.size(), [50, output_dim], "{name}");
    let dir = TempDir::new().unwrap();
    saved::write(dir.path(), &*dictionary, &serde_json::json!({"trainer": {"dict_class": dictionary.class()}}))
        .unwrap();
    let read = saved::read(dir.path(), Device::Cpu, Precision::Float32).unwrap();
    assert_eq!(read.dictionary.dims(), dictionary.dims(), "{name}");
    assert_eq!(tch::no_grad(|| read.dictionary.reconstruct(&x).0), x_hat, "{name}");
}

fn scaled_biases_take_scaled_activations(component: &Component) {
    // Trained on activations divided by s and then scaled, a dictionary does to x what it did to x / s, s times.
    let x = activations(50);
    let (name, mut dictionary) = (component.name, dictionary(component));
    for (_, tensor) in dictionary.parameters() {
        if tensor.dim() == 1 {
            let _ = tch::no_grad(|| tensor.shallow_clone().uniform_(0.0, 0.1));
        }
    }
    for (_, tensor) in dictionary.buffers() {
        if tensor.kind() == Kind::Float {
            let _ = tensor.shallow_clone().fill_(0.05);
        }
    }
    let scale = 3.0;
    let before = tch::no_grad(|| dictionary.reconstruct(&(&x / scale)).0 * scale);
    dictionary.scale_biases(scale);
    let after = tch::no_grad(|| dictionary.reconstruct(&x).0);
    let difference = (&after - &before).abs().max().double_value(&[]);
    assert!(difference < 1e-3 * before.abs().max().double_value(&[]), "{name}: {difference}");
}

fn sae(trainer: &Component) -> SaeConfig {
    let usual = trainer.usual_dictionary.expect("a trainer names its usual dictionary");
    let dictionary = component(Slot::Dictionary, usual).expect("which is registered");
    SaeConfig {
        name: trainer.name.to_owned(),
        site: None,
        dictionary: from_yaml(dictionary.example).unwrap(),
        trainer: from_yaml(trainer.example).unwrap(),
        modifiers: Vec::new(),
        init_from: None,
        seed: None,
        on_nonfinite: None,
    }
}

const STEPS: u64 = 200;

fn training_cx() -> TrainingCx {
    TrainingCx {
        widths: (D, D),
        parts: Vec::new(),
        steps: STEPS,
        seed: 3,
        device: Device::Cpu,
        precision: Precision::Float32,
    }
}

fn batches() -> Vec<Batch> {
    tch::manual_seed(2);
    activations(STEPS as i64 * 64).split(64, 0).into_iter().map(Batch::of).collect()
}

fn weights(training: &Training) -> BTreeMap<String, Vec<u8>> {
    let state = training.dictionary.state_dict();
    state
        .into_iter()
        .map(|(name, tensor)| (name.to_owned(), tensors::serialize(&[("", tensor)], &[]).unwrap()))
        .collect()
}

fn learns_logs_and_resumes(trainer: &Component) {
    let batches = batches();
    let name = trainer.name;
    let new = || Training::new(&sae(trainer), &training_cx()).unwrap();
    let (mut logged, mut silent, mut resumed) = (new(), new(), new());
    let mut explained = Vec::new();
    for (step, batch) in batches.iter().enumerate() {
        let row = logged.step(step as u64, batch, true).unwrap().unwrap();
        for figure in ["step", "sae", "loss", "l0", "frac_variance_explained", "lr"] {
            assert!(row.contains_key(figure), "{name} does not log `{figure}`");
        }
        explained.push(row["frac_variance_explained"].as_f64().unwrap());
        assert!(silent.step(step as u64, batch, false).unwrap().is_none());
        if step == 100 {
            // What was before is thrown away: all that matters is in the state.
            let state = silent.state().unwrap();
            resumed = new();
            resumed.restore(&state).unwrap();
        }
        if step > 100 {
            resumed.step(step as u64, batch, false).unwrap();
        }
    }
    if logged.trainer.constraints().unit_norm_decoder {
        let norms = logged.dictionary.decoder().expect("a decoder to constrain").norms();
        let apart = (norms - 1.0).abs().max().double_value(&[]);
        assert!(apart < 1e-5, "{name}: the decoder's norms are off by {apart}");
    }
    let last = explained[explained.len() - 20..].iter().sum::<f64>() / 20.0;
    assert!(last > 0.3 && last > explained[0], "{name} has learnt nothing: {} -> {last}", explained[0]);
    assert_eq!(weights(&logged), weights(&silent), "{name}: logging changes the run");
    assert_eq!(weights(&resumed), weights(&silent), "{name}: a resumed run ends elsewhere");
}

/// What is done otherwise on a GPU, with a CPU's numbers: nothing is read at each step.
fn trains_as_on_a_gpu(trainer: &Component) {
    let name = trainer.name;
    let batches = batches();
    let train = || {
        let mut training = Training::new(&sae(trainer), &training_cx()).unwrap();
        for (step, batch) in batches[..30].iter().enumerate() {
            training.step(step as u64, batch, false).unwrap();
        }
        training
    };
    let usual = train();
    device::as_a_gpu(|| {
        let mut training = train();
        training.settle().unwrap();
        for ((parameter, found), (_, expected)) in
            training.dictionary.parameters().into_iter().zip(usual.dictionary.parameters())
        {
            let off = (found - &expected).norm().double_value(&[]) / expected.norm().double_value(&[]).max(1e-6);
            assert!(off < 1e-3, "{name}: {parameter} is off by {off} as on a GPU");
        }
        // Begun on a CPU, and gone on with on a GPU.
        let mut moved = Training::new(&sae(trainer), &training_cx()).unwrap();
        moved.restore(&usual.state().unwrap()).unwrap();
        assert!(moved.state().unwrap() == usual.state().unwrap(), "{name}: a GPU takes up another state");
        moved.step(30, &batches[30], false).unwrap();
        moved.settle().unwrap();
        let x = batches[30].x.copy();
        let _ = x.get(3).get(5).fill_(f64::NAN);
        training.step(30, &Batch::of(x), false).unwrap();
        training.step(31, &batches[31], false).unwrap();
        let error = training.settle().unwrap_err();
        assert!(error.is::<NotFinite>(), "{name}: {error:#}");
        assert!(error.to_string().contains(&format!("step 30: the loss of SAE `{name}` is NaN")), "{error:#}");
        learns_logs_and_resumes(trainer);
    });
}

/// A run can be made longer if no step so far depends on its length.
fn may_be_longer_if_it_says_so(trainer: &Component) {
    let batches = batches();
    let train = |steps| {
        let cx = TrainingCx { steps, ..training_cx() };
        let mut training = Training::new(&sae(trainer), &cx).unwrap();
        for (step, batch) in batches.iter().enumerate() {
            training.step(step as u64, batch, false).unwrap();
        }
        training
    };
    let short = train(STEPS);
    if !short.trainer.depends_on_steps() {
        assert!(short.state().unwrap() == train(3 * STEPS).state().unwrap(), "{}: it depends on `steps`", trainer.name);
    }
}

fn refuses_what_is_not_finite(trainer: &Component) {
    let batches = batches();
    let name = trainer.name;
    let mut training = Training::new(&sae(trainer), &training_cx()).unwrap();
    // At the first step, which initialises, and later, when counters and thresholds are kept.
    for good in [0, 80] {
        for (step, batch) in batches[..good].iter().enumerate() {
            training.step(step as u64, batch, false).unwrap();
        }
        let before = training.state().unwrap();
        for bad in [f64::NAN, f64::INFINITY] {
            let x = batches[good].x.copy();
            let _ = x.get(3).get(5).fill_(bad);
            let error = training.step(good as u64, &Batch::of(x), true).unwrap_err();
            assert!(error.is::<NotFinite>(), "{name}: {error:#}");
            assert!(error.to_string().contains(&format!("step {good}: the loss of SAE `{name}`")), "{error:#}");
            assert!(training.state().unwrap() == before, "{name}: a step that was refused has changed something");
        }
    }
}

/// Makes one number of each gradient NaN at some step.
struct Poison {
    steps: u64,
    at: u64,
}

impl Modifier for Poison {
    fn gradients(&mut self, dictionary: &dyn Dictionary) -> Result<()> {
        if self.steps == self.at {
            for (_, parameter) in dictionary.parameters() {
                // `reshape` would copy one that does not lie in one piece.
                let mut number = parameter.grad();
                while number.dim() > 0 {
                    number = number.get(0);
                }
                let _ = number.fill_(f64::NAN);
            }
        }
        self.steps += 1;
        Ok(())
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.put("steps", self.steps)?;
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.steps = state.get("steps")?;
        Ok(())
    }
}

fn refuses_a_gradient_that_is_not_finite(trainer: &Component) {
    const AT: u64 = 3;
    let (batches, name) = (batches(), trainer.name);
    let train = |on_nonfinite| {
        let mut training = Training::new(&sae(trainer), &training_cx()).unwrap();
        training.on_nonfinite = on_nonfinite;
        training.modify(Box::new(Poison { steps: 0, at: AT }));
        for step in 0..AT {
            training.step(step, &batches[step as usize], false).unwrap();
        }
        training
    };
    let refused = |error: anyhow::Error| {
        assert!(error.is::<NotFinite>(), "{name}: {error:#}");
        let said = format!("step {AT}: the gradient of the loss of SAE `{name}`");
        assert!(error.to_string().contains(&said), "{error:#}");
    };
    let at_once = |on_nonfinite| {
        let mut training = train(on_nonfinite);
        let before = training.state().unwrap();
        refused(training.step(AT, &batches[AT as usize], true).unwrap_err());
        assert!(training.state().unwrap() == before, "{name}: a step that was refused has changed something");
    };
    at_once(OnNonfinite::Stop);
    device::as_a_gpu(|| {
        // Who skips a batch has to know at once that it must be skipped.
        at_once(OnNonfinite::SkipBatch);
        let mut training = train(OnNonfinite::Stop);
        training.step(AT, &batches[AT as usize], false).unwrap();
        refused(training.settle().unwrap_err());
    });
}

/// The terms of a loss, each computed as in a step.
fn terms(training: &mut Training, batch: &Batch, step: u64) -> Terms {
    let mut terms = Terms::new();
    // What the loss counts is set back, so that it is the same function every time.
    let counters = training.trainer.state().unwrap();
    let pass = Pass::forward(&*training.trainer, &*training.dictionary, batch, step, false);
    training.trainer.loss(&pass, &mut terms).unwrap();
    if let Some((name, value)) = training.dictionary.auxiliary_loss(batch, &pass.code) {
        terms.add(name, value, 1.0);
    }
    training.trainer.restore(&counters).unwrap();
    terms
}

fn has_gradients_of_finite_differences(trainer: &Component) {
    const STEP: u64 = 100;
    let batches = batches();
    let mut training = Training::new(&sae(trainer), &training_cx()).unwrap();
    for (step, batch) in batches[..STEP as usize].iter().enumerate() {
        training.step(step as u64, batch, false).unwrap();
    }
    // From here on in float64, in which differences are worth something.
    for (_, mut parameter) in training.dictionary.parameters() {
        parameter.set_data(&parameter.detach().to_kind(Kind::Double));
        parameter.zero_grad();
    }
    let batch = Batch::of(batches[STEP as usize].x.to_kind(Kind::Double));
    let auxiliary = {
        let code = training.dictionary.forward(&batch.x);
        training.dictionary.auxiliary_loss(&batch, &code).map(|(name, _)| name)
    };
    let decodes = |training: &Training, parameter: &Tensor| {
        parameter.shallow_clone().zero_grad();
        let features = training.dictionary.encode(&batch.x).detach();
        training.dictionary.decode(&features).sum(Kind::Double).backward();
        parameter.grad().defined() && parameter.grad().abs().max().double_value(&[]) > 0.0
    };
    let names: Vec<&str> = terms(&mut training, &batch, STEP).iter().map(|term| term.name).collect();
    for (parameter_name, parameter) in training.dictionary.parameters() {
        let mut verified = false;
        let mut straight_through = false;
        for name in &names {
            let what = format!("{}: {name} by {parameter_name}", trainer.name);
            let value = |training: &mut Training| terms(training, &batch, STEP).get_mut(name).unwrap().value.copy();
            // An auxiliary loss may stop the gradient to what decodes, and then is no function of it any more.
            if auxiliary == Some(*name) && decodes(&training, &parameter) {
                continue;
            }
            for (_, parameter) in training.dictionary.parameters() {
                parameter.shallow_clone().zero_grad();
            }
            let term = value(&mut training);
            if !term.requires_grad() {
                continue;
            }
            term.backward();
            let grad = parameter.grad();
            if !grad.defined() || grad.abs().max().double_value(&[]) == 0.0 {
                // The term does not depend on it, or stops its gradient.
                continue;
            }
            let grad = grad.copy();
            let direction = parameter.detach().randn_like();
            let direction = &direction / direction.norm();
            let mut at = |distance: f64| {
                let mut moved = parameter.shallow_clone();
                tch::no_grad(|| moved += &direction * distance);
                let value = value(&mut training).double_value(&[]);
                tch::no_grad(|| moved -= &direction * distance);
                value
            };
            // Where a power of a small activation bends, the wider one is too wide.
            let differences = [1e-6, 1e-7].map(|h| (at(h) - at(-h)) / (2.0 * h));
            if differences[0].abs() < 1e-9 {
                // A step function, which a straight-through estimator stands in for.
                straight_through = true;
                continue;
            }
            let along = (grad * &direction).sum(Kind::Double).double_value(&[]);
            assert!(
                differences.iter().any(|found| (along - found).abs() < 1e-5 * found.abs().max(1e-3)),
                "{what}: {along}, but by differences {differences:?}"
            );
            verified = true;
        }
        assert!(verified || straight_through, "{}: nothing depends on {parameter_name}", trainer.name);
        assert!(verified || !parameter_name.contains("enc"), "{}: {parameter_name}", trainer.name);
    }
}

/// How a trainer is put to the test by hand.
#[derive(Debug, Clone, Copy, PartialEq)]
enum ByHandCase {
    /// As it trains.
    Usual,
    /// With so few features that they are listed.
    FewFeatures,
    /// With features that count as dead.
    DeadFeatures,
    /// With products in bfloat16.
    BFloat16,
    /// As on a GPU: with libtorch's operations in place of our own loops.
    OnGpu,
    /// The same in bfloat16.
    OnGpuBFloat16,
}

/// If it has a way by hand at all, on every dictionary that it trains.
fn finds_by_hand_what_autograd_finds(trainer: &Component) {
    for dictionary in components(Slot::Dictionary) {
        use ByHandCase::{BFloat16, DeadFeatures, FewFeatures, OnGpu, OnGpuBFloat16, Usual};
        for case in [Usual, FewFeatures, DeadFeatures, BFloat16, OnGpu, OnGpuBFloat16] {
            is_the_same_by_hand(trainer, dictionary, case);
        }
    }
}

fn is_the_same_by_hand(trainer: &Component, dictionary: &Component, case: ByHandCase) {
    let name = format!("{} on {}, {case:?}", trainer.name, dictionary.name);
    let mut fields: serde_yaml::Mapping = serde_yaml::from_str(trainer.example).unwrap();
    let has_field =
        |field: &str| (trainer.schema)().get("properties").is_some_and(|fields| fields.get(field).is_some());
    let on_gpu = matches!(case, ByHandCase::OnGpu | ByHandCase::OnGpuBFloat16);
    let bfloat16 = matches!(case, ByHandCase::BFloat16 | ByHandCase::OnGpuBFloat16);
    if on_gpu || case == ByHandCase::DeadFeatures {
        if has_field("dead_feature_threshold") {
            fields.insert("dead_feature_threshold".into(), 100.into());
        } else if case == ByHandCase::DeadFeatures {
            return;
        }
    }
    let mut example: serde_yaml::Mapping = serde_yaml::from_str(dictionary.example).unwrap();
    if case == ByHandCase::OnGpuBFloat16 && example.contains_key("k") {
        // All of them: among rounded numbers others would be selected at the edge.
        example.insert("k".into(), self::dictionary(dictionary).dims().features.into());
    }
    let sae = SaeConfig {
        trainer: from_yaml(&serde_yaml::to_string(&fields).unwrap()).unwrap(),
        dictionary: from_yaml(&serde_yaml::to_string(&example).unwrap()).unwrap(),
        ..sae(trainer)
    };
    let mut cx = training_cx();
    if bfloat16 {
        cx.precision = Precision::BFloat16;
    }
    // What it cannot train it refuses.
    let Ok(mut training) = Training::new(&sae, &cx) else { return };
    let batches = batches();
    let first = HandPass { step: 0, batch: &batches[0], dictionary: &*training.dictionary, logging: true };
    if tch::no_grad(|| training.trainer.by_hand(&first, &mut Terms::new())).unwrap().is_none() {
        return;
    }
    for (step, batch) in batches[..20].iter().enumerate() {
        training.step(step as u64, batch, false).unwrap();
    }
    if case == ByHandCase::FewFeatures {
        let encoder = training.dictionary.encoder().expect("a dictionary of two layers has an encoder");
        let active = || tch::no_grad(|| training.dictionary.forward(&batches[20].x).features.not_equal(0.0));
        while active().to_kind(Kind::Float).mean(Kind::Float).double_value(&[]) > 0.09 {
            let biases = training.dictionary.parameters().into_iter();
            let biases = biases.filter(|(name, _)| encoder.biases.contains(name));
            tch::no_grad(|| biases.for_each(|(_, mut bias)| bias -= 0.1));
        }
    }
    let (batch, counters) = (&batches[20], training.trainer.state().unwrap());
    let mut by_hand = Terms::new();
    let pass = HandPass { step: 20, batch, dictionary: &*training.dictionary, logging: true };
    // A gradient may lie where the last one was; what is not written stays no number.
    for (_, parameter) in training.dictionary.parameters() {
        let _ = tch::no_grad(|| parameter.grad().fill_(f64::NAN));
    }
    let take = || tch::no_grad(|| training.trainer.by_hand(&pass, &mut by_hand)).unwrap();
    let found = if on_gpu { device::as_a_gpu(take) } else { two_layer::with_tile_width(96, take) };
    let Some(found) = found else {
        let relu = training.dictionary.activation_function().is_some_and(|activation| activation.on_gpu());
        let selects = training.dictionary.selection().is_some();
        assert!(on_gpu && !relu && !selects, "{name}: not by hand, as before");
        return;
    };
    let gradients: Vec<_> = found.gradients.iter().map(|(name, gradient)| (*name, gradient.copy())).collect();
    let counted = training.trainer.state().unwrap();
    training.trainer.restore(&counters).unwrap();
    for (_, parameter) in training.dictionary.parameters() {
        parameter.shallow_clone().zero_grad();
    }
    let mut terms = Terms::new();
    let autograd = Pass::forward(&*training.trainer, &*training.dictionary, batch, 20, false);
    training.trainer.loss(&autograd, &mut terms).unwrap();
    if let Some((name, value)) = training.dictionary.auxiliary_loss(batch, &autograd.code) {
        terms.add(name, value, 1.0);
    }
    terms.total().unwrap().backward();
    let tolerance = if bfloat16 { 2e-2 } else { 1e-4 };
    let close = |what: &str, found: &Tensor, expected: &Tensor| {
        let apart = (found - expected).norm().double_value(&[]);
        let scale = expected.norm().double_value(&[]).max(1e-6);
        assert!(apart < tolerance * scale, "{name}: {what} by hand is off by {}", apart / scale);
    };
    for term in terms.iter() {
        let other = by_hand.get_mut(term.name).unwrap_or_else(|| panic!("{name} has no `{}` by hand", term.name));
        assert_eq!((other.role, other.weight), (term.role, term.weight), "{name}: {}", term.name);
        close(term.name, &other.value, &term.value.detach());
    }
    let fired = found.fired.unwrap_or_else(|| panic!("{name} does not say which features fired"));
    if case == ByHandCase::FewFeatures {
        let part = fired.mean(Kind::Double).double_value(&[]) / batch.len() as f64;
        assert!(part > 0.0 && part < 0.1, "{name}: {part} of the features fire, which are not few");
    }
    let active = autograd.code.features.detach().not_equal(0.0).sum_dim_intlist([0].as_slice(), false, Kind::Float);
    close("how often features fired", &fired.to_kind(Kind::Float), &active);
    let error = found.error.unwrap_or_else(|| panic!("{name} does not say how far the reconstruction is off"));
    close("the reconstruction", &(&batch.target + error), &autograd.x_hat.detach());
    for (parameter_name, parameter) in training.dictionary.parameters() {
        let expected = parameter.grad();
        let gradient = gradients.iter().find(|(known, _)| *known == parameter_name);
        match gradient {
            Some((_, gradient)) => close(parameter_name, gradient, &expected),
            None => assert!(
                !expected.defined() || expected.abs().max().double_value(&[]) == 0.0,
                "{name}: no gradient of {parameter_name}"
            ),
        }
    }
    // A feature at its edge may fire in one and not in the other where numbers are rounded.
    if !bfloat16 {
        for (key, tensor) in training.trainer.state().unwrap().tensors() {
            close(
                &format!("its state, {key},"),
                &counted.tensor(key).unwrap().to_kind(Kind::Float),
                &tensor.to_kind(Kind::Float),
            );
        }
    }
}

fn has_the_terms_that_it_declares(trainer: &Component) {
    let mut training = Training::new(&sae(trainer), &training_cx()).unwrap();
    let batch = &batches()[0];
    // The first step initialises from data.
    training.step(0, batch, false).unwrap();
    let terms = terms(&mut training, batch, 1);
    let has = |role: Role| terms.iter().any(|term| term.role == role);
    assert_eq!(has(Role::Sparsity), training.trainer.has_sparsity_term(), "{}: has_sparsity_term", trainer.name);
    assert!(has(Role::Reconstruction), "{} adds no reconstruction (`Terms::add_reconstruction`)", trainer.name);
}

/// Where the trainer offers it.
fn resampling_revives_the_dead(trainer: &Component) {
    let batches = batches();
    if (trainer.schema)().get("properties").is_none_or(|fields| fields.get("resample_steps").is_none()) {
        return;
    }
    for weight in ["loss", "loss_squared"] {
        let what = format!("{} by {weight}", trainer.name);
        let mut fields: serde_yaml::Mapping = serde_yaml::from_str(trainer.example).unwrap();
        fields.insert("resample_steps".into(), 15.into());
        fields.insert("resample_weight".into(), weight.into());
        let yaml = serde_yaml::to_string(&fields).unwrap();
        let sae = SaeConfig { trainer: from_yaml(&yaml).unwrap(), ..sae(trainer) };
        let mut training = Training::new(&sae, &training_cx()).unwrap();
        let encoder = training.dictionary.encoder().expect("an encoder to resample");
        for (name, parameter) in training.dictionary.parameters() {
            if encoder.biases.contains(&name) {
                let _ = tch::no_grad(|| parameter.narrow(0, 0, 4).fill_(-1e3));
            }
        }
        let fire = |training: &Training| {
            let features = tch::no_grad(|| training.dictionary.encode(&batches[0].x)).narrow(1, 0, 4);
            features.not_equal(0.0).any_dim(0, false).sum(Kind::Int64).int64_value(&[])
        };
        for (step, batch) in batches[..31].iter().enumerate() {
            training.step(step as u64, batch, false).unwrap();
            assert!(step >= 14 || fire(&training) == 0, "{what}: step {step}");
        }
        assert_eq!(fire(&training), 4, "{what}: some are still dead");
    }
}

fn learns_or_is_refused(trainer: &Component, dictionary: &Component) {
    let batches = batches();
    let pair = format!("{} on {}", trainer.name, dictionary.name);
    let sae = SaeConfig { dictionary: from_yaml(dictionary.example).unwrap(), ..sae(trainer) };
    let mut training = match Training::new(&sae, &training_cx()) {
        Ok(training) => training,
        Err(error) => {
            let error = error.downcast::<InputError>().expect("a refusal that says why");
            let message = format!("{error:?}");
            assert!(message.contains("cannot train the class"), "{pair}: {message}");
            assert_ne!(trainer.usual_dictionary, Some(dictionary.name), "{pair}: {message}");
            return;
        }
    };
    let mut explained = Vec::new();
    for (step, batch) in batches[..60].iter().enumerate() {
        let row = training.step(step as u64, batch, true).unwrap().unwrap();
        explained.push(row["frac_variance_explained"].as_f64().unwrap());
    }
    let last = explained[50..].iter().sum::<f64>() / 10.0;
    let first = explained[0];
    let learnt = 1.0 - last < 0.9 * (1.0 - first) || training.dictionary.parameters().is_empty();
    assert!(learnt, "{pair} has learnt nothing: {} -> {last}", explained[0]);
    for (name, tensor) in training.dictionary.state_dict() {
        assert!(bool::try_from(tensor.isfinite().all()).unwrap(), "{pair}: {name} is not finite");
    }
}

fn composes_with_trainers(modifier: &Component) {
    let batches = batches();
    let mut composed = 0;
    for trainer in components(Slot::Trainer) {
        let pair = format!("{} with {}", modifier.name, trainer.name);
        let new = || {
            let modifiers = vec![from_yaml(modifier.example).unwrap()];
            Training::new(&SaeConfig { modifiers, ..sae(trainer) }, &training_cx())
        };
        let (mut whole, mut resumed) = match new() {
            Ok(training) => (training, new().unwrap()),
            Err(error) => {
                let error = error.downcast::<InputError>().expect("a refusal that says why");
                let message = format!("{error:?}");
                assert!(message.contains(&format!("the modifier `{}` needs", modifier.name)), "{pair}: {message}");
                continue;
            }
        };
        composed += 1;
        let mut explained = Vec::new();
        for (step, batch) in batches[..140].iter().enumerate() {
            let row = whole.step(step as u64, batch, true).unwrap().unwrap();
            explained.push(row["frac_variance_explained"].as_f64().unwrap());
            match step {
                0..70 => {}
                70 => resumed.restore(&whole.state().unwrap()).unwrap(),
                // Logging changes nothing.
                _ => assert!(resumed.step(step as u64, batch, false).unwrap().is_none()),
            }
        }
        let last = explained[explained.len() - 20..].iter().sum::<f64>() / 20.0;
        let learnt = 1.0 - last < 0.9 * (1.0 - explained[0]);
        assert!(learnt, "{pair} has learnt nothing: {} -> {last}", explained[0]);
        assert_eq!(weights(&whole), weights(&resumed), "{pair}: a resumed run ends elsewhere");

        let before = whole.state().unwrap();
        let x = batches[140].x.copy();
        let _ = x.get(3).get(5).fill_(f64::NAN);
        assert!(whole.step(140, &Batch::of(x), true).is_err(), "{pair}");
        assert!(whole.state().unwrap() == before, "{pair}: a step that was refused has changed something");
    }
    assert!(composed > 0, "{} composes with no trainer", modifier.name);
}

fn delivers_resumes_and_rewinds(component: &Component) {
    let cx = source_cx();
    let name = component.name;
    let config: Box<dyn SourceConfig> = from_yaml(component.example).unwrap();
    let mut source = config.build(&cx).unwrap();
    let sites = source.sites();
    let next = |source: &mut dyn ActivationSource| {
        let activations = tch::no_grad(|| source.next_batch().unwrap())?;
        Some(activations.sites.into_iter().map(|batch| batch.x).collect::<Vec<_>>())
    };
    for _ in 0..3 {
        let activations = source.next_batch().unwrap().unwrap();
        assert_eq!(activations.sites.len(), sites.len(), "{name}");
        for (batch, site) in activations.sites.iter().zip(&sites) {
            assert_eq!((batch.x.size()[1], batch.target.size()[1]), site.widths(), "{name}");
            assert_eq!(batch.x.kind(), Kind::Float, "{name}");
            assert_eq!(batch.len(), activations.len(), "{name}");
        }
        if let Some(tokens) = &activations.tokens {
            assert_eq!((tokens.size(), tokens.kind()), (vec![activations.len(), 3], Kind::Int64), "{name}");
        }
    }
    let state = source.state().unwrap();
    let expected: Vec<_> = (0..8).map_while(|_| next(&mut *source)).collect();
    let mut other = config.build(&cx).unwrap();
    other.restore(&state).unwrap();
    let found: Vec<_> = (0..8).map_while(|_| next(&mut *other)).collect();
    assert!(!expected.is_empty() && expected == found, "{name}: a restored source goes on elsewhere");
    let norms = source.mean_squared_norms().unwrap();
    assert_eq!(norms.len(), sites.len(), "{name}");
    assert!(norms.iter().all(|norm| norm.is_finite() && *norm > 0.0), "{name}: {norms:?}");
    source.rewind().unwrap();
    assert!(next(&mut *source).is_some(), "{name}: nothing after a rewind");
    assert!(source.describe().is_object());
}

fn says_the_same_from_any_position(component: &Component) {
    let name = component.name;
    let config: Box<dyn TextConfig> = from_yaml(component.example).unwrap();
    let mut text = config.build().unwrap();
    let all: Vec<Record> = (0..3).map(|_| text.next_record().unwrap().unwrap()).collect();
    assert_eq!(text.position(), 3, "{name}");
    text.seek(1).unwrap();
    assert_eq!(text.position(), 1, "{name}");
    assert_eq!(text.next_record().unwrap().as_ref(), Some(&all[1]), "{name}");
    text.seek(0).unwrap();
    assert_eq!(text.next_record().unwrap().as_ref(), Some(&all[0]), "{name}");
    let rows = matches!(all[0], Record::Tokens { .. });
    assert_eq!(text.is_tokenized(), rows, "{name}");
}

fn measures_each_dictionary(component: &Component) {
    let cx = source_cx();
    let metric: Box<dyn MetricConfig> = from_yaml(component.example).unwrap();
    let mut measured = false;
    for source in components(Slot::Source) {
        let config: Box<dyn SourceConfig> = from_yaml(source.example).unwrap();
        let mut source = config.build(&cx).unwrap();
        if metric.build().unwrap().refuses(&mut *source).is_some() {
            continue;
        }
        let (activation_dim, output_dim) = source.sites()[0].widths();
        let dictionary_cx = DictionaryCx { activation_dim, output_dim, ..dictionary_cx() };
        let build = |yaml: &str| from_yaml::<Box<dyn DictionaryConfig>>(yaml).unwrap().build(&dictionary_cx).unwrap();
        let both: Vec<Box<dyn Dictionary>> =
            components(Slot::Dictionary).iter().take(2).map(|component| build(component.example)).collect();
        let both: Vec<Subject> = both.iter().map(|dictionary| Subject { dictionary: &**dictionary, site: 0 }).collect();
        let measuring =
            evaluate::Measuring { key: "source", origin: Map::new(), from_the_beginning: true, say: &|_| () };
        let found = evaluate::evaluate(std::slice::from_ref(&metric), &both, &mut *source, &measuring).unwrap();
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|figures| !figures.is_empty()), "{}", component.name);
        measured = true;
    }
    assert!(measured, "no source's example suits the metric {}", component.name);
}

fn writes_and_goes_on(component: &Component) {
    let dir = TempDir::new().unwrap();
    let config: Box<dyn LoggerConfig> = from_yaml(component.example).unwrap();
    let row = |step: u64| Map::from_iter([("step".to_owned(), step.into()), ("sae".to_owned(), "a".into())]);
    for resume_at in [None, Some(1)] {
        let mut logger = config.build(dir.path(), resume_at).unwrap();
        logger.log(&row(0)).unwrap();
        logger.log(&row(1)).unwrap();
        logger.flush().unwrap();
    }
}

fn refuses_a_folder_with_nothing_in_it(component: &Component) {
    let dir = TempDir::new().unwrap();
    let format = format::named(component.name).unwrap();
    let request = format::Request { place: Some(dir.path().display().to_string()), ..format::Request::default() };
    let read =
        format.find(&request).and_then(|places| places.iter().try_for_each(|place| format.read(place).map(|_| ())));
    let error = read.expect_err("an empty folder was read as an SAE");
    assert!(InputError::take(error).is_ok(), "{}: it must be an error of the input", component.name);
}

/// Every dictionary goes through the format unharmed, or is refused; some do.
fn reads_what_it_writes(component: &Component) {
    let format = format::named(component.name).unwrap();
    if !format.writes() {
        return;
    }
    let x = activations(50);
    let mut written = 0;
    for other in components(Slot::Dictionary) {
        let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let config: Box<dyn DictionaryConfig> = from_yaml(other.example).unwrap();
        let Ok(mut built) = config.build(&dictionary_cx()) else { continue };
        // The reference's loader would do it, and change the scale of features.
        built.pretrained();
        let config = serde_json::json!({"trainer": {"dict_class": built.class(), "activation_dim": D}});
        saved::write(dir.path(), &*built, &config).unwrap();
        let sae = saved::read(dir.path(), Device::Cpu, Precision::Float32).unwrap();
        let out = out.path().join("out");
        if let Err(error) = format::export(&sae, component.name, &out) {
            assert!(InputError::take(error).is_ok(), "{} with {}", component.name, other.name);
            assert!(!out.exists(), "{} with {}: something stays behind", component.name, other.name);
            continue;
        }
        written += 1;
        let again = format::load(component.name, &out.display().to_string(), Device::Cpu).unwrap();
        let (x_hat, features) = tch::no_grad(|| sae.dictionary.reconstruct(&x));
        let (x_hat_again, features_again) = tch::no_grad(|| again.reconstruct(&x));
        for (one, two) in [(x_hat, x_hat_again), (features, features_again)] {
            assert_eq!(one.size(), two.size());
            let far = ((&one - two).abs().max() / one.abs().max().clamp_min(1e-9)).double_value(&[]);
            assert!(far < 1e-4, "{} with {}: differs by {far}", component.name, other.name);
        }
    }
    assert!(written > 0, "{} writes no dictionary", component.name);
}
