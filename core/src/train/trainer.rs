//! Trainers: how a dictionary learns.
//!
//! A trainer returns a loss, which autograd differentiates, or also computes analytic gradients. The order of a step is
//! the same for all: see [`Training::step`](crate::train::training::Training::step).

use std::fmt::Debug;

use anyhow::{Result, bail};
use serde_json::{Map, Value};
use tch::Tensor;

use super::analytic::{self, AnalyticPass, AnalyticStep};
use super::constraint::Constraints;
use super::objective::{Objective, Seen};
use super::optim::{Adam, AdamConfig};
use super::schedule::{RunLength, Schedule};
use super::terms::Terms;
use crate::data::Batch;
use crate::error::InputError;
use crate::files::state::State;
use crate::machine::rng::Rng;
use crate::sae::Selection;
use crate::sae::two_layer::ActivationFunction;
use crate::sae::{Between, Code, Dictionary};

/// Context in which a trainer is built.
pub struct TrainerCx<'a> {
    /// The dictionary to train; a trainer that cannot train it returns an error.
    pub dictionary: &'a dyn Dictionary,
    /// Number of steps that the schedules are planned for.
    pub steps: u64,
    /// Seed of the trainer's random choices.
    pub seed: u64,
}

/// The config of a trainer.
pub trait TrainerConfig: Debug + Send + Sync {
    /// Builds the trainer, or returns why it cannot train this dictionary with these settings.
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>>;

    /// Returns the reference's class (`StandardTrainer`).
    fn class(&self) -> &'static str;

    /// Adapts defaults in steps or tokens to the length of the run, if it is too short for them.
    fn adapt(&mut self, length: &mut RunLength) {
        let _ = length;
    }
}

crate::tagged::tagged! {
    /// A trainer's config, tagged by `type`.
    TaggedTrainer: TrainerConfig => Trainer {
        /// Adapts the defaults of the shared fields to the length of the run.
        #[doc(hidden)]
        fn adapt_shared(&mut self, length: &mut RunLength);
    }
}

impl dyn TaggedTrainer {
    /// Adapts defaults to the length of the run: those of the shared fields, then the trainer's own
    /// ([`TrainerConfig::adapt`]).
    pub fn adapt_defaults(&mut self, length: &mut RunLength) {
        self.adapt_shared(length);
        self.adapt(length);
    }
}

/// Forward pass of one step.
pub struct Pass<'a> {
    /// Step, counted from 0.
    pub step: u64,
    /// Activations and their targets.
    pub batch: &'a Batch,
    /// The dictionary.
    pub dictionary: &'a dyn Dictionary,
    /// Code of the batch.
    pub code: Code,
    /// Reconstruction, `[B, d_out]`.
    pub x_hat: Tensor,
    /// Whether this step is logged.
    pub logging: bool,
}

impl<'a> Pass<'a> {
    /// Encodes a batch with the trainer's [`Trainer::encode`] and decodes it.
    pub fn forward(
        trainer: &dyn Trainer,
        dictionary: &'a dyn Dictionary,
        batch: &'a Batch,
        step: u64,
        logging: bool,
    ) -> Self {
        let code = trainer.encode(dictionary, &batch.x);
        let x_hat = dictionary.reconstruction(&code.features, &batch.x);
        Pass { step, batch, dictionary, code, x_hat, logging }
    }

    /// Returns the residual target − x̂, `[B, d_out]`.
    pub fn residual(&self) -> Tensor {
        &self.batch.target - &self.x_hat
    }
}

/// Makes the error of a trainer that cannot train a dictionary. `why` is the reason; `or` is an alternative to the
/// dictionary's default trainers.
pub fn cannot_train(trainer: &str, dictionary: &dyn Dictionary, why: &str, or: &str) -> InputError {
    InputError::incompatible(format!("the trainer `{trainer}` cannot train the class {}: {why}", dictionary.class()))
        .help(format!("use {}, or {or}", dictionary.default_trainers()))
}

/// Returns an error if no trainer with a penalty can train this dictionary, because it encodes by a threshold that only
/// its own trainers update.
///
/// `trainer` is the name of the calling trainer.
pub fn penalizable(dictionary: &dyn Dictionary, trainer: &str) -> Result<()> {
    if dictionary.selection().is_some_and(Selection::by_threshold) {
        let why = "it encodes by a threshold, which a trainer with a penalty does not update";
        bail!(cannot_train(trainer, dictionary, why, "another dictionary"));
    }
    Ok(())
}

/// State that a trainer and its modifiers may change after the optimiser's step.
pub struct AfterStep<'a> {
    /// Step, counted from 0.
    pub step: u64,
    /// Batch of the step.
    pub batch: &'a Batch,
    /// The dictionary.
    pub dictionary: &'a mut dyn Dictionary,
    /// The optimiser, for access to its moments.
    pub optimizer: &'a mut Adam,
    /// Random number generator of this SAE.
    pub rng: &'a mut Rng,
}

/// A trainer.
pub trait Trainer: Send {
    /// Returns the schedule of the learning rate and the penalty.
    fn schedule(&self) -> Schedule;

    /// Returns the optimiser's settings.
    fn adam(&self) -> AdamConfig {
        AdamConfig::default()
    }

    /// Whether any step depends on the planned length of the run ([`TrainerCx::steps`]). If so, a resumed run cannot be
    /// extended.
    fn depends_on_steps(&self) -> bool {
        self.schedule().depends_on_steps()
    }

    /// Adds resolved settings to config.json where the config leaves them open (`lr: null`).
    fn settings(&self, settings: &mut Map<String, Value>) {
        let _ = settings;
    }

    /// Initialises data-dependent parameters from the first batch, before anything is computed.
    fn begin(&mut self, dictionary: &mut dyn Dictionary, batch: &Batch) -> Result<()> {
        let _ = (dictionary, batch);
        Ok(())
    }

    /// Returns the constraints on decoder and gradients. None by default.
    fn constraints(&self) -> Constraints {
        Constraints::default()
    }

    /// Encodes a batch `[B, d]`. Default: the dictionary's own code. Override it if training needs other gradients
    /// (straight-through estimators).
    fn encode(&self, dictionary: &dyn Dictionary, x: &Tensor) -> Code {
        dictionary.forward(x)
    }

    /// Returns the objective of a step, if the loss is a reconstruction error plus a penalty. Loss and analytic step
    /// follow from it. A trainer that returns `None` must implement [`Trainer::loss`].
    fn objective(&self, step: u64) -> Option<Objective<'_>> {
        let _ = step;
        None
    }

    /// Returns the activations that the penalty of [`Trainer::objective`] applies to, `[B, F]`. Default: the code's.
    /// Override it if training needs other gradients. An analytic step uses [`ActivationFunction::penalized`].
    fn penalized(&self, pass: &Pass) -> Result<Tensor> {
        Ok(pass.code.penalized().shallow_clone())
    }

    /// Returns the activation function for the analytic step of [`Trainer::objective`]. Default: the dictionary's own.
    /// Override it if training needs other gradients.
    fn activation_function<'a>(&self, dictionary: &'a dyn Dictionary) -> Option<Box<dyn ActivationFunction + 'a>> {
        match dictionary.between() {
            Some(Between::Elementwise(activation)) => Some(activation),
            _ => None,
        }
    }

    /// Whether [`Trainer::see`] needs to know which features fired.
    fn counts_firing(&self) -> bool {
        false
    }

    /// Notes results of a step of [`Trainer::objective`] for [`Trainer::after_step`]. May log figures.
    fn see(&mut self, seen: Seen, terms: &mut Terms) {
        let _ = (seen, terms);
    }

    /// Adds the terms of the loss. Default: those of [`Trainer::objective`]. The dictionary's own term
    /// ([`Dictionary::auxiliary_loss`]) is added after them.
    ///
    /// Must not change what [`Trainer::state`] saves, because a step whose loss is not finite is refused. Note counts
    /// here and store them in [`Trainer::after_step`]. Avoid reading values from a GPU, which causes a sync.
    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        let Some(objective) = self.objective(pass.step) else {
            bail!("a trainer without `objective` must implement `loss`");
        };
        let values = objective.add(&pass.residual(), &self.penalized(pass)?, pass.logging, terms);
        drop(objective);
        let fired = self.counts_firing().then(|| pass.code.fired());
        self.see(Seen { values, fired, rows: pass.batch.len(), logging: pass.logging }, terms);
        Ok(())
    }

    /// Adds the terms of the loss and returns their analytic gradients. Default: those of [`Trainer::objective`].
    /// `None` leaves the step to [`Trainer::loss`] and autograd. Not called for an SAE with modifiers, which need
    /// autograd. Called with autograd off. The contract test compares both paths.
    fn analytic(&mut self, pass: &AnalyticPass, terms: &mut Terms) -> Result<Option<AnalyticStep>> {
        let Some(objective) = self.objective(pass.step) else { return Ok(None) };
        let Some(mut activation) = self.activation_function(pass.dictionary) else { return Ok(None) };
        let counts = self.counts_firing();
        let found = analytic::step(pass, terms, &mut *activation, &objective, counts)?;
        drop(objective);
        let Some((found, values)) = found else { return Ok(None) };
        let fired = if counts { found.fired.as_ref().map(|fired| fired.gt(0.0)) } else { None };
        self.see(Seen { values, fired, rows: pass.batch.len(), logging: pass.logging }, terms);
        Ok(Some(found))
    }

    /// Whether the loss has a sparsity term ([`Terms::add_sparsity`]), which modifiers may change.
    fn has_sparsity_term(&self) -> bool {
        self.objective(0).is_some()
    }

    /// Whether the trainer resamples dead features itself.
    fn resamples(&self) -> bool {
        false
    }

    /// Runs after the optimiser's step and the constraints on weights: stores what the loss counted, anneals,
    /// resamples. Not called for a step that was refused.
    fn after_step(&mut self, cx: &mut AfterStep) -> Result<()> {
        let _ = cx;
        Ok(())
    }

    /// Adds the trainer's own figures to the log, after [`Trainer::after_step`].
    fn log(&self, row: &mut Map<String, Value>) {
        let _ = row;
    }

    /// Returns the state for a checkpoint, other than that of dictionary and optimiser.
    fn state(&self) -> Result<State> {
        Ok(State::new())
    }

    /// Restores what [`Trainer::state`] returned.
    fn restore(&mut self, state: &State) -> Result<()> {
        let _ = state;
        Ok(())
    }
}
