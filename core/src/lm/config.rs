//! What families share in reading a Hugging Face config.json.

use anyhow::{Result, bail};
use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::blocks::{NormKind, activation};
use super::decoder::{
    AttentionConfig, DecoderConfig, EmbedConfig, HeadConfig, LayerConfig, MlpConfig, MlpLayout, NormConfig, Projections,
};
use super::rotary::{Rope, Rotary};
use crate::config::InputError;
use crate::registry::{Kind, component};

/// Reads a family's fields from a config.json.
pub fn read<T: DeserializeOwned + JsonSchema>(config: &Value) -> Result<T> {
    T::deserialize(config).map_err(|error| {
        // serde does not say which field it was.
        let schema = schemars::schema_for!(T);
        let fields = schema.get("properties").and_then(Value::as_object).into_iter().flatten();
        let mut wrong = fields.filter_map(|(name, field)| {
            let found = config.get(name)?;
            let expected = field.get("type")?;
            let types: Vec<&str> = match expected {
                Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
                one => one.as_str().into_iter().collect(),
            };
            let fits = types.iter().any(|kind| match *kind {
                "integer" => found.is_i64() || found.is_u64(),
                "number" => found.is_number(),
                "boolean" => found.is_boolean(),
                "string" => found.is_string(),
                "array" => found.is_array(),
                "null" => found.is_null(),
                _ => true,
            });
            (!fits).then(|| format!("`{name}` is {found}, and {} is expected", types.join(" or ")))
        });
        InputError::new(format!("config.json: {}", wrong.next().unwrap_or_else(|| error.to_string()))).into()
    })
}

/// The fields that the config.json of every family since Llama has.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Usual {
    /// Number of token ids.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Heads of a layer.
    pub num_attention_heads: i64,
    /// Keys and values of a layer, which neighbouring heads share; one for each head where it is not given.
    pub num_key_value_heads: Option<i64>,
    /// Width of a head; where it is not given, the stream's width divided among the heads.
    pub head_dim: Option<i64>,
    /// Width of an MLP.
    pub intermediate_size: i64,
    /// The longest context.
    pub max_position_embeddings: i64,
    /// Added to the mean square in norms; 1e-6 where it is not given, unless the family says otherwise.
    pub rms_norm_eps: Option<f64>,
    /// The MLP's activation.
    pub hidden_act: Option<String>,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: Option<bool>,
    /// Rotary embeddings.
    #[serde(flatten)]
    pub rope: Rope,
}

impl Usual {
    /// Width of a head.
    pub fn head_dim(&self) -> Result<i64> {
        match self.head_dim {
            Some(width) => Ok(width),
            None => DecoderConfig::head_dim(self.hidden_size, self.num_attention_heads),
        }
    }

    /// The decoder of Llama, of which the other families change what they do otherwise: RMS norms before attention and
    /// MLP, rotary attention without biases, a gated SiLU MLP without biases.
    pub fn decoder(&self) -> Result<DecoderConfig> {
        let rotary = self.rope.rotary(self.head_dim()?, 10_000.0, self.max_position_embeddings)?;
        self.decoder_with(vec![rotary])
    }

    /// The same with rotary embeddings that the family has made itself, of which all layers use the first.
    pub fn decoder_with(&self, rotary: Vec<Rotary>) -> Result<DecoderConfig> {
        let head_dim = self.head_dim()?;
        let scale = (head_dim as f64).powf(-0.5);
        let layer = LayerConfig { window: None, rotary: Some(0), scale };
        Ok(DecoderConfig {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_positions: Some(self.max_position_embeddings),
            layers: vec![layer; self.num_hidden_layers],
            rotary,
            layers_path: "model.layers",
            embed: EmbedConfig { tokens: "model.embed_tokens", positions: None, scale: 1.0, scale_inside: false },
            norm: NormConfig {
                kind: NormKind::Rms,
                eps: self.rms_norm_eps.unwrap_or(1e-6),
                before_attention: Some("input_layernorm"),
                after_attention: None,
                before_mlp: Some("post_attention_layernorm"),
                after_mlp: None,
            },
            attention: AttentionConfig {
                path: "self_attn",
                heads: self.num_attention_heads,
                kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
                head_dim,
                input: Projections::Separate { q: "q_proj", k: "k_proj", v: "v_proj" },
                output: "o_proj",
                input_bias: false,
                output_bias: false,
                transposed: false,
                qk_norm: None,
                soft_cap: None,
            },
            mlp: MlpConfig {
                path: "mlp",
                width: self.intermediate_size,
                layout: MlpLayout::Gated { gate: "gate_proj", up: "up_proj", down: "down_proj" },
                act_path: "act_fn",
                act: activation(self.hidden_act.as_deref().unwrap_or("silu"))?,
                bias: false,
                transposed: false,
            },
            parallel: false,
            final_norm: "model.norm",
            head: HeadConfig { path: "lm_head", tied: self.tie_word_embeddings.unwrap_or(false), soft_cap: None },
        })
    }
}

/// Which layers see only a window: as `layer_types` says where it is given, otherwise as `usual` does by the layer's
/// number.
pub fn sliding_layers(
    layer_types: Option<&[String]>,
    n_layers: usize,
    usual: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    let Some(types) = layer_types else { return Ok((0..n_layers).map(usual).collect()) };
    if types.len() != n_layers {
        bail!(InputError::new(format!("config.json: `layer_types` has {} entries for {n_layers} layers", types.len())));
    }
    let sliding = |name: &String| match name.as_str() {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => bail!(
            InputError::new(format!("config.json: layers of type `{other}` are not supported"))
                .help("supported are full_attention and sliding_attention")
        ),
    };
    types.iter().map(sliding).collect()
}

/// Fields of any family's config.json that change what a model computes. A family that has one of them among its own
/// fields implements it; in the config of another family it must say that nothing is changed.
pub(crate) const ARITHMETIC: &[&str] = &[
    "alibi",
    "attention_bias",
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping",
    "head_dim",
    "layer_types",
    "logit_scale",
    "logits_scaling",
    "mlp_bias",
    "no_rope_layers",
    "num_experts",
    "num_key_value_heads",
    "num_local_experts",
    "parallel_attn",
    "partial_rotary_factor",
    "qk_layernorm",
    "quantization_config",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rope_parameters",
    "rope_scaling",
    "rotary_dim",
    "sliding_window",
    "use_bidirectional_attention",
    "use_parallel_residual",
    "use_qk_norm",
];

/// Refuses a config with a field that changes the arithmetic and that its family does not implement.
pub(super) fn refuse_unknown_arithmetic(config: &Value, family: &str) -> Result<()> {
    let fields = component(Kind::Model, family).map(|component| (component.schema)()).unwrap_or_default();
    let neutral = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(1.0),
        Value::Object(map) => map.is_empty(),
        Value::Array(types) => types.iter().all(|layer| layer == "full_attention"),
        _ => false,
    };
    let known = |name: &str| fields.get("properties").is_some_and(|known| known.get(name).is_some());
    let given = config.as_object().into_iter().flatten();
    for (name, value) in given.filter(|(name, _)| ARITHMETIC.contains(&name.as_str())) {
        if !known(name) && !neutral(value) {
            bail!(
                InputError::new(format!("config.json: `{name}` is {value}, which {family} models do not have here"))
                    .help("it changes what the model computes and is not implemented, so it is not ignored")
            );
        }
    }
    Ok(())
}
