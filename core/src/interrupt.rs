//! Interruption: the first request stops long work after its current step, the second ends the process.
//!
//! Long operations must poll [`check`]. Signal handlers are installed by the program (`dictlearn::cli`).

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use anyhow::{Result, bail};

/// Error of an operation that stopped because the process was asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Last signal that this process received; 0 for none. Used by long operations outside a run.
static ASKED: AtomicU8 = AtomicU8::new(0);

/// Returns true if this process was asked to end.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed) != 0
}

/// Fails with [`Interrupted`] if this process was asked to end. Call it only where the state can be saved.
pub fn check() -> Result<()> {
    if asked() {
        bail!(Interrupted);
    }
    Ok(())
}

/// Clears the request, for a process that continues after an interrupted run.
pub fn forget() {
    ASKED.store(0, Ordering::Relaxed);
}

/// How the program responds to a request to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Response {
    /// The run stops after its current step.
    AfterThisStep,
    /// The process ends: everything is saved.
    NothingToLose,
    /// The process ends: this is the second request.
    AtOnce,
}

/// A user's request to end one run.
#[derive(Debug, Default)]
pub struct Interrupt {
    asked: AtomicU8,
    at_once: AtomicBool,
}

impl Interrupt {
    /// Asks the run to end because of this signal.
    pub fn ask(&self, signal: u8) -> Response {
        ASKED.store(signal, Ordering::Relaxed);
        let again = self.asked.swap(signal, Ordering::SeqCst) != 0;
        match (again, self.at_once.load(Ordering::SeqCst)) {
            (true, _) => Response::AtOnce,
            (false, true) => Response::NothingToLose,
            (false, false) => Response::AfterThisStep,
        }
    }

    /// Returns true if the run was asked to end.
    pub fn asked(&self) -> bool {
        // Sequentially consistent with `nothing_to_lose`: a caller of both sees the signal, or the signal ends the
        // process.
        self.asked.load(Ordering::SeqCst) != 0
    }

    /// Returns the exit status of a command that a signal ended: 128 plus the signal, as in shells (130 for SIGINT).
    pub fn status(&self) -> u8 {
        status(self.asked.load(Ordering::Relaxed))
    }

    /// Declares that everything is saved, so that the first signal may end the process.
    pub fn nothing_to_lose(&self) {
        self.at_once.store(true, Ordering::SeqCst);
    }
}

/// Returns the exit status of a process that this signal terminated.
pub fn status(signal: u8) -> u8 {
    128 + signal
}
