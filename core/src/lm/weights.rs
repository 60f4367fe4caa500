//! The weights of a model, and opening a model by its name.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{bail, Context, Result};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::config::refuse_unknown_arithmetic;
use super::ModelFiles;
use crate::config::InputError;
use crate::device::Precision;
use crate::model::LanguageModel;
use crate::registry::nearest;
use crate::tensors::TensorFile;

/// A family of language models: what `model_type` in a config.json names.
pub struct ModelFamily {
    /// The `model_type`.
    pub model_type: &'static str,
    /// Builds a model of the family.
    pub load: fn(&Value, Weights, &ModelCx) -> Result<Box<dyn LanguageModel>>,
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

/// The weights of a model, by Hugging Face's names, in one file or several. Files are mapped: what is not asked for is
/// not read.
pub struct Weights {
    name: String,
    files: Vec<TensorFile>,
    place: BTreeMap<String, usize>,
    device: Device,
}

/// Ends of names that older versions of Hugging Face's library saved beside the weights and that hold none: masks and
/// frequencies.
const NO_WEIGHTS: [&str; 4] = ["attn.bias", "attention.bias", ".masked_bias", "rotary_emb.inv_freq"];

impl Weights {
    fn open(files: &ModelFiles, device: Device) -> Result<Self> {
        let mut weights = Weights { name: files.name().to_owned(), files: Vec::new(), place: BTreeMap::new(), device };
        let shards: BTreeSet<String> = match files.json("model.safetensors.index.json")? {
            Some(index) => {
                let map = index.get("weight_map").and_then(Value::as_object);
                map.into_iter().flat_map(|map| map.values()).filter_map(Value::as_str).map(str::to_owned).collect()
            }
            None => BTreeSet::from(["model.safetensors".to_owned()]),
        };
        for shard in shards {
            let Some(file) = files.tensors(&shard)? else {
                bail!(InputError::new(format!("the model {} has no {shard}", files.name())).help(
                    "weights are read from model.safetensors, or from the shards of model.safetensors.index.json"
                ));
            };
            let index = weights.files.len();
            weights.place.extend(file.names().into_iter().map(|tensor| (tensor, index)));
            weights.files.push(file);
        }
        Ok(weights)
    }

    /// The file that has a tensor, and its name there: published files of GPT-2 leave out the first part of each name,
    /// which is the model's name in its Python class.
    fn find<'a>(&'a self, name: &'a str) -> Option<(&'a TensorFile, &'a str)> {
        let bare = name.split_once('.').map(|(_, rest)| rest);
        let known = std::iter::once(name).chain(bare).find(|name| self.place.contains_key(*name))?;
        Some((&self.files[self.place[known]], known))
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Checks that there is a tensor of that name and shape, and of a type that can be read.
    pub fn check(&self, name: &str, shape: &[i64]) -> Result<()> {
        let Some((file, known)) = self.find(name) else {
            let near = nearest(name, self.place.keys().map(String::as_str));
            let error = InputError::new(format!("the model {} has no tensor `{name}`", self.name));
            bail!(match near {
                Some(near) => error.help(format!("the nearest that it has is `{near}`")),
                None => error.help("are the weights those of another model?"),
            });
        };
        let found = file.shape(known).unwrap_or_default();
        if found != shape {
            bail!(InputError::new(format!(
                "the model {}: tensor `{name}` has shape {found:?}, but config.json says {shape:?}",
                self.name
            ))
            .help("config.json and the weights are not of the same model"));
        }
        let kind = file.kind(known)?;
        if !matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
            bail!(InputError::new(format!("the model {}: tensor `{name}` is of type {kind:?}", self.name))
                .help("weights are read as float32, float16 or bfloat16; quantised ones are not supported"));
        }
        Ok(())
    }

    /// Checks that the file has no weights but those `asked` for; `tied` may be there as well.
    pub fn check_none_left(&self, asked: &[String], tied: Option<&str>) -> Result<()> {
        let asked: BTreeSet<&str> =
            asked.iter().map(String::as_str).chain(tied).filter_map(|name| Some(self.find(name)?.1)).collect();
        let extra = |name: &&str| !asked.contains(name) && !NO_WEIGHTS.iter().any(|end| name.ends_with(end));
        let extra: Vec<&str> = self.place.keys().map(String::as_str).filter(extra).collect();
        let Some(first) = extra.first() else { return Ok(()) };
        let more = if extra.len() > 1 { format!(" and {} more", extra.len() - 1) } else { String::new() };
        bail!(InputError::new(format!(
            "the model {} has tensors that its config.json has no place for: `{first}`{more}",
            self.name
        ))
        .help("config.json and the weights are not of the same model, or it has a part that is not supported"));
    }

    /// The tensor of that name on the model's device; it must have this shape.
    pub fn get(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
        self.check(name, shape)?;
        let Some((file, known)) = self.find(name) else { bail!("the model has no tensor {name}") };
        let tensor = file.tensor(known)?.to_kind(kind).to_device(self.device);
        // What is copied need not stay in memory in the file's type as well.
        file.forget(known);
        Ok(tensor)
    }
}

/// More layers than any model has: what is made for each of them would fill the memory before the first is found missing.
const MOST_LAYERS: u64 = 10_000;

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
    let load = || {
        for name in ["num_hidden_layers", "n_layer", "num_layers"] {
            if let Some(layers) = config.get(name).and_then(Value::as_u64).filter(|layers| *layers > MOST_LAYERS) {
                bail!(InputError::new(format!("config.json: `{name}` is {layers}, which no model has")));
            }
        }
        refuse_unknown_arithmetic(&config, family)?;
        (found.load)(&config, Weights::open(&files, device)?, &cx)
    };
    let model = load().with_context(|| format!("cannot load the model {name}"))?;
    Ok((model, files))
}
