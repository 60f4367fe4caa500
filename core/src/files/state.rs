//! State that survives a restart: named tensors and JSON values, nested by prefix, in one safetensors file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Device, Tensor};

use super::tensors;

/// A component's state: named tensors and JSON values.
#[derive(Debug, Default, PartialEq)]
pub struct State {
    tensors: BTreeMap<String, Tensor>,
    values: BTreeMap<String, serde_json::Value>,
}

impl State {
    /// Creates an empty state.
    pub fn new() -> Self {
        State::default()
    }

    /// Adds a copy of a tensor, so that training can continue.
    pub fn put_tensor(&mut self, name: impl Into<String>, tensor: &Tensor) {
        let tensor = tensor.detach();
        // `put_own` copies a GPU tensor to the CPU, so the copy takes no GPU memory.
        self.put_own(name, if tensor.device() == Device::Cpu { tensor.copy() } else { tensor });
    }

    /// Adds a tensor that nothing else modifies. A contiguous CPU tensor is not copied.
    pub fn put_own(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor.to_device(Device::Cpu).contiguous());
    }

    /// Adds a value. Fails if JSON cannot represent it.
    pub fn put(&mut self, name: impl Into<String>, value: impl Serialize) -> Result<()> {
        let name = name.into();
        let value = serde_json::to_value(value).with_context(|| format!("state `{name}`"))?;
        self.values.insert(name, value);
        Ok(())
    }

    /// Adds all entries of a state under a prefix.
    pub fn put_all(&mut self, prefix: &str, state: State) {
        for (name, tensor) in state.tensors {
            self.tensors.insert(format!("{prefix}/{name}"), tensor);
        }
        for (name, value) in state.values {
            self.values.insert(format!("{prefix}/{name}"), value);
        }
    }

    /// Returns all tensors with their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Returns the tensor with this name.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| anyhow!("the saved state has no tensor `{name}`"))
    }

    /// Copies the tensor with this name into `target`, in place. Fails if the shapes differ.
    pub fn load_tensor(&self, name: &str, target: &mut Tensor) -> Result<()> {
        let saved = self.tensor(name)?;
        if saved.size() != target.size() {
            bail!("`{name}` has shape {:?} in the saved state, not {:?}", saved.size(), target.size());
        }
        tch::no_grad(|| target.copy_(saved));
        Ok(())
    }

    /// Returns the value with this name.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let value = self.values.get(name).ok_or_else(|| anyhow!("the saved state has no value `{name}`"))?;
        serde_json::from_value(value.clone()).with_context(|| format!("state `{name}`"))
    }

    /// Returns the entries under a prefix, without the prefix. Tensors are shared.
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

    /// Writes the state to a file atomically, with a checksum over everything.
    pub fn save(&self, path: &Path) -> Result<()> {
        let values = serde_json::to_string(&self.values)?;
        let tensors: Vec<_> =
            self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        let checksum = format!("{:08x}", self.checksum(&values));
        tensors::write_with_metadata(path, &tensors, &[("state", &values), ("crc32", &checksum)])
    }

    /// Reads a state written by [`State::save`] and verifies its checksum.
    pub fn load(path: &Path) -> Result<State> {
        let file = tensors::TensorFile::open(path)?;
        let entry = |key| {
            file.metadata(key)
                .ok_or_else(|| anyhow!("{} is not a checkpoint of this version of dictlearn", path.display()))
        };
        let text = entry("state")?;
        let values = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let tensors = file.names().into_iter().map(|name| Ok((name.clone(), file.tensor(&name)?)));
        let state = State { tensors: tensors.collect::<Result<_>>()?, values };
        if format!("{:08x}", state.checksum(&text)) != entry("crc32")? {
            bail!("{} is damaged: its contents do not match its checksum", path.display());
        }
        Ok(state)
    }

    /// Returns the CRC-32 of the serialised values and of each tensor's name, shape, dtype and bytes.
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
