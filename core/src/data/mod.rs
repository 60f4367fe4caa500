//! Where training batches come from: sources of activations, texts, and the manifest of an activation cache.

pub mod manifest;
mod source;
pub mod text;

pub use source::*;
