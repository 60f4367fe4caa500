//! Random number generators whose state can be saved. Shuffling, resampling and synthetic data use them, so that a
//! resumed run draws the same numbers. tch cannot read the state of libtorch's global generator.

use std::sync::{Mutex, PoisonError};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// ChaCha with 8 rounds: serialisable, and the same on every platform.
pub type Rng = ChaCha8Rng;

/// Returns the generator for one purpose of a run. Different purposes get independent streams of the same seed.
pub fn rng(seed: u64, purpose: &str) -> Rng {
    // FNV-1a: stable across platforms and Rust versions, unlike std's hashers.
    let stream = purpose
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let mut rng = Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

/// Calls `make` with libtorch's global generator seeded by `seed`. Concurrent calls wait for each other, because all
/// threads share that generator: the result depends on the seed alone.
pub fn seeded<T>(seed: u64, make: impl FnOnce() -> T) -> T {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    make()
}
