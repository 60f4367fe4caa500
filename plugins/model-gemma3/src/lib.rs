//! Gemma 3, text only (Gemma team 2025, <https://arxiv.org/abs/2503.19786>): Gemma 2 with norms over each head's query and
//! key instead of bounded scores, and another rotary base in the layers whose attention slides.

use dictlearn_core::lm::config::{Usual, read, sliding_layers};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily, NormKind, Rotary, activation, decoder::QkNorm};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "gemma3_text";

/// The fields of a Gemma 3 config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Gemma3Config {
    #[serde(flatten)]
    usual: Usual,
    /// The MLP's activation.
    hidden_activation: Option<String>,
    /// Whether attention's projections have biases.
    #[serde(default)]
    attention_bias: bool,
    /// Scores are divided by the root of this.
    #[serde(default = "query_pre_attn_scalar")]
    query_pre_attn_scalar: f64,
    /// Scores are bounded to ± this.
    attn_logit_softcapping: Option<f64>,
    /// Logits are bounded to ± this.
    final_logit_softcapping: Option<f64>,
    /// How many positions a token of a sliding layer sees, itself among them.
    #[serde(default = "sliding_window")]
    sliding_window: i64,
    /// Which layers slide: `sliding_attention` or `full_attention` for each.
    layer_types: Option<Vec<String>>,
    /// Must be false: dictionaries are trained on models that read from left to right.
    use_bidirectional_attention: Option<bool>,
    /// Where `layer_types` is not given: every so many layers one sees all positions.
    sliding_window_pattern: Option<usize>,
    /// The name that some files have for it.
    #[serde(rename = "_sliding_window_pattern")]
    private_sliding_window_pattern: Option<usize>,
    /// Base of the rotary frequencies in sliding layers.
    #[serde(default = "rope_local_base_freq")]
    rope_local_base_freq: f64,
}

fn query_pre_attn_scalar() -> f64 {
    256.0
}

fn sliding_window() -> i64 {
    4096
}

fn rope_local_base_freq() -> f64 {
    10_000.0
}

register! {
    model Gemma3Config, MODEL_TYPE,
    summary: "Gemma 3, text only",
    paper: "Gemma team 2025, Gemma 3, https://arxiv.org/abs/2503.19786",
    example: "{sliding_window_pattern: 2}",
}

inventory::submit! {
    ModelFamily {
        model_type: MODEL_TYPE,
        load: |config, weights, cx| {
            Ok(Box::new(Decoder::open(decoder(config)?, weights, cx)?))
        },
    }
}

fn decoder(config: &Value) -> Result<DecoderConfig> {
    let mut fields: Gemma3Config = read(config)?;
    if fields.use_bidirectional_attention == Some(true) {
        bail!(
            InputError::new("config.json: `use_bidirectional_attention` is not supported")
                .help("supported are models that read from left to right")
        );
    }
    let head_dim = *fields.usual.head_dim.get_or_insert(256);
    let rope = &fields.usual.rope;
    let longest = fields.usual.max_position_embeddings;
    let (theta, local) = (rope.rope_theta.unwrap_or(1e6), fields.rope_local_base_freq);
    // What is not said by type of layers is said of the full ones.
    let full = match rope.rotary_of("full_attention", head_dim, theta, longest)? {
        Some(rotary) => rotary,
        None => rope.rotary(head_dim, theta, longest)?,
    };
    let local = match rope.rotary_of("sliding_attention", head_dim, local, longest)? {
        Some(rotary) => rotary,
        None => Rotary::new(head_dim, local)?,
    };
    let mut decoder = fields.usual.decoder_with(vec![full, local])?;
    decoder.mlp.act = activation(fields.hidden_activation.as_deref().unwrap_or("gelu_pytorch_tanh"))?;
    decoder.norm.kind = NormKind::RmsPlusOne;
    decoder.embed.scale = (decoder.hidden_size as f64).sqrt();
    decoder.attention.input_bias = fields.attention_bias;
    decoder.attention.output_bias = fields.attention_bias;
    decoder.head.tied = fields.usual.tie_word_embeddings.unwrap_or(true);
    // Its embedding module multiplies by itself.
    decoder.embed.scale_inside = true;
    decoder.norm.after_attention = Some("post_attention_layernorm");
    decoder.norm.before_mlp = Some("pre_feedforward_layernorm");
    decoder.norm.after_mlp = Some("post_feedforward_layernorm");
    decoder.attention.qk_norm = Some(QkNorm::Head);
    decoder.attention.soft_cap = fields.attn_logit_softcapping;
    decoder.head.soft_cap = fields.final_logit_softcapping;
    let pattern = fields.sliding_window_pattern.or(fields.private_sliding_window_pattern).unwrap_or(6).max(1);
    let usual = |layer: usize| !(layer + 1).is_multiple_of(pattern);
    let sliding = sliding_layers(fields.layer_types.as_deref(), decoder.layers.len(), usual)?;
    for (layer, sliding) in decoder.layers.iter_mut().zip(sliding) {
        layer.scale = fields.query_pre_attn_scalar.powf(-0.5);
        layer.window = sliding.then_some(fields.sliding_window);
        layer.rotary = Some(usize::from(sliding));
    }
    Ok(decoder)
}
