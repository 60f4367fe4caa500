//! What language-model families share: the decoder and its blocks, names, weights, and opening a model by its name.

mod blocks;
pub mod config;
pub mod decoder;
mod files;
mod kernels;
mod names;
mod rotary;
mod weights;

pub use blocks::{Activation, Attention, Context, Linear, Norm, NormKind, activation};
pub use decoder::{Decoder, DecoderConfig};
pub use files::{EmbeddedModel, ModelFiles};
pub use names::Names;
pub use rotary::{Rope, Rotary};
pub use weights::{ModelCx, ModelFamily, Weights, open_model, random_model};
