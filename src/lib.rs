//! Train and use sparse autoencoders (SAEs) on the activations of language models.
//!
//! Use a published SAE. Features are [tch](https://docs.rs/tch) tensors; no autograd graph is built.
//!
//! ```no_run
//! let sae = dictlearn::Sae::load("sae_lens:gpt2-small-res-jb:blocks.8.hook_resid_pre")?;
//! let x = tch::Tensor::randn([4, 768], tch::kind::FLOAT_CPU); // activations [N, d]
//! let features = sae.encode(&x)?; // [N, F]
//! let x_hat = sae.reconstruct(&x)?; // [N, d]
//! # Ok::<(), dictlearn::Error>(())
//! ```
//!
//! Train an SAE on your own batches, with the config structs that YAML names:
//!
//! ```
//! use dictlearn::plugins::method_top_k::{TopKConfig, TopKDictionaryConfig};
//! use dictlearn::{Batches, Sae, Trainer};
//!
//! let dictionary = TopKDictionaryConfig { k: 4, dict_size: Some(64), expansion_factor: None };
//! let mut trainer = Trainer::builder(dictionary, TopKConfig::default()).steps(50).build(16)?;
//! let source = "{type: synthetic, activation_dim: 16, n_features: 32, batch_size: 256}";
//! for batch in Batches::from_yaml(source)?.take(50) {
//!     trainer.step(&batch?.sites[0].x)?;
//! }
//! let dir = tempfile::tempdir().unwrap();
//! trainer.save(dir.path().join("sae"))?;
//! let sae = Sae::load(dir.path().join("sae"))?;
//! assert_eq!(sae.dims().features, 64);
//! # Ok::<(), dictlearn::Error>(())
//! ```
//!
//! | | |
//! | --- | --- |
//! | [`Sae`] | load, encode, decode, reconstruct, save, export |
//! | [`import`] | import published SAEs into folders |
//! | [`Trainer`] | train one SAE, step by step |
//! | [`Batches`] | read the batches of a source of activations |
//! | [`Run`] | run an experiment from YAML: `dictlearn train` |
//! | [`evaluate`] | compute the metrics of trained SAEs |
//! | [`Error`] | errors, by kind |
//! | [`config`] | the YAML of a run: its layers, checks and schema |
//! | [`plugins`] | every bundled plugin, with its config structs |
//! | [`contract`](mod@contract) | the promises that every component keeps, as a test |
//! | [`cli`] | the command line, for a program with your own plugins |
//!
//! Plugins build on the traits and tools of the crate [`dictlearn_core`].
//!
//! Building needs libtorch 2.11: `cargo xtask setup` in a clone fetches it, or set `LIBTORCH`, or `LIBTORCH_USE_PYTORCH=1`. A program
//! that trains should also link `dictlearn-process`, which sets the allocator, MKL's kernels and OpenMP's waiting.
//!
//! The library prints nothing. Messages are [`tracing`](https://docs.rs/tracing) events whose targets begin with
//! `dictlearn`. A program displays progress through [`progress::show_with`](dictlearn_core::progress::show_with).

mod batches;
pub mod cli;
pub mod config;
pub mod contract;
mod doctor;
mod error;
mod evaluate;
mod experiment;
mod new_plugin;
mod notes;
mod publish;
// Public for tests; use `Run`.
#[doc(hidden)]
pub mod run;
mod sae;
mod trainer;

pub use batches::Batches;
pub use error::{Error, Result};
pub use evaluate::evaluate;
pub use experiment::{Outcome, Run, TrainedSae};
pub use sae::{Sae, import};
pub use trainer::{StepStats, Trainer, TrainerBuilder};

/// The bundled plugins. Linking this crate registers them; [`Trainer::builder`] takes their config structs.
// build.rs generates the list from Cargo.toml.
pub mod plugins {
    include!(concat!(env!("OUT_DIR"), "/plugins.rs"));
}

/// The Rust of the pages compiles, and runs where it can.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/library.md")]
    struct Library;
}
