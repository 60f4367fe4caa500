//! What every dictlearn plugin needs: the traits, the registry, the config, the training loop and the command line.
//!
//! Core names no plugin. A plugin depends on this crate, implements one of the traits and registers it with
//! [`register!`]; linking it into a binary is enough for a config to name it.

pub mod adapted;
pub mod autoencoder;
pub mod checkpoint;
pub mod cli;
mod compare;
pub mod config;
pub mod constraint;
pub mod contract;
pub mod describe;
pub mod device;
pub mod dictionary;
pub mod doctor;
pub mod evaluate;
pub mod files;
pub mod firing;
pub mod format;
pub mod harvest;
pub mod hub;
pub mod interrupt;
pub mod lm;
pub mod logger;
pub mod memory;
pub mod metric;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod mkl;
pub mod model;
pub mod modifier;
pub mod new_plugin;
pub mod numpy;
pub mod optim;
mod parallel;
pub mod prelude;
pub mod progress;
pub mod push;
pub mod registry;
pub mod resample;
pub mod rng;
pub mod run;
pub mod saved;
mod saver;
pub mod schedule;
pub mod source;
pub mod state;
pub mod tensors;
pub mod text;
pub mod top_k;
pub mod torch_file;
pub mod trainer;
pub mod training;
pub mod two_layer;
mod watch;
mod yaml;

pub use {inventory, schemars};
