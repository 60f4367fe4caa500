//! `dictlearn activations`: writes a source's activations to disk, in order.
//!
//! A folder of activations holds shards, `activations-00000.safetensors` and so on, and the manifest `meta.json`, which
//! is written last: a folder without it is incomplete. A shard has the tensor `activations` `[N, d]`, or `in` and `out`
//! if the source has pairs; with several sites, each name starts with `SITE/`. If tokens are known, `token_ids`,
//! `contexts` and `positions` (`[N]` each) identify the token of each row.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use dictlearn_core::data::manifest::{CachedSite, Dtype, Manifest, Shard, TOKENS, hash_of_all, shards_in};
use dictlearn_core::data::{ActivationSource, Activations, Site};
use dictlearn_core::error::{InputError, Under};
use dictlearn_core::files::tensors;
use dictlearn_core::interrupt::Interrupt;
use dictlearn_core::progress::Progress;

/// Maximum number of rows in one shard.
const SHARD_ROWS: i64 = 65_536;
/// Maximum bytes of activations in one shard.
const SHARD_BYTES: i64 = 64 << 20;

/// Writes one pass over a source, or its first `limit` activations, to a folder. Leaves nothing there after an error.
pub fn write(
    source: &mut dyn ActivationSource,
    out: &Path,
    limit: Option<i64>,
    dtype: Dtype,
    interrupt: &Interrupt,
) -> Result<Manifest> {
    if out.is_file() {
        bail!(InputError::new(format!("{} is a file", out.display())).help("give a folder to write to"));
    }
    if out.join("meta.json").exists() {
        bail!(
            InputError::new(format!("{} already holds activations", out.display()))
                .help("choose another --out, or remove it")
        );
    }
    if let Some(shard) = shards_in(out).first() {
        bail!(
            InputError::new(format!("{} holds {shard} but no meta.json: its writer was killed", out.display()))
                .help("choose another --out, or remove it")
        );
    }
    let created = !out.exists();
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let mut writer = Writer::new(source, out, dtype);
    let result = writer.harvest(source, limit, interrupt);
    if !result.as_ref().is_ok_and(|manifest| manifest.activations > 0) {
        for shard in writer.written {
            let _ = fs::remove_file(out.join(shard.file));
        }
        if created {
            let _ = fs::remove_dir(out);
        }
    }
    result
}

/// The shards written so far, and the rows of the next.
struct Writer {
    out: PathBuf,
    dtype: Dtype,
    sites: Vec<Site>,
    /// Rows in one shard.
    shard_rows: i64,
    /// Rows not written yet: a tensor for each part of each site, and the tokens.
    pending: Vec<Vec<(String, Tensor)>>,
    rows: i64,
    /// The tensors of each site.
    tensors: Vec<Vec<String>>,
    tokens: bool,
    written: Vec<Shard>,
}

impl Writer {
    fn new(source: &dyn ActivationSource, out: &Path, dtype: Dtype) -> Self {
        let sites = source.sites();
        // Counts targets even without pairs: the limit need not be exact.
        let width: i64 = sites.iter().map(|site| site.activation_dim + site.output_dim).sum();
        let row = width * dtype.kind().elt_size_in_bytes() as i64;
        Writer {
            out: out.to_owned(),
            dtype,
            sites,
            shard_rows: (SHARD_BYTES / row).clamp(1, SHARD_ROWS),
            pending: Vec::new(),
            rows: 0,
            tensors: Vec::new(),
            tokens: false,
            written: Vec::new(),
        }
    }

    fn harvest(
        &mut self,
        source: &mut dyn ActivationSource,
        limit: Option<i64>,
        interrupt: &Interrupt,
    ) -> Result<Manifest> {
        if limit.is_none() && source.is_endless() {
            bail!(
                InputError::new("the source has no end")
                    .field("source")
                    .help("limit the number of activations: `--limit COUNT`")
            );
        }
        let mut progress = Progress::counting("activations", limit.map(|limit| limit as u64));
        let (mut count, mut interrupted) = (0, false);
        while limit.is_none_or(|limit| count < limit) {
            interrupted = interrupt.asked();
            if interrupted {
                break;
            }
            let activations = match source.next_batch() {
                // The interrupt caused the error.
                Err(_) if interrupt.asked() => continue,
                batch => batch.under("source")?,
            };
            let Some(activations) = activations else { break };
            let rows = limit.map_or(activations.len(), |limit| activations.len().min(limit - count));
            self.add(&activations, rows)?;
            count += rows;
            progress.step(count as u64, 0);
        }
        self.write()?;
        progress.finish();
        let notes = source.notes();
        if count == 0 && !interrupted {
            let help = "its data is shorter than one batch: add data, or make the batches smaller";
            let notes = notes.iter().map(|note| note.trim_start_matches("warning: "));
            let help = notes.chain([help]).collect::<Vec<_>>().join("; ");
            bail!(InputError::new("the source gave no activations").help(help));
        }
        for note in notes {
            crate::notes::emit(&note);
        }
        let sites = self.sites.iter().zip(&self.tensors);
        let manifest = Manifest {
            activations: count as u64,
            complete: !interrupted,
            dtype: self.dtype,
            sites: sites.map(|(site, tensors)| CachedSite { site: site.clone(), tensors: tensors.clone() }).collect(),
            tokens: self.tokens,
            source: source.describe(),
            sha256: hash_of_all(&self.written),
            shards: self.written.clone(),
        };
        let json = serde_json::to_string_pretty(&manifest)?;
        if count > 0 {
            tensors::write_file(&self.out.join("meta.json"), json.as_bytes())?;
        }
        Ok(manifest)
    }

    /// Adds the first rows of some activations, and writes full shards.
    fn add(&mut self, activations: &Activations, rows: i64) -> Result<()> {
        let tensors = self.named(activations)?;
        let mut from = 0;
        while from < rows {
            let count = (rows - from).min(self.shard_rows - self.rows);
            let part = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.narrow(0, from, count));
            self.pending.push(tensors.iter().map(part).collect());
            self.rows += count;
            from += count;
            if self.rows == self.shard_rows {
                self.write()?;
            }
        }
        Ok(())
    }

    /// Returns activations as the tensors of a shard.
    fn named(&mut self, activations: &Activations) -> Result<Vec<(String, Tensor)>> {
        let (mut tensors, mut names) = (Vec::new(), Vec::new());
        for (site, batch) in self.sites.iter().zip(&activations.sites) {
            let prefix = if self.sites.len() == 1 { String::new() } else { format!("{}/", site.name) };
            let parts = match batch.is_autoencoding() {
                true => vec![("activations", &batch.x)],
                false => vec![("in", &batch.x), ("out", &batch.target)],
            };
            let mut own = Vec::new();
            for (name, tensor) in parts {
                let stored = tensor.detach().to_device(Device::Cpu).to_kind(self.dtype.kind());
                if !bool::try_from(stored.isfinite().all())? {
                    let greatest = tensor.abs().max().double_value(&[]);
                    bail!(
                        InputError::new(format!(
                            "an activation of {greatest} at {} does not fit into {}",
                            site.name, self.dtype
                        ))
                        .help("write them with `--dtype bfloat16` or `--dtype float32`")
                    );
                }
                own.push(format!("{prefix}{name}"));
                tensors.push((format!("{prefix}{name}"), stored));
            }
            names.push(own);
        }
        self.tensors = names;
        self.tokens = activations.tokens.is_some();
        if let Some(tokens) = &activations.tokens {
            let tokens = tokens.to_device(Device::Cpu);
            for ((name, column), kind) in TOKENS.iter().zip(0..).zip([Kind::Int, Kind::Int64, Kind::Int]) {
                tensors.push(((*name).to_owned(), tokens.select(1, column).to_kind(kind)));
            }
        }
        Ok(tensors)
    }

    fn write(&mut self) -> Result<()> {
        let Some(first) = self.pending.first() else { return Ok(()) };
        let join = |index: usize| {
            let parts: Vec<&Tensor> = self.pending.iter().map(|tensors| &tensors[index].1).collect();
            (first[index].0.clone(), Tensor::cat(&parts, 0))
        };
        let tensors: Vec<(String, Tensor)> = (0..first.len()).map(join).collect();
        let activations = self.rows as u64;
        self.pending.clear();
        self.rows = 0;
        let bytes = tensors::serialize(&tensors, &[])?;
        let file = format!("activations-{:05}.safetensors", self.written.len());
        tensors::write_file(&self.out.join(&file), &bytes)?;
        let sha256 = format!("{:x}", Sha256::digest(&bytes));
        self.written.push(Shard { file, activations, bytes: bytes.len() as u64, sha256 });
        Ok(())
    }
}
