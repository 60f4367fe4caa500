//! The contract that every component keeps. A plugin's test is one call of [`keep`].
//!
//! ```ignore
//! #[test]
//! fn it_keeps_the_contract() {
//!     dictlearn::contract::keep(ComponentKind::Dictionary, "mine");
//! }
//! ```
//!
//! The test must link the component's crate, and the plugins that its example names (`use dictlearn as _;`). A
//! dictionary is tested with every linked trainer, and a trainer with every linked dictionary: each pair must learn, or
//! be refused with a reason.
//!
//! A failure names the broken [`Promise`], what was found, and how to fix it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Debug, Display};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Mutex, OnceLock, PoisonError};

use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::config::Sources;
use crate::run::{evaluate, harvest};
use crate::{config, run};
use dictlearn_core::data::manifest::Dtype;
use dictlearn_core::data::text::TaggedText;
use dictlearn_core::data::{OnNonfinite, TaggedSource};
use dictlearn_core::error::InputKind;
use dictlearn_core::files::from_yaml_in;
use dictlearn_core::files::{from_yaml, tensors};
use dictlearn_core::interrupt::Interrupt;
use dictlearn_core::lm::{ModelCx, Visit};
use dictlearn_core::machine::device;
use dictlearn_core::machine::rng::{rng, seeded};
use dictlearn_core::prelude::*;
use dictlearn_core::registry::{Component, ComponentKind, components, find};
use dictlearn_core::report::{TaggedLogger, TaggedMetric};
use dictlearn_core::sae::{Selection, TaggedDictionary, saved};
use dictlearn_core::train::{
    NotFinite, Quantity, SaeConfig, TaggedModifier, TaggedTrainer, Training, TrainingCx, analytic,
};
use dictlearn_core::{formats, hub, lm, registry};

/// Tests a registered component.
///
/// # Panics
/// If it breaks the contract, with the promise, what was found, and a remedy.
pub fn keep(kind: ComponentKind, name: &str) {
    let Some(component) = find(kind, name) else {
        panic!("no {kind} `{name}` is registered: link its crate in the test (`use my_plugin as _;`)");
    };
    let checks: &[(Check, &Promise)] = match kind {
        ComponentKind::Dictionary => &[
            (encodes_and_decodes, &SHAPES),
            (has_what_penalties_need, &PENALIZED),
            (has_what_selecting_trainers_need, &SELECTS),
            (is_read_back, &READ_BACK),
            (predicts_another_width, &OTHER_WIDTH),
            (scaled_biases_take_scaled_activations, &SCALES),
            (is_trained_or_refused, &PAIR),
        ],
        ComponentKind::Trainer => &[
            (learns_logs_and_resumes, &LEARNS),
            (trains_as_on_a_gpu, &AS_ON_A_GPU),
            (refuses_what_is_not_finite, &NOT_FINITE),
            (refuses_a_gradient_that_is_not_finite, &NOT_FINITE),
            (may_be_longer_if_it_says_so, &LONGER),
            (has_gradients_of_finite_differences, &GRADIENTS),
            (has_the_terms_that_it_declares, &TERMS),
            (analytic_steps_are_autograds, &ANALYTIC),
            (resampling_revives_the_dead, &RESAMPLES),
            (trains_or_refuses, &PAIR),
        ],
        ComponentKind::Modifier => &[(composes_with_trainers, &COMPOSES)],
        ComponentKind::Source => &[(delivers_resumes_and_rewinds, &DELIVERS)],
        ComponentKind::Text => &[(says_the_same_from_any_position, &SEEKS)],
        ComponentKind::Metric => &[(measures_each_dictionary, &MEASURES)],
        ComponentKind::Logger => &[(writes_and_goes_on, &WRITES)],
        ComponentKind::Format => {
            &[(refuses_a_folder_with_nothing_in_it, &REFUSES_NOTHING), (reads_what_it_writes, &WRITES_AND_READS)]
        }
        ComponentKind::Model => &[
            (predicts_tokens_from_those_before, &LOGITS),
            (lists_the_modules_that_it_meets, &MODULES),
            (goes_on_with_what_hooks_make_of_it, &EDITS),
            (opens_from_its_own_files, &OPENS),
            (ignores_no_arithmetic, &ARITHMETIC),
        ],
    };
    for (check, promise) in [(is_described as Check, &DESCRIBED)].iter().chain(checks) {
        // A panic that is not ours comes from the component, or from libtorch.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(component))) {
            let said = panic.downcast_ref::<String>().cloned();
            let said = said.or_else(|| panic.downcast_ref::<&str>().map(|said| (*said).to_owned())).unwrap_or_default();
            if said.contains(BREAKS) {
                resume_unwind(panic);
            }
            promise.broken(&who(component), format!("it panicked: {said}"));
        }
    }
    // Last: the checks above have plainer messages.
    example_trains(component);
}

type Check = fn(&Component);

/// Part of every failure's message.
const BREAKS: &str = "breaks the contract";

/// A promise that a component keeps.
pub struct Promise {
    /// Text of the promise.
    says: &'static str,
    /// How to fix a component that breaks it.
    remedy: &'static str,
}

impl Promise {
    /// Panics if the promise does not hold for `who`.
    fn check(&self, who: &str, holds: bool, found: impl FnOnce() -> String) {
        if !holds {
            self.broken(who, found());
        }
    }

    /// Returns the value of a result that must not be an error.
    fn of<T>(&self, who: &str, result: Result<T>) -> T {
        result.unwrap_or_else(|error| self.broken(who, format!("{error:?}")))
    }

    /// Panics unless both are equal.
    fn same<T: PartialEq + Debug>(&self, who: &str, what: &str, found: T, expected: T) {
        self.check(who, found == expected, || format!("{what} is {found:?}, not {expected:?}"));
    }

    fn broken(&self, who: &str, found: impl Display) -> ! {
        panic!("{who} {BREAKS}\n  promise: {}\n  found: {found}\n  remedy: {}", self.says, self.remedy)
    }
}

fn who(component: &Component) -> String {
    format!("{} `{}`", component.kind, component.name)
}

macro_rules! promises {
    ($($name:ident: $says:expr, $remedy:expr;)*) => {
        $(const $name: Promise = Promise { says: $says, remedy: $remedy };)*
    };
}

// Promises of every component.
promises! {
    DESCRIBED: "its registry entry says what `dictlearn list` and `describe` show",
        "complete its `#[component(...)]`";
    NAMED: "its name is lowercase letters, digits and underscores, and registered once",
        "rename it (`top_k`, not `TopK`): `name` in its `#[component(...)]`";
    SUMMARIZED: "its summary is one line of 1 to 90 characters",
        "shorten `summary` in its `#[component(...)]`; the doc comment of its config may say more";
    DOCUMENTED: "every field of its config has a doc comment, which `dictlearn describe` shows",
        "write `///` above the field: what it is, its unit and its range";
    EXAMPLE: "its `example` is a valid config",
        "give `example` its `name` as `type`, and every required field";
    ROUND_TRIP: "its config reads back as it was written: a run saves it in config.yaml",
        "check serde's attributes (`skip_serializing_if`, `rename`): a field that is not written must have its default";
    EXAMPLE_TRAINS: "its example trains as `dictlearn describe` prints it",
        "train the config of `cargo run -- describe KIND NAME`, and fix `example` or the component";
}

// Promises of dictionaries.
promises! {
    SHAPES: "`encode` returns features [.., F] and `decode` reconstructions [.., d_out], with the widths in `dims`",
        "fix `dims` or the shapes; index dimensions from the last one, -1, so that [B, L, d] works like [B, d]";
    DETERMINISTIC: "the same activations give the same features and the same reconstruction",
        "draw no random numbers in `encode` and `decode`, and let `reconstruction` depend on features and x alone";
    FORWARD: "`forward`, which training uses, returns the features of `encode`",
        "compute both in one function; if training selects over a batch, let `Selection::by_threshold` be true";
    PENALIZED: "the penalised activations, `Code::penalized`, are [B, F] and never negative",
        "if features can be negative, penalise their magnitudes: `code.penalize(features.abs())`";
    SELECTS: "the code of a dictionary with a `selection` has what trainers of the TopK family read: `post_relu` [B, \
              F], the features before the selection; `top_values` [rows, k], the selected magnitudes; and optionally \
              `top_indices` of the same shape",
        "build the code with `Selection::of_each`, `of_batch` or `by_score`, or add `.with(\"post_relu\", ..)` and \
         `.with(\"top_values\", ..)`";
    ANNEALS: "k can change during training, and is saved",
        "return `Selection::buffers` from `buffers`, and call `Selection::loaded` in `loaded`";
    B_DEC: "a parameter `b_dec` is a bias of the reconstruction, `[d_out]`: trainers of the TopK family set it to the \
            geometric median of the first batch",
        "rename it, or add it in `decode`";
    READ_BACK: "a saved dictionary loads and computes the same",
        "list every tensor that `encode` and `decode` use in `parameters` or `buffers`, derive the rest in `loaded`, \
         and submit a `SavedClass` of its class whose `shaped` returns tensors of the saved shapes";
    OTHER_WIDTH: "built for targets whose width differs from the input's, it reconstructs that width",
        "give the decoder and its bias the width `cx.output_dim`, or refuse other widths in `build`";
    SCALES: "after `scale_biases(s)`, activations times s give reconstructions times s",
        "in `scale_biases`, multiply by s whatever is added to activations or compared with them: biases and \
         thresholds (`Selection::scale`); leave weights unchanged, but divide those of a product \
         of k maps by s^(k−1)";
}

// Promises of trainers, and of their pairs with dictionaries.
promises! {
    TRAINS_BY_DEFAULT: "a trainer names the dictionary that it trains by default",
        "add `default_dictionary` to its `#[component(...)]`, and link the crate of that dictionary in the test";
    STEPS_SUCCEED: "a training step succeeds",
        "read the error; if the code lacks a tensor, use `Code::get` instead of `extra`, or refuse the dictionary in \
         `build`";
    LEARNS: "with its example, a trainer explains over 30% of the variance after 200 steps, and halves the \
             unexplained part",
        "check the signs of the loss's terms, and that the example's learning rate and warm-up suit 200 steps";
    UNIT_NORM: "with `unit_norm_decoder`, every decoder direction has norm 1 after a step",
        "do not change decoder weights in `after_step`";
    LOGS: "a logged step has step, sae, loss, l0, frac_variance_explained and lr",
        "keep all of these in `log`";
    LOGGING: "logging does not change the run",
        "draw no random numbers and keep no counts in `log` or where `pass.logging` is read";
    RESUMES: "a resumed run ends on the same weights as an uninterrupted one",
        "save every count and running mean in `state` and load it in `restore`; draw random numbers from `cx.rng`";
    AS_ON_A_GPU: "without a GPU sync at each step, it trains to the same weights",
        "decide with tensor operations (`where_self`, `masked_fill`), not with numbers read from tensors";
    NOT_FINITE: "a step whose loss or gradients are not finite is refused and changes nothing",
        "change nothing in `loss` that `state` saves: note counts there, and apply them in `after_step`";
    LONGER: "if `depends_on_steps` is false, no step depends on the length of the run",
        "return `Schedule::depends_on_steps`, or true";
    GRADIENTS: "each term's gradient matches finite differences",
        "look for a `detach` or an operation without a gradient between the parameter and the term";
    TERMS: "the loss has a reconstruction term, and a sparsity term if and only if `has_sparsity_term`",
        "add them with `Terms::add_reconstruction` and `add_sparsity`; correct `has_sparsity_term`";
    ANALYTIC: "`analytic` returns the terms, gradients and counts of autograd",
        "fix the derivative in `analytic`, or return `None` where it does not hold";
    RESAMPLES: "a trainer with `resample_steps` revives features that never fire",
        "call `Resampling` in `see` and `after_step` as plugins/method-standard does";
    PAIR: "each trainer learns on each dictionary (explains a fifth of the remaining variance in 60 steps), or \
           refuses it in `build`",
        "refuse with `InputError::incompatible`, as `penalizable` does, or correct the loss";
    DEAD: "training continues with dead features: trainers with `dead_feature_threshold` reconstruct from them",
        "provide `post_relu` [B, F] in the code, the features before the selection, and `directions` [F, d_out]";
}

// Promises of other components.
promises! {
    COMPOSES: "a modifier composes with at least one trainer, learns (explains half of the remaining variance in 140 \
               steps) and resumes with each, and names its requirements",
        "declare requirements in `needs`, or refuse with `InputError::incompatible`; save counts in `state`";
    DELIVERS: "a source delivers float32 batches of its sites' widths, resumes where it was, and rewinds",
        "save in `state` everything that the next batch depends on; draw random numbers from \
         `dictlearn_core::machine::rng`";
    SEEKS: "a text returns the same records from any position",
        "count records in `position`, and find the same one in `seek`";
    MEASURES: "a metric returns figures for each dictionary, on at least one source",
        "return one `Figures` for each subject; refuse a source in `refuses`, with the reason";
    WRITES: "after a flush, a logger has every row in the run's folder, and on resuming it drops rows that will be \
             logged again",
        "write each row in `log`, open the file to append, and drop the rows of `resume_at` and later in `build`";
    MODEL_CONFIG: "a model is built from a config.json with Llama's fields and those of its `example`, with random \
                   weights",
        "give `example:` the fields of a small config.json that Llama's lacks: `{n_embd: 32, n_layer: 2}`";
    LOGITS: "a model returns finite float32 logits [B, L, vocabulary], which depend only on their token and those \
             before it",
        "mask attention to positions after the query's, and convert the result of `end` to float32";
    MODULES: "a model lists each module of a pass once, with the widths of its input and output, and stops after the \
              last requested value",
        "call every module through `Hooks::module`, `linear` or `norm` by its path, and return `Stop` with `?`";
    EDITS: "a model continues with the inputs and outputs of modules that hooks return",
        "compute with the values that `Hooks::module` passes to the closure and returns, not with the original ones";
    OPENS: "a model opens from config.json and a file of its `parameters`, and computes the same",
        "return each weight in `parameters` under the name that `load` reads";
    ARITHMETIC: "a field of config.json that changes any family's arithmetic matters to this one, or is refused",
        "implement the field, refuse it with an `InputError` that names it, or omit it from the config struct";
    REFUSES_NOTHING: "a format refuses a folder without an SAE as invalid input",
        "return an `InputError` that says which file is missing";
    WRITES_AND_READS: "a format reads what it writes: features and reconstructions stay the same",
        "in `write`, refuse whatever the format cannot represent before creating a file";
}

const D: i64 = 32;

/// Returns a folder with the files that examples name.
fn examples_folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let dir = TempDir::new().unwrap();
        example_files(dir.path());
        // A program without the Hub has no component that reads from it.
        if inventory::iter::<hub::HubPlugin>.into_iter().next().is_some() {
            hub::use_cache(&dir.path().join("hf/hub")).unwrap();
        }
        dir
    });
    folder.path()
}

/// Parses a component's example.
fn example<T: DeserializeOwned>(component: &Component) -> T {
    let read = from_yaml_in(examples_folder(), component.example);
    read.unwrap_or_else(|error| EXAMPLE.broken(&who(component), format!("{error:?}, in {}", component.example)))
}

/// Writes the files that examples name to a folder in which they run.
pub fn example_files(dir: &Path) {
    let (rows, ids) = seeded(1, || (activations(1000), Tensor::randint(100, [16, 24], (Kind::Int64, Device::Cpu))));
    tensors::write(&dir.join("activations.safetensors"), &[("activations", rows)]).unwrap();
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
    harvest::write(&mut source, &out, None, Dtype::Float32, &interrupt).unwrap();
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
        bail!("its norm is not needed")
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

/// Returns activations [n, D] of a few directions each, so that there is something to learn.
fn activations(n: i64) -> Tensor {
    let options = (Kind::Float, Device::Cpu);
    let features = Tensor::rand([n, 64], options).relu() * Tensor::rand([n, 64], options).less(0.1);
    features.matmul(&Tensor::randn([64, D], options)) + 0.1
}

fn dictionary_cx() -> DictionaryCx<'static> {
    DictionaryCx { activation_dim: D, output_dim: D, parts: &[], device: Device::Cpu, precision: Precision::Float32 }
}

fn dictionary(component: &Component) -> Box<dyn Dictionary> {
    let config: Box<dyn TaggedDictionary> = example(component);
    EXAMPLE.of(&who(component), seeded(5, || config.build(&dictionary_cx())))
}

/// Parses an example as a config of its kind, writes it as YAML, and parses that. Returns both results.
fn round_trip(component: &Component) -> (Value, Value) {
    macro_rules! as_config {
        ($config:ty) => {{
            let read = |promise: Promise, yaml: &str| {
                let config = from_yaml_in::<Box<$config>>(examples_folder(), yaml);
                let config =
                    config.unwrap_or_else(|error| promise.broken(&who(component), format!("{error:?}, in {yaml}")));
                promise.of(&who(component), serde_json::to_value(&config).context("it cannot be serialised"))
            };
            let once = read(EXAMPLE, component.example);
            let twice = read(ROUND_TRIP, &serde_yaml::to_string(&once).unwrap());
            (once, twice)
        }};
    }
    match component.kind {
        ComponentKind::Dictionary => as_config!(dyn TaggedDictionary),
        ComponentKind::Trainer => as_config!(dyn TaggedTrainer),
        ComponentKind::Modifier => as_config!(dyn TaggedModifier),
        ComponentKind::Source => as_config!(dyn TaggedSource),
        ComponentKind::Text => as_config!(dyn TaggedText),
        ComponentKind::Metric => as_config!(dyn TaggedMetric),
        ComponentKind::Logger => as_config!(dyn TaggedLogger),
        // Named by files, not by configs.
        ComponentKind::Model | ComponentKind::Format => (Value::Null, Value::Null),
    }
}

fn is_described(component: &Component) {
    let Component { kind, name, summary, .. } = component;
    let who = who(component);
    NAMED.of(&who, registry::check());
    let plain = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    NAMED.check(&who, plain, || format!("`{name}`"));
    let short = !summary.is_empty() && summary.len() <= 90 && !summary.contains('\n');
    SUMMARIZED.check(&who, short, || format!("{summary:?}, {} characters", summary.len()));
    if matches!(kind, ComponentKind::Model | ComponentKind::Format) {
        return;
    }
    let schema = (component.schema)().to_value();
    for (field, schema) in schema["properties"].as_object().into_iter().flatten() {
        DOCUMENTED.check(&who, schema["description"].is_string(), || format!("`{field}` has none"));
    }
    let (once, twice) = round_trip(component);
    EXAMPLE.same(&who, "its type", &once["type"], &Value::from(*name));
    ROUND_TRIP.same(&who, "what was read back", twice, once);
}

/// Checks that the config of `dictlearn describe` trains.
fn example_trains(component: &Component) {
    if matches!(component.kind, ComponentKind::Model | ComponentKind::Format) {
        return;
    }
    let Some(example) = config::example(component, examples_folder()) else {
        EXAMPLE_TRAINS.broken(&who(component), "no linked source or dictionary suits it")
    };
    let dir = TempDir::new().unwrap();
    // Paths are relative to the config file, so it is in the folder of the examples' files.
    let file = examples_folder().join(format!("{}-{}.yaml", component.kind, component.name));
    std::fs::write(&file, &example).unwrap();
    // Fewer steps, for a fast test; the schedules of examples fit in.
    let sources = Sources { file, set: vec!["steps=50".to_owned()], ..Sources::default() };
    let train = || {
        let mut config = config::load(&sources)?;
        run::train(&mut config, &dir.path().join("run"), false, &Interrupt::default())?;
        anyhow::Ok(())
    };
    let trained = train();
    if let Err(error) = trained {
        EXAMPLE_TRAINS.broken(&who(component), format!("{error:?}, in\n{example}"));
    }
}

fn encodes_and_decodes(component: &Component) {
    let x = activations(50);
    let (who, dictionary) = (who(component), dictionary(component));
    let dims = dictionary.dims();
    SHAPES.same(&who, "the width of the input in `dims`", dims.input, D);
    let (x_hat, features) = tch::no_grad(|| dictionary.reconstruct(&x));
    SHAPES.same(&who, "the features' shape", features.size(), vec![50, dims.features]);
    SHAPES.same(&who, "the reconstruction's shape", x_hat.size(), vec![50, dims.output]);
    let again = tch::no_grad(|| dictionary.reconstruction(&dictionary.encode(&x), &x));
    DETERMINISTIC.check(&who, again == x_hat, || format!("it changes by up to {}", greatest(&(&again - &x_hat))));
    // Training encodes as users do, except for selections over a batch, which users make by a threshold.
    if !dictionary.selection().is_some_and(Selection::by_threshold) {
        let trained = tch::no_grad(|| dictionary.forward(&x).features);
        FORWARD
            .check(&who, trained == features, || format!("they differ by up to {}", greatest(&(&trained - &features))));
    }
    // Three dimensions, as in a model, must work like two.
    let three = tch::no_grad(|| dictionary.reconstruct(&x.view([5, 10, D])).0);
    SHAPES.same(&who, "the reconstruction's shape of [5, 10, d]", three.size(), vec![5, 10, dims.output]);
    let apart = greatest(&(three.view([50, dims.output]) - &x_hat));
    SHAPES
        .check(&who, apart < 1e-5, || format!("reconstructions of [5, 10, d] differ from those of [50, d] by {apart}"));
}

/// Returns the greatest magnitude in a tensor.
fn greatest(tensor: &Tensor) -> f64 {
    tensor.abs().max().double_value(&[])
}

fn has_what_penalties_need(component: &Component) {
    is_penalizable(&who(component), &*dictionary(component), &activations(50));
}

fn is_penalizable(who: &str, dictionary: &dyn Dictionary, x: &Tensor) {
    let code = tch::no_grad(|| dictionary.forward(x));
    let penalized = code.penalized();
    PENALIZED.same(who, "their shape", penalized.size(), vec![x.size()[0], dictionary.dims().features]);
    let least = penalized.min().double_value(&[]);
    PENALIZED.check(who, least >= 0.0, || format!("the smallest is {least}; a penalty on them would be negative"));
}

/// Checks a dictionary with a selection.
fn has_what_selecting_trainers_need(component: &Component) {
    let (who, dictionary) = (who(component), dictionary(component));
    let (x, dims) = (activations(50), dictionary.dims());
    let bias = dictionary.parameters().into_iter().find(|(name, _)| *name == "b_dec");
    if let Some((_, bias)) = bias {
        B_DEC.same(&who, "its shape", bias.size(), vec![dims.output]);
    }
    let Some(k) = dictionary.selection().map(Selection::k) else { return };
    let selects = |dictionary: &dyn Dictionary, k: i64| {
        let code = tch::no_grad(|| dictionary.forward(&x));
        let get = |name: &str| {
            code.get(name).unwrap_or_else(|| SELECTS.broken(&who, format!("`forward` gives a code without `{name}`")))
        };
        let (candidates, values) = (get("post_relu"), get("top_values"));
        SELECTS.same(&who, "the shape of `post_relu`", candidates.size(), vec![50, dims.features]);
        SELECTS.same(&who, "the number of `top_values`", values.numel() as i64, 50 * k);
        SELECTS.check(&who, values.min().double_value(&[]) >= 0.0, || "`top_values` are negative".to_owned());
        if let Some(indices) = code.get("top_indices") {
            SELECTS.same(&who, "the shape of `top_indices`", indices.size(), values.size());
        }
        let selected = code.features.not_equal(0.0);
        let other = (&code.features - candidates).masked_select(&selected);
        let tolerance = 1e-5 * greatest(candidates).max(1e-9);
        SELECTS.check(&who, other.numel() == 0 || greatest(&other) < tolerance, || {
            format!("selected features are not those in `post_relu`: they differ by {}", greatest(&other))
        });
    };
    selects(&*dictionary, k);
    dictionary.selection().iter().for_each(|selection| selection.set_k(k + 1));
    selects(&*dictionary, k + 1);
    let read = saved_and_read(&ANNEALS, &who, &*dictionary);
    let read = read.selection().unwrap_or_else(|| ANNEALS.broken(&who, "what is read back has no selection"));
    ANNEALS.same(&who, "k, read back,", read.k(), k + 1);
    // As a resumed run does: into a dictionary built from the config.
    let mut resumed = self::dictionary(component);
    let tensors =
        dictionary.state_dict().into_iter().map(|(name, tensor)| (name.to_owned(), tensor.detach())).collect();
    ANNEALS.of(&who, resumed.load(&tensors, Path::new("checkpoint")));
    let loaded = resumed.selection().map(Selection::k);
    ANNEALS.same(&who, "k, loaded in place,", loaded, Some(k + 1));
}

fn saved_and_read(promise: &Promise, who: &str, dictionary: &dyn Dictionary) -> Box<dyn Dictionary> {
    let dir = TempDir::new().unwrap();
    let config = serde_json::json!({"trainer": {"dict_class": dictionary.class(), "activation_dim": D}});
    promise.of(who, saved::write(dir.path(), dictionary, &config));
    promise.of(who, saved::read(dir.path(), Device::Cpu, Precision::Float32)).dictionary
}

fn is_read_back(component: &Component) {
    let (who, dictionary) = (who(component), dictionary(component));
    // With numbers that a new one does not have.
    for (_, tensor) in dictionary.parameters() {
        let _ = tch::no_grad(|| tensor.shallow_clone().g_add_(&(tensor.randn_like() * 0.05)));
    }
    for (_, tensor) in dictionary.buffers() {
        if tensor.kind() == Kind::Float {
            let _ = tensor.shallow_clone().fill_(0.05);
        }
    }
    reads_back_the_same(&READ_BACK, &who, &*dictionary);
}

fn reads_back_the_same(promise: &Promise, who: &str, dictionary: &dyn Dictionary) {
    let x = activations(50);
    let read = saved_and_read(promise, who, dictionary);
    let names = |dictionary: &dyn Dictionary| dictionary.state_dict().iter().map(|(name, _)| *name).collect::<Vec<_>>();
    promise.same(who, "the list of its tensors, read back,", names(&*read), names(dictionary));
    promise.same(who, "`dims`, read back,", read.dims(), dictionary.dims());
    let (x_hat, again) = tch::no_grad(|| (dictionary.reconstruct(&x).0, read.reconstruct(&x).0));
    promise.check(who, x_hat == again, || {
        format!("the reconstruction, read back, differs by up to {}", greatest(&(again - &x_hat)))
    });
}

/// Checks another output width, unless the dictionary refuses it.
fn predicts_another_width(component: &Component) {
    let (who, output_dim) = (who(component), D + 3);
    let config: Box<dyn TaggedDictionary> = example(component);
    let Ok(dictionary) = config.build(&DictionaryCx { output_dim, ..dictionary_cx() }) else { return };
    if dictionary.dims().output != output_dim {
        return;
    }
    let (x_hat, _) = tch::no_grad(|| dictionary.reconstruct(&activations(50)));
    OTHER_WIDTH.same(&who, "the reconstruction's shape", x_hat.size(), vec![50, output_dim]);
    reads_back_the_same(&OTHER_WIDTH, &who, &*dictionary);
}

fn scaled_biases_take_scaled_activations(component: &Component) {
    // A dictionary trained on activations divided by s, then scaled, maps x to s times what it mapped x / s to.
    let x = activations(50);
    let (who, mut dictionary) = (who(component), dictionary(component));
    // Parameters that start at 0 would hide wrong scaling, so give them other values.
    for (_, tensor) in dictionary.parameters() {
        let _ = tch::no_grad(|| match tensor.dim() {
            1 => tensor.shallow_clone().uniform_(0.0, 0.1),
            _ => tensor.shallow_clone().g_add_(&(tensor.randn_like() * 0.05)),
        });
    }
    for (_, tensor) in dictionary.buffers() {
        if tensor.kind() == Kind::Float {
            let _ = tensor.shallow_clone().fill_(0.05);
        }
    }
    let scale = 3.0;
    let tensors = |dictionary: &dyn Dictionary| {
        let all = dictionary.state_dict().into_iter();
        all.map(|(name, tensor)| (name, tensor.detach().to_kind(Kind::Double).copy())).collect::<Vec<_>>()
    };
    let old = tensors(&*dictionary);
    let before = tch::no_grad(|| dictionary.reconstruct(&(&x / scale)));
    dictionary.scale_biases(scale);
    let after = tch::no_grad(|| dictionary.reconstruct(&x));
    // Compare reconstructions only: a crosscoder's features stay unscaled, and its parts' scales take s.
    let (after, before) = (after.0, before.0 * scale);
    let off = greatest(&(&after - &before)) / greatest(&before).max(1e-9);
    SCALES.check(&who, off < 1e-3, || {
        let done = old.iter().zip(tensors(&*dictionary)).map(|((name, old), (_, new))| {
            let done = match () {
                () if new == *old => "left as it was",
                () if new.allclose(&(old * scale), 1e-5, 1e-8, false) => "scaled",
                () => "changed otherwise",
            };
            format!("`{name}` was {done}")
        });
        let done = done.collect::<Vec<_>>().join(", ");
        format!("reconstructions are off by {:.0}% after `scale_biases({scale})`; {done}", 100.0 * off)
    });
}

fn sae(trainer: &Component) -> SaeConfig {
    let found = || match trainer.default_dictionary {
        Some(name) => format!("no dictionary `{name}` is registered"),
        None => "it names none".to_owned(),
    };
    let dictionary = trainer.default_dictionary.and_then(|name| find(ComponentKind::Dictionary, name));
    let dictionary = dictionary.unwrap_or_else(|| TRAINS_BY_DEFAULT.broken(&who(trainer), found()));
    SaeConfig {
        name: trainer.name.to_owned(),
        site: None,
        dictionary: example(dictionary),
        trainer: example(trainer),
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

/// Returns the batches that all checks train on, drawn once in each thread.
fn batches() -> Rc<[Batch]> {
    thread_local! {
        static DRAWN: Rc<[Batch]> =
            seeded(2, || activations(STEPS as i64 * 64)).split(64, 0).into_iter().map(Batch::of).collect();
    }
    DRAWN.with(Rc::clone)
}

fn weights(training: &Training) -> BTreeMap<String, Vec<u8>> {
    let state = training.dictionary.state_dict();
    state
        .into_iter()
        .map(|(name, tensor)| (name.to_owned(), tensors::serialize(&[("", tensor)], &[]).unwrap()))
        .collect()
}

/// Starts training of a trainer's example on the example of its default dictionary.
fn new_training(trainer: &Component, cx: &TrainingCx) -> Training {
    STEPS_SUCCEED.of(&who(trainer), Training::new(&sae(trainer), cx))
}

/// Takes a logged step. Returns the fraction of variance that it explains.
fn logged_step(who: &str, training: &mut Training, step: usize, batch: &Batch) -> f64 {
    let row = STEPS_SUCCEED.of(who, training.step(step as u64, batch, true));
    let row = row.unwrap_or_else(|| LOGS.broken(who, format!("nothing at step {step}")));
    for figure in ["step", "sae", "loss", "l0", "frac_variance_explained", "lr"] {
        LOGS.check(who, row.contains_key(figure), || format!("no `{figure}` at step {step}"));
    }
    let explained = &row["frac_variance_explained"];
    explained.as_f64().unwrap_or_else(|| LOGS.broken(who, format!("frac_variance_explained is {explained}")))
}

fn silent_step(who: &str, training: &mut Training, step: usize, batch: &Batch) {
    STEPS_SUCCEED.of(who, training.step(step as u64, batch, false));
}

/// Returns the names of the tensors in which two trainings differ.
fn differing(one: &Training, other: &Training) -> Vec<String> {
    let (one, other) = (weights(one), weights(other));
    one.into_iter().filter(|(name, bytes)| other.get(name) != Some(bytes)).map(|(name, _)| name).collect()
}

/// Fails unless both trainings have the same weights.
fn end_alike(promise: &Promise, who: &str, one: &Training, other: &Training) {
    let differing = differing(one, other);
    promise.check(who, differing.is_empty(), || format!("weights that differ: {}", differing.join(", ")));
}

fn learns_logs_and_resumes(trainer: &Component) {
    let batches = batches();
    let who = who(trainer);
    let new = || new_training(trainer, &training_cx());
    let (mut logged, mut silent, mut resumed) = (new(), new(), new());
    let mut explained = Vec::new();
    for (step, batch) in batches.iter().enumerate() {
        explained.push(logged_step(&who, &mut logged, step, batch));
        silent_step(&who, &mut silent, step, batch);
        if step == 100 {
            // A new training: everything it needs must be in the state.
            let state = RESUMES.of(&who, silent.state());
            resumed = new();
            RESUMES.of(&who, resumed.restore(&state));
        }
        if step > 100 {
            silent_step(&who, &mut resumed, step, batch);
        }
    }
    if logged.trainer.constraints().unit_norm_decoder {
        let decoder = logged.dictionary.decoder();
        let decoder = decoder.unwrap_or_else(|| UNIT_NORM.broken(&who, "its dictionary has no decoder"));
        let apart = greatest(&(decoder.norms() - 1.0));
        UNIT_NORM.check(&who, apart < 1e-5, || format!("they are off by {apart}"));
    }
    let last = explained[explained.len() - 20..].iter().sum::<f64>() / 20.0;
    LEARNS.check(&who, last > 0.3 && 1.0 - last < 0.5 * (1.0 - explained[0]), || {
        format!("{:.1}% at the first step, {:.1}% at the last", 100.0 * explained[0], 100.0 * last)
    });
    end_alike(&LOGGING, &who, &logged, &silent);
    end_alike(&RESUMES, &who, &resumed, &silent);
}

/// Returns a batch with one number replaced.
fn with_a(number: f64, batch: &Batch) -> Batch {
    let x = batch.x.copy();
    let _ = x.get(3).get(5).fill_(number);
    Batch::of(x)
}

/// Fails unless a step was refused because its loss or its gradient is not finite.
fn is_refused<T>(who: &str, result: Result<T>, step: u64, quantity: Quantity) {
    let Err(error) = result else {
        NOT_FINITE.broken(who, format!("step {step} succeeds, though the {quantity:?} is not finite"))
    };
    let found = error.downcast_ref::<NotFinite>().map(|found| (found.step, found.quantity));
    NOT_FINITE.check(who, found == Some((step, quantity)), || {
        format!("an error that is not `NotFinite` of the {quantity:?} at step {step}: {error:#}")
    });
}

/// Fails if a refused step changed the state.
fn is_unchanged(who: &str, training: &Training, before: &State) {
    let after = NOT_FINITE.of(who, training.state());
    NOT_FINITE.check(who, after == *before, || "the refused step changed its state".to_owned());
}

/// Checks a GPU's code paths on the CPU: they read no numbers at each step.
fn trains_as_on_a_gpu(trainer: &Component) {
    let who = who(trainer);
    let batches = batches();
    let train = || {
        let mut training = new_training(trainer, &training_cx());
        for (step, batch) in batches[..30].iter().enumerate() {
            silent_step(&who, &mut training, step, batch);
        }
        training
    };
    let default = train();
    device::as_a_gpu(|| {
        let mut training = train();
        AS_ON_A_GPU.of(&who, training.settle());
        for ((parameter, found), (_, expected)) in
            training.dictionary.parameters().into_iter().zip(default.dictionary.parameters())
        {
            let off = (found - &expected).norm().double_value(&[]) / expected.norm().double_value(&[]).max(1e-6);
            AS_ON_A_GPU.check(&who, off < 1e-3, || format!("`{parameter}` is off by {:.1}%", 100.0 * off));
        }
        // Started on a CPU, and resumed on a GPU.
        let mut moved = new_training(trainer, &training_cx());
        let state = RESUMES.of(&who, default.state());
        RESUMES.of(&who, moved.restore(&state));
        let again = RESUMES.of(&who, moved.state());
        RESUMES.check(&who, again == state, || {
            "its state differs after restoring it with the code path of a GPU".to_owned()
        });
        silent_step(&who, &mut moved, 30, &batches[30]);
        AS_ON_A_GPU.of(&who, moved.settle());
        silent_step(&who, &mut training, 30, &with_a(f64::NAN, &batches[30]));
        silent_step(&who, &mut training, 31, &batches[31]);
        is_refused(&who, training.settle(), 30, Quantity::Loss);
        learns_logs_and_resumes(trainer);
    });
}

/// Checks that a run can be extended if no step depends on its length.
fn may_be_longer_if_it_says_so(trainer: &Component) {
    let (who, batches) = (who(trainer), batches());
    let train = |steps| {
        let cx = TrainingCx { steps, ..training_cx() };
        let mut training = new_training(trainer, &cx);
        for (step, batch) in batches.iter().enumerate() {
            silent_step(&who, &mut training, step, batch);
        }
        training
    };
    let short = train(STEPS);
    if !short.trainer.depends_on_steps() {
        let (short, long) = (RESUMES.of(&who, short.state()), RESUMES.of(&who, train(3 * STEPS).state()));
        LONGER.check(&who, short == long, || {
            format!("step {STEPS} differs between runs of {STEPS} and {} steps", 3 * STEPS)
        });
    }
}

fn refuses_what_is_not_finite(trainer: &Component) {
    let batches = batches();
    let who = who(trainer);
    let mut training = new_training(trainer, &training_cx());
    // At the first step, which initialises, and later, when counters and thresholds are kept.
    for good in [0, 80] {
        for (step, batch) in batches[..good].iter().enumerate() {
            silent_step(&who, &mut training, step, batch);
        }
        let before = RESUMES.of(&who, training.state());
        for bad in [f64::NAN, f64::INFINITY] {
            let step = good as u64;
            is_refused(&who, training.step(step, &with_a(bad, &batches[good]), true), step, Quantity::Loss);
            is_unchanged(&who, &training, &before);
        }
    }
}

/// Makes one number of each gradient NaN at some step.
struct Poison {
    steps: u64,
    at: u64,
}

impl Modifier for Poison {
    fn gradients(&mut self, gradients: &Gradients, _: &dyn Dictionary) -> Result<()> {
        if self.steps == self.at {
            for (_, gradient) in gradients.iter() {
                // `reshape` would copy a non-contiguous gradient.
                let mut number = gradient.shallow_clone();
                while number.dim() > 0 {
                    number = number.get(0);
                }
                let _ = number.fill_(f64::NAN);
            }
        }
        Ok(())
    }

    fn after_step(&mut self, _: &mut AfterStep) -> Result<()> {
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
    let (batches, who) = (batches(), who(trainer));
    let train = |on_nonfinite| {
        let mut training = new_training(trainer, &training_cx());
        training.on_nonfinite = on_nonfinite;
        training.modify(Box::new(Poison { steps: 0, at: AT }));
        for step in 0..AT {
            silent_step(&who, &mut training, step as usize, &batches[step as usize]);
        }
        training
    };
    let at_once = |on_nonfinite| {
        let mut training = train(on_nonfinite);
        let before = RESUMES.of(&who, training.state());
        is_refused(&who, training.step(AT, &batches[AT as usize], true), AT, Quantity::Gradient);
        is_unchanged(&who, &training, &before);
    };
    at_once(OnNonfinite::Stop);
    device::as_a_gpu(|| {
        // To skip a batch, the check must not be deferred.
        at_once(OnNonfinite::SkipBatch);
        let mut training = train(OnNonfinite::Stop);
        silent_step(&who, &mut training, AT as usize, &batches[AT as usize]);
        is_refused(&who, training.settle(), AT, Quantity::Gradient);
    });
}

/// Returns the terms of a loss, computed as in a step.
fn terms(who: &str, training: &mut Training, batch: &Batch, step: u64) -> Terms {
    let mut terms = Terms::new();
    let pass = Pass::forward(&*training.trainer, &*training.dictionary, batch, step, false);
    STEPS_SUCCEED.of(who, training.trainer.loss(&pass, &mut terms));
    if let Some((name, value)) = training.dictionary.auxiliary_loss(batch, &pass.code) {
        terms.add(name, value, 1.0);
    }
    terms
}

fn has_gradients_of_finite_differences(trainer: &Component) {
    const STEP: u64 = 100;
    let (batches, who) = (batches(), who(trainer));
    let mut training = new_training(trainer, &training_cx());
    for (step, batch) in batches[..STEP as usize].iter().enumerate() {
        silent_step(&who, &mut training, step, batch);
    }
    // From here on in float64: finite differences need its precision.
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
    let names: Vec<&str> = terms(&who, &mut training, &batch, STEP).iter().map(|term| term.name).collect();
    // Weights of the encoder and the decoder. In other parameters, such as thresholds, a loss may be a step function.
    let encoder = training.dictionary.encoder();
    let decoder = training.dictionary.decoder();
    let maps: Vec<&str> = encoder.iter().map(|map| map.weight.name).chain(decoder.iter().map(|map| map.name)).collect();
    let mut smooth = 0;
    for (parameter_name, parameter) in training.dictionary.parameters() {
        let mut verified = false;
        let mut straight_through = false;
        for name in &names {
            let value = |training: &mut Training| {
                let mut terms = terms(&who, training, &batch, STEP);
                let term = terms.get_mut(name);
                term.unwrap_or_else(|| GRADIENTS.broken(&who, format!("`{name}` is not in every loss"))).value.copy()
            };
            // An auxiliary loss may stop the gradient to the decoder, which finite differences would still see.
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
            // Near zero, powers of an activation curve too much for the wider difference.
            let differences = [1e-6, 1e-7].map(|h| (at(h) - at(-h)) / (2.0 * h));
            if differences[0].abs() < 1e-9 {
                // A step function, which a straight-through estimator stands in for.
                straight_through = true;
                continue;
            }
            let along = (grad * &direction).sum(Kind::Double).double_value(&[]);
            let near = differences.iter().any(|found| (along - found).abs() < 1e-5 * found.abs().max(1e-3));
            GRADIENTS.check(&who, near, || {
                format!("`{name}` by `{parameter_name}`: {along} by autograd, {:?} by finite differences", differences)
            });
            verified = true;
        }
        let found = || format!("no term has a gradient by `{parameter_name}`");
        GRADIENTS.check(&who, verified || straight_through && !maps.contains(&parameter_name), found);
        smooth += usize::from(verified);
    }
    GRADIENTS.check(&who, smooth > 0, || "no parameter has a gradient that finite differences confirm".to_owned());
}

/// Setting in which a trainer's analytic step is tested.
#[derive(Debug, Clone, Copy, PartialEq)]
enum AnalyticCase {
    /// As in training.
    Dense,
    /// With so few active features that they are stored as lists.
    FewFeatures,
    /// With features that count as dead.
    DeadFeatures,
    /// With products in bfloat16.
    BFloat16,
    /// With the GPU's code path: libtorch's operations in place of our own loops.
    OnGpu,
    /// With the GPU's code path in bfloat16.
    OnGpuBFloat16,
}

/// Compares a trainer's analytic step, if it has one, with autograd on every dictionary that it trains.
fn analytic_steps_are_autograds(trainer: &Component) {
    for dictionary in components(ComponentKind::Dictionary) {
        use AnalyticCase::{BFloat16, DeadFeatures, Dense, FewFeatures, OnGpu, OnGpuBFloat16};
        for case in [Dense, FewFeatures, DeadFeatures, BFloat16, OnGpu, OnGpuBFloat16] {
            analytic_step_is_autograds(trainer, dictionary, case);
        }
    }
}

fn analytic_step_is_autograds(trainer: &Component, dictionary: &Component, case: AnalyticCase) {
    let who = format!("{} on {}, case {case:?},", self::who(trainer), self::who(dictionary));
    let mut fields: serde_yaml::Mapping = serde_yaml::from_str(trainer.example).unwrap();
    let on_gpu = matches!(case, AnalyticCase::OnGpu | AnalyticCase::OnGpuBFloat16);
    let bfloat16 = matches!(case, AnalyticCase::BFloat16 | AnalyticCase::OnGpuBFloat16);
    if on_gpu || case == AnalyticCase::DeadFeatures {
        if has_field(trainer, "dead_feature_threshold") {
            fields.insert("dead_feature_threshold".into(), 100.into());
        } else if case == AnalyticCase::DeadFeatures {
            return;
        }
    }
    let mut example: serde_yaml::Mapping = serde_yaml::from_str(dictionary.example).unwrap();
    if case == AnalyticCase::OnGpuBFloat16 && example.contains_key("k") {
        // Select all features: rounding would change the selection at its edge.
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
    // The trainer refuses dictionaries that it cannot train.
    let Ok(mut training) = Training::new(&sae, &cx) else { return };
    let batches = batches();
    let dictionary = &*training.dictionary;
    let gradients = Gradients::new(dictionary.parameters());
    let first = AnalyticPass { step: 0, batch: &batches[0], dictionary, gradients: &gradients, logging: true };
    if ANALYTIC.of(&who, tch::no_grad(|| training.trainer.analytic(&first, &mut Terms::new()))).is_none() {
        return;
    }
    for (step, batch) in batches[..20].iter().enumerate() {
        silent_step(&who, &mut training, step, batch);
    }
    if case == AnalyticCase::FewFeatures {
        let encoder = training.dictionary.encoder();
        let encoder = encoder.unwrap_or_else(|| ANALYTIC.broken(&who, "it has `between` but no `encoder`"));
        let active = || tch::no_grad(|| training.dictionary.forward(&batches[20].x).features.not_equal(0.0));
        while active().to_kind(Kind::Float).mean(Kind::Float).double_value(&[]) > 0.09 {
            let biases = training.dictionary.parameters().into_iter();
            let biases = biases.filter(|(name, _)| encoder.biases.contains(name));
            tch::no_grad(|| biases.for_each(|(_, mut bias)| bias -= 0.1));
        }
    }
    let (batch, before) = (&batches[20], RESUMES.of(&who, training.state()));
    let mut analytic = Terms::new();
    let pass =
        AnalyticPass { step: 20, batch, dictionary: &*training.dictionary, gradients: &gradients, logging: true };
    // Gradients may be written to the memory of the last ones; unwritten elements stay NaN.
    for (_, gradient) in gradients.iter() {
        let _ = gradient.shallow_clone().fill_(f64::NAN);
    }
    let take = || ANALYTIC.of(&who, tch::no_grad(|| training.trainer.analytic(&pass, &mut analytic)));
    let found = if on_gpu { device::as_a_gpu(take) } else { analytic::with_tile_width(96, take) };
    let Some(found) = found else {
        let between = training.dictionary.between();
        let relu = matches!(between, Some(Between::Elementwise(activation)) if activation.on_gpu());
        let selects = training.dictionary.selection().is_some();
        ANALYTIC.check(&who, on_gpu && !relu && !selects, || "`None` at step 20, not at the first".to_owned());
        return;
    };
    let gradients: Vec<_> = found.gradients.iter().map(|(name, gradient)| (*name, gradient.copy())).collect();
    let after_step = |training: &mut Training| {
        let mut optimizer = Adam::new(training.trainer.adam(), training.dictionary.parameters());
        let mut rng = rng(0, "contract");
        let (dictionary, optimizer) = (&mut *training.dictionary, &mut optimizer);
        let mut cx = AfterStep { step: 20, batch, dictionary, optimizer, rng: &mut rng };
        STEPS_SUCCEED.of(&who, training.trainer.after_step(&mut cx));
    };
    after_step(&mut training);
    let counted = RESUMES.of(&who, training.trainer.state());
    RESUMES.of(&who, training.restore(&before));
    for (_, parameter) in training.dictionary.parameters() {
        parameter.shallow_clone().zero_grad();
    }
    let mut terms = Terms::new();
    let autograd = Pass::forward(&*training.trainer, &*training.dictionary, batch, 20, false);
    STEPS_SUCCEED.of(&who, training.trainer.loss(&autograd, &mut terms));
    if let Some((name, value)) = training.dictionary.auxiliary_loss(batch, &autograd.code) {
        terms.add(name, value, 1.0);
    }
    terms.total().unwrap().backward();
    let tolerance = if bfloat16 { 2e-2 } else { 1e-4 };
    let close = |what: &str, found: &Tensor, expected: &Tensor| {
        let apart = (found - expected).norm().double_value(&[]);
        let scale = expected.norm().double_value(&[]).max(1e-6);
        ANALYTIC.check(&who, apart < tolerance * scale, || format!("{what} is off by {:.3}%", 100.0 * apart / scale));
    };
    for term in terms.iter() {
        let other = analytic.get_mut(term.name);
        let other = other.unwrap_or_else(|| ANALYTIC.broken(&who, format!("the term `{}` is missing", term.name)));
        let what = format!("role and weight of `{}`", term.name);
        ANALYTIC.same(&who, &what, (other.role, other.weight), (term.role, term.weight));
        close(term.name, &other.value, &term.value.detach());
    }
    let fired = found.fired.unwrap_or_else(|| ANALYTIC.broken(&who, "`fired` is `None` at a logged step"));
    if case == AnalyticCase::FewFeatures {
        let part = fired.mean(Kind::Double).double_value(&[]) / batch.len() as f64;
        ANALYTIC.check(&who, part > 0.0 && part < 0.1, || format!("{part} of the features fire with biases lowered"));
    }
    let active = autograd.code.features.detach().not_equal(0.0).sum_dim_intlist([0].as_slice(), false, Kind::Float);
    close("how often features fired", &fired.to_kind(Kind::Float), &active);
    let error = found.error.unwrap_or_else(|| ANALYTIC.broken(&who, "`error` is `None` at a logged step"));
    close("the reconstruction", &(&batch.target + error), &autograd.x_hat.detach());
    for (parameter_name, parameter) in training.dictionary.parameters() {
        let expected = parameter.grad();
        let expected = if expected.defined() { expected } else { parameter.detach().zeros_like() };
        let gradient = gradients.iter().find(|(known, _)| *known == parameter_name);
        match gradient {
            Some((_, gradient)) => close(parameter_name, gradient, &expected),
            None => ANALYTIC
                .check(&who, greatest(&expected) == 0.0, || format!("`gradients` has none by `{parameter_name}`")),
        }
    }
    // With rounding, a feature near its threshold may fire in one step and not in the other.
    if !bfloat16 {
        after_step(&mut training);
        for (key, tensor) in RESUMES.of(&who, training.trainer.state()).tensors() {
            let found = ANALYTIC.of(&who, counted.tensor(key)).to_kind(Kind::Float);
            close(&format!("`{key}` in its state"), &found, &tensor.to_kind(Kind::Float));
        }
    }
}

fn has_the_terms_that_it_declares(trainer: &Component) {
    let who = who(trainer);
    let mut training = new_training(trainer, &training_cx());
    let batch = &batches()[0];
    // The first step initialises from data.
    silent_step(&who, &mut training, 0, batch);
    let terms = terms(&who, &mut training, batch, 1);
    let has = |role: Role| terms.iter().any(|term| term.role == role);
    let says = training.trainer.has_sparsity_term();
    TERMS.check(&who, has(Role::Sparsity) == says, || {
        format!("`has_sparsity_term` is {says}, but the loss has {} sparsity term", if says { "no" } else { "a" })
    });
    TERMS.check(&who, has(Role::Reconstruction), || "no reconstruction term".to_owned());
}

/// Checks resampling, if the trainer offers it.
fn resampling_revives_the_dead(trainer: &Component) {
    let batches = batches();
    if !has_field(trainer, "resample_steps") {
        return;
    }
    for weight in ["loss", "loss_squared"] {
        let who = format!("{}, `resample_weight: {weight}`,", who(trainer));
        let mut fields: serde_yaml::Mapping = serde_yaml::from_str(trainer.example).unwrap();
        fields.insert("resample_steps".into(), 15.into());
        fields.insert("resample_weight".into(), weight.into());
        let yaml = serde_yaml::to_string(&fields).unwrap();
        let sae = SaeConfig { trainer: RESAMPLES.of(&who, from_yaml(&yaml).map_err(Into::into)), ..sae(trainer) };
        let mut training = RESAMPLES.of(&who, Training::new(&sae, &training_cx()));
        let encoder = training.dictionary.encoder();
        let encoder = encoder.unwrap_or_else(|| RESAMPLES.broken(&who, "its dictionary has no `encoder` to resample"));
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
            silent_step(&who, &mut training, step, batch);
            RESAMPLES
                .check(&who, step >= 14 || fire(&training) == 0, || format!("features fire at step {step} already"));
        }
        RESAMPLES.check(&who, fire(&training) == 4, || format!("{} of 4 features are still dead", 4 - fire(&training)));
    }
}

/// Returns the message of an error that must be a refusal to combine components.
fn refusal(promise: &Promise, who: &str, error: anyhow::Error) -> String {
    let message = format!("{error:?}");
    let kind = InputError::take(error).map(|input| input.kind());
    let refused = kind.is_ok_and(|kind| kind == InputKind::Incompatible);
    promise.check(who, refused, || format!("an error that is not `InputError::incompatible`: {message}"));
    message
}

fn is_trained_or_refused(dictionary: &Component) {
    components(ComponentKind::Trainer).into_iter().for_each(|trainer| learns_or_is_refused(trainer, dictionary));
}

fn trains_or_refuses(trainer: &Component) {
    components(ComponentKind::Dictionary).into_iter().for_each(|dictionary| learns_or_is_refused(trainer, dictionary));
}

fn learns_or_is_refused(trainer: &Component, dictionary: &Component) {
    // Tests of trainers and of dictionaries in one process share this work.
    static TRIED: Mutex<BTreeSet<(&str, &str)>> = Mutex::new(BTreeSet::new());
    if !TRIED.lock().unwrap_or_else(PoisonError::into_inner).insert((trainer.name, dictionary.name)) {
        return;
    }
    let batches = batches();
    let who = format!("{} on {}", who(trainer), who(dictionary));
    let sae = SaeConfig { dictionary: example(dictionary), ..sae(trainer) };
    let mut training = match Training::new(&sae, &training_cx()) {
        Ok(training) => training,
        Err(error) => {
            let message = refusal(&PAIR, &who, error);
            let own = trainer.default_dictionary == Some(dictionary.name);
            PAIR.check(&who, !own, || format!("it refuses the dictionary that it trains by default: {message}"));
            return;
        }
    };
    let explained = batches[..60].iter().enumerate();
    let explained: Vec<f64> = explained.map(|(step, batch)| logged_step(&who, &mut training, step, batch)).collect();
    let (first, last) = (explained[0], explained[50..].iter().sum::<f64>() / 10.0);
    let learnt = 1.0 - last < 0.8 * (1.0 - first) || training.dictionary.parameters().is_empty();
    PAIR.check(&who, learnt, || {
        format!("{:.1}% explained at the first step, {:.1}% after 60 steps", 100.0 * first, 100.0 * last)
    });
    for (name, tensor) in training.dictionary.state_dict() {
        PAIR.check(&who, greatest(&tensor).is_finite(), || format!("`{name}` has numbers that are not finite"));
    }
    is_penalizable(&who, &*training.dictionary, &batches[60].x);
    goes_on_with_dead_features(&who, trainer, &sae, &batches);
}

/// Checks training with nearly all features dead, if the trainer counts dead features.
fn goes_on_with_dead_features(who: &str, trainer: &Component, sae: &SaeConfig, batches: &[Batch]) {
    if !has_field(trainer, "dead_feature_threshold") {
        return;
    }
    let mut fields: serde_yaml::Mapping = serde_yaml::from_str(trainer.example).unwrap();
    fields.insert("dead_feature_threshold".into(), 1.into());
    let yaml = serde_yaml::to_string(&fields).unwrap();
    let dictionary: Box<dyn TaggedDictionary> = from_yaml(&serde_yaml::to_string(&sae.dictionary).unwrap()).unwrap();
    let sae =
        SaeConfig { dictionary, trainer: DEAD.of(who, from_yaml(&yaml).map_err(Into::into)), ..self::sae(trainer) };
    let mut training = DEAD.of(who, Training::new(&sae, &training_cx()));
    for (step, batch) in batches[..10].iter().enumerate() {
        let stepped = catch_unwind(AssertUnwindSafe(|| training.step(step as u64, batch, false)));
        let stepped = stepped.unwrap_or_else(|panic| {
            DEAD.broken(who, panic.downcast_ref::<String>().map_or("it panicked", |said| said.as_str()))
        });
        DEAD.of(who, stepped);
    }
}

fn composes_with_trainers(modifier: &Component) {
    let batches = batches();
    let mut composed = 0;
    for trainer in components(ComponentKind::Trainer) {
        let who = format!("{} with {}", who(modifier), who(trainer));
        let new = || {
            let modifiers = vec![example(modifier)];
            Training::new(&SaeConfig { modifiers, ..sae(trainer) }, &training_cx())
        };
        let (mut whole, mut resumed) = match new() {
            Ok(training) => (training, COMPOSES.of(&who, new())),
            Err(error) => {
                refusal(&COMPOSES, &who, error);
                continue;
            }
        };
        composed += 1;
        let mut explained = Vec::new();
        for (step, batch) in batches[..140].iter().enumerate() {
            explained.push(logged_step(&who, &mut whole, step, batch));
            match step {
                0..70 => {}
                70 => COMPOSES.of(&who, whole.state().and_then(|state| resumed.restore(&state))),
                // Unlogged, unlike `whole`: logging must change nothing.
                _ => silent_step(&who, &mut resumed, step, batch),
            }
        }
        let last = explained[explained.len() - 20..].iter().sum::<f64>() / 20.0;
        let learnt = 1.0 - last < 0.5 * (1.0 - explained[0]);
        COMPOSES.check(&who, learnt, || {
            format!("{:.1}% explained at the first step, {:.1}% after 140", 100.0 * explained[0], 100.0 * last)
        });
        end_alike(&RESUMES, &who, &whole, &resumed);

        let before = RESUMES.of(&who, whole.state());
        let refused = whole.step(140, &with_a(f64::NAN, &batches[140]), true).is_err();
        NOT_FINITE.check(&who, refused, || "a step with NaN that succeeds".to_owned());
        is_unchanged(&who, &whole, &before);
    }
    COMPOSES.check(&who(modifier), composed > 0, || "it composes with no linked trainer".to_owned());
}

fn delivers_resumes_and_rewinds(component: &Component) {
    let cx = source_cx();
    let who = who(component);
    let config: Box<dyn TaggedSource> = example(component);
    let build = || DELIVERS.of(&who, config.build(&cx));
    let mut source = build();
    let sites = source.sites();
    let deliver = |source: &mut dyn ActivationSource| DELIVERS.of(&who, tch::no_grad(|| source.next_batch()));
    let next = |source: &mut dyn ActivationSource| {
        Some(deliver(source)?.sites.into_iter().map(|batch| batch.x).collect::<Vec<_>>())
    };
    for number in 0..3 {
        let activations = deliver(&mut *source);
        let activations =
            activations.unwrap_or_else(|| DELIVERS.broken(&who, format!("it ends after {number} batches")));
        DELIVERS.same(&who, "the number of sites in a batch", activations.sites.len(), sites.len());
        for (batch, site) in activations.sites.iter().zip(&sites) {
            let widths = (batch.x.size()[1], batch.target.size()[1]);
            DELIVERS.same(&who, "the widths of input and target", widths, site.widths());
            DELIVERS.same(&who, "the type of activations", batch.x.kind(), Kind::Float);
            DELIVERS.same(&who, "the number of activations at a site", batch.len(), activations.len());
        }
        if let Some(tokens) = &activations.tokens {
            let found = (tokens.size(), tokens.kind());
            DELIVERS.same(&who, "shape and type of `tokens`", found, (vec![activations.len(), 3], Kind::Int64));
        }
    }
    let state = DELIVERS.of(&who, source.state());
    let expected: Vec<_> = (0..8).map_while(|_| next(&mut *source)).collect();
    let mut other = build();
    DELIVERS.of(&who, other.restore(&state));
    let found: Vec<_> = (0..8).map_while(|_| next(&mut *other)).collect();
    DELIVERS.check(&who, !expected.is_empty(), || "it ends after 3 batches".to_owned());
    DELIVERS.check(&who, expected == found, || "a restored source continues with other batches".to_owned());
    let norms = DELIVERS.of(&who, source.mean_squared_norms());
    DELIVERS.same(&who, "the number of mean squared norms", norms.len(), sites.len());
    let usable = norms.iter().all(|norm| norm.is_finite() && *norm > 0.0);
    DELIVERS.check(&who, usable, || format!("mean squared norms of {norms:?}"));
    DELIVERS.of(&who, source.rewind());
    DELIVERS.check(&who, next(&mut *source).is_some(), || "nothing after `rewind`".to_owned());
    DELIVERS.check(&who, source.describe().is_object(), || "`describe` does not return a JSON object".to_owned());
}

fn says_the_same_from_any_position(component: &Component) {
    let who = who(component);
    let config: Box<dyn TaggedText> = example(component);
    let mut text = SEEKS.of(&who, config.build());
    let next = |text: &mut dyn TextStream| {
        let record = SEEKS.of(&who, text.next_record());
        record.unwrap_or_else(|| SEEKS.broken(&who, "its example has fewer than 3 records"))
    };
    let all: Vec<Record> = (0..3).map(|_| next(&mut *text)).collect();
    SEEKS.same(&who, "`position` after 3 records", text.position(), 3);
    for position in [1, 0] {
        SEEKS.of(&who, text.seek(position));
        SEEKS.same(&who, "`position` after `seek`", text.position(), position);
        let found = next(&mut *text);
        SEEKS.same(&who, &format!("record {position} after `seek`"), &found, &all[position as usize]);
    }
    let rows = matches!(all[0], Record::Tokens { .. });
    SEEKS.same(&who, "`is_tokenized`", text.is_tokenized(), rows);
}

fn measures_each_dictionary(component: &Component) {
    let cx = source_cx();
    let metric: Box<dyn TaggedMetric> = example(component);
    let who = who(component);
    let mut measured = false;
    for source in components(ComponentKind::Source) {
        let config: Box<dyn TaggedSource> = example(source);
        let mut source = config.build(&cx).unwrap();
        if MEASURES.of(&who, metric.build()).refuses(&mut *source).is_some() {
            continue;
        }
        let (activation_dim, output_dim) = source.sites()[0].widths();
        let dictionary_cx = DictionaryCx { activation_dim, output_dim, ..dictionary_cx() };
        let build = |component| example::<Box<dyn TaggedDictionary>>(component).build(&dictionary_cx).unwrap();
        let both: Vec<Box<dyn Dictionary>> =
            components(ComponentKind::Dictionary).into_iter().take(2).map(build).collect();
        let both: Vec<Subject> = both.iter().map(|dictionary| Subject { dictionary: &**dictionary, site: 0 }).collect();
        let measuring = evaluate::Measuring {
            key: "source",
            origin: Map::new(),
            from_the_beginning: true,
            overlap_is_known: false,
        };
        let found = evaluate::evaluate(std::slice::from_ref(&metric), &both, &mut *source, &measuring);
        let found = MEASURES.of(&who, found);
        MEASURES.same(&who, "the number of dictionaries with figures", found.len(), 2);
        let all = found.iter().all(|figures| !figures.is_empty());
        MEASURES.check(&who, all, || "a dictionary without figures".to_owned());
        measured = true;
    }
    MEASURES.check(&who, measured, || "it refuses the example of every linked source".to_owned());
}

fn writes_and_goes_on(component: &Component) {
    let who = who(component);
    let dir = TempDir::new().unwrap();
    let config: Box<dyn TaggedLogger> = example(component);
    // Numbers that float32 and decimal notation represent exactly, and that are unlikely elsewhere in a file.
    let loss = |number: u16| 0.5 + f64::from(number) / 1024.0;
    let log = |logger: &mut dyn Logger, step: u64, number: u16| {
        let row = serde_json::json!({"step": step, "sae": "a", "loss": loss(number), "l0": 3.0});
        WRITES.of(&who, logger.log(row.as_object().unwrap()));
    };
    let kept = |numbers: &[u16]| -> Vec<u16> {
        let files = files_in(dir.path());
        numbers.iter().copied().filter(|number| files.iter().any(|bytes| holds(bytes, loss(*number)))).collect()
    };
    let mut logger = WRITES.of(&who, config.build(dir.path(), None));
    (0..3_u16).for_each(|row| log(&mut *logger, row.into(), 101 + row));
    WRITES.of(&who, logger.flush());
    WRITES.same(
        &who,
        "the rows of three in the run's folder after `flush`, by their losses,",
        kept(&[101, 102, 103]),
        vec![101, 102, 103],
    );
    drop(logger);
    let mut logger = WRITES.of(&who, config.build(dir.path(), Some(2)));
    log(&mut *logger, 2, 203);
    WRITES.of(&who, logger.flush());
    let found = kept(&[101, 102, 103, 203]);
    WRITES.same(&who, "the rows after resuming at step 2 and logging it again", found, vec![101, 102, 203]);
}

/// Returns the contents of all files below a folder.
fn files_in(dir: &Path) -> Vec<Vec<u8>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_in(&path));
        } else {
            files.push(std::fs::read(path).unwrap());
        }
    }
    files
}

/// True if a file contains a number, as text or as a float of 4 or 8 bytes.
fn holds(bytes: &[u8], number: f64) -> bool {
    let text = number.to_string()[..7].to_owned();
    let floats = [(number as f32).to_le_bytes().to_vec(), (number as f32).to_be_bytes().to_vec()];
    let doubles = [number.to_le_bytes().to_vec(), number.to_be_bytes().to_vec()];
    let mut spellings = floats.into_iter().chain(doubles).chain([text.into_bytes()]);
    spellings.any(|spelling| bytes.windows(spelling.len()).any(|window| window == spelling))
}

/// Returns the config.json of a small model of a family: Llama's fields, and those of its example.
fn model_config(component: &Component) -> Map<String, Value> {
    let mut config = serde_json::json!({
        "model_type": component.name, "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    });
    if has_field(component, "sliding_window") {
        config["sliding_window"] = 4.into();
    }
    // The family of a multimodal model takes the fields of any text model.
    let any = (component.schema)().get("additionalProperties").and_then(Value::as_bool) == Some(true);
    if any || has_field(component, "num_key_value_heads") {
        config["num_key_value_heads"] = 2.into();
    }
    let own: Option<Map<String, Value>> =
        serde_yaml::from_str(component.example).unwrap_or_else(|error| MODEL_CONFIG.broken(&who(component), error));
    let fields = config.as_object().cloned().unwrap_or_default();
    fields.into_iter().chain(own.into_iter().flatten()).collect()
}

/// True if a component's config has a field.
fn has_field(component: &Component, field: &str) -> bool {
    (component.schema)().get("properties").is_some_and(|fields| fields.get(field).is_some())
}

fn random_model(config: Map<String, Value>) -> Result<Box<dyn LanguageModel>> {
    lm::random_model(&config.into(), &ModelCx::new(Device::Cpu, Precision::Float32))
}

/// Returns a small model of a family, with random weights, and two rows of nine tokens.
fn small_model(component: &Component) -> (Box<dyn LanguageModel>, Tokens) {
    let model = MODEL_CONFIG.of(&who(component), random_model(model_config(component)));
    let ids = seeded(7, || Tensor::randint(model.vocab_size(), [2, 9], (Kind::Int64, Device::Cpu)));
    (model, Tokens { mask: ids.ones_like().to_kind(Kind::Bool), ids })
}

fn logits(who: &str, model: &dyn LanguageModel, tokens: &Tokens, mut hooks: Hooks) -> Tensor {
    let Ok(logits) = tch::no_grad(|| model.forward(tokens, &mut hooks)) else {
        LOGITS.broken(who, "the pass stopped, but no hook asked it to")
    };
    logits
}

fn predicts_tokens_from_those_before(component: &Component) {
    let (who, (model, tokens)) = (who(component), small_model(component));
    let model = &*model;
    LOGITS.check(&who, model.n_layers() > 1, || format!("its example has {} layers", model.n_layers()));
    let whole = logits(&who, model, &tokens, Hooks::none());
    let expected = (vec![2, 9, model.vocab_size()], Kind::Float);
    LOGITS.same(&who, "shape and type of the logits", (whole.size(), whole.kind()), expected);
    LOGITS.check(&who, greatest(&whole).is_finite(), || "logits that are not finite".to_owned());
    let last = tokens.ids.copy();
    let at_end = last.narrow(1, 8, 1);
    last.narrow(1, 8, 1).copy_(&(at_end + 1).remainder(model.vocab_size()));
    let other = logits(&who, model, &Tokens { ids: last, mask: tokens.mask.shallow_clone() }, Hooks::none());
    let apart = (whole - other).abs().amax([0, 2], false);
    let (before, at) = (greatest(&apart.narrow(0, 0, 8)), greatest(&apart.narrow(0, 8, 1)));
    LOGITS.check(&who, before < 1e-5, || format!("another last token changes the logits before it by {before}"));
    LOGITS.check(&who, at > 1e-3, || format!("another last token changes its logits by only {at}"));
}

fn lists_the_modules_that_it_meets(component: &Component) {
    let (who, (model, tokens)) = (who(component), small_model(component));
    let (modules, names) = (model.modules(), model.names());
    let mut known = BTreeSet::new();
    for visit in &modules {
        MODULES.check(&who, known.insert(&visit.module), || format!("`{}` is listed twice", visit.module));
    }
    let mut own: Vec<_> = [names.embed.clone()].into_iter().chain(names.final_norm.clone()).collect();
    own.extend((0..model.n_layers()).map(|layer| names.layer(layer)));
    if let Some(missing) = own.iter().find(|module| !known.contains(module)) {
        MODULES.broken(&who, format!("`names` has `{missing}`, but `modules` does not list it"));
    }
    let sides =
        |visit: &Visit| [(Io::In, visit.input), (Io::Out, visit.output)].map(|side| (visit.module.clone(), side));
    let points = modules.iter().flat_map(sides).map(|(module, (io, width))| (HookPoint { module, io }, width));
    let theirs = names.transformer_lens_names(model.n_layers());
    let theirs = theirs.iter().map(|name| MODULES.of(&who, model.hook_point(name, Io::Out)));
    for (point, width) in points.chain(theirs) {
        let mut hooks = Hooks::read(std::slice::from_ref(&point), true);
        let stopped = tch::no_grad(|| model.forward(&tokens, &mut hooks)).is_err();
        let Some(value) = hooks.take(&point) else { MODULES.broken(&who, format!("no pass meets `{point}`")) };
        MODULES.check(&who, stopped, || format!("the pass continues after `{point}`, the last requested value"));
        // Learned positions have one row, heads have an extra dimension, residual streams (AltUp) too, and ids have no
        // width.
        let size = value.size();
        let expected = matches!(size[..], [1 | 2, 9, .., last] | [_, 2, 9, last] if last == width);
        let expected = expected || value.kind() == Kind::Int64;
        MODULES.check(&who, expected, || format!("`{point}` has shape {size:?}, not [2, 9, .., {width}]"));
    }
}

fn goes_on_with_what_hooks_make_of_it(component: &Component) {
    let (who, (model, tokens)) = (who(component), small_model(component));
    let whole = logits(&who, &*model, &tokens, Hooks::none());
    // Deterministic, since all threads share libtorch's global generator.
    let noise = |x: &Tensor| x + Tensor::arange(x.numel() as i64, (x.kind(), x.device())).sin().reshape(x.size());
    for point in model
        .modules()
        .into_iter()
        .flat_map(|visit| [Io::In, Io::Out].map(|io| HookPoint { module: visit.module.clone(), io }))
    {
        if model.value_at(&tokens, &point).kind() == Kind::Int64 {
            continue;
        }
        let same = logits(&who, &*model, &tokens, Hooks::replace(&point, Tensor::shallow_clone));
        EDITS
            .check(&who, greatest(&(&same - &whole)) < 1e-5, || format!("`{point}` replaced by itself changes logits"));
        let edited = logits(&who, &*model, &tokens, Hooks::replace(&point, noise));
        EDITS.check(&who, greatest(&(&edited - &whole)) > 1e-4, || {
            format!("`{point}` is replaced, but the logits do not change")
        });
        let prefix = model.before(&tokens, &point);
        let Ok(continued) = tch::no_grad(|| prefix.forward(&mut Hooks::replace(&point, noise))) else {
            EDITS.broken(&who, format!("the pass continued before `{point}` stops"))
        };
        let apart = greatest(&(continued - edited));
        EDITS.check(&who, apart < 1e-5, || format!("continued before `{point}`, the logits are {apart} apart"));
    }
}

fn opens_from_its_own_files(component: &Component) {
    let (who, (model, tokens)) = (who(component), small_model(component));
    let dir = TempDir::new().unwrap();
    let expected = logits(&who, &*model, &tokens, Hooks::none());
    tensors::write(&dir.path().join("model.safetensors"), &model.parameters()).unwrap();
    let config = Value::from(model_config(component));
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let opened = lm::open_model(&dir.path().display().to_string(), Device::Cpu, Precision::Float32);
    let (opened, _) = OPENS.of(&who, opened);
    let found = logits(&who, &*opened, &tokens, Hooks::none());
    let apart = greatest(&(found - &expected));
    OPENS.check(&who, apart < 1e-5, || format!("logits differ by up to {apart}"));
}

/// Checks that every field that changes some family's arithmetic is refused, or has an effect here.
fn ignores_no_arithmetic(component: &Component) {
    let who = who(component);
    let schema = (component.schema)().to_value();
    let outcome = |field: &str, value: &Value| {
        let mut config = model_config(component);
        config.insert(field.to_owned(), value.clone());
        let model = random_model(config)?;
        let ids = Tensor::arange(9, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let tokens = Tokens { mask: ids.ones_like().to_kind(Kind::Bool), ids };
        anyhow::Ok(logits(&who, &*model, &tokens, Hooks::none()))
    };
    let expected = ARITHMETIC.of(&who, outcome("model_type", &component.name.into()));
    for field in lm::ARITHMETIC {
        // For each type of field, some values that are not defaults.
        let layers = |kinds: [&str; 2]| serde_json::json!(kinds);
        let rope = serde_json::json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0});
        let known = schema["properties"].get(*field);
        let types = known.map(config::type_name).unwrap_or_default();
        let values = match types {
            _ if known.is_none() => vec![7.into(), rope],
            types if types.contains("true or false") => vec![true.into(), false.into()],
            types if types.contains("whole number") => vec![2.into(), 1.into()],
            types if types.contains("number") => vec![0.5.into(), 3.0.into()],
            types if types.contains("list") => {
                vec![layers(["sliding_attention", "full_attention"]), layers(["full_attention", "sliding_attention"])]
            }
            _ => vec![rope],
        };
        let matters = values.iter().any(|value| match outcome(field, value) {
            // Rounding may depend on memory alignment.
            Ok(found) => known.is_some() && greatest(&(found - &expected)) > 1e-4,
            Err(error) => InputError::take(error).is_ok_and(|error| error.message().contains(field)),
        });
        ARITHMETIC
            .check(&who, matters, || format!("`{field}` is ignored: {} change nothing", Value::from(values.clone())));
    }
}

fn refuses_a_folder_with_nothing_in_it(component: &Component) {
    let dir = TempDir::new().unwrap();
    let who = who(component);
    let format = REFUSES_NOTHING.of(&who, formats::named(component.name));
    let request = formats::Request { place: Some(dir.path().display().to_string()), ..formats::Request::default() };
    let read =
        format.find(&request).and_then(|places| places.iter().try_for_each(|place| format.read(place).map(|_| ())));
    let Err(error) = read else { REFUSES_NOTHING.broken(&who, "an empty folder was read as an SAE") };
    let said = format!("{error:?}");
    REFUSES_NOTHING
        .check(&who, InputError::take(error).is_ok(), || format!("an error that is no `InputError`: {said}"));
}

/// Checks that the format preserves or refuses every dictionary, and preserves at least one.
fn reads_what_it_writes(component: &Component) {
    let format = WRITES_AND_READS.of(&who(component), formats::named(component.name));
    if !format.writes() {
        return;
    }
    let x = activations(50);
    let mut written = 0;
    for other in components(ComponentKind::Dictionary) {
        let who = format!("{} with {}", who(component), who(other));
        let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let config: Box<dyn TaggedDictionary> = example(other);
        let Ok(mut built) = config.build(&dictionary_cx()) else { continue };
        // The reference's loader would do this, and change the scale of features.
        built.pretrained();
        let config = serde_json::json!({"trainer": {"dict_class": built.class(), "activation_dim": D}});
        saved::write(dir.path(), &*built, &config).unwrap();
        let sae = saved::read(dir.path(), Device::Cpu, Precision::Float32).unwrap();
        let out = out.path().join("out");
        if let Err(error) = formats::export(&sae, component.name, &out) {
            let said = format!("{error:?}");
            let refused = InputError::take(error).is_ok();
            WRITES_AND_READS.check(&who, refused, || format!("an error that is no `InputError`: {said}"));
            WRITES_AND_READS.check(&who, !out.exists(), || "a file remains after a refusal".to_owned());
            continue;
        }
        written += 1;
        let again = formats::load(component.name, &out.display().to_string(), Device::Cpu).map(|sae| sae.dictionary);
        let again = WRITES_AND_READS.of(&who, again);
        let (x_hat, features) = tch::no_grad(|| sae.dictionary.reconstruct(&x));
        let (x_hat_again, features_again) = tch::no_grad(|| again.reconstruct(&x));
        for (what, one, two) in [("reconstructions", x_hat, x_hat_again), ("features", features, features_again)] {
            WRITES_AND_READS.same(&who, &format!("the shape of {what}, read back,"), two.size(), one.size());
            let off = greatest(&(&one - two)) / greatest(&one).max(1e-9);
            WRITES_AND_READS.check(&who, off < 1e-4, || format!("{what}, read back, are off by {:.2}%", 100.0 * off));
        }
    }
    WRITES_AND_READS.check(&who(component), written > 0, || "it writes no linked dictionary".to_owned());
}
