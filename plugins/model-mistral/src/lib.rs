//! Mistral (Jiang et al. 2023, <https://arxiv.org/abs/2310.06825>): Llama with sliding-window attention.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily};
use dictlearn_core::prelude::*;

/// Fields of a Mistral config.json that affect the computation, with Hugging Face's defaults.
#[component(model "mistral", summary = "Mistral 7B and models of the same architecture",
    paper = "Jiang et al. 2023, Mistral 7B, https://arxiv.org/abs/2310.06825")]
pub struct MistralConfig {
    #[serde(flatten)]
    common: CommonFields,
    /// Window of attention in tokens, including the query's own; null for full attention.
    #[default(Some(4096))]
    sliding_window: Option<i64>,
}

impl DecoderFamily for MistralConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let MistralConfig { common, sliding_window, .. } = self;
        let mut decoder = common.decoder()?;
        decoder.attentions().for_each(|attention| attention.window = sliding_window);
        Ok(decoder)
    }
}
