//! A source's activations on disk, in order: `dictlearn activations`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use tch::Tensor;

use crate::config::InputError;
use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::source::{ActivationSource, Batch};
use crate::tensors;

/// Activations in one file.
const SHARD: i64 = 65_536;

/// How a harvest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Harvested {
    /// How many activations were written.
    pub activations: i64,
    /// Whether a signal ended it early; what is written is whole and described all the same.
    pub interrupted: bool,
}

/// Writes one pass over a source, or its first `limit` activations, as `activations-00000.safetensors`, ... with tensor
/// `activations` [N, d] (`in` and `out` where the source has pairs), and `meta.json`. After an error nothing is left.
pub fn write(
    source: &mut dyn ActivationSource,
    out: &Path,
    limit: Option<i64>,
    interrupt: &Interrupt,
) -> Result<Harvested> {
    if out.is_file() {
        bail!(InputError::new(format!("{} is a file", out.display())).help("give a folder to write to"));
    }
    if out.join("meta.json").exists() {
        bail!(InputError::new(format!("{} already holds activations", out.display()))
            .help("choose another --out, or remove it"));
    }
    let created = !out.exists();
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let mut shards = Shards { out, pending: Vec::new(), rows: 0, written: Vec::new() };
    let result = shards.harvest(source, limit, interrupt);
    if result.is_err() {
        for path in shards.written {
            let _ = fs::remove_file(path);
        }
        if created {
            let _ = fs::remove_dir(out);
        }
    }
    result
}

/// The files written so far, and what is to go into the next.
struct Shards<'a> {
    out: &'a Path,
    pending: Vec<Batch>,
    rows: i64,
    written: Vec<PathBuf>,
}

impl Shards<'_> {
    fn harvest(
        &mut self,
        source: &mut dyn ActivationSource,
        limit: Option<i64>,
        interrupt: &Interrupt,
    ) -> Result<Harvested> {
        if limit.is_none() && source.is_endless() {
            bail!(InputError::new("the source has no end")
                .field("source")
                .help("say how many activations: `--limit COUNT`"));
        }
        let mut progress = Progress::counting("activations", limit.map(|limit| limit as u64));
        let (mut count, mut interrupted) = (0, false);
        while limit.is_none_or(|limit| count < limit) {
            interrupted = interrupt.asked();
            if interrupted {
                break;
            }
            let Some(batch) = source.next_batch()? else { break };
            let batch = limit.map_or(batch.first(batch.len()), |limit| batch.first(limit - count));
            self.rows += batch.len();
            count += batch.len();
            self.pending.push(batch);
            if self.rows >= SHARD {
                self.write()?;
            }
            progress.step(count as u64, 0);
        }
        self.write()?;
        progress.finish();
        if count == 0 && !interrupted {
            bail!(InputError::new("the source gave not one activation")
                .help("its data is shorter than one batch: add data, or make the batches smaller"));
        }
        let (activation_dim, output_dim) = source.widths();
        let names: Vec<_> = self.written.iter().filter_map(|path| path.file_name()?.to_str()).collect();
        let meta = serde_json::json!({
            "activations": count,
            "complete": !interrupted,
            "shards": names,
            "activation_dim": activation_dim,
            "output_dim": output_dim,
            "source": source.describe(),
        });
        tensors::write_file(&self.out.join("meta.json"), serde_json::to_string_pretty(&meta)?.as_bytes())?;
        Ok(Harvested { activations: count, interrupted })
    }

    fn write(&mut self) -> Result<()> {
        let Some(first) = self.pending.first() else { return Ok(()) };
        let join = |part: fn(&Batch) -> &Tensor| {
            Tensor::cat(&self.pending.iter().map(|batch| part(batch).shallow_clone()).collect::<Vec<_>>(), 0)
        };
        let tensors = if first.is_autoencoding() {
            vec![("activations", join(|batch| &batch.x))]
        } else {
            vec![("in", join(|batch| &batch.x)), ("out", join(|batch| &batch.target))]
        };
        let path = self.out.join(format!("activations-{:05}.safetensors", self.written.len()));
        tensors::write(&path, &tensors)?;
        self.written.push(path);
        self.pending.clear();
        self.rows = 0;
        Ok(())
    }
}
