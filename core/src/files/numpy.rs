//! Reads NumPy files: floating-point arrays in .npy and .npz.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::path::Path;

use anyhow::{Result, bail};
use npyz::{NpyFile, Order};
use tch::{Kind, Tensor};
use zip::ZipArchive;

use crate::error::InputError;
use crate::files;

/// Maximum ratio of decompressed size to file size. Weights hardly compress; a file beyond this aims to fill memory.
const UNFOLDS: u64 = 64;
/// Decompressed size, in bytes, that any file may reach.
const SMALL: u64 = 1 << 26;

fn refused(path: &Path, why: impl std::fmt::Display) -> InputError {
    InputError::new(format!("cannot read {}: {why}", path.display()))
}

/// Reads the array of an .npy file as float32. The file may hold float16, float32 or float64, in any byte order and
/// layout.
pub fn read_npy(path: &Path) -> Result<Tensor> {
    Ok(array(files::read(path)?).map_err(|why| refused(path, why))?)
}

/// An open .npz file.
pub struct Npz {
    path: std::path::PathBuf,
    archive: ZipArchive<Cursor<memmap2::Mmap>>,
    /// Bytes that its arrays may still decompress to.
    budget: u64,
}

impl Npz {
    /// Opens a file and reads its list of arrays.
    pub fn open(path: &Path) -> Result<Self> {
        let map = files::map(path)?;
        let budget = (map.len() as u64 * UNFOLDS).max(SMALL);
        let archive = ZipArchive::new(Cursor::new(map)).map_err(|error| refused(path, error))?;
        Ok(Npz { path: path.to_owned(), archive, budget })
    }

    /// Returns the names of the arrays.
    pub fn names(&self) -> Vec<String> {
        self.archive.file_names().flatten().filter_map(|name| name.strip_suffix(".npy").map(str::to_owned)).collect()
    }

    /// Reads one array as float32.
    pub fn array(&mut self, name: &str) -> Result<Tensor> {
        let names = self.names();
        let entry = match self.archive.by_name(&format!("{name}.npy")) {
            Ok(entry) => entry,
            Err(zip::result::ZipError::FileNotFound) => {
                bail!(
                    InputError::new(format!("{} has no array `{name}`", self.path.display()))
                        .help(format!("it has: {}", names.join(", ")))
                )
            }
            Err(error) => bail!(refused(&self.path, error)),
        };
        let mut bytes = Vec::new();
        let read = entry.take(self.budget + 1).read_to_end(&mut bytes);
        read.map_err(|error| refused(&self.path, format!("array `{name}`: {error}")))?;
        if bytes.len() as u64 > self.budget {
            bail!(refused(&self.path, format!("array `{name}` expands to more than {UNFOLDS} times the file")));
        }
        self.budget -= bytes.len() as u64;
        Ok(array(bytes).map_err(|why| refused(&self.path, format!("array `{name}`: {why}")))?)
    }

    /// Reads every array as float32.
    pub fn arrays(&mut self) -> Result<BTreeMap<String, Tensor>> {
        self.names().into_iter().map(|name| Ok((name.clone(), self.array(&name)?))).collect()
    }
}

/// Parses the bytes of an .npy file.
fn array(bytes: Vec<u8>) -> Result<Tensor, String> {
    let text = |error: std::io::Error| error.to_string();
    // Check the header length that the file claims.
    let header = match bytes.get(..12) {
        Some([0x93, b'N', b'U', b'M', b'P', b'Y', 1, _, low, high, ..]) => {
            10 + u64::from(u16::from_le_bytes([*low, *high]))
        }
        Some([0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _, a, b, c, d]) => {
            12 + u64::from(u32::from_le_bytes([*a, *b, *c, *d]))
        }
        _ => return Err("it is not a NumPy file".to_owned()),
    };
    if header > bytes.len() as u64 {
        return Err("it is truncated".to_owned());
    }
    let header = header as usize;
    // Check the shape as well: npyz multiplies it without a check.
    let written = String::from_utf8_lossy(&bytes[..header]).into_owned();
    let claimed = written.split_once("'shape'").map_or("", |(_, rest)| rest.split(')').next().unwrap_or_default());
    // npyz takes time exponential in the header's nesting, and accepts every number syntax of Python. A plain header
    // has one dict, and a shape in decimal digits.
    let plain = |c: char| c.is_ascii_digit() || " :(,L".contains(c);
    if written.matches(['(', '[', '{']).count() > 2 || claimed.is_empty() || !claimed.chars().all(plain) {
        return Err("its header does not describe a plain array of float16, float32 or float64".to_owned());
    }
    let numbers = claimed.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
    let numbers: Option<Vec<u64>> = numbers.map(|part| part.parse().ok()).collect();
    // A size of 0 makes an array empty, but npyz still multiplies the other sizes for its strides.
    let count = numbers.and_then(|numbers| {
        let others = numbers.iter().try_fold(1_u64, |all, n| all.checked_mul((*n).max(1)))?;
        Some(if numbers.contains(&0) { 0 } else { others })
    });
    if count.is_none_or(|count| count > bytes.len() as u64) {
        return Err("its shape is larger than the file".to_owned());
    }
    let file = NpyFile::new(Cursor::new(&bytes[..])).map_err(text)?;
    let shape: Option<Vec<i64>> = file.shape().iter().map(|n| i64::try_from(*n).ok()).collect();
    let (Some(shape), order) = (shape, file.order()) else {
        return Err("its shape is larger than the file".to_owned());
    };
    let count = file.shape().iter().try_fold(1_u64, |all, n| all.checked_mul(*n));
    if count.is_none_or(|count| count > bytes.len() as u64) {
        return Err("its shape is larger than the file".to_owned());
    }
    let kind = file.dtype().descr();
    if kind == "'<f4'" && order == Order::C {
        // Almost every file is like this: skip the intermediate copy.
        let count = file.len() as usize;
        let data = bytes.get(header..header + count * 4).ok_or("it is truncated")?;
        return Tensor::f_from_data_size(data, &shape, Kind::Float).map_err(|error| error.to_string());
    }
    let file = match file.try_data::<f32>() {
        Ok(data) => return shaped(data, shape, order),
        Err(file) => file,
    };
    let file = match file.try_data::<f64>() {
        Ok(data) => return shaped(data.map(|value| value.map(|value| value as f32)), shape, order),
        Err(file) => file,
    };
    match file.try_data::<half::f16>() {
        Ok(data) => shaped(data.map(|value| value.map(half::f16::to_f32)), shape, order),
        Err(_) => Err(format!("its dtype is {kind}; supported are float16, float32 and float64")),
    }
}

fn shaped(values: impl Iterator<Item = std::io::Result<f32>>, shape: Vec<i64>, order: Order) -> Result<Tensor, String> {
    let values = values.collect::<std::io::Result<Vec<f32>>>().map_err(|error| error.to_string())?;
    let values = Tensor::f_from_slice(&values).map_err(|error| error.to_string())?;
    match order {
        Order::C => values.f_reshape(shape),
        Order::Fortran => {
            let reversed: Vec<i64> = shape.iter().rev().copied().collect();
            let axes: Vec<i64> = (0..shape.len() as i64).rev().collect();
            values.f_reshape(reversed).and_then(|values| values.f_permute(axes)?.f_contiguous())
        }
    }
    .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns an .npy file of shape [3, 2] whose values count up in storage order.
    fn npy(order: Order, wide: bool) -> Vec<u8> {
        use npyz::WriterBuilder;
        let mut bytes = Vec::new();
        let values = (0..6).map(|value| value as f32);
        if wide {
            let options = npyz::WriteOptions::new().default_dtype().shape(&[3, 2]).order(order).writer(&mut bytes);
            let mut writer = options.begin_nd().unwrap();
            writer.extend(values.map(f64::from)).unwrap();
            writer.finish().unwrap();
        } else {
            let options = npyz::WriteOptions::new().default_dtype().shape(&[3, 2]).order(order).writer(&mut bytes);
            let mut writer = options.begin_nd().unwrap();
            writer.extend(values.map(half::f16::from_f32)).unwrap();
            writer.finish().unwrap();
        }
        bytes
    }

    #[test]
    fn dtypes_and_layouts_are_read_as_float32() {
        for wide in [false, true] {
            let by_rows = Vec::<Vec<f32>>::try_from(array(npy(Order::C, wide)).unwrap()).unwrap();
            assert_eq!(by_rows, [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]);
            let by_columns = Vec::<Vec<f32>>::try_from(array(npy(Order::Fortran, wide)).unwrap()).unwrap();
            assert_eq!(by_columns, [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]);
        }
    }

    #[test]
    fn truncated_files_are_refused() {
        let whole = npy(Order::C, true);
        for length in 0..whole.len() {
            assert!(array(whole[..length].to_vec()).is_err(), "{length} of {} bytes", whole.len());
        }
    }

    #[test]
    fn shapes_larger_than_the_file_are_refused() {
        let whole = npy(Order::C, true);
        let at = whole.windows(7).position(|bytes| bytes == b"'shape'").unwrap();
        let end = whole.len() - 48;
        for shape in [
            "(99999999999, )",
            "(4294967296, 4294967296, 4)",
            "(18446744073709551615, 2)",
            "(3, 9)",
            "(0, 4611686018427387904, 4611686018427387904)",
        ] {
            // Keep the header's length: pad with spaces up to the line end.
            let mut changed = whole.clone();
            let text = format!("'shape': {shape}, }}");
            changed[at..end - 1].fill(b' ');
            changed[at..at + text.len()].copy_from_slice(text.as_bytes());
            assert!(array(changed).is_err(), "{shape}");
        }
        let mut same = whole.clone();
        let text = "'shape': (3, 2), }";
        same[at..end - 1].fill(b' ');
        same[at..at + text.len()].copy_from_slice(text.as_bytes());
        assert!(array(same).is_ok());
    }
}
