//! sparsify, EleutherAI's library of TopK SAEs and transcoders: `cfg.json` and `sae.safetensors`, a folder for each module.
//!
//! <https://github.com/EleutherAI/sparsify>. With the module's input x, and its output to be predicted by transcoders:
//!
//! ```text
//! f = TopK(ReLU((x − b_dec) W_encᵀ + b_enc))          b_dec is subtracted unless it is a transcoder
//! ŷ = f W_dec + b_dec [+ W_skip x]
//! ```

use dictlearn_core::format::{take, Activation, Affine, Format, ModelSite, Place, Published, Request};
use dictlearn_core::prelude::*;
use dictlearn_core::tensors::TensorFile;

const NAME: &str = "sparsify";

/// A folder with cfg.json and sae.safetensors, named by its module, or a run with a folder for each: TopK SAEs and
/// transcoders, with a skip connection or without. The activation `groupmax` is refused.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sparsify {}

register! {
    format Sparsify, NAME,
    summary: "cfg.json and sae.safetensors of EleutherAI's sparsify",
    paper: "EleutherAI, sparsify, https://github.com/EleutherAI/sparsify",
    example: "dictlearn import sparsify EleutherAI/sae-llama-3-8b-32x/layers.10",
}

#[typetag::serde(name = NAME)]
impl Format for Sparsify {
    /// One module's folder, or every module of a run.
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        let place = Place::parse(request.named()?)?;
        if place.file("cfg.json")?.is_some() {
            return Ok(vec![place]);
        }
        let files = place.files()?;
        let modules = files.iter().filter_map(|file| file.strip_suffix("/sae.safetensors"));
        let found: Vec<Place> = modules.map(|module| place.below(module)).collect();
        if found.is_empty() {
            place.need("cfg.json")?;
        }
        Ok(found)
    }

    fn read(&self, place: &Place) -> Result<Published> {
        let cfg = place.json("cfg.json")?;
        let flag = |key: &str| match cfg.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(InputError::new(format!("cfg.json: `{key}` is {other}"))),
        };
        let activation = cfg.get("activation").and_then(Value::as_str).unwrap_or("topk");
        if activation != "topk" {
            bail!(
                InputError::new(format!("the activation `{activation}` is not supported")).help("supported is `topk`")
            );
        }
        if flag("signed")? {
            bail!(InputError::new("`signed: true`, features that may be negative, is not supported"));
        }
        let mut tensors = TensorFile::open(&place.need("sae.safetensors")?)?.tensors()?;
        for (name, tensor) in &tensors {
            if !tensor.is_floating_point() {
                bail!(InputError::new(format!("tensor `{name}` has the type {:?}", tensor.kind())));
            }
        }
        let Some(k) = cfg.get("k").and_then(Value::as_i64) else {
            bail!(InputError::new("cfg.json does not say `k`"));
        };
        let w_enc = take(&mut tensors, "encoder.weight")?;
        if w_enc.dim() != 2 {
            bail!(InputError::new(format!("`encoder.weight` has shape {:?}, not two dimensions", w_enc.size())));
        }
        let transcodes = flag("transcode")?;
        let affine = Affine {
            w_enc: w_enc.transpose(0, 1).contiguous(),
            b_enc: take(&mut tensors, "encoder.bias")?,
            w_dec: take(&mut tensors, "W_dec")?,
            b_dec: take(&mut tensors, "b_dec")?,
            w_skip: tensors.remove("W_skip"),
            subtract_b_dec: !transcodes,
            transcodes,
            activation: Activation::TopK(k),
        };
        if affine.w_skip.is_some() != flag("skip_connection")? {
            bail!(InputError::new("cfg.json's `skip_connection` and the weights' `W_skip` contradict each other"));
        }
        if !tensors.is_empty() {
            let names: Vec<String> = tensors.into_keys().collect();
            bail!(InputError::new(format!("there are tensors that sparsify's do not have: {}", names.join(", "))));
        }
        let (d, ..) = affine.check()?;
        if let Some(said) = cfg.get("d_in").and_then(Value::as_i64).filter(|said| *said != d) {
            bail!(InputError::new(format!("cfg.json says `d_in` is {said}, and the weights say {d}")));
        }
        // The run that it is part of says which model; the folder is named by the module.
        let run = match place.above().map(|run| run.file("config.json")).transpose()?.flatten() {
            Some(file) => dictlearn_core::saved::read_json(&file)?,
            None => Value::Null,
        };
        let module = place.words().trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
        let site = run.get("model").and_then(Value::as_str).map(|model| ModelSite {
            model: model.to_owned(),
            submodule: module,
            io: Some(if transcodes { "in_to_out" } else { "out" }),
            prepend_bos: Some(false),
            ctx_len: run.get("ctx_len").and_then(Value::as_i64),
            dataset: run
                .get("dataset")
                .and_then(Value::as_str)
                .filter(|name| name.split('/').count() == 2)
                .map(str::to_owned),
            ..ModelSite::default()
        });
        let (class, tensors) = affine.into_class()?;
        Ok(Published { class: class.to_owned(), tensors, site, ..Published::default() })
    }
}
