//! The weights of a model.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use rand::RngCore;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::files::ModelFiles;
use super::weight_file::WeightFile;
use crate::error::InputError;
use crate::machine::device::Precision;
use crate::machine::rng::rng;
use crate::suggest::nearest;

/// What a model is loaded for.
#[derive(Debug, Clone, Copy)]
pub struct ModelCx {
    /// Where its weights live.
    pub device: Device,
    /// The type of its matrix products.
    pub precision: Precision,
}

/// The weights of a model, by Hugging Face's names, in one file or several. Files are mapped: a tensor is read when it is
/// asked for.
pub struct Weights {
    name: String,
    files: Vec<WeightFile>,
    place: BTreeMap<String, Place>,
    device: Device,
    /// True if there are no files, and a tensor is drawn when it is asked for.
    drawn: bool,
}

/// Where a tensor is.
#[derive(Clone)]
struct Place {
    /// The index of its file.
    file: usize,
    /// Its name there.
    name: String,
}

/// The names that weights are published under, the best first: one file, or the index of its shards.
const PUBLISHED: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];

/// Ends of names that older versions of Hugging Face's library saved beside the weights and that hold none: masks and
/// frequencies.
const NO_WEIGHTS: [&str; 4] = ["attn.bias", "attention.bias", ".masked_bias", "rotary_emb.inv_freq"];

/// Modules that PyTorch wraps around others, which then stand in the names of their weights: torch.compile,
/// FullyShardedDataParallel, activation checkpointing.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// A name without the wrappers that a model was saved in. DataParallel's wrapper, `module`, is only ever the outermost.
fn unwrapped(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    let outer = parts.iter().take_while(|part| **part == "module").count();
    parts[outer..].join(".")
}

impl Weights {
    /// Random weights of any name and shape.
    pub(super) fn drawn(name: &str, device: Device) -> Self {
        Weights { name: name.to_owned(), files: Vec::new(), place: BTreeMap::new(), device, drawn: true }
    }

    pub(super) fn open(files: &ModelFiles, device: Device) -> Result<Self> {
        let mut weights = Weights { drawn: false, ..Weights::drawn(files.name(), device) };
        for published in PUBLISHED {
            let index = format!("{published}.index.json");
            let Some(map) = files.json(&index)? else {
                match files.weights(published)? {
                    Some(file) => {
                        weights.add(file)?;
                        return Ok(weights);
                    }
                    None => continue,
                }
            };
            let map = map.get("weight_map").and_then(Value::as_object);
            let shards = map.into_iter().flat_map(|map| map.values()).filter_map(Value::as_str);
            let shards: BTreeSet<&str> = shards.collect();
            if shards.is_empty() {
                bail!(
                    InputError::new(format!("{index} of the model {} names no shards", files.name()))
                        .help("its `weight_map` gives the file of each tensor; fetch it again")
                );
            }
            for shard in shards {
                let Some(file) = files.weights(shard)? else {
                    bail!(
                        InputError::new(format!("the model {} has no {shard}, which {index} names", files.name()))
                            .help("not all of the model was copied: fetch the missing file")
                    );
                };
                weights.add(file)?;
            }
            return Ok(weights);
        }
        bail!(InputError::new(format!("the model {} has no weights", files.name())).help(format!(
            "weights are read from {}, or from the shards that the file's .index.json names",
            PUBLISHED.join(" or ")
        )))
    }

    fn add(&mut self, file: WeightFile) -> Result<()> {
        for name in file.names() {
            let place = Place { file: self.files.len(), name: name.clone() };
            let other = self.place.insert(unwrapped(&name), place);
            if let Some(other) = other.filter(|other| other.name != name) {
                bail!(
                    InputError::new(format!(
                        "the model {} has one tensor under two names: `{}` and `{name}`",
                        self.name, other.name
                    ))
                    .help("remove one of them: a wrapper's name (`module.`, `_orig_mod.`) is not part of a tensor's")
                );
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// Where a tensor is: published files of GPT-2 leave out the first part of each name, which is the model's name in
    /// its Python class.
    fn place(&self, name: &str) -> Option<&Place> {
        let bare = name.split_once('.').map(|(_, rest)| rest);
        std::iter::once(name).chain(bare).find_map(|name| self.place.get(name))
    }

    /// The file that has a tensor, and its name there.
    fn find(&self, name: &str) -> Option<(&WeightFile, &str)> {
        self.place(name).map(|place| (&self.files[place.file], place.name.as_str()))
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.drawn || self.find(name).is_some()
    }

    /// Checks that there is a tensor of that name and shape, and of a type that can be read.
    pub fn check(&self, name: &str, shape: &[i64]) -> Result<()> {
        if self.drawn {
            return Ok(());
        }
        let Some((file, known)) = self.find(name) else {
            let near = nearest(name, self.place.keys().map(String::as_str));
            let error = InputError::new(format!("the model {} has no tensor `{name}`", self.name));
            bail!(match near {
                Some(near) => error.help(format!("the nearest that it has is `{near}`")),
                None => error.help("are the weights those of another model?"),
            });
        };
        let found = file.shape(known);
        if found != shape {
            bail!(
                InputError::new(format!(
                    "the model {}: tensor `{name}` has shape {found:?}, but config.json says {shape:?}",
                    self.name
                ))
                .help("config.json and the weights are not of the same model")
            );
        }
        let kind = file.kind(known)?;
        if !matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
            bail!(
                InputError::new(format!("the model {}: tensor `{name}` is of type {kind:?}", self.name))
                    .help("weights are read as float32, float16 or bfloat16; quantised ones are not supported")
            );
        }
        Ok(())
    }

    /// Whether head and embedding are one tensor, where config.json says that they are. The weights decide: two that
    /// differ stay two, as in transformers 5. Where only the head was saved, it is the embedding as well.
    pub fn tie(&mut self, embedding: &str, head: &str) -> Result<bool> {
        if self.drawn {
            return Ok(true);
        }
        let [embed, own] = [embedding, head].map(|name| self.place(name).cloned());
        match (embed, own) {
            (Some(_), None) => Ok(true),
            (None, Some(own)) => {
                self.place.insert(embedding.to_owned(), own);
                Ok(true)
            }
            (None, None) => bail!(
                InputError::new(format!(
                    "the model {} has neither `{embedding}` nor `{head}`, which by its config.json are one tensor",
                    self.name
                ))
                .help("are the weights those of another model, or only a part of them?")
            ),
            (Some(embed), Some(own)) => {
                let tied = self.equal(&embed, &own)?;
                if !tied {
                    tracing::warn!(
                        "the config.json of the model {} says `tie_word_embeddings: true`, but its weights have \
                         a `{head}` of their own: that is used, as in transformers 5 (4 takes the embedding)",
                        self.name
                    );
                }
                Ok(tied)
            }
        }
    }

    /// Whether two tensors hold the same numbers.
    fn equal(&self, a: &Place, b: &Place) -> Result<bool> {
        let [(a, a_name), (b, b_name)] = [a, b].map(|place| (&self.files[place.file], &place.name));
        if a.shape(a_name) != b.shape(b_name) {
            return Ok(false);
        }
        let same_kind = a.kind(a_name)? == b.kind(b_name)?;
        let equal = match (a.bytes(a_name), b.bytes(b_name)) {
            // A .bin has one storage for both.
            (Some(a), Some(b)) if same_kind => std::ptr::eq(a, b) || a == b,
            _ => a.tensor(a_name)?.to_kind(Kind::Float).equal(&b.tensor(b_name)?.to_kind(Kind::Float)),
        };
        a.forget(a_name);
        b.forget(b_name);
        Ok(equal)
    }

    /// Checks that the file has no weights but those `asked` for; `tied` may be there as well.
    pub fn check_none_left(&self, asked: &[String], tied: Option<&str>) -> Result<()> {
        let asked = asked.iter().map(String::as_str).chain(tied);
        let asked: BTreeSet<&str> = asked.filter_map(|name| Some(self.find(name)?.1)).collect();
        let extra = |place: &&Place| {
            !asked.contains(place.name.as_str()) && !NO_WEIGHTS.iter().any(|end| place.name.ends_with(end))
        };
        let extra: Vec<&Place> = self.place.values().filter(extra).collect();
        let Some(first) = extra.first() else { return Ok(()) };
        let more = if extra.len() > 1 { format!(" and {} more", extra.len() - 1) } else { String::new() };
        bail!(
            InputError::new(format!(
                "the model {} has tensors that its config.json has no place for: `{}`{more}",
                self.name, first.name
            ))
            .help("config.json and the weights are not of the same model, or it has a part that is not supported")
        );
    }

    /// The tensor of that name on the model's device; it must have this shape.
    pub fn get(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
        self.check(name, shape)?;
        if self.drawn {
            return Ok(drawn(name, shape).to_kind(kind).to_device(self.device));
        }
        let Some((file, known)) = self.find(name) else { bail!("the model has no tensor {name}") };
        let tensor = file.tensor(known)?.to_kind(kind).to_device(self.device);
        // What is copied need not stay in memory in the file's type as well.
        file.forget(known);
        Ok(tensor)
    }
}

/// A tensor of a model with random weights: always the same for a name and a shape.
fn drawn(name: &str, shape: &[i64]) -> Tensor {
    // libtorch's global generator is shared by all threads, so equal seeds would not give equal numbers.
    let mut rng = rng(0, name);
    let mut number = || (rng.next_u32() as f32 / u32::MAX as f32 - 0.5) * 0.7;
    let numbers: Vec<f32> = (0..shape.iter().product()).map(|_: i64| number()).collect();
    let numbers = Tensor::from_slice(&numbers).reshape(shape);
    // Norms multiply by their weights.
    if shape.len() == 1 { numbers + 1.0 } else { numbers }
}
