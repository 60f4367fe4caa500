//! Where training batches come from: sources of activations, texts, and the manifest of a cache of activations.

pub mod manifest;
mod source;
pub mod text;

pub use source::*;
