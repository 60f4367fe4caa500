//! What every dictlearn plugin needs: the traits, the registry, the config, the training loop and the command line.
//!
//! Core names no plugin. A plugin depends on this crate, declares a config with [`component`](macro@component) and implements
//! its trait; linking it into a binary is enough for a YAML file to name it.

pub mod adapted;
pub mod autoencoder;
pub mod checkpoint;
pub mod cli;
mod compare;
pub mod component;
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

pub use dictlearn_macros::component;
pub use {inventory, schemars};

/// What the code that [`component`](macro@component) writes refers to.
#[doc(hidden)]
pub mod __component {
    pub use anyhow::Result;
    pub use {inventory, schemars, serde, typetag};

    pub use crate::component::*;
    pub use crate::dictionary::{DictionaryCx, dict_size};
    pub use crate::lm::config::read;
    pub use crate::lm::{ModelConfig, ModelFamily};
    pub use crate::registry::{Component, Kind, ShortRun};
    pub use crate::resample::ResampleWeight;
    pub use crate::schedule::{RunLength, Schedule};
    pub use crate::top_k::TopKSettings;
    pub use crate::trainer::TrainerCx;
}
