//! Phi-1, Phi-1.5 (Li et al. 2023, <https://arxiv.org/abs/2309.05463>) and Phi-2: attention and MLP read the layer's
//! normalised input in parallel, every projection has a bias, and a part of each head has rotary embedding.

use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, MlpConfig, NormConfig, NormKind, NormedOver, QkNorm};
use dictlearn_core::prelude::*;

/// Fields of a Phi config.json that affect the computation, with Hugging Face's defaults.
#[component(model "phi", summary = "Phi-1, Phi-1.5 and Phi-2",
    paper = "Li et al. 2023, Textbooks Are All You Need II: phi-1.5, https://arxiv.org/abs/2309.05463")]
pub struct PhiConfig {
    #[serde(flatten)]
    common: CommonFields,
    /// Epsilon added to the variance in layer norms.
    #[default(1e-5)]
    layer_norm_eps: f64,
    /// Whether each head's queries and keys are normalised.
    #[default]
    qk_layernorm: bool,
}

impl DecoderFamily for PhiConfig {
    const DEFAULTS: &'static str = r#"{"vocab_size": 51200, "hidden_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 32, "intermediate_size": 8192, "max_position_embeddings": 2048,
        "hidden_act": "gelu_new", "partial_rotary_factor": 0.5}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let PhiConfig { common, layer_norm_eps, qk_layernorm, .. } = self;
        let mut decoder = common.decoder()?;
        decoder.norm = NormConfig { kind: NormKind::Layer, eps: layer_norm_eps };
        decoder.final_norm = Some("final_layernorm");
        decoder.head.bias = true;
        for layer in &mut decoder.layers {
            layer.parallel = true;
            layer.norms.before_mlp = None;
        }
        let qk_norm = QkNorm { q: "q_layernorm", k: "k_layernorm", ..QkNorm::new(NormedOver::Head) };
        for attention in decoder.attentions() {
            attention.bias(true);
            attention.output = "dense";
            attention.qk_norm = qk_layernorm.then_some(qk_norm);
        }
        for mlp in decoder.mlps() {
            let plain = MlpConfig::plain(mlp.width, ("fc1", "fc2"), mlp.act);
            *mlp = MlpConfig { act_path: "activation_fn", ..plain };
        }
        Ok(decoder)
    }
}
