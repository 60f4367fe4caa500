//! Saved SAEs: a folder with `ae.safetensors`, `ae.pt` and `config.json`, named as in the reference.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::adapted::{Adapted, Normalization};
use super::affine::SavedTensors;
use super::dictionary::{Dictionary, SavedClass};
use crate::error::InputError;
use crate::files;
use crate::files::tensors;
use crate::files::tensors::TensorFile;
use crate::files::torch_file;
use crate::machine::device::Precision;
use crate::suggest::nearest;

/// A dictionary loaded from its folder.
pub struct Saved {
    /// Folder it was loaded from.
    pub dir: PathBuf,
    /// The dictionary, including its normalisation.
    pub dictionary: Box<dyn Dictionary>,
    /// Normalisation that the dictionary applies to its input.
    pub normalization: Option<Normalization>,
    /// Contents of config.json.
    pub config: Value,
}

impl Saved {
    /// Returns the folder's name, for tables.
    pub fn name(&self) -> String {
        folder_name(&self.dir)
    }
}

/// Files of a saved SAE, in the order in which they are written.
pub const FILES: [&str; 3] = ["ae.safetensors", "ae.pt", "config.json"];

/// Saves a dictionary to a folder, creating it if needed. Each file is written atomically, config.json last.
pub fn write(dir: &Path, dictionary: &dyn Dictionary, config: &Value) -> Result<()> {
    fs::create_dir_all(dir).map_err(|error| anyhow!("cannot make {}: {error}", dir.display()))?;
    let tensors = dictionary.state_dict();
    let [weights, for_python, settings] = FILES.map(|file| dir.join(file));
    tensors::write(&weights, &tensors)?;
    torch_file::write(&for_python, &tensors)?;
    tensors::write_file(&settings, serde_json::to_string_pretty(config)?.as_bytes())
}

/// Loads a dictionary from its folder.
pub fn read(dir: &Path, device: Device, precision: Precision) -> Result<Saved> {
    let weights = weights(dir)?;
    let config = files::read_json(&dir.join("config.json"))?;
    let class = config
        .pointer("/trainer/dict_class")
        .and_then(Value::as_str)
        .ok_or_else(|| InputError::new(format!("{} has no `trainer.dict_class`", dir.join("config.json").display())))?;
    let normalization = normalization(&config, &dir.join("config.json"))?;
    let (tensors, scale) = tensors_of(&weights)?;
    let saved = SavedTensors { tensors: &tensors, trainer: &config["trainer"], device, precision };
    let mut dictionary = fitting(class, &saved).with_context(|| format!("cannot read {}", weights.display()))?;
    dictionary.load(&tensors, &weights)?;
    if let Some(scale) = scale {
        dictionary.scale_biases(scale);
    }
    if is_python(&weights) {
        dictionary.pretrained();
    }
    let dtype = config.pointer("/trainer/dtype").and_then(Value::as_str);
    let dictionary = adapted(dictionary, normalization, dtype);
    Ok(Saved { dir: dir.to_owned(), dictionary, normalization, config })
}

/// Wraps a dictionary with its normalisation and half-precision dtype, if it has either.
pub fn adapted(
    dictionary: Box<dyn Dictionary>,
    normalization: Option<Normalization>,
    dtype: Option<&str>,
) -> Box<dyn Dictionary> {
    let kind = match dtype {
        Some("bfloat16") => Some(Kind::BFloat16),
        Some("float16") => Some(Kind::Half),
        _ => None,
    };
    if normalization.is_none() && kind.is_none() {
        return dictionary;
    }
    Box::new(Adapted::new(dictionary, normalization, kind))
}

/// Returns the weights file of an SAE's folder: ae.safetensors, or else the reference's ae.pt.
pub fn weights(dir: &Path) -> Result<PathBuf> {
    if !dir.is_dir() {
        let what = if dir.exists() { "is a file, not an SAE's folder" } else { "does not exist" };
        bail!(
            InputError::new(format!("{} {what}", dir.display()))
                .help("an SAE's folder holds ae.safetensors and config.json; a run has one for each of its SAEs")
        );
    }
    let weights =
        |dir: &Path| ["ae.safetensors", "ae.pt"].map(|name| dir.join(name)).into_iter().find(|file| file.exists());
    if let Some(weights) = weights(dir) {
        return Ok(weights);
    }
    let mut inner: Vec<String> = fs::read_dir(dir)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| weights(path).is_some())
        .map(|path| path.display().to_string())
        .collect();
    inner.sort_by_cached_key(|path| parts(path));
    let error = InputError::new(format!("{} holds no ae.safetensors", dir.display()));
    bail!(match inner.is_empty() {
        true => error.help(
            "an SAE's folder holds ae.safetensors (or the reference's ae.pt) and config.json; \
             `dictlearn import` converts other formats"
        ),
        false => error.help(format!("it is a run; its SAEs are: {}", inner.join(", "))),
    });
}

/// Returns the SAE folders under a path: itself, those of a run, or those of a folder of runs. Sorted, numbers by
/// value.
pub fn folders(path: &Path) -> Result<Vec<PathBuf>> {
    /// Folder of runs, run, SAE.
    const DEPTH: usize = 3;
    fn collect(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) {
        if ["ae.safetensors", "ae.pt"].iter().any(|name| dir.join(name).exists()) {
            found.push(dir.to_owned());
        } else if depth > 0 {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
            entries.filter(|path| path.is_dir()).for_each(|dir| collect(&dir, depth - 1, found));
        }
    }
    let mut found = Vec::new();
    collect(path, DEPTH, &mut found);
    if found.is_empty() {
        // Returns an error that describes the path.
        weights(path)?;
    }
    found.sort_by_cached_key(|dir| parts(&dir.to_string_lossy()));
    Ok(found)
}

/// Splits a name into a natural sort key: k=8 before k=16. Digits are zero-padded.
fn parts(name: &str) -> Vec<String> {
    let mut parts: Vec<String> = Vec::new();
    for c in name.chars() {
        let goes_on = |part: &&mut String| part.ends_with(|last: char| last.is_ascii_digit() == c.is_ascii_digit());
        match parts.last_mut().filter(goes_on) {
            Some(part) => part.push(c),
            None => parts.push(c.to_string()),
        }
    }
    let padded = |part: String| match part.starts_with(|c: char| c.is_ascii_digit()) {
        true => format!("{part:0>20}"),
        false => part,
    };
    parts.into_iter().map(padded).collect()
}

/// Returns labels for SAEs: their folder names if unique, their paths otherwise.
pub fn labels(dirs: &[PathBuf]) -> Vec<String> {
    let names: Vec<String> = dirs.iter().map(|dir| folder_name(dir)).collect();
    let own: BTreeSet<&String> = names.iter().collect();
    match own.len() == names.len() {
        true => names,
        false => dirs.iter().map(|dir| dir.display().to_string()).collect(),
    }
}

fn folder_name(dir: &Path) -> String {
    let real = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    real.file_name().map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned())
}

fn is_python(weights: &Path) -> bool {
    weights.extension().is_some_and(|extension| extension == "pt")
}

/// Reads the tensors of a weights file; see [`state_dict`] for .pt files.
pub fn tensors_of(weights: &Path) -> Result<(BTreeMap<String, Tensor>, Option<f64>)> {
    if !is_python(weights) {
        return Ok((TensorFile::open(weights)?.tensors()?, None));
    }
    state_dict(&torch_file::read(weights)?, &weights.display().to_string())
}

/// Returns the tensors of a .pt file: its state dict, or the one inside a training backup. A backup also gives the
/// factor that its biases are yet to be scaled by ([`Dictionary::scale_biases`]).
pub fn state_dict(value: &torch_file::Value, name: &str) -> Result<(BTreeMap<String, Tensor>, Option<f64>)> {
    if let Some(inner) = value.get("ae").or_else(|| value.get("state_dict")).and_then(torch_file::Value::state_dict) {
        let scale = value.get("norm_factor").and_then(torch_file::Value::as_f64);
        return Ok((inner, scale.filter(|scale| *scale > 0.0 && scale.is_finite())));
    }
    let tensors = value.state_dict().ok_or_else(|| {
        InputError::new(format!("{name} holds no state dict"))
            .help("it must be a dict of tensors, or a backup with one under `ae`")
    })?;
    Ok((tensors, None))
}

/// Makes an empty dictionary of a class, or of the only other class whose tensor names match: the reference's trainer
/// `StandardTrainerAprilUpdate` calls an AutoEncoderNew an AutoEncoder.
pub fn fitting(class: &str, saved: &SavedTensors) -> Result<Box<dyn Dictionary>> {
    let fits = |dictionary: &dyn Dictionary| {
        let own: BTreeSet<&str> = dictionary.state_dict().into_iter().map(|(name, _)| name).collect();
        own == saved.tensors.keys().map(String::as_str).collect()
    };
    let named = shaped(class, saved);
    if named.as_ref().is_ok_and(|named| fits(&**named)) || saved.tensors.is_empty() {
        return named;
    }
    let classes = inventory::iter::<SavedClass>.into_iter().filter(|other| other.class != class);
    let mut others: Vec<_> =
        classes.filter_map(|other| (other.shaped)(saved).ok()).filter(|dictionary| fits(&**dictionary)).collect();
    match others.len() {
        1 if inventory::iter::<SavedClass>.into_iter().any(|known| known.class == class) => {
            let other = others.remove(0);
            tracing::warn!("the config names the class {class}, but the tensors are those of {}", other.class());
            Ok(other)
        }
        _ => named,
    }
}

/// Makes an empty dictionary of a class with the shapes of the tensors.
pub fn shaped(class: &str, saved: &SavedTensors) -> Result<Box<dyn Dictionary>> {
    let found = inventory::iter::<SavedClass>.into_iter().find(|known| known.class == class);
    let Some(found) = found else {
        let mut known: Vec<&str> = inventory::iter::<SavedClass>.into_iter().map(|saved| saved.class).collect();
        known.sort_unstable();
        let near = nearest(class, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
        bail!(InputError::new(format!("unknown dictionary class `{class}`")).help(format!(
            "{}known: {}",
            near.unwrap_or_default(),
            known.join(", ")
        )));
    };
    (found.shaped)(saved)
}

/// Returns a copy with scaled biases that shares no memory, for saving and evaluation. `scale` is the norm that
/// training activations were divided by. Products use float32 whatever the precision of training. The original is
/// unchanged, so that saving does not affect training.
pub fn folded(dictionary: &dyn Dictionary, scale: f64) -> Result<Box<dyn Dictionary>> {
    let state = dictionary.state_dict();
    let device = state.first().map_or(Device::Cpu, |(_, tensor)| tensor.device());
    let tensors: BTreeMap<String, Tensor> =
        state.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.detach())).collect();
    let trainer = serde_json::json!({"activation_dim": dictionary.dims().input});
    let saved = SavedTensors { tensors: &tensors, trainer: &trainer, device, precision: Precision::Float32 };
    let mut copy = shaped(dictionary.class(), &saved)?;
    copy.load(&tensors, Path::new("the dictionary"))?;
    if scale != 1.0 {
        copy.scale_biases(scale);
    }
    Ok(copy)
}

/// Loads initial weights from an SAE's folder or a weights file. Returns that SAE's input normalisation.
pub fn load_weights(dictionary: &mut dyn Dictionary, path: &Path) -> Result<Option<Normalization>> {
    let file = if path.is_dir() { weights(path)? } else { path.to_owned() };
    if !file.exists() {
        bail!(InputError::no_file(&file));
    }
    let (mut tensors, scale) = tensors_of(&file)?;
    // Weights alone suffice: a missing `k` or `threshold` comes from the config.
    for (name, own) in dictionary.buffers() {
        tensors.entry(name.to_owned()).or_insert(own);
    }
    dictionary.load(&tensors, &file)?;
    if let Some(scale) = scale {
        dictionary.scale_biases(scale);
    }
    if is_python(&file) {
        dictionary.pretrained();
    }
    let config = file.with_file_name("config.json");
    match file.file_stem().is_some_and(|stem| stem == "ae") && config.is_file() {
        true => normalization(&files::read_json(&config)?, &config),
        false => Ok(None),
    }
}

/// Returns the input normalisation that a config.json states.
pub fn normalization(config: &Value, path: &Path) -> Result<Option<Normalization>> {
    match config.pointer("/trainer/normalization") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => Normalization::deserialize(value)
            .map(Some)
            .map_err(|error| InputError::new(format!("{}: `trainer.normalization`: {error}", path.display())).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_naturally() {
        let mut names = ["k=16", "k=4", "k=4-lr=0.1", "a", "k=8"];
        names.sort_by_cached_key(|name| parts(name));
        assert_eq!(names, ["a", "k=4", "k=4-lr=0.1", "k=8", "k=16"]);
    }

    #[test]
    fn saes_are_found_at_every_level_of_a_folder_of_runs() {
        let dir = tempfile::tempdir().unwrap();
        for sae in ["runs/a/x", "runs/b/k=16", "runs/b/k=8", "y", "y/inside", "runs/b/checkpoints", "1/2/3/too_deep"] {
            fs::create_dir_all(dir.path().join(sae)).unwrap();
            if !sae.ends_with("checkpoints") {
                fs::write(dir.path().join(sae).join("ae.pt"), "").unwrap();
            }
        }
        let found = folders(dir.path()).unwrap();
        let found: Vec<_> = found.iter().map(|sae| sae.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(found, ["runs/a/x", "runs/b/k=8", "runs/b/k=16", "y"]);
        assert!(folders(&dir.path().join("runs/b/checkpoints")).is_err());
    }
}
