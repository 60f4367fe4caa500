//! Batches that are skipped because they are not finite (`on_nonfinite: skip_batch`).

use serde::{Deserialize, Serialize};

/// Count of skipped batches.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Skips {
    pub(super) count: u64,
    in_a_row: u64,
    first: String,
}

/// Number of batches skipped in a row at which the run stops.
pub(super) const SKIPS: u64 = 100;

impl Skips {
    /// Counts a skipped batch. Returns true if too many were skipped in a row.
    pub(super) fn add(&mut self, why: &str) -> bool {
        if self.count == 0 {
            self.first = why.to_owned();
        }
        self.count += 1;
        self.in_a_row += 1;
        self.in_a_row >= SKIPS
    }

    /// Ends a row of skipped batches.
    pub(super) fn taken(&mut self) {
        self.in_a_row = 0;
    }

    /// Returns a note for the end of the run, if batches were skipped.
    pub(super) fn note(&self, whose: &str) -> Option<String> {
        (self.count > 0)
            .then(|| format!("warning: {whose}: {} batches were skipped, the first: {}", self.count, self.first))
    }
}
