//! Phi-3 (Abdin et al. 2024, <https://arxiv.org/abs/2404.14219>) and Phi-4: Llama with one projection for queries, keys
//! and values, and one for gate and up.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, MlpLayout, Projections};
use dictlearn_core::prelude::*;

/// Fields of a Phi-3 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "phi3", summary = "Phi-3, Phi-3.5 and Phi-4 (not mixtures of experts)",
    paper = "Abdin et al. 2024, Phi-3, https://arxiv.org/abs/2404.14219")]
pub struct Phi3Config {
    #[serde(flatten)]
    common: CommonFields,
    /// Window of attention in tokens, including the query's own; null for full attention.
    sliding_window: Option<i64>,
}

impl DecoderFamily for Phi3Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let Phi3Config { common, sliding_window, .. } = self;
        let mut decoder = common.decoder()?;
        for attention in decoder.attentions() {
            attention.window = sliding_window;
            attention.input = Projections::Joined("qkv_proj");
        }
        for mlp in decoder.mlps() {
            mlp.layout = MlpLayout::GatedJoined { gate_up: "gate_up_proj", down: "down_proj" };
            mlp.act_path = "activation_fn";
        }
        Ok(decoder)
    }
}
