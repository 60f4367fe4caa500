//! Result of encoding a batch in training.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::Tensor;

/// Result of encoding a batch in training, for B activations and F features.
#[derive(Debug)]
pub struct Code {
    /// Features `[B, F]` as training uses them.
    pub features: Tensor,
    /// Activations that a sparsity penalty applies to, if not the features. Read through [`Code::penalized`].
    penalized: Option<Tensor>,
    /// Other tensors that a method's loss needs, by name (`pre_activations`, `top_indices`, ...).
    extras: BTreeMap<&'static str, Tensor>,
}

impl Code {
    /// Makes a code with features only.
    pub fn new(features: Tensor) -> Self {
        Code { features, penalized: None, extras: BTreeMap::new() }
    }

    /// Makes sparsity penalties apply to these activations `[B, F]` instead of the features.
    #[must_use]
    pub fn penalize(mut self, activations: Tensor) -> Self {
        self.penalized = Some(activations);
        self
    }

    /// Returns the activations `[B, F]` that a sparsity penalty applies to, never negative. These are the features,
    /// unless the dictionary says otherwise (a gate's activations, or features times decoder norms).
    pub fn penalized(&self) -> &Tensor {
        self.penalized.as_ref().unwrap_or(&self.features)
    }

    /// Returns which features fired for any activation of the batch, bool `[F]`.
    pub fn fired(&self) -> Tensor {
        self.features.detach().not_equal(0.0).any_dim(0, false)
    }

    /// Adds a tensor that the loss needs.
    #[must_use]
    pub fn with(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.extras.insert(name, tensor);
        self
    }

    /// Returns an exposed tensor by name, or an error if there is none.
    pub fn extra(&self, name: &str) -> Result<&Tensor> {
        self.get(name).ok_or_else(|| anyhow::anyhow!("this dictionary does not expose `{name}`"))
    }

    /// Returns an exposed tensor by name, for methods that can do without it.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.extras.get(name)
    }
}
