//! Gemma Scope: JumpReLU SAEs and transcoders on every layer of Gemma 2 and Gemma 3.
//!
//! Lieberum et al. 2024, *Gemma Scope*, <https://arxiv.org/abs/2408.05147>: `params.npz` in a folder
//! `layer_L/width_W/average_l0_N` or `embedding/...`. There is no config, so model and site are read from the names of
//! the repository and folders. Gemma Scope 2 has `params.safetensors` and usually a `config.json`.
//!
//! ```text
//! f = π ⊙ H(π − θ),  π = x W_enc + b_enc          x̂ = f W_dec + b_dec [+ x A]      A: an affine skip connection
//! ```
//!
//! SAEs on the embedding were trained on activations multiplied by √d, so W_enc is divided by √d and W_dec multiplied,
//! as in sae_lens. A cross-layer transcoder (`clt`) predicts all layers; their sum is imported, also as in sae_lens.

use dictlearn_core::files::numpy::Npz;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::formats::{
    AffineSae, Format, ModelSite, Place, Published, SaeActivation, check_keys, nothing_left, take,
};
use dictlearn_core::prelude::*;

/// Gemma Scope: a folder with params.npz, `layer_L/width_W/average_l0_N`. Gemma Scope 2: a folder with
/// params.safetensors and usually config.json. Model and layer are read from the names of the repository and folders.
/// Transcoders keep their affine skip connection, if published with one. A cross-layer transcoder is imported as the
/// sum over the layers it writes to.
#[component(format "gemma_scope", summary = "params.npz of Gemma Scope, params.safetensors of Gemma Scope 2",
    paper = "Lieberum et al. 2024, Gemma Scope, https://arxiv.org/abs/2408.05147",
    example = "dictlearn import gemma_scope google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")]
pub struct GemmaScope {}

/// Tensors of a folder's files, by their names in the first Gemma Scope.
type Tensors = std::collections::BTreeMap<String, Tensor>;

/// Keys of a Gemma Scope 2 config.json that would change the computation; its SAEs do not use them.
const OFF: &[&str] = &["apply_b_dec_to_input", "normalize_activations"];

/// Keys that are read below, and keys that only describe the SAE.
const KNOWN: &[&str] = &[
    "affine_connection",
    "architecture",
    "dtype",
    "hf_hook_point_in",
    "hf_hook_point_out",
    "l0",
    "layer",
    "model_name",
    "site",
    "type",
    "width",
];

impl Format for GemmaScope {
    fn marks(&self) -> &'static [&'static str] {
        &["params.npz", "params.safetensors"]
    }

    fn read(&self, place: &Place) -> Result<Published> {
        let words = place.words();
        let second = place.file("params.npz")?.is_none();
        let (mut tensors, clt) = if second { second_tensors(place)? } else { (first_tensors(place)?, false) };
        if let Some(factor) = tensors.remove("scaling_factor")
            && !factor.allclose(&factor.ones_like(), 1e-5, 1e-8, false)
        {
            bail!(InputError::new("the weights have a `scaling_factor`, which Gemma Scope does not use"));
        }
        let mut notes = Vec::new();
        let said = match place.file("config.json")? {
            Some(file) if second => dictlearn_core::files::read_json(&file)?,
            _ => Value::Object(Map::new()),
        };
        notes.extend(check_keys(&said, "config.json", OFF, KNOWN)?);
        let embedding = !second && is_embedding(&words);
        let transcodes = says_transcoder(&said)? || transcodes(&words) || clt;
        let (mut w_enc, mut w_dec) = (take(&mut tensors, "W_enc")?, take(&mut tensors, "W_dec")?);
        if clt && w_dec.dim() == 3 {
            // [F, layers, d_out].
            w_dec = w_dec.sum_dim_intlist([1].as_slice(), false, Kind::Float);
        }
        if embedding {
            let root = (w_enc.size().first().copied().unwrap_or(1) as f64).sqrt();
            (w_enc, w_dec) = (w_enc / root, w_dec * root);
        }
        let w_skip = tensors.remove("affine_skip_connection").map(|skip| skip.transpose(-2, -1).contiguous());
        let affine = AffineSae {
            w_enc,
            b_enc: take(&mut tensors, "b_enc")?,
            w_dec,
            b_dec: take(&mut tensors, "b_dec")?,
            w_skip,
            subtract_b_dec: false,
            transcodes,
            activation: SaeActivation::Jump(take(&mut tensors, "threshold")?),
        };
        nothing_left(&tensors)?;
        let (_, features, _) = affine.check()?;
        if let Some(said) = said["width"].as_i64().filter(|said| *said != features) {
            bail!(InputError::new(format!(
                "config.json says `width` is {said}, but the weights have {features} features"
            )));
        }
        if said["affine_connection"].as_bool().is_some_and(|said| said != affine.w_skip.is_some()) {
            bail!(InputError::new(
                "`affine_connection` in config.json contradicts `affine_skip_connection` in the weights"
            ));
        }
        if let Some(said) = width(&words).filter(|said| *said != features) {
            bail!(InputError::new(format!("the folder's name says {said} features, but the weights have {features}")));
        }
        let site = if second { second_site(&said, &words, transcodes)? } else { first_site(&words) };
        if site.is_none() {
            notes.push(
                "the path does not name the model and layer: `eval` and `encode --text` will need \
                 `source.model` and `source.submodule`"
                    .to_owned(),
            );
        }
        let mut trainer = Map::new();
        if let Some(l0) = words.split("average_l0_").nth(1).and_then(|rest| rest.split('/').next()?.parse::<i64>().ok())
        {
            trainer.insert("average_l0".to_owned(), l0.into());
        }
        if transcodes {
            trainer.insert("transcodes".to_owned(), true.into());
        }
        let (class, tensors) = affine.into_class()?;
        Ok(Published { class: class.to_owned(), tensors, site, trainer, notes, ..Published::default() })
    }
}

fn first_tensors(place: &Place) -> Result<Tensors> {
    let file = match place.file("params.npz")? {
        Some(file) => file,
        None => place.need("params.npz")?,
    };
    let arrays = Npz::open(&file)?.arrays()?;
    // Transcoders spell them in several ways.
    let spelt = |name: String| match name.to_lowercase().as_str() {
        "w_enc" | "wenc" | "w_e" => "W_enc".to_owned(),
        "w_dec" | "wdec" | "w_d" => "W_dec".to_owned(),
        "b_enc" | "benc" | "b_e" => "b_enc".to_owned(),
        "b_dec" | "bdec" | "b_d" => "b_dec".to_owned(),
        _ => name,
    };
    Ok(arrays.into_iter().map(|(name, tensor)| (spelt(name), tensor)).collect())
}

/// The tensors of Gemma Scope 2, and whether they belong to a cross-layer transcoder, whose file is named by its layer.
fn second_tensors(place: &Place) -> Result<(Tensors, bool)> {
    let clt = is_clt(&place.words());
    let file = match place.file("params.safetensors")? {
        Some(file) => file,
        // A single file, given with or without its extension.
        None => match place.file("")? {
            Some(file) if file.extension().is_some_and(|extension| extension == "npz") => {
                return Ok((Npz::open(&file)?.arrays()?, false));
            }
            Some(file) => file,
            None => match place
                .above()
                .map(|above| above.file(&format!("{}.safetensors", last(&place.words()))))
                .transpose()?
            {
                Some(Some(file)) if clt => file,
                _ => {
                    // Most users mean the first Gemma Scope.
                    place.need("params.npz")?;
                    place.need("params.safetensors")?
                }
            },
        },
    };
    let tensors = TensorFile::open(&file)?.tensors()?;
    for (name, tensor) in &tensors {
        if !tensor.is_floating_point() {
            bail!(InputError::new(format!(
                "tensor `{name}` has the type {:?}, but must be floating point",
                tensor.kind()
            )));
        }
    }
    let spelt = |name: String| match name.as_str() {
        "w_enc" => "W_enc".to_owned(),
        "w_dec" => "W_dec".to_owned(),
        _ => name,
    };
    Ok((tensors.into_iter().map(|(name, tensor)| (spelt(name), tensor.to_kind(Kind::Float))).collect(), clt))
}

/// Whether a path names an SAE on the embedding: `embedding/width_4k/average_l0_6`.
fn is_embedding(words: &str) -> bool {
    let parts: Vec<&str> = words.split('/').collect();
    parts.windows(2).any(|pair| pair[0] == "embedding" && pair[1].starts_with("width_"))
}

/// The parts of a path that belong to the published set, not to its location on this machine: from the set's name on,
/// or else the last three.
fn set(words: &str) -> Vec<&str> {
    let parts: Vec<&str> = words.split('/').filter(|part| !part.is_empty()).collect();
    let named = parts.iter().position(|part| part.contains("gemma-scope-"));
    parts[named.unwrap_or(parts.len().saturating_sub(3))..].to_vec()
}

/// Whether a path names a transcoder.
fn transcodes(words: &str) -> bool {
    set(words).iter().any(|part| part.contains("transcoder"))
}

/// Whether a path names a cross-layer transcoder.
fn is_clt(words: &str) -> bool {
    set(words).iter().any(|part| part.split(['_', '-']).any(|word| word == "clt"))
}

fn last(words: &str) -> &str {
    words.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

/// The number after the last occurrence of a word, such as the layer after `layer_`.
fn number_after(words: &str, word: &str) -> Option<u64> {
    let rest = &words[words.rfind(word)? + word.len()..];
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The number of features in a path: `width_16k`.
fn width(words: &str) -> Option<i64> {
    let rest = &words[words.rfind("width_")? + 6..];
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    let number: i64 = digits.parse().ok()?;
    match rest[digits.len()..].chars().next() {
        // 16k is 2^14, 131k 2^17, 1m 2^20.
        Some('k') => {
            number.checked_mul(1000).and_then(|near| (8..40).map(|e| 1_i64 << e).min_by_key(|n| (n - near).abs()))
        }
        Some('m') => number.checked_mul(1 << 20),
        _ => Some(number),
    }
}

/// Model and site of a Gemma Scope SAE, if its folders' names give them.
fn first_site(words: &str) -> Option<ModelSite> {
    // Matches gemma-scope-2b-pt-res and gemma-scope-9b-it-res, but not gemma-scope-2-4b-pt.
    let name = words.split('/').find(|part| part.contains("gemma-scope-"))?;
    let rest = name.split("gemma-scope-").nth(1)?;
    let mut parts = rest.split('-');
    let (size, tuning, kind) = (parts.next()?, parts.next()?, parts.next()?);
    let model = format!("google/gemma-2-{size}{}", if tuning == "it" { "-it" } else { "" });
    let (submodule, target) = if is_embedding(words) {
        ("hook_embed".to_owned(), None)
    } else {
        let layer = number_after(words, "layer_")?;
        match kind {
            "res" => (format!("blocks.{layer}.hook_resid_post"), None),
            "mlp" => (format!("blocks.{layer}.hook_mlp_out"), None),
            "att" => (format!("blocks.{layer}.attn.hook_z"), None),
            "transcoders" => {
                (format!("blocks.{layer}.ln2.hook_normalized"), Some(format!("blocks.{layer}.hook_mlp_out")))
            }
            _ => return None,
        }
    };
    Some(ModelSite { model, submodule, target, ..any_site() })
}

/// Whether config.json describes an SAE that predicts something other than its input.
fn says_transcoder(said: &Value) -> Result<bool> {
    let kind = said["type"].as_str().unwrap_or_default().to_lowercase();
    if kind.contains("crosscoder") {
        bail!(
            InputError::new(format!("config.json: `type: {kind}` is not supported"))
                .help("supported: SAEs, transcoders and cross-layer transcoders")
        );
    }
    let (reads, writes) = (said["hf_hook_point_in"].as_str(), said["hf_hook_point_out"].as_str());
    Ok(kind.contains("transcoder")
        || kind.contains("clt")
        || reads.zip(writes).is_some_and(|(reads, writes)| reads != writes))
}

/// Model and site of a Gemma Scope 2 SAE, from config.json or from the folders' names.
fn second_site(said: &Value, words: &str, transcodes: bool) -> Result<Option<ModelSite>> {
    let text = |key: &str| said.get(key).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
    if let Some(other) = text("architecture").filter(|name| name != "jump_relu") {
        bail!(
            InputError::new(format!("config.json says the architecture is `{other}`"))
                .help("Gemma Scope 2 uses `jump_relu`")
        );
    }
    let repo = words.split('/').find(|part| part.contains("gemma-scope-2-")).map(|part| {
        let part = part.rsplit("--").next().unwrap_or(part);
        part.replace("gemma-scope-2", "gemma-3")
    });
    let Some(model) = text("model_name").or(repo) else { return Ok(None) };
    let mut model = model.replace("-v3", "-3");
    if !model.contains('/') {
        model = format!("google/{model}");
    }
    if model.contains("270m") {
        // On the Hub, the base model of this size has no `-pt`.
        model = model.trim_end_matches("-pt").to_owned();
    }
    let Some(layer) = number_after(words, "layer_") else { return Ok(None) };
    let module = |rest: &str| format!("model.layers.{layer}{rest}");
    let has = |kind: &str| set(words).iter().any(|part| part.contains(kind));
    let (reads, writes) = if transcodes {
        (module(".pre_feedforward_layernorm.output"), Some(module(".post_feedforward_layernorm.output")))
    } else if has("resid_post") {
        (module(".output"), None)
    } else if has("attn_out") {
        (module(".self_attn.o_proj.input"), None)
    } else if has("mlp_out") {
        (module(".post_feedforward_layernorm.output"), None)
    } else if let Some(reads) = text("hf_hook_point_in") {
        (reads, None)
    } else {
        return Ok(None);
    };
    let reads = text("hf_hook_point_in").unwrap_or(reads);
    let writes = writes.map(|writes| text("hf_hook_point_out").unwrap_or(writes));
    let mut site = ModelSite { model, ..any_site() };
    site.at(&reads);
    site.target = writes.map(|writes| writes.trim_end_matches(".output").to_owned());
    Ok(Some(site))
}

/// Settings shared by all of them.
fn any_site() -> ModelSite {
    ModelSite {
        prepend_bos: Some(true),
        ctx_len: Some(1024),
        dataset: Some("monology/pile-uncopyrighted".to_owned()),
        ..ModelSite::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_and_site_are_read_from_paths() {
        for (words, model, submodule) in [
            (
                "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
                "google/gemma-2-2b",
                "blocks.20.hook_resid_post",
            ),
            (
                "google/gemma-scope-9b-it-res/layer_9/width_131k/average_l0_121",
                "google/gemma-2-9b-it",
                "blocks.9.hook_resid_post",
            ),
            (
                "/x/models--google--gemma-scope-27b-pt-att/snapshots/c/layer_3/width_80/average_l0_7",
                "google/gemma-2-27b",
                "blocks.3.attn.hook_z",
            ),
            ("google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "google/gemma-2-2b", "hook_embed"),
        ] {
            let site = first_site(words).unwrap();
            assert_eq!((site.model.as_str(), site.submodule.as_str()), (model, submodule));
        }
        assert!(first_site("/tmp/layer_3/width_80/average_l0_7").is_none());
    }

    #[test]
    fn widths_are_read_from_paths() {
        for (words, features) in [
            ("width_16k/", Some(16384)),
            ("width_65k", Some(65536)),
            ("width_131k", Some(131_072)),
            ("width_262k_l0_big", Some(262_144)),
            ("width_1m/", Some(1 << 20)),
            ("width_80/", Some(80)),
            ("none", None),
        ] {
            assert_eq!(width(words), features, "{words}");
        }
    }
}
