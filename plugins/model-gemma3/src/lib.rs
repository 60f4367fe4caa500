//! Gemma 3, text only (Gemma team 2025, <https://arxiv.org/abs/2503.19786>): Gemma 2 with norms over each head's query and
//! key instead of bounded scores, and another rotary base in the layers whose attention slides.

use dictlearn_core::lm::config::{Usual, sliding_layers};
use dictlearn_core::lm::decoder::QkNorm;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, NormKind, Rotary, activation};
use dictlearn_core::prelude::*;

/// The fields of a Gemma 3 config.json that change what it computes, with Hugging Face's defaults.
#[component(model "gemma3_text", summary = "Gemma 3, text only",
    paper = "Gemma team 2025, Gemma 3, https://arxiv.org/abs/2503.19786", example = "{sliding_window_pattern: 2}")]
pub struct Gemma3Config {
    #[serde(flatten)]
    usual: Usual,
    /// The MLP's activation.
    hidden_activation: Option<String>,
    /// Whether attention's projections have biases.
    #[default]
    attention_bias: bool,
    /// Scores are divided by the root of this.
    #[default(256.0)]
    query_pre_attn_scalar: f64,
    /// Scores are bounded to ± this.
    attn_logit_softcapping: Option<f64>,
    /// Logits are bounded to ± this.
    final_logit_softcapping: Option<f64>,
    /// How many positions a token of a sliding layer sees, itself among them.
    #[default(4096)]
    sliding_window: i64,
    /// Which layers slide: `sliding_attention` or `full_attention` for each.
    layer_types: Option<Vec<String>>,
    /// Must be false: dictionaries are trained on models that read from left to right.
    use_bidirectional_attention: Option<bool>,
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
        if self.use_bidirectional_attention == Some(true) {
            bail!(
                InputError::new("config.json: `use_bidirectional_attention` is not supported")
                    .help("supported are models that read from left to right")
            );
        }
        let head_dim = *self.usual.head_dim.get_or_insert(256);
        let rope = &self.usual.rope;
        let longest = self.usual.max_position_embeddings;
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
        let mut decoder = self.usual.decoder_with(vec![full, local])?;
        decoder.mlp.act = activation(self.hidden_activation.as_deref().unwrap_or("gelu_pytorch_tanh"))?;
        decoder.norm.kind = NormKind::RmsPlusOne;
        decoder.embed.scale = (decoder.hidden_size as f64).sqrt();
        decoder.attention.input_bias = self.attention_bias;
        decoder.attention.output_bias = self.attention_bias;
        decoder.head.tied = self.usual.tie_word_embeddings.unwrap_or(true);
        // Its embedding module multiplies by itself.
        decoder.embed.scale_inside = true;
        decoder.norm.after_attention = Some("post_attention_layernorm");
        decoder.norm.before_mlp = Some("pre_feedforward_layernorm");
        decoder.norm.after_mlp = Some("post_feedforward_layernorm");
        decoder.attention.qk_norm = Some(QkNorm::Head);
        decoder.attention.soft_cap = self.attn_logit_softcapping;
        decoder.head.soft_cap = self.final_logit_softcapping;
        let pattern = self.sliding_window_pattern.or(self.private_sliding_window_pattern).unwrap_or(6).max(1);
        let usual = |layer: usize| !(layer + 1).is_multiple_of(pattern);
        let sliding = sliding_layers(self.layer_types.as_deref(), decoder.layers.len(), usual)?;
        for (layer, sliding) in decoder.layers.iter_mut().zip(sliding) {
            layer.scale = self.query_pre_attn_scalar.powf(-0.5);
            layer.window = sliding.then_some(self.sliding_window);
            layer.rotary = Some(usize::from(sliding));
        }
        Ok(decoder)
    }
}
