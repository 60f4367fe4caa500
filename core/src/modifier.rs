//! Modifiers: features that compose with any trainer, such as penalties, edits of gradients and resampling.

use std::fmt::Debug;

use anyhow::Result;

use crate::dictionary::Dictionary;
use crate::state::State;
use crate::trainer::{AfterStep, Pass, Terms};

/// The config of a modifier.
#[typetag::serde(tag = "type")]
pub trait ModifierConfig: Debug + Send + Sync {
    /// The modifier for this dictionary, or why it cannot work with it.
    fn build(&self, dictionary: &dyn Dictionary) -> Result<Box<dyn Modifier>>;
}

/// A modifier.
pub trait Modifier: Send {
    /// Adds to the loss, or changes its terms.
    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        let _ = (pass, terms);
        Ok(())
    }

    /// Edits the dictionary's gradients, before the trainer constrains them.
    fn gradients(&mut self, dictionary: &dyn Dictionary) -> Result<()> {
        let _ = dictionary;
        Ok(())
    }

    /// Acts after the optimiser's step.
    fn after_step(&mut self, cx: &mut AfterStep) -> Result<()> {
        let _ = cx;
        Ok(())
    }

    /// What must survive a restart.
    fn state(&self) -> Result<State> {
        Ok(State::new())
    }

    /// Takes back what [`Modifier::state`] gave.
    fn restore(&mut self, state: &State) -> Result<()> {
        let _ = state;
        Ok(())
    }
}
