//! See `dictlearn_fuzz::tokenizer`.
#![no_main]

use dictlearn_fuzz::{limit_memory, tokenizer};

fn begin() {
    limit_memory();
    // libFuzzer's panic hook aborts the process, but the reader catches panics of the tokenizers crate.
    drop(std::panic::take_hook());
}

libfuzzer_sys::fuzz_target!(init: begin(), |data: &[u8]| {
    tokenizer(data);
});
