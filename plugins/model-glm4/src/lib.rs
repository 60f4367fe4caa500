//! GLM-4 (GLM team 2024, <https://arxiv.org/abs/2406.12793>), as released in 2025 (GLM-4-0414): norms before and after
//! attention and MLP, and rotary embedding of neighbouring dimensions in a part of each head.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::decoder::NormNames;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, MlpLayout};
use dictlearn_core::prelude::*;

/// Fields of a GLM-4 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "glm4", summary = "GLM-4-0414",
    paper = "GLM team 2024, ChatGLM, https://arxiv.org/abs/2406.12793")]
pub struct Glm4Config {
    #[serde(flatten)]
    common: CommonFields,
    /// Whether the projections to queries, keys and values have biases.
    #[default(true)]
    attention_bias: bool,
}

impl DecoderFamily for Glm4Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 151552, "hidden_size": 4096, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 13696,
        "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let Glm4Config { common, attention_bias, .. } = self;
        let rotary = common.rope.rotary(common.head_dim()?, 10_000.0, common.max_position_embeddings)?;
        let mut decoder = common.decoder_with(vec![rotary.interleaved()])?;
        for layer in &mut decoder.layers {
            layer.norms = NormNames {
                before_attention: Some("input_layernorm"),
                after_attention: Some("post_self_attn_layernorm"),
                before_mlp: Some("post_attention_layernorm"),
                after_mlp: Some("post_mlp_layernorm"),
                ..NormNames::default()
            };
        }
        decoder.attentions().for_each(|attention| attention.input_bias = attention_bias);
        for mlp in decoder.mlps() {
            mlp.layout = MlpLayout::GatedJoined { gate_up: "gate_up_proj", down: "down_proj" };
            mlp.act_path = "activation_fn";
        }
        Ok(decoder)
    }
}
