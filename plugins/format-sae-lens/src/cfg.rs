//! cfg.json, in the forms of all versions of sae_lens.

use dictlearn_core::prelude::*;

use dictlearn_core::formats::{ModelSite, check_keys};

use crate::models;

/// Architectures that convert to one of the registered classes.
const ARCHITECTURES: [&str; 12] = [
    "standard",
    "gated",
    "topk",
    "abstopk",
    "jumprelu",
    "batchtopk",
    "matryoshka_batchtopk",
    "matching_pursuit",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
];

/// Keys that sae_lens 6 writes for the architectures above: those it reads, and those that only concern training. It
/// drops all others. Before 6.0, cfg.json held a run's whole config.
const KNOWN: &[&str] = &[
    "activation_fn",
    "activation_fn_kwargs",
    "activation_fn_str",
    "apply_b_dec_to_input",
    "architecture",
    "aux_loss_coefficient",
    "context_size",
    "d_in",
    "d_out",
    "d_sae",
    "dataset_path",
    "dataset_trust_remote_code",
    "decoder_init_norm",
    "device",
    "dtype",
    "exclude_special_tokens",
    "finetuning_scaling_factor",
    "hf_hook_name",
    "hf_hook_name_out",
    "hook_head_index",
    "hook_head_index_out",
    "hook_layer",
    "hook_name",
    "hook_name_out",
    "jumprelu_bandwidth",
    "jumprelu_init_threshold",
    "jumprelu_sparsity_loss_mode",
    "jumprelu_ste_to_input",
    "jumprelu_tanh_scale",
    "k",
    "l0_coefficient",
    "l0_warm_up_steps",
    "l1_coefficient",
    "l1_warm_up_steps",
    "lp_norm",
    "matryoshka_widths",
    "max_iterations",
    "metadata",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "model_name",
    "neuronpedia_id",
    "norm_scaling_factor",
    "normalize_activations",
    "pre_act_loss_coefficient",
    "prepend_bos",
    "rescale_acts_by_decoder_norm",
    "reshape_activations",
    "residual_threshold",
    "sae_lens_training_version",
    "sae_lens_version",
    "seqpos_slice",
    "stop_on_duplicate_support",
    "target_l0",
    "topk_threshold_lr",
    "use_matryoshka_aux_loss",
    "use_sparse_activations",
];

/// Normalisation of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalize {
    None,
    ExpectedAverageOnlyIn,
    ConstantNormRescale,
    LayerNorm,
    CovarianceWhitening,
}

impl Normalize {
    pub fn name(self) -> &'static str {
        match self {
            Normalize::None => "none",
            Normalize::ExpectedAverageOnlyIn => "expected_average_only_in",
            Normalize::ConstantNormRescale => "constant_norm_rescale",
            Normalize::LayerNorm => "layer_norm",
            Normalize::CovarianceWhitening => "covariance_whitening",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        use Normalize::{ConstantNormRescale, CovarianceWhitening, ExpectedAverageOnlyIn, LayerNorm, None};
        let all = [None, ExpectedAverageOnlyIn, ConstantNormRescale, LayerNorm, CovarianceWhitening];
        all.into_iter().find(|known| known.name() == name)
    }
}

/// Stopping rules of a matching pursuit.
#[derive(Debug)]
pub struct Pursuit {
    pub residual_threshold: f64,
    /// `None` for d_in.
    pub max_iterations: Option<i64>,
    pub stop_on_duplicate_support: bool,
}

/// Contents of cfg.json, from any version.
#[derive(Debug)]
pub struct Cfg {
    pub architecture: String,
    d_in: Option<i64>,
    d_sae: Option<i64>,
    d_out: Option<i64>,
    pub k: Option<i64>,
    pub apply_b_dec_to_input: bool,
    pub normalize: Normalize,
    pub rescale_acts_by_decoder_norm: bool,
    pub finetuning_scaling_factor: bool,
    /// Stopping rules of a matching pursuit.
    pub pursuit: Pursuit,
    /// `bfloat16` or `float16`; `None` for float32.
    pub dtype: Option<&'static str>,
    pub site: ModelSite,
    /// Weight processing by TransformerLens that cannot be reproduced on activations.
    pub center: Vec<String>,
    /// Warnings for the user.
    pub notes: Vec<String>,
    /// Keys that our config.json keeps.
    pub kept: Map<String, Value>,
}

/// Reads a value of one type; `null` counts as absent. The error names the key.
fn get<T>(cfg: &Value, key: &str, wanted: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
    match cfg.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match read(value) {
            Some(read) => Ok(Some(read)),
            None => {
                bail!(InputError::new(format!("cfg.json: `{key}` is {value}")).help(format!("it must be {wanted}")))
            }
        },
    }
}

fn text(cfg: &Value, key: &str) -> Result<Option<String>> {
    get(cfg, key, "text", |value| value.as_str().map(str::to_owned))
}

fn flag(cfg: &Value, key: &str) -> Result<Option<bool>> {
    get(cfg, key, "true or false", Value::as_bool)
}

fn count(cfg: &Value, key: &str) -> Result<Option<i64>> {
    // Some writers turned it into a float, such as 64.0.
    let whole =
        |value: &Value| value.as_i64().or_else(|| value.as_f64().filter(|n| n.fract() == 0.0).map(|n| n as i64));
    get(cfg, key, "a whole number above 0", |value| whole(value).filter(|n| *n > 0))
}

impl Cfg {
    pub fn read(raw: &Value) -> Result<Self> {
        if !raw.is_object() {
            bail!(InputError::new("cfg.json is not a JSON object"));
        }
        let metadata = get(raw, "metadata", "an object", |metadata| metadata.is_object().then(|| metadata.clone()))?;
        let metadata = &metadata.unwrap_or(Value::Null);
        let version = text(raw, "sae_lens_version")?.or(text(metadata, "sae_lens_version")?);
        let major = version.and_then(|version| version.split('.').next()?.parse::<u64>().ok());
        let old = major.is_none_or(|major| major < 6);
        // Before 6.0, all keys were at the top level.
        let about = |key: &str| if old { raw } else { metadata.get(key).map_or(raw, |_| metadata) };

        let note = if old { None } else { check_keys(raw, "cfg.json", &[], KNOWN)? };
        // Older versions passed these to the activation function.
        if let Some(kwargs) = raw.get("activation_fn_kwargs").filter(|kwargs| kwargs.is_object()) {
            check_keys(kwargs, "cfg.json, activation_fn_kwargs", &["postact_fn"], &["k"])?;
        }

        let mut architecture = text(raw, "architecture")?.unwrap_or_else(|| "standard".to_owned());
        let mut k = None;
        let activation =
            text(raw, "activation_fn_str")?.or(text(raw, "activation_fn")?).unwrap_or_else(|| "relu".to_owned());
        match activation.as_str() {
            "relu" => {}
            "topk" if old || architecture == "topk" => {
                architecture = "topk".to_owned();
                k = raw.get("activation_fn_kwargs").map_or(Ok(None), |kwargs| count(kwargs, "k"))?;
            }
            other => bail!(
                InputError::new(format!(
                    "the activation function `{other}` is not supported with the architecture `{architecture}`"
                ))
                .help("supported: `relu`, and `topk` with the architecture `topk`")
            ),
        }
        if !ARCHITECTURES.contains(&architecture.as_str()) {
            bail!(
                InputError::new(format!("the architecture `{architecture}` is not supported"))
                    .help(format!("supported: {}", ARCHITECTURES.join(", ")))
            );
        }
        // A batchtopk's k may be a fraction; its threshold is used instead.
        if ["topk", "abstopk"].contains(&architecture.as_str()) {
            k = k.or(count(raw, "k")?);
        }
        let transcodes = architecture.ends_with("transcoder");
        let normalize = match raw.get("normalize_activations") {
            None | Some(Value::Null | Value::Bool(false)) => Normalize::None,
            Some(Value::Bool(true)) => Normalize::ExpectedAverageOnlyIn,
            Some(Value::String(name)) => Normalize::parse(name).ok_or_else(|| {
                InputError::new(format!("`normalize_activations: {name}` is not supported")).help(
                    "supported: none, expected_average_only_in, constant_norm_rescale, layer_norm and \
                     covariance_whitening",
                )
            })?,
            Some(other) => bail!(InputError::new(format!("cfg.json: `normalize_activations` is {other}"))),
        };
        match text(raw, "reshape_activations")?.as_deref() {
            // Heads are concatenated, as at our sites.
            None | Some("none" | "hook_z") => {}
            Some(other) => bail!(
                InputError::new(format!("`reshape_activations: {other}` is not supported"))
                    .help("supported: none and hook_z")
            ),
        }
        let dtype = text(raw, "dtype")?.unwrap_or_else(|| "float32".to_owned());
        let dtype = match dtype.trim_start_matches("torch.") {
            "float32" | "float64" | "float" | "double" => None,
            "bfloat16" => Some("bfloat16"),
            "float16" | "half" => Some("float16"),
            other => bail!(
                InputError::new(format!("the dtype `{other}` is not supported"))
                    .help("supported: float32, float64, bfloat16 and float16")
            ),
        };
        let apply = flag(raw, "apply_b_dec_to_input")?;
        if transcodes && apply == Some(true) {
            bail!(
                InputError::new("`apply_b_dec_to_input: true` is not supported for transcoders")
                    .help("b_dec has the output's width, not the input's")
            );
        }

        let mut site = ModelSite {
            model: models::hugging_face(&text(about("model_name"), "model_name")?.unwrap_or_default()),
            prepend_bos: flag(about("prepend_bos"), "prepend_bos")?.or(old.then_some(true)),
            ctx_len: count(about("context_size"), "context_size")?,
            head: get(about("hook_head_index"), "hook_head_index", "a whole number", Value::as_i64)?.or(get(
                raw,
                "hook_point_head_index",
                "a whole number",
                Value::as_i64,
            )?),
            dataset: text(about("dataset_path"), "dataset_path")?.filter(|path| is_repo(path)),
            ..ModelSite::default()
        };
        let hook = text(about("hook_name"), "hook_name")?.or(text(raw, "hook_point")?).unwrap_or_default();
        let target = text(about("hook_name_out"), "hook_name_out")?.filter(|target| transcodes && *target != hook);
        match text(metadata, "hf_hook_name")? {
            Some(name) => {
                site.at(&name);
                site.target = text(metadata, "hf_hook_name_out")?
                    .filter(|_| transcodes)
                    .map(|name| name.trim_end_matches(".output").to_owned())
                    .or(target);
            }
            None => (site.submodule, site.target) = (hook.clone(), target),
        }
        let mut center = Vec::new();
        for (name, value) in about("model_from_pretrained_kwargs")
            .get("model_from_pretrained_kwargs")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            let on = value.as_bool() == Some(true);
            let stream = ["resid", "attn_out", "mlp_out", "embed"].iter().any(|part| hook.contains(part));
            match name.as_str() {
                "center_writing_weights" if on && stream => site.center = models::has_layer_norm(&site.model),
                "fold_ln" if on && hook.contains("normalized") => center.push(name.clone()),
                "fold_value_biases" | "refactor_factored_attn_matrices" if on && hook.contains("hook_z") => {
                    center.push(name.clone());
                }
                _ => {}
            }
        }
        // Settings of the training tokens that cannot be reproduced here.
        let mut notes: Vec<String> = note.into_iter().collect();
        let said = |key: &str| about(key).get(key).filter(|value| !value.is_null()).cloned();
        if said("seqpos_slice")
            .is_some_and(|slice| slice.as_array().is_none_or(|ends| ends.iter().any(|end| !end.is_null())))
        {
            notes.push("it was trained on part of each context (`seqpos_slice`); `eval` uses all of it".to_owned());
        }
        if said("exclude_special_tokens").is_some_and(|value| value != Value::Bool(false)) {
            notes.push("it was trained without special tokens; `eval` includes them".to_owned());
        }
        if let Some(class) = said("model_class_name").filter(|class| class != "HookedTransformer") {
            notes.push(format!("its model class {class} is unknown here"));
        }
        let mut kept = Map::new();
        for key in ["sae_lens_training_version", "neuronpedia_id", "dataset_path", "hook_name", "hook_name_out"] {
            let value = about(key).get(key).cloned().unwrap_or(Value::Null);
            if !value.is_null() {
                kept.insert(key.to_owned(), value);
            }
        }
        if transcodes {
            kept.insert("transcodes".to_owned(), true.into());
        }
        Ok(Cfg {
            d_in: count(raw, "d_in")?,
            d_sae: count(raw, "d_sae")?,
            d_out: count(raw, "d_out")?.filter(|_| transcodes),
            k,
            // Before 6.0, an absent `apply_b_dec_to_input` meant true.
            apply_b_dec_to_input: apply.unwrap_or(true) && !transcodes,
            normalize,
            rescale_acts_by_decoder_norm: flag(raw, "rescale_acts_by_decoder_norm")?
                .unwrap_or(architecture.ends_with("batchtopk"))
                && architecture.ends_with("topk"),
            finetuning_scaling_factor: flag(raw, "finetuning_scaling_factor")?.unwrap_or(false),
            pursuit: Pursuit {
                residual_threshold: get(raw, "residual_threshold", "a number", Value::as_f64)?.unwrap_or(1e-2),
                max_iterations: count(raw, "max_iterations")?,
                stop_on_duplicate_support: flag(raw, "stop_on_duplicate_support")?.unwrap_or(true),
            },
            dtype,
            architecture,
            site,
            center,
            notes,
            kept,
        })
    }

    /// The normalisation of each activation by itself, if any.
    pub fn normalization(&self) -> Option<Normalization> {
        let kind = match self.normalize {
            Normalize::ConstantNormRescale => NormalizationKind::ConstantNormRescale,
            Normalize::LayerNorm => NormalizationKind::LayerNorm,
            // Folded into the weights.
            Normalize::None | Normalize::ExpectedAverageOnlyIn | Normalize::CovarianceWhitening => return None,
        };
        Some(Normalization { kind, input_only: self.architecture.ends_with("transcoder") })
    }

    /// Checks the widths in cfg.json against those of the weights: d, F, d_out.
    pub fn fits(&self, (d, features, d_out): (i64, i64, i64)) -> Result<()> {
        for (key, said, found) in
            [("d_in", self.d_in, d), ("d_sae", self.d_sae, features), ("d_out", self.d_out, d_out)]
        {
            if let Some(said) = said.filter(|said| *said != found) {
                bail!(InputError::new(format!("cfg.json says `{key}` is {said}, but the weights have {found}")));
            }
        }
        Ok(())
    }
}

/// Whether a path may be a dataset on the Hub; configs often name a local folder instead.
fn is_repo(path: &str) -> bool {
    path.split('/').count() == 2
        && dictlearn_core::hub::Repo::parse(dictlearn_core::hub::RepoKind::Dataset, path).is_some()
}
