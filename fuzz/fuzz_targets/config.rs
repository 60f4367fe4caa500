//! See `dictlearn_fuzz::config`.
#![no_main]

use dictlearn_fuzz::{config, limit_memory};

libfuzzer_sys::fuzz_target!(init: limit_memory(), |data: &[u8]| {
    config(data);
});
