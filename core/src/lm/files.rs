//! Opening a language model by its name: a folder, a model that a plugin ships, or the Hub's cache.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::config::InputError;
use crate::device::Precision;
use crate::model::LanguageModel;
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

/// A family of language models: what `model_type` in a config.json names.
pub struct ModelFamily {
    /// The `model_type`.
    pub model_type: &'static str,
    /// Builds a model of the family.
    pub load: fn(&Value, &Weights, &ModelCx) -> Result<Box<dyn LanguageModel>>,
}

inventory::collect!(ModelFamily);

/// What a model is loaded for.
#[derive(Debug, Clone, Copy)]
pub struct ModelCx {
    /// Where its weights live.
    pub device: Device,
    /// The type of its matrix products.
    pub precision: Precision,
}

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

    fn tensors(&self, file: &str) -> Result<Option<TensorFile>> {
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

/// The weights of a model, by Hugging Face's names, in one file or several.
pub struct Weights {
    name: String,
    files: Vec<TensorFile>,
    place: BTreeMap<String, usize>,
    cx: ModelCx,
}

impl Weights {
    fn open(files: &ModelFiles, cx: ModelCx) -> Result<Self> {
        let mut weights = Weights { name: files.name.clone(), files: Vec::new(), place: BTreeMap::new(), cx };
        let shards: Vec<String> = match files.json("model.safetensors.index.json")? {
            Some(index) => {
                let map = index.get("weight_map").and_then(Value::as_object);
                let shards = map.into_iter().flat_map(|map| map.values()).filter_map(Value::as_str);
                let mut shards: Vec<String> = shards.map(str::to_owned).collect();
                shards.sort();
                shards.dedup();
                shards
            }
            None => vec!["model.safetensors".to_owned()],
        };
        for shard in shards {
            let Some(file) = files.tensors(&shard)? else {
                bail!(InputError::new(format!("the model {} has no {shard}", files.name)).help(
                    "weights are read from model.safetensors, or from the shards of model.safetensors.index.json"
                ));
            };
            let index = weights.files.len();
            weights.place.extend(file.names().into_iter().map(|tensor| (tensor, index)));
            weights.files.push(file);
        }
        Ok(weights)
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    /// The tensor of that name, as float32 on the model's device; it must have this shape.
    pub fn get(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let Some(index) = self.place.get(name) else {
            let near = nearest(name, self.place.keys().map(String::as_str));
            let error = InputError::new(format!("the model {} has no tensor `{name}`", self.name));
            bail!(match near {
                Some(near) => error.help(format!("the nearest that it has is `{near}`")),
                None => error.help("are the weights those of another model?"),
            });
        };
        let found = self.files[*index].shape(name).unwrap_or_default();
        if found != shape {
            bail!(InputError::new(format!(
                "the model {}: tensor `{name}` has shape {found:?}, but config.json says {shape:?}",
                self.name
            ))
            .help("config.json and the weights are not of the same model"));
        }
        Ok(self.files[*index].tensor(name)?.to_kind(Kind::Float).to_device(self.cx.device))
    }
}

/// Opens a model by its name, with its files (the tokenizer is one of them).
pub fn open_model(name: &str, device: Device, precision: Precision) -> Result<(Box<dyn LanguageModel>, ModelFiles)> {
    let cx = ModelCx { device, precision };
    let files = ModelFiles::find(name)?;
    let Some(config) = files.json("config.json")? else {
        bail!(InputError::new(format!("the model {name} has no config.json"))
            .help("give a folder in Hugging Face's layout: config.json, model.safetensors, tokenizer.json"));
    };
    let Some(family) = config.get("model_type").and_then(Value::as_str) else {
        bail!(InputError::new(format!("the config.json of the model {name} names no `model_type`"))
            .help("is it the config of a Hugging Face model?"));
    };
    let mut known: Vec<&str> = inventory::iter::<ModelFamily>.into_iter().map(|family| family.model_type).collect();
    known.sort_unstable();
    let Some(found) = inventory::iter::<ModelFamily>.into_iter().find(|known| known.model_type == family) else {
        bail!(InputError::new(format!("the model {name} is of the family `{family}`, which is not supported"))
            .help(format!("supported are: {} (`dictlearn list models`)", known.join(", "))));
    };
    let weights = Weights::open(&files, cx)?;
    let model = (found.load)(&config, &weights, &cx).with_context(|| format!("cannot load the model {name}"))?;
    Ok((model, files))
}
