//! Fields of config.json that change a model's arithmetic.

use anyhow::{Result, bail};
use serde_json::Value;

use crate::error::InputError;
use crate::registry::{ComponentKind, find};

/// Fields of any family's config.json that change the computation. A family implements those among its own fields. In
/// the config of another family, a field must have a value that changes nothing.
pub const ARITHMETIC: &[&str] = &[
    "activation_sparsity_pattern",
    "alibi",
    "altup_num_inputs",
    "apply_residual_connection_post_layernorm",
    "attention_bias",
    "attention_chunk_size",
    "attention_k_eq_v",
    "attention_multiplier",
    "attn_logit_softcapping",
    "attn_temperature_tuning",
    "clip_qkv",
    "embedding_multiplier",
    "enable_moe_block",
    "final_logit_softcapping",
    "global_head_dim",
    "head_dim",
    "hidden_size_per_layer_input",
    "laurel_rank",
    "layer_types",
    "logit_scale",
    "logits_scaling",
    "mlp_bias",
    "new_decoder_architecture",
    "no_rope_layers",
    "num_experts",
    "num_global_key_value_heads",
    "num_key_value_heads",
    "num_kv_shared_layers",
    "num_local_experts",
    "parallel_attn",
    "partial_rotary_factor",
    "per_layer_config",
    "qk_layernorm",
    "quantization_config",
    "query_pre_attn_scalar",
    "qkv_bias",
    "residual_multiplier",
    "rope_parameters",
    "rope_scaling",
    "rotary_dim",
    "rotary_pct",
    "scale_emb",
    "sliding_window",
    "slow_but_exact",
    "swiglu_alpha",
    "swiglu_limit",
    "use_bias",
    "use_bidirectional_attention",
    "use_double_wide_mlp",
    "use_mup",
    "use_parallel_residual",
    "use_qk_norm",
    "use_qkv_bias",
    "word_embed_proj_dim",
];

/// Refuses a config in which a field changes the arithmetic but its family does not implement it.
pub(super) fn refuse_unknown_arithmetic(config: &Value, family: &str) -> Result<()> {
    let fields = find(ComponentKind::Model, family).map(|component| (component.schema)()).unwrap_or_default();
    let neutral = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(1.0),
        Value::Object(map) => map.is_empty(),
        Value::Array(types) => types.iter().all(|layer| layer == "full_attention"),
        _ => false,
    };
    // The family of a multimodal model leaves its fields to that of the text model.
    if fields.get("additionalProperties").and_then(Value::as_bool) == Some(true) {
        return Ok(());
    }
    let known = |name: &str| fields.get("properties").is_some_and(|known| known.get(name).is_some());
    let given = config.as_object().into_iter().flatten();
    for (name, value) in given.filter(|(name, _)| ARITHMETIC.contains(&name.as_str())) {
        if !known(name) && !neutral(value) {
            bail!(
                InputError::new(format!("config.json: `{name}` is {value}, which {family} models do not implement"))
                    .help("it cannot be ignored because it changes what the model computes")
            );
        }
    }
    Ok(())
}
