//! Loggers: destinations for the figures of a run.

use std::fmt::Debug;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};

/// The config of a logger.
pub trait LoggerConfig: Debug + Send + Sync {
    /// Opens the logger for a run in `run_dir`. Rows logged from step `resume_at` on are dropped, because they will be
    /// logged again.
    fn build(&self, run_dir: &Path, resume_at: Option<u64>) -> Result<Box<dyn Logger>>;
}

crate::tagged::tagged! {
    /// A logger's config, tagged by `type`.
    TaggedLogger: LoggerConfig => Logger {}
}

/// A logger.
pub trait Logger: Send {
    /// Logs the figures of one SAE at one step: `step`, `sae`, then measurements. A row that cannot be written (full
    /// disk) should be kept and retried with the next one. An error is reported to the user, and the run continues.
    fn log(&mut self, row: &Map<String, Value>) -> Result<()>;

    /// Makes all logged rows durable. A checkpoint is saved only after this.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
