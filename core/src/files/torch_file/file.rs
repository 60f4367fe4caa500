//! A state dict whose tensors are read one by one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use memmap2::Mmap;
use tch::{Kind, Tensor};

use super::pickle::{self, Fault, Item, Layout, Node, Pickle, View};
use super::read::{self, Budget, TENSOR_OVERHEAD, contiguous, dims};
use crate::files;

/// A state dict in a file of `torch.save`, as models are published in `pytorch_model.bin`: the file is checked when it is
/// opened, and each tensor is copied from the mapped file when it is asked for.
pub struct StateDictFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, Stored>,
}

/// A tensor in the file.
struct Stored {
    /// Where its storage lies.
    place: Range<usize>,
    kind: Kind,
    view: View,
}

impl StateDictFile {
    /// Opens a file and finds its tensors; other values of its dict are left out.
    ///
    /// # Errors
    ///
    /// Those of [`read()`](super::read()), and that it holds no tensors by name.
    pub fn open(path: &Path) -> Result<Self> {
        let map = files::map(path)?;
        let tensors = tensors(&map).map_err(|fault| fault.of(&path.display().to_string()))?;
        files::forget(&map, 0..map.len());
        Ok(StateDictFile { path: path.to_owned(), map, tensors })
    }

    /// The names of the tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    /// The shape of a tensor, without reading it.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        Some(self.tensors.get(name)?.view.sizes.clone())
    }

    /// The type of a tensor, without reading it.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        Ok(self.stored(name)?.kind)
    }

    /// Reads one tensor to the CPU, contiguous, in the type that the file has.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let Stored { place, kind, view } = self.stored(name)?;
        Ok(read::elements(*kind, view, &self.map[place.clone()])
            .map_err(|fault| fault.of(&self.path.display().to_string()))?)
    }

    /// The bytes of a tensor, where they lie in one piece in its order.
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

    /// Lets the system take back the memory that reading a tensor brought in.
    pub fn forget(&self, name: &str) {
        if let Some(stored) = self.tensors.get(name) {
            files::forget(&self.map, stored.place.clone());
        }
    }

    fn stored(&self, name: &str) -> Result<&Stored> {
        self.tensors.get(name).ok_or_else(|| anyhow!("{} has no tensor `{name}`", self.path.display()))
    }
}

/// The tensors of the dict that a file holds.
fn tensors(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Stored>, Fault> {
    let none = || Fault::new("holds no state dict, which is a dict of tensors").help(pickle::SAVE_STATE_DICT);
    let mut archive = read::open(bytes)?;
    let pickle = archive.pickle()?;
    let Pickle { root, nodes } = pickle::load(&pickle)?;
    let Item::Node(root) = root else { return Err(none()) };
    let Node::Dict(entries) = &nodes[root] else { return Err(none()) };
    let (mut tensors, mut budget) = (BTreeMap::new(), Budget::of(bytes));
    for (name, value) in entries {
        let (Item::Text(name), Item::Node(node)) = (name, value) else { continue };
        let Node::Tensor(layout) = &nodes[*node] else { continue };
        let Layout { storage, view } = &**layout;
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
