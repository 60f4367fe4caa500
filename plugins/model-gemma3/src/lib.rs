//! Gemma 3, text only (Gemma team 2025, <https://arxiv.org/abs/2503.19786>): Gemma 2 with norms on each head's queries
//! and keys instead of soft-capped scores, and another rotary base in sliding-window layers.

use dictlearn_core::lm::config::{CommonFields, Sandwich};
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, NormedOver, QkNorm};
use dictlearn_core::prelude::*;

/// Fields of a Gemma 3 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gemma3_text", summary = "Gemma 3, text only",
    paper = "Gemma team 2025, Gemma 3, https://arxiv.org/abs/2503.19786", example = "{sliding_window_pattern: 2}")]
pub struct Gemma3Config {
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    sandwich: Sandwich,
    /// Soft cap of the logits: bounds them to ± this value.
    final_logit_softcapping: Option<f64>,
    /// n: without `layer_types`, every n-th layer has full attention. Default: 6.
    sliding_window_pattern: Option<usize>,
    /// Another name of `sliding_window_pattern`, in some files.
    #[serde(rename = "_sliding_window_pattern")]
    private_sliding_window_pattern: Option<usize>,
    /// Base of the rotary frequencies in sliding-window layers.
    #[default(10_000.0)]
    rope_local_base_freq: f64,
}

impl DecoderFamily for Gemma3Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131072, "tie_word_embeddings": true}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let (head_dim, local) = (self.common.head_dim()?, self.rope_local_base_freq);
        let longest = self.common.max_position_embeddings;
        let rotary = self.common.rope.full_and_sliding((head_dim, 1e6), (head_dim, local), longest)?;
        let mut decoder = self.common.decoder_with(rotary)?;
        // Gemma 3's embedding module applies the scale itself.
        decoder.embed.scale_inside = true;
        decoder.head.soft_cap = self.final_logit_softcapping;
        let pattern = self.sliding_window_pattern.or(self.private_sliding_window_pattern).unwrap_or(6).max(1);
        let sliding = self.sandwich.apply(&mut decoder, |layer| !(layer + 1).is_multiple_of(pattern))?;
        for (attention, sliding) in decoder.attentions().zip(sliding) {
            attention.rotary = Some(usize::from(sliding));
            attention.qk_norm = Some(QkNorm::new(NormedOver::Head));
        }
        Ok(decoder)
    }
}
