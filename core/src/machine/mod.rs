//! The machine that a run is on: its devices, memory and threads, and random numbers.

pub mod device;
pub mod memory;
pub mod parallel;
pub mod ranks;
pub mod rng;
