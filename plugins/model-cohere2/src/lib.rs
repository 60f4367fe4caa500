//! Cohere 2: Command R7B and Command A (Cohere 2025, <https://arxiv.org/abs/2504.00698>). Attention and MLP read the
//! layer's normalised input in parallel; only sliding-window layers have rotary embedding, of neighbouring dimensions.

use dictlearn_core::lm::config::{CommonFields, sliding_layers};
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, NormConfig, NormKind};
use dictlearn_core::prelude::*;

/// Fields of a Cohere 2 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "cohere2", summary = "Command R7B, Command A",
    paper = "Cohere 2025, Command A, https://arxiv.org/abs/2504.00698", example = "{sliding_window_pattern: 2}")]
pub struct Cohere2Config {
    #[serde(flatten)]
    common: CommonFields,
    /// Epsilon added to the variance in layer norms.
    #[default(1e-5)]
    layer_norm_eps: f64,
    /// Factor on logits.
    #[default(0.0625)]
    logit_scale: f64,
    /// Whether the projections of attention have biases.
    #[default]
    attention_bias: bool,
    /// Window of a sliding layer in tokens, including the query's own.
    #[default(Some(4096))]
    sliding_window: Option<i64>,
    /// Attention of each layer: `sliding_attention` or `full_attention`.
    layer_types: Option<Vec<String>>,
    /// n: without `layer_types`, every n-th layer has full attention.
    #[default(4)]
    sliding_window_pattern: usize,
}

impl DecoderFamily for Cohere2Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 256000, "hidden_size": 8192, "num_hidden_layers": 40,
        "num_attention_heads": 64, "intermediate_size": 22528, "max_position_embeddings": 8192,
        "tie_word_embeddings": true}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let Cohere2Config { common, sliding_window_pattern: pattern, .. } = self;
        let rotary = common.rope.rotary(common.head_dim()?, 10_000.0, common.max_position_embeddings)?;
        let mut decoder = common.decoder_with(vec![rotary.interleaved()])?;
        decoder.norm = NormConfig { kind: NormKind::LayerNoBias, eps: self.layer_norm_eps };
        decoder.head.scale = self.logit_scale;
        for layer in &mut decoder.layers {
            layer.parallel = true;
            layer.norms.before_mlp = None;
        }
        let slides = |layer: usize| !(layer + 1).is_multiple_of(pattern);
        let sliding = sliding_layers(self.layer_types.as_deref(), decoder.layers.len(), slides)?;
        for (attention, sliding) in decoder.attentions().zip(sliding) {
            attention.bias(self.attention_bias);
            attention.window = self.sliding_window.filter(|_| sliding);
            attention.rotary = sliding.then_some(0);
        }
        Ok(decoder)
    }
}
