//! What language-model families share: blocks, names, weights, and opening a model by its name.

mod blocks;
mod files;
mod names;

pub use blocks::{activation, Attention, Context, Linear, Norm, Rotary};
pub use files::{open_model, EmbeddedModel, ModelCx, ModelFamily, ModelFiles, Weights};
pub use names::Names;
