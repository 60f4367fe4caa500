//! Signals: the first lets a run end in good order, the second ends it at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use anyhow::{bail, Context, Result};

/// Whether a signal has come to this process, for what works long without a run to ask.
static ASKED: AtomicBool = AtomicBool::new(false);

/// Whether a signal has come, if anybody listens.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Breaks off what works long (a download, the filling of a buffer) when a signal has come. Whoever calls it must be left
/// as it could be saved; a run saves itself then.
pub fn check() -> Result<()> {
    if asked() {
        bail!("interrupted");
    }
    Ok(())
}

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
            ASKED.store(true, Ordering::Relaxed);
            if seen.asked.swap(true, Ordering::Relaxed) || seen.at_once.load(Ordering::Relaxed) {
                // SAFETY: ends the process and touches no memory. `exit` would run libtorch's destructors while its
                // threads compute.
                unsafe { libc::_exit(130) }
            }
            eprintln!("\nstopping; once more to stop at once");
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
