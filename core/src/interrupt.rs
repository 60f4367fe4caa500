//! Interruption: the first request stops long work after its current step, the second ends the process.
//!
//! Long operations must poll [`check`]. Signal handlers are installed by the program (`dictlearn::cli`).

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use anyhow::{Result, bail};

/// The error of an operation that stopped because the process was asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// The last signal that this process received, 0 for none. For long operations outside a run.
static ASKED: AtomicU8 = AtomicU8::new(0);

/// Whether this process was asked to end.
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

/// Forgets the request, for a process that continues after the run that was asked to end.
pub fn forget() {
    ASKED.store(0, Ordering::Relaxed);
}

/// How the program responds to a request to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Response {
    /// Let the run stop after its current step.
    AfterThisStep,
    /// End the process: everything is saved.
    NothingToLose,
    /// End the process: this is the second request.
    AtOnce,
}

/// Whether the user asked a run to end.
#[derive(Debug, Default)]
pub struct Interrupt {
    asked: AtomicU8,
    at_once: AtomicBool,
}

impl Interrupt {
    /// Asks the run to end, because of a signal of that number.
    pub fn ask(&self, signal: u8) -> Response {
        ASKED.store(signal, Ordering::Relaxed);
        let again = self.asked.swap(signal, Ordering::SeqCst) != 0;
        match (again, self.at_once.load(Ordering::SeqCst)) {
            (true, _) => Response::AtOnce,
            (false, true) => Response::NothingToLose,
            (false, false) => Response::AfterThisStep,
        }
    }

    /// Whether it was asked to end.
    pub fn asked(&self) -> bool {
        // Sequentially consistent with `nothing_to_lose`: a caller of both sees the signal, or the signal ends the process.
        self.asked.load(Ordering::SeqCst) != 0
    }

    /// The exit status of a command that ended because of a signal: 128 plus its number, as in shells; 130 for SIGINT.
    pub fn status(&self) -> u8 {
        status(self.asked.load(Ordering::Relaxed))
    }

    /// Declares that everything is saved, so that the first signal may end the process.
    pub fn nothing_to_lose(&self) {
        self.at_once.store(true, Ordering::SeqCst);
    }
}

/// The exit status of a process that a signal of that number ended.
pub fn status(signal: u8) -> u8 {
    128 + signal
}
