//! One dictionary in training. The order of a step is the same for every method.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::data::{Batch, OnNonfinite, SitePart};
use crate::error::{InputError, Mistakes, Under};
use crate::files::state::State;
use crate::machine::device;
use crate::machine::device::Precision;
use crate::machine::ranks;
use crate::machine::rng::{Rng, rng, seeded};
use crate::sae::{Adapted, Dictionary, DictionaryCx, Normalization, saved};
use crate::train::TaggedModifier;
use crate::train::analytic::AnalyticPass;
use crate::train::config::SaeConfig;
use crate::train::gradients::Gradients;
use crate::train::modifier::{Modifier, ModifierCx};
use crate::train::optim::{Adam, GradientNorm};
use crate::train::terms::{Terms, float};
use crate::train::trainer::{AfterStep, Pass, Trainer, TrainerCx};
use crate::train::watch::Watch;

/// Context in which a dictionary in training is built.
#[derive(Debug, Clone)]
pub struct TrainingCx {
    /// Widths of the activations and of their targets.
    pub widths: (i64, i64),
    /// Parts that are concatenated into one activation; empty if the site has only one.
    pub parts: Vec<SitePart>,
    /// Number of steps that the schedules are planned for.
    pub steps: u64,
    /// Seed of initial weights and random choices.
    pub seed: u64,
    /// Device on which it trains.
    pub device: Device,
    /// Precision of its matrix products.
    pub precision: Precision,
}

/// One dictionary in training.
pub struct Training {
    /// Name of the SAE in the run.
    pub name: String,
    /// The dictionary.
    pub dictionary: Box<dyn Dictionary>,
    /// Trainer of the dictionary.
    pub trainer: Box<dyn Trainer>,
    modifiers: Vec<Box<dyn Modifier>>,
    optimizer: Adam,
    gradients: Gradients,
    rng: Rng,
    /// Whether the dictionary starts from random weights.
    fresh: bool,
    /// Whether an existing SAE is trained further, so that nothing is initialised from data.
    goes_on: bool,
    /// Response to a step that is not finite. `skip_batch` causes a GPU sync at each step.
    pub on_nonfinite: OnNonfinite,
    /// Terms of the loss, on a GPU.
    watch: Watch,
    /// Norm of the gradients, on a GPU.
    norm_watch: Watch,
    /// Normalisation of each activation before the dictionary trains on it.
    normalization: Option<Normalization>,
}

/// Result of a forward pass, which changes nothing.
struct Loss {
    terms: Terms,
    /// Gradients of an analytic step; `None` leaves them to autograd.
    gradients: Option<Vec<(&'static str, Tensor)>>,
    /// Present if the step is logged.
    figures: Option<Reconstruction>,
}

/// Tensors from which the figures of a step are computed.
struct Reconstruction {
    /// Number of active features in the whole batch, a scalar.
    active: Tensor,
    /// Residual of the batch, `[B, d_out]`.
    residual: Tensor,
}

impl Training {
    /// Builds the dictionary, its trainer and its modifiers, and loads initial weights.
    pub fn new(config: &SaeConfig, cx: &TrainingCx) -> Result<Self> {
        // Each SAE is seeded separately, as in the reference, so that other SAEs of the run do not affect its weights.
        let dictionary_cx = DictionaryCx {
            activation_dim: cx.widths.0,
            output_dim: cx.widths.1,
            parts: &cx.parts,
            device: cx.device,
            precision: cx.precision,
        };
        let mut dictionary = seeded(cx.seed, || config.dictionary.build(&dictionary_cx)).under("dictionary")?;
        if dictionary.dims().output != cx.widths.1 {
            bail!(
                InputError::new(format!(
                    "the class {} reconstructs vectors of width {}, but the source's targets have width {}",
                    dictionary.class(),
                    dictionary.dims().output,
                    cx.widths.1
                ))
                .field("dictionary")
                .help("choose a transcoder, which predicts vectors of another width (`dictlearn list dictionaries`)")
            );
        }
        let mut normalization = None;
        if let Some(path) = &config.init_from {
            // Counts come from the config: groups, and k, which annealing may have changed before the file was saved.
            let counts = |dictionary: &dyn Dictionary| {
                let buffers = dictionary.buffers().into_iter();
                buffers.map(|(_, tensor)| tensor).filter(|tensor| tensor.kind() != Kind::Float)
            };
            let configured: Vec<Tensor> = counts(&*dictionary).map(|tensor| tensor.copy()).collect();
            normalization = saved::load_weights(&mut *dictionary, path.as_path()).under("init_from")?;
            for (mut tensor, configured) in counts(&*dictionary).zip(&configured) {
                tensor.copy_(configured);
            }
            dictionary.loaded();
        }
        let trainer_cx = TrainerCx { dictionary: &*dictionary, steps: cx.steps, seed: cx.seed };
        let trainer = config.trainer.build(&trainer_cx).under("trainer")?;
        let goes_on = config.init_from.as_ref().is_some_and(|path| path.as_path().is_dir());
        if goes_on && trainer.constraints().unit_norm_decoder {
            // The first step would discard the norms and change what the SAE has learned, so they are folded into the
            // encoder.
            let far = |dictionary: &dyn Dictionary| {
                let norms = dictionary.decoder().map(|decoder| decoder.norms().detach());
                norms.is_some_and(|norms| !norms.allclose(&norms.ones_like(), 1e-3, 1e-3, false))
            };
            if far(&*dictionary) && !dictionary.fold_norms() {
                tracing::warn!(
                    "SAE `{}`: the trainer keeps decoder norms at 1, but those of `init_from` differ: \
                     normalising the decoder will change this SAE's outputs",
                    config.name
                );
            }
        }
        let modifier_cx = ModifierCx { dictionary: &*dictionary, trainer: &*trainer };
        let build = |modifier: &dyn TaggedModifier| {
            modifier.needs().into_iter().try_for_each(|need| need.check(modifier.typetag_name(), &modifier_cx))?;
            modifier.build(&modifier_cx)
        };
        let mut mistakes = Mistakes::new();
        let mut modifiers = Vec::new();
        for (index, modifier) in config.modifiers.iter().enumerate() {
            modifiers.extend(mistakes.keep(build(&**modifier).under(format_args!("modifiers[{index}]")))?);
        }
        mistakes.into_result()?;
        let optimizer = Adam::new(trainer.adam(), dictionary.parameters());
        let gradients = optimizer.gradients();
        let rng = rng(cx.seed, "training");
        Ok(Training {
            name: config.name.clone(),
            dictionary,
            trainer,
            modifiers,
            optimizer,
            gradients,
            rng,
            fresh: config.init_from.is_none(),
            goes_on,
            on_nonfinite: OnNonfinite::Stop,
            watch: Watch::default(),
            norm_watch: Watch::default(),
            normalization,
        })
    }

    /// Adds a modifier that is not in the config, for tests.
    pub fn modify(&mut self, modifier: Box<dyn Modifier>) {
        self.modifiers.push(modifier);
    }

    /// Takes one step on a batch, in the order of the reference. With `logging`, returns the figures of the step,
    /// computed from its own forward pass.
    ///
    /// On a CPU, a loss or gradient that is not finite is an error ([`NotFinite`]) and changes nothing. On a GPU, the
    /// next [`Training::settle`] returns the error, to avoid a sync.
    pub fn step(&mut self, step: u64, batch: &Batch, logging: bool) -> Result<Option<Map<String, Value>>> {
        let normalized = self.normalization.map(|normalization| normalization.batch(batch));
        let batch = normalized.as_ref().unwrap_or(batch);
        if step > 0 {
            return self.step_on(step, batch, logging);
        }
        // The first batch initialises weights, which must be undone if its loss is not finite.
        let before = self.looks().then(|| self.weights_and_counters()).transpose()?;
        let result = self.begin(batch).and_then(|()| self.step_on(step, batch, logging));
        match (result, before) {
            (Err(error), Some(before)) => Err(match self.set_back(&before) {
                Ok(()) => error,
                Err(other) => error.context(format!("cannot undo the initialisation from the first batch: {other:#}")),
            }),
            (result, _) => result,
        }
    }

    /// Initialises parameters from the first batch.
    fn begin(&mut self, batch: &Batch) -> Result<()> {
        let batch = &Batch { x: ranks::gather_rows(&batch.x), target: ranks::gather_rows(&batch.target) };
        if self.fresh {
            self.dictionary.begin(batch);
        }
        if !self.goes_on {
            self.trainer.begin(&mut *self.dictionary, batch)?;
        }
        Ok(())
    }

    /// Whether loss and gradients are read at every step, to check that they are finite.
    fn looks(&self) -> bool {
        device::on_host(self.dictionary.device()) || self.on_nonfinite == OnNonfinite::SkipBatch
    }

    /// Implements [`Training::step`]. If values are checked, nothing changes before loss and gradients are known to be
    /// finite.
    fn step_on(&mut self, step: u64, batch: &Batch, logging: bool) -> Result<Option<Map<String, Value>>> {
        let Loss { mut terms, gradients, figures } = self.loss(step, batch, logging)?;
        let loss = self.finite_total(step, &terms)?;
        // Frees the graph of terms outside the loss.
        terms.detach();
        // A baseline, included for comparison, has no parameters.
        if !self.dictionary.parameters().is_empty() {
            match gradients {
                Some(gradients) => self.gradients.take(gradients)?,
                None => self.gradients.backward(&loss)?,
            }
            ranks::mean_in_place(&self.gradients.tensors());
            for modifier in &mut self.modifiers {
                modifier.gradients(&self.gradients, &*self.dictionary)?;
            }
            self.optimize(step)?;
        }
        let mut cx = AfterStep {
            step,
            batch,
            dictionary: &mut *self.dictionary,
            optimizer: &mut self.optimizer,
            rng: &mut self.rng,
        };
        self.trainer.after_step(&mut cx)?;
        for modifier in &mut self.modifiers {
            modifier.after_step(&mut cx)?;
        }
        Ok(figures.map(|figures| self.row(step, batch, &figures, &terms)))
    }

    /// Takes the optimiser's step within the trainer's constraints, if the gradients are finite.
    fn optimize(&mut self, step: u64) -> Result<()> {
        let (lr, constraints, looks) = (self.trainer.schedule().lr(step), self.trainer.constraints(), self.looks());
        match self.optimizer.step_within(lr, &constraints, &*self.dictionary, &self.gradients, looks) {
            GradientNorm::Finite => Ok(()),
            GradientNorm::Unread(norm) => self.norm_watch.see(step, [("", &norm)]),
            GradientNorm::NotFinite { name, norm } => bail!(self.bad_gradient(step, &name, norm)),
        }
    }

    /// Whether there are modifiers. They change the loss or the gradients, which requires autograd.
    pub fn is_modified(&self) -> bool {
        !self.modifiers.is_empty()
    }

    /// Returns the terms of a step's loss, the gradients if they are analytic, and the tensors for its figures.
    fn loss(&mut self, step: u64, batch: &Batch, logging: bool) -> Result<Loss> {
        let mut terms = Terms::new();
        if self.modifiers.is_empty() {
            let pass = AnalyticPass { step, batch, dictionary: &*self.dictionary, gradients: &self.gradients, logging };
            if let Some(analytic) = tch::no_grad(|| self.trainer.analytic(&pass, &mut terms))? {
                let figures = match (logging, &analytic.fired, analytic.error) {
                    (false, ..) => None,
                    (true, Some(fired), Some(residual)) => {
                        Some(Reconstruction { active: fired.sum(Kind::Double), residual })
                    }
                    _ => bail!("the trainer's analytic step lacks `fired` or `error`, which a logged step needs"),
                };
                return Ok(Loss { terms, gradients: Some(analytic.gradients), figures });
            }
        }
        let pass = Pass::forward(&*self.trainer, &*self.dictionary, batch, step, logging);
        self.trainer.loss(&pass, &mut terms)?;
        if let Some((name, value)) = self.dictionary.auxiliary_loss(batch, &pass.code) {
            terms.add(name, value, 1.0);
        }
        for modifier in &mut self.modifiers {
            modifier.loss(&pass, &mut terms)?;
        }
        let figures = logging.then(|| {
            let active = pass.code.features.detach().not_equal(0.0).sum(Kind::Double);
            Reconstruction { active, residual: pass.residual().detach() }
        });
        Ok(Loss { terms, gradients: None, figures })
    }

    /// Returns the sum of a loss's terms, or an error if it is not finite.
    fn finite_total(&mut self, step: u64, terms: &Terms) -> Result<Tensor> {
        let loss = terms.total().context("the trainer's loss has no terms")?;
        if !self.looks() {
            let terms = terms.iter().filter(|term| term.weight != 0.0).map(|term| (term.name, &term.value));
            self.watch.see(step, terms)?;
            return Ok(loss);
        }
        let value = ranks::mean(loss.double_value(&[]));
        if !value.is_finite() {
            let infinite = terms.iter().find(|term| !term.value.double_value(&[]).is_finite());
            bail!(self.bad_loss(step, infinite.map_or("sum", |term| term.name), value));
        }
        Ok(loss)
    }

    fn bad_loss(&self, step: u64, term: &str, value: f64) -> NotFinite {
        let message = format!("step {step}: the loss of SAE `{}` is {value} (term `{term}`)", self.name);
        NotFinite { step, quantity: Quantity::Loss, message }
    }

    fn bad_gradient(&self, step: u64, parameter: &str, norm: f64) -> NotFinite {
        let of = if parameter.is_empty() { String::new() } else { format!(" with respect to `{parameter}`") };
        let message = format!("step {step}: the gradient of the loss of SAE `{}`{of} has norm {norm}", self.name);
        NotFinite { step, quantity: Quantity::Gradient, message }
    }

    /// Waits for the GPU and returns an error if any step so far had a loss or gradient that is not finite
    /// ([`NotFinite`]). Call it before anything is logged or saved.
    pub fn settle(&self) -> Result<()> {
        let loss = self.watch.found()?.map(|found| self.bad_loss(found.step, found.name, found.value));
        let gradient = self.norm_watch.found()?.map(|found| self.bad_gradient(found.step, "", found.value));
        // A loss that is not finite makes its gradients so too, but not the reverse.
        match loss.into_iter().chain(gradient).min_by_key(|found| found.step) {
            None => Ok(()),
            Some(found) => bail!(found),
        }
    }

    /// Snapshot for undoing the first batch.
    fn weights_and_counters(&self) -> Result<State> {
        let mut state = self.counters()?;
        for (name, tensor) in self.dictionary.state_dict() {
            state.put_tensor(format!("dictionary/{name}"), &tensor);
        }
        Ok(state)
    }

    fn set_back(&mut self, before: &State) -> Result<()> {
        for (name, mut tensor) in self.dictionary.state_dict() {
            before.load_tensor(&format!("dictionary/{name}"), &mut tensor)?;
        }
        self.dictionary.loaded();
        self.restore_counters(before)
    }

    /// Returns the figures of a step as a log row.
    fn row(&self, step: u64, batch: &Batch, figures: &Reconstruction, terms: &Terms) -> Map<String, Value> {
        tch::no_grad(|| {
            let mut row = Map::from_iter([
                ("step".to_owned(), Value::from(step)),
                ("sae".to_owned(), Value::from(self.name.as_str())),
            ]);
            terms.write(&mut row);
            let l0 = ranks::mean(figures.active.double_value(&[]) / batch.len() as f64);
            row.insert("l0".to_owned(), float(l0 as f32));
            let variance = |x: &Tensor| x.var_dim([0].as_slice(), true, false).sum(Kind::Float).double_value(&[]);
            let explained = 1.0 - variance(&figures.residual) / variance(&batch.target);
            row.insert("frac_variance_explained".to_owned(), float(explained as f32));
            self.trainer.log(&mut row);
            row.insert("lr".to_owned(), self.trainer.schedule().lr(step).into());
            row
        })
    }

    /// Returns the dictionary for saving: it takes activations as the model makes them, although it trains on
    /// activations divided by `norm`.
    pub fn folded(&self, norm: f64) -> Result<Box<dyn Dictionary>> {
        match self.normalization {
            None => saved::folded(&*self.dictionary, norm),
            // Normalisation cancels a common factor of the activations.
            Some(_) => {
                let dictionary = saved::folded(&*self.dictionary, 1.0)?;
                Ok(Box::new(Adapted::new(dictionary, self.normalization, None)))
            }
        }
    }

    /// Normalisation of each activation before the dictionary reads it.
    pub fn normalization(&self) -> Option<Normalization> {
        self.normalization
    }

    /// Rescales loaded weights to take activations divided by `norm`.
    pub fn takes_divided(&mut self, norm: f64) -> Result<()> {
        match self.normalization {
            None => self.dictionary.scale_biases(1.0 / norm),
            Some(Normalization { input_only: false, .. }) => {}
            Some(_) => {
                bail!(
                    InputError::new(
                        "the SAE of `init_from` normalises its input but not its targets, so these must not be scaled"
                    )
                    .field("normalize_activations")
                    .help("set it to false")
                )
            }
        }
        Ok(())
    }

    /// Returns everything that a resumed run needs.
    pub fn state(&self) -> Result<State> {
        let mut state = self.weights_and_counters()?;
        state.put_all("optimizer", self.optimizer.state()?);
        state.put("rng", &self.rng)?;
        Ok(state)
    }

    /// Restores what [`Training::state`] returned.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        for (name, mut tensor) in self.dictionary.state_dict() {
            state.load_tensor(&format!("dictionary/{name}"), &mut tensor)?;
        }
        self.dictionary.loaded();
        self.optimizer.restore(&state.under("optimizer"))?;
        self.restore_counters(state)?;
        self.rng = state.get("rng")?;
        Ok(())
    }

    /// Returns the state of the trainer and the modifiers.
    fn counters(&self) -> Result<State> {
        let mut state = State::new();
        state.put_all("trainer", self.trainer.state()?);
        for (index, modifier) in self.modifiers.iter().enumerate() {
            state.put_all(&format!("modifier{index}"), modifier.state()?);
        }
        Ok(state)
    }

    fn restore_counters(&mut self, state: &State) -> Result<()> {
        self.trainer.restore(&state.under("trainer"))?;
        for (index, modifier) in self.modifiers.iter_mut().enumerate() {
            modifier.restore(&state.under(&format!("modifier{index}")))?;
        }
        Ok(())
    }
}

/// Quantity that is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// The loss, or one of its terms.
    Loss,
    /// The gradient of a loss that is finite.
    Gradient,
}

/// Error of a step whose loss or gradient is not finite.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct NotFinite {
    /// Step, counted from 0.
    pub step: u64,
    /// Quantity that is not finite.
    pub quantity: Quantity,
    /// Message with step, SAE, term or parameter, and value.
    pub message: String,
}

/// Whether every value of a tensor is finite.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    Ok(bool::try_from(tensor.isfinite().all())?)
}
