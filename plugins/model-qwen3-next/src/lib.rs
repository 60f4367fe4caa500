//! Qwen3-Next (Qwen team 2025): gated DeltaNets (Yang et al. 2024, <https://arxiv.org/abs/2412.06464>) in most layers,
//! gated softmax attention in the rest, and mixtures of experts.

use dictlearn_core::lm::config::{CommonFields, DeltaLayers};
use dictlearn_core::lm::decoder::FeedForward;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, DeltaProjections, ExpertsConfig, MlpConfig, SharedExpert};
use dictlearn_core::prelude::*;

/// Fields of a Qwen3-Next config.json that affect the computation, with Hugging Face's defaults.
#[component(model "qwen3_next", summary = "Qwen3-Next",
    paper = "Yang et al. 2024, Gated Delta Networks, https://arxiv.org/abs/2412.06464",
    example = "{head_dim: 16, num_key_value_heads: 2, full_attention_interval: 2, linear_key_head_dim: 8, \
        linear_value_head_dim: 8, linear_num_key_heads: 2, linear_num_value_heads: 4, num_experts: 4, \
        num_experts_per_tok: 2, moe_intermediate_size: 16, shared_expert_intermediate_size: 16}")]
pub struct Qwen3NextConfig {
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    mixers: DeltaLayers,
    /// Number of experts; 0 for an MLP in each layer.
    #[default(512)]
    num_experts: i64,
    /// Number of experts per token.
    #[default(10)]
    num_experts_per_tok: i64,
    /// Width of an expert.
    #[default(512)]
    moe_intermediate_size: i64,
    /// Width of the expert that every token reaches.
    #[default(512)]
    shared_expert_intermediate_size: i64,
    /// Whether the chosen experts' probabilities are divided by their sum.
    #[default(true)]
    norm_topk_prob: bool,
    /// n: every n-th layer has experts.
    #[default(1)]
    decoder_sparse_step: usize,
    /// Layers with an MLP in place of experts.
    mlp_only_layers: Option<Vec<usize>>,
}

impl DecoderFamily for Qwen3NextConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "max_position_embeddings": 32768, "partial_rotary_factor": 0.25}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let (mut decoder, act) = (self.common.decoder()?, self.common.act()?);
        self.mixers.apply(&mut decoder, act, DeltaProjections::INTERLEAVED)?;
        let shared = MlpConfig { path: "shared_expert", ..MlpConfig::gated(self.shared_expert_intermediate_size, act) };
        let size = (self.num_experts, self.num_experts_per_tok);
        let experts = ExpertsConfig {
            renormalised: self.norm_topk_prob,
            shared: Some(SharedExpert { mlp: shared, gate: Some("shared_expert_gate") }),
            ..ExpertsConfig::new("mlp", size, self.moe_intermediate_size, act)
        };
        let dense = self.mlp_only_layers.unwrap_or_default();
        for (index, layer) in decoder.layers.iter_mut().enumerate() {
            let sparse = self.num_experts != 0 && (index + 1).is_multiple_of(self.decoder_sparse_step.max(1));
            if sparse && !dense.contains(&index) {
                layer.feed_forward = FeedForward::Experts(experts.clone());
            }
        }
        Ok(decoder)
    }
}
