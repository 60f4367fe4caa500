//! See `dictlearn_fuzz::safetensors`.
#![no_main]

use dictlearn_fuzz::{limit_memory, safetensors};

libfuzzer_sys::fuzz_target!(init: limit_memory(), |data: &[u8]| {
    safetensors(data);
});
