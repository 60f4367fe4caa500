//! Weights of a model.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use rand::RngCore;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::files::ModelFiles;
use super::mxfp4;
use super::weight_file::WeightFile;
use crate::error::InputError;
use crate::files::tensors;
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
    /// Path of the text model in the model that wraps it: `model.language_model`. `None` for a text model by itself.
    pub text_root: Option<&'static str>,
}

impl ModelCx {
    /// Returns the settings for a text model by itself.
    pub fn new(device: Device, precision: Precision) -> Self {
        ModelCx { device, precision, text_root: None }
    }
}

/// A tensor that a part of a model needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// Its Hugging Face name.
    pub name: &'a str,
    /// Its shape in the file.
    pub shape: &'a [i64],
    /// Dtype to convert it to.
    pub kind: Kind,
    /// Index into the first dimension, to read only that part of it.
    pub part: Option<i64>,
}

impl Wanted<'_> {
    /// Returns the shape of what is wanted.
    pub fn size(&self) -> &[i64] {
        if self.part.is_some() { &self.shape[1..] } else { self.shape }
    }
}

/// Weights of a model by Hugging Face name, in one or several mapped files. A tensor is read on request.
pub struct Weights {
    name: String,
    files: Vec<WeightFile>,
    place: BTreeMap<String, Place>,
    device: Device,
    /// True if there are no files and tensors are drawn at random on request.
    drawn: bool,
    /// Path of the text model in the model that wraps it.
    text_root: Option<&'static str>,
    /// Modules of the wrapper that the text model does not use.
    towers: &'static [&'static str],
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

/// Prefixes of layers that predict further tokens ahead, for faster generation; the model itself does not use them.
const AHEAD: &str = "mtp.";

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

/// Paths at which files have the text model of a wrapper.
const TEXT_ROOTS: [&str; 6] = [
    "language_model.model",
    "model.language_model",
    "model.language_model.model",
    "model.text_model",
    "text_model.model",
    "model",
];

/// Paths at which files have the head of a wrapper.
const HEAD_ROOTS: [&str; 3] = ["language_model", "model.language_model", "text_model"];

impl Weights {
    /// Creates random weights, which have any name and shape.
    pub(super) fn drawn(name: &str, device: Device) -> Self {
        let (files, place) = (Vec::new(), BTreeMap::new());
        Weights { name: name.to_owned(), files, place, device, drawn: true, text_root: None, towers: &[] }
    }

    /// Returns the same weights, of which only the text model at `root` is used. Tensors of the wrapper's modules
    /// `towers` are ignored.
    pub(super) fn of_text(self, root: &'static str, towers: &'static [&'static str]) -> Self {
        Weights { text_root: Some(root), towers, ..self }
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

    /// Returns the location of a tensor. Published files omit the prefix of the Python class (GPT-2, BLOOM), and name the
    /// text model of a wrapper in several ways.
    fn place(&self, name: &str) -> Option<&Place> {
        let bare = name.split_once('.').map(|(_, rest)| rest);
        if let Some(found) = std::iter::once(name).chain(bare).find_map(|name| self.place.get(name)) {
            return Some(found);
        }
        let root = self.text_root.unwrap_or("model");
        let inner = name.strip_prefix(root).and_then(|rest| rest.strip_prefix('.'));
        let known: &[&str] = if inner.is_some() { &TEXT_ROOTS } else { &HEAD_ROOTS };
        let found = known.iter().find_map(|outer| self.place.get(&format!("{outer}.{}", inner.unwrap_or(name))));
        // transformers 4 renames every `model` in a name when it saves the text model of Gemma 3n alone.
        found.or_else(|| self.place.get(&name.replace("model", "model.language_model")))
    }

    /// Returns a tensor's file and its name in that file.
    fn find(&self, name: &str) -> Option<(&WeightFile, &str)> {
        self.place(name).map(|place| (&self.files[place.file], place.name.as_str()))
    }

    /// Returns true if there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.drawn || self.find(name).is_some()
    }

    /// Returns true if a file has a tensor of this name; random weights are in no file.
    pub(super) fn in_file(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Checks that the weights of a wrapper have a text model.
    pub(super) fn check_has_text(&self, embedding: &str, head: &str) -> Result<()> {
        if self.text_root.is_none() || self.has(embedding) || self.has(head) {
            return Ok(());
        }
        let others: Vec<&str> = self.towers.iter().copied().filter(|tower| self.any_under(tower)).collect();
        let found = match others.is_empty() {
            true => String::new(),
            false => format!("; it has: {}", others.join(", ")),
        };
        bail!(
            InputError::new(format!(
                "the model {} has no text model: there is neither `{embedding}` nor `{head}`{found}",
                self.name
            ))
            .help("are these the weights of the vision or audio model alone?")
        )
    }

    /// Returns true if there are tensors under this module of the wrapper.
    fn any_under(&self, tower: &str) -> bool {
        self.place.keys().any(|name| is_under(name, tower))
    }

    /// Checks that there is a tensor of this name and shape with a supported dtype.
    pub(super) fn check(&self, name: &str, shape: &[i64]) -> Result<()> {
        if self.drawn {
            return Ok(());
        }
        let Some((file, known)) = self.find(name) else {
            if let Some(packed) = self.packed(name) {
                return self.check_packed(name, &packed, shape);
            }
            let near = nearest(name, self.place.keys().map(String::as_str));
            let error = InputError::new(format!("the model {} has no tensor `{name}`", self.name));
            bail!(match near {
                Some(near) => error.help(format!("its nearest tensor is `{near}`")),
                None => error.help("do the weights belong to another model?"),
            });
        };
        self.check_shape(name, file.shape(known), shape)?;
        let kind = file.kind(known)?;
        if !matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
            bail!(InputError::new(format!("the model {}: tensor `{name}` has dtype {kind:?}", self.name)).help(
                "supported dtypes: float32, float16, bfloat16, float64, and MXFP4 as gpt-oss has it; other \
                     quantised weights are not supported"
            ));
        }
        Ok(())
    }

    fn check_shape(&self, name: &str, found: Vec<i64>, expected: &[i64]) -> Result<()> {
        if found != expected {
            bail!(
                InputError::new(format!(
                    "the model {}: tensor `{name}` has shape {found:?}, but config.json says {expected:?}",
                    self.name
                ))
                .help("config.json and the weights belong to different models")
            );
        }
        Ok(())
    }

    /// Returns the names of the codes and scales of a tensor in MXFP4, if the files have it in this form.
    fn packed(&self, name: &str) -> Option<[String; 2]> {
        let parts = ["blocks", "scales"].map(|part| format!("{name}_{part}"));
        parts.iter().any(|part| self.find(part).is_some()).then_some(parts)
    }

    fn check_packed(&self, name: &str, parts: &[String; 2], shape: &[i64]) -> Result<()> {
        let Some((codes, scales)) = mxfp4::shapes(shape) else {
            bail!(InputError::new(format!(
                "the model {}: `{name}` is in MXFP4, but config.json says {shape:?}, which are no blocks of {}",
                self.name,
                mxfp4::BLOCK
            )));
        };
        for (part, shape) in parts.iter().zip([codes, scales]) {
            let Some((file, known)) = self.find(part) else {
                bail!(
                    InputError::new(format!("the model {} has no tensor `{part}`", self.name))
                        .help("a weight in MXFP4 has `_blocks` and `_scales`; is the download complete?")
                );
            };
            self.check_shape(part, file.shape(known), &shape)?;
            if file.kind(known)? != Kind::Uint8 {
                bail!(InputError::new(format!("the model {}: tensor `{part}` is not of bytes", self.name)));
            }
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
        let packed: Vec<String> = asked
            .clone()
            .filter(|name| self.find(name).is_none())
            .filter_map(|name| self.packed(name))
            .flatten()
            .collect();
        let asked = asked.chain(packed.iter().map(String::as_str));
        let asked: BTreeSet<&str> = asked.filter_map(|name| Some(self.find(name)?.1)).collect();
        let unused = |name: &str| {
            name.starts_with(AHEAD)
                || NO_WEIGHTS.iter().any(|end| name.ends_with(end))
                || self.towers.iter().any(|tower| is_under(name, tower))
        };
        let extra = |place: &&Place| !asked.contains(place.name.as_str()) && !unused(&unwrapped(&place.name));
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

    /// Returns a wanted tensor on the model's device.
    pub(super) fn get(&self, wanted: Wanted) -> Result<Tensor> {
        let Wanted { name, shape, kind, part } = wanted;
        self.check(name, shape)?;
        if self.drawn {
            let tensor = drawn(name, shape).to_kind(kind).to_device(self.device);
            return Ok(part.map_or_else(|| tensor.shallow_clone(), |index| tensor.get(index)));
        }
        if let Some((file, known)) = self.find(name) {
            let tensor = match part {
                Some(index) => file.part(known, index)?,
                None => file.tensor(known)?,
            };
            // The copy makes the file's pages unnecessary.
            let tensor = tensor.to_kind(kind).to_device(self.device);
            file.forget(known);
            return Ok(tensor);
        }
        let ([codes, scales], output) = (self.packed(name).context("the model has no such tensor")?, shape[2]);
        let decoded = |index: i64| {
            let bytes = |name: &str| -> Result<Vec<u8>> {
                let (file, known) = self.find(name).context("a checked tensor is there")?;
                let tensor = file.part(known, index)?.contiguous();
                Ok(tensors::bytes_of(&tensor).to_vec())
            };
            mxfp4::decode(&bytes(&codes)?, &bytes(&scales)?, output, kind)
        };
        let tensor = match part {
            Some(index) => decoded(index)?,
            None => Tensor::stack(&(0..shape[0]).map(decoded).collect::<Result<Vec<_>>>()?, 0),
        };
        Ok(tensor.to_device(self.device))
    }
}

/// Returns true if a tensor belongs to a module of a wrapper, which may be under `model` or not.
fn is_under(name: &str, module: &str) -> bool {
    let name = name.strip_prefix("model.").unwrap_or(name);
    name.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
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
