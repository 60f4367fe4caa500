//! Checkpoints: the whole training state of a run, from which `--resume` goes on.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use serde_yaml::Value;

use crate::config::InputError;
use crate::state::State;

/// How many checkpoints are kept: the last, and the one before it in case the last is damaged.
const KEPT: usize = 2;

/// Top-level keys of a config that may differ between a run and its continuation: they change what is reported and
/// where, not what is trained.
const HARMLESS: [&str; 8] =
    ["output_dir", "log_every", "checkpoint_every", "save_every", "stop_after", "loggers", "metrics", "eval_source"];

/// The checkpoints of a run directory.
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
        fs::create_dir_all(&self.dir).with_context(|| format!("cannot make {}", self.dir.display()))?;
        state.save(&self.dir.join(format!("step_{step}.safetensors")))?;
        for (_, path) in self.all()?.iter().rev().skip(KEPT) {
            fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
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

    /// Refuses to go on with another experiment than the one that was begun.
    pub fn check_config(&self, begun: &str, now: &str) -> Result<()> {
        let parse = |text: &str| serde_yaml::from_str::<Value>(text);
        let (Ok(Value::Mapping(begun)), Ok(Value::Mapping(now))) = (parse(begun), parse(now)) else {
            bail!(InputError::new(format!("the config.yaml beside {} cannot be read", self.dir.display())));
        };
        let keys: BTreeSet<&str> = begun.keys().chain(now.keys()).filter_map(Value::as_str).collect();
        let mut changed = Vec::new();
        for key in keys.into_iter().filter(|key| !HARMLESS.contains(key)) {
            differences(key, begun.get(key), now.get(key), &mut changed);
        }
        if changed.is_empty() {
            return Ok(());
        }
        bail!(InputError::new(format!("the run was begun with another config: {}", changed.join(", ")))
            .help("resume with the config that it was begun with, or choose another --output-dir"));
    }
}

/// What differs below a key, leaf by leaf: `saes[0].trainer.lr: 0.001 -> 0.5`.
fn differences(key: &str, begun: Option<&Value>, now: Option<&Value>, found: &mut Vec<String>) {
    match (begun, now) {
        _ if begun == now => {}
        (Some(Value::Mapping(begun)), Some(Value::Mapping(now))) => {
            let keys: BTreeSet<&str> = begun.keys().chain(now.keys()).filter_map(Value::as_str).collect();
            keys.into_iter()
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
