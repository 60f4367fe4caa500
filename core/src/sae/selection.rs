//! Number of features that a dictionary of the TopK family selects, and its inference threshold.

use std::cell::Cell;

use anyhow::{Result, bail};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::affine::{SavedTensors, scale_in_place};
use super::code::Code;
use crate::error::InputError;

/// Number of selected features k, and the threshold.
#[derive(Debug)]
pub struct Selection {
    k: Cell<i64>,
    k_tensor: Tensor,
    threshold: Tensor,
    by_threshold: bool,
}

impl Selection {
    /// Selects `k` features of each activation in training. With `by_threshold`, inference selects by the threshold
    /// instead, so that an activation's features do not depend on its batch.
    pub fn new(k: i64, by_threshold: bool, device: Device) -> Self {
        Selection {
            k: Cell::new(k),
            k_tensor: Tensor::full([0_i64; 0], k, (Kind::Int, device)),
            threshold: Tensor::full([0_i64; 0], -1.0, (Kind::Float, device)),
            by_threshold,
        }
    }

    /// Returns an error unless `k` is from 1 to the number of features.
    pub fn check(k: i64, features: i64) -> Result<()> {
        if k < 1 {
            bail!(InputError::new(format!("`k` is {k}, but at least one feature must be kept")).field("k"));
        }
        if k > features {
            bail!(
                InputError::new(format!("`k` is {k}, but the dictionary has only {features} features"))
                    .field("k")
                    .help("make `k` smaller or `dict_size` larger")
            );
        }
        Ok(())
    }

    /// Restores a saved dictionary's selection. k comes from the saved tensor, which annealing may have changed, or
    /// else from the config.
    pub fn saved(saved: &SavedTensors, features: i64, by_threshold: bool) -> Result<Self> {
        let k = match saved.tensors.get("k") {
            Some(k) if k.numel() == 1 && k.is_floating_point() => k.double_value(&[]) as i64,
            Some(k) if k.numel() == 1 => k.reshape([1]).int64_value(&[0]),
            Some(_) => 0,
            None => saved.trainer.get("k").and_then(Value::as_i64).unwrap_or(0),
        };
        if !(1..=features).contains(&k) {
            bail!(InputError::new(format!("`k` is {k}, but must be from 1 to {features}, the number of features")));
        }
        Ok(Selection::new(k, by_threshold, saved.device))
    }

    /// Number of features selected per activation.
    pub fn k(&self) -> i64 {
        self.k.get()
    }

    /// Sets k.
    pub fn set_k(&self, k: i64) {
        self.k.set(k);
        let _ = self.k_tensor.shallow_clone().fill_(k);
    }

    /// Running mean of the smallest selected feature, a float32 scalar; negative until the first update.
    pub fn threshold(&self) -> &Tensor {
        &self.threshold
    }

    /// Whether inference selects by the threshold.
    pub fn by_threshold(&self) -> bool {
        self.by_threshold
    }

    /// Returns the saved tensors, `k` (int32) and `threshold`.
    pub fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        vec![("k", self.k_tensor.shallow_clone()), ("threshold", self.threshold.shallow_clone())]
    }

    /// Implements [`Dictionary::loaded`](super::Dictionary::loaded).
    pub fn loaded(&self) {
        self.k.set(self.k_tensor.int64_value(&[]));
    }

    /// Implements [`Dictionary::scale_biases`](super::Dictionary::scale_biases).
    pub fn scale(&self, scale: f64) {
        if self.threshold.double_value(&[]) >= 0.0 {
            scale_in_place(&self.threshold, scale);
        }
    }

    /// Applies ReLU to pre-activations `[.., F]` and keeps the k largest of each activation.
    pub fn of_each(&self, pre_activations: Tensor) -> Code {
        let post_relu = pre_activations.relu();
        let (values, indices) = post_relu.topk(self.k(), -1, true, false);
        let features = post_relu.zeros_like().scatter(-1, &indices, &values);
        Code::new(features)
            .with("pre_activations", pre_activations)
            .with("post_relu", post_relu)
            .with("top_values", values)
            .with("top_indices", indices)
    }

    /// Keeps, for each activation, the k `candidates` `[.., F]` with the highest `scores` `[.., F]`. Candidates may be
    /// negative.
    pub fn by_score(&self, candidates: Tensor, scores: &Tensor) -> Code {
        let (values, indices) = scores.topk(self.k(), -1, true, false);
        let selected = candidates.gather(-1, &indices, false);
        let features = candidates.zeros_like().scatter(-1, &indices, &selected);
        Code::new(features).with("post_relu", candidates).with("top_values", values).with("top_indices", indices)
    }

    /// Applies ReLU to a batch's pre-activations `[B, F]` and keeps the B·k largest. Training only.
    pub fn of_batch(&self, pre_activations: Tensor) -> Code {
        let post_relu = pre_activations.relu();
        let flat = post_relu.flatten(0, -1);
        let rows = flat.size()[0] / post_relu.size().last().copied().unwrap_or(1).max(1);
        let (values, indices) = flat.topk(self.k() * rows, -1, true, false);
        let features = flat.zeros_like().scatter(0, &indices, &values).view_as(&post_relu);
        Code::new(features)
            .with("pre_activations", pre_activations)
            .with("post_relu", post_relu)
            .with("top_values", values.unsqueeze(0))
    }

    /// Applies ReLU to pre-activations `[.., F]` and keeps those above the threshold.
    pub fn above_threshold(&self, pre_activations: &Tensor) -> Tensor {
        let post_relu = pre_activations.relu();
        &post_relu * post_relu.gt_tensor(&self.threshold)
    }

    /// θ ← β θ + (1 − β) · mean of `smallest`, the smallest positive value of each row or batch that was selected from.
    ///
    /// Infinite entries, of rows without a positive value, are ignored; in the reference they make the threshold
    /// infinite for good.
    pub(crate) fn update_threshold(&self, smallest: &Tensor, beta: f64) {
        tch::no_grad(|| {
            // Reads no value, to avoid a GPU sync.
            let some = smallest.isfinite();
            let mean = smallest.masked_fill(&some.logical_not(), f64::NAN).nanmean([0].as_slice(), false, Kind::Float);
            let mut threshold = self.threshold.shallow_clone();
            let moved = mean.where_self(&threshold.less(0.0), &(&threshold * beta + &mean * (1.0 - beta)));
            threshold.copy_(&moved.where_self(&some.any(), &threshold));
        });
    }
}
