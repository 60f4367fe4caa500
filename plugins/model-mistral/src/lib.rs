//! Mistral (Jiang et al. 2023, <https://arxiv.org/abs/2310.06825>): Llama with attention over a sliding window.

use dictlearn_core::lm::config::{Usual, read};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "mistral";

/// The fields of a Mistral config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct MistralConfig {
    #[serde(flatten)]
    usual: Usual,
    /// How many positions a token sees, itself among them; null for all before it.
    #[serde(default = "sliding_window")]
    sliding_window: Option<i64>,
}

fn sliding_window() -> Option<i64> {
    Some(4096)
}

register! {
    model MistralConfig, MODEL_TYPE,
    summary: "Mistral 7B and other models of its architecture",
    paper: "Jiang et al. 2023, Mistral 7B, https://arxiv.org/abs/2310.06825",
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
    let MistralConfig { usual, sliding_window, .. } = read(config)?;
    let mut decoder = usual.decoder()?;
    for layer in &mut decoder.layers {
        layer.window = sliding_window;
    }
    Ok(decoder)
}
