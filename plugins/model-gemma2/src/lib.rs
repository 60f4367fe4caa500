//! Gemma 2 (Gemma team 2024, <https://arxiv.org/abs/2408.00118>): norms before and after attention and MLP, scores and
//! logits bounded by tanh, and every other layer with attention over a sliding window.

use dictlearn_core::lm::config::{Usual, read, sliding_layers};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily, NormKind, activation};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "gemma2";

/// The fields of a Gemma 2 config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Gemma2Config {
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
    #[serde(default = "attn_logit_softcapping")]
    attn_logit_softcapping: Option<f64>,
    /// Logits are bounded to ± this.
    #[serde(default = "final_logit_softcapping")]
    final_logit_softcapping: Option<f64>,
    /// How many positions a token of a sliding layer sees, itself among them.
    #[serde(default = "sliding_window")]
    sliding_window: i64,
    /// Which layers slide: `sliding_attention` or `full_attention` for each.
    layer_types: Option<Vec<String>>,
    /// Must be false: dictionaries are trained on models that read from left to right.
    use_bidirectional_attention: Option<bool>,
}

fn query_pre_attn_scalar() -> f64 {
    256.0
}

fn attn_logit_softcapping() -> Option<f64> {
    Some(50.0)
}

fn final_logit_softcapping() -> Option<f64> {
    Some(30.0)
}

fn sliding_window() -> i64 {
    4096
}

register! {
    model Gemma2Config, MODEL_TYPE,
    summary: "Gemma 2",
    paper: "Gemma team 2024, Gemma 2, https://arxiv.org/abs/2408.00118",
    example: "",
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
    let mut fields: Gemma2Config = read(config)?;
    if fields.use_bidirectional_attention == Some(true) {
        bail!(
            InputError::new("config.json: `use_bidirectional_attention` is not supported")
                .help("supported are models that read from left to right")
        );
    }
    fields.usual.head_dim.get_or_insert(256);
    let mut decoder = fields.usual.decoder()?;
    decoder.mlp.act = activation(fields.hidden_activation.as_deref().unwrap_or("gelu_pytorch_tanh"))?;
    decoder.norm.kind = NormKind::RmsPlusOne;
    decoder.embed.scale = (decoder.hidden_size as f64).sqrt();
    decoder.attention.input_bias = fields.attention_bias;
    decoder.attention.output_bias = fields.attention_bias;
    decoder.head.tied = fields.usual.tie_word_embeddings.unwrap_or(true);
    decoder.norm.after_attention = Some("post_attention_layernorm");
    decoder.norm.before_mlp = Some("pre_feedforward_layernorm");
    decoder.norm.after_mlp = Some("post_feedforward_layernorm");
    decoder.attention.soft_cap = fields.attn_logit_softcapping;
    decoder.head.soft_cap = fields.final_logit_softcapping;
    let sliding = sliding_layers(fields.layer_types.as_deref(), decoder.layers.len(), |layer| layer % 2 == 0)?;
    for (layer, sliding) in decoder.layers.iter_mut().zip(sliding) {
        layer.scale = fields.query_pre_attn_scalar.powf(-0.5);
        layer.window = sliding.then_some(fields.sliding_window);
    }
    Ok(decoder)
}
