//! Qwen 3.5 (Qwen team 2026), text only, dense and with mixtures of experts: gated DeltaNets (Yang et al. 2024,
//! <https://arxiv.org/abs/2412.06464>) in most layers, gated softmax attention in the rest.

use dictlearn_core::lm::config::{CommonFields, DeltaLayers};
use dictlearn_core::lm::decoder::FeedForward;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, DeltaProjections, ExpertsConfig, MlpConfig, SharedExpert};
use dictlearn_core::prelude::*;

/// Fields of a Qwen 3.5 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "qwen3_5_text", summary = "Qwen 3.5 (dense), text only",
    paper = "Yang et al. 2024, Gated Delta Networks, https://arxiv.org/abs/2412.06464", example = DeltaLayers::EXAMPLE)]
pub struct Qwen35Config {
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    mixers: DeltaLayers,
}

impl DecoderFamily for Qwen35Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 32768, "partial_rotary_factor": 0.25}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        self.mixers.apply(&mut decoder, self.common.act()?, DeltaProjections::SEPARATE)?;
        Ok(decoder)
    }
}

/// Fields of a Qwen 3.5 MoE config.json that affect the computation, with Hugging Face's defaults.
#[component(model "qwen3_5_moe_text", summary = "Qwen 3.5 mixtures of experts, text only",
    paper = "Yang et al. 2024, Gated Delta Networks, https://arxiv.org/abs/2412.06464",
    example = "{head_dim: 16, num_key_value_heads: 2, full_attention_interval: 2, linear_key_head_dim: 8, \
        linear_value_head_dim: 8, linear_num_key_heads: 2, linear_num_value_heads: 4, num_experts: 4, \
        num_experts_per_tok: 2, moe_intermediate_size: 16, shared_expert_intermediate_size: 16}")]
pub struct Qwen35MoeConfig {
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    mixers: DeltaLayers,
    /// Number of experts.
    #[default(256)]
    num_experts: i64,
    /// Number of experts per token.
    #[default(8)]
    num_experts_per_tok: i64,
    /// Width of an expert.
    #[default(512)]
    moe_intermediate_size: i64,
    /// Width of the expert that every token reaches.
    #[default(512)]
    shared_expert_intermediate_size: i64,
}

impl DecoderFamily for Qwen35MoeConfig {
    // No layer has an MLP.
    const DEFAULTS: &'static str = r#"{"vocab_size": 248320, "hidden_size": 2048, "intermediate_size": 0,
        "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "max_position_embeddings": 32768, "partial_rotary_factor": 0.25}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let (mut decoder, act) = (self.common.decoder()?, self.common.act()?);
        self.mixers.apply(&mut decoder, act, DeltaProjections::SEPARATE)?;
        let shared = MlpConfig { path: "shared_expert", ..MlpConfig::gated(self.shared_expert_intermediate_size, act) };
        let size = (self.num_experts, self.num_experts_per_tok);
        let experts = ExpertsConfig {
            shared: Some(SharedExpert { mlp: shared, gate: Some("shared_expert_gate") }),
            ..ExpertsConfig::new("mlp", size, self.moe_intermediate_size, act)
        };
        for layer in &mut decoder.layers {
            layer.feed_forward = FeedForward::Experts(experts.clone());
        }
        Ok(decoder)
    }
}
