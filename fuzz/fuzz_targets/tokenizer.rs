//! See `dictlearn_fuzz::tokenizer`.
#![no_main]

use dictlearn_fuzz::{limit_memory, tokenizer};

fn begin() {
    limit_memory();
    // libFuzzer's hook ends the process at any panic, and those of the tokenizers crate are caught by the reader.
    drop(std::panic::take_hook());
}

libfuzzer_sys::fuzz_target!(init: begin(), |data: &[u8]| {
    tokenizer(data);
});
