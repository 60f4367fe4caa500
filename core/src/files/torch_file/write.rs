//! Writes a state dict as `torch.save` does, so that `torch.load(path, weights_only=True)` reads it.
//!
//! The file is a zip archive of `archive/data.pkl`, a pickle that rebuilds an `OrderedDict` of tensors, and one
//! uncompressed entry for each tensor's storage (PyTorch's serialization notes,
//! <https://pytorch.org/docs/stable/notes/serialization.html>).

use std::io::{Cursor, Write};
use std::path::Path;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::STORAGES;
use crate::files::tensors::write_file;

/// Writes a state dict atomically.
pub fn write(path: &Path, tensors: &[(&str, Tensor)]) -> Result<()> {
    write_file(path, &serialize(tensors)?)
}

pub(super) fn serialize(tensors: &[(&str, Tensor)]) -> Result<Vec<u8>> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    // PyTorch can map storages in place, so they are stored uncompressed and with its alignment.
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).with_alignment(64);
    let mut entry = |name: &str, bytes: &[u8]| -> Result<()> {
        archive.start_file(format!("archive/{name}"), options)?;
        Ok(archive.write_all(bytes)?)
    };
    let tensors: Vec<(&str, Tensor)> =
        tensors.iter().map(|(name, tensor)| (*name, tensor.detach().to_device(Device::Cpu).contiguous())).collect();
    entry("data.pkl", &pickle(&tensors)?)?;
    entry("byteorder", b"little")?;
    for (index, (_, tensor)) in tensors.iter().enumerate() {
        let mut bytes = vec![0_u8; crate::files::tensors::bytes(tensor)];
        if !bytes.is_empty() {
            tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        }
        entry(&format!("data/{index}"), &bytes)?;
    }
    entry("version", b"3\n")?;
    Ok(archive.finish()?.into_inner())
}

/// Returns a pickle (protocol 2) of an `OrderedDict` of `_rebuild_tensor_v2(storage, 0, size, stride, False, {})`.
fn pickle(tensors: &[(&str, Tensor)]) -> Result<Vec<u8>> {
    const ORDERED_DICT: &[u8] = b"ccollections\nOrderedDict\n)R";
    let mut out = b"\x80\x02".to_vec();
    out.extend(ORDERED_DICT);
    out.push(b'(');
    for (index, (name, tensor)) in tensors.iter().enumerate() {
        string(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n(");
        // The storage, as a persistent id: ("storage", class, key, device, number of elements).
        out.push(b'(');
        string(&mut out, "storage");
        out.extend(format!("ctorch\n{}\n", storage_class(tensor.kind())?).bytes());
        string(&mut out, &index.to_string());
        string(&mut out, "cpu");
        integer(&mut out, tensor.numel() as i64);
        out.extend(b"tQ");
        integer(&mut out, 0);
        tuple(&mut out, &tensor.size());
        tuple(&mut out, &tensor.stride());
        out.push(b'\x89');
        out.extend(ORDERED_DICT);
        out.extend(b"tR");
    }
    out.extend(b"u.");
    Ok(out)
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.bytes());
}

fn integer(out: &mut Vec<u8>, value: i64) {
    match (u8::try_from(value), i32::try_from(value)) {
        (Ok(byte), _) => out.extend([b'K', byte]),
        (_, Ok(word)) => {
            out.push(b'J');
            out.extend(word.to_le_bytes());
        }
        _ => {
            out.extend([b'\x8a', 8]);
            out.extend(value.to_le_bytes());
        }
    }
}

fn tuple(out: &mut Vec<u8>, values: &[i64]) {
    if values.is_empty() {
        return out.push(b')');
    }
    out.push(b'(');
    values.iter().for_each(|value| integer(out, *value));
    out.push(b't');
}

fn storage_class(kind: Kind) -> Result<&'static str> {
    match STORAGES.iter().find(|(_, known)| *known == kind) {
        Some((class, _)) => Ok(class),
        None => bail!("a .pt file cannot store a tensor of dtype {kind:?}"),
    }
}
