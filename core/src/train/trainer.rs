//! Trainers: how a dictionary learns.
//!
//! A trainer gives a loss, and autograd does the rest; or it finds the analytic gradients too. The order of a step is the same for all and stands in
//! [`Training::step`](crate::train::training::Training::step).

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

/// What a trainer is built for.
pub struct TrainerCx<'a> {
    /// The dictionary that it will train, to be refused here if it cannot.
    pub dictionary: &'a dyn Dictionary,
    /// How many steps the schedules are laid out for.
    pub steps: u64,
    /// Seed of the trainer's random choices.
    pub seed: u64,
}

/// The config of a trainer.
pub trait TrainerConfig: Debug + Send + Sync {
    /// The trainer, or why it cannot train this dictionary with these settings.
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>>;

    /// The reference's class (`StandardTrainer`).
    fn class(&self) -> &'static str;

    /// Adapts defaults to the length of the run: those in steps or tokens that would not fit a short one.
    fn adapt(&mut self, length: &mut RunLength) {
        let _ = length;
    }
}

crate::tagged::tagged! {
    /// A trainer's config, by `type`.
    TaggedTrainer: TrainerConfig => Trainer {
        /// Adapts the defaults of the shared fields to the length of the run.
        #[doc(hidden)]
        fn adapt_shared(&mut self, length: &mut RunLength);
    }
}

impl dyn TaggedTrainer {
    /// Adapts the defaults to the length of the run: those of the shared fields, then the trainer's own
    /// ([`TrainerConfig::adapt`]).
    pub fn adapt_defaults(&mut self, length: &mut RunLength) {
        self.adapt_shared(length);
        self.adapt(length);
    }
}

/// The forward pass of one step.
pub struct Pass<'a> {
    /// Step, counted from 0.
    pub step: u64,
    /// What the dictionary read and what it is to reconstruct.
    pub batch: &'a Batch,
    /// The dictionary.
    pub dictionary: &'a dyn Dictionary,
    /// What it encoded.
    pub code: Code,
    /// What it reconstructed, [B, d_out].
    pub x_hat: Tensor,
    /// Whether the figures of this step will be logged.
    pub logging: bool,
}

impl<'a> Pass<'a> {
    /// Encodes, as the trainer does, and decodes a batch.
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

    /// What was not reconstructed, target − x̂, [B, d_out].
    pub fn residual(&self) -> Tensor {
        &self.batch.target - &self.x_hat
    }
}

/// The error of a trainer that cannot train a dictionary, for a reason; `or` is what else to use than the trainers that can.
pub fn cannot_train(trainer: &str, dictionary: &dyn Dictionary, why: &str, or: &str) -> InputError {
    InputError::incompatible(format!("the trainer `{trainer}` cannot train the class {}: {why}", dictionary.class()))
        .help(format!("use {}, or {or}", dictionary.default_trainers()))
}

/// Refuses a dictionary that a penalty cannot train: one that encodes by a threshold which only its own trainers keep.
///
/// `trainer` is the name of the one that asks.
pub fn penalizable(dictionary: &dyn Dictionary, trainer: &str) -> Result<()> {
    if dictionary.selection().is_some_and(Selection::by_threshold) {
        let why = "it encodes by a threshold, which a trainer with a penalty does not update";
        bail!(cannot_train(trainer, dictionary, why, "another dictionary"));
    }
    Ok(())
}

/// What a trainer and its modifiers may change after the optimiser's step.
pub struct AfterStep<'a> {
    /// Step, counted from 0.
    pub step: u64,
    /// What was trained on.
    pub batch: &'a Batch,
    /// The dictionary.
    pub dictionary: &'a mut dyn Dictionary,
    /// The optimiser, for its moments.
    pub optimizer: &'a mut Adam,
    /// The SAE's own random numbers.
    pub rng: &'a mut Rng,
}

/// A trainer.
pub trait Trainer: Send {
    /// The learning rate and how it and the penalty change over a run.
    fn schedule(&self) -> Schedule;

    /// The optimiser's settings.
    fn adam(&self) -> AdamConfig {
        AdamConfig::default()
    }

    /// Whether anything that it does at a step depends on how many steps the run is laid out for ([`TrainerCx::steps`]). If so
    /// a run cannot be made longer when it is resumed.
    fn depends_on_steps(&self) -> bool {
        self.schedule().depends_on_steps()
    }

    /// Settings as the trainer resolved them, for config.json where that says more than the config (`lr: null`).
    fn settings(&self, settings: &mut Map<String, Value>) {
        let _ = settings;
    }

    /// Called with the first batch, before anything is computed, for what is initialised from data.
    fn begin(&mut self, dictionary: &mut dyn Dictionary, batch: &Batch) -> Result<()> {
        let _ = (dictionary, batch);
        Ok(())
    }

    /// What holds of the decoder and the gradients at every step; nothing unless the trainer says so.
    fn constraints(&self) -> Constraints {
        Constraints::default()
    }

    /// The code of a batch, [B, d]: the dictionary's own, unless training needs gradients of another kind
    /// (straight-through estimators).
    fn encode(&self, dictionary: &dyn Dictionary, x: &Tensor) -> Code {
        dictionary.forward(x)
    }

    /// What is minimised at a step, where that is an error of the reconstruction and a penalty on features. The loss and the
    /// analytic step follow from it. `None` where the trainer implements [`Trainer::loss`].
    fn objective(&self, step: u64) -> Option<Objective<'_>> {
        let _ = step;
        None
    }

    /// The activations that the penalty of [`Trainer::objective`] falls on, [B, F]: the code's, unless training needs gradients of
    /// another kind. In an analytic step they are [`ActivationFunction::penalized`].
    fn penalized(&self, pass: &Pass) -> Result<Tensor> {
        Ok(pass.code.penalized().shallow_clone())
    }

    /// What lies between the dictionary's two affine maps, for the analytic step of [`Trainer::objective`]: the dictionary's own,
    /// unless training needs gradients of another kind.
    fn activation_function<'a>(&self, dictionary: &'a dyn Dictionary) -> Option<Box<dyn ActivationFunction + 'a>> {
        match dictionary.between() {
            Some(Between::Elementwise(activation)) => Some(activation),
            _ => None,
        }
    }

    /// Whether [`Trainer::see`] is told which features fired.
    fn counts_firing(&self) -> bool {
        false
    }

    /// Notes what [`Trainer::after_step`] keeps of a step of [`Trainer::objective`]; may log figures.
    fn see(&mut self, seen: Seen, terms: &mut Terms) {
        let _ = (seen, terms);
    }

    /// The terms of the loss, those of [`Trainer::objective`] by default. A term of the dictionary's own
    /// ([`Dictionary::auxiliary_loss`]) is added after them.
    ///
    /// It changes nothing that [`Trainer::state`] saves, since a loss that is not finite refuses the step: what the loss
    /// counts is noted here and kept by [`Trainer::after_step`]. Avoid reading numbers from a GPU, which waits for it.
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

    /// The terms of the loss and their analytic gradients, where the trainer has them. `None` leaves the step to
    /// [`Trainer::loss`] and autograd; so does an SAE with modifiers, which need what autograd differentiates. Called with
    /// gradients off. By default that of [`Trainer::objective`]. The contract test holds both to the same numbers.
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

    /// Acts after the optimiser's step and the constraints on weights: keeps what the loss counted, anneals, resamples. Not
    /// called for a step that was refused.
    fn after_step(&mut self, cx: &mut AfterStep) -> Result<()> {
        let _ = cx;
        Ok(())
    }

    /// Figures of the trainer's own for the log, after [`Trainer::after_step`].
    fn log(&self, row: &mut Map<String, Value>) {
        let _ = row;
    }

    /// What must survive a restart, beside the dictionary and the optimiser.
    fn state(&self) -> Result<State> {
        Ok(State::new())
    }

    /// Takes back what [`Trainer::state`] gave.
    fn restore(&mut self, state: &State) -> Result<()> {
        let _ = state;
        Ok(())
    }
}
