//! openai/sparse_autoencoder: a state dict in one .pt file.
//!
//! Gao et al. 2024, *Scaling and evaluating sparse autoencoders*, <https://arxiv.org/abs/2406.04093>, and the code at
//! <https://github.com/openai/sparse_autoencoder>:
//!
//! ```text
//! f = σ(W_enc (norm(x) − b_pre) + b_latent)          σ: ReLU, or the k largest of ReLU
//! x̂ = norm⁻¹(W_dec f + b_pre)                        norm: layer norm of x, with TopK only
//! ```

use dictlearn_core::files::torch_file;
use dictlearn_core::formats::{AffineSae, Format, ModelSite, Place, Published, SaeActivation, take};
use dictlearn_core::prelude::*;

/// A .pt file of openai/sparse_autoencoder, with ReLU, or TopK and its layer norm. No code in the file is run.
#[component(format "openai", summary = "openai/sparse_autoencoder's .pt files, with their layer norm",
    paper = "Gao et al. 2024, https://github.com/openai/sparse_autoencoder",
    example = "dictlearn import openai resid_post_mlp_v5_32k/autoencoders/8.pt")]
pub struct OpenAi {}

impl Format for OpenAi {
    fn read(&self, place: &Place) -> Result<Published> {
        let file = match place.file("")? {
            Some(file) => file,
            None => {
                let files = place.files()?;
                let found: Vec<&String> = files.iter().filter(|file| file.ends_with(".pt")).collect();
                match found[..] {
                    [only] => place.need(only)?,
                    _ => bail!(
                        InputError::new(format!("{place} is not a .pt file"))
                            .help("name the file: each of openai's SAEs is one .pt file")
                    ),
                }
            }
        };
        let value = torch_file::read(&file)?;
        let mut tensors = std::collections::BTreeMap::new();
        for name in ["pre_bias", "encoder.weight", "latent_bias", "decoder.weight"] {
            if let Some(tensor) = value.get(name).and_then(torch_file::Value::as_tensor) {
                tensors.insert(name.to_owned(), tensor.shallow_clone());
            }
        }
        // Training statistics are ignored. The activation's fields and tied weights are saved twice.
        let known = ["pre_bias", "encoder.weight", "latent_bias", "decoder.weight", "decoder.linear.weight"];
        let statistics = ["stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"];
        let others: Vec<&str> = value
            .as_dict()
            .into_iter()
            .flatten()
            .filter_map(|(name, _)| name.as_str())
            .filter(|name| !known.contains(name) && !statistics.contains(name) && !name.starts_with("activation"))
            .collect();
        if !others.is_empty() {
            bail!(InputError::new(format!("the file has unknown entries: {}", others.join(", "))));
        }
        let activation = value.get("activation").and_then(torch_file::Value::as_str).unwrap_or("ReLU");
        let state = value.get("activation_state_dict");
        let (activation, normalization) = match activation {
            "ReLU" => (SaeActivation::Relu, None),
            "TopK" => {
                let after = state.and_then(|state| state.get("postact_fn")).and_then(torch_file::Value::as_str);
                if after.is_some_and(|after| after != "ReLU") {
                    bail!(
                        InputError::new(format!("TopK followed by `{}` is not supported", after.unwrap_or_default()))
                            .help("features could be negative; only ReLU is supported")
                    );
                }
                let Some(k) = state.and_then(|state| state.get("k")).and_then(torch_file::Value::as_i64) else {
                    bail!(InputError::new("the file has no `k`"));
                };
                let kind = NormalizationKind::LayerNorm;
                (SaeActivation::TopK(k), Some(Normalization { kind, input_only: false }))
            }
            other => bail!(
                InputError::new(format!("the activation `{other}` is not supported")).help("supported: ReLU and TopK")
            ),
        };
        let matrix = |tensor: Tensor| -> Result<Tensor> {
            if tensor.dim() != 2 {
                bail!(InputError::new(format!("a weight has shape {:?}, but must have two dimensions", tensor.size())));
            }
            Ok(tensor)
        };
        let encoder = matrix(take(&mut tensors, "encoder.weight")?)?;
        let w_dec = match tensors.remove("decoder.weight") {
            Some(decoder) => matrix(decoder)?.transpose(0, 1).contiguous(),
            // Tied weights: the decoder is the encoder's transpose.
            None => encoder.contiguous(),
        };
        let affine = AffineSae {
            w_enc: encoder.transpose(0, 1).contiguous(),
            b_enc: take(&mut tensors, "latent_bias")?,
            w_dec,
            b_dec: take(&mut tensors, "pre_bias")?,
            w_skip: None,
            subtract_b_dec: true,
            transcodes: false,
            activation,
        };
        affine.check()?;
        let (class, tensors) = affine.into_class()?;
        Ok(Published {
            class: class.to_owned(),
            tensors,
            normalization,
            site: site(&place.words()),
            ..Published::default()
        })
    }
}

/// The site of an SAE in GPT-2 small, from its published path: `resid_post_mlp_v5_32k/autoencoders/8.pt`.
fn site(words: &str) -> Option<ModelSite> {
    let mut parts = words.trim_end_matches('/').rsplit('/');
    let layer: u64 = parts.next()?.strip_suffix(".pt")?.parse().ok()?;
    let location = parts.find(|part| *part != "autoencoders")?;
    let hook = [
        ("resid_delta_attn", "hook_attn_out"),
        ("resid_delta_mlp", "hook_mlp_out"),
        ("resid_post_attn", "hook_resid_mid"),
        ("resid_post_mlp", "hook_resid_post"),
        ("mlp_post_act", "mlp.hook_post"),
    ];
    let (_, hook) = hook.iter().find(|(start, _)| location.starts_with(start))?;
    Some(ModelSite {
        model: "gpt2".to_owned(),
        submodule: format!("blocks.{layer}.{hook}"),
        prepend_bos: Some(false),
        ctx_len: Some(64),
        ..ModelSite::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_are_read_from_paths() {
        let site = |path| site(path).map(|site| site.submodule);
        assert_eq!(site("x/resid_post_mlp_v5_32k/autoencoders/8.pt").unwrap(), "blocks.8.hook_resid_post");
        assert_eq!(site("x/mlp_post_act/autoencoders/0.pt").unwrap(), "blocks.0.mlp.hook_post");
        assert!(site("x/8.pt").is_none());
    }
}
