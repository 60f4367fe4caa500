//! Loggers: where the figures of a run go.

use std::fmt::Debug;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};

/// The config of a logger.
pub trait LoggerConfig: Debug + Send + Sync {
    /// Opens the logger for a run in `run_dir`. With `resume_at` what was logged from that step on is dropped, since
    /// it will be logged again.
    fn build(&self, run_dir: &Path, resume_at: Option<u64>) -> Result<Box<dyn Logger>>;
}

crate::component::tagged! {
    /// A logger's config, by `type`.
    TaggedLogger: LoggerConfig => Logger {}
}

/// A logger.
pub trait Logger: Send {
    /// Takes the figures of one SAE at one step: `step`, `sae`, then what was measured. What cannot be written now (the disk is
    /// full) should be kept and tried again with what comes next: of an error the user is told, and the run goes on.
    fn log(&mut self, row: &Map<String, Value>) -> Result<()>;

    /// Makes sure that what was logged is where it belongs and stays there: a checkpoint is taken only after that.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
