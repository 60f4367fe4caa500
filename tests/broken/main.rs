//! The contract reports components that break a promise. They are registered here, so these tests need a process of
//! their own.

use std::fs;
use std::marker::PhantomData;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use dictlearn as _;
use dictlearn::contract::keep;
use dictlearn_core::lm;
use dictlearn_core::lm::{Hidden, Visit};
use dictlearn_core::prelude::*;
use dictlearn_core::registry::ComponentKind;
use dictlearn_process as _;

/// The message with which the contract refuses a component.
fn refusal(kind: ComponentKind, name: &'static str) -> String {
    let panic = catch_unwind(|| keep(kind, name)).expect_err("the contract accepted the component");
    panic.downcast_ref::<String>().expect("the panic has a message").clone()
}

fn says(kind: ComponentKind, name: &'static str, parts: &[&str]) {
    let said = refusal(kind, name);
    let start = format!("{kind} `{name}`");
    assert!(said.starts_with(&start), "{said}");
    for part in ["breaks the contract\n  promise: ", "\n  found: ", "\n  remedy: "].iter().chain(parts) {
        assert!(said.contains(part), "no {part:?} in: {said}");
    }
}

/// One test per fault: its name, the component, and parts of the contract's message.
macro_rules! named {
    ($($test:ident: $slot:ident $name:literal [$($part:literal),+];)+) => {
        $(#[test]
        fn $test() {
            says(ComponentKind::$slot, $name, &[$($part),+]);
        })+
    };
}

/// A dictionary that keeps the k features of largest magnitude, with one fault.
trait Fault: Sized + Send + 'static {
    const NAME: &'static str;

    fn code(selection: &Selection, pre_activations: Tensor) -> Code {
        let code = selected(selection, pre_activations);
        let magnitudes = code.features.abs();
        code.penalize(magnitudes)
    }
    fn encode(dictionary: &dyn Dictionary, x: &Tensor) -> Tensor {
        dictionary.encode(x)
    }
    fn loaded(dictionary: &mut dyn Dictionary) {
        dictionary.loaded();
    }
    fn scale_biases(dictionary: &mut dyn Dictionary, scale: f64) {
        dictionary.scale_biases(scale);
    }
}

fn selected(selection: &Selection, pre_activations: Tensor) -> Code {
    let scores = pre_activations.abs();
    selection.by_score(pre_activations, &scores)
}

struct Inner<F> {
    affine: Affine,
    selection: Selection,
    fault: PhantomData<F>,
}

impl<F: Fault> Inner<F> {
    const LAYOUT: Layout = Layout::modules(F::NAME, "b_dec").centred();
}

impl<F: Fault> Dictionary for Inner<F> {
    fn affine(&self) -> Option<&Affine> {
        Some(&self.affine)
    }
    fn code(&self, pre_activations: Tensor) -> Code {
        F::code(&self.selection, pre_activations)
    }
    fn selection(&self) -> Option<&Selection> {
        Some(&self.selection)
    }
}

struct Broken<F> {
    inner: Box<dyn Dictionary>,
    fault: PhantomData<F>,
}

impl<F: Fault> Broken<F> {
    const SAVED: SavedClass = SavedClass {
        class: F::NAME,
        name: F::NAME,
        shaped: |saved| {
            let affine = saved.affine(Inner::<F>::LAYOUT)?;
            let selection = Selection::saved(saved, affine.dims().features, false)?;
            Ok(Box::new(Broken::<F>::new(affine, selection)))
        },
    };

    fn new(affine: Affine, selection: Selection) -> Self {
        Broken { inner: Box::new(Inner::<F> { affine, selection, fault: PhantomData }), fault: PhantomData }
    }

    fn build(cx: &DictionaryCx) -> Box<dyn Dictionary> {
        let affine = Affine::random(Inner::<F>::LAYOUT, 128, 1.0, cx);
        Box::new(Broken::<F>::new(affine, Selection::new(8, false, cx.device)))
    }
}

impl<F: Fault> Dictionary for Broken<F> {
    fn class(&self) -> &'static str {
        F::NAME
    }
    fn dims(&self) -> Dims {
        self.inner.dims()
    }
    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.inner.parameters()
    }
    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.inner.buffers()
    }
    fn encode(&self, x: &Tensor) -> Tensor {
        F::encode(&*self.inner, x)
    }
    fn decode(&self, features: &Tensor) -> Tensor {
        self.inner.decode(features)
    }
    fn forward(&self, x: &Tensor) -> Code {
        self.inner.forward(x)
    }
    fn decoder(&self) -> Option<Weight> {
        self.inner.decoder()
    }
    fn encoder(&self) -> Option<Encoder> {
        self.inner.encoder()
    }
    fn selection(&self) -> Option<&Selection> {
        self.inner.selection()
    }
    fn loaded(&mut self) {
        F::loaded(&mut *self.inner);
    }
    fn scale_biases(&mut self, scale: f64) {
        F::scale_biases(&mut *self.inner, scale);
    }
}

macro_rules! dictionary {
    ($module:ident, $name:literal, { $($method:item)* }) => {
        mod $module {
            use super::*;

            /// A dictionary with a fault.
            #[component(dictionary $name, summary = "A dictionary with a fault",
                example = concat!("{type: ", $name, "}"))]
            pub struct Config {}

            pub struct ThisFault;

            impl Fault for ThisFault {
                const NAME: &'static str = $name;
                $($method)*
            }

            impl DictionaryConfig for Config {
                fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
                    Ok(Broken::<ThisFault>::build(cx))
                }
            }

            inventory::submit! { Broken::<ThisFault>::SAVED }
        }
    };
}

dictionary!(faultless, "faultless", {});

dictionary!(no_post_relu, "no_post_relu", {
    fn code(selection: &Selection, pre_activations: Tensor) -> Code {
        let code = selected(selection, pre_activations);
        let values = code.extra("top_values").unwrap().shallow_clone();
        let magnitudes = code.features.abs();
        Code::new(code.features).penalize(magnitudes).with("top_values", values)
    }
});

dictionary!(narrow_post_relu, "narrow_post_relu", {
    fn code(selection: &Selection, pre_activations: Tensor) -> Code {
        let code = selected(selection, pre_activations);
        let values = code.extra("top_values").unwrap().shallow_clone();
        let magnitudes = code.features.abs();
        Code::new(code.features)
            .penalize(magnitudes)
            .with("post_relu", values.shallow_clone())
            .with("top_values", values)
    }
});

dictionary!(negative_penalty, "negative_penalty", {
    fn code(selection: &Selection, pre_activations: Tensor) -> Code {
        selected(selection, pre_activations)
    }
});

dictionary!(unscaled_bias, "unscaled_bias", {
    fn scale_biases(dictionary: &mut dyn Dictionary, scale: f64) {
        for (name, mut parameter) in dictionary.parameters() {
            if name == "encoder.bias" {
                let _ = tch::no_grad(|| parameter.g_mul_scalar_(scale));
            }
        }
    }
});

dictionary!(stale_k, "stale_k", {
    fn loaded(_: &mut dyn Dictionary) {}
});

dictionary!(two_dimensions_only, "two_dimensions_only", {
    fn encode(dictionary: &dyn Dictionary, x: &Tensor) -> Tensor {
        let [rows, width] = x.size()[..] else { panic!("not enough values to unpack: {:?}", x.size()) };
        dictionary.encode(&x.view([rows, width]))
    }
});

/// f = relu(W x) (1 + G x), x̂ = D f. G starts at 0 and should be divided by the scale, but is not.
#[component(dictionary "unscaled_matrix", summary = "A dictionary with a fault", example = "{type: unscaled_matrix}")]
pub struct UnscaledMatrixConfig {}

struct UnscaledMatrix([(&'static str, Tensor); 3]);

impl UnscaledMatrix {
    fn new(features: i64, width: i64) -> Self {
        let matrix = |shape: [i64; 2]| Tensor::randn(shape, tch::kind::FLOAT_CPU) * 0.1;
        let [encoder, decoder] = [[features, width], [width, features]].map(matrix);
        let trained = |tensor: Tensor| tensor.set_requires_grad(true);
        let gate = encoder.zeros_like();
        UnscaledMatrix([("encoder", trained(encoder)), ("gate", trained(gate)), ("decoder", trained(decoder))])
    }
}

impl DictionaryConfig for UnscaledMatrixConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        if cx.activation_dim != cx.output_dim {
            bail!(InputError::new("inputs and targets must have one width"));
        }
        Ok(Box::new(UnscaledMatrix::new(64, cx.activation_dim)))
    }
}

inventory::submit! {
    SavedClass {
        class: "UnscaledMatrix",
        name: "unscaled_matrix",
        shaped: |saved| {
            let [features, width] = saved.tensors["encoder"].size()[..] else { bail!(InputError::new("not a matrix")) };
            Ok(Box::new(UnscaledMatrix::new(features, width)))
        },
    }
}

impl Dictionary for UnscaledMatrix {
    fn class(&self) -> &'static str {
        "UnscaledMatrix"
    }
    fn dims(&self) -> Dims {
        let [(_, encoder), ..] = &self.0;
        Dims { input: encoder.size()[1], features: encoder.size()[0], output: encoder.size()[1] }
    }
    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.0.iter().map(|(name, tensor)| (*name, tensor.shallow_clone())).collect()
    }
    fn encode(&self, x: &Tensor) -> Tensor {
        let [(_, encoder), (_, gate), _] = &self.0;
        x.matmul(&encoder.tr()).relu() * (x.matmul(&gate.tr()) + 1.0)
    }
    fn decode(&self, features: &Tensor) -> Tensor {
        features.matmul(&self.0[2].1.tr())
    }
    fn scale_biases(&mut self, _: f64) {}
}

#[test]
fn a_dictionary_without_a_fault_is_accepted() {
    keep(ComponentKind::Dictionary, "faultless");
}

named! {
    a_selection_without_post_relu_is_reported: Dictionary "no_post_relu"
        ["a code without `post_relu`", "Selection::of_each"];
    a_post_relu_of_the_wrong_shape_is_reported: Dictionary "narrow_post_relu"
        ["the shape of `post_relu` is [50, 8], not [50, 128]"];
    negative_penalised_activations_are_reported: Dictionary "negative_penalty"
        ["never negative", "the smallest is -", "code.penalize(features.abs())"];
    scale_biases_that_skips_a_bias_is_reported: Dictionary "unscaled_bias"
        ["scale_biases(s)", "`b_dec` was left as it was", "`encoder.bias` was scaled", "thresholds"];
    scale_biases_that_skips_a_matrix_of_zeros_is_reported: Dictionary "unscaled_matrix"
        ["scale_biases(s)", "`gate` was left as it was"];
    a_k_that_is_not_loaded_is_reported: Dictionary "stale_k"
        ["k can change during training, and is saved", "Selection::loaded"];
    a_panic_is_reported_with_the_promise: Dictionary "two_dimensions_only"
        ["[B, L, d] works like [B, d]", "it panicked: not enough values to unpack: [5, 10, 32]"];
}

/// A trainer with a sparsity penalty and one fault. The fault must not show on a dictionary that another test accepts.
trait TrainerFault {
    const SPARSITY: bool = true;
    const COUNTS_IN_LOSS: bool = false;

    fn accepts(dictionary: &dyn Dictionary) -> Result<()> {
        penalizable(dictionary, "faulty")
    }
    fn rate(_class: &str) -> f64 {
        1e-3
    }
    fn weight(_steps: u64) -> f64 {
        1e-3
    }
    fn error(error: Tensor) -> Tensor {
        error
    }
}

macro_rules! trainer {
    ($module:ident, $name:literal, { $($item:item)* }) => {
        mod $module {
            use super::*;

            const EXAMPLE: &str = concat!("{type: ", $name, "}");

            /// A trainer with a fault.
            #[component(trainer $name, summary = "Faulty", example = EXAMPLE, default_dictionary = "auto_encoder")]
            pub struct Config {
                /// Number of steps taken.
                #[serde(skip)]
                steps: u64,
                /// The learning rate.
                #[serde(skip)]
                lr: f64,
            }

            impl TrainerFault for Config {
                $($item)*
            }

            impl TrainerConfig for Config {
                fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
                    Self::accepts(cx.dictionary)?;
                    Ok(Box::new(Config { lr: Self::rate(cx.dictionary.class()), ..self.clone() }))
                }
                fn class(&self) -> &'static str {
                    "FaultyTrainer"
                }
            }

            impl Trainer for Config {
                fn state(&self) -> Result<State> {
                    let mut state = State::new();
                    if Self::COUNTS_IN_LOSS {
                        state.put("steps", self.steps)?;
                    }
                    Ok(state)
                }
                fn restore(&mut self, state: &State) -> Result<()> {
                    if Self::COUNTS_IN_LOSS {
                        self.steps = state.get("steps")?;
                    }
                    Ok(())
                }
                fn schedule(&self) -> Schedule {
                    Schedule::constant(self.lr)
                }
                fn has_sparsity_term(&self) -> bool {
                    Self::SPARSITY
                }
                fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
                    terms.add_reconstruction("mse_loss", Self::error(mean_of_sums(&pass.residual().square())));
                    let weight = Self::weight(self.steps);
                    if Self::COUNTS_IN_LOSS {
                        self.steps += 1;
                    }
                    terms.add_sparsity("sparsity_loss", mean_of_sums(pass.code.penalized()), weight);
                    Ok(())
                }
                fn after_step(&mut self, _: &mut AfterStep) -> Result<()> {
                    self.steps += u64::from(!Self::COUNTS_IN_LOSS);
                    Ok(())
                }
            }
        }
    };
}

trainer!(forgetful, "forgetful", {
    fn weight(steps: u64) -> f64 {
        1e-4 * steps as f64
    }
});
trainer!(hasty, "hasty", {
    const COUNTS_IN_LOSS: bool = true;
});
trainer!(undeclared, "undeclared", {
    const SPARSITY: bool = false;
});
trainer!(sluggish, "sluggish", {
    fn rate(class: &str) -> f64 {
        if class == "AutoEncoder" { 1e-6 } else { 1e-3 }
    }
});
trainer!(twice_the_gradient, "twice_the_gradient", {
    fn error(error: Tensor) -> Tensor {
        &error * 2.0 - error.detach()
    }
});
trainer!(curt, "curt", {
    fn accepts(dictionary: &dyn Dictionary) -> Result<()> {
        if dictionary.class() == "AutoEncoderNew" {
            bail!(InputError::new("the trainer `curt` cannot train the class AutoEncoderNew"));
        }
        penalizable(dictionary, "curt")
    }
});

named! {
    a_trainer_that_does_not_save_its_count_is_reported: Trainer "forgetful"
        ["a resumed run ends on the same weights", "weights that differ: ", "in `state`"];
    a_trainer_that_counts_in_loss_is_reported: Trainer "hasty"
        ["loss or gradients are not finite", "changes nothing", "apply them in `after_step`"];
    an_undeclared_sparsity_term_is_reported: Trainer "undeclared"
        ["`has_sparsity_term` is false, but the loss has a sparsity term"];
    a_trainer_that_hardly_learns_is_reported: Trainer "sluggish"
        ["explains over 30% of the variance", "at the first step"];
    a_wrong_gradient_is_reported: Trainer "twice_the_gradient"
        ["matches finite differences", "`mse_loss` by `"];
    a_refusal_of_the_wrong_kind_is_reported: Trainer "curt"
        ["or refuses it in `build`", "not `InputError::incompatible`: the trainer `curt`"];
}

/// A logger that writes each row as a line, with one fault.
macro_rules! logger {
    ($module:ident, $name:literal, resumes: $resumes:expr, keeps: $keeps:expr) => {
        mod $module {
            use super::*;

            /// A logger with a fault.
            #[component(logger $name, summary = "Faulty", example = concat!("{type: ", $name, "}"))]
            pub struct Config {}

            impl LoggerConfig for Config {
                fn build(&self, run_dir: &Path, resume_at: Option<u64>) -> Result<Box<dyn Logger>> {
                    let path = run_dir.join($name);
                    let text = fs::read_to_string(&path).unwrap_or_default();
                    let kept = text.lines().take(resume_at.unwrap_or(0) as usize);
                    let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
                    let resumes: bool = $resumes;
                    fs::write(&path, if resumes { kept } else { text })?;
                    Ok(Box::new(ThisLogger(path)))
                }
            }

            struct ThisLogger(PathBuf);

            impl Logger for ThisLogger {
                fn log(&mut self, row: &Map<String, Value>) -> Result<()> {
                    let keeps: fn(u64) -> bool = $keeps;
                    if keeps(row["step"].as_u64().unwrap()) {
                        let text = fs::read_to_string(&self.0)?;
                        fs::write(&self.0, format!("{text}{}\n", Value::from(row.clone())))?;
                    }
                    Ok(())
                }
            }
        }
    };
}

logger!(lines, "lines", resumes: true, keeps: |_| true);
logger!(sieve, "sieve", resumes: true, keeps: |step| step != 1);
logger!(echo, "echo", resumes: false, keeps: |_| true);

#[test]
fn a_logger_without_a_fault_is_accepted() {
    keep(ComponentKind::Logger, "lines");
}

named! {
    a_logger_that_drops_a_row_is_reported: Logger "sieve"
        ["every row in the run's folder", "is [101, 103], not [101, 102, 103]"];
    a_logger_that_repeats_a_row_after_resuming_is_reported: Logger "echo"
        ["is [101, 102, 103, 203], not [101, 102, 203]"];
}

/// Llama's architecture, with one fault.
trait ModelFault {
    fn layer(model: &lm::Decoder, index: usize, hidden: &Hidden, hooks: &mut Hooks) -> Result<Hidden, Stop> {
        model.layer(index, hidden, hooks)
    }
    fn logits(logits: Tensor) -> Tensor {
        logits
    }
    fn name(name: String) -> String {
        name
    }
}

struct Faulty<F> {
    model: lm::Decoder,
    fault: PhantomData<F>,
}

impl<F: ModelFault + Send> LanguageModel for Faulty<F> {
    fn hidden_size(&self) -> i64 {
        self.model.hidden_size()
    }
    fn n_layers(&self) -> usize {
        self.model.n_layers()
    }
    fn n_heads(&self) -> i64 {
        self.model.n_heads()
    }
    fn vocab_size(&self) -> i64 {
        self.model.vocab_size()
    }
    fn max_positions(&self) -> Option<i64> {
        self.model.max_positions()
    }
    fn names(&self) -> &lm::Names {
        self.model.names()
    }
    fn device(&self) -> Device {
        self.model.device()
    }
    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.model.parameters().into_iter().map(|(name, tensor)| (F::name(name), tensor)).collect()
    }
    fn modules(&self) -> Vec<Visit> {
        self.model.modules()
    }
    fn begin(&self, tokens: &Tokens, hooks: &mut Hooks) -> Result<Hidden, Stop> {
        self.model.begin(tokens, hooks)
    }
    fn layer(&self, index: usize, hidden: &Hidden, hooks: &mut Hooks) -> Result<Hidden, Stop> {
        F::layer(&self.model, index, hidden, hooks)
    }
    fn end(&self, hidden: &Hidden, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        Ok(F::logits(self.model.end(hidden, hooks)?))
    }
}

macro_rules! model {
    ($module:ident, $name:literal, { $($method:item)* }) => {
        mod $module {
            use super::*;

            /// Fields of config.json.
            #[component(model $name, summary = "A model with a fault")]
            pub struct Config {
                #[serde(flatten)]
                common: lm::config::CommonFields,
                /// Soft cap of the attention scores, which the model ignores.
                #[allow(dead_code)]
                attn_logit_softcapping: Option<f64>,
            }

            pub struct ThisFault;

            impl ModelFault for ThisFault {
                $($method)*
            }

            impl lm::ModelConfig for Config {
                fn load(self, weights: lm::Weights, cx: &lm::ModelCx) -> Result<Box<dyn LanguageModel>> {
                    let model = lm::Decoder::open(self.common.decoder()?, weights, cx)?;
                    Ok(Box::new(Faulty::<ThisFault> { model, fault: PhantomData }))
                }
            }
        }
    };
}

model!(careless, "careless", {});
model!(clairvoyant, "clairvoyant", {
    fn logits(logits: Tensor) -> Tensor {
        &logits + logits.mean_dim([1].as_slice(), true, Kind::Float)
    }
});
model!(narrow, "narrow", {
    fn logits(logits: Tensor) -> Tensor {
        logits.narrow(2, 0, 95)
    }
});
model!(headstrong, "headstrong", {
    fn layer(model: &lm::Decoder, index: usize, hidden: &Hidden, hooks: &mut Hooks) -> Result<Hidden, Stop> {
        model.layer(index, hidden, hooks)?;
        model.layer(index, hidden, &mut Hooks::none())
    }
});
model!(deaf, "deaf", {
    fn layer(model: &lm::Decoder, index: usize, hidden: &Hidden, _: &mut Hooks) -> Result<Hidden, Stop> {
        model.layer(index, hidden, &mut Hooks::none())
    }
});
model!(renaming, "renaming", {
    fn name(name: String) -> String {
        name.replace("self_attn", "attention")
    }
});

named! {
    an_ignored_config_json_field_is_reported: Model "careless" ["`attn_logit_softcapping` is ignored"];
    a_model_that_looks_ahead_is_reported: Model "clairvoyant" ["another last token changes the logits before it by "];
    logits_of_the_wrong_width_are_reported: Model "narrow"
        ["shape and type of the logits is ([2, 9, 95], Float), not ([2, 9, 96], Float)"];
    a_module_that_never_calls_its_hook_is_reported: Model "deaf" ["no pass meets `model.layers.0.input_layernorm.in`"];
    a_model_that_ignores_replaced_values_is_reported: Model "headstrong"
        ["`model.layers.0.input_layernorm.in` is replaced, but the logits do not change"];
    renamed_weights_are_reported: Model "renaming"
        ["opens from config.json and a file of its `parameters`", "self_attn"];
}

/// A source of waves that restarts when it is restored.
#[component(source "restless", summary = "A source with a fault", example = "{type: restless}")]
struct RestlessConfig {}

impl SourceConfig for RestlessConfig {
    fn build(&self, _: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        Ok(Box::new(Restless(0)))
    }
}

struct Restless(i64);

impl ActivationSource for Restless {
    fn sites(&self) -> Vec<Site> {
        vec![Site::new("waves", (32, 32))]
    }
    fn next_batch(&mut self) -> Result<Option<Activations>> {
        self.0 += 1;
        let options = (Kind::Float, Device::Cpu);
        let rows = Tensor::arange_start(self.0 * 64, (self.0 + 1) * 64, options).unsqueeze(1);
        Ok(Some(Batch::of((rows * Tensor::arange_start(1, 33, options) * 0.1).cos()).into()))
    }
    fn rewind(&mut self) -> Result<()> {
        self.0 = 0;
        Ok(())
    }
    fn mean_squared_norms(&mut self) -> Result<Vec<f64>> {
        Ok(vec![16.0])
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

named! {
    a_source_that_restarts_when_restored_is_reported: Source "restless"
        ["a restored source continues with other batches", "in `state`"];
}

/// Numbered documents; `seek` goes one too far.
#[component(text "one_ahead", summary = "A text with a fault", example = "{type: one_ahead}")]
struct OneAheadConfig {}

impl TextConfig for OneAheadConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        Ok(Box::new(OneAhead { position: 0, off: 0 }))
    }
}

struct OneAhead {
    position: u64,
    off: u64,
}

impl TextStream for OneAhead {
    fn next_record(&mut self) -> Result<Option<Record>> {
        self.position += 1;
        let text = format!("This is document {}.", self.position + self.off);
        Ok(Some(Record::Text(Document { text, origin: "a document".to_owned() })))
    }
    fn position(&self) -> u64 {
        self.position
    }
    fn seek(&mut self, position: u64) -> Result<()> {
        (self.position, self.off) = (position, 1);
        Ok(())
    }
}

named! {
    a_text_that_seeks_the_wrong_record_is_reported: Text "one_ahead"
        ["record 1 after `seek`", "This is document 3.", "This is document 2."];
}

/// A metric that returns no figures.
#[component(metric "silent", summary = "A metric with a fault", example = "{type: silent}")]
struct SilentConfig {}

impl Metric for SilentConfig {
    fn evaluate(&mut self, subjects: &[Subject], _: &mut dyn ActivationSource) -> Result<Option<Vec<Figures>>> {
        Ok(Some(subjects.iter().map(|_| Figures::new()).collect()))
    }
}

named! {
    a_metric_without_figures_is_reported: Metric "silent" ["a dictionary without figures"];
}

/// A modifier that refuses every SAE with a plain input error.
#[component(modifier "sulky", summary = "A modifier with a fault", example = "{type: sulky}")]
struct SulkyConfig {}

impl ModifierConfig for SulkyConfig {
    fn build(&self, _: &ModifierCx) -> Result<Box<dyn Modifier>> {
        bail!(InputError::new("the modifier `sulky` needs a rest"))
    }
}

named! {
    a_modifier_that_refuses_with_the_wrong_error_is_reported: Modifier "sulky"
        ["composes with at least one trainer", "the modifier `sulky` needs a rest"];
}
