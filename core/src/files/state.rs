//! What must survive a restart: named tensors and plain values, nested by prefix, saved as one safetensors file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Device, Tensor};

use super::tensors;

/// The state of a component: tensors, and values that JSON can hold.
#[derive(Debug, Default, PartialEq)]
pub struct State {
    tensors: BTreeMap<String, Tensor>,
    values: BTreeMap<String, serde_json::Value>,
}

impl State {
    /// An empty state.
    pub fn new() -> Self {
        State::default()
    }

    /// Adds a tensor; what is kept is a copy, so training may go on.
    pub fn put_tensor(&mut self, name: impl Into<String>, tensor: &Tensor) {
        let tensor = tensor.detach();
        // What is kept of a GPU's takes none of its memory.
        self.put_own(name, if tensor.device() == Device::Cpu { tensor.copy() } else { tensor });
    }

    /// Adds a tensor that nobody else has a hold of, without copying it.
    pub fn put_own(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor.to_device(Device::Cpu).contiguous());
    }

    /// Adds a value.
    pub fn put(&mut self, name: impl Into<String>, value: impl Serialize) -> Result<()> {
        let name = name.into();
        let value = serde_json::to_value(value).with_context(|| format!("state `{name}`"))?;
        self.values.insert(name, value);
        Ok(())
    }

    /// Adds a whole state under a prefix.
    pub fn put_all(&mut self, prefix: &str, state: State) {
        for (name, tensor) in state.tensors {
            self.tensors.insert(format!("{prefix}/{name}"), tensor);
        }
        for (name, value) in state.values {
            self.values.insert(format!("{prefix}/{name}"), value);
        }
    }

    /// All tensors by their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| anyhow!("the saved state has no tensor `{name}`"))
    }

    /// Copies the tensor of that name into `target`, in place.
    pub fn load_tensor(&self, name: &str, target: &mut Tensor) -> Result<()> {
        let saved = self.tensor(name)?;
        if saved.size() != target.size() {
            bail!("the saved state has `{name}` of shape {:?}, not {:?}", saved.size(), target.size());
        }
        tch::no_grad(|| target.copy_(saved));
        Ok(())
    }

    /// The value of that name.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let value = self.values.get(name).ok_or_else(|| anyhow!("the saved state has no value `{name}`"))?;
        serde_json::from_value(value.clone()).with_context(|| format!("state `{name}`"))
    }

    /// What was put under a prefix.
    pub fn under(&self, prefix: &str) -> State {
        let prefix = format!("{prefix}/");
        let strip = |name: &String| name.strip_prefix(&prefix).map(str::to_owned);
        State {
            tensors: self
                .tensors
                .iter()
                .filter_map(|(name, tensor)| Some((strip(name)?, tensor.shallow_clone())))
                .collect(),
            values: self.values.iter().filter_map(|(name, value)| Some((strip(name)?, value.clone()))).collect(),
        }
    }

    /// Writes the state to a file, whole or not at all, with a checksum of all of it.
    pub fn save(&self, path: &Path) -> Result<()> {
        let values = serde_json::to_string(&self.values)?;
        let tensors: Vec<_> =
            self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        let checksum = format!("{:08x}", self.checksum(&values));
        tensors::write_with_metadata(path, &tensors, &[("state", &values), ("crc32", &checksum)])
    }

    /// Reads a state that [`State::save`] wrote.
    pub fn load(path: &Path) -> Result<State> {
        let file = tensors::TensorFile::open(path)?;
        let entry = |key| {
            file.metadata(key).ok_or_else(|| anyhow!("{} is no checkpoint of this version's dictlearn", path.display()))
        };
        let text = entry("state")?;
        let values = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let tensors = file.names().into_iter().map(|name| Ok((name.clone(), file.tensor(&name)?)));
        let state = State { tensors: tensors.collect::<Result<_>>()?, values };
        if format!("{:08x}", state.checksum(&text)) != entry("crc32")? {
            bail!("{} is damaged: its checksum is not that of what it holds", path.display());
        }
        Ok(state)
    }

    /// CRC-32 of the values as they are written and of each tensor's name, shape, type and bytes.
    fn checksum(&self, values: &str) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(values.as_bytes());
        for (name, tensor) in &self.tensors {
            hasher.update(format!("{name} {:?} {:?}", tensor.size(), tensor.kind()).as_bytes());
            hasher.update(tensors::bytes_of(tensor));
        }
        hasher.finalize()
    }
}
