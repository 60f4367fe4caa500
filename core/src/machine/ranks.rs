//! Where numbers of several ranks meet. A rank is one of the processes that train together, each on its share of a batch.
//!
//! There is one rank today, so every function here returns what it is given. Each marks a place at which replicas would
//! otherwise drift apart, and is called with what a collective operation needs:
//!
//! | | | called by |
//! | --- | --- | --- |
//! | gradients | [`mean_in_place`] | a step, before modifiers and clipping |
//! | which features fired | [`any`] | `Firing::after` |
//! | what moves the threshold | [`gather_rows`] | `TopKTrainer` |
//! | the first batch | [`gather_rows`] | a step, before weights are initialised from it |
//! | losses that are logged, norms of activations | [`mean`] | a logged step, the start of a run |
//! | stop, end of the data, not finite | [`vote`] | the loop of a run |
//!
//! What is reduced is decided by the same rule on every rank, or one of them would wait for ever: no call may depend on a
//! rank's own numbers.

use tch::Tensor;

/// Averages tensors over ranks, in place.
pub fn mean_in_place(tensors: &[Tensor]) {
    let _ = tensors;
}

/// Averages a number over ranks.
pub fn mean(number: f64) -> f64 {
    number
}

/// For each element of a bool tensor whether it is true on any rank.
pub fn any(flags: &Tensor) -> Tensor {
    flags.shallow_clone()
}

/// The rows of all ranks, in the order of ranks: `[Σ rows, ..]` of `[rows, ..]`.
pub fn gather_rows(rows: &Tensor) -> Tensor {
    rows.shallow_clone()
}

/// True if any rank says so.
pub fn vote(mine: bool) -> bool {
    mine
}
