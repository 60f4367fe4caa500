//! A published SAE, read.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow, bail};
use serde_json::{Map, Value};
use tch::Tensor;

use super::site::ModelSite;
use crate::error::InputError;
use crate::sae::Normalization;

/// A published SAE, read.
#[derive(Debug, Default)]
pub struct Published {
    /// Which of the registered classes it is: `JumpReluAutoEncoder`.
    pub class: String,
    /// The class's tensors.
    pub tensors: BTreeMap<String, Tensor>,
    /// What is done to an activation before all that.
    pub normalization: Option<Normalization>,
    /// `bfloat16` or `float16`, where its publishers compute in these.
    pub dtype: Option<&'static str>,
    /// Where it reads, as far as that is known.
    pub site: Option<ModelSite>,
    /// What else config.json is to say under `trainer`.
    pub trainer: Map<String, Value>,
    /// log10 of how often each feature fires, `[F]`, where it was published.
    pub sparsity: Option<Tensor>,
    /// What biases and thresholds are still to be multiplied with, in backups of a training on scaled activations.
    pub scale: Option<f64>,
    /// Whether it is a file of the reference's, to which its `from_pretrained` does what it does.
    pub pretrained: bool,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Refuses tensors that are left when all that an SAE has were taken: they would change it, and nobody knows how.
pub fn nothing_left(tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    bail!(InputError::new(format!(
        "the weights have tensors that such an SAE does not: {}",
        tensors.keys().cloned().collect::<Vec<_>>().join(", ")
    )))
}

/// A tensor of a file of weights, or an error that lists what there is.
pub fn take(tensors: &mut BTreeMap<String, Tensor>, name: &str) -> Result<Tensor> {
    match tensors.remove(name) {
        Some(tensor) => Ok(tensor),
        None => {
            let mut others: Vec<&str> = tensors.keys().map(String::as_str).collect();
            let more = if others.len() > 12 { ", ..." } else { "" };
            others.truncate(12);
            Err(anyhow!(InputError::new(format!("tensor `{name}` is missing")).help(match others.is_empty() {
                true => "beside those that were read there are none".to_owned(),
                false => format!("beside those that were read there are: {}{more}", others.join(", ")),
            })))
        }
    }
}
