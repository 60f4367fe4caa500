//! Flags of a thread.

use std::cell::Cell;
use std::thread::LocalKey;

/// Does work while the thread's flag is set. A panic clears it too.
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
