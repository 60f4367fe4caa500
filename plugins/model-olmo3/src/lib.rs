//! OLMo 3 (OLMo team 2025, <https://arxiv.org/abs/2512.13961>): OLMo 2 with sliding-window attention in most layers.

use dictlearn_core::lm::config::{CommonFields, sliding_layers};
use dictlearn_core::lm::decoder::NormNames;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, NormedOver, QkNorm};
use dictlearn_core::prelude::*;

/// Fields of an OLMo 3 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "olmo3", summary = "OLMo 3",
    paper = "OLMo team 2025, Olmo 3, https://arxiv.org/abs/2512.13961",
    example = "{layer_types: [sliding_attention, full_attention]}")]
pub struct Olmo3Config {
    #[serde(flatten)]
    common: CommonFields,
    /// Whether the projections of attention have biases.
    #[default]
    attention_bias: bool,
    /// Window of a sliding layer in tokens, including the query's own.
    #[default(Some(4096))]
    sliding_window: Option<i64>,
    /// Attention of each layer: `sliding_attention` or `full_attention`. Default: every fourth layer is full.
    layer_types: Option<Vec<String>>,
}

impl DecoderFamily for Olmo3Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 50304, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let Olmo3Config { common, attention_bias, sliding_window, layer_types, .. } = self;
        let (rope, head_dim, longest) = (&common.rope, common.head_dim()?, common.max_position_embeddings);
        let theta = rope.rope_theta.unwrap_or(500_000.0);
        // Scaling that is not given per layer type applies to full layers only.
        let full = match rope.rotary_of("full_attention", head_dim, theta, longest)? {
            Some(rotary) => rotary,
            None => rope.rotary(head_dim, theta, longest)?,
        };
        let sliding = match rope.rotary_of("sliding_attention", head_dim, theta, longest)? {
            Some(rotary) => rotary,
            None => full.unscaled(),
        };
        let mut decoder = common.decoder_with(vec![full, sliding])?;
        for layer in &mut decoder.layers {
            layer.norms = NormNames::after("post_attention_layernorm", "post_feedforward_layernorm");
        }
        let slides = |layer: usize| !(layer + 1).is_multiple_of(4);
        let sliding = sliding_layers(layer_types.as_deref(), decoder.layers.len(), slides)?;
        for (attention, sliding) in decoder.attentions().zip(sliding) {
            attention.bias(attention_bias);
            attention.qk_norm = Some(QkNorm::new(NormedOver::All));
            attention.rotary = Some(usize::from(sliding));
            attention.window = sliding_window.filter(|_| sliding);
        }
        Ok(decoder)
    }
}
