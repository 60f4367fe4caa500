//! Files of a language model: a folder, an embedded model, or a repository of the Hub.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::Value;

use super::weight_file::WeightFile;
use crate::error::InputError;
use crate::files;
use crate::files::tensors::TensorFile;
use crate::files::torch_file::StateDictFile;
use crate::hub::{Repo, RepoKind, hub};
use crate::suggest::nearest;

/// A model embedded in a plugin: `model: embedded:NAME`.
pub struct EmbeddedModel {
    /// Name.
    pub name: &'static str,
    /// Files in Hugging Face's layout: config.json, model.safetensors, tokenizer.json, ...
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
    Hub(Repo),
}

impl ModelFiles {
    /// Finds the files of a model: `embedded:NAME`, a folder, or a Hub repository `owner/name[@revision]`.
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
            bail!(
                InputError::new(format!("the model {name} is a file"))
                    .help("give the folder that holds config.json, model.safetensors and tokenizer.json")
            );
        }
        let Some(repo) = Repo::parse(RepoKind::Model, name) else {
            let embedded = inventory::iter::<EmbeddedModel>.into_iter().next();
            let embedded = embedded.map_or_else(String::new, |model| format!(", or `embedded:{}`", model.name));
            bail!(
                InputError::new(format!("the model `{name}` is neither a folder nor a repository name"))
                    .help(format!("give a folder in Hugging Face's layout, a Hub repository{embedded}"))
            );
        };
        // Fails early if there is no such repository.
        hub()?.commit(&repo)?;
        found(FilesPlace::Hub(repo))
    }

    /// Returns the name passed to [`ModelFiles::find`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the commit of files from the Hub; `None` for others.
    pub fn commit(&self) -> Option<String> {
        match &self.place {
            FilesPlace::Hub(repo) => hub().and_then(|hub| hub.commit(repo)).ok(),
            _ => None,
        }
    }

    /// Returns the local path of a file, downloading it if need be; `None` if the model does not have it.
    fn path(&self, file: &str) -> Result<Option<PathBuf>> {
        Ok(match &self.place {
            FilesPlace::Embedded(_) => None,
            FilesPlace::Dir(dir) => Some(dir.join(file)).filter(|path| path.exists()),
            FilesPlace::Hub(repo) => hub()?.file(repo, file)?,
        })
    }

    fn embedded(&self, file: &str) -> Option<(&'static str, &'static [u8])> {
        let FilesPlace::Embedded(model) = &self.place else { return None };
        model.files.iter().find(|(name, _)| *name == file).copied()
    }

    /// Returns a file's bytes; `None` if the model does not have it.
    pub fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>> {
        if let Some((_, bytes)) = self.embedded(file) {
            return Ok(Some(Cow::Borrowed(bytes)));
        }
        let Some(path) = self.path(file)? else { return Ok(None) };
        Ok(Some(Cow::Owned(files::read(&path)?)))
    }

    /// Returns a parsed JSON file; `None` if the model does not have it.
    pub fn json(&self, file: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.read(file)? else { return Ok(None) };
        let parsed = files::parse_json(&bytes)
            .map_err(|error| InputError::new(format!("{}/{file} is not JSON: {error}", self.name)))?;
        Ok(Some(parsed))
    }

    /// Opens a file of weights; `None` if the model does not have it.
    pub(super) fn weights(&self, file: &str) -> Result<Option<WeightFile>> {
        if let Some((name, bytes)) = self.embedded(file) {
            return Ok(Some(WeightFile::Safetensors(TensorFile::from_static(name, bytes)?)));
        }
        let Some(path) = self.path(file)? else { return Ok(None) };
        Ok(Some(match file.ends_with(".safetensors") {
            true => WeightFile::Safetensors(TensorFile::open(&path)?),
            false => WeightFile::Torch(StateDictFile::open(&path)?),
        }))
    }
}
