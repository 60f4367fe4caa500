//! Checkpoints: the whole training state of a run, from which `--resume` continues.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;
use tch::Device;

use dictlearn_core::error::InputError;
use dictlearn_core::files::state::State;
use dictlearn_core::files::tensors;
use dictlearn_core::files::yaml;
use dictlearn_core::machine::device;

/// Number of checkpoints kept: the last, and the one before it in case the last is damaged.
const KEPT: usize = 2;

/// Help for a run whose config.yaml is lost.
pub(crate) const PUT_BACK: &str =
    "restore the config that the run was started with (`--dry-run` prints it), or choose another --output-dir";

/// Key of the number of steps in the state.
pub(crate) const STEP: &str = "step";

/// Maximum number of config differences shown.
const SHOWN: usize = 8;

/// Top-level config keys that may change on resuming: they affect reports, the device and the handling of failures, but
/// not what is trained.
const HARMLESS: [&str; 13] = [
    "output_dir",
    "log_every",
    "checkpoint_every",
    "checkpoint_buffer",
    "save_every",
    "save_steps",
    "stop_after",
    "loggers",
    "metrics",
    "eval_source",
    "device",
    "on_nonfinite",
    // Checked separately: some schedules depend on it.
    "steps",
];

/// The checkpoints of a run directory.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    /// Step of the last checkpoint that this process wrote or read, which is known to be intact.
    whole: Arc<AtomicU64>,
}

impl Checkpoints {
    /// Returns the checkpoints in `run_dir/checkpoints`.
    pub fn new(run_dir: &Path) -> Self {
        Checkpoints { dir: run_dir.join("checkpoints"), whole: Arc::default() }
    }

    /// Saves the state after `step` steps, whole or not at all, and removes all but the last few. If the disk is full,
    /// removes all but the last intact one first.
    pub fn save(&self, step: u64, state: &State) -> Result<()> {
        make_dir(&self.dir)?;
        let path = self.dir.join(format!("step_{step}.safetensors"));
        if let Err(error) = state.save(&path) {
            if !is_full(&error) || !self.remove_before(self.whole.load(Ordering::Relaxed))? {
                return Err(error);
            }
            state.save(&path)?;
        }
        self.whole.store(step, Ordering::Relaxed);
        // Checkpoints of later steps are damaged ones that were skipped.
        let (later, mut earlier): (Vec<_>, Vec<_>) = self.all()?.into_iter().partition(|(other, _)| *other > step);
        let old = earlier.len().saturating_sub(KEPT);
        for (_, path) in later.into_iter().chain(earlier.drain(..old)) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        tensors::remove_partial(&self.dir);
        Ok(())
    }

    /// Removes the checkpoints of earlier steps. Returns true if there were any.
    fn remove_before(&self, step: u64) -> Result<bool> {
        let earlier: Vec<_> = self.all()?.into_iter().filter(|(other, _)| *other < step).collect();
        for (_, path) in &earlier {
            fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(!earlier.is_empty())
    }

    /// Returns the newest intact checkpoint with its step.
    pub fn latest(&self) -> Result<Option<(u64, State)>> {
        for (step, path) in self.all()?.into_iter().rev() {
            let error = match State::load(&path) {
                Ok(state) if state.get::<u64>(STEP)? == step => {
                    self.whole.store(step, Ordering::Relaxed);
                    return Ok(Some((step, state)));
                }
                Ok(state) => format!("{} is the checkpoint of step {}", path.display(), state.get::<u64>(STEP)?),
                // The warning is one line.
                Err(error) => format!("{error:#}").replace('\n', "; "),
            };
            tracing::warn!("{error}; trying the checkpoint before it");
        }
        Ok(None)
    }

    /// True if there are any checkpoints, intact or damaged.
    pub fn exist(&self) -> bool {
        self.all().is_ok_and(|all| !all.is_empty())
    }

    /// Returns all checkpoints, ordered by step.
    fn all(&self) -> Result<Vec<(u64, PathBuf)>> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Ok(Vec::new()) };
        let step = |path: &Path| path.file_stem()?.to_str()?.strip_prefix("step_")?.parse().ok();
        let mut found: Vec<(u64, PathBuf)> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            // Opening anything but a file could block forever.
            .filter(|path| path.is_file())
            .filter_map(|path| Some((step(&path)?, path)))
            .collect();
        found.sort();
        Ok(found)
    }

    /// Refuses to resume with a config of another experiment. Returns true if `steps` has changed.
    pub fn check_config(&self, begun: &str, now: &str) -> Result<bool> {
        let parse = |text: &str| match yaml::parse::<Value>(text) {
            Ok(Value::Mapping(keys)) => Ok(keys),
            Ok(_) => Err("it has no keys".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        let (begun, now) = parse(begun).and_then(|begun| Ok((begun, parse(now)?))).map_err(|why| {
            let message = format!("the config.yaml beside {} cannot be read: {why}", self.dir.display());
            InputError::new(message).help(PUT_BACK)
        })?;
        let keys: BTreeSet<&str> = begun.keys().chain(now.keys()).filter_map(Value::as_str).collect();
        let mut changed = Vec::new();
        for key in keys.into_iter().filter(|key| !HARMLESS.contains(key)) {
            differences(key, begun.get(key), now.get(key), &mut changed);
        }
        if changed.is_empty() {
            return Ok(begun.get("steps") != now.get("steps"));
        }
        let more = changed.len().saturating_sub(SHOWN);
        changed.truncate(SHOWN);
        if more > 0 {
            changed.push(format!("and {more} more"));
        }
        bail!(
            InputError::new(format!("the run was started with another config: {}", changed.join(", ")))
                .help("resume with the config that it was started with, or choose another --output-dir")
        );
    }
}

/// Creates a folder, but not its parent: if that is gone, its file system may be unmounted, and a new folder would fill
/// the disk below the mount point.
pub(crate) fn make_dir(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let make = || -> std::io::Result<()> {
        fs::create_dir(dir)?;
        File::open(dir.parent().unwrap_or(dir))?.sync_all()
    };
    make().with_context(|| format!("cannot create {}", dir.display()))
}

/// True if a write failed because the disk or the quota is full.
fn is_full(error: &anyhow::Error) -> bool {
    let kind = error.chain().find_map(|cause| Some(cause.downcast_ref::<io::Error>()?.kind()));
    matches!(kind, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
}

/// What the exact results of a run depend on besides its config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    device: String,
    precision: String,
    processor: String,
    threads: i32,
    dictlearn: String,
}

impl Machine {
    /// Describes this machine.
    pub fn here(device: Device, precision: device::Precision) -> Self {
        Machine {
            device: device::name(device),
            precision: precision.to_string(),
            processor: device::processor(),
            threads: tch::get_num_threads(),
            dictlearn: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// Returns the differences from the machine that a run was started on, such as `threads 2 -> 1`.
    pub fn differences(&self, begun: &Machine) -> Vec<String> {
        let pairs = [
            ("device", &begun.device, &self.device),
            ("precision", &begun.precision, &self.precision),
            ("processor", &begun.processor, &self.processor),
            ("threads", &begun.threads.to_string(), &self.threads.to_string()),
            ("dictlearn", &begun.dictlearn, &self.dictlearn),
        ];
        let differing = pairs.into_iter().filter(|(_, begun, here)| begun != here);
        differing.map(|(what, begun, here)| format!("{what} {begun} -> {here}")).collect()
    }
}

/// Collects the differences below a key, leaf by leaf: `saes[0].trainer.lr: 0.001 -> 0.5`.
fn differences(key: &str, begun: Option<&Value>, now: Option<&Value>, found: &mut Vec<String>) {
    match (begun, now) {
        _ if begun == now => {}
        (Some(Value::Mapping(begun)), Some(Value::Mapping(now))) => {
            let keys: BTreeSet<&str> = begun.keys().chain(now.keys()).filter_map(Value::as_str).collect();
            keys.into_iter()
                // The handling of non-finite numbers and invalid data may change in any component.
                .filter(|inner| !matches!(*inner, "on_nonfinite" | "strict"))
                .for_each(|inner| differences(&format!("{key}.{inner}"), begun.get(inner), now.get(inner), found));
        }
        (Some(Value::Sequence(begun)), Some(Value::Sequence(now))) => {
            if begun.len() == now.len() && begun.iter().all(|item| now.contains(item)) {
                found.push(format!("`{key}`: in another order"));
                return;
            }
            for index in 0..begun.len().max(now.len()) {
                differences(&format!("{key}[{index}]"), begun.get(index), now.get(index), found);
            }
        }
        _ => {
            let show = |value: Option<&Value>| match value {
                None => "absent".to_owned(),
                Some(Value::Mapping(keys)) => match keys.get("name").and_then(Value::as_str) {
                    Some(name) => format!("`{name}`"),
                    None => "a map".to_owned(),
                },
                Some(value) => serde_yaml::to_string(value).unwrap_or_default().trim().to_owned(),
            };
            found.push(format!("`{key}`: {} -> {}", show(begun), show(now)));
        }
    }
}
