//! A state dict whose tensors are read on demand.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use memmap2::Mmap;
use tch::{Kind, Tensor};

use super::pickle::{self, Fault, Item, Node, Pickle, Strided, View};
use super::read::{self, Budget, TENSOR_OVERHEAD, contiguous, dims};
use crate::files;

/// A state dict in a file of `torch.save`, such as a model's `pytorch_model.bin`. Opening it checks the file; each
/// tensor is copied from the mapped file on demand.
pub struct StateDictFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, Stored>,
}

/// A tensor in the file.
struct Stored {
    /// Byte range of its storage in the file.
    place: Range<usize>,
    kind: Kind,
    view: View,
}

impl StateDictFile {
    /// Opens a file and finds its tensors. Other values of its dict are ignored.
    ///
    /// # Errors
    ///
    /// Fails as [`read()`](super::read()) does, or if the file is not a dict with tensors.
    pub fn open(path: &Path) -> Result<Self> {
        let map = files::map(path)?;
        let tensors = tensors(&map).map_err(|fault| fault.of(&path.display().to_string()))?;
        files::forget(&map, 0..map.len());
        Ok(StateDictFile { path: path.to_owned(), map, tensors })
    }

    /// Returns the sorted tensor names.
    pub fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    /// Returns a tensor's shape without reading the tensor.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        Some(self.tensors.get(name)?.view.sizes.clone())
    }

    /// Returns a tensor's dtype without reading the tensor.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        Ok(self.stored(name)?.kind)
    }

    /// Reads one tensor to the CPU, contiguous, in the file's dtype.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let Stored { place, kind, view } = self.stored(name)?;
        Ok(read::elements(*kind, view, &self.map[place.clone()])
            .map_err(|fault| fault.of(&self.path.display().to_string()))?)
    }

    /// Returns a tensor's bytes if it is contiguous in the file and not empty.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        let Stored { place, kind, view: View { offset, sizes, strides } } = self.tensors.get(name)?;
        let order: Vec<usize> = (0..sizes.len()).collect();
        if sizes.contains(&0) || !contiguous(&dims(&order, sizes, strides)) {
            return None;
        }
        let (element, count) = (kind.elt_size_in_bytes(), sizes.iter().product::<i64>() as usize);
        let start = place.start + *offset as usize * element;
        self.map.get(start..start + count * element)
    }

    /// Lets the OS reclaim the pages of a tensor's storage.
    pub fn forget(&self, name: &str) {
        if let Some(stored) = self.tensors.get(name) {
            files::forget(&self.map, stored.place.clone());
        }
    }

    fn stored(&self, name: &str) -> Result<&Stored> {
        self.tensors.get(name).ok_or_else(|| anyhow!("{} has no tensor `{name}`", self.path.display()))
    }
}

/// Finds the tensors of a file's state dict.
fn tensors(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Stored>, Fault> {
    let none = || Fault::new("holds no state dict (a dict of tensors)").help(pickle::SAVE_STATE_DICT);
    let mut archive = read::open(bytes)?;
    let pickle = archive.pickle()?;
    let Pickle { root, nodes } = pickle::load(&pickle)?;
    let Item::Node(root) = root else { return Err(none()) };
    let Node::Dict(entries) = &nodes[root] else { return Err(none()) };
    let (mut tensors, mut budget) = (BTreeMap::new(), Budget::of(bytes));
    for (name, value) in entries {
        let (Item::Text(name), Item::Node(node)) = (name, value) else { continue };
        let Node::Tensor(layout) = &nodes[*node] else { continue };
        let Strided { storage, view } = &**layout;
        let bytes = read::reach(layout)?;
        budget.charge(bytes.saturating_add(TENSOR_OVERHEAD))?;
        let place = if bytes == 0 { 0..0 } else { archive.storage(*storage)? };
        tensors.insert((*name).to_owned(), Stored { place, kind: storage.kind, view: view.clone() });
    }
    match tensors.is_empty() {
        true => Err(none()),
        false => Ok(tensors),
    }
}
