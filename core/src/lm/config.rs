//! Fields of a Hugging Face config.json that several families share.

use anyhow::{Context, Result, bail};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::attention::{AttentionConfig, NormedOver, Projections, QkNorm};
use super::blocks::{Activation, activation};
use super::decoder::{DecoderConfig, EmbedConfig, FeedForward, HeadConfig, LayerConfig, Mixer, NormNames};
use super::delta_net::{DeltaNetConfig, DeltaProjections};
use super::family::ModelConfig;
use super::mlp::MlpConfig;
use super::norm::{NormConfig, NormKind};
use super::rotary::{Rope, Rotary};
use crate::error::InputError;

/// Reads a family's fields from a config.json.
pub fn read<T: ModelConfig>(config: &Value) -> Result<T> {
    let mut whole = config.clone();
    let defaults: Map<String, Value> = serde_json::from_str(T::DEFAULTS).context("a family's defaults are no JSON")?;
    if let Some(fields) = whole.as_object_mut() {
        for (name, value) in defaults {
            fields.entry(name).or_insert(value);
        }
    }
    T::deserialize(&whole).map_err(|error| {
        // serde does not name the field.
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
            (!fits).then(|| format!("`{name}` is {found}, expected {}", types.join(" or ")))
        });
        InputError::new(format!("config.json: {}", wrong.next().unwrap_or_else(|| error.to_string()))).into()
    })
}

/// Fields shared by the config.json of Llama and later families.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct CommonFields {
    /// Number of token ids.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads per layer.
    pub num_attention_heads: i64,
    /// Number of key/value heads per layer, shared by neighbouring query heads. Default: one per query head.
    pub num_key_value_heads: Option<i64>,
    /// Width of a head. Default: `hidden_size / num_attention_heads`.
    pub head_dim: Option<i64>,
    /// Width of the MLP.
    pub intermediate_size: i64,
    /// Longest context, in tokens.
    pub max_position_embeddings: i64,
    /// Epsilon added to the mean square in norms. Default: 1e-6, unless the family has its own.
    pub rms_norm_eps: Option<f64>,
    /// Activation function of the MLP. Default: `silu`, unless the family has its own.
    pub hidden_act: Option<String>,
    /// Whether head and token embedding share one weight.
    pub tie_word_embeddings: Option<bool>,
    /// Rotary position embedding.
    #[serde(flatten)]
    pub rope: Rope,
}

impl CommonFields {
    /// Returns the width of a head.
    pub fn head_dim(&self) -> Result<i64> {
        match self.head_dim {
            Some(width) => Ok(width),
            None => DecoderConfig::head_dim(self.hidden_size, self.num_attention_heads),
        }
    }

    /// Returns the decoder of Llama: RMS norms before attention and MLP, rotary attention without biases, a gated SiLU
    /// MLP without biases. Other families modify it.
    pub fn decoder(&self) -> Result<DecoderConfig> {
        let rotary = self.rope.rotary(self.head_dim()?, 10_000.0, self.max_position_embeddings)?;
        self.decoder_with(vec![rotary])
    }

    /// Returns the same decoder with other rotary embeddings; all layers use the first.
    pub fn decoder_with(&self, rotary: Vec<Rotary>) -> Result<DecoderConfig> {
        let layer = LayerConfig::new(
            self.attention()?,
            FeedForward::Mlp(self.mlp()?),
            NormNames::before("input_layernorm", "post_attention_layernorm"),
        );
        Ok(DecoderConfig {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_positions: Some(self.max_position_embeddings),
            layers: vec![layer; self.num_hidden_layers],
            rotary,
            root: "model",
            layers_name: "layers",
            embed: EmbedConfig::tokens("embed_tokens"),
            norm: NormConfig { kind: NormKind::Rms, eps: self.rms_norm_eps.unwrap_or(1e-6) },
            final_norm: Some("norm"),
            head: HeadConfig::new(self.tie_word_embeddings.unwrap_or(false)),
            aliases: Vec::new(),
        })
    }

    /// Returns the attention of Llama: rotary, without biases.
    pub fn attention(&self) -> Result<AttentionConfig> {
        let (heads, head_dim) = (self.num_attention_heads, self.head_dim()?);
        Ok(AttentionConfig {
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            rotary: Some(0),
            ..AttentionConfig::new("self_attn", (heads, head_dim), Projections::SEPARATE, "o_proj")
        })
    }

    /// Returns the MLP of Llama: gated, without biases.
    pub fn mlp(&self) -> Result<MlpConfig> {
        Ok(MlpConfig::gated(self.intermediate_size, self.act()?))
    }

    /// Returns the activation function of the MLP.
    pub fn act(&self) -> Result<Activation> {
        activation(self.hidden_act.as_deref().unwrap_or("silu"))
    }
}

/// Fields of families with norms before and after attention and MLP, and sliding-window attention in some layers.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Sandwich {
    /// Activation function of the MLP. Default: `gelu_pytorch_tanh`.
    pub hidden_activation: Option<String>,
    /// Whether the projections of attention have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// Attention scores are divided by the square root of this.
    #[serde(default = "Sandwich::query_pre_attn_scalar")]
    pub query_pre_attn_scalar: f64,
    /// Window of a sliding layer in tokens, including the query's own.
    #[serde(default = "Sandwich::sliding_window")]
    pub sliding_window: i64,
    /// Attention of each layer: `sliding_attention` or `full_attention`.
    pub layer_types: Option<Vec<String>>,
    /// Must be false: only causal models are supported.
    pub use_bidirectional_attention: Option<bool>,
}

impl Sandwich {
    fn query_pre_attn_scalar() -> f64 {
        256.0
    }

    fn sliding_window() -> i64 {
        4096
    }

    /// Gives a Llama decoder the norms, activation, embedding scale and windows of these families. Returns true for
    /// each sliding layer; without `layer_types`, `slides` decides.
    ///
    /// # Errors
    /// Fails if attention is bidirectional, or if `layer_types` does not fit the layers.
    pub fn apply(&self, decoder: &mut DecoderConfig, slides: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
        if self.use_bidirectional_attention == Some(true) {
            bail!(
                InputError::new("config.json: `use_bidirectional_attention` is not supported")
                    .help("only causal models are supported")
            );
        }
        let act = activation(self.hidden_activation.as_deref().unwrap_or("gelu_pytorch_tanh"))?;
        decoder.mlps().for_each(|mlp| mlp.act = act);
        decoder.embed.scale = (decoder.hidden_size as f64).sqrt();
        decoder.norm.kind = NormKind::RmsPlusOne;
        let sliding = sliding_layers(self.layer_types.as_deref(), decoder.layers.len(), slides)?;
        for layer in &mut decoder.layers {
            layer.norms = NormNames::sandwich();
        }
        for (attention, sliding) in decoder.attentions().zip(&sliding) {
            attention.bias(self.attention_bias);
            attention.scale = self.query_pre_attn_scalar.powf(-0.5);
            attention.window = sliding.then_some(self.sliding_window);
        }
        Ok(sliding)
    }
}

/// Fields of families with sliding-window attention in the upper layers.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct UpperWindow {
    /// Whether layers from `max_window_layers` on use sliding-window attention.
    #[serde(default)]
    pub use_sliding_window: bool,
    /// Window of these layers in tokens, including the query's own.
    pub sliding_window: Option<i64>,
    /// First layer with a window.
    #[serde(default = "UpperWindow::max_window_layers")]
    pub max_window_layers: usize,
    /// Attention of each layer, in place of `max_window_layers`: `full_attention` or `sliding_attention`.
    pub layer_types: Option<Vec<String>>,
}

impl UpperWindow {
    /// Example for a family with these fields: a window from the second layer on.
    pub const EXAMPLE: &str = "{use_sliding_window: true, max_window_layers: 1}";

    fn max_window_layers() -> usize {
        28
    }

    /// Sets the windows of a decoder's layers.
    pub fn apply(&self, decoder: &mut DecoderConfig) -> Result<()> {
        let window = self.use_sliding_window.then_some(self.sliding_window).flatten();
        let upper = |layer| layer >= self.max_window_layers;
        let sliding = sliding_layers(self.layer_types.as_deref(), decoder.layers.len(), upper)?;
        for (attention, sliding) in decoder.attentions().zip(sliding) {
            attention.window = window.filter(|_| sliding);
        }
        Ok(())
    }
}

/// Fields of families in which most layers have a gated DeltaNet, and the rest gated softmax attention.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DeltaLayers {
    /// Whether the projections of softmax attention have biases.
    pub attention_bias: bool,
    /// Mixer of each layer: `linear_attention` (gated DeltaNet) or `full_attention`.
    pub layer_types: Option<Vec<String>>,
    /// n: without `layer_types`, every n-th layer has softmax attention.
    pub full_attention_interval: usize,
    /// Number of positions that the convolution of a DeltaNet covers.
    pub linear_conv_kernel_dim: i64,
    /// Width of a query or key of a DeltaNet.
    pub linear_key_head_dim: i64,
    /// Width of a value of a DeltaNet.
    pub linear_value_head_dim: i64,
    /// Number of query and key heads of a DeltaNet.
    pub linear_num_key_heads: i64,
    /// Number of value heads of a DeltaNet.
    pub linear_num_value_heads: i64,
}

impl Default for DeltaLayers {
    fn default() -> Self {
        DeltaLayers {
            attention_bias: false,
            layer_types: None,
            full_attention_interval: 4,
            linear_conv_kernel_dim: 4,
            linear_key_head_dim: 128,
            linear_value_head_dim: 128,
            linear_num_key_heads: 16,
            linear_num_value_heads: 32,
        }
    }
}

impl DeltaLayers {
    /// Example for a family with these fields: a small DeltaNet in the first of two layers.
    pub const EXAMPLE: &str = "{head_dim: 16, num_key_value_heads: 2, full_attention_interval: 2, \
        linear_key_head_dim: 8, linear_value_head_dim: 8, linear_num_key_heads: 2, linear_num_value_heads: 4}";

    /// Gives a Llama decoder the mixers and norms of these families; `act` follows the convolution.
    ///
    /// # Errors
    /// Fails if `layer_types` does not fit the layers, or if the interval is 0.
    pub fn apply(&self, decoder: &mut DecoderConfig, act: Activation, input: DeltaProjections) -> Result<()> {
        let (layers, interval) = (decoder.layers.len(), self.full_attention_interval);
        let linear = match &self.layer_types {
            Some(types) => of_layers(types, layers, ["full_attention", "linear_attention"])?,
            None if interval == 0 => bail!(InputError::new("config.json: `full_attention_interval` is 0")),
            None => (0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect(),
        };
        decoder.norm.kind = NormKind::RmsPlusOne;
        for attention in decoder.attentions() {
            attention.bias(self.attention_bias);
            attention.qk_norm = Some(QkNorm::new(NormedOver::Head));
            attention.gated = true;
        }
        let net = DeltaNetConfig {
            path: "linear_attn",
            key_heads: self.linear_num_key_heads,
            value_heads: self.linear_num_value_heads,
            key_dim: self.linear_key_head_dim,
            value_dim: self.linear_value_head_dim,
            kernel: self.linear_conv_kernel_dim,
            act,
            input,
            output: "out_proj",
        };
        for (layer, _) in decoder.layers.iter_mut().zip(linear).filter(|(_, linear)| *linear) {
            layer.mixer = Mixer::DeltaNet(net.clone());
        }
        Ok(())
    }
}

/// Returns true for each layer with sliding-window attention, from `layer_types` if given, otherwise from `default` by
/// the layer's index.
pub fn sliding_layers(
    layer_types: Option<&[String]>,
    n_layers: usize,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    match layer_types {
        None => Ok((0..n_layers).map(default).collect()),
        Some(types) => of_layers(types, n_layers, ["full_attention", "sliding_attention"]),
    }
}

/// Returns true for each layer of the second of two types.
fn of_layers(types: &[String], n_layers: usize, known: [&str; 2]) -> Result<Vec<bool>> {
    if types.len() != n_layers {
        bail!(InputError::new(format!("config.json: `layer_types` has {} entries for {n_layers} layers", types.len())));
    }
    let is_second = |name: &String| match known.iter().position(|known| known == name) {
        Some(index) => Ok(index == 1),
        None => bail!(
            InputError::new(format!("config.json: layers of type `{name}` are not supported"))
                .help(format!("supported types: {}", known.join(", ")))
        ),
    };
    types.iter().map(is_second).collect()
}
