//! Mixtral (Jiang et al. 2024, <https://arxiv.org/abs/2401.04088>): Mistral with experts in place of the MLP.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::decoder::FeedForward;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, ExpertLayout, ExpertsConfig};
use dictlearn_core::prelude::*;

/// Fields of a Mixtral config.json that affect the computation, with Hugging Face's defaults.
#[component(model "mixtral", summary = "Mixtral 8x7B, 8x22B and models of the same architecture",
    paper = "Jiang et al. 2024, Mixtral of Experts, https://arxiv.org/abs/2401.04088",
    example = "{num_local_experts: 4, num_experts_per_tok: 2}")]
pub struct MixtralConfig {
    #[serde(flatten)]
    common: CommonFields,
    /// Window of attention in tokens, including the query's own; null for full attention.
    sliding_window: Option<i64>,
    /// Number of experts.
    #[default(8)]
    num_local_experts: i64,
    /// Number of experts per token.
    #[default(2)]
    num_experts_per_tok: i64,
}

impl DecoderFamily for MixtralConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        decoder.attentions().for_each(|attention| attention.window = self.sliding_window);
        let (size, width) = ((self.num_local_experts, self.num_experts_per_tok), self.common.width()?);
        let experts = ExpertsConfig {
            layout: ExpertLayout::Each { gate: "w1", up: "w3", down: "w2" },
            ..ExpertsConfig::new("block_sparse_moe", size, width, self.common.act()?)
        };
        for layer in &mut decoder.layers {
            layer.feed_forward = FeedForward::Experts(experts.clone());
        }
        // Its name since transformers 5.
        decoder.aliases = vec![("mlp", "block_sparse_moe")];
        Ok(decoder)
    }
}
