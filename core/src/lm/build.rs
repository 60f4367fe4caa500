//! Builds the parts of a model: shapes follow from its config, values come from its weights.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::blocks::Linear;
use super::norm::{Norm, NormConfig, NormKind};
use super::weights::{Wanted, Weights};
use crate::machine::device::Precision;

/// Provides a tensor. Matrices and biases of products and token embeddings have the dtype of the products, everything
/// else float32.
type Provide<'a> = dyn FnMut(Wanted) -> Result<Tensor> + 'a;

/// Builds the parts of a model.
pub struct Builder<'a> {
    precision: Precision,
    provide: &'a mut Provide<'a>,
    /// The files, if parts should be read from them when a pass first reaches them.
    lazy: Option<Arc<ModelWeights>>,
    /// Returns true if a file has a tensor of this name.
    has: &'a dyn Fn(&str) -> bool,
}

impl<'a> Builder<'a> {
    /// Creates a builder that takes every tensor from `provide` at once; `has` tells which names there are.
    pub(super) fn new(precision: Precision, has: &'a dyn Fn(&str) -> bool, provide: &'a mut Provide<'a>) -> Self {
        Builder { precision, provide, lazy: None, has }
    }

    /// Returns the precision of products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Returns true if the model's files have a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        (self.has)(name)
    }

    /// Returns a tensor that is not part of a product, in float32.
    pub fn tensor(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        (self.provide)(Wanted { name, shape, kind: Kind::Float, part: None })
    }

    /// Returns a matrix or bias of a product, in the products' dtype.
    pub fn matrix(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        (self.provide)(Wanted { name, shape, kind: self.precision.kind(), part: None })
    }

    /// Returns one entry along the first dimension of a tensor of this whole shape, in the products' dtype.
    pub fn part(&mut self, name: &str, shape: &[i64], index: i64) -> Result<Tensor> {
        (self.provide)(Wanted { name, shape, kind: self.precision.kind(), part: Some(index) })
    }

    /// Returns an affine map; its weight is stored as [output, input].
    pub fn linear(&mut self, path: &str, output: i64, input: i64, bias: bool) -> Result<Linear> {
        let weight = self.matrix(&format!("{path}.weight"), &[output, input])?;
        self.with_bias(path, weight, output, bias)
    }

    /// Returns an affine map whose weight is stored transposed, as [input, output].
    pub fn transposed(&mut self, path: &str, output: i64, input: i64, bias: bool) -> Result<Linear> {
        let weight = self.matrix(&format!("{path}.weight"), &[input, output])?.tr();
        self.with_bias(path, weight, output, bias)
    }

    fn with_bias(&mut self, path: &str, weight: Tensor, output: i64, bias: bool) -> Result<Linear> {
        let bias = bias.then(|| self.matrix(&format!("{path}.bias"), &[output])).transpose()?;
        Ok(Linear { weight, bias, precision: self.precision })
    }

    /// Returns a norm over `width` elements.
    pub fn norm(&mut self, path: &str, width: i64, config: NormConfig) -> Result<Norm> {
        let weight = config.kind.has_weight().then(|| self.tensor(&format!("{path}.weight"), &[width])).transpose()?;
        let bias =
            (config.kind == NormKind::Layer).then(|| self.tensor(&format!("{path}.bias"), &[width])).transpose()?;
        Ok(Norm { config, weight, bias })
    }

    /// Returns a part that is read from the model's files when it is first used. Without files, it is built now.
    pub(super) fn lazily<T>(&mut self, part: impl Fn(&mut Builder) -> Result<T> + Send + 'static) -> Result<Lazy<T>> {
        match &self.lazy {
            None => Ok(Lazy { value: part(self)?.into(), read: None }),
            Some(weights) => {
                let weights = weights.clone();
                Ok(Lazy { value: OnceCell::new(), read: Some(Box::new(move || weights.read(&part))) })
            }
        }
    }
}

/// A part of a model that is read when it is first used.
pub(super) struct Lazy<T> {
    value: OnceCell<T>,
    read: Option<Box<dyn Fn() -> T + Send>>,
}

impl<T> Lazy<T> {
    /// Returns the part.
    pub fn get(&self) -> &T {
        self.value.get_or_init(|| self.read.as_ref().expect("a part without a file is built at once")())
    }
}

/// The weights of a model, and those read so far.
pub(super) struct ModelWeights {
    weights: Weights,
    precision: Precision,
    /// Name, index of the part of it, and value.
    read: Mutex<Vec<(String, Option<i64>, Tensor)>>,
}

impl ModelWeights {
    /// Reads from files whose names, shapes and dtypes were checked.
    pub fn checked(weights: Weights, precision: Precision) -> Arc<Self> {
        Arc::new(ModelWeights { weights, precision, read: Mutex::default() })
    }

    /// Builds a part from the files.
    pub fn read<T>(self: &Arc<Self>, part: impl Fn(&mut Builder) -> Result<T>) -> T {
        let mut provide = |wanted: Wanted| {
            let tensor = self.weights.get(wanted)?;
            let entry = (wanted.name.to_owned(), wanted.part, tensor.shallow_clone());
            self.read.lock().expect("no reader panicked").push(entry);
            Ok(tensor)
        };
        let has = |name: &str| self.weights.in_file(name);
        let mut builder =
            Builder { precision: self.precision, provide: &mut provide, lazy: Some(self.clone()), has: &has };
        tch::no_grad(|| part(&mut builder)).expect("a checked tensor can be read")
    }

    /// Returns the weights read so far, by name. Parts of a tensor are put together; all of them must have been read.
    pub fn read_so_far(&self) -> Vec<(String, Tensor)> {
        let read = self.read.lock().expect("no reader panicked");
        let mut parts: BTreeMap<&str, BTreeMap<i64, &Tensor>> = BTreeMap::new();
        for (name, part, tensor) in read.iter() {
            if let Some(part) = part {
                parts.entry(name).or_default().insert(*part, tensor);
            }
        }
        let whole = read.iter().filter(|(_, part, _)| part.is_none());
        let whole = whole.map(|(name, _, tensor)| (name.clone(), tensor.shallow_clone()));
        let stacked = parts
            .into_iter()
            .map(|(name, parts)| (name.to_owned(), Tensor::stack(&parts.into_values().collect::<Vec<_>>(), 0)));
        whole.chain(stacked).collect()
    }
}

/// Returns zeros of a shape that occupy one element, for passes that only record widths.
pub(super) fn shape_only(shape: &[i64]) -> Tensor {
    Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand(shape, false)
}
