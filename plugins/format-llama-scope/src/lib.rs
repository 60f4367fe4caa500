//! Llama Scope: JumpReLU SAEs and transcoders on every layer of Llama 3.1 8B.
//!
//! He et al. 2024, *Llama Scope*, <https://arxiv.org/abs/2410.20526>: `hyperparams.json` and
//! `checkpoints/final.safetensors` in a folder such as `Llama3_1-8B-Base-L3R-8x`. They were trained on activations
//! multiplied by s = √d / (their mean norm); a transcoder's targets have their own factor s'. Both are folded into the
//! weights as in sae_lens, so that features have the same scale as there:
//!
//! ```text
//! f = π ⊙ H(π − t),  π = s x W_enc + b_enc          x̂ = (f W_dec + b_dec) / s'
//! t = θ s; with `sparsity_include_decoder_norm` t = θ s' / ‖W_dec‖, by each feature's row
//! ```
//!
//! With that flag, the authors compare θ with the norm of a feature's contribution, ‖f W_dec‖ / s', in the activations'
//! own units (`from_config` of <https://github.com/OpenMOSS/Language-Model-SAEs> at b9326392); sae_lens 6 leaves the
//! norms out.
//!
//! The SAEs on DeepSeek-R1-Distill have `config.json`, `sae_weights.safetensors` and a threshold for each feature in
//! units of π: t = θ, or θ / ‖W_dec‖ with the flag.

mod r1_distill;

use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::formats::{
    AffineSae, Format, ModelSite, Place, Published, Request, SaeActivation, check_keys, nothing_left, take,
};
use dictlearn_core::prelude::*;

/// Keys that would change the computation; Llama Scope's SAEs do not use them.
const OFF: &[&str] = &["apply_decoder_bias_to_pre_encoder", "use_glu_encoder"];

/// Keys that are read below, and keys that only concern training, in both forms of the config.
const KNOWN: &[&str] = &[
    "act_fn",
    "bias_init_method",
    "d_model",
    "d_sae",
    "dataset_average_activation_norm",
    "ddp_size",
    "decoder_exactly_fixed_norm",
    "device",
    "dtype",
    "expansion_factor",
    "hook_point_in",
    "hook_point_out",
    "init_decoder_norm",
    "init_encoder_norm",
    "init_encoder_with_decoder_transpose",
    "jump_relu_threshold",
    "jumprelu_threshold_window",
    "k_warmup_steps",
    "l1_coefficient",
    "l1_coefficient_warmup_steps",
    "lp",
    "norm_activation",
    "norm_scaling_factor",
    "sae_pretrained_name_or_path",
    "sae_type",
    "seed",
    "sparsity_include_decoder_norm",
    "sparsity_threshold_for_triton_spmm_kernel",
    "strict_loading",
    "top_k",
    "tp_size",
    "use_batch_norm_mse",
    "use_decoder_bias",
    "use_ghost_grads",
    "use_triton_kernel",
    "exp_name",
    "exp_series",
    "exp_result_path",
];

/// A folder with hyperparams.json and checkpoints/final.safetensors; for DeepSeek-R1-Distill, config.json and
/// sae_weights.safetensors. The training scale of activations is folded into the weights as in sae_lens, so that
/// features have the same values. With `sparsity_include_decoder_norm`, thresholds are in units of each feature's
/// decoder norm, as in the authors' code; sae_lens leaves the norms out.
#[component(format "llama_scope", summary = "hyperparams.json and checkpoints/final.safetensors of Llama Scope",
    paper = "He et al. 2024, Llama Scope, https://arxiv.org/abs/2410.20526",
    example = "dictlearn import llama_scope fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x")]
pub struct LlamaScope {}

impl Format for LlamaScope {
    fn marks(&self) -> &'static [&'static str] {
        &["hyperparams.json"]
    }

    fn read(&self, place: &Place) -> Result<Published> {
        read(place)
    }
}

/// A folder `{mixture}/L{n}R` with config.json and sae_weights.safetensors. The files lack the scale of activations in
/// training; it comes from a list of the published SAEs, by the folder's name, or from sae_lens's table
/// (`--releases FILE`). With `sparsity_include_decoder_norm`, thresholds are in units of each feature's decoder norm, as
/// in the authors' code; sae_lens leaves the norms out.
#[component(format "llama_scope_r1_distill",
    summary = "config.json and sae_weights.safetensors of Llama Scope's SAEs on DeepSeek-R1-Distill",
    paper = "He et al. 2024, Llama Scope, https://arxiv.org/abs/2410.20526",
    example = "dictlearn import llama_scope_r1_distill fnlp/Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L15R")]
pub struct LlamaScopeR1Distill {}

impl Format for LlamaScopeR1Distill {
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        let mut place = Place::parse(request.named()?)?;
        if let Some(releases) = &request.releases {
            let Some(factor) = r1_distill::listed(releases, &place.words())? else {
                bail!(
                    InputError::new(format!("{releases} has no `norm_scaling_factor` for {place}"))
                        .help("its `path` must be the end of the folder's path")
                );
            };
            place.table.insert(r1_distill::KEY.to_owned(), factor.into());
        }
        Ok(vec![place])
    }

    fn read(&self, place: &Place) -> Result<Published> {
        place.need("sae_weights.safetensors")?;
        read(place)
    }
}

fn read(place: &Place) -> Result<Published> {
    let distilled = place.file("hyperparams.json")?.is_none() && place.file("sae_weights.safetensors")?.is_some();
    let (file, weights) = match distilled {
        true => ("config.json", place.need("sae_weights.safetensors")?),
        false => ("hyperparams.json", place.need("checkpoints/final.safetensors")?),
    };
    let config = place.json(file)?;
    let note = check_keys(&config, file, OFF, KNOWN)?;
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    let flag = |key: &str| match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(other) => Err(InputError::new(format!("{file}: `{key}` is {other}, but must be true or false"))),
    };
    let only = |key: &str, supported: &[&str]| match text(key) {
        Some(other) if !supported.contains(&other.to_lowercase().as_str()) => {
            Err(InputError::new(format!("{file}: `{key}: {other}` is not supported"))
                .help(format!("supported: {}", supported.join(", "))))
        }
        _ => Ok(()),
    };
    only("sae_type", &["sae"])?;
    only("act_fn", &["jumprelu", "relu", "topk"])?;
    only("norm_activation", &["dataset-wise", "inference", "none"])?;

    let mut tensors = TensorFile::open(&weights)?.tensors()?;
    for (name, tensor) in &mut tensors {
        if !tensor.is_floating_point() {
            bail!(InputError::new(format!(
                "tensor `{name}` has the type {:?}, but must be floating point",
                tensor.kind()
            )));
        }
        *tensor = tensor.to_kind(Kind::Float);
    }
    let turned = |tensor: Tensor| -> Result<Tensor> {
        if tensor.dim() != 2 {
            bail!(InputError::new(format!("a weight has shape {:?}, but must have two dimensions", tensor.size())));
        }
        Ok(tensor.transpose(0, 1).contiguous())
    };
    let w_enc = turned(take(&mut tensors, "encoder.weight")?)?;
    let w_dec = turned(take(&mut tensors, "decoder.weight")?)?;
    let b_enc = take(&mut tensors, "encoder.bias")?;
    let b_dec = match flag("use_decoder_bias")? {
        Some(false) => Tensor::zeros(&w_dec.size()[1..], (Kind::Float, Device::Cpu)),
        _ => take(&mut tensors, "decoder.bias")?,
    };
    let log_threshold = if distilled { tensors.remove("log_jumprelu_threshold") } else { None };
    nothing_left(&tensors)?;

    let (scale, scale_out) = scales(&config, place, w_enc.size()[0])?;
    let norms = match flag("sparsity_include_decoder_norm")? {
        Some(true) => Some(w_dec.norm_scalaropt_dim(2.0, [1], false)),
        _ => None,
    };
    let jump = |threshold: Tensor| -> Result<SaeActivation> {
        let Some(norms) = &norms else { return Ok(SaeActivation::Jump(threshold)) };
        if threshold.size() != norms.size() {
            let (found, wanted) = (threshold.size(), norms.size());
            bail!(InputError::new(format!(
                "the thresholds have shape {found:?}, but the decoder's rows need {wanted:?}"
            )));
        }
        // A feature with decoder norm 0 never fires.
        Ok(SaeActivation::Jump((threshold / norms).masked_fill(&norms.le(0.0), f64::INFINITY)))
    };
    let threshold = config.get("jump_relu_threshold").and_then(Value::as_f64);
    let activation = match (log_threshold, text("act_fn").map(str::to_lowercase).as_deref(), threshold) {
        (Some(threshold), Some("jumprelu") | None, _) => jump(threshold.exp())?,
        (None, Some("relu"), _) => SaeActivation::Relu,
        // The authors' code treats a topk with a threshold as jumprelu.
        (None, act_fn, Some(threshold)) if act_fn != Some("topk") || threshold > 0.0 => {
            let unit = if norms.is_some() { scale_out } else { scale };
            jump(b_enc.ones_like() * (threshold * unit))?
        }
        (_, Some(act_fn @ ("topk" | "relu")), _) => bail!(
            InputError::new(format!("{file}: `act_fn: {act_fn}` is not supported with these thresholds"))
                .help("supported: jumprelu, topk with a `jump_relu_threshold`, and relu without a threshold")
        ),
        _ => bail!(
            InputError::new(match config.get("jump_relu_threshold").filter(|value| !value.is_null()) {
                Some(value) => format!("{file}: `jump_relu_threshold` is {value}, but must be a number"),
                None => format!("{file} has no `jump_relu_threshold`"),
            })
            .help("the authors' files give the threshold of all features there")
        ),
    };
    let reads = text("hook_point_in");
    let writes = text("hook_point_out").filter(|writes| reads.is_some_and(|reads| reads != *writes));
    let affine = AffineSae {
        w_enc: w_enc * scale,
        b_enc,
        w_dec: w_dec / scale_out,
        b_dec: b_dec / scale_out,
        w_skip: None,
        subtract_b_dec: false,
        transcodes: writes.is_some(),
        activation,
    };
    let (d, features, _) = affine.check()?;
    for (key, found) in [("d_model", d), ("d_sae", features)] {
        if let Some(said) = config.get(key).and_then(Value::as_i64).filter(|said| *said != found) {
            bail!(InputError::new(format!("`{key}` is {said}, but the weights have {found}")));
        }
    }
    let site = reads.map(|hook| ModelSite {
        model: if place.words().contains("R1-Distill") {
            "deepseek-ai/DeepSeek-R1-Distill-Llama-8B".to_owned()
        } else {
            "meta-llama/Llama-3.1-8B".to_owned()
        },
        submodule: hook.to_owned(),
        target: writes.map(str::to_owned),
        prepend_bos: Some(true),
        ctx_len: Some(1024),
        dataset: Some("cerebras/SlimPajama-627B".to_owned()),
        ..ModelSite::default()
    });
    let mut trainer = Map::new();
    if writes.is_some() {
        trainer.insert("transcodes".to_owned(), true.into());
    }
    let (class, tensors) = affine.into_class()?;
    let notes = note.into_iter().collect();
    Ok(Published { class: class.to_owned(), tensors, site, trainer, notes, ..Published::default() })
}

/// Returns the training factors of the input activations and of the reconstructed ones.
fn scales(config: &Value, place: &Place, d: i64) -> Result<(f64, f64)> {
    let said = place.table.get(r1_distill::KEY).or(config.get(r1_distill::KEY)).and_then(Value::as_f64);
    let said = said.or_else(|| r1_distill::published(&place.words()));
    if said.is_none() && config["norm_activation"].as_str().is_some_and(|way| !way.eq_ignore_ascii_case("dataset-wise"))
    {
        // The factors are folded in already, or there were none.
        return Ok((1.0, 1.0));
    }
    let root = (d as f64).sqrt();
    let of = |end: &str| {
        let norm = config.pointer(&format!("/dataset_average_activation_norm/{end}")).and_then(Value::as_f64);
        norm.map(|norm| root / norm)
    };
    let scale = of("in").or(said);
    let scales = [scale, of("out").or(scale)].map(|scale| scale.filter(|scale| *scale > 0.0 && scale.is_finite()));
    let [Some(scale), Some(scale_out)] = scales else {
        bail!(InputError::new("the mean norm of the activations is missing or not positive").help(
            "set `dataset_average_activation_norm` in hyperparams.json, or `norm_scaling_factor` in config.json or the \
             releases table"
        ));
    };
    Ok((scale, scale_out))
}
