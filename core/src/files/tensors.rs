//! Reads and writes safetensors files, and writes any file atomically.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use tch::{Device, Kind, Tensor};

use crate::error::InputError;
use crate::files;

/// Writes a file atomically: writes a temporary file next to it, syncs, renames it, then syncs the directory.
///
/// On Linux the new file has no name until it is complete, so that a killed program leaves nothing behind.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    write_pieces(path, &[bytes])
}

/// [`write_file`] for bytes in several pieces.
fn write_pieces(path: &Path, pieces: &[&[u8]]) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        #[cfg(target_os = "linux")]
        if write_unnamed(dir, path, pieces)? {
            return File::open(dir)?.sync_all();
        }
        let mut file = tempfile::Builder::new().prefix(PARTIAL).tempfile_in(dir)?;
        pieces.iter().try_for_each(|piece| file.write_all(piece))?;
        file.as_file().sync_all()?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Temporary files are private; the result should be readable like any other file.
            file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        }
        file.persist(path)?;
        File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Prefix of the temporary names of unfinished files.
const PARTIAL: &str = ".partial-";

/// Removes the unfinished files that a killed program may have left in a folder.
pub fn remove_partial(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Writes through an unnamed file (`O_TMPFILE`). Returns `false` if the file system has none, or cannot name it.
#[cfg(target_os = "linux")]
fn write_unnamed(dir: &Path, path: &Path, pieces: &[&[u8]]) -> std::io::Result<bool> {
    use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
    use std::os::fd::AsRawFd;

    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    let Ok(file) = open(dir, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, mode) else { return Ok(false) };
    let mut file = File::from(file);
    pieces.iter().try_for_each(|piece| file.write_all(piece))?;
    file.sync_all()?;
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    let name = |at: &Path| linkat(CWD, &unnamed, CWD, at, AtFlags::SYMLINK_FOLLOW);
    match name(path) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => {
            // A link cannot replace a file, but a rename can. The file under the temporary name is complete.
            let own = path.file_name().unwrap_or_default().to_string_lossy();
            let beside = dir.join(format!("{PARTIAL}{}-{own}", std::process::id()));
            let _ = fs::remove_file(&beside);
            name(&beside)?;
            fs::rename(&beside, path)?;
            Ok(true)
        }
        Err(_) => Ok(false),
    }
}

fn dtype(kind: Kind) -> Result<Dtype> {
    Ok(match kind {
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        Kind::Int16 => Dtype::I16,
        Kind::Int8 => Dtype::I8,
        Kind::Uint8 => Dtype::U8,
        Kind::Bool => Dtype::BOOL,
        other => bail!("safetensors cannot store a tensor of dtype {other:?}"),
    })
}

fn kind(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

/// Writes tensors to a safetensors file atomically.
pub fn write<S: AsRef<str>>(path: &Path, tensors: &[(S, Tensor)]) -> Result<()> {
    write_with_metadata(path, tensors, &[])
}

/// [`write()`] with entries for the file's metadata.
pub fn write_with_metadata<S: AsRef<str>>(
    path: &Path,
    tensors: &[(S, Tensor)],
    metadata: &[(&str, &str)],
) -> Result<()> {
    let layout = FileLayout::new(tensors, metadata)?;
    write_pieces(path, &layout.pieces())
}

/// Returns the bytes of a safetensors file.
pub fn serialize<S: AsRef<str>>(tensors: &[(S, Tensor)], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    Ok(FileLayout::new(tensors, metadata)?.pieces().concat())
}

/// A safetensors file to write. It does not copy the tensors: a checkpoint is too large for that.
struct FileLayout {
    header: Vec<u8>,
    /// In file order.
    tensors: Vec<Tensor>,
}

impl FileLayout {
    fn new<S: AsRef<str>>(tensors: &[(S, Tensor)], metadata: &[(&str, &str)]) -> Result<Self> {
        let mut named = tensors
            .iter()
            .map(|(name, tensor)| Ok((dtype(tensor.kind())?, name.as_ref(), tensor)))
            .collect::<Result<Vec<_>>>()?;
        // Widest dtype first, so that each tensor is aligned to its element size.
        named.sort_by(|(a, a_name, _), (b, b_name, _)| b.cmp(a).then(a_name.cmp(b_name)));
        let mut end = 0;
        let infos = named.iter().map(|(dtype, name, tensor)| {
            let start = end;
            end += crate::files::tensors::bytes(tensor);
            let shape = tensor.size().into_iter().map(|n| n as usize).collect();
            ((*name).to_owned(), TensorInfo { dtype: *dtype, shape, data_offsets: (start, end) })
        });
        let mut info = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
        info.extend(metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let header = Metadata::new(Some(info), infos.collect())?;
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let length = (header.len() as u64).to_le_bytes();
        let tensors = named.iter().map(|(_, _, tensor)| tensor.detach().to_device(Device::Cpu).contiguous());
        Ok(FileLayout { header: [length.as_slice(), &header].concat(), tensors: tensors.collect() })
    }

    fn pieces(&self) -> Vec<&[u8]> {
        std::iter::once(&*self.header).chain(self.tensors.iter().map(bytes_of)).collect()
    }
}

/// Returns the bytes of a contiguous CPU tensor. Panics for any other tensor.
pub fn bytes_of(tensor: &Tensor) -> &[u8] {
    assert!(
        tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "only a contiguous CPU tensor has its bytes in one piece"
    );
    if tensor.numel() == 0 {
        // libtorch allocates no memory for it.
        return &[];
    }
    // SAFETY: a contiguous CPU tensor has that many bytes at `data_ptr`, valid while it is borrowed.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), crate::files::tensors::bytes(tensor)) }
}

/// Reads a safetensors header and checks it against the file's length. Returns it with the offset of the tensor data.
fn header(bytes: &[u8]) -> std::result::Result<(Metadata, usize), SafeTensorError> {
    SafeTensors::deserialize(bytes)?;
    let (length, header) = SafeTensors::read_metadata(bytes)?;
    // A size of 0 makes a tensor empty, but libtorch still multiplies its other sizes.
    let reach = |info: &&TensorInfo| {
        let mut sizes = info.shape.iter().map(|size| (*size).max(1));
        sizes.try_fold(8_usize, |all, size| all.checked_mul(size)).is_none_or(|bytes| isize::try_from(bytes).is_err())
    };
    if header.tensors().into_values().any(|info| reach(&info)) {
        return Err(SafeTensorError::ValidationOverflow);
    }
    Ok((header, length + 8))
}

/// A safetensors file. Opening it checks the header; tensors are read on demand.
pub struct TensorFile {
    path: PathBuf,
    bytes: Bytes,
    header: Metadata,
    /// Offset of the tensor data.
    start: usize,
}

enum Bytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
}

impl TensorFile {
    /// Opens a file and checks its header against its length.
    pub fn open(path: &Path) -> Result<Self> {
        let map = files::map(path)?;
        let (header, start) = header(&map).map_err(|error| {
            InputError::new(format!("cannot read {}: not a complete safetensors file", path.display()))
                .help(format!("safetensors reports: {error}"))
        })?;
        Ok(TensorFile { path: path.to_owned(), bytes: Bytes::Mapped(map), header, start })
    }

    /// Opens a file embedded in the program. Messages call it `name`.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self> {
        let (header, start) = header(bytes).map_err(|error| anyhow!("{name} is not a safetensors file: {error}"))?;
        Ok(TensorFile { path: name.into(), bytes: Bytes::Static(bytes), header, start })
    }

    /// Returns the file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }

    fn data(&self, info: &TensorInfo) -> &[u8] {
        let (from, to) = info.data_offsets;
        &self.bytes()[self.start + from..self.start + to]
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.header.info(name).ok_or_else(|| {
            let names = self.names();
            let error = InputError::new(format!("{} has no tensor `{name}`", self.path.display()));
            let error = error.help(match crate::suggest::nearest(name, names.iter().map(String::as_str)) {
                Some(near) => format!("did you mean `{near}`? it has: {}", names.join(", ")),
                None => format!("it has: {}", names.join(", ")),
            });
            error.into()
        })
    }

    /// Returns the sorted tensor names.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.header.offset_keys();
        names.sort();
        names
    }

    /// True if the file has a tensor with this name.
    pub fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    /// Returns a tensor's shape without reading the tensor.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        Some(self.header.info(name)?.shape.iter().map(|n| *n as i64).collect())
    }

    /// Returns a tensor's dtype without reading the tensor. Fails if the dtype is not supported.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        let dtype = self.info(name)?.dtype;
        kind(dtype).ok_or_else(|| {
            InputError::new(format!(
                "{}: tensor `{name}` has the dtype {dtype:?}, which is not supported",
                self.path.display()
            ))
            .help("supported dtypes: F64, F32, F16, BF16, I64, I32, I16, I8, U8 and BOOL")
            .into()
        })
    }

    /// Lets the OS reclaim a tensor's pages. Reading the tensor again reads the file again.
    pub fn forget(&self, name: &str) {
        if let (Bytes::Mapped(map), Some(info)) = (&self.bytes, self.header.info(name)) {
            let (from, to) = info.data_offsets;
            files::forget(map, self.start + from..self.start + to);
        }
    }

    /// Returns a tensor's bytes.
    pub fn bytes_of(&self, name: &str) -> Option<&[u8]> {
        self.header.info(name).map(|info| self.data(info))
    }

    /// Returns an entry of the file's metadata.
    pub fn metadata(&self, key: &str) -> Option<String> {
        self.header.metadata().as_ref()?.get(key).cloned()
    }

    /// Reads one tensor to the CPU, in the file's dtype.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?;
        let shape: Vec<i64> = info.shape.iter().map(|n| *n as i64).collect();
        Ok(Tensor::f_from_data_size(self.data(info), &shape, self.kind(name)?)?)
    }

    /// Reads only the given rows of a two-dimensional tensor, in the given order.
    pub fn rows(&self, name: &str, rows: impl ExactSizeIterator<Item = usize>) -> Result<Tensor> {
        let (info, kind) = (self.info(name)?, self.kind(name)?);
        let data = self.data(info);
        let width = info.shape.get(1).copied().unwrap_or(1);
        let row_bytes = width * kind.elt_size_in_bytes();
        let count = rows.len();
        let mut bytes = Vec::with_capacity(count * row_bytes);
        for row in rows {
            let row = data.get(row * row_bytes..(row + 1) * row_bytes);
            bytes.extend_from_slice(row.ok_or_else(|| anyhow!("tensor `{name}` has fewer rows than requested"))?);
        }
        Ok(Tensor::f_from_data_size(&bytes, &[count as i64, width as i64], kind)?)
    }

    /// Reads every tensor.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        self.names().into_iter().map(|name| Ok((name.clone(), self.tensor(&name)?))).collect()
    }
}

/// Returns the number of bytes of a tensor's elements.
pub fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * kind_size(tensor.kind())
}

/// Returns the number of bytes of one element.
pub fn kind_size(kind: Kind) -> usize {
    kind.elt_size_in_bytes()
}
