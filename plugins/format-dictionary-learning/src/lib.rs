//! dictionary_learning: `ae.pt` and `config.json`, as the reference saves them, for all of its classes.
//!
//! <https://github.com/saprmarks/dictionary_learning>. It also reads training backups (their dictionary) and bare
//! state dicts, whose class it infers from the tensors. As in the reference's `from_pretrained`, decoder norms of an
//! `AutoEncoder` are folded into its encoder.
//!
//! `--pretrained` imports from the reference's own set, `10_32768` on every submodule of Pythia-70m, by name or glob:
//! `pythia-70m-deduped/mlp_out_layer1/10_32768`, `*/10_32768`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dictlearn_core::files::{tensors, torch_file};
use dictlearn_core::formats::{Format, ModelSite, Place, Published, Python, Request, glob};
use dictlearn_core::hub::{Repo, RepoKind, hub};
use dictlearn_core::prelude::*;
use dictlearn_core::sae::saved;
use dictlearn_core::sae::saved::Saved;

mod pretrained;

/// A folder with ae.pt and config.json, of any of the library's classes, or a folder of such folders; a training
/// backup; or a .pt file with a bare state dict. No code in the file is run. Decoder norms of an AutoEncoder are
/// folded into its encoder, as in the library's `from_pretrained`. A folder saved by dictlearn, which also has
/// ae.safetensors, is read unchanged, whatever its class.
///
/// `--pretrained` imports from the library's own set on Pythia-70m, by name or glob; `--list` shows the names.
#[component(format "dictionary_learning",
    summary = "ae.pt and config.json of the Python library, and its set on Pythia-70m",
    paper = "Marks, Karvonen and Mueller 2024, https://github.com/saprmarks/dictionary_learning",
    example = "dictlearn import dictionary_learning --pretrained pythia-70m-deduped/mlp_out_layer1/10_32768")]
pub struct DictionaryLearning {}

/// Weights in a folder saved by dictlearn.
const OWN: &str = "ae.safetensors";

/// Classes that the reference can load.
const CLASSES: [&str; 7] = [
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
];

impl Format for DictionaryLearning {
    /// One folder or file, or every folder below it that has weights.
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        if let Some(names) = &request.pretrained {
            return pretrained::find(names);
        }
        let place = Place::parse(request.named()?)?;
        if place.file("ae.pt")?.is_some() || place.file(OWN)?.is_some() || place.file("")?.is_some() {
            return Ok(vec![place]);
        }
        let files = place.files()?;
        let folders: std::collections::BTreeSet<&str> = files
            .iter()
            .filter_map(|file| file.strip_suffix("/ae.pt").or(file.strip_suffix("/ae.safetensors")))
            .collect();
        let folders = folders.into_iter();
        let found: Vec<Place> = folders.map(|folder| place.below(folder)).collect();
        if found.is_empty() {
            place.need("ae.pt")?;
        }
        Ok(found)
    }

    fn offers(&self, _: &Request) -> Result<Vec<(String, String)>> {
        pretrained::offers()
    }

    fn marks(&self) -> &'static [&'static str] {
        &["ae.pt", OWN]
    }

    fn read(&self, place: &Place) -> Result<Published> {
        if let Some(entry) = place.table.get(pretrained::ENTRY).and_then(Value::as_str) {
            return pretrained::read(place, entry);
        }
        if let Some(weights) = place.file(OWN)? {
            // A folder saved by dictlearn: weights are read unchanged, of any class.
            let config = place.json("config.json")?;
            let trainer = config.get("trainer").and_then(Value::as_object).cloned().unwrap_or_default();
            let Some(class) = trainer.get("dict_class").and_then(Value::as_str).map(str::to_owned) else {
                bail!(InputError::new("config.json has no `trainer.dict_class`"));
            };
            let tensors = tensors::TensorFile::open(&weights)?.tensors()?;
            let normalization = saved::normalization(&config, &weights.with_file_name("config.json"))?;
            let dtype = match trainer.get("dtype").and_then(Value::as_str) {
                Some("bfloat16") => Some("bfloat16"),
                Some("float16") => Some("float16"),
                _ => None,
            };
            return Ok(Published {
                class,
                tensors,
                normalization,
                dtype,
                site: site(&config),
                trainer,
                ..Published::default()
            });
        }
        let (weights, config) = match place.file("")? {
            Some(file) => (file, place.above().map(|above| above.file("config.json")).transpose()?.flatten()),
            None => (place.need("ae.pt")?, place.file("config.json")?),
        };
        let config = config.map(|file| dictlearn_core::files::read_json(&file)).transpose()?;
        published(&torch_file::read(&weights)?, &weights.display().to_string(), config)
    }

    fn write(&self, sae: &Saved, dir: &Path) -> Result<()> {
        let class = sae.dictionary.class();
        if !CLASSES.contains(&class) {
            bail!(
                InputError::new(format!("the reference has no equivalent of the class {class}"))
                    .help(format!("its classes are: {}", CLASSES.join(", ")))
            );
        }
        let dims = sae.dictionary.dims();
        if dims.input != dims.output {
            bail!(InputError::new(format!(
                "the reference's {class} reconstructs its own input, but the widths {} and {} differ",
                dims.input, dims.output
            )));
        }
        if sae.normalization.is_some() {
            bail!(
                InputError::new("the reference's classes do not normalise their input")
                    .help("`--format sae_lens` supports normalisation")
            );
        }
        let mut config = sae.config.clone();
        // Keys that the reference's loader reads.
        let trainer = &mut config["trainer"];
        trainer["dict_class"] = class.into();
        trainer["activation_dim"] = dims.input.into();
        trainer["dict_size"] = dims.features.into();
        if let Some(selection) = sae.dictionary.selection() {
            trainer["k"] = selection.k().into();
        }
        if trainer["dtype"].is_string() {
            tracing::warn!("the SAE computes in {}, but the reference will compute in float32", trainer["dtype"]);
        }
        let mut tensors = sae.dictionary.state_dict();
        tensors
            .iter_mut()
            .filter(|(_, tensor)| tensor.is_floating_point())
            .for_each(|(_, tensor)| *tensor = tensor.to_kind(Kind::Float));
        if class == "AutoEncoder" && !has_unit_norms(&tensors) {
            // The reference's loader would fold the norms into the encoder, which changes the features. It leaves the
            // equivalent AutoEncoderNew unchanged.
            tensors = without_input_bias(&tensors)?;
            trainer["dict_class"] = "AutoEncoderNew".into();
        }
        torch_file::write(&dir.join("ae.pt"), &tensors)?;
        tensors::write_file(&dir.join("config.json"), serde_json::to_string_pretty(&config)?.as_bytes())
    }

    fn writes(&self) -> bool {
        true
    }

    fn is_in(&self, dir: &Path) -> bool {
        dir.join("config.json").is_file() && [OWN, "ae.pt"].into_iter().any(|file| dir.join(file).is_file())
    }

    fn python(&self, sae: Option<&Saved>) -> Option<Python> {
        let sae = sae.filter(|sae| sae.dir.join("ae.pt").is_file())?;
        // The library never normalises, computes in float32, and folds an AutoEncoder's norms.
        let class = sae.dictionary.class();
        let plain = sae.normalization.is_none() && sae.config["trainer"]["dtype"].is_null();
        let same = plain && (class != "AutoEncoder" || has_unit_norms(&sae.dictionary.state_dict()));
        (same && CLASSES.contains(&class)).then_some(Python {
            library: "[dictionary_learning](https://github.com/saprmarks/dictionary_learning)",
            import: "from dictionary_learning.utils import load_dictionary",
            load: "dictionary, config = load_dictionary(folder, device=\"cpu\")",
        })
    }
}

/// Whether the columns of an AutoEncoder's decoder have norm 1, tested as in the reference's loader.
fn has_unit_norms(tensors: &[(&str, Tensor)]) -> bool {
    let decoder = tensors.iter().find(|(name, _)| *name == "decoder.weight");
    decoder.is_none_or(|(_, decoder)| {
        let norms = decoder.norm_scalaropt_dim(2.0, [0], false);
        norms.allclose(&norms.ones_like(), 1e-5, 1e-8, false)
    })
}

/// Returns an AutoEncoder's tensors as those of an equivalent AutoEncoderNew: W (x − b) + b_e = W x + (b_e − W b).
fn without_input_bias(tensors: &[(&'static str, Tensor)]) -> Result<Vec<(&'static str, Tensor)>> {
    let get = |name: &str| {
        let found = tensors.iter().find(|(known, _)| *known == name).map(|(_, tensor)| tensor.detach());
        found.with_context(|| format!("the AutoEncoder has no tensor `{name}`"))
    };
    let (encoder, bias) = (get("encoder.weight")?, get("bias")?);
    let moved = dictlearn_core::formats::through(&bias, &encoder.transpose(0, 1));
    let encoder_bias = (get("encoder.bias")?.to_kind(Kind::Double) - moved).to_kind(Kind::Float);
    Ok(vec![
        ("encoder.weight", encoder),
        ("encoder.bias", encoder_bias),
        ("decoder.weight", get("decoder.weight")?),
        ("decoder.bias", bias),
    ])
}

/// Reads a dictionary from the contents of its .pt file and its config.json, if there is one.
fn published(value: &torch_file::Value, name: &str, config: Option<Value>) -> Result<Published> {
    let (mut tensors, scale) = saved::state_dict(value, name)?;
    let trainer = config.as_ref().and_then(|config| config.get("trainer")).cloned().unwrap_or(Value::Null);
    let class = match trainer.get("dict_class").and_then(Value::as_str).map(short) {
        Some(class) => class.to_owned(),
        None => by_tensors(&tensors)?.to_owned(),
    };
    if !CLASSES.contains(&class.as_str()) {
        bail!(
            InputError::new(format!("the class `{class}` is not supported"))
                .help(format!("supported: {}", CLASSES.join(", ")))
        );
    }
    // Older files of these classes have no threshold, and k only in the config.
    let k = trainer.get("k").and_then(Value::as_i64);
    if ["AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"].contains(&class.as_str()) {
        if let (false, Some(k)) = (tensors.contains_key("k"), k.and_then(|k| i32::try_from(k).ok())) {
            tensors.insert("k".to_owned(), Tensor::from(k));
        }
        tensors.entry("threshold".to_owned()).or_insert_with(|| Tensor::from(-1f32));
    }
    // They differ if k was still being annealed. The reference requires them to agree; here the weights count.
    let mut notes = Vec::new();
    if let (Some(said), Some(tensor)) = (k, tensors.get("k"))
        && tensor.numel() == 1
        && tensor.double_value(&vec![0; tensor.dim()]) as i64 != said
    {
        notes.push(format!("config.json says k is {said}, but the weights have another k, which is used"));
    }
    let site = config.as_ref().and_then(site);
    let mut kept = trainer.as_object().cloned().unwrap_or_default();
    kept.remove("device");
    Ok(Published { class, tensors, site, trainer: kept, scale, pretrained: true, notes, ..Published::default() })
}

/// Strips the module from a class name, also from the form in which Python prints it.
fn short(name: &str) -> &str {
    let name = name.trim_start_matches("<class '").trim_end_matches("'>");
    name.rsplit('.').next().unwrap_or(name)
}

/// Infers the class from the names of the tensors.
fn by_tensors(tensors: &BTreeMap<String, Tensor>) -> Result<&'static str> {
    let has = |name: &str| tensors.contains_key(name);
    Ok(match () {
        () if has("gate_bias") => "GatedAutoEncoder",
        () if has("group_sizes") => "MatryoshkaBatchTopKSAE",
        () if has("W_enc") && has("threshold") => "JumpReluAutoEncoder",
        // TopK and BatchTopK have the same tensors but select differently.
        () if has("b_dec") && has("encoder.weight") => {
            bail!(
                InputError::new("the weights could belong to AutoEncoderTopK or to BatchTopKSAE").help(
                    "add a config.json beside them: {\"trainer\": {\"dict_class\": \"AutoEncoderTopK\", \"k\": 32}}"
                )
            )
        }
        () if has("bias") && has("encoder.weight") => "AutoEncoder",
        () if has("decoder.bias") && has("encoder.weight") => "AutoEncoderNew",
        () => bail!(
            InputError::new("the weights match no class of the reference")
                .help(format!("tensors found: {}", tensors.keys().cloned().collect::<Vec<_>>().join(", ")))
        ),
    })
}

/// The site in the model, from config.json.
fn site(config: &Value) -> Option<ModelSite> {
    let (trainer, buffer) = (&config["trainer"], &config["buffer"]);
    // dictlearn writes it under `buffer`, with all its settings.
    let model = buffer["model"].as_str().or(trainer["lm_name"].as_str()).filter(|name| !name.is_empty())?;
    let layer = trainer["layer"].as_u64();
    let named = buffer["submodule"].as_str().or(trainer["submodule_name"].as_str()).filter(|name| !name.is_empty());
    let submodule = match (named, layer) {
        // A module's path contains dots; a custom name such as resid_post_layer_3 does not.
        (Some(path), _) if path.contains('.') => path.to_owned(),
        (Some(name), Some(layer)) => {
            let hook = [("resid", "hook_resid_post"), ("mlp", "hook_mlp_out"), ("att", "hook_attn_out")];
            let (_, hook) = hook.iter().find(|(part, _)| name.contains(part))?;
            format!("blocks.{layer}.{hook}")
        }
        (None, Some(layer)) => format!("blocks.{layer}.hook_resid_post"),
        (Some(_), None) | (None, None) => return None,
    };
    let io = match buffer["io"].as_str() {
        Some("in") => Some("in"),
        Some("out") => Some("out"),
        Some("in_and_out" | "in_to_out") => Some("in_to_out"),
        _ => None,
    };
    Some(ModelSite {
        model: model.to_owned(),
        io: io.filter(|_| submodule.contains('.') && !submodule.starts_with("blocks.")),
        submodule,
        ctx_len: buffer["ctx_len"].as_i64().filter(|length| *length > 0),
        target: buffer["target"].as_str().map(str::to_owned),
        head: buffer["head"].as_i64(),
        prepend_bos: buffer["prepend_bos"].as_bool(),
        dataset: buffer["text"]["repo"].as_str().map(str::to_owned),
        center: buffer["center"] == true,
    })
}

/// Downloads a file of a repository on the Hub; returns its path in the cache.
fn hub_file(repo: &str, path: &str) -> Result<PathBuf> {
    let Some(repo) = Repo::parse(RepoKind::Model, repo) else { bail!("`{repo}` is not a repository") };
    match hub()?.file(&repo, path)? {
        Some(file) => Ok(file),
        None => bail!(InputError::new(format!("{repo} has no {path}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_names_are_stripped_of_their_module() {
        assert_eq!(short("<class 'dictionary_learning.dictionary.AutoEncoder'>"), "AutoEncoder");
        assert_eq!(short("AutoEncoderTopK"), "AutoEncoderTopK");
    }
}
