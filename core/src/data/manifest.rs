//! The manifest of an activation cache.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::Kind;

use super::source::Site;
use crate::error::InputError;
use crate::files;

/// Names of the tensors in a shard that identify each row's token.
pub const TOKENS: [&str; 3] = ["token_ids", "contexts", "positions"];

/// The dtype of activations on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Lossless.
    #[default]
    Float32,
    /// Half the size, with the range of float32.
    BFloat16,
    /// Half the size, up to 65504.
    Float16,
}

impl Dtype {
    /// Every dtype.
    pub const ALL: [Dtype; 3] = [Dtype::Float32, Dtype::BFloat16, Dtype::Float16];

    /// Returns the name in a manifest and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Float32 => "float32",
            Dtype::BFloat16 => "bfloat16",
            Dtype::Float16 => "float16",
        }
    }

    /// Returns libtorch's dtype.
    pub fn kind(self) -> Kind {
        match self {
            Dtype::Float32 => Kind::Float,
            Dtype::BFloat16 => Kind::BFloat16,
            Dtype::Float16 => Kind::Half,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The contents of an activation cache: its `meta.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Number of rows in all shards.
    pub activations: u64,
    /// True if these are all the requested activations; an interrupt may have ended harvesting early.
    pub complete: bool,
    /// Dtype of the activations.
    pub dtype: Dtype,
    /// Sites of the activations.
    pub sites: Vec<CachedSite>,
    /// True if the shards identify each row's token.
    pub tokens: bool,
    /// The source's own description: model, text and so on.
    pub source: Value,
    /// The files, in order.
    pub shards: Vec<Shard>,
    /// SHA-256 of the shards' hashes, one per line.
    pub sha256: String,
}

/// A site, and the tensors that hold its activations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CachedSite {
    /// The site.
    #[serde(flatten)]
    pub site: Site,
    /// Names of the tensors that dictionaries read and reconstruct, or of one tensor for both.
    pub tensors: Vec<String>,
}

/// One file of activations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// File name in the folder.
    pub file: String,
    /// Number of rows.
    pub activations: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

impl Manifest {
    /// Reads the manifest of a folder and checks that it is consistent.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("meta.json");
        if !path.exists() {
            let what = if dir.is_dir() { "holds no meta.json" } else { "is not a folder of activations" };
            bail!(
                InputError::new(format!("{} {what}", dir.display()))
                    .help("`dictlearn activations CONFIG.yaml --out DIR` writes such a folder, with meta.json last")
            );
        }
        let refused = |why: String| {
            InputError::new(format!("{}: {why}", path.display()))
                .help("`dictlearn activations` did not write this folder, or it was changed since")
        };
        let manifest: Manifest =
            serde_json::from_value(files::read_json(&path)?).map_err(|error| refused(error.to_string()))?;
        let rows = manifest.shards.iter().fold(0_u64, |rows, shard| rows.saturating_add(shard.activations));
        if rows != manifest.activations {
            bail!(refused(format!(
                "its shards have {rows} activations, but `activations` is {}",
                manifest.activations
            )));
        }
        if manifest.sha256 != hash_of_all(&manifest.shards) {
            bail!(refused("its `sha256` does not match its shards' hashes".to_owned()));
        }
        let sound = |cached: &CachedSite| {
            let Site { activation_dim, output_dim, .. } = cached.site;
            let tensors = cached.tensors.len();
            activation_dim > 0 && output_dim > 0 && (tensors == 2 || tensors == 1 && activation_dim == output_dim)
        };
        if manifest.sites.is_empty() || !manifest.sites.iter().all(sound) {
            bail!(refused(
                "each of its sites needs a width and one tensor, or two tensors if input and target differ".to_owned()
            ));
        }
        // Each is loaded separately, so one tensor listed many times could fill the memory.
        let mut seen = BTreeSet::new();
        if !manifest.sites.iter().flat_map(|cached| &cached.tensors).all(|name| seen.insert(name)) {
            bail!(refused("two of its sites have the same tensor".to_owned()));
        }
        if let Some(cached) = manifest.sites.iter().find(|cached| !is_joined_of_its_parts(&cached.site)) {
            bail!(refused(format!("the widths of the parts of site `{}` do not add up to its own", cached.site.name)));
        }
        if let Some(shard) =
            manifest.shards.iter().find(|shard| Path::new(&shard.file).file_name() != Some(shard.file.as_ref()))
        {
            bail!(refused(format!("`{}` is not a plain file name", shard.file)));
        }
        Ok(manifest)
    }
}

/// True if a site has no parts, or if their widths add up to its own.
fn is_joined_of_its_parts(site: &Site) -> bool {
    let joined = site.parts.iter().try_fold((0_i64, 0_i64), |(input, output), part| {
        let wide = part.activation_dim > 0 && part.output_dim > 0;
        Some((input.checked_add(part.activation_dim)?, output.checked_add(part.output_dim)?)).filter(|_| wide)
    });
    site.parts.is_empty() || joined == Some(site.widths())
}

/// Returns the SHA-256 of a file, in hexadecimal.
pub fn hash_of_file(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let read = |hash: &mut Sha256| std::io::copy(&mut File::open(path)?, hash);
    read(&mut hash).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(format!("{:x}", hash.finalize()))
}

/// Returns the SHA-256 of the shards' hashes, one per line.
pub fn hash_of_all(shards: &[Shard]) -> String {
    let lines: String = shards.iter().map(|shard| format!("{}\n", shard.sha256)).collect();
    format!("{:x}", Sha256::digest(lines))
}

/// Returns the sorted names of the files in a folder that are named like shards.
pub fn shards_in(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut shards: Vec<String> =
        names.filter(|name| name.starts_with("activations-") && name.ends_with(".safetensors")).collect();
    shards.sort();
    shards
}
