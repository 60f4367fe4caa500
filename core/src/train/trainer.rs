//! Trainers: how a dictionary learns.
//!
//! A trainer gives a loss, and autograd does the rest; or it finds the gradients by hand too. The order of a step is the same for all and stands in
//! [`Training::step`](crate::train::training::Training::step).

use std::fmt::Debug;

use anyhow::{Result, bail};
use serde_json::{Map, Value};
use tch::Tensor;

use super::constraint::Constraints;
use super::gradients::Gradients;
use super::optim::{Adam, AdamConfig};
use super::schedule::RunLength;
use super::terms::Terms;
use crate::data::Batch;
use crate::error::InputError;
use crate::files::state::State;
use crate::machine::rng::Rng;
use crate::sae::Selection;
use crate::sae::{Code, Dictionary};

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

crate::component::tagged! {
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

/// What a step by hand starts from.
pub struct HandPass<'a> {
    /// Step, counted from 0.
    pub step: u64,
    /// What the dictionary reads and what it is to reconstruct.
    pub batch: &'a Batch,
    /// The dictionary.
    pub dictionary: &'a dyn Dictionary,
    /// The last step's gradients, whose memory the gradients of this step may be written to.
    pub gradients: &'a Gradients,
    /// Whether the figures of this step will be logged.
    pub logging: bool,
}

impl HandPass<'_> {
    /// A parameter of the dictionary, without its history.
    pub fn parameter(&self, name: &str) -> Result<Tensor> {
        let found = self.dictionary.parameters().into_iter().find(|(known, _)| *known == name);
        found
            .map(|(_, parameter)| parameter.detach())
            .ok_or_else(|| anyhow::anyhow!("the class {} has no parameter `{name}`", self.dictionary.class()))
    }
}

/// What a step by hand found.
pub struct ByHand {
    /// For how many activations of the batch each feature fired, `[F]`; needed if the step is logged.
    pub fired: Option<Tensor>,
    /// How far the reconstruction is off, x̂ − target, [B, d_out]; needed if the step is logged.
    pub error: Option<Tensor>,
    /// The loss's gradient by each parameter that has one, by state-dict names. It may lie in the memory of
    /// [`HandPass::gradients`], which the next step writes over.
    pub gradients: Vec<(&'static str, Tensor)>,
}

/// Refuses a dictionary that a penalty cannot train: one that encodes by a threshold which only its own trainers keep.
///
/// `trainer` is the name of the one that asks.
pub fn penalizable(dictionary: &dyn Dictionary, trainer: &str) -> Result<()> {
    if dictionary.selection().is_some_and(Selection::by_threshold) {
        bail!(InputError::new(format!(
            "the trainer `{trainer}` cannot train the class {}: it encodes by a threshold that the trainer must keep, \
             and a penalty keeps none",
            dictionary.class()
        ))
        .help(format!("use {}, or another dictionary", dictionary.usual_trainers())));
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
    /// The optimiser's settings.
    fn adam(&self) -> AdamConfig;

    /// The learning rate for a step, schedule included.
    fn lr(&self, step: u64) -> f64;

    /// Whether anything that it does at a step depends on how many steps the run is laid out for ([`TrainerCx::steps`]). If so
    /// a run cannot be made longer when it is resumed.
    fn depends_on_steps(&self) -> bool {
        true
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

    /// The terms of the loss. A term of the dictionary's own ([`Dictionary::auxiliary_loss`]) is added after them.
    ///
    /// It changes nothing that [`Trainer::state`] saves, since a loss that is not finite refuses the step: what the loss
    /// counts is noted here and kept by [`Trainer::after_step`]. Avoid reading numbers from a GPU, which waits for it.
    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()>;

    /// The same by hand, where the trainer can: the terms of the loss, and their gradients without autograd. `None`, as by
    /// default, leaves it to [`Trainer::loss`] and autograd; so does an SAE with modifiers, which need what autograd
    /// differentiates. Called with gradients off. The contract test holds both to the same numbers.
    fn by_hand(&mut self, pass: &HandPass, terms: &mut Terms) -> Result<Option<ByHand>> {
        let _ = (pass, terms);
        Ok(None)
    }

    /// Whether the loss has a sparsity term ([`Terms::add_sparsity`]), which modifiers may change.
    fn has_sparsity_term(&self) -> bool {
        false
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
