//! Collective operations of ranks. A rank is one of the processes that train together, each on its share of a batch.
//!
//! There is one rank today, so every function returns its argument. Each call marks a place where replicas would
//! otherwise diverge, and has the arguments of a collective operation:
//!
//! | value | operation | called by |
//! | --- | --- | --- |
//! | gradients | [`mean_in_place`] | a step, before modifiers and clipping |
//! | which features fired | [`any`] | `Firing::after` |
//! | activations that update the threshold | [`gather_rows`] | `TopKTrainer` |
//! | first batch | [`gather_rows`] | a step, before weights are initialised from it |
//! | logged losses, norms of activations | [`mean`] | a logged step, the start of a run |
//! | stop, end of data, not finite | [`vote`] | the loop of a run |
//!
//! Every rank must make the same calls, or the ranks deadlock: no call may depend on a rank's own numbers.

use tch::Tensor;

/// Averages tensors over ranks, in place.
pub fn mean_in_place(tensors: &[Tensor]) {
    let _ = tensors;
}

/// Averages a number over ranks.
pub fn mean(number: f64) -> f64 {
    number
}

/// Returns the elementwise OR of a bool tensor over ranks.
pub fn any(flags: &Tensor) -> Tensor {
    flags.shallow_clone()
}

/// Concatenates the rows `[rows, ..]` of all ranks, in rank order: `[Σ rows, ..]`.
pub fn gather_rows(rows: &Tensor) -> Tensor {
    rows.shallow_clone()
}

/// Returns true if `mine` is true on any rank.
pub fn vote(mine: bool) -> bool {
    mine
}
