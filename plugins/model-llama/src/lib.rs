//! Llama (Touvron et al. 2023, <https://arxiv.org/abs/2307.09288>; Llama 3, <https://arxiv.org/abs/2407.21783>), and the
//! many models of its family: TinyLlama, SmolLM, Vicuna, DeepSeek's distillations.

use dictlearn_core::lm::config::{Usual, read};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "llama";

/// The fields of a Llama config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct LlamaConfig {
    #[serde(flatten)]
    usual: Usual,
    /// Whether attention's projections have biases.
    #[serde(default)]
    attention_bias: bool,
    /// Whether the MLP's projections have biases.
    #[serde(default)]
    mlp_bias: bool,
}

register! {
    model LlamaConfig, MODEL_TYPE,
    summary: "Llama 1 to 3, TinyLlama, SmolLM, and other models of their architecture",
    paper: "Touvron et al. 2023, Llama 2, https://arxiv.org/abs/2307.09288",
    example: "",
}

inventory::submit! {
    ModelFamily {
        model_type: MODEL_TYPE,
        load: |config, weights, cx| {
            Ok(Box::new(Decoder::open(decoder(config)?, weights, cx)?))
        },
    }
}

fn decoder(config: &Value) -> Result<DecoderConfig> {
    let LlamaConfig { usual, attention_bias, mlp_bias, .. } = read(config)?;
    let mut decoder = usual.decoder()?;
    decoder.attention.input_bias = attention_bias;
    decoder.attention.output_bias = attention_bias;
    decoder.mlp.bias = mlp_bias;
    Ok(decoder)
}
