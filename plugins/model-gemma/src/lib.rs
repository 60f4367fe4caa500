//! Gemma (Gemma team 2024, <https://arxiv.org/abs/2403.08295>): Llama with a gated GELU, embeddings multiplied by √d,
//! and norms that scale by 1 + weight.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, NormKind, activation};
use dictlearn_core::prelude::*;

/// Fields of a Gemma config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gemma", summary = "Gemma 1", paper = "Gemma team 2024, Gemma, https://arxiv.org/abs/2403.08295")]
pub struct GemmaConfig {
    #[serde(flatten)]
    common: CommonFields,
    /// Another name of `hidden_act`.
    hidden_activation: Option<String>,
    /// Whether the projections of attention have biases.
    #[default]
    attention_bias: bool,
}

impl DecoderFamily for GemmaConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
        "max_position_embeddings": 8192, "tie_word_embeddings": true}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        // The first files say `gelu` but mean its tanh approximation.
        let act = match self.common.hidden_act.as_deref() {
            None | Some("gelu") => self.hidden_activation.as_deref().unwrap_or("gelu_pytorch_tanh"),
            Some(other) => other,
        };
        let act = activation(act)?;
        decoder.mlps().for_each(|mlp| mlp.act = act);
        decoder.norm.kind = NormKind::RmsPlusOne;
        decoder.embed.scale = (decoder.hidden_size as f64).sqrt();
        let bias = self.attention_bias;
        decoder.attentions().for_each(|attention| attention.bias(bias));
        Ok(decoder)
    }
}
