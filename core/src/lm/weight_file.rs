//! A published file of weights.

use anyhow::Result;
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
