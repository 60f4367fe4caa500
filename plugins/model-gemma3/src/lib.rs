//! Gemma 3, text only (Gemma team 2025, <https://arxiv.org/abs/2503.19786>): Gemma 2 with norms over each head's query and
//! key instead of bounded scores, and another rotary base in the layers whose attention slides.

use dictlearn_core::lm::config::{CommonFields, Sandwich};
use dictlearn_core::lm::decoder::QkNorm;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, Rotary};
use dictlearn_core::prelude::*;

/// The fields of a Gemma 3 config.json that change what it computes, with Hugging Face's defaults.
#[component(model "gemma3_text", summary = "Gemma 3, text only",
    paper = "Gemma team 2025, Gemma 3, https://arxiv.org/abs/2503.19786", example = "{sliding_window_pattern: 2}")]
pub struct Gemma3Config {
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    sandwich: Sandwich,
    /// Scores are bounded to ± this.
    attn_logit_softcapping: Option<f64>,
    /// Logits are bounded to ± this.
    final_logit_softcapping: Option<f64>,
    /// Where `layer_types` is not given: every so many layers one sees all positions.
    sliding_window_pattern: Option<usize>,
    /// The name that some files have for it.
    #[serde(rename = "_sliding_window_pattern")]
    private_sliding_window_pattern: Option<usize>,
    /// Base of the rotary frequencies in sliding layers.
    #[default(10_000.0)]
    rope_local_base_freq: f64,
}

impl DecoderFamily for Gemma3Config {
    fn decoder(mut self) -> Result<DecoderConfig> {
        let head_dim = *self.common.head_dim.get_or_insert(256);
        let rope = &self.common.rope;
        let longest = self.common.max_position_embeddings;
        let (theta, local) = (rope.rope_theta.unwrap_or(1e6), self.rope_local_base_freq);
        // What is not said by type of layers is said of the full ones.
        let full = match rope.rotary_of("full_attention", head_dim, theta, longest)? {
            Some(rotary) => rotary,
            None => rope.rotary(head_dim, theta, longest)?,
        };
        let local = match rope.rotary_of("sliding_attention", head_dim, local, longest)? {
            Some(rotary) => rotary,
            None => Rotary::new(head_dim, local)?,
        };
        let mut decoder = self.common.decoder_with(vec![full, local])?;
        decoder.head.tied = self.common.tie_word_embeddings.unwrap_or(true);
        // Its embedding module multiplies by itself.
        decoder.embed.scale_inside = true;
        decoder.attention.qk_norm = Some(QkNorm::Head);
        decoder.attention.soft_cap = self.attn_logit_softcapping;
        decoder.head.soft_cap = self.final_logit_softcapping;
        let pattern = self.sliding_window_pattern.or(self.private_sliding_window_pattern).unwrap_or(6).max(1);
        let sliding = self.sandwich.apply(&mut decoder, |layer| !(layer + 1).is_multiple_of(pattern))?;
        for (layer, sliding) in decoder.layers.iter_mut().zip(sliding) {
            layer.rotary = Some(usize::from(sliding));
        }
        Ok(decoder)
    }
}
