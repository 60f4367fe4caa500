//! A published SAE in memory.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow, bail};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::site::ModelSite;
use crate::error::InputError;
use crate::sae::Normalization;

/// A published SAE in memory.
#[derive(Debug, Default)]
pub struct Published {
    /// Name of the registered class, such as `JumpReluAutoEncoder`.
    pub class: String,
    /// The class's tensors.
    pub tensors: BTreeMap<String, Tensor>,
    /// Normalisation of each activation before encoding.
    pub normalization: Option<Normalization>,
    /// `bfloat16` or `float16`, if its publishers compute in that dtype.
    pub dtype: Option<&'static str>,
    /// Site in a language model, as far as known.
    pub site: Option<ModelSite>,
    /// Further entries for the `trainer` section of config.json.
    pub trainer: Map<String, Value>,
    /// log10 of each feature's firing frequency, `[F]`, if published.
    pub sparsity: Option<Tensor>,
    /// Factor by which to scale biases and thresholds: for backups of training on scaled activations.
    pub scale: Option<f64>,
    /// True for a file of the reference, whose `from_pretrained` changes some weights on loading.
    pub pretrained: bool,
    /// Warnings for the user.
    pub notes: Vec<String>,
}

/// Fails if any tensors were not read: they would change the SAE in an unknown way.
pub fn nothing_left(tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    bail!(InputError::new(format!(
        "the weights have tensors that this kind of SAE does not have: {}",
        tensors.keys().cloned().collect::<Vec<_>>().join(", ")
    )))
}

/// Takes a floating-point tensor with N dimensions from a file's weights, as float32 on the CPU. Errors name it.
pub fn take_float<const N: usize>(tensors: &mut BTreeMap<String, Tensor>, name: &str) -> Result<Tensor> {
    let tensor = take(tensors, name)?;
    if !tensor.is_floating_point() {
        // Integer data could hold any value that a damaged header claims.
        bail!(InputError::new(format!("tensor `{name}` has the type {:?}, but must be floating point", tensor.kind())));
    }
    if tensor.dim() != N || tensor.numel() == 0 {
        let size = tensor.size();
        bail!(InputError::new(format!(
            "tensor `{name}` has shape {size:?}, but must have {N} dimensions and not be empty"
        )));
    }
    Ok(tensor.to_device(Device::Cpu).to_kind(Kind::Float))
}

/// Refuses a number in a config or a name that contradicts the weights.
pub fn agrees(what: &str, said: i64, found: i64) -> Result<()> {
    if said != found {
        bail!(InputError::new(format!("{what} is {said}, but the weights have {found}")));
    }
    Ok(())
}

/// Takes a tensor from a file's weights. The error lists the remaining tensors.
pub fn take(tensors: &mut BTreeMap<String, Tensor>, name: &str) -> Result<Tensor> {
    match tensors.remove(name) {
        Some(tensor) => Ok(tensor),
        None => {
            let mut others: Vec<&str> = tensors.keys().map(String::as_str).collect();
            let more = if others.len() > 12 { ", ..." } else { "" };
            others.truncate(12);
            Err(anyhow!(InputError::new(format!("tensor `{name}` is missing")).help(match others.is_empty() {
                true => "there are no other unread tensors".to_owned(),
                false => format!("unread tensors: {}{more}", others.join(", ")),
            })))
        }
    }
}
