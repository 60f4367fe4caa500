//! Qwen 3 (Yang et al. 2025, <https://arxiv.org/abs/2505.09388>), dense: Llama with norms on each head's queries and
//! keys.

use dictlearn_core::lm::config::{CommonFields, UpperWindow};
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, NormedOver, QkNorm};
use dictlearn_core::prelude::*;

/// Fields of a Qwen 3 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "qwen3", summary = "Qwen 3 (dense)",
    paper = "Yang et al. 2025, Qwen3, https://arxiv.org/abs/2505.09388", example = UpperWindow::EXAMPLE)]
pub struct Qwen3Config {
    #[serde(flatten)]
    common: CommonFields,
    /// Whether the projections of attention have biases.
    #[default]
    attention_bias: bool,
    #[serde(flatten)]
    window: UpperWindow,
}

impl DecoderFamily for Qwen3Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "max_position_embeddings": 32768}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        for attention in decoder.attentions() {
            attention.bias(self.attention_bias);
            attention.qk_norm = Some(QkNorm::new(NormedOver::Head));
        }
        self.window.apply(&mut decoder)?;
        Ok(decoder)
    }
}
