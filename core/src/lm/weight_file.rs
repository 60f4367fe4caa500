//! A published file of weights.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use crate::files::tensors::TensorFile;
use crate::files::torch_file::StateDictFile;

/// A published file of weights: safetensors, or PyTorch's .bin.
pub(super) enum WeightFile {
    Safetensors(TensorFile),
    Torch(StateDictFile),
}

impl WeightFile {
    pub(super) fn names(&self) -> Vec<String> {
        match self {
            WeightFile::Safetensors(file) => file.names(),
            WeightFile::Torch(file) => file.names(),
        }
    }

    pub(super) fn shape(&self, name: &str) -> Vec<i64> {
        let shape = match self {
            WeightFile::Safetensors(file) => file.shape(name),
            WeightFile::Torch(file) => file.shape(name),
        };
        shape.unwrap_or_default()
    }

    pub(super) fn kind(&self, name: &str) -> Result<Kind> {
        match self {
            WeightFile::Safetensors(file) => file.kind(name),
            WeightFile::Torch(file) => file.kind(name),
        }
    }

    pub(super) fn tensor(&self, name: &str) -> Result<Tensor> {
        match self {
            WeightFile::Safetensors(file) => file.tensor(name),
            WeightFile::Torch(file) => file.tensor(name),
        }
    }

    /// Reads one entry along the first dimension.
    pub(super) fn part(&self, name: &str, index: i64) -> Result<Tensor> {
        let shape = self.shape(name);
        let (Some(bytes), Some((count, rest))) = (self.bytes(name), shape.split_first()) else {
            return Ok(self.tensor(name)?.f_get(index)?);
        };
        ensure!((0..*count).contains(&index), "tensor `{name}` has no entry {index}");
        let size = bytes.len() / *count as usize;
        let start = size * index as usize;
        Ok(Tensor::f_from_data_size(&bytes[start..start + size], rest, self.kind(name)?)?)
    }

    /// Returns the tensor's bytes if they are contiguous.
    pub(super) fn bytes(&self, name: &str) -> Option<&[u8]> {
        match self {
            WeightFile::Safetensors(file) => file.bytes_of(name),
            WeightFile::Torch(file) => file.bytes(name),
        }
    }

    pub(super) fn forget(&self, name: &str) {
        match self {
            WeightFile::Safetensors(file) => file.forget(name),
            WeightFile::Torch(file) => file.forget(name),
        }
    }
}
