//! The machine of a run: devices, memory, threads, ranks and random numbers.

pub mod device;
pub mod memory;
pub mod parallel;
pub mod ranks;
pub mod rng;
