//! See `dictlearn_fuzz::pickle`.
#![no_main]

use dictlearn_fuzz::{limit_memory, pickle};

libfuzzer_sys::fuzz_target!(init: limit_memory(), |data: &[u8]| {
    pickle(data);
});
