//! Reads the archive of a `.pt` file and builds values and tensors from its pickle.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use tch::{Kind, TchError, Tensor};
use zip::{CompressionMethod, ZipArchive};

use super::Value;
use super::pickle::{self, Fault, Item, Node, Storage, Strided, View, quoted};
use crate::error::InputError;
use crate::files;

/// Maximum nesting depth of values. A training backup has about six levels.
const MAX_DEPTH: usize = 100;
/// Memory, in bytes, that any file's values may take. Those of a larger file may take a multiple of its length.
const MIN_BUDGET: usize = 64 << 20;
/// Approximate memory of a tensor besides its elements, in bytes.
pub(super) const TENSOR_OVERHEAD: usize = 256;
/// Magic number near the beginning of files from PyTorch before 1.6: 0x1950a86a20f9469cfc6c as a pickled integer.
const LEGACY_MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// Reads a `.pt` file written by `torch.save` without running any of its code.
///
/// # Errors
///
/// Returns an [`InputError`] that names the file if it is missing, damaged, not from `torch.save`, or saved before
/// PyTorch 1.6, or if its pickle names anything but tensors, dicts, numbers and strings.
pub fn read(path: &Path) -> Result<Value> {
    if path.is_dir() {
        return Err(InputError::new(format!("{} is a folder", path.display())).help("give the .pt file in it").into());
    }
    let map = files::map(path)?;
    read_bytes(&path.display().to_string(), &map)
}

/// Reads the bytes of a `.pt` file. Messages call it `name`.
///
/// # Errors
///
/// Fails as [`read`] does.
pub fn read_bytes(name: &str, bytes: &[u8]) -> Result<Value> {
    Ok(load(bytes).map_err(|fault| fault.of(name))?)
}

fn load(bytes: &[u8]) -> std::result::Result<Value, Fault> {
    let mut archive = open(bytes)?;
    let pickle = archive.pickle()?;
    let pickle = pickle::load(&pickle)?;
    let mut values = Values { archive, nodes: &pickle.nodes, tensors: HashMap::new(), budget: Budget::of(bytes) };
    values.budget.charge(size_of::<Value>())?;
    values.value(pickle.root, 0)
}

/// Opens the archive of a `.pt` file. The error names other formats that it recognises.
pub(super) fn open(bytes: &[u8]) -> std::result::Result<Archive<'_>, Fault> {
    const AGAIN: &str = "load it and save it again with a current PyTorch: torch.save(torch.load(path), path)";
    if !bytes.starts_with(b"PK\x03\x04") {
        let start = &bytes[..bytes.len().min(64)];
        return Err(match start.windows(LEGACY_MAGIC.len()).any(|window| window == LEGACY_MAGIC) {
            true => Fault::new("is in the format of PyTorch before 1.6, which is not supported").help(AGAIN),
            false if bytes.get(257..262) == Some(b"ustar") => {
                Fault::new("is in the tar format of PyTorch before 0.1.10, which is not supported").help(AGAIN)
            }
            false => Fault::new("is not a torch.save file: it is not a zip archive"),
        });
    }
    let mut archive = Archive::open(bytes)?;
    let order = archive.entry("byteorder")?.map(|place| &bytes[place]);
    match order {
        None | Some(b"little") => {}
        Some(b"big") => {
            return Err(Fault::new("was saved on a big-endian machine, which is not supported").help(AGAIN));
        }
        Some(_) => return Err(Fault::damaged("its byte order is neither `little` nor `big`")),
    }
    Ok(archive)
}

/// The zip archive. Entries are not compressed, so each is a byte range of the file.
pub(super) struct Archive<'a> {
    bytes: &'a [u8],
    zip: ZipArchive<Cursor<&'a [u8]>>,
    /// The folder of all entries, with a trailing slash.
    folder: Vec<u8>,
    /// Byte ranges of the entries checked so far, by index.
    entries: HashMap<usize, Range<usize>>,
    /// Their total length in bytes.
    length: usize,
}

impl<'a> Archive<'a> {
    fn open(bytes: &'a [u8]) -> std::result::Result<Self, Fault> {
        let zip = ZipArchive::new(Cursor::new(bytes))
            .map_err(|error| Fault::new(format!("is not a complete zip archive: {error}")))?;
        const PICKLE: &[u8] = b"data.pkl";
        let folder = zip.file_names_raw().find_map(|name| name.strip_suffix(PICKLE).filter(|it| it.ends_with(b"/")));
        let folder = folder.ok_or_else(|| Fault::new("is not a torch.save file: it has no `data.pkl`"))?.to_vec();
        Ok(Archive { bytes, zip, folder, entries: HashMap::new(), length: 0 })
    }

    /// Returns the byte range of the entry with this name, if there is one. Checks its bounds and checksum.
    fn entry(&mut self, name: &str) -> std::result::Result<Option<Range<usize>>, Fault> {
        let damaged = |why: &str| Fault::damaged(format!("its entry `{}` {why}", quoted(name)));
        let Some(index) = self.zip.index_for_name_raw(&[&self.folder, name.as_bytes()].concat()) else {
            return Ok(None);
        };
        if let Some(range) = self.entries.get(&index) {
            return Ok(Some(range.clone()));
        }
        let file = self.zip.by_index_raw(index).map_err(|error| damaged(&format!("cannot be read: {error}")))?;
        if file.compression() != CompressionMethod::Stored || file.encrypted() {
            let error = Fault::new(format!("has a compressed or encrypted entry `{}`", quoted(name)));
            return Err(error.help("torch.save does not compress; load the file and save it again"));
        }
        let range = |start: u64, length: u64| {
            let (start, length) = (usize::try_from(start).ok()?, usize::try_from(length).ok()?);
            let range = start..start.checked_add(length)?;
            (range.end <= self.bytes.len()).then_some(range)
        };
        let place = file.data_start().filter(|_| file.size() == file.compressed_size());
        let place = place.and_then(|start| range(start, file.size()));
        let place = place.ok_or_else(|| damaged("is longer than the file"))?;
        // Overlapping entries could make a small file slow to check.
        self.length = self.length.saturating_add(place.len());
        if self.length > self.bytes.len() {
            return Err(damaged("overlaps another"));
        }
        // PyTorch writes 0 if it is set to compute no checksums.
        if file.crc32() != 0 && file.crc32() != crc32fast::hash(&self.bytes[place.clone()]) {
            return Err(damaged("does not match its checksum"));
        }
        self.entries.insert(index, place.clone());
        Ok(Some(place))
    }

    /// Returns a copy of the pickle: a mapped file could change after its text was checked to be UTF-8.
    pub(super) fn pickle(&mut self) -> std::result::Result<Vec<u8>, Fault> {
        let place = self.entry("data.pkl")?.ok_or_else(|| Fault::damaged("it has no `data.pkl`"))?;
        Ok(self.bytes[place].to_vec())
    }

    /// Returns the byte range of a storage's elements in the file.
    pub(super) fn storage(&mut self, storage: Storage) -> std::result::Result<Range<usize>, Fault> {
        let key = quoted(storage.key);
        let place = self.entry(&format!("data/{}", storage.key))?;
        let place = place.ok_or_else(|| Fault::damaged(format!("it has no storage `{key}`")))?;
        let wanted = usize::try_from(storage.elements)
            .ok()
            .and_then(|elements| elements.checked_mul(storage.kind.elt_size_in_bytes()));
        match wanted.filter(|wanted| *wanted <= place.len()) {
            Some(wanted) => Ok(place.start..place.start + wanted),
            None => {
                let (elements, held) = (storage.elements, place.len());
                Err(Fault::damaged(format!("its storage `{key}` has {held} bytes, too few for {elements} elements")))
            }
        }
    }
}

/// Memory, in bytes, that a file's values may still take.
pub(super) struct Budget(usize);

impl Budget {
    pub(super) fn of(file: &[u8]) -> Self {
        Budget(file.len().saturating_mul(4).max(MIN_BUDGET))
    }

    /// Counts memory before it is allocated: a pickle can repeat a value, and a tensor can be larger than its storage.
    pub(super) fn charge(&mut self, bytes: usize) -> std::result::Result<(), Fault> {
        let left = self.0.checked_sub(bytes);
        self.0 = left.ok_or_else(|| Fault::new("has values that take far more memory than the file's length"))?;
        Ok(())
    }
}

/// Builds values from a pickle's items.
struct Values<'a, 'p> {
    archive: Archive<'a>,
    nodes: &'p [Node<'p>],
    /// Tensors already built, by node index.
    tensors: HashMap<usize, Tensor>,
    budget: Budget,
}

impl<'p> Values<'_, 'p> {
    /// Builds a value. The caller has charged for the value itself.
    fn value(&mut self, item: Item<'p>, depth: usize) -> std::result::Result<Value, Fault> {
        if depth > MAX_DEPTH {
            return Err(Fault::new(format!("has values nested more than {MAX_DEPTH} deep, or in themselves")));
        }
        Ok(match item {
            Item::None => Value::None,
            Item::Bool(value) => Value::Bool(value),
            Item::Int(value) => Value::Int(value),
            Item::Float(value) => Value::Float(value),
            Item::Text(text) => {
                self.budget.charge(text.len())?;
                Value::Text(text.to_owned())
            }
            Item::Bytes(bytes) => self.bytes(bytes)?,
            Item::Global(global) => Value::Name(format!("{}.{}", global.module, global.name)),
            Item::Node(index) => match &self.nodes[index] {
                Node::List(items) | Node::Tuple(items) | Node::Set(items) => {
                    self.budget.charge(items.len().saturating_mul(size_of::<Value>()))?;
                    Value::List(items.iter().map(|item| self.value(*item, depth + 1)).collect::<Result<_, _>>()?)
                }
                Node::Dict(entries) => {
                    self.budget.charge(entries.len().saturating_mul(size_of::<(Value, Value)>()))?;
                    let mut entry = |(key, value): &(Item<'p>, Item<'p>)| {
                        Ok((self.value(*key, depth + 1)?, self.value(*value, depth + 1)?))
                    };
                    Value::Dict(entries.iter().map(&mut entry).collect::<Result<_, _>>()?)
                }
                Node::Bytes(bytes) => self.bytes(bytes)?,
                Node::Device(name) => {
                    self.budget.charge(name.len())?;
                    Value::Name(name.clone())
                }
                Node::NumpyType(kind) => Value::Name(format!("numpy.{}", kind.name())),
                Node::Tensor(layout) => {
                    self.budget.charge(TENSOR_OVERHEAD)?;
                    if let Some(made) = self.tensors.get(&index) {
                        return Ok(Value::Tensor(made.shallow_clone()));
                    }
                    let made = self.tensor(layout)?;
                    self.tensors.insert(index, made.shallow_clone());
                    Value::Tensor(made)
                }
                Node::Storage(storage) => {
                    self.budget.charge(TENSOR_OVERHEAD)?;
                    let view = View { offset: 0, sizes: vec![storage.elements], strides: vec![1] };
                    Value::Tensor(self.tensor(&Strided { storage: *storage, view })?)
                }
            },
        })
    }

    fn bytes(&mut self, bytes: &[u8]) -> std::result::Result<Value, Fault> {
        self.budget.charge(bytes.len())?;
        Ok(Value::Bytes(bytes.to_vec()))
    }

    fn tensor(&mut self, layout: &Strided) -> std::result::Result<Tensor, Fault> {
        let bytes = reach(layout)?;
        self.budget.charge(bytes)?;
        let place = if bytes == 0 { 0..0 } else { self.archive.storage(layout.storage)? };
        elements(layout.storage.kind, &layout.view, &self.archive.bytes[place])
    }
}

/// Returns the number of bytes of a tensor's elements. Fails unless all of them lie in its storage.
pub(super) fn reach(layout: &Strided) -> std::result::Result<usize, Fault> {
    let Strided { storage, view: View { offset, sizes, strides } } = layout;
    let too_large = || Fault::damaged(format!("a tensor has the impossible size {sizes:?}"));
    let element = storage.kind.elt_size_in_bytes();
    // libtorch computes strides, so a size of 0 must not hide sizes that are too large.
    let most = product(sizes.iter().map(|size| (*size).max(1))).and_then(|most| most.checked_mul(element));
    most.filter(|most| isize::try_from(*most).is_ok()).ok_or_else(too_large)?;
    let count = product(sizes.iter().copied()).ok_or_else(too_large)?;
    let last = sizes
        .iter()
        .zip(strides)
        .try_fold(*offset, |last, (size, stride)| last.checked_add((size - 1).checked_mul(*stride)?));
    if count > 0 && last.is_none_or(|last| last >= storage.elements) {
        let key = quoted(storage.key);
        return Err(Fault::damaged(format!("a tensor of size {sizes:?} exceeds its storage `{key}`")));
    }
    Ok(count * element)
}

/// Returns a contiguous tensor of the elements that a view selects from a storage.
pub(super) fn elements(kind: Kind, view: &View, storage: &[u8]) -> std::result::Result<Tensor, Fault> {
    let View { offset, sizes, strides } = view;
    if sizes.contains(&0) {
        return Tensor::f_from_data_size(&[], sizes, kind).map_err(libtorch);
    }
    // Elements are copied in storage order, which for a transposed matrix is one piece. libtorch then permutes the
    // dimensions.
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    if !contiguous(&dims(&order, sizes, strides)) {
        order.sort_by_key(|dim| Reverse(strides[*dim]));
    }
    let mut elements = gather(storage, kind.elt_size_in_bytes(), *offset as usize, &dims(&order, sizes, strides));
    if kind == Kind::Bool && elements.iter().any(|byte| *byte > 1) {
        // In C++, any other byte is an invalid boolean.
        elements.to_mut().iter_mut().for_each(|byte| *byte = (*byte != 0).into());
    }
    let lying: Vec<i64> = order.iter().map(|dim| sizes[*dim]).collect();
    let tensor = Tensor::f_from_data_size(&elements, &lying, kind).map_err(libtorch)?;
    if order.is_sorted() {
        return Ok(tensor);
    }
    let mut back = vec![0; order.len()];
    order.iter().enumerate().for_each(|(place, dim)| back[*dim] = place as i64);
    tensor.f_permute(&back).and_then(|tensor| tensor.f_contiguous()).map_err(libtorch)
}

fn libtorch(error: TchError) -> Fault {
    Fault::new(format!("has a tensor that libtorch cannot create: {error}"))
}

fn product(mut sizes: impl Iterator<Item = i64>) -> Option<usize> {
    sizes.try_fold(1_usize, |product, size| product.checked_mul(usize::try_from(size).ok()?))
}

/// Returns (size, stride) of the dimensions in `order`, without those of size 1, whose strides mean nothing.
pub(super) fn dims(order: &[usize], sizes: &[i64], strides: &[i64]) -> Vec<(usize, usize)> {
    order.iter().map(|dim| (sizes[*dim] as usize, strides[*dim] as usize)).filter(|(size, _)| *size > 1).collect()
}

/// True if dimensions with these (size, stride) are contiguous.
pub(super) fn contiguous(dims: &[(usize, usize)]) -> bool {
    let mut expected = 1;
    dims.iter().rev().all(|(size, stride)| {
        let fits = *stride == expected;
        expected = expected.saturating_mul(*size);
        fits
    })
}

/// Returns the elements at these (size, stride), last dimension fastest. The caller has checked that all lie in `data`.
fn gather<'a>(data: &'a [u8], element: usize, offset: usize, dims: &[(usize, usize)]) -> Cow<'a, [u8]> {
    let count: usize = dims.iter().map(|(size, _)| size).product();
    if contiguous(dims) {
        return Cow::Borrowed(&data[offset * element..(offset + count) * element]);
    }
    let mut out = Vec::with_capacity(count * element);
    let Some(((row, step), outer)) = dims.split_last() else { return Cow::Owned(out) };
    let mut index = vec![0; outer.len()];
    let mut start = offset;
    while out.len() < count * element {
        if *step == 1 {
            out.extend_from_slice(&data[start * element..(start + row) * element]);
        } else {
            for at in (0..*row).map(|i| start + i * step) {
                out.extend_from_slice(&data[at * element..(at + 1) * element]);
            }
        }
        // Next row: increment the last outer index that does not overflow, and reset those after it.
        for (place, (size, stride)) in index.iter_mut().zip(outer).rev() {
            *place += 1;
            start += stride;
            if *place < *size {
                break;
            }
            start -= *place * stride;
            *place = 0;
        }
    }
    Cow::Owned(out)
}
