//! Opening a language model by its name: a folder, a model that a plugin ships, or the Hub's cache.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Result};
use serde_json::Value;

use crate::config::InputError;
use crate::registry::nearest;
use crate::tensors::TensorFile;

/// A model that a plugin ships: `model: embedded:NAME`.
pub struct EmbeddedModel {
    /// Its name.
    pub name: &'static str,
    /// Its files in Hugging Face's layout: config.json, model.safetensors, tokenizer.json, ...
    pub files: &'static [(&'static str, &'static [u8])],
}

inventory::collect!(EmbeddedModel);

/// The files of a model.
pub struct ModelFiles {
    name: String,
    place: FilesPlace,
}

enum FilesPlace {
    Dir(PathBuf),
    Embedded(&'static EmbeddedModel),
}

impl ModelFiles {
    /// Finds the files of a model: `embedded:NAME`, a folder, or a repository `owner/name[@revision]` in the Hub's cache.
    pub fn find(name: &str) -> Result<Self> {
        let found = |place| Ok(ModelFiles { name: name.to_owned(), place });
        if let Some(embedded) = name.strip_prefix("embedded:") {
            let models: Vec<_> = inventory::iter::<EmbeddedModel>.into_iter().collect();
            if let Some(model) = models.iter().find(|model| model.name == embedded) {
                return found(FilesPlace::Embedded(model));
            }
            let known: Vec<&str> = models.iter().map(|model| model.name).collect();
            let near = nearest(embedded, known.iter().copied()).map(|near| format!("did you mean `embedded:{near}`? "));
            bail!(InputError::new(format!("there is no bundled model `{embedded}`")).help(format!(
                "{}known: {}",
                near.unwrap_or_default(),
                known.join(", ")
            )));
        }
        let dir = Path::new(name);
        if dir.is_dir() {
            return found(FilesPlace::Dir(dir.to_owned()));
        }
        if dir.exists() {
            bail!(InputError::new(format!("the model {name} is a file"))
                .help("give the folder that holds config.json, model.safetensors and tokenizer.json"));
        }
        if let Some(dir) = in_hub_cache(name) {
            return found(FilesPlace::Dir(dir));
        }
        let cache = hub_cache().map_or_else(|| "the Hub's cache".to_owned(), |dir| dir.display().to_string());
        let embedded = inventory::iter::<EmbeddedModel>.into_iter().next();
        let embedded = embedded.map_or_else(String::new, |model| format!(", or `embedded:{}`", model.name));
        bail!(InputError::new(format!("the model `{name}` is neither a folder nor in {cache}")).help(format!(
            "give a folder in Hugging Face's layout, a repository that the Hub's cache holds{embedded}"
        )));
    }

    /// The name that it was found by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The commit that the files are of, where the Hub's cache holds them.
    pub fn commit(&self) -> Option<String> {
        let FilesPlace::Dir(dir) = &self.place else { return None };
        let snapshot = dir.parent()?.file_name()? == "snapshots";
        snapshot.then(|| dir.file_name()?.to_str().map(str::to_owned)).flatten()
    }

    /// A file's bytes, if the model has it.
    pub fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match &self.place {
            FilesPlace::Embedded(model) => {
                Ok(model.files.iter().find(|(name, _)| *name == file).map(|(_, bytes)| Cow::Borrowed(*bytes)))
            }
            FilesPlace::Dir(dir) => {
                let path = dir.join(file);
                if !path.exists() {
                    return Ok(None);
                }
                let bytes = fs::read(&path)
                    .map_err(|error| InputError::new(format!("cannot read {}: {error}", path.display())))?;
                Ok(Some(Cow::Owned(bytes)))
            }
        }
    }

    /// A JSON file, if the model has it.
    pub fn json(&self, file: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.read(file)? else { return Ok(None) };
        let parsed = serde_json::from_slice(&bytes)
            .map_err(|error| InputError::new(format!("{}/{file} is not JSON: {error}", self.name)))?;
        Ok(Some(parsed))
    }

    pub(super) fn tensors(&self, file: &str) -> Result<Option<TensorFile>> {
        match &self.place {
            FilesPlace::Embedded(model) => {
                let found = model.files.iter().find(|(name, _)| *name == file);
                found.map(|(name, bytes)| TensorFile::from_static(name, bytes)).transpose()
            }
            FilesPlace::Dir(dir) => {
                let path = dir.join(file);
                path.exists().then(|| TensorFile::open(&path)).transpose()
            }
        }
    }
}

/// The folder of the Hub's cache.
fn hub_cache() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

/// The snapshot of `owner/name[@revision]` in the Hub's cache, if it is there.
fn in_hub_cache(name: &str) -> Option<PathBuf> {
    let (repo, revision) = name.split_once('@').unwrap_or((name, "main"));
    let repo = hub_cache()?.join(format!("models--{}", repo.replace('/', "--")));
    let commit = fs::read_to_string(repo.join("refs").join(revision)).unwrap_or_else(|_| revision.to_owned());
    let snapshot = repo.join("snapshots").join(commit.trim());
    snapshot.is_dir().then_some(snapshot)
}
