//! Granite 3 (Granite team 2024, <https://github.com/ibm-granite/granite-3.0-language-models>), dense: Llama with factors
//! on embeddings, attention scores, branches and logits.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily};
use dictlearn_core::prelude::*;

/// Fields of a Granite config.json that affect the computation, with Hugging Face's defaults.
#[component(model "granite", summary = "Granite 3 (dense)",
    paper = "Granite team 2024, Granite 3.0, https://github.com/ibm-granite/granite-3.0-language-models")]
pub struct GraniteConfig {
    #[serde(flatten)]
    common: CommonFields,
    /// Whether the projections of attention have biases.
    #[default]
    attention_bias: bool,
    /// Whether the projections of the MLP have biases.
    #[default]
    mlp_bias: bool,
    /// Factor on token embeddings.
    #[default(1.0)]
    embedding_multiplier: f64,
    /// Factor on attention scores, in place of 1 / √(width of a head).
    #[default(1.0)]
    attention_multiplier: f64,
    /// Factor on the outputs of attention and MLP.
    #[default(1.0)]
    residual_multiplier: f64,
    /// Logits are divided by this.
    #[default(1.0)]
    logits_scaling: f64,
}

impl DecoderFamily for GraniteConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 2048}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        decoder.embed.scale = self.embedding_multiplier;
        decoder.head.scale = 1.0 / self.logits_scaling;
        for layer in &mut decoder.layers {
            layer.branch_scale = self.residual_multiplier;
        }
        for attention in decoder.attentions() {
            attention.bias(self.attention_bias);
            attention.scale = self.attention_multiplier;
        }
        decoder.mlps().for_each(|mlp| mlp.bias = self.mlp_bias);
        Ok(decoder)
    }
}
