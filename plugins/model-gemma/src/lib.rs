//! Gemma (Gemma team 2024, <https://arxiv.org/abs/2403.08295>): Llama with a gated GELU, embeddings multiplied by √d, and
//! norms that scale by 1 + weight.

use dictlearn_core::lm::config::{Usual, read};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily, NormKind, activation};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "gemma";

/// The fields of a Gemma config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct GemmaConfig {
    #[serde(flatten)]
    usual: Usual,
    /// An older name of `hidden_act`.
    hidden_activation: Option<String>,
    /// Whether attention's projections have biases.
    #[serde(default)]
    attention_bias: bool,
}

register! {
    model GemmaConfig, MODEL_TYPE,
    summary: "Gemma 1",
    paper: "Gemma team 2024, Gemma, https://arxiv.org/abs/2403.08295",
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
    let mut fields: GemmaConfig = read(config)?;
    fields.usual.head_dim.get_or_insert(256);
    let mut decoder = fields.usual.decoder()?;
    // The first files say `gelu` and mean its tanh form.
    let act = match fields.usual.hidden_act.as_deref() {
        None | Some("gelu") => fields.hidden_activation.as_deref().unwrap_or("gelu_pytorch_tanh"),
        Some(other) => other,
    };
    decoder.mlp.act = activation(act)?;
    decoder.norm.kind = NormKind::RmsPlusOne;
    decoder.embed.scale = (decoder.hidden_size as f64).sqrt();
    decoder.attention.input_bias = fields.attention_bias;
    decoder.attention.output_bias = fields.attention_bias;
    decoder.head.tied = fields.usual.tie_word_embeddings.unwrap_or(true);
    Ok(decoder)
}
