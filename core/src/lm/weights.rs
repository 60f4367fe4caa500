//! Weights of a model.

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

/// Device and precision to load a model with.
#[derive(Debug, Clone, Copy)]
pub struct ModelCx {
    /// Device of the weights.
    pub device: Device,
    /// Precision of matrix products.
    pub precision: Precision,
}

/// Weights of a model by Hugging Face name, in one or several mapped files. A tensor is read on request.
pub struct Weights {
    name: String,
    files: Vec<WeightFile>,
    place: BTreeMap<String, Place>,
    device: Device,
    /// True if there are no files and tensors are drawn at random on request.
    drawn: bool,
}

/// Location of a tensor.
#[derive(Clone)]
struct Place {
    /// Index of the file that holds the tensor.
    file: usize,
    /// Name in the file.
    name: String,
}

/// File names of published weights, preferred first; each is one file or the prefix of a shard index.
const PUBLISHED: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];

/// Suffixes of buffers (masks, rotary frequencies) that older transformers releases saved among the weights.
const NO_WEIGHTS: [&str; 4] = ["attn.bias", "attention.bias", ".masked_bias", "rotary_emb.inv_freq"];

/// Modules that PyTorch wraps around others and that appear in the names of weights: torch.compile,
/// FullyShardedDataParallel, activation checkpointing.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// Removes wrapper modules from a name. DataParallel's wrapper, `module`, is always the outermost.
fn unwrapped(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    let outer = parts.iter().take_while(|part| **part == "module").count();
    parts[outer..].join(".")
}

impl Weights {
    /// Creates random weights, which have any name and shape.
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
                        .help("its `weight_map` must name the file of each tensor; download it again")
                );
            }
            for shard in shards {
                let Some(file) = files.weights(shard)? else {
                    bail!(
                        InputError::new(format!("the model {} has no {shard}, which {index} names", files.name()))
                            .help("the model is incomplete: download the missing file")
                    );
                };
                weights.add(file)?;
            }
            return Ok(weights);
        }
        bail!(
            InputError::new(format!("the model {} has no weights", files.name())).help(format!(
                "weights are read from {}, or from the shards in their .index.json",
                PUBLISHED.join(" or ")
            ))
        )
    }

    fn add(&mut self, file: WeightFile) -> Result<()> {
        for name in file.names() {
            let place = Place { file: self.files.len(), name: name.clone() };
            let other = self.place.insert(unwrapped(&name), place);
            if let Some(other) = other.filter(|other| other.name != name) {
                bail!(
                    InputError::new(format!(
                        "the model {} has a tensor under two names: `{}` and `{name}`",
                        self.name, other.name
                    ))
                    .help("remove one of them: wrappers (`module.`, `_orig_mod.`) are not part of a tensor's name")
                );
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// Returns the location of a tensor, also without the first part of its name: published GPT-2 files omit the prefix
    /// of the Python class.
    fn place(&self, name: &str) -> Option<&Place> {
        let bare = name.split_once('.').map(|(_, rest)| rest);
        std::iter::once(name).chain(bare).find_map(|name| self.place.get(name))
    }

    /// Returns a tensor's file and its name in that file.
    fn find(&self, name: &str) -> Option<(&WeightFile, &str)> {
        self.place(name).map(|place| (&self.files[place.file], place.name.as_str()))
    }

    /// Returns true if there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.drawn || self.find(name).is_some()
    }

    /// Checks that there is a tensor of this name and shape with a supported dtype.
    pub fn check(&self, name: &str, shape: &[i64]) -> Result<()> {
        if self.drawn {
            return Ok(());
        }
        let Some((file, known)) = self.find(name) else {
            let near = nearest(name, self.place.keys().map(String::as_str));
            let error = InputError::new(format!("the model {} has no tensor `{name}`", self.name));
            bail!(match near {
                Some(near) => error.help(format!("its nearest tensor is `{near}`")),
                None => error.help("do the weights belong to another model?"),
            });
        };
        let found = file.shape(known);
        if found != shape {
            bail!(
                InputError::new(format!(
                    "the model {}: tensor `{name}` has shape {found:?}, but config.json says {shape:?}",
                    self.name
                ))
                .help("config.json and the weights belong to different models")
            );
        }
        let kind = file.kind(known)?;
        if !matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
            bail!(
                InputError::new(format!("the model {}: tensor `{name}` has dtype {kind:?}", self.name))
                    .help("supported dtypes: float32, float16, bfloat16, float64; quantised weights are not supported")
            );
        }
        Ok(())
    }

    /// Returns whether head and embedding share one tensor, given that config.json ties them. The weights decide: two
    /// tensors that differ stay separate, as in transformers 5. If only the head was saved, it serves as the embedding.
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
                    "the model {} has neither `{embedding}` nor `{head}`, which its config.json ties",
                    self.name
                ))
                .help("do the weights belong to another model, or are they incomplete?")
            ),
            (Some(embed), Some(own)) => {
                let tied = self.equal(&embed, &own)?;
                if !tied {
                    tracing::warn!(
                        "the config.json of the model {} says `tie_word_embeddings: true`, but its weights have \
                         a separate `{head}`: using that, as transformers 5 does (4 uses the embedding)",
                        self.name
                    );
                }
                Ok(tied)
            }
        }
    }

    /// Returns true if two tensors are equal.
    fn equal(&self, a: &Place, b: &Place) -> Result<bool> {
        let [(a, a_name), (b, b_name)] = [a, b].map(|place| (&self.files[place.file], &place.name));
        if a.shape(a_name) != b.shape(b_name) {
            return Ok(false);
        }
        let same_kind = a.kind(a_name)? == b.kind(b_name)?;
        let equal = match (a.bytes(a_name), b.bytes(b_name)) {
            // Tied tensors of a .bin share one storage.
            (Some(a), Some(b)) if same_kind => std::ptr::eq(a, b) || a == b,
            _ => a.tensor(a_name)?.to_kind(Kind::Float).equal(&b.tensor(b_name)?.to_kind(Kind::Float)),
        };
        a.forget(a_name);
        b.forget(b_name);
        Ok(equal)
    }

    /// Checks that there are no weights other than `asked` and `tied`.
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
                "the model {} has tensors that its config.json does not describe: `{}`{more}",
                self.name, first.name
            ))
            .help("config.json and the weights belong to different models, or a part of the model is not supported")
        );
    }

    /// Returns the tensor of this name and shape as dtype `kind` on the model's device.
    pub fn get(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
        self.check(name, shape)?;
        if self.drawn {
            return Ok(drawn(name, shape).to_kind(kind).to_device(self.device));
        }
        let Some((file, known)) = self.find(name) else { bail!("the model has no tensor {name}") };
        let tensor = file.tensor(known)?.to_kind(kind).to_device(self.device);
        // The copy makes the file's pages unnecessary.
        file.forget(known);
        Ok(tensor)
    }
}

/// Draws a random tensor, always the same for a name and shape.
fn drawn(name: &str, shape: &[i64]) -> Tensor {
    // libtorch's global generator is shared by all threads, so equal seeds would not give equal numbers.
    let mut rng = rng(0, name);
    let mut number = || (rng.next_u32() as f32 / u32::MAX as f32 - 0.5) * 0.7;
    let numbers: Vec<f32> = (0..shape.iter().product()).map(|_: i64| number()).collect();
    let numbers = Tensor::from_slice(&numbers).reshape(shape);
    // Norms multiply by their weights.
    if shape.len() == 1 { numbers + 1.0 } else { numbers }
}
