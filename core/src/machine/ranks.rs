//! Collective operations of ranks. A rank is one of the processes that train together, each on its share of a batch.
//!
//! There is one rank today, so every function here returns its argument. Each call marks a place at which replicas would
//! otherwise drift apart, and passes what a collective operation needs:
//!
//! | exchanged values | function | called by |
//! | --- | --- | --- |
//! | gradients | [`mean_in_place`] | a step, before modifiers and clipping |
//! | which features fired, and in how many activations | [`any`], [`gather_rows`], [`total`] | `Firing` |
//! | penalties that a schedule or a target reads (p-annealing, JumpReLU's L0) | [`mean_of`] | `Penalty` |
//! | values that move the threshold | [`gather_rows`] | `TopKTrainer` |
//! | activations that resampling draws from | [`gather_rows`] | `Resampling` |
//! | the first batch | [`gather_rows`] | a step, before weights are initialised from it |
//! | logged losses, norms of activations | [`mean`] | a logged step, the start of a run |
//! | stop, end of the data, not finite | [`vote`] | the loop of a run |
//!
//! Three places are not marked yet: the selection of BatchTopK over the whole batch, the variance in the auxiliary loss of
//! the TopK family, and the scale of ghost gradients.
//!
//! Every rank must make the same calls, or the ranks deadlock: no call may depend on a
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

/// Averages a scalar tensor over ranks. Gradients flow to this rank's own rows.
pub fn mean_of(scalar: &Tensor) -> Tensor {
    scalar.shallow_clone()
}

/// Sums a count over ranks.
pub fn total(count: i64) -> i64 {
    count
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
