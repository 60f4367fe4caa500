//! Temporal SAEs: `conf.yaml` and `latest_ckpt.safetensors` in a folder `{model}/layer_{n}/temporal`.
//!
//! Lubana et al. 2025, *Priors in Time*, <https://arxiv.org/abs/2511.01836>, published as
//! <https://huggingface.co/canrager/temporalSAEs>. The dictionary `TemporalSAE` states the equations. Tensors: `D` [F, d],
//! `b` `[d]`, `E` [d, F] unless tied, and for each attention layer `attn_layers.{i}.{q_target,k_ctx,v_ctx,c_proj}`.

use dictlearn_core::files;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::formats::{Format, ModelSite, Place, Published, agrees, nothing_left, take_float};
use dictlearn_core::prelude::*;

/// A folder with conf.yaml and latest_ckpt.safetensors. Features of a position depend on the positions before it, so
/// activations must come as whole contexts.
#[component(format "temporal", summary = "conf.yaml and latest_ckpt.safetensors of temporal SAEs",
    paper = "Lubana et al. 2025, Priors in Time, https://arxiv.org/abs/2511.01836",
    example = "dictlearn import temporal canrager/temporalSAEs/gemma-2-2B/layer_12/temporal")]
pub struct TemporalFormat {}

/// The projections of an attention layer.
const PROJECTIONS: [&str; 4] = ["q_target", "k_ctx", "v_ctx", "c_proj"];

impl Format for TemporalFormat {
    fn marks(&self) -> &'static [&'static str] {
        &["latest_ckpt.safetensors"]
    }

    fn read(&self, place: &Place) -> Result<Published> {
        let conf = place.need("conf.yaml")?;
        let conf: Value = files::from_yaml(&files::read_text(&conf)?)
            .map_err(|error| InputError::new(format!("cannot read conf.yaml: {}", error.message())))?;
        let mut tensors = TensorFile::open(&place.need("latest_ckpt.safetensors")?)?.tensors()?;
        let w_dec = take_float::<2>(&mut tensors, "D")?;
        let b_dec = take_float::<1>(&mut tensors, "b")?;
        let (features, d) = w_dec.size2()?;
        let fits = |name: &str, tensor: &Tensor, wanted: &[i64]| -> Result<()> {
            if tensor.size() != wanted {
                bail!(InputError::new(format!("tensor `{name}` has shape {:?}, not {wanted:?}", tensor.size())));
            }
            Ok(())
        };
        fits("b", &b_dec, &[d])?;

        // Sizes come from the tensors; a config that contradicts them is refused.
        let whole = |key: &str| count(&conf, &format!("/sae/{key}"));
        if let Some(said) = count(&conf, "/llm/dimin")? {
            agrees("conf.yaml: `llm.dimin`", said, d)?;
        }
        if let Some(factor) = number(&conf, "/sae/exp_factor")? {
            agrees("conf.yaml: `llm.dimin` times `sae.exp_factor`", (d as f64 * factor) as i64, features)?;
        }
        let tied = match conf.pointer("/sae/tied_weights") {
            None | Some(Value::Null) => !tensors.contains_key("E"),
            Some(Value::Bool(tied)) => *tied,
            Some(other) => bail!(refused("/sae/tied_weights", other, "true or false")),
        };
        if tied == tensors.contains_key("E") {
            bail!(InputError::new(format!(
                "conf.yaml: `sae.tied_weights` is {tied}, but the weights {} `E`",
                if tied { "have" } else { "have no" }
            )));
        }
        let kval_topk = match conf.pointer("/sae/sae_diff_type").and_then(Value::as_str) {
            // Without k, all positive features are kept.
            Some("topk") => whole("kval_topk")?.unwrap_or(0),
            Some("relu") => 0,
            _ => bail!(refused(
                "/sae/sae_diff_type",
                conf.pointer("/sae/sae_diff_type").unwrap_or(&Value::Null),
                "relu or topk"
            )),
        };
        if let Some(kind) = conf.pointer("/sae/sae_type").filter(|kind| *kind != "temporal") {
            bail!(refused("/sae/sae_type", kind, "temporal"));
        }
        let Some(scaling_factor) = number(&conf, "/sae/scaling_factor")? else {
            bail!(InputError::new("conf.yaml has no `sae.scaling_factor`"));
        };
        let Some(n_heads) = whole("n_heads")? else { bail!(InputError::new("conf.yaml has no `sae.n_heads`")) };

        let layers =
            (0_i64..).take_while(|n| tensors.contains_key(&format!("attn_layers.{n}.q_target.weight"))).count();
        if layers == 0 {
            bail!(InputError::new("tensor `attn_layers.0.q_target.weight` is missing"));
        }
        if let Some(said) = whole("n_attn_layers")? {
            agrees("conf.yaml: `sae.n_attn_layers`", said, layers as i64)?;
        }
        let mut published = std::collections::BTreeMap::new();
        let mut bottleneck = None;
        for projection in PROJECTIONS {
            let (mut weights, mut biases) = (Vec::new(), Vec::new());
            for layer in 0..layers {
                let name = format!("attn_layers.{layer}.{projection}");
                let weight = take_float::<2>(&mut tensors, &format!("{name}.weight"))?;
                let bias = take_float::<1>(&mut tensors, &format!("{name}.bias"))?;
                // Queries and keys are narrower than the features.
                let out = match projection {
                    "q_target" | "k_ctx" => *bottleneck.get_or_insert(weight.size()[0]),
                    _ => features,
                };
                fits(&format!("{name}.weight"), &weight, &[out, features])?;
                fits(&format!("{name}.bias"), &bias, &[out])?;
                weights.push(weight);
                biases.push(bias);
            }
            published.insert(format!("attn.{projection}.weight"), Tensor::stack(&weights, 0));
            published.insert(format!("attn.{projection}.bias"), Tensor::stack(&biases, 0));
        }
        if let (Some(factor), Some(width)) = (whole("bottleneck_factor")?, bottleneck) {
            agrees("the number of features divided by conf.yaml's `sae.bottleneck_factor`", features / factor, width)?;
        }
        if !tied {
            let w_enc = take_float::<2>(&mut tensors, "E")?;
            fits("E", &w_enc, &[d, features])?;
            published.insert("W_enc".to_owned(), w_enc);
        }
        nothing_left(&tensors)?;
        for (name, tensor) in [
            ("W_dec", w_dec),
            ("b_dec", b_dec),
            ("n_heads", Tensor::from(n_heads)),
            ("kval_topk", Tensor::from(kval_topk)),
            ("scaling_factor", Tensor::from(scaling_factor as f32)),
        ] {
            published.insert(name.to_owned(), tensor);
        }
        let site = site(&place.words());
        let notes = match site {
            Some(_) => Vec::new(),
            None => vec![
                "the path does not name the model and layer: `eval` and `encode --text` will need `source.model` and \
                 `source.submodule`"
                    .to_owned(),
            ],
        };
        Ok(Published { class: "TemporalSAE".to_owned(), tensors: published, site, notes, ..Published::default() })
    }
}

/// Returns the error for a value that cannot be read.
fn refused(pointer: &str, value: &Value, wanted: &str) -> InputError {
    let key = pointer.trim_matches('/').replace('/', ".");
    InputError::new(format!("conf.yaml: `{key}` is {value}, but must be {wanted}"))
}

/// Returns a number above 0; absent and null are the same.
fn number(conf: &Value, pointer: &str) -> Result<Option<f64>> {
    match conf.pointer(pointer) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64().filter(|n| n.is_finite() && *n as f32 > 0.0) {
            Some(n) => Ok(Some(n)),
            None => bail!(refused(pointer, value, "a number above 0")),
        },
    }
}

/// Returns a whole number above 0; absent and null are the same.
fn count(conf: &Value, pointer: &str) -> Result<Option<i64>> {
    match conf.pointer(pointer) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_i64().filter(|n| *n > 0) {
            Some(n) => Ok(Some(n)),
            None => bail!(refused(pointer, value, "a whole number above 0")),
        },
    }
}

/// Returns the site of a path `{model}/layer_{n}/temporal`.
fn site(words: &str) -> Option<ModelSite> {
    let parts: Vec<&str> = words.split('/').filter(|part| !part.is_empty()).collect();
    let (at, layer) = parts.iter().enumerate().rev().find_map(|(at, part)| {
        let layer: u64 = part.strip_prefix("layer_")?.parse().ok()?;
        Some((at, layer))
    })?;
    let name = parts[at.checked_sub(1)?].to_lowercase();
    let model = match name.split_once('-')? {
        ("gemma", _) => format!("google/{name}"),
        ("llama", size) => format!("meta-llama/Llama-{}", size.to_uppercase()),
        _ => return None,
    };
    Some(ModelSite {
        model,
        submodule: format!("blocks.{layer}.hook_resid_post"),
        prepend_bos: Some(true),
        dataset: Some("monology/pile-uncopyrighted".to_owned()),
        ..ModelSite::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_are_read_from_paths() {
        for (words, model, submodule) in [
            ("canrager/temporalSAEs/gemma-2-2B/layer_12/temporal", "google/gemma-2-2b", "blocks.12.hook_resid_post"),
            ("x/llama-3.1-8B/layer_26/temporal", "meta-llama/Llama-3.1-8B", "blocks.26.hook_resid_post"),
        ] {
            let site = site(words).unwrap();
            assert_eq!((site.model.as_str(), site.submodule.as_str()), (model, submodule));
        }
        assert!(site("x/layer_26/temporal").is_none() && site("layer_2").is_none());
    }
}
