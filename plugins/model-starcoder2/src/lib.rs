//! StarCoder2 (Lozhkov et al. 2024, <https://arxiv.org/abs/2402.19173>): layer norms, biases, an MLP without a gate, and
//! sliding-window attention.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, MlpConfig, NormConfig, NormKind};
use dictlearn_core::prelude::*;

/// Fields of a StarCoder2 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "starcoder2", summary = "StarCoder2",
    paper = "Lozhkov et al. 2024, StarCoder 2 and The Stack v2, https://arxiv.org/abs/2402.19173")]
pub struct Starcoder2Config {
    #[serde(flatten)]
    common: CommonFields,
    /// Epsilon added to the variance in layer norms.
    #[default(1e-5)]
    norm_epsilon: f64,
    /// Whether all projections of the layers have biases.
    #[default(true)]
    use_bias: bool,
    /// Window of attention in tokens, including the query's own; null for full attention.
    sliding_window: Option<i64>,
}

impl DecoderFamily for Starcoder2Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 49152, "hidden_size": 3072, "num_hidden_layers": 30,
        "num_attention_heads": 24, "num_key_value_heads": 2, "intermediate_size": 12288,
        "max_position_embeddings": 4096, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": true}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let Starcoder2Config { common, norm_epsilon, use_bias, sliding_window, .. } = self;
        let mut decoder = common.decoder()?;
        decoder.norm = NormConfig { kind: NormKind::Layer, eps: norm_epsilon };
        for attention in decoder.attentions() {
            attention.bias(use_bias);
            attention.window = sliding_window;
        }
        for mlp in decoder.mlps() {
            *mlp = MlpConfig { bias: use_bias, ..MlpConfig::plain(mlp.width, ("c_fc", "c_proj"), mlp.act) };
        }
        Ok(decoder)
    }
}
