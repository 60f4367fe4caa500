//! Gemma 2 (Gemma team 2024, <https://arxiv.org/abs/2408.00118>): norms before and after attention and MLP, tanh
//! soft-capping of attention scores and logits, and sliding-window attention in every other layer.

use dictlearn_core::lm::config::{CommonFields, Sandwich};
use dictlearn_core::lm::{DecoderConfig, DecoderFamily};
use dictlearn_core::prelude::*;

/// Fields of a Gemma 2 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gemma2", summary = "Gemma 2", paper = "Gemma team 2024, Gemma 2, https://arxiv.org/abs/2408.00118")]
pub struct Gemma2Config {
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    sandwich: Sandwich,
    /// Soft cap of the attention scores: bounds them to ± this value.
    #[default(Some(50.0))]
    attn_logit_softcapping: Option<f64>,
    /// Soft cap of the logits: bounds them to ± this value.
    #[default(Some(30.0))]
    final_logit_softcapping: Option<f64>,
}

impl DecoderFamily for Gemma2Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 8192, "tie_word_embeddings": true}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        self.sandwich.apply(&mut decoder, |layer| layer % 2 == 0)?;
        let soft_cap = self.attn_logit_softcapping;
        decoder.attentions().for_each(|attention| attention.soft_cap = soft_cap);
        decoder.head.soft_cap = self.final_logit_softcapping;
        Ok(decoder)
    }
}
