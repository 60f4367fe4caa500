//! Language models: the shared decoder and its blocks, module names, weights, and opening a model by name.

mod arithmetic;
mod attention;
mod blocks;
mod build;
pub mod config;
mod context;
pub mod decoder;
mod experts;
mod family;
mod files;
mod hook_point;
mod kernels;
mod mlp;
mod model;
mod mxfp4;
mod names;
mod norm;
mod rotary;
mod weight_file;
mod weights;

pub use arithmetic::ARITHMETIC;
pub use attention::{AttentionConfig, NormedOver, Projections, QkNorm};
pub use blocks::{Activation, Linear, activation};
pub use build::Builder;
pub use context::{Alibi, Context, ContextConfig, KeysValues};
pub use decoder::{Decoder, DecoderConfig};
pub use experts::{ExpertLayout, ExpertsConfig, Glu, SharedExpert};
pub use family::{DecoderFamily, ModelConfig, ModelFamily, open_model, random_model, text_model};
pub use files::{EmbeddedModel, ModelFiles};
pub use hook_point::*;
pub use mlp::{MlpConfig, MlpLayout};
pub use model::*;
pub use names::{LayerNames, Names};
pub use norm::{Norm, NormConfig, NormKind};
pub use rotary::{Rope, Rotary};
pub use weights::{ModelCx, Weights};
