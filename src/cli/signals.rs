//! Signals: the first stops a command cleanly, the second ends it at once.

use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use dictlearn_core::interrupt::{Interrupt, Response, status};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::output::say;

/// Starts listening for SIGINT, SIGTERM and, unless it is ignored (`nohup`), SIGHUP.
pub fn listen() -> Result<Arc<Interrupt>> {
    let mut heard = vec![SIGINT, SIGTERM];
    if !is_ignored(SIGHUP) {
        heard.push(SIGHUP);
    }
    let mut signals = Signals::new(heard).context("cannot listen for signals")?;
    let interrupt = Arc::new(Interrupt::default());
    let seen = interrupt.clone();
    let listen = move || {
        for signal in signals.forever() {
            let signal = signal as u8;
            match seen.ask(signal) {
                Response::AfterThisStep => {
                    say!("\nstopping after this step; interrupt again to quit now");
                    continue;
                }
                Response::NothingToLose => say!(
                    "\nstopped during evaluation; the trained SAEs are saved, and `dictlearn eval RUN --save` evaluates them"
                ),
                Response::AtOnce => {}
            }
            // SAFETY: ends the process. `exit` would run libtorch's destructors while its threads compute.
            unsafe { libc::_exit(status(signal).into()) }
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(listen).context("cannot listen for signals")?;
    Ok(interrupt)
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: writes only to `action`; all zeros are a valid `sigaction`.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    }
}
