//! Signals: the first lets a run end in good order, the second ends it at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use anyhow::{Context, Result};

/// Whether the user asked a run to end.
#[derive(Debug, Default)]
pub struct Interrupt {
    asked: AtomicBool,
    at_once: AtomicBool,
}

impl Interrupt {
    /// Listens to SIGINT and SIGTERM from now on.
    pub fn listen() -> Result<Arc<Self>> {
        let interrupt = Arc::new(Interrupt::default());
        let seen = interrupt.clone();
        ctrlc::set_handler(move || {
            if seen.asked.swap(true, Ordering::Relaxed) || seen.at_once.load(Ordering::Relaxed) {
                // SAFETY: ends the process and touches no memory. `exit` would run libtorch's destructors while its
                // threads compute.
                unsafe { libc::_exit(130) }
            }
            eprintln!("\nstopping after this step; once more to stop at once");
        })
        .context("cannot listen to signals")?;
        Ok(interrupt)
    }

    /// Whether a signal has come.
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// From now on all is saved, and the first signal may end the process.
    pub fn nothing_to_lose(&self) {
        self.at_once.store(true, Ordering::Relaxed);
    }
}
