//! Imports published SAEs and exports ours.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use tch::Device;

use super::format::{TaggedFormat, named};
use super::place::{Place, Request};
use super::published::Published;
use super::site::WrittenSource;
use crate::error::{InputError, printable};
use crate::files::tensors::{self, write_file};
use crate::machine::device::Precision;
use crate::registry::{self, ComponentKind};
use crate::sae::saved::{self, Saved};
use crate::sae::{Dictionary, SavedTensors};

/// Imports the SAEs that a request names, each into a folder written atomically. Returns the folders' paths.
///
/// One SAE becomes the folder `out`; several become folders in it, by name. Without `out` they go to `saes/<name>`.
pub fn import(format_name: &str, request: &Request, out: Option<&Path>) -> Result<Vec<PathBuf>> {
    let format = named(format_name)?;
    let asked = request.place.as_deref().and_then(|place| Place::parse(place).ok());
    let places = format.find(request).map_err(|error| match &asked {
        Some(place) => with_other_format(error, &*format, place),
        None => error,
    })?;
    let mut written = Vec::new();
    for place in &places {
        let dir = match out {
            Some(out) if places.len() == 1 => out.to_owned(),
            Some(out) => out.join(folder(&place.name)),
            None => Path::new("saes").join(folder(&place.name)),
        };
        let cannot = || format!("cannot import {place}");
        // With `out`, check before hours of downloading. Without it, read first: if the place is not an SAE but holds
        // some, its folder may exist because they were imported, and the error should be about the place.
        if out.is_some() {
            refuse_other(&dir)?;
        }
        let published = read(&*format, place)?;
        if out.is_none() {
            refuse_other(&dir)?;
        }
        for note in &published.notes {
            tracing::warn!("{}", printable(&format!("{place}: {note}")));
        }
        let origin = origin(format_name, place);
        whole_folder(&dir, |dir| write(dir, &published, &origin).with_context(cannot))?;
        written.push(dir);
    }
    Ok(written)
}

/// Converts a name to a relative path that cannot leave its parent folder.
fn folder(name: &str) -> PathBuf {
    let part = |part: &str| -> String {
        part.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.=".contains(c) { c } else { '_' }).collect()
    };
    name.split(['/', ':']).filter(|part| !["", ".", ".."].contains(part)).map(part).collect()
}

/// Fails if `dir` exists, unless it is an empty folder.
fn refuse_other(dir: &Path) -> Result<()> {
    if dir.is_symlink() && !dir.exists() {
        bail!(
            InputError::new(format!("{} is a dangling symlink", dir.display()))
                .help("give another folder with `--out`")
        );
    }
    if dir.is_file() {
        bail!(InputError::new(format!("{} is a file", dir.display())).help("give another folder with `--out`"));
    }
    let empty = match fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    };
    if !empty {
        bail!(
            InputError::new(format!("{} already exists", dir.display()))
                .help("give another folder with `--out`, or remove it first")
        );
    }
    Ok(())
}

/// Creates a folder atomically: fills a temporary folder next to it, then renames that.
pub fn whole_folder(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    // Replace the target of a symlink, not the symlink.
    let dir = fs::canonicalize(dir).or_else(|_| std::path::absolute(dir))?;
    let above = dir.parent().unwrap_or(Path::new("/"));
    let cannot = || format!("cannot write {}", dir.display());
    fs::create_dir_all(above).with_context(cannot)?;
    let beside = tempfile::Builder::new().prefix(".partial-").tempdir_in(above).with_context(cannot)?;
    fill(beside.path())?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary folders are private; the result should be readable like any other folder.
        fs::set_permissions(beside.path(), fs::Permissions::from_mode(0o755)).with_context(cannot)?;
    }
    // A rename replaces only an empty folder.
    fs::rename(beside.path(), &dir).with_context(cannot)?;
    let _ = beside.keep();
    Ok(())
}

/// Returns the dictionary of a published SAE, and the `trainer` section of its config.json.
pub fn dictionary(published: &Published, origin: &str) -> Result<(Box<dyn Dictionary>, Map<String, Value>)> {
    for (name, tensor) in &published.tensors {
        if tensor.is_floating_point() && tensor.isnan().any().int64_value(&[]) != 0 {
            bail!(
                InputError::new(format!("tensor `{name}` has NaN values"))
                    .help("the file is damaged, or was saved after training failed")
            );
        }
    }
    let mut trainer = published.trainer.clone();
    trainer.insert("dict_class".to_owned(), published.class.as_str().into());
    let settings = Value::Object(trainer.clone());
    let (device, precision) = (Device::Cpu, Precision::Float32);
    let saved = SavedTensors { tensors: &published.tensors, trainer: &settings, device, precision };
    let mut dictionary = saved::fitting(&published.class, &saved)?;
    dictionary.load(&published.tensors, Path::new(origin))?;
    trainer.insert("dict_class".to_owned(), dictionary.class().into());
    if let Some(scale) = published.scale {
        dictionary.scale_biases(scale);
    }
    if published.pretrained {
        dictionary.pretrained();
    }
    let dims = dictionary.dims();
    let mut add = |name: &str, value: Value| {
        trainer.entry(name).or_insert(value);
    };
    add("activation_dim", dims.input.into());
    add("dict_size", dims.features.into());
    if dims.output != dims.input {
        add("output_dim", dims.output.into());
    }
    if let Some(selection) = dictionary.selection() {
        add("k", selection.k().into());
    }
    if let Some(normalization) = published.normalization {
        add("normalization", serde_json::to_value(normalization)?);
    }
    if let Some(dtype) = published.dtype {
        add("dtype", dtype.into());
    }
    if let Some(site) = &published.site {
        add("lm_name", site.model.as_str().into());
        add("submodule_name", site.submodule.as_str().into());
        add("layer", site.layer().into());
    }
    Ok((dictionary, trainer))
}

/// Loads a published SAE from its folder, the Hub's cache or the Hub, without writing an SAE folder.
///
/// `place` has the form that `dictlearn import` takes: a folder, `owner/name/path`, or for `sae_lens` also
/// `release:sae_id`.
pub fn load(format_name: &str, place: &str, device: Device) -> Result<Saved> {
    let format = named(format_name)?;
    let places = format.find(&Request { place: Some(place.to_owned()), ..Request::default() })?;
    let [place] = &places[..] else {
        let names: Vec<&str> = places.iter().map(|place| place.name.as_str()).collect();
        bail!(
            InputError::new(format!("`{place}` names {} SAEs", places.len()))
                .help(format!("name one of them: {}", names.join(", ")))
        );
    };
    let published = read(&*format, place)?;
    let (read, config) = read_with_config(&published, &origin(format_name, place))?;
    let tensors = read.state_dict().into_iter().map(|(name, tensor)| (name.to_owned(), tensor.detach())).collect();
    let (trainer, precision) = (&config["trainer"], Precision::Float32);
    let mut moved = saved::shaped(read.class(), &SavedTensors { tensors: &tensors, trainer, device, precision })?;
    moved.load(&tensors, Path::new(&place.to_string()))?;
    Ok(Saved {
        dir: PathBuf::from(&place.name),
        dictionary: saved::adapted(moved, published.normalization, published.dtype),
        normalization: published.normalization,
        config,
    })
}

/// Returns the origin of an SAE, for its config.json.
fn origin(format_name: &str, place: &Place) -> Value {
    json!({"format": place.format.as_deref().unwrap_or(format_name), "from": place.to_string(), "name": place.name})
}

/// Returns the dictionary of a published SAE, with its config.json.
fn read_with_config(published: &Published, origin: &Value) -> Result<(Box<dyn Dictionary>, Value)> {
    let (dictionary, trainer) = dictionary(published, origin["from"].as_str().unwrap_or_default())?;
    let mut config = json!({"trainer": trainer});
    if let Some(site) = &published.site {
        config["buffer"] = site.buffer();
    }
    config["imported"] = origin.clone();
    Ok((dictionary, config))
}

fn read(format: &dyn TaggedFormat, place: &Place) -> Result<Published> {
    let read = match &place.format {
        Some(other) => named(other)?.read(place),
        None => format.read(place),
    };
    let read = read.map_err(|error| with_other_format(error, format, place));
    read.with_context(|| format!("cannot import {place}"))
}

/// Adds a hint to an error if the files belong to another format than the requested one.
fn with_other_format(error: anyhow::Error, asked: &dyn TaggedFormat, place: &Place) -> anyhow::Error {
    let input = match InputError::take(error) {
        Ok(input) => input,
        Err(other) => return other,
    };
    let files = place.files().unwrap_or_default();
    let has = |format: &dyn TaggedFormat| format.marks().iter().any(|mark| files.iter().any(|file| file == mark));
    if has(asked) {
        return input.into();
    }
    let other =
        registry::names(ComponentKind::Format).into_iter().find(|name| named(name).is_ok_and(|format| has(&*format)));
    match other {
        Some(other) => {
            input.and_help(&format!("the files are in the format `{other}`: use `dictlearn import {other} ...`")).into()
        }
        None => input.into(),
    }
}

/// Writes an imported SAE's folder: weights, config.json, and a config.yaml with its site.
fn write(dir: &Path, published: &Published, origin: &Value) -> Result<()> {
    let (dictionary, config) = read_with_config(published, origin)?;
    saved::write(dir, &*dictionary, &config)?;
    if let Some(sparsity) = &published.sparsity {
        tensors::write(&dir.join("sparsity.safetensors"), &[("sparsity", sparsity.shallow_clone())])?;
    }
    let source = inventory::iter::<WrittenSource>.into_iter().next();
    if let (Some(site), Some(source)) = (&published.site, source) {
        let yaml = serde_yaml::to_string(&json!({"source": (source.config)(site, site.text())}))?;
        let yaml = format!("# The site of this SAE, for `dictlearn eval` and `dictlearn encode --text`.\n{yaml}");
        write_file(&dir.join("config.yaml"), yaml.as_bytes())?;
    }
    Ok(())
}

/// Exports an SAE to a folder atomically.
pub fn export(sae: &Saved, format_name: &str, out: &Path) -> Result<()> {
    let format = named(format_name)?;
    refuse_other(out)?;
    whole_folder(out, |dir| format.write(sae, dir))
}
