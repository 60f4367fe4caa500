//! See `dictlearn_fuzz::npz`.
#![no_main]

use dictlearn_fuzz::{limit_memory, npz};

libfuzzer_sys::fuzz_target!(init: limit_memory(), |data: &[u8]| {
    npz(data);
});
