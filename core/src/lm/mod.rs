//! Language models: the shared decoder and its blocks, module names, weights, and opening a model by name.

mod arithmetic;
mod blocks;
pub mod config;
pub mod decoder;
mod family;
mod files;
mod hook_point;
mod kernels;
mod model;
mod names;
mod rotary;
mod weight_file;
mod weights;

pub use arithmetic::ARITHMETIC;
pub use blocks::{Activation, Attention, Context, Linear, Norm, NormKind, activation};
pub use decoder::{Decoder, DecoderConfig};
pub use family::{DecoderFamily, ModelConfig, ModelFamily, open_model, random_model};
pub use files::{EmbeddedModel, ModelFiles};
pub use hook_point::*;
pub use model::*;
pub use names::Names;
pub use rotary::{Rope, Rotary};
pub use weights::{ModelCx, Weights};
