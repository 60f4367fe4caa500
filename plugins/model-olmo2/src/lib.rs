//! OLMo 2 (OLMo team 2025, <https://arxiv.org/abs/2501.00656>): Llama with norms after attention and MLP instead of
//! before, and norms over all queries and all keys.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::decoder::NormNames;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, NormedOver, QkNorm};
use dictlearn_core::prelude::*;

/// Fields of an OLMo 2 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "olmo2", summary = "OLMo 2",
    paper = "OLMo team 2025, 2 OLMo 2 Furious, https://arxiv.org/abs/2501.00656")]
pub struct Olmo2Config {
    #[serde(flatten)]
    common: CommonFields,
    /// Whether the projections of attention have biases.
    #[default]
    attention_bias: bool,
}

impl DecoderFamily for Olmo2Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let Olmo2Config { common, attention_bias, .. } = self;
        let mut decoder = common.decoder()?;
        for layer in &mut decoder.layers {
            layer.norms = NormNames::after("post_attention_layernorm", "post_feedforward_layernorm");
        }
        for attention in decoder.attentions() {
            attention.bias(attention_bias);
            attention.qk_norm = Some(QkNorm::new(NormedOver::All));
        }
        Ok(decoder)
    }
}
