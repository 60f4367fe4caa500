//! Signals: the first lets a run end in good order, the second ends it at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The signal that has come to this process, 0 for none; for what works long without a run to ask.
static ASKED: AtomicU8 = AtomicU8::new(0);

/// Whether a signal has come, if anybody listens.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed) != 0
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
    asked: AtomicU8,
    at_once: AtomicBool,
}

impl Interrupt {
    /// Listens to SIGINT, SIGTERM and SIGHUP from now on; not to SIGHUP where the program was told not to hear it (`nohup`).
    pub fn listen() -> Result<Arc<Self>> {
        let mut heard = vec![SIGINT, SIGTERM];
        if !is_ignored(SIGHUP) {
            heard.push(SIGHUP);
        }
        let mut signals = Signals::new(heard).context("cannot listen to signals")?;
        let interrupt = Arc::new(Interrupt::default());
        let seen = interrupt.clone();
        let listen = move || {
            for signal in signals.forever() {
                let signal = signal as u8;
                ASKED.store(signal, Ordering::Relaxed);
                let again = seen.asked.swap(signal, Ordering::SeqCst) != 0;
                let at_once = seen.at_once.load(Ordering::SeqCst);
                if at_once && !again {
                    crate::say!("\nstopped in the evaluation; what was trained is saved");
                }
                if at_once || again {
                    // SAFETY: ends the process and touches no memory. `exit` would run libtorch's destructors while its
                    // threads compute.
                    unsafe { libc::_exit(status(signal).into()) }
                }
                crate::say!("\nstopping after this step; interrupt again to quit now");
            }
        };
        thread::Builder::new().name("signals".to_owned()).spawn(listen).context("cannot listen to signals")?;
        Ok(interrupt)
    }

    /// Whether a signal has come.
    pub fn asked(&self) -> bool {
        // In one order with `nothing_to_lose`: a signal is seen by who calls both, or ends the process.
        self.asked.load(Ordering::SeqCst) != 0
    }

    /// The exit status of a command that ended because of a signal: 128 and its number, as shells have it; 130 for SIGINT.
    pub fn status(&self) -> u8 {
        status(self.asked.load(Ordering::Relaxed))
    }

    /// From now on all is saved, and the first signal may end the process.
    pub fn nothing_to_lose(&self) {
        self.at_once.store(true, Ordering::SeqCst);
    }
}

fn status(signal: u8) -> u8 {
    128 + signal
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: asks how a signal is handled, into memory of our own; all zeros are a valid `sigaction`.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    }
}
