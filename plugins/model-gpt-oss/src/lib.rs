//! gpt-oss (OpenAI 2025, <https://arxiv.org/abs/2508.10925>): a mixture of experts with biases, clamped gates and attention
//! sinks; every other layer has a sliding window. Weights may be in bfloat16 or in MXFP4, as published.

use dictlearn_core::lm::config::{CommonFields, sliding_layers};
use dictlearn_core::lm::decoder::FeedForward;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, ExpertLayout, ExpertsConfig, Glu};
use dictlearn_core::prelude::*;
use serde_json::json;

/// Fields of a gpt-oss config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gpt_oss", summary = "gpt-oss 20B and 120B",
    paper = "OpenAI 2025, gpt-oss-120b and gpt-oss-20b Model Card, https://arxiv.org/abs/2508.10925",
    example = "{num_local_experts: 4, num_experts_per_tok: 2, head_dim: 8, num_key_value_heads: 2}")]
pub struct GptOssConfig {
    #[serde(flatten)]
    common: CommonFields,
    /// Whether the projections of attention have biases.
    #[default(true)]
    attention_bias: bool,
    /// Window of a sliding layer in tokens, including the query's own.
    #[default(128)]
    sliding_window: i64,
    /// Attention of each layer: `sliding_attention` or `full_attention`. Default: alternating, the first one sliding.
    layer_types: Option<Vec<String>>,
    /// Number of experts.
    #[default(128)]
    num_local_experts: i64,
    /// Number of experts per token.
    #[default(4)]
    num_experts_per_tok: i64,
    /// Bound on the gates and inputs of an expert.
    #[default(7.0)]
    swiglu_limit: f64,
    /// Factor in the sigmoid of an expert's gate.
    #[default(1.702)]
    swiglu_alpha: f64,
    /// Form of the weights; only `quant_method: mxfp4` is supported.
    quantization_config: Option<Value>,
}

impl DecoderFamily for GptOssConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000}"#;

    fn decoder(mut self) -> Result<DecoderConfig> {
        if let Some(form) = self.quantization_config.as_ref().filter(|form| form["quant_method"] != "mxfp4") {
            bail!(
                InputError::new(format!("config.json: `quantization_config` is {form}, which is not supported"))
                    .help("gpt-oss is read in MXFP4, as published, or in bfloat16 or float32")
            );
        }
        let rope = &mut self.common.rope;
        if rope.rope_scaling.is_none() && rope.rope_parameters.is_none() {
            rope.rope_scaling = Some(json!({"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": false, "original_max_position_embeddings": 4096}));
        }
        let mut decoder = self.common.decoder()?;
        let sliding = sliding_layers(self.layer_types.as_deref(), decoder.layers.len(), |layer| layer % 2 == 0)?;
        for (attention, sliding) in decoder.attentions().zip(sliding) {
            attention.bias(self.attention_bias);
            attention.sinks = Some("sinks");
            attention.window = sliding.then_some(self.sliding_window);
        }
        let (size, width) = ((self.num_local_experts, self.num_experts_per_tok), self.common.width()?);
        let experts = ExpertsConfig {
            router: "router",
            router_bias: true,
            glu: Glu::Clamped { limit: self.swiglu_limit, alpha: self.swiglu_alpha },
            layout: ExpertLayout::StackedTransposed,
            ..ExpertsConfig::new("mlp", size, width, self.common.act()?)
        };
        for layer in &mut decoder.layers {
            layer.feed_forward = FeedForward::Experts(experts.clone());
        }
        Ok(decoder)
    }
}
