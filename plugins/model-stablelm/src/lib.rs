//! StableLM (Bellagente et al. 2024, <https://arxiv.org/abs/2402.17834>): Llama with layer norms and rotary embedding of
//! a part of each head. The 12B model has norms of each head's queries and keys, and attention and MLP in parallel.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, NormConfig, NormKind, NormedOver, QkNorm};
use dictlearn_core::prelude::*;

/// Fields of a StableLM config.json that affect the computation, with Hugging Face's defaults.
#[component(model "stablelm", summary = "StableLM 3B, StableLM 2",
    paper = "Bellagente et al. 2024, Stable LM 2 1.6B, https://arxiv.org/abs/2402.17834")]
pub struct StableLmConfig {
    #[serde(flatten)]
    common: CommonFields,
    /// Epsilon added to the variance in layer norms.
    #[default(1e-5)]
    layer_norm_eps: f64,
    /// Whether the projections to queries, keys and values have biases.
    #[default]
    use_qkv_bias: bool,
    /// Whether queries and keys are normalised, with weights for each head.
    #[default]
    qk_layernorm: bool,
    /// Whether attention and MLP both read the normalised input of the layer.
    #[default]
    use_parallel_residual: bool,
}

impl DecoderFamily for StableLmConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 50304, "hidden_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 6912,
        "max_position_embeddings": 4096, "partial_rotary_factor": 0.25}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        let eps = self.layer_norm_eps;
        decoder.norm = NormConfig { kind: NormKind::Layer, eps };
        if self.use_parallel_residual {
            for layer in &mut decoder.layers {
                layer.parallel = true;
                layer.norms.before_mlp = None;
            }
        }
        let qk_norm = QkNorm {
            over: NormedOver::EachHead,
            q: "q_layernorm",
            k: "k_layernorm",
            norm: Some(NormConfig { kind: NormKind::LayerNoBias, eps }),
        };
        for attention in decoder.attentions() {
            attention.input_bias = self.use_qkv_bias;
            attention.qk_norm = self.qk_layernorm.then_some(qk_norm);
        }
        Ok(decoder)
    }
}
