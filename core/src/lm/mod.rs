//! Blocks that language-model families share: attention, rotary embeddings, norms, MLPs; loading; names.

use tch::Device;

use crate::model::HookPoint;

/// What the layers of one forward pass share.
#[derive(Debug)]
pub struct Context {}

/// Where a family keeps its parts, in Hugging Face's names.
#[derive(Debug)]
pub struct Names {
    /// The device of the weights.
    pub device: Device,
}

impl Names {
    /// The layer that holds a module, if one does.
    pub fn layer_of(&self, _module: &str) -> Option<usize> {
        None
    }

    /// The point that a TransformerLens name means.
    pub fn transformer_lens(&self, _name: &str) -> Option<HookPoint> {
        None
    }
}
