//! See `dictlearn_fuzz::npy`.
#![no_main]

use dictlearn_fuzz::{limit_memory, npy};

libfuzzer_sys::fuzz_target!(init: limit_memory(), |data: &[u8]| {
    npy(data);
});
