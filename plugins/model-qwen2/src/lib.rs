//! Qwen 2 (Yang et al. 2024, <https://arxiv.org/abs/2407.10671>) and 2.5: Llama with biases on queries, keys and values.

use dictlearn_core::lm::config::{Usual, sliding_layers};
use dictlearn_core::lm::{DecoderConfig, DecoderFamily};
use dictlearn_core::prelude::*;

/// The fields of a Qwen 2 config.json that change what it computes, with Hugging Face's defaults.
#[component(model "qwen2", summary = "Qwen 1.5 to 2.5, and the distillations built on them",
    paper = "Yang et al. 2024, Qwen2, https://arxiv.org/abs/2407.10671",
    example = "{use_sliding_window: true, max_window_layers: 1}")]
pub struct Qwen2Config {
    #[serde(flatten)]
    usual: Usual,
    /// Whether layers from `max_window_layers` on see only a window.
    #[default]
    use_sliding_window: bool,
    /// How many positions such a layer's tokens see, each itself among them.
    sliding_window: Option<i64>,
    /// The first layer that sees only a window.
    #[default(28)]
    max_window_layers: usize,
    /// The same by layer: `full_attention` or `sliding_attention`.
    layer_types: Option<Vec<String>>,
}

impl DecoderFamily for Qwen2Config {
    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.usual.decoder()?;
        decoder.attention.input_bias = true;
        let windowed = self.use_sliding_window.then_some(self.sliding_window).flatten();
        let first = self.max_window_layers;
        let sliding = sliding_layers(self.layer_types.as_deref(), decoder.layers.len(), |layer| layer >= first)?;
        for (layer, sliding) in decoder.layers.iter_mut().zip(sliding) {
            layer.window = windowed.filter(|_| sliding);
        }
        Ok(decoder)
    }
}
