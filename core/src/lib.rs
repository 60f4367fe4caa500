//! What every dictlearn plugin builds on: the component traits, the registry, and the rooms below.
//!
//! Core names no plugin. A plugin depends on this crate, implements one of the traits and registers it with
//! [`register!`]; linking it into a binary is enough for a config to name it. The program and the library that users
//! depend on are the crate `dictlearn`.
//!
//! Rooms, lowest first. A room imports only from rooms above it in this list.
//!
//! | | |
//! | --- | --- |
//! | [`error`], [`suggest`], [`registry`], [`interrupt`], [`progress`], [`hub`] | errors of input, names, components, signals, progress, the Hub |
//! | [`machine`] | devices, memory, threads, random numbers |
//! | [`files`] | tensors, YAML, NumPy and PyTorch files, read safely |
//! | [`lm`] | language models run with hooks |
//! | [`data`] | sources of activations, texts |
//! | [`sae`] | dictionaries: encode, decode, save |
//! | [`train`] | trainers, modifiers, losses, one optimiser step |
//! | [`report`] | metrics and loggers |
//! | [`formats`] | published SAEs |

pub mod data;
pub mod error;
pub mod files;
pub mod formats;
pub mod hub;
pub mod interrupt;
pub mod lm;
pub mod machine;
pub mod prelude;
pub mod progress;
pub mod registry;
pub mod report;
pub mod sae;
mod schema;
pub mod suggest;
pub mod train;

pub use {inventory, schemars, tracing};
