//! Gemma 2 (Gemma team 2024, <https://arxiv.org/abs/2408.00118>): norms before and after attention and MLP, scores and
//! logits bounded by tanh, and every other layer with attention over a sliding window.

use dictlearn_core::lm::config::{Usual, sliding_layers};
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, NormKind, activation};
use dictlearn_core::prelude::*;

/// The fields of a Gemma 2 config.json that change what it computes, with Hugging Face's defaults.
#[component(model "gemma2", summary = "Gemma 2", paper = "Gemma team 2024, Gemma 2, https://arxiv.org/abs/2408.00118")]
pub struct Gemma2Config {
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
    #[default(Some(50.0))]
    attn_logit_softcapping: Option<f64>,
    /// Logits are bounded to ± this.
    #[default(Some(30.0))]
    final_logit_softcapping: Option<f64>,
    /// How many positions a token of a sliding layer sees, itself among them.
    #[default(4096)]
    sliding_window: i64,
    /// Which layers slide: `sliding_attention` or `full_attention` for each.
    layer_types: Option<Vec<String>>,
    /// Must be false: dictionaries are trained on models that read from left to right.
    use_bidirectional_attention: Option<bool>,
}

impl DecoderFamily for Gemma2Config {
    fn decoder(mut self) -> Result<DecoderConfig> {
        if self.use_bidirectional_attention == Some(true) {
            bail!(
                InputError::new("config.json: `use_bidirectional_attention` is not supported")
                    .help("supported are models that read from left to right")
            );
        }
        self.usual.head_dim.get_or_insert(256);
        let mut decoder = self.usual.decoder()?;
        decoder.mlp.act = activation(self.hidden_activation.as_deref().unwrap_or("gelu_pytorch_tanh"))?;
        decoder.norm.kind = NormKind::RmsPlusOne;
        decoder.embed.scale = (decoder.hidden_size as f64).sqrt();
        decoder.attention.input_bias = self.attention_bias;
        decoder.attention.output_bias = self.attention_bias;
        decoder.head.tied = self.usual.tie_word_embeddings.unwrap_or(true);
        decoder.norm.after_attention = Some("post_attention_layernorm");
        decoder.norm.before_mlp = Some("pre_feedforward_layernorm");
        decoder.norm.after_mlp = Some("post_feedforward_layernorm");
        decoder.attention.soft_cap = self.attn_logit_softcapping;
        decoder.head.soft_cap = self.final_logit_softcapping;
        let sliding = sliding_layers(self.layer_types.as_deref(), decoder.layers.len(), |layer| layer % 2 == 0)?;
        for (layer, sliding) in decoder.layers.iter_mut().zip(sliding) {
            layer.scale = self.query_pre_attn_scalar.powf(-0.5);
            layer.window = sliding.then_some(self.sliding_window);
        }
        Ok(decoder)
    }
}
