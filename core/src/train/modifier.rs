//! Modifiers: additions to any trainer, such as penalties, edits of gradients and resampling.

use std::fmt::Debug;

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::gradients::Gradients;
use super::resample::can_resample;
use super::terms::Terms;
use super::trainer::{AfterStep, Pass, Trainer};
use crate::error::InputError;
use crate::files::state::State;
use crate::sae::Dictionary;

/// The config of a modifier.
pub trait ModifierConfig: Debug + Send + Sync {
    /// Returns its requirements. They are checked before the modifier is built.
    fn needs(&self) -> Vec<Requirement> {
        Vec::new()
    }

    /// Builds the modifier, or returns why it cannot work here.
    fn build(&self, cx: &ModifierCx) -> Result<Box<dyn Modifier>>;
}

crate::tagged::tagged! {
    /// A modifier's config, tagged by `type`.
    TaggedModifier: ModifierConfig => Modifier {}
}

/// Context in which a modifier is built.
pub struct ModifierCx<'a> {
    /// The dictionary in training.
    pub dictionary: &'a dyn Dictionary,
    /// Trainer of the dictionary.
    pub trainer: &'a dyn Trainer,
}

/// Requirement of a modifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requirement {
    /// `pre_activations` `[B, F]` in the code: the values before the nonlinearity, which decide whether features fire.
    PreActivations,
    /// A decoder.
    Decoder,
    /// A sparsity term in the trainer's loss.
    SparsityTerm,
    /// Features that can be resampled, and a trainer that does not already resample them.
    Resampling,
}

impl Requirement {
    /// Describes the requirement.
    pub fn words(self) -> &'static str {
        match self {
            Requirement::PreActivations => "pre-activations",
            Requirement::Decoder => "a decoder",
            Requirement::SparsityTerm => "a sparsity term in the trainer's loss",
            Requirement::Resampling => "features that can be resampled, and a trainer that does not resample them",
        }
    }

    /// Returns an error if the requirement is not met. `name` is the modifier's.
    pub fn check(self, name: &str, cx: &ModifierCx) -> Result<()> {
        let class = cx.dictionary.class();
        let (met, why) = match self {
            Requirement::PreActivations => {
                (exposes_pre_activations(cx), format!("pre-activations, which the class {class} does not expose"))
            }
            Requirement::Decoder => {
                (cx.dictionary.decoder().is_some(), format!("a decoder, which the class {class} does not have"))
            }
            Requirement::SparsityTerm => (
                cx.trainer.has_sparsity_term(),
                "a sparsity term to replace, but this trainer's loss has none".to_owned(),
            ),
            Requirement::Resampling if cx.trainer.resamples() => {
                (false, "a trainer that does not resample, but this one does (`resample_steps`)".to_owned())
            }
            Requirement::Resampling => (
                can_resample(cx.dictionary),
                format!("features that can be resampled, but those of the class {class} cannot"),
            ),
        };
        if !met {
            bail!(
                InputError::incompatible(format!("the modifier `{name}` needs {why}"))
                    .help("leave the modifier out, or choose another dictionary or trainer")
            );
        }
        Ok(())
    }
}

fn exposes_pre_activations(cx: &ModifierCx) -> bool {
    let x = Tensor::zeros([1, cx.dictionary.dims().input], (Kind::Float, cx.dictionary.device()));
    tch::no_grad(|| cx.trainer.encode(cx.dictionary, &x).get("pre_activations").is_some())
}

/// A modifier.
pub trait Modifier: Send {
    /// Adds terms to the loss or changes them. As in [`Trainer::loss`], counters change only in
    /// [`Modifier::after_step`].
    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        let _ = (pass, terms);
        Ok(())
    }

    /// Edits the gradients in place, before the trainer's constraints apply.
    fn gradients(&mut self, gradients: &Gradients, dictionary: &dyn Dictionary) -> Result<()> {
        let _ = (gradients, dictionary);
        Ok(())
    }

    /// Runs after the optimiser's step.
    fn after_step(&mut self, cx: &mut AfterStep) -> Result<()> {
        let _ = cx;
        Ok(())
    }

    /// Returns the state for a checkpoint.
    fn state(&self) -> Result<State> {
        Ok(State::new())
    }

    /// Restores what [`Modifier::state`] returned.
    fn restore(&mut self, state: &State) -> Result<()> {
        let _ = state;
        Ok(())
    }
}
