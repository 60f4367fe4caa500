//! The manifest of a cache of activations.

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

/// The names of a shard's tensors that say of which token a row is.
pub const TOKENS: [&str; 3] = ["token_ids", "contexts", "positions"];

/// The type of activations on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// As they are.
    #[default]
    Float32,
    /// Half the size, of the same range.
    BFloat16,
    /// Half the size, to 65504.
    Float16,
}

impl Dtype {
    /// Every type.
    pub const ALL: [Dtype; 3] = [Dtype::Float32, Dtype::BFloat16, Dtype::Float16];

    /// The name in a manifest and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Float32 => "float32",
            Dtype::BFloat16 => "bfloat16",
            Dtype::Float16 => "float16",
        }
    }

    /// As libtorch's.
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

/// What a folder of activations holds: its `meta.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Rows in all shards.
    pub activations: u64,
    /// Whether they are all that was asked for; a signal may have ended it early.
    pub complete: bool,
    /// Their type.
    pub dtype: Dtype,
    /// The places in the model that they are from.
    pub sites: Vec<CachedSite>,
    /// Whether shards say of which token each row is.
    pub tokens: bool,
    /// What the source says of itself: model, text and so on.
    pub source: Value,
    /// The files, in order.
    pub shards: Vec<Shard>,
    /// Of the shards' hashes, a line each.
    pub sha256: String,
}

/// A site, and the tensors that hold its activations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CachedSite {
    /// The site.
    #[serde(flatten)]
    pub site: Site,
    /// What dictionaries read and what they reconstruct, or one tensor for both.
    pub tensors: Vec<String>,
}

/// One file of activations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Its name in the folder.
    pub file: String,
    /// Its rows.
    pub activations: u64,
    /// Its length.
    pub bytes: u64,
    /// The hash of its bytes, in hexadecimal.
    pub sha256: String,
}

impl Manifest {
    /// Reads the manifest of a folder and sees that it agrees with itself.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("meta.json");
        if !path.exists() {
            let what = if dir.is_dir() { "holds no meta.json" } else { "is no folder of activations" };
            bail!(
                InputError::new(format!("{} {what}", dir.display()))
                    .help("`dictlearn activations CONFIG.yaml --out DIR` writes such a folder, its meta.json last")
            );
        }
        let refused = |why: String| {
            InputError::new(format!("{}: {why}", path.display()))
                .help("the folder is not one that `dictlearn activations` wrote, or it was changed since")
        };
        let manifest: Manifest =
            serde_json::from_value(files::read_json(&path)?).map_err(|error| refused(error.to_string()))?;
        let rows = manifest.shards.iter().fold(0_u64, |rows, shard| rows.saturating_add(shard.activations));
        if rows != manifest.activations {
            bail!(refused(format!("its shards have {rows} activations, but it says {}", manifest.activations)));
        }
        if manifest.sha256 != hash_of_all(&manifest.shards) {
            bail!(refused("its `sha256` is not that of its shards' hashes".to_owned()));
        }
        let sound = |cached: &CachedSite| {
            let Site { activation_dim, output_dim, .. } = cached.site;
            let tensors = cached.tensors.len();
            activation_dim > 0 && output_dim > 0 && (tensors == 2 || tensors == 1 && activation_dim == output_dim)
        };
        if manifest.sites.is_empty() || !manifest.sites.iter().all(sound) {
            bail!(refused(
                "its sites need a width and a tensor each, or two for what is read and what is reconstructed"
                    .to_owned()
            ));
        }
        // Each has its place in memory, so that one tensor under many names would fill it.
        let mut seen = BTreeSet::new();
        if !manifest.sites.iter().flat_map(|cached| &cached.tensors).all(|name| seen.insert(name)) {
            bail!(refused("two of its sites have the same tensor".to_owned()));
        }
        if let Some(cached) = manifest.sites.iter().find(|cached| !is_joined_of_its_parts(&cached.site)) {
            bail!(refused(format!("the parts of site `{}` are not what it is joined of", cached.site.name)));
        }
        if let Some(shard) =
            manifest.shards.iter().find(|shard| Path::new(&shard.file).file_name() != Some(shard.file.as_ref()))
        {
            bail!(refused(format!("`{}` is not the name of a file", shard.file)));
        }
        Ok(manifest)
    }
}

/// Whether the widths of a site's parts, if it has any, make up its own.
fn is_joined_of_its_parts(site: &Site) -> bool {
    let joined = site.parts.iter().try_fold((0_i64, 0_i64), |(input, output), part| {
        let wide = part.activation_dim > 0 && part.output_dim > 0;
        Some((input.checked_add(part.activation_dim)?, output.checked_add(part.output_dim)?)).filter(|_| wide)
    });
    site.parts.is_empty() || joined == Some(site.widths())
}

/// The hash of a file's bytes, in hexadecimal.
pub fn hash_of_file(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let read = |hash: &mut Sha256| std::io::copy(&mut File::open(path)?, hash);
    read(&mut hash).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(format!("{:x}", hash.finalize()))
}

/// The hash of the hashes of shards, a line each.
pub fn hash_of_all(shards: &[Shard]) -> String {
    let lines: String = shards.iter().map(|shard| format!("{}\n", shard.sha256)).collect();
    format!("{:x}", Sha256::digest(lines))
}

/// The files in a folder that are named as shards are.
pub fn shards_in(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut shards: Vec<String> =
        names.filter(|name| name.starts_with("activations-") && name.ends_with(".safetensors")).collect();
    shards.sort();
    shards
}
