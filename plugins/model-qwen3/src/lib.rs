//! Qwen 3 (Yang et al. 2025, <https://arxiv.org/abs/2505.09388>), dense: Llama with norms over each head's query and key.

use dictlearn_core::lm::config::{Usual, read, sliding_layers};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily, decoder::QkNorm};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "qwen3";

/// The fields of a Qwen 3 config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Qwen3Config {
    #[serde(flatten)]
    usual: Usual,
    /// Whether attention's projections have biases.
    #[serde(default)]
    attention_bias: bool,
    /// Whether layers from `max_window_layers` on see only a window.
    #[serde(default)]
    use_sliding_window: bool,
    /// How many positions such a layer's tokens see, each itself among them.
    sliding_window: Option<i64>,
    /// The first layer that sees only a window.
    #[serde(default = "max_window_layers")]
    max_window_layers: usize,
    /// The same by layer: `full_attention` or `sliding_attention`.
    layer_types: Option<Vec<String>>,
}

fn max_window_layers() -> usize {
    28
}

register! {
    model Qwen3Config, MODEL_TYPE,
    summary: "Qwen 3 (dense)",
    paper: "Yang et al. 2025, Qwen3, https://arxiv.org/abs/2505.09388",
    example: "{use_sliding_window: true, max_window_layers: 1}",
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
    let mut fields: Qwen3Config = read(config)?;
    // Unlike in the other families a head's width does not follow from the stream's.
    fields.usual.head_dim.get_or_insert(128);
    let mut decoder = fields.usual.decoder()?;
    decoder.attention.input_bias = fields.attention_bias;
    decoder.attention.output_bias = fields.attention_bias;
    decoder.attention.qk_norm = Some(QkNorm::Head);
    let windowed = fields.use_sliding_window.then_some(fields.sliding_window).flatten();
    let first = fields.max_window_layers;
    let sliding = sliding_layers(fields.layer_types.as_deref(), decoder.layers.len(), |layer| layer >= first)?;
    for (layer, sliding) in decoder.layers.iter_mut().zip(sliding) {
        layer.window = windowed.filter(|_| sliding);
    }
    Ok(decoder)
}
