//! sparsify, EleutherAI's library of TopK SAEs and transcoders: `cfg.json` and `sae.safetensors`, one folder per
//! module.
//!
//! <https://github.com/EleutherAI/sparsify>. An SAE reconstructs the module's output x as ŷ; a transcoder predicts
//! the module's output as ŷ from its input x:
//!
//! ```text
//! f = TopK(ReLU((x − b_dec) W_encᵀ + b_enc))          transcoders do not subtract b_dec
//! ŷ = f W_dec + b_dec [+ W_skip x]
//! ```

use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::formats::{
    AffineSae, Format, ModelSite, Place, Published, Request, SaeActivation, check_keys, nothing_left, take,
};
use dictlearn_core::prelude::*;

/// Keys of older versions and published branches that change the computation.
const OFF: &[&str] = &[
    "coalesce_topk",
    "cross_layer",
    "divide_cross_layer",
    "encoder_halut",
    "encoder_kron",
    "encoder_monarch",
    "encoder_mpnet",
    "encoder_pkm",
    "ito",
    "logic_layers",
    "matching_pursuit",
    "monet",
    "n_sources",
    "n_targets",
    "normalize_io",
    "optimized_encoder_config",
    "pkm_softmax",
    "post_encoder_scale",
    "post_neurons",
    "signed",
    "slice_decoder",
    "slice_encoder",
    "tied_decoder",
];

/// Keys that are read below, that only concern training, or that have no effect without one of the others.
const KNOWN: &[&str] = &[
    "activation",
    "autocast",
    "d_in",
    "decoder_xformers",
    "e2e_kl_coeff",
    "e2e_mse_coeff",
    "e2e_start",
    "expansion_factor",
    "fff_config",
    "freeze_encoder",
    "group_max_k",
    "init_method",
    "k",
    "kron_in_group",
    "kron_lora",
    "kron_out_group",
    "kron_u",
    "kronecker_config",
    "matryoshka",
    "matryoshka_groups",
    "monarch_inner_dim",
    "monarch_mul",
    "monet_config",
    "mp_aux",
    "mp_detach",
    "mp_encoder",
    "mp_untie",
    "multi_topk",
    "naive_decoder",
    "narrowing",
    "normalize_decoder",
    "normalize_encoder",
    "num_latents",
    "num_layers",
    "per_step_loss",
    "pkm_bias",
    "pkm_config",
    "pkm_heads",
    "pkm_init_scale",
    "pkm_pad",
    "pkm_rand",
    "post_l1_alpha",
    "residual_mode",
    "skip_connection",
    "ste",
    "ste_temperature",
    "ste_thresh_est",
    "topk_coalesced",
    "topk_separate",
    "train_post_encoder",
    "transcode",
];

/// A folder with cfg.json and sae.safetensors, named by its module, or a run with one such folder per module. Reads
/// TopK SAEs and transcoders, with or without a skip connection; the activation `groupmax` is refused.
#[component(format "sparsify", summary = "cfg.json and sae.safetensors of EleutherAI's sparsify",
    paper = "EleutherAI, sparsify, https://github.com/EleutherAI/sparsify",
    example = "dictlearn import sparsify EleutherAI/sae-llama-3-8b-32x/layers.10")]
pub struct Sparsify {}

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

    fn marks(&self) -> &'static [&'static str] {
        &["sae.safetensors"]
    }

    fn read(&self, place: &Place) -> Result<Published> {
        let cfg = place.json("cfg.json")?;
        let flag = |key: &str| match cfg.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(InputError::new(format!("cfg.json: `{key}` is {other}, but must be true or false"))),
        };
        let activation = cfg.get("activation").and_then(Value::as_str).unwrap_or("topk");
        if activation != "topk" {
            bail!(
                InputError::new(format!("the activation `{activation}` is not supported"))
                    .help("only `topk` is supported")
            );
        }
        let note = check_keys(&cfg, "cfg.json", OFF, KNOWN)?;
        let mut tensors = TensorFile::open(&place.need("sae.safetensors")?)?.tensors()?;
        for (name, tensor) in &tensors {
            if !tensor.is_floating_point() {
                bail!(InputError::new(format!(
                    "tensor `{name}` has the type {:?}, but must be floating point",
                    tensor.kind()
                )));
            }
        }
        let Some(k) = cfg.get("k").and_then(Value::as_i64) else {
            bail!(InputError::new("cfg.json has no `k`"));
        };
        let w_enc = take(&mut tensors, "encoder.weight")?;
        if w_enc.dim() != 2 {
            bail!(InputError::new(format!(
                "`encoder.weight` has shape {:?}, but must have two dimensions",
                w_enc.size()
            )));
        }
        let transcodes = flag("transcode")?;
        let affine = AffineSae {
            w_enc: w_enc.transpose(0, 1).contiguous(),
            b_enc: take(&mut tensors, "encoder.bias")?,
            w_dec: take(&mut tensors, "W_dec")?,
            b_dec: take(&mut tensors, "b_dec")?,
            w_skip: tensors.remove("W_skip"),
            subtract_b_dec: !transcodes,
            transcodes,
            activation: SaeActivation::TopK(k),
        };
        if affine.w_skip.is_some() != flag("skip_connection")? {
            bail!(InputError::new("`skip_connection` in cfg.json contradicts `W_skip` in the weights"));
        }
        nothing_left(&tensors)?;
        let (d, features, _) = affine.check()?;
        for (key, found) in [("d_in", d), ("num_latents", features)] {
            // `num_latents: 0` means that `expansion_factor` determines the number.
            if let Some(said) = cfg.get(key).and_then(Value::as_i64).filter(|said| *said != found && *said != 0) {
                bail!(InputError::new(format!("cfg.json says `{key}` is {said}, but the weights have {found}")));
            }
        }
        // The run's config.json names the model; the folder's name is the module.
        let run = match place.above().map(|run| run.file("config.json")).transpose()?.flatten() {
            Some(file) => dictlearn_core::files::read_json(&file)?,
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
        let notes = note.into_iter().collect();
        Ok(Published { class: class.to_owned(), tensors, site, notes, ..Published::default() })
    }
}
