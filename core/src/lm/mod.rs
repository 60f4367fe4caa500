//! What language-model families share: the decoder and its blocks, names, weights, and opening a model by its name.

mod arithmetic;
mod blocks;
pub mod config;
pub mod decoder;
mod files;
mod hook_point;
mod kernels;
mod model;
mod names;
mod rotary;
mod weights;

pub use blocks::{Activation, Attention, Context, Linear, Norm, NormKind, activation};
pub use decoder::{Decoder, DecoderConfig};
pub use files::{EmbeddedModel, ModelFiles};
pub use hook_point::*;
pub use model::*;
pub use names::Names;
pub use rotary::{Rope, Rotary};
pub use weights::{DecoderFamily, ModelConfig, ModelCx, ModelFamily, Weights, open_model};
