//! The directory of a run: locked by one process at a time, and never overwritten.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::run::checkpoint::Checkpoints;
use crate::run::compare::shell_quoted;
use dictlearn_core::error::InputError;

/// Locks a directory against other processes that train in it, until the file is dropped.
pub(super) fn lock(run_dir: &Path) -> Result<fs::File> {
    let file = fs::File::open(run_dir).with_context(|| format!("cannot open {}", run_dir.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            bail!(
                InputError::new(format!("another process is training in {}", run_dir.display()))
                    .help("wait for it or stop it, or choose another `--output-dir`")
            )
        }
        // Some file systems have no locks.
        Err(fs::TryLockError::Error(error)) => {
            tracing::warn!("{} cannot be locked: {error}; make sure that no other run writes to it", run_dir.display());
            Ok(file)
        }
    }
}

/// Returns the paths in a directory; none if it cannot be read.
pub(super) fn entries(dir: &Path) -> BTreeSet<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// Refuses an output directory that holds another run, or anything else that a run would overwrite.
pub(super) fn refuse_other_run(run_dir: &Path, resume: bool, checkpoints: &Checkpoints) -> Result<()> {
    if run_dir.is_file() {
        bail!(InputError::new(format!("the output directory {} is a file", run_dir.display())));
    }
    if resume && checkpoints.exist() {
        bail!(
            InputError::new(format!("no checkpoint of {} can be read", run_dir.display()))
                .help("to start from scratch, choose another `--output-dir` or remove it")
        );
    }
    let trained = entries(run_dir).iter().any(|sae| sae.join("ae.safetensors").exists());
    if resume && trained {
        bail!(
            InputError::new(format!("{} holds trained SAEs but no checkpoint to resume from", run_dir.display())).help(
                format!(
                    "`dictlearn eval {} --save` evaluates them; to start from scratch, choose another `--output-dir` or \
                     remove it",
                    shell_quoted(&run_dir.to_string_lossy())
                )
            )
        );
    }
    if run_dir.join("config.yaml").exists() && !resume {
        bail!(
            InputError::new(format!("the output directory {} already holds a run", run_dir.display()))
                .help("choose another (`--output-dir`), resume it (`--resume`), or remove it")
        );
    }
    Ok(())
}
