//! Loggers: where the figures of a run go.

use std::fmt::Debug;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};

/// The config of a logger.
#[typetag::serde(tag = "type")]
pub trait LoggerConfig: Debug + Send + Sync {
    /// Opens the logger for a run in `run_dir`. With `resume_at` what was logged from that step on is dropped, since
    /// it will be logged again.
    fn build(&self, run_dir: &Path, resume_at: Option<u64>) -> Result<Box<dyn Logger>>;
}

/// A logger.
pub trait Logger: Send {
    /// Takes the figures of one SAE at one step: `step`, `sae`, then what was measured.
    fn log(&mut self, row: &Map<String, Value>) -> Result<()>;

    /// Makes sure that what was logged is where it belongs.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
