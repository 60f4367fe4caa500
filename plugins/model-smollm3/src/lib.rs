//! SmolLM 3 (Bakouch et al. 2025, <https://huggingface.co/blog/smollm3>): Llama without rotary embedding in every fourth
//! layer (Yang et al. 2025, <https://arxiv.org/abs/2501.18795>).

use dictlearn_core::lm::config::{CommonFields, sliding_layers};
use dictlearn_core::lm::{DecoderConfig, DecoderFamily};
use dictlearn_core::prelude::*;

/// Fields of a SmolLM 3 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "smollm3", summary = "SmolLM 3",
    paper = "Bakouch et al. 2025, SmolLM3, https://huggingface.co/blog/smollm3",
    example = "{layer_types: [sliding_attention, full_attention]}")]
pub struct SmolLm3Config {
    #[serde(flatten)]
    common: CommonFields,
    /// Whether the projections of attention have biases.
    #[default]
    attention_bias: bool,
    /// Whether the projections of the MLP have biases.
    #[default]
    mlp_bias: bool,
    /// Whether each layer has rotary embedding: 1 or 0.
    no_rope_layers: Option<Vec<i64>>,
    /// n: without `no_rope_layers`, every n-th layer has no rotary embedding.
    #[default(4)]
    no_rope_layer_interval: usize,
    /// Whether, without `layer_types`, layers without rotary embedding use sliding-window attention.
    #[default]
    use_sliding_window: bool,
    /// Window of a sliding layer in tokens, including the query's own.
    sliding_window: Option<i64>,
    /// Attention of each layer: `full_attention` or `sliding_attention`.
    layer_types: Option<Vec<String>>,
}

impl DecoderFamily for SmolLm3Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 11008,
        "max_position_embeddings": 32768, "rope_theta": 2000000.0, "tie_word_embeddings": true}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        let n_layers = decoder.layers.len();
        let every = |layer: usize| !(layer + 1).is_multiple_of(self.no_rope_layer_interval);
        let rotary: Vec<bool> = match &self.no_rope_layers {
            Some(layers) => layers.iter().map(|rotary| *rotary != 0).collect(),
            None => (0..n_layers).map(every).collect(),
        };
        if rotary.len() != n_layers {
            bail!(InputError::new(format!(
                "config.json: `no_rope_layers` has {} entries for {n_layers} layers",
                rotary.len()
            )));
        }
        let slides = |layer: usize| self.use_sliding_window && !rotary[layer];
        let sliding = sliding_layers(self.layer_types.as_deref(), n_layers, slides)?;
        for (attention, (rotary, sliding)) in decoder.attentions().zip(rotary.iter().zip(sliding)) {
            attention.bias(self.attention_bias);
            attention.rotary = rotary.then_some(0);
            attention.window = self.sliding_window.filter(|_| sliding);
        }
        decoder.mlps().for_each(|mlp| mlp.bias = self.mlp_bias);
        Ok(decoder)
    }
}
