//! Llama Scope: JumpReLU SAEs on every layer of Llama 3.1 8B.
//!
//! He et al. 2024, *Llama Scope*, <https://arxiv.org/abs/2410.20526>: `hyperparams.json` and `checkpoints/final.safetensors`
//! in a folder such as `Llama3_1-8B-Base-L3R-8x`. They were trained on activations times s = √d / (their mean norm), which is
//! folded into the weights as sae_lens does, so that features have its scale:
//!
//! ```text
//! f = π ⊙ H(π − θ s),  π = s x W_enc + b_enc          x̂ = (f W_dec + b_dec) / s
//! ```
//!
//! Those on DeepSeek-R1-Distill have `config.json`, `sae_weights.safetensors` and a threshold for each feature, which needs
//! no factor.

use dictlearn_core::format::{take, Activation, Affine, Format, ModelSite, Place, Published};
use dictlearn_core::prelude::*;
use dictlearn_core::tensors::TensorFile;

const NAME: &str = "llama_scope";

/// A folder with hyperparams.json and checkpoints/final.safetensors, or of those on DeepSeek-R1-Distill config.json and
/// sae_weights.safetensors. The scale of activations in training is folded into the weights as sae_lens does, so that
/// features have the same values as there.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LlamaScope {}

register! {
    format LlamaScope, NAME,
    summary: "hyperparams.json and checkpoints/final.safetensors of Llama Scope",
    paper: "He et al. 2024, Llama Scope, https://arxiv.org/abs/2410.20526",
    example: "dictlearn import llama_scope fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x",
}

#[typetag::serde(name = NAME)]
impl Format for LlamaScope {
    fn read(&self, place: &Place) -> Result<Published> {
        let distilled = place.file("hyperparams.json")?.is_none() && place.file("sae_weights.safetensors")?.is_some();
        let (config, weights) = match distilled {
            true => (place.json("config.json")?, place.need("sae_weights.safetensors")?),
            false => (place.json("hyperparams.json")?, place.need("checkpoints/final.safetensors")?),
        };
        for (key, usual) in [("apply_decoder_bias_to_pre_encoder", false), ("use_glu_encoder", false)] {
            if config.get(key).and_then(Value::as_bool).is_some_and(|value| value != usual) {
                bail!(InputError::new(format!("`{key}: {}` is not supported", !usual))
                    .help("Llama Scope's SAEs do not have it"));
            }
        }
        if let Some(other) = config.get("act_fn").and_then(Value::as_str).filter(|name| *name != "jumprelu") {
            bail!(
                InputError::new(format!("`act_fn: {other}` is not supported")).help("Llama Scope's SAEs have jumprelu")
            );
        }
        let mut tensors = TensorFile::open(&weights)?.tensors()?;
        for (name, tensor) in &mut tensors {
            if !tensor.is_floating_point() {
                bail!(InputError::new(format!("tensor `{name}` has the type {:?}", tensor.kind())));
            }
            *tensor = tensor.to_kind(Kind::Float);
        }
        let turned = |tensor: Tensor| -> Result<Tensor> {
            if tensor.dim() != 2 {
                bail!(InputError::new(format!("a weight has shape {:?}, not two dimensions", tensor.size())));
            }
            Ok(tensor.transpose(0, 1).contiguous())
        };
        let w_enc = turned(take(&mut tensors, "encoder.weight")?)?;
        let w_dec = turned(take(&mut tensors, "decoder.weight")?)?;
        let (b_enc, b_dec) = (take(&mut tensors, "encoder.bias")?, take(&mut tensors, "decoder.bias")?);
        let root = (w_enc.size()[0] as f64).sqrt();
        let norm = config.pointer("/dataset_average_activation_norm/in").and_then(Value::as_f64);
        let said = place.table.get("norm_scaling_factor").and_then(Value::as_f64);
        let scale = norm.map(|norm| root / norm).or(said).filter(|scale| *scale > 0.0 && scale.is_finite());
        let Some(scale) = scale else {
            bail!(InputError::new("the mean norm of the activations is not said")
                .help("it is `dataset_average_activation_norm.in` of hyperparams.json, or `norm_scaling_factor` of the table \
                       of releases"));
        };
        let threshold =
            match (tensors.remove("log_jumprelu_threshold"), config["jump_relu_threshold"].as_f64()) {
                (Some(threshold), _) => threshold.exp(),
                (None, Some(threshold)) => b_enc.ones_like() * (threshold * scale),
                (None, None) => bail!(InputError::new("the threshold is not said")
                    .help("it is `jump_relu_threshold` of hyperparams.json")),
            };
        let affine = Affine {
            w_enc: w_enc * scale,
            b_enc,
            w_dec: w_dec / scale,
            b_dec: b_dec / scale,
            w_skip: None,
            subtract_b_dec: false,
            transcodes: false,
            activation: Activation::Jump(threshold),
        };
        let (d, features, _) = affine.check()?;
        for (key, found) in [("d_model", d), ("d_sae", features)] {
            if let Some(said) = config.get(key).and_then(Value::as_i64).filter(|said| *said != found) {
                bail!(InputError::new(format!("`{key}` is {said}, and the weights say {found}")));
            }
        }
        let site = config.get("hook_point_in").and_then(Value::as_str).map(|hook| ModelSite {
            model: if place.words().contains("R1-Distill") {
                "deepseek-ai/DeepSeek-R1-Distill-Llama-8B".to_owned()
            } else {
                "meta-llama/Llama-3.1-8B".to_owned()
            },
            submodule: hook.to_owned(),
            prepend_bos: Some(true),
            ctx_len: Some(1024),
            dataset: Some("cerebras/SlimPajama-627B".to_owned()),
            ..ModelSite::default()
        });
        let (class, tensors) = affine.into_class()?;
        Ok(Published { class: class.to_owned(), tensors, site, ..Published::default() })
    }
}
