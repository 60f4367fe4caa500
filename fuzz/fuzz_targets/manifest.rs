//! See `dictlearn_fuzz::manifest`.
#![no_main]

use dictlearn_fuzz::{limit_memory, manifest};

libfuzzer_sys::fuzz_target!(init: limit_memory(), |data: &[u8]| {
    manifest(data);
});
