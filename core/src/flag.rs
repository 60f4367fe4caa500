//! Thread-local flags.

use std::cell::Cell;
use std::thread::LocalKey;

/// Runs `work` with the thread's flag set. Clears the flag afterwards, also after a panic.
pub(crate) fn during<T>(flag: &'static LocalKey<Cell<bool>>, work: impl FnOnce() -> T) -> T {
    struct Clear(&'static LocalKey<Cell<bool>>);
    impl Drop for Clear {
        fn drop(&mut self) {
            self.0.set(false);
        }
    }
    flag.set(true);
    let _clear = Clear(flag);
    work()
}
