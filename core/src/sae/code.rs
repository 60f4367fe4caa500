//! What one pass of training sees of a dictionary.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::Tensor;

/// What one pass of training sees of a dictionary. B activations, F features.
#[derive(Debug)]
pub struct Code {
    /// The features, [B, F], as training uses them.
    pub features: Tensor,
    /// What a sparsity penalty falls on, where that is not the features; read it with [`Code::penalized`].
    penalized: Option<Tensor>,
    /// What else the method's loss needs, by name (`pre_activations`, `top_indices`, ...).
    extras: BTreeMap<&'static str, Tensor>,
}

impl Code {
    /// A code that is its features alone.
    pub fn new(features: Tensor) -> Self {
        Code { features, penalized: None, extras: BTreeMap::new() }
    }

    /// Lets sparsity penalties fall on these activations, [B, F], instead of the features.
    #[must_use]
    pub fn penalize(mut self, activations: Tensor) -> Self {
        self.penalized = Some(activations);
        self
    }

    /// The activations that a sparsity penalty falls on, [B, F], never negative: the features, unless the dictionary
    /// carries its sparsity elsewhere (a gate, or features times the norms of their directions).
    pub fn penalized(&self) -> &Tensor {
        self.penalized.as_ref().unwrap_or(&self.features)
    }

    /// Which features fired for any activation of the batch, bool `[F]`.
    pub fn fired(&self) -> Tensor {
        self.features.detach().not_equal(0.0).any_dim(0, false)
    }

    /// Adds something that the loss needs.
    #[must_use]
    pub fn with(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.extras.insert(name, tensor);
        self
    }

    /// Something that the dictionary exposes by name.
    pub fn extra(&self, name: &str) -> Result<&Tensor> {
        self.get(name).ok_or_else(|| anyhow::anyhow!("this dictionary does not expose `{name}`"))
    }

    /// The same, where the method can do without.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.extras.get(name)
    }
}
