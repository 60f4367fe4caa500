//! OLMoE (Muennighoff et al. 2024, <https://arxiv.org/abs/2409.02060>): Llama with experts in place of the MLP, norms over
//! all queries and all keys, and, in some models, clamped queries, keys and values.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::decoder::FeedForward;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, ExpertsConfig, NormedOver, QkNorm};
use dictlearn_core::prelude::*;

/// Fields of an OLMoE config.json that affect the computation, with Hugging Face's defaults.
#[component(model "olmoe", summary = "OLMoE",
    paper = "Muennighoff et al. 2024, OLMoE, https://arxiv.org/abs/2409.02060",
    example = "{num_experts: 4, num_experts_per_tok: 2, clip_qkv: 0.5}")]
pub struct OlmoeConfig {
    #[serde(flatten)]
    common: CommonFields,
    /// Whether the projections of attention have biases.
    #[default]
    attention_bias: bool,
    /// Bound on queries, keys and values: they are clamped to ± this value.
    clip_qkv: Option<f64>,
    /// Number of experts.
    #[default(64)]
    num_experts: i64,
    /// Number of experts per token.
    #[default(8)]
    num_experts_per_tok: i64,
    /// Whether the chosen experts' probabilities are divided by their sum.
    #[default]
    norm_topk_prob: bool,
}

impl DecoderFamily for OlmoeConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048,
        "num_hidden_layers": 16, "num_attention_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        for attention in decoder.attentions() {
            attention.bias(self.attention_bias);
            attention.qk_norm = Some(QkNorm::new(NormedOver::All));
            attention.clip = self.clip_qkv;
        }
        let size = (self.num_experts, self.num_experts_per_tok);
        let experts = ExpertsConfig {
            renormalised: self.norm_topk_prob,
            ..ExpertsConfig::new("mlp", size, self.common.width()?, self.common.act()?)
        };
        for layer in &mut decoder.layers {
            layer.feed_forward = FeedForward::Experts(experts.clone());
        }
        Ok(decoder)
    }
}
