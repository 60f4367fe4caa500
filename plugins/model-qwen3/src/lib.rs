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
    fn decoder(mut self) -> Result<DecoderConfig> {
        // Unlike in the other families, a head's width does not follow from the residual stream's.
        self.common.head_dim.get_or_insert(128);
        let mut decoder = self.common.decoder()?;
        for attention in decoder.attentions() {
            attention.bias(self.attention_bias);
            attention.qk_norm = Some(QkNorm::new(NormedOver::Head));
        }
        self.window.apply(&mut decoder)?;
        Ok(decoder)
    }
}
