//! Transcoder sets, as circuit-tracer reads them: one transcoder per layer, or the layers of a cross-layer transcoder.
//!
//! <https://github.com/decoderesearch/circuit-tracer>. With the MLP's input (or the residual stream before it) x `[d]`:
//!
//! ```text
//! f = relu(x W_encᵀ + b_enc)          ŷ = f W_dec + b_dec
//! ```
//!
//! A layer of a cross-layer transcoder writes to its own layer and every later one, W_dec [F, layers, d]. The import sums
//! over those layers, as sae_lens does: features are exact, but ŷ is what all layers together receive, not a
//! reconstruction of one MLP's output.

use std::collections::BTreeMap;
use std::path::Path;

use dictlearn_core::files;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::formats::{
    AffineSae, Format, ModelSite, Place, Published, Request, SaeActivation, agrees, nothing_left, take_float,
};
use dictlearn_core::prelude::*;

/// Transcoders on Qwen 3 by Michael Hanna: `layer_{n}.safetensors`, from an MLP's input to its output. Sizes are checked
/// against `wandb-config.yaml` (or `wanb-config.yaml`); the model is named in `config.yaml`, or else by the repository.
#[component(format "mwhanna_transcoder", summary = "layer_{n}.safetensors: transcoders on Qwen 3",
    paper = "Hanna et al. 2025, circuit-tracer, https://github.com/decoderesearch/circuit-tracer",
    example = "dictlearn import mwhanna_transcoder mwhanna/qwen3-4b-transcoders/layer_5.safetensors")]
pub struct MwhannaTranscoder {}

impl Format for MwhannaTranscoder {
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        let place = Place::parse(request.named()?)?;
        if place.words().ends_with(".safetensors") {
            return Ok(vec![place]);
        }
        let files = place.files()?;
        let layers = files.iter().filter(|file| layer_of(file).is_some() && !file.contains('/'));
        let found: Vec<Place> = layers.map(|file| place.below(file)).collect();
        match found.is_empty() {
            true => bail!(
                InputError::new(format!("{place} holds no file layer_<n>.safetensors"))
                    .help("name the file, or the folder or repository that holds it")
            ),
            false => Ok(found),
        }
    }

    fn read(&self, place: &Place) -> Result<Published> {
        let words = place.words();
        let Some(layer) = layer_of(&words) else {
            bail!(
                InputError::new(format!("the file's name gives no layer: {words}"))
                    .help("it must be layer_<n>.safetensors, as on the Hub")
            );
        };
        let set = set_of(place)?;
        let mut tensors = TensorFile::open(&place.need("")?)?.tensors()?;
        let affine = AffineSae {
            w_enc: take_float::<2>(&mut tensors, "W_enc")?.tr().contiguous(),
            b_enc: take_float::<1>(&mut tensors, "b_enc")?,
            w_dec: take_float::<2>(&mut tensors, "W_dec")?,
            b_dec: take_float::<1>(&mut tensors, "b_dec")?,
            w_skip: None,
            subtract_b_dec: false,
            transcodes: true,
            activation: SaeActivation::Relu,
        };
        nothing_left(&tensors)?;
        let (d, features, d_out) = affine.check()?;
        let mut ctx_len = None;
        for name in ["wandb-config.yaml", "wanb-config.yaml"] {
            let Some(file) = set.file(name)? else { continue };
            let said = yaml(&file)?;
            for (key, found) in [("d_model", d), ("d_model", d_out), ("d_feature", features)] {
                if let Some(said) = whole(&said, &format!("/{key}/value"), name)? {
                    agrees(&format!("{name}: `{key}`"), said, found)?;
                }
            }
            ctx_len = whole(&said, "/batch_size/value", name)?;
            break;
        }
        let named = match set.file("config.yaml")? {
            Some(file) => text(&yaml(&file)?, "model_name"),
            None => qwen3(&words),
        };
        let site = named.map(|model| ModelSite {
            model,
            submodule: format!("model.layers.{layer}.mlp"),
            io: Some("in_to_out"),
            prepend_bos: Some(true),
            ctx_len,
            dataset: Some("monology/pile-uncopyrighted".to_owned()),
            ..ModelSite::default()
        });
        published(affine, site, Vec::new())
    }
}

/// One layer of a cross-layer transcoder: `W_enc_{layer}.safetensors` and `W_dec_{layer}.safetensors`. The place is the
/// folder with the layer's number below it, `owner/name/2`; a whole folder is imported layer by layer. Decoders are
/// summed over the layers that they write to, so features are exact, but reconstructions are not one MLP's output.
#[component(format "mntss_clt_layer_transcoder", summary = "W_enc_{n}.safetensors and W_dec_{n}.safetensors of a cross-layer transcoder",
    paper = "Hanna et al. 2025, circuit-tracer, https://github.com/decoderesearch/circuit-tracer",
    example = "dictlearn import mntss_clt_layer_transcoder mntss/clt-gemma-2-2b-2.5M/12")]
pub struct MntssCltLayerTranscoder {}

impl Format for MntssCltLayerTranscoder {
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        let name = request.named()?;
        // The layer's number names no file, so a local path that ends in it does not exist.
        let (folder, layer) = match name.trim_end_matches('/').rsplit_once('/') {
            Some((folder, layer)) if !Path::new(name).exists() && layer.parse::<u64>().is_ok() => (folder, Some(layer)),
            _ => (name, None),
        };
        let place = Place::parse(folder)?;
        if let Some(layer) = layer {
            return Ok(vec![place.below(layer)]);
        }
        let words = place.words();
        if let Some(layer) = layer_in(last(&words)) {
            return Ok(vec![set_of(&place)?.below(layer)]);
        }
        let files = place.files()?;
        let found: Vec<Place> = files.iter().filter_map(|file| layer_in(file)).map(|n| place.below(n)).collect();
        match found.is_empty() {
            true => bail!(
                InputError::new(format!("{place} holds no file W_enc_<layer>.safetensors"))
                    .help("name the folder or repository, with the layer's number below it: `owner/name/2`")
            ),
            false => Ok(found),
        }
    }

    fn read(&self, place: &Place) -> Result<Published> {
        let words = place.words();
        let layer = last(&words);
        if layer.parse::<u64>().is_err() {
            bail!(InputError::new(format!("the place names no layer: {words}")).help("end it in one: `owner/name/2`"));
        }
        let set = set_of(place)?;
        let mut tensors = TensorFile::open(&set.need(&format!("W_enc_{layer}.safetensors"))?)?.tensors()?;
        let affine = AffineSae {
            w_enc: take_float::<2>(&mut tensors, &format!("W_enc_{layer}"))?.tr().contiguous(),
            b_enc: take_float::<1>(&mut tensors, &format!("b_enc_{layer}"))?,
            b_dec: take_float::<1>(&mut tensors, &format!("b_dec_{layer}"))?,
            w_dec: summed(&set.need(&format!("W_dec_{layer}.safetensors"))?, &format!("W_dec_{layer}"))?,
            w_skip: None,
            subtract_b_dec: false,
            transcodes: true,
            activation: SaeActivation::Relu,
        };
        nothing_left(&tensors)?;
        affine.check()?;
        let site = match set.file("config.yaml")? {
            Some(file) => {
                let said = yaml(&file)?;
                let hook = |key: &str, default: &str| {
                    format!("blocks.{layer}.{}", text(&said, key).unwrap_or_else(|| default.to_owned()))
                };
                text(&said, "model_name").map(|model| ModelSite {
                    model,
                    submodule: hook("feature_input_hook", "hook_resid_mid"),
                    target: Some(hook("feature_output_hook", "hook_mlp_out")),
                    prepend_bos: Some(true),
                    ..ModelSite::default()
                })
            }
            None => None,
        };
        let note = "its decoders for all later layers are summed: use it for features, not for reconstructions";
        published(affine, site, vec![note.to_owned()])
    }
}

/// Reads a decoder [F, layers, d_out] summed over its layers, [F, d_out]. Read by rows: all of them may take more memory
/// than there is.
fn summed(file: &Path, name: &str) -> Result<Tensor> {
    let file = TensorFile::open(file)?;
    let mut others = file.names();
    others.retain(|other| other != name);
    if !others.is_empty() {
        nothing_left(&others.into_iter().map(|other| (other, Tensor::new())).collect::<BTreeMap<_, _>>())?;
    }
    let (Some(shape), Some(bytes)) = (file.shape(name), file.bytes_of(name)) else {
        bail!(InputError::new(format!("{} has no tensor `{name}`", file.path().display())));
    };
    let kind = file.kind(name)?;
    let floating = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half].contains(&kind);
    let [features, layers, d_out] = shape[..] else {
        bail!(InputError::new(format!("tensor `{name}` has shape {shape:?}, but must be [features, layers, width]")));
    };
    if !floating || features * layers * d_out == 0 {
        bail!(InputError::new(format!("tensor `{name}` has shape {shape:?} and type {kind:?}, but must hold floats")));
    }
    let row = bytes.len() / features as usize;
    let mut rows = Vec::new();
    for part in bytes.chunks(row * 1024) {
        let shape = [(part.len() / row) as i64, layers, d_out];
        let part = Tensor::f_from_data_size(part, &shape, kind)?.to_kind(Kind::Double);
        rows.push(part.sum_dim_intlist([1].as_slice(), false, Kind::Double).to_kind(Kind::Float));
    }
    Ok(Tensor::cat(&rows, 0))
}

fn published(affine: AffineSae, site: Option<ModelSite>, mut notes: Vec<String>) -> Result<Published> {
    if site.is_none() {
        notes.push(
            "nothing names the model: `eval` and `encode --text` will need `source.model` and `source.submodule`"
                .to_owned(),
        );
    }
    let trainer = Map::from_iter([("transcodes".to_owned(), true.into())]);
    let (class, tensors) = affine.into_class()?;
    Ok(Published { class: class.to_owned(), tensors, site, trainer, notes, ..Published::default() })
}

/// Returns the folder or repository that holds a layer's files.
fn set_of(place: &Place) -> Result<Place> {
    place.above().with_context(|| format!("{place} is not in a folder"))
}

fn yaml(file: &Path) -> Result<Value> {
    Ok(files::from_yaml(&files::read_text(file)?)
        .map_err(|error| InputError::new(format!("cannot read {}: {}", file.display(), error.message())))?)
}

fn text(said: &Value, key: &str) -> Option<String> {
    said.get(key).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
}

/// Returns a whole number of a config; absent and null are the same.
fn whole(said: &Value, pointer: &str, file: &str) -> Result<Option<i64>> {
    match said.pointer(pointer) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_i64().filter(|n| *n > 0) {
            Some(n) => Ok(Some(n)),
            None => {
                let key = pointer.trim_matches('/').replace('/', ".");
                bail!(InputError::new(format!("{file}: `{key}` is {value}, but must be a whole number above 0")))
            }
        },
    }
}

/// Returns the model of a repository such as `qwen3-4b-transcoders`.
fn qwen3(words: &str) -> Option<String> {
    let rest = &words[words.rfind("qwen3-")? + "qwen3-".len()..];
    let size = &rest[..rest.find('b')?];
    size.parse::<f64>().ok().filter(|size| size.is_finite()).map(|_| format!("Qwen/Qwen3-{size}B"))
}

/// Returns the layer of a file `layer_{n}.safetensors`.
fn layer_of(words: &str) -> Option<u64> {
    last(words).strip_prefix("layer_")?.strip_suffix(".safetensors")?.parse().ok()
}

/// Returns the layer of a file `W_enc_{n}.safetensors`.
fn layer_in(file: &str) -> Option<&str> {
    let layer = file.strip_prefix("W_enc_")?.strip_suffix(".safetensors")?;
    layer.parse::<u64>().ok().map(|_| layer)
}

fn last(words: &str) -> &str {
    words.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_read_from_repositories() {
        for (words, model) in [
            ("mwhanna/qwen3-14b-transcoders-lowl0/layer_3.safetensors", Some("Qwen/Qwen3-14B")),
            ("/x/models--mwhanna--qwen3-0.6b-transcoders/snapshots/c/layer_3.safetensors", Some("Qwen/Qwen3-0.6B")),
            ("mwhanna/qwen3-transcoders/layer_3.safetensors", None),
            ("layer_3.safetensors", None),
        ] {
            assert_eq!(qwen3(words).as_deref(), model, "{words}");
        }
    }
}
