//! Tracks how long each feature has been silent.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::files::state::State;
use crate::machine::ranks;

/// Time since each feature last fired, in steps or tokens, as the owner chooses.
#[derive(Debug)]
pub struct Firing {
    since: Tensor,
    /// Upper bound of the counters, known without reading them.
    most: i64,
}

impl Firing {
    /// Makes counters of 0, on the device of the weights.
    pub fn new(features: i64, device: Device) -> Self {
        Firing { since: Tensor::zeros([features], (Kind::Int64, device)), most: 0 }
    }

    /// Returns the counters after a batch of `amount` steps or tokens, in which the features `fired`, bool `[F]`. Does
    /// not change `self`: a trainer stores the result in [`Trainer::after_step`](super::Trainer::after_step), once the
    /// step is taken.
    #[must_use]
    pub fn after(&self, fired: &Tensor, amount: i64) -> Firing {
        let mut after = self.after_silence(amount);
        after.reset(fired);
        after
    }

    /// Does the same for feature indices, int64 of any shape.
    #[must_use]
    pub fn after_indices(&self, fired: &Tensor, amount: i64) -> Firing {
        let mut after = self.after_silence(amount);
        after.reset_indices(fired);
        after
    }

    fn after_silence(&self, amount: i64) -> Firing {
        let amount = ranks::total(amount);
        Firing { since: &self.since + amount, most: self.most.saturating_add(amount) }
    }

    /// Sets the counters of features to 0, by index, int64 of any shape.
    pub fn reset_indices(&mut self, indices: &Tensor) {
        let _ = self.since.index_fill_(0, &ranks::gather_rows(&indices.reshape([-1])), 0);
    }

    /// Returns which features have been silent for at least this long, bool `[F]`.
    pub fn silent_for(&self, at_least: i64) -> Tensor {
        self.since.ge(at_least)
    }

    /// Returns the indices of features that have been silent for at least this long, int64, if there are any. Causes a
    /// GPU sync only if there could be some.
    pub fn silent_indices(&mut self, at_least: i64) -> Option<Tensor> {
        if self.most < at_least {
            return None;
        }
        let found = self.silent_for(at_least).nonzero().reshape([-1]);
        if found.size()[0] > 0 {
            return Some(found);
        }
        self.most = self.since.max().int64_value(&[]);
        None
    }

    /// Returns the counters, int64 `[F]`.
    pub fn since(&self) -> &Tensor {
        &self.since
    }

    /// Sets the counters of features, bool `[F]`, to 0.
    pub fn reset(&mut self, features: &Tensor) {
        let _ = self.since.masked_fill_(&ranks::any(features), 0);
    }

    /// Returns the state for a checkpoint.
    pub fn state(&self) -> State {
        let mut state = State::new();
        state.put_tensor("since", &self.since);
        state
    }

    /// Restores what [`Firing::state`] returned.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        state.load_tensor("since", &mut self.since)?;
        self.most = self.since.max().int64_value(&[]);
        Ok(())
    }
}
