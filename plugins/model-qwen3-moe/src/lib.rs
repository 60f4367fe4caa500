//! Qwen 3 mixtures of experts (Yang et al. 2025, <https://arxiv.org/abs/2505.09388>): Qwen 3 with experts in place of the
//! MLP.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::decoder::FeedForward;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, ExpertsConfig, NormedOver, QkNorm};
use dictlearn_core::prelude::*;

/// Fields of a Qwen 3 MoE config.json that affect the computation, with Hugging Face's defaults.
#[component(model "qwen3_moe", summary = "Qwen 3 mixtures of experts",
    paper = "Yang et al. 2025, Qwen3, https://arxiv.org/abs/2505.09388",
    example = "{num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16, use_sliding_window: true}")]
pub struct Qwen3MoeConfig {
    #[serde(flatten)]
    common: CommonFields,
    /// Whether the projections of attention have biases.
    #[default]
    attention_bias: bool,
    /// Whether all layers use sliding-window attention.
    #[default]
    use_sliding_window: bool,
    /// Window in tokens, including the query's own.
    #[default(Some(4096))]
    sliding_window: Option<i64>,
    /// Number of experts. Default: 128.
    num_experts: Option<i64>,
    /// Name of `num_experts` since transformers 5.
    num_local_experts: Option<i64>,
    /// Number of experts per token.
    #[default(8)]
    num_experts_per_tok: i64,
    /// Width of an expert.
    #[default(768)]
    moe_intermediate_size: i64,
    /// Whether the chosen experts' probabilities are divided by their sum.
    #[default]
    norm_topk_prob: bool,
    /// n: every n-th layer has experts.
    #[default(1)]
    decoder_sparse_step: usize,
    /// Layers with an MLP in place of experts.
    #[default]
    mlp_only_layers: Vec<usize>,
}

impl DecoderFamily for Qwen3MoeConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 32768}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        for attention in decoder.attentions() {
            attention.bias(self.attention_bias);
            attention.qk_norm = Some(QkNorm::new(NormedOver::Head));
            attention.window = self.sliding_window.filter(|_| self.use_sliding_window);
        }
        if let (Some(count), Some(other)) = (self.num_experts, self.num_local_experts)
            && count != other
        {
            bail!(InputError::new(format!(
                "config.json: `num_experts` is {count}, but `num_local_experts` is {other}"
            )));
        }
        let count = self.num_experts.or(self.num_local_experts).unwrap_or(128);
        let size = (count, self.num_experts_per_tok);
        let experts = ExpertsConfig {
            renormalised: self.norm_topk_prob,
            ..ExpertsConfig::new("mlp", size, self.moe_intermediate_size, self.common.act()?)
        };
        for (index, layer) in decoder.layers.iter_mut().enumerate() {
            let sparse = (index + 1).is_multiple_of(self.decoder_sparse_step.max(1));
            if sparse && !self.mlp_only_layers.contains(&index) {
                layer.feed_forward = FeedForward::Experts(experts.clone());
            }
        }
        Ok(decoder)
    }
}
