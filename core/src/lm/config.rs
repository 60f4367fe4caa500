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
use super::per_layer::PerLayerConfig;
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
            (!fits(field, found)).then(|| format!("`{name}` is {found}, expected {}", types(field).join(" or ")))
        });
        InputError::new(format!("config.json: {}", wrong.next().unwrap_or_else(|| error.to_string()))).into()
    })
}

/// Returns the types that a field's schema allows; empty if it states none.
fn types(schema: &Value) -> Vec<&str> {
    match (schema.get("type"), schema.get("anyOf")) {
        (Some(Value::Array(types)), _) => types.iter().filter_map(Value::as_str).collect(),
        (Some(one), _) => one.as_str().into_iter().collect(),
        (None, Some(Value::Array(options))) => options.iter().flat_map(types).collect(),
        (None, _) => Vec::new(),
    }
}

/// Returns true if a value has one of the types of a field's schema.
fn fits(schema: &Value, found: &Value) -> bool {
    if let Some(Value::Array(options)) = schema.get("anyOf") {
        return options.iter().any(|option| fits(option, found));
    }
    let types = types(schema);
    let fits_items = |values: &Vec<Value>| schema.get("items").is_none_or(|of| values.iter().all(|it| fits(of, it)));
    types.is_empty()
        || types.iter().any(|kind| match *kind {
            "integer" => found.is_i64() || found.is_u64(),
            "number" => found.is_number(),
            "boolean" => found.is_boolean(),
            "string" => found.is_string(),
            "array" => found.as_array().is_some_and(fits_items),
            "null" => found.is_null(),
            _ => true,
        })
}

/// One value for all layers, or one for each.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum EachLayer<T> {
    /// For all layers.
    All(T),
    /// One for each layer.
    Each(Vec<T>),
}

impl<T: Copy> EachLayer<T> {
    /// Returns the values of all layers.
    ///
    /// # Errors
    /// Fails if a list of them has another length; the message names the field.
    pub fn of_layers(&self, field: &str, n_layers: usize) -> Result<Vec<T>> {
        match self {
            EachLayer::All(value) => Ok(vec![*value; n_layers]),
            EachLayer::Each(values) if values.len() == n_layers => Ok(values.clone()),
            EachLayer::Each(values) => {
                bail!(InputError::new(format!(
                    "config.json: `{field}` has {} entries for {n_layers} layers",
                    values.len()
                )))
            }
        }
    }
}

/// `per_layer_config`: fields of single layers, by the layer's index, that differ from those of the whole model.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct PerLayerFields(Map<String, Value>);

impl PerLayerFields {
    /// Returns the fields `names` of all layers; `defaults` are those of the whole model.
    ///
    /// # Errors
    /// Fails if a layer does not exist or has another field, or a field that is not a whole number.
    pub fn of_layers<const N: usize>(
        &self,
        names: [&str; N],
        defaults: [i64; N],
        n_layers: usize,
    ) -> Result<Vec<[i64; N]>> {
        let mut layers = vec![defaults; n_layers];
        for (index, fields) in &self.0 {
            // transformers pads an index with zeros.
            let layer = index.parse().ok().and_then(|index: usize| layers.get_mut(index));
            let (Some(layer), Some(fields)) = (layer, fields.as_object()) else {
                bail!(
                    InputError::new(format!("config.json: `per_layer_config.{index}` is {fields}"))
                        .help(format!("it must give fields of one of the {n_layers} layers, counted from 0"))
                )
            };
            for (name, value) in fields {
                let known = names.iter().position(|known| known == name);
                let (Some(field), Some(number)) = (known, value.as_i64()) else {
                    bail!(
                        InputError::new(format!("config.json: `per_layer_config.{index}.{name}` is {value}"))
                            .help(format!("layers may differ in these whole numbers: {}", names.join(", ")))
                    )
                };
                layer[field] = number;
            }
        }
        Ok(layers)
    }
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
    pub intermediate_size: EachLayer<i64>,
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
            FeedForward::Mlp(MlpConfig::gated(0, self.act()?)),
            NormNames::before("input_layernorm", "post_attention_layernorm"),
        );
        let mut decoder = DecoderConfig {
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
        };
        let widths = self.intermediate_size.of_layers("intermediate_size", decoder.layers.len())?;
        decoder.mlps().zip(widths).for_each(|(mlp, width)| mlp.width = width);
        Ok(decoder)
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
        Ok(MlpConfig::gated(self.width()?, self.act()?))
    }

    /// Returns the width of all MLPs.
    ///
    /// # Errors
    /// Fails if the config has one for each layer.
    pub fn width(&self) -> Result<i64> {
        match &self.intermediate_size {
            EachLayer::All(width) => Ok(*width),
            EachLayer::Each(_) => bail!(InputError::new(
                "config.json: `intermediate_size` is a list, but all layers of this family have one width"
            )),
        }
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
        causal(self.use_bidirectional_attention == Some(true))?;
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

/// Fields of families whose layers have inputs of their own, and whose last layers share keys and values (Gemma 3n,
/// Gemma 4).
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct LayerInputs {
    /// Activation function of the MLP and of the layers' gates.
    pub hidden_activation: String,
    /// Whether the projections of attention have biases.
    pub attention_bias: bool,
    /// Window of a sliding layer in tokens, including the query's own.
    pub sliding_window: i64,
    /// Attention of each layer: `sliding_attention` or `full_attention`.
    pub layer_types: Option<Vec<String>>,
    /// Soft cap of the logits: bounds them to ± this value.
    pub final_logit_softcapping: Option<f64>,
    /// Width of the input that each layer has beside the residual stream; 0 for none.
    pub hidden_size_per_layer_input: i64,
    /// Number of token ids that give such an input; other ids give that of id 0.
    pub vocab_size_per_layer_input: i64,
    /// Number of layers, counted from the last, that use the keys and values of an earlier layer of their type.
    pub num_kv_shared_layers: usize,
}

impl LayerInputs {
    /// Returns true for each sliding layer; without `layer_types`, every n-th layer is full, n being `period`.
    pub fn sliding(&self, n_layers: usize, period: usize) -> Result<Vec<bool>> {
        sliding_layers(self.layer_types.as_deref(), n_layers, |layer| !(layer + 1).is_multiple_of(period))
    }

    /// Gives a Llama decoder the norms, activation, embeddings, windows and shared keys of these families. Full layers
    /// have its first rotary embedding, sliding layers the second.
    pub fn apply(&self, decoder: &mut DecoderConfig, sliding: &[bool]) -> Result<()> {
        let act = activation(&self.hidden_activation)?;
        let norm = decoder.norm;
        decoder.mlps().for_each(|mlp| mlp.act = act);
        decoder.layers.iter_mut().for_each(|layer| layer.norms = NormNames::sandwich());
        for (attention, sliding) in decoder.attentions().zip(sliding) {
            attention.bias(self.attention_bias);
            attention.scale = 1.0;
            attention.window = sliding.then_some(self.sliding_window);
            attention.rotary = Some(usize::from(*sliding));
            attention.qk_norm = Some(QkNorm::new(NormedOver::Head));
            attention.v_norm = Some(norm);
        }
        decoder.embed.scale = (decoder.hidden_size as f64).sqrt();
        decoder.embed.scale_inside = true;
        let (width, vocab_size) = (self.hidden_size_per_layer_input, self.vocab_size_per_layer_input);
        decoder.embed.per_layer = (width != 0).then_some(PerLayerConfig { width, vocab_size, act });
        decoder.head.soft_cap = self.final_logit_softcapping;
        decoder.share_keys(self.num_kv_shared_layers, sliding)
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

/// Refuses models whose attention is bidirectional.
pub fn causal(bidirectional: bool) -> Result<()> {
    if bidirectional {
        bail!(
            InputError::new("config.json: `use_bidirectional_attention` is not supported")
                .help("only causal models are supported")
        );
    }
    Ok(())
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
            InputError::new(format!("config.json: `layer_types` has `{name}`, which this family does not implement"))
                .help(format!("supported types: {}", known.join(", ")))
        ),
    };
    types.iter().map(is_second).collect()
}
