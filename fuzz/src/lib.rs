//! Fuzz targets: each file reader as a function of a file's bytes, which returns true if they were read.
//!
//! cargo-fuzz calls these functions from `fuzz_targets`. `tests/it/fuzz.rs` includes this file and calls them on a
//! stable toolchain. A reader may refuse a file with an [`InputError`]. It must not panic, overflow the stack, or take
//! more memory than [`limit_memory`] allows.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use dictlearn as _;
use dictlearn::config;
use dictlearn::config::Sources;
use dictlearn_core::data::SourceCx;
use dictlearn_core::data::TaggedSource;
use dictlearn_core::error::InputError;
use dictlearn_core::files::numpy::{Npz, read_npy};
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::files::torch_file;
use tempfile::TempDir;

/// A reader, as a function of a file's bytes.
pub type Target = fn(&[u8]) -> bool;

/// Every target by name; its folder in `corpus` has the same name.
pub const TARGETS: [(&str, Target); 7] = [
    ("config", config),
    ("safetensors", safetensors),
    ("npy", npy),
    ("npz", npz),
    ("pickle", pickle),
    ("tokenizer", tokenizer),
    ("manifest", manifest),
];

/// A file of the fixture folder of activations.
macro_rules! shard {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../../tests/fixtures/activations/", $name)))
    };
}

/// Bytes that a run may allocate beyond its memory at the start.
const MEMORY: u64 = 2 << 30;

/// Reads a config, with every plugin's fields.
pub fn config(data: &[u8]) -> bool {
    read("config.yaml", data, |file| Ok(config::load(&Sources { file, ..Sources::default() })?))
}

/// Reads a safetensors file: its header and its tensors, whole and by rows.
pub fn safetensors(data: &[u8]) -> bool {
    read("tensors.safetensors", data, |file| {
        let file = TensorFile::open(&file)?;
        for name in file.names() {
            if let (Some([rows, _]), true) = (file.shape(&name).as_deref(), file.kind(&name).is_ok()) {
                file.rows(&name, 0..(*rows).min(2) as usize).map(drop)?;
            }
        }
        file.tensors()
    })
}

/// Reads a NumPy array.
pub fn npy(data: &[u8]) -> bool {
    read("array.npy", data, |file| read_npy(&file))
}

/// Reads a zip archive of NumPy arrays.
pub fn npz(data: &[u8]) -> bool {
    read("arrays.npz", data, |file| Npz::open(&file)?.arrays())
}

/// Reads a file of `torch.save`, or the pickle of one with a storage of 256 bytes.
pub fn pickle(data: &[u8]) -> bool {
    if data.starts_with(b"PK") {
        return accepted(torch_file::read_bytes("weights.pt", data));
    }
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("weights/data.pkl", data), ("weights/data/0", &[0; 256])] {
        archive.start_file(name, stored).and_then(|()| Ok(archive.write_all(bytes)?)).expect("a zip archive in memory");
    }
    let archive = archive.finish().expect("a zip archive in memory").into_inner();
    accepted(torch_file::read_bytes("weights.pt", &archive))
}

/// Reads the tokenizer.json of a model and tokenises a few words.
pub fn tokenizer(data: &[u8]) -> bool {
    const MODEL: [(&str, &[u8]); 3] = [
        ("config.json", include_bytes!("../../tests/fixtures/models/gpt_neox/config.json")),
        ("model.safetensors", include_bytes!("../../tests/fixtures/models/gpt_neox/model.safetensors")),
        (
            "text.txt",
            "It is a truth universally acknowledged, that İ ﬁ naïve 東京 \u{1f600} 12345.\n\n \0\t".as_bytes(),
        ),
    ];
    read("tokenizer.json", data, |file| {
        let folder = beside(&file, MODEL.iter());
        let text = folder.join("text.txt");
        let source = format!(
            "{{type: language_model, model: {folder:?}, submodule: gpt_neox.layers.0, shuffle: false, ctx_len: 8, \
             out_batch_size: 8, text: {{type: text_files, path: {text:?}}}}}"
        );
        first_batch(&source)
    })
}

/// Reads the manifest of an activation cache, then a batch. The folder has the shards that the manifest names.
pub fn manifest(data: &[u8]) -> bool {
    const SHARDS: [(&str, &[u8]); 4] = [
        shard!("activations-00000.safetensors"),
        shard!("activations-00001.safetensors"),
        shard!("activations-00002.safetensors"),
        // A valid tensor with very many rows and no columns.
        ("endless.safetensors", include_bytes!("../corpus/safetensors/endless.safetensors")),
    ];
    let text = String::from_utf8_lossy(data);
    let named = SHARDS.iter().filter(|(name, _)| text.contains(name));
    read("meta.json", data, |file| {
        first_batch(&format!("{{type: activation_cache, path: {:?}, batch_size: 8}}", beside(&file, named)))
    })
}

/// Limits this process to `MEMORY` more bytes, so that excessive allocations fail without affecting other processes.
pub fn limit_memory() {
    #[cfg(target_os = "linux")]
    {
        let status = fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = status.split(' ').next().unwrap().parse().unwrap();
        let most = pages * 4096 + MEMORY;
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: a plain system call on a struct that lives through it.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
    }
}

/// Writes bytes to a file of this name in a temporary folder and reads it.
fn read<T>(name: &str, data: &[u8], reader: impl FnOnce(PathBuf) -> Result<T>) -> bool {
    let dir = TempDir::new().expect("a temporary folder");
    let file = dir.path().join(name);
    fs::write(&file, data).expect("a temporary file");
    accepted(reader(file))
}

/// Returns true if a file was read. Panics if it was refused with anything but an [`InputError`].
fn accepted<T>(result: Result<T>) -> bool {
    let Err(error) = result else { return true };
    if let Err(other) = InputError::take(error) {
        panic!("refused with an error that is not an InputError: {other:?}");
    }
    false
}

/// Writes files next to `file` and returns their folder.
fn beside<'a>(file: &Path, files: impl Iterator<Item = &'a (&'static str, &'static [u8])>) -> &Path {
    let folder = file.parent().expect("a file in a folder");
    for (name, bytes) in files {
        fs::write(folder.join(name), bytes).expect("a temporary file");
    }
    folder
}

/// Builds a source and reads its first batch.
fn first_batch(yaml: &str) -> Result<()> {
    let config: Box<dyn TaggedSource> = dictlearn_core::files::from_yaml(yaml)?;
    let cx = SourceCx::default();
    config.build(&cx)?.next_batch()?;
    Ok(())
}
