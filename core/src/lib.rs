//! What every dictlearn plugin builds on: the component traits, the registry, and the rooms below.
//!
//! Core names no plugin. A plugin depends on this crate, declares a config with [`component`](macro@component) and
//! implements its trait; linking it into a binary is enough for a YAML file to name it. The program and the library that users
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
mod flag;
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
mod tagged;
pub mod train;

pub use dictlearn_macros::component;
pub use {inventory, schemars, tracing};

/// What the code that [`component`](macro@component) writes refers to.
#[doc(hidden)]
pub mod __component {
    pub use anyhow::Result;
    pub use {inventory, schemars, serde, typetag};

    pub use crate::data::TaggedSource;
    pub use crate::data::text::TaggedText;
    pub use crate::formats::TaggedFormat;
    pub use crate::lm::config::read;
    pub use crate::lm::{ModelConfig, ModelFamily};
    pub use crate::registry::{Component, ComponentKind, ShortRun};
    pub use crate::report::{TaggedLogger, TaggedMetric};
    pub use crate::sae::{DictionaryCx, TaggedDictionary, dict_size};
    pub use crate::train::top_k::TopKSettings;
    pub use crate::train::{ResampleWeight, RunLength, Schedule, TaggedModifier, TaggedTrainer, TrainerCx};
}
