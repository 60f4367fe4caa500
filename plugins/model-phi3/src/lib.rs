//! Phi-3 (Abdin et al. 2024, <https://arxiv.org/abs/2404.14219>) and Phi-4: Llama with queries, keys and values from one
//! projection, and gate and up from another.

use dictlearn_core::lm::config::{Usual, read};
use dictlearn_core::lm::decoder::{MlpLayout, Projections};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "phi3";

/// The fields of a Phi-3 config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Phi3Config {
    #[serde(flatten)]
    usual: Usual,
    /// How many positions a token sees, itself among them; null for all before it.
    sliding_window: Option<i64>,
}

register! {
    model Phi3Config, MODEL_TYPE,
    summary: "Phi-3, Phi-3.5 and Phi-4 (not the mixtures of experts)",
    paper: "Abdin et al. 2024, Phi-3, https://arxiv.org/abs/2404.14219",
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
    let Phi3Config { mut usual, sliding_window, .. } = read(config)?;
    usual.rms_norm_eps.get_or_insert(1e-5);
    // Both 4 and 5 take this one before the one in `rope_parameters`, even where the file does not have it.
    usual.rope.original_max_position_embeddings.get_or_insert(4096.0);
    let mut decoder = usual.decoder()?;
    for layer in &mut decoder.layers {
        layer.window = sliding_window;
    }
    decoder.attention.input = Projections::Joined("qkv_proj");
    decoder.mlp.layout = MlpLayout::GatedJoined { gate_up: "gate_up_proj", down: "down_proj" };
    decoder.mlp.act_path = "activation_fn";
    Ok(decoder)
}
