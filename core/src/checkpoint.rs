//! Checkpoints: the whole training state of a run, from which `--resume` goes on.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;
use tch::Device;

use crate::config::InputError;
use crate::device;
use crate::state::State;
use crate::tensors;
use crate::yaml;

/// How many checkpoints are kept: the last, and the one before it in case the last is damaged.
const KEPT: usize = 2;

/// What to do where the config of a run is lost.
pub(crate) const PUT_BACK: &str =
    "put the config there that the run was begun with (`--dry-run` prints it), or choose another --output-dir";

/// Top-level keys of a config that may differ between a run and its continuation: they change what is reported, where it is
/// computed and what is done on a bad day, not what is trained.
const HARMLESS: [&str; 12] = [
    "output_dir",
    "log_every",
    "checkpoint_every",
    "checkpoint_buffer",
    "save_every",
    "stop_after",
    "loggers",
    "metrics",
    "eval_source",
    "device",
    "on_nonfinite",
    // Looked at by itself: some schedules depend on it.
    "steps",
];

/// The checkpoints of a run directory.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
}

impl Checkpoints {
    /// Those in `run_dir/checkpoints`.
    pub fn new(run_dir: &Path) -> Self {
        Checkpoints { dir: run_dir.join("checkpoints") }
    }

    /// Saves the state after so many steps, whole or not at all, and removes all but the last few.
    pub fn save(&self, step: u64, state: &State) -> Result<()> {
        make_dir(&self.dir)?;
        state.save(&self.dir.join(format!("step_{step}.safetensors")))?;
        // Of later steps there can only be what was damaged and passed over.
        let (later, mut earlier): (Vec<_>, Vec<_>) = self.all()?.into_iter().partition(|(other, _)| *other > step);
        let old = earlier.len().saturating_sub(KEPT);
        for (_, path) in later.into_iter().chain(earlier.drain(..old)) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        tensors::remove_partial(&self.dir);
        Ok(())
    }

    /// The newest checkpoint that is whole, with its step.
    pub fn latest(&self) -> Result<Option<(u64, State)>> {
        for (step, path) in self.all()?.into_iter().rev() {
            match State::load(&path) {
                Ok(state) => return Ok(Some((step, state))),
                Err(error) => eprintln!("warning: {error:#}; trying the checkpoint before it"),
            }
        }
        Ok(None)
    }

    /// Whether there are any, whole or not.
    pub fn exist(&self) -> bool {
        self.all().is_ok_and(|all| !all.is_empty())
    }

    /// All checkpoints by step.
    fn all(&self) -> Result<Vec<(u64, PathBuf)>> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Ok(Vec::new()) };
        let step = |path: &Path| path.file_stem()?.to_str()?.strip_prefix("step_")?.parse().ok();
        let mut found: Vec<(u64, PathBuf)> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter_map(|path| Some((step(&path)?, path)))
            .collect();
        found.sort();
        Ok(found)
    }

    /// Refuses to go on with another experiment than the one that was begun. Whether `steps` is another is the answer.
    pub fn check_config(&self, begun: &str, now: &str) -> Result<bool> {
        let parse = |text: &str| yaml::parse::<Value>(text);
        let (Ok(Value::Mapping(begun)), Ok(Value::Mapping(now))) = (parse(begun), parse(now)) else {
            bail!(InputError::new(format!("the config.yaml beside {} is not a config", self.dir.display()))
                .help(PUT_BACK));
        };
        let keys: BTreeSet<&str> = begun.keys().chain(now.keys()).filter_map(Value::as_str).collect();
        let mut changed = Vec::new();
        for key in keys.into_iter().filter(|key| !HARMLESS.contains(key)) {
            differences(key, begun.get(key), now.get(key), &mut changed);
        }
        if changed.is_empty() {
            return Ok(begun.get("steps") != now.get("steps"));
        }
        bail!(InputError::new(format!("the run was begun with another config: {}", changed.join(", ")))
            .help("resume with the config that it was begun with, or choose another --output-dir"));
    }
}

/// Makes a folder in one that must be there: where that is gone, a file system that came away with it must not be filled
/// beside it.
pub(crate) fn make_dir(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let make = || -> std::io::Result<()> {
        fs::create_dir(dir)?;
        File::open(dir.parent().unwrap_or(dir))?.sync_all()
    };
    make().with_context(|| format!("cannot make {}", dir.display()))
}

/// What the bits of a run depend on beside its config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    device: String,
    precision: String,
    processor: String,
    threads: i32,
    dictlearn: String,
}

impl Machine {
    /// This one.
    pub fn here(device: Device, precision: device::Precision) -> Self {
        Machine {
            device: device::name(device),
            precision: precision.to_string(),
            processor: device::processor(),
            threads: tch::get_num_threads(),
            dictlearn: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// In what it differs from the one that a run was begun on: `2 threads -> 1`.
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

/// What differs below a key, leaf by leaf: `saes[0].trainer.lr: 0.001 -> 0.5`.
fn differences(key: &str, begun: Option<&Value>, now: Option<&Value>, found: &mut Vec<String>) {
    match (begun, now) {
        _ if begun == now => {}
        (Some(Value::Mapping(begun)), Some(Value::Mapping(now))) => {
            let keys: BTreeSet<&str> = begun.keys().chain(now.keys()).filter_map(Value::as_str).collect();
            keys.into_iter()
                .filter(|inner| *inner != "on_nonfinite")
                .for_each(|inner| differences(&format!("{key}.{inner}"), begun.get(inner), now.get(inner), found));
        }
        (Some(Value::Sequence(begun)), Some(Value::Sequence(now))) => {
            for index in 0..begun.len().max(now.len()) {
                differences(&format!("{key}[{index}]"), begun.get(index), now.get(index), found);
            }
        }
        _ => {
            let show = |value: Option<&Value>| match value {
                None => "absent".to_owned(),
                Some(Value::Mapping(_)) => "a map".to_owned(),
                Some(value) => serde_yaml::to_string(value).unwrap_or_default().trim().to_owned(),
            };
            found.push(format!("`{key}`: {} -> {}", show(begun), show(now)));
        }
    }
}
