//! Qwen 2 (Yang et al. 2024, <https://arxiv.org/abs/2407.10671>) and 2.5: Llama with biases on queries, keys and values.

use dictlearn_core::lm::config::{Usual, read, sliding_layers};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "qwen2";

/// The fields of a Qwen 2 config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Qwen2Config {
    #[serde(flatten)]
    usual: Usual,
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
    model Qwen2Config, MODEL_TYPE,
    summary: "Qwen 1.5 to 2.5, and the distillations built on them",
    paper: "Yang et al. 2024, Qwen2, https://arxiv.org/abs/2407.10671",
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
    let fields: Qwen2Config = read(config)?;
    let mut decoder = fields.usual.decoder()?;
    decoder.attention.input_bias = true;
    let windowed = fields.use_sliding_window.then_some(fields.sliding_window).flatten();
    let first = fields.max_window_layers;
    let sliding = sliding_layers(fields.layer_types.as_deref(), decoder.layers.len(), |layer| layer >= first)?;
    for (layer, sliding) in decoder.layers.iter_mut().zip(sliding) {
        layer.window = windowed.filter(|_| sliding);
    }
    Ok(decoder)
}
