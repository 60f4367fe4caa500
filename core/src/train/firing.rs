//! Which features fire: how long each has been silent.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::files::state::State;
use crate::machine::ranks;

/// For each feature, how long since it fired, in steps or tokens, whichever the owner counts in.
#[derive(Debug)]
pub struct Firing {
    since: Tensor,
    /// No counter is higher; known without a look at them.
    most: i64,
}

impl Firing {
    /// Counters at 0, on the device of the weights.
    pub fn new(features: i64, device: Device) -> Self {
        Firing { since: Tensor::zeros([features], (Kind::Int64, device)), most: 0 }
    }

    /// The counters after a batch of `amount`, in which the features `fired`, bool `[F]`, fired. These are unchanged: a
    /// trainer keeps the new ones once the step is taken, in [`Trainer::after_step`](super::Trainer::after_step).
    #[must_use]
    pub fn after(&self, fired: &Tensor, amount: i64) -> Firing {
        let mut after = self.after_silence(amount);
        after.reset(fired);
        after
    }

    /// The same, for features by their indices, int64 of any shape.
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

    /// Sets the counters of some features by their indices, int64 of any shape, to 0.
    pub fn reset_indices(&mut self, indices: &Tensor) {
        let _ = self.since.index_fill_(0, &ranks::gather_rows(&indices.reshape([-1])), 0);
    }

    /// Which features have been silent for at least so long, bool `[F]`.
    pub fn silent_for(&self, at_least: i64) -> Tensor {
        self.since.ge(at_least)
    }

    /// The numbers of the features that have been silent for at least so long, int64, if there are any. A GPU is waited for
    /// only where there may be some.
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

    /// The counters, int64 `[F]`.
    pub fn since(&self) -> &Tensor {
        &self.since
    }

    /// Sets the counters of some features, bool `[F]`, to 0.
    pub fn reset(&mut self, features: &Tensor) {
        let _ = self.since.masked_fill_(&ranks::any(features), 0);
    }

    /// What must survive a restart.
    pub fn state(&self) -> State {
        let mut state = State::new();
        state.put_tensor("since", &self.since);
        state
    }

    /// Takes back what [`Firing::state`] gave.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        state.load_tensor("since", &mut self.since)?;
        self.most = self.since.max().int64_value(&[]);
        Ok(())
    }
}
