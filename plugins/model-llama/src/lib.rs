//! Llama (Touvron et al. 2023, <https://arxiv.org/abs/2307.09288>; Llama 3, <https://arxiv.org/abs/2407.21783>) and
//! models of the same architecture: TinyLlama, SmolLM, Vicuna, DeepSeek's distillations.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily};
use dictlearn_core::prelude::*;

/// Fields of a Llama config.json that affect the computation, with Hugging Face's defaults.
#[component(model "llama", summary = "Llama 1 to 3, TinyLlama, SmolLM and models of the same architecture",
    paper = "Touvron et al. 2023, Llama 2, https://arxiv.org/abs/2307.09288")]
pub struct LlamaConfig {
    #[serde(flatten)]
    common: CommonFields,
    /// Whether the projections of attention have biases.
    #[default]
    attention_bias: bool,
    /// Whether the projections of the MLP have biases.
    #[default]
    mlp_bias: bool,
}

impl DecoderFamily for LlamaConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let LlamaConfig { common, attention_bias, mlp_bias, .. } = self;
        let mut decoder = common.decoder()?;
        decoder.attentions().for_each(|attention| attention.bias(attention_bias));
        decoder.mlps().for_each(|mlp| mlp.bias = mlp_bias);
        Ok(decoder)
    }
}
