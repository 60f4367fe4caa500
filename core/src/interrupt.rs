//! Interruption: the first request lets long work end in good order, the second ends the process.
//!
//! Long operations must poll [`check`]. Who listens to signals is the program's business (`dictlearn::cli`).

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use anyhow::{Result, bail};

/// The signal that has come to this process, 0 for none; for long work that has no run to ask.
static ASKED: AtomicU8 = AtomicU8::new(0);

/// Whether this process was asked to end.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed) != 0
}

/// Fails if this process was asked to end. Callers must be in a state that can be saved: a run saves itself then.
pub fn check() -> Result<()> {
    if asked() {
        bail!("interrupted");
    }
    Ok(())
}

/// What a request to end calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Response {
    /// The work ends after its current step.
    AfterThisStep,
    /// Everything is saved: the process may end now.
    NothingToLose,
    /// It was asked again: the process ends now.
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
        // In one order with `nothing_to_lose`: a signal is seen by who calls both, or ends the process.
        self.asked.load(Ordering::SeqCst) != 0
    }

    /// The exit status of a command that ended because of a signal: 128 plus its number, as in shells; 130 for SIGINT.
    pub fn status(&self) -> u8 {
        status(self.asked.load(Ordering::Relaxed))
    }

    /// From now on all is saved, and the first signal may end the process.
    pub fn nothing_to_lose(&self) {
        self.at_once.store(true, Ordering::SeqCst);
    }
}

/// The exit status of a process that a signal of that number ended.
pub fn status(signal: u8) -> u8 {
    128 + signal
}
