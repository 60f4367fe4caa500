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
use crate::error::InputError;

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
pub struct CommonFields {
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

impl CommonFields {
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
        let (heads, head_dim) = (self.num_attention_heads, self.head_dim()?);
        let input = Projections::Separate { q: "q_proj", k: "k_proj", v: "v_proj" };
        let scale = (head_dim as f64).powf(-0.5);
        let layer = LayerConfig { window: None, rotary: Some(0), scale };
        Ok(DecoderConfig {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_positions: Some(self.max_position_embeddings),
            layers: vec![layer; self.num_hidden_layers],
            rotary,
            layers_path: "model.layers",
            embed: EmbedConfig::tokens("model.embed_tokens"),
            norm: NormConfig::before(
                NormKind::Rms,
                self.rms_norm_eps.unwrap_or(1e-6),
                "input_layernorm",
                "post_attention_layernorm",
            ),
            attention: AttentionConfig {
                kv_heads: self.num_key_value_heads.unwrap_or(heads),
                ..AttentionConfig::new("self_attn", (heads, head_dim), input, "o_proj")
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

/// The fields of families with norms before and after attention and MLP, whose attention slides over a window in some layers.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Sandwich {
    /// The MLP's activation.
    pub hidden_activation: Option<String>,
    /// Whether attention's projections have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// Scores are divided by the root of this.
    #[serde(default = "Sandwich::query_pre_attn_scalar")]
    pub query_pre_attn_scalar: f64,
    /// How many positions a token of a sliding layer sees, itself among them.
    #[serde(default = "Sandwich::sliding_window")]
    pub sliding_window: i64,
    /// Which layers slide: `sliding_attention` or `full_attention` for each.
    pub layer_types: Option<Vec<String>>,
    /// Must be false: dictionaries are trained on models that read from left to right.
    pub use_bidirectional_attention: Option<bool>,
}

impl Sandwich {
    fn query_pre_attn_scalar() -> f64 {
        256.0
    }

    fn sliding_window() -> i64 {
        4096
    }

    /// Gives a decoder of Llama the norms, activation, scale of embeddings and windows of these families; returns which
    /// layers slide, by default those that `slides` names. An error if attention is bidirectional.
    pub fn apply(&self, decoder: &mut DecoderConfig, slides: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
        if self.use_bidirectional_attention == Some(true) {
            bail!(
                InputError::new("config.json: `use_bidirectional_attention` is not supported")
                    .help("supported are models that read from left to right")
            );
        }
        decoder.mlp.act = activation(self.hidden_activation.as_deref().unwrap_or("gelu_pytorch_tanh"))?;
        decoder.embed.scale = (decoder.hidden_size as f64).sqrt();
        decoder.attention.input_bias = self.attention_bias;
        decoder.attention.output_bias = self.attention_bias;
        decoder.norm = NormConfig {
            kind: NormKind::RmsPlusOne,
            eps: decoder.norm.eps,
            before_attention: Some("input_layernorm"),
            after_attention: Some("post_attention_layernorm"),
            before_mlp: Some("pre_feedforward_layernorm"),
            after_mlp: Some("post_feedforward_layernorm"),
        };
        let sliding = sliding_layers(self.layer_types.as_deref(), decoder.layers.len(), slides)?;
        for (layer, sliding) in decoder.layers.iter_mut().zip(&sliding) {
            layer.scale = self.query_pre_attn_scalar.powf(-0.5);
            layer.window = sliding.then_some(self.sliding_window);
        }
        Ok(sliding)
    }
}

/// The fields of families in which attention slides over a window from some layer on.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct UpperWindow {
    /// Whether layers from `max_window_layers` on see only a window.
    #[serde(default)]
    pub use_sliding_window: bool,
    /// How many positions such a layer's tokens see, each itself among them.
    pub sliding_window: Option<i64>,
    /// The first layer that sees only a window.
    #[serde(default = "UpperWindow::max_window_layers")]
    pub max_window_layers: usize,
    /// The same by layer: `full_attention` or `sliding_attention`.
    pub layer_types: Option<Vec<String>>,
}

impl UpperWindow {
    /// The example of a family with these fields: a window from the second layer on.
    pub const EXAMPLE: &str = "{use_sliding_window: true, max_window_layers: 1}";

    fn max_window_layers() -> usize {
        28
    }

    /// Gives a decoder's layers their windows.
    pub fn apply(&self, decoder: &mut DecoderConfig) -> Result<()> {
        let window = self.use_sliding_window.then_some(self.sliding_window).flatten();
        let upper = |layer| layer >= self.max_window_layers;
        let sliding = sliding_layers(self.layer_types.as_deref(), decoder.layers.len(), upper)?;
        for (layer, sliding) in decoder.layers.iter_mut().zip(sliding) {
            layer.window = window.filter(|_| sliding);
        }
        Ok(())
    }
}

/// Which layers see only a window: as `layer_types` says where it is given, otherwise as `default` does by the layer's
/// number.
pub fn sliding_layers(
    layer_types: Option<&[String]>,
    n_layers: usize,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    let Some(types) = layer_types else { return Ok((0..n_layers).map(default).collect()) };
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
