//! Gemma 3n, text only (Google DeepMind 2025, <https://ai.google.dev/gemma/docs/gemma-3n>): Gemma 3 with several residual
//! streams (AltUp, Baykal et al. 2023, <https://arxiv.org/abs/2301.13310>), a learned residual connection of low rank
//! (LAuReL, Menghani et al. 2024, <https://arxiv.org/abs/2411.07501>), an input of its own for each layer, sparse MLPs, and
//! last layers that use the keys and values of earlier ones. Norms scale by their weight, not by 1 + weight; values are
//! normalised, and scores are not scaled.

use dictlearn_core::lm::config::{CommonFields, EachLayer, LayerInputs, causal};
use dictlearn_core::lm::{AltUpConfig, DecoderConfig, DecoderFamily, LaurelConfig};
use dictlearn_core::prelude::*;

/// Fields of a Gemma 3n config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gemma3n_text", summary = "Gemma 3n, text only",
    paper = "Baykal et al. 2023, Alternating Updates for Efficient Transformers, https://arxiv.org/abs/2301.13310",
    example = "{num_hidden_layers: 4, layer_types: [sliding_attention, full_attention, sliding_attention, full_attention], \
        num_kv_shared_layers: 2, activation_sparsity_pattern: [0.5, 0.5, 0, 0], head_dim: 8, laurel_rank: 4, \
        altup_num_inputs: 3, altup_active_idx: 1, hidden_size_per_layer_input: 8, vocab_size_per_layer_input: 90}")]
pub struct Gemma3nConfig {
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    inputs: LayerInputs,
    /// Base of the rotary frequencies in sliding-window layers.
    rope_local_base_freq: f64,
    /// Number of residual streams.
    altup_num_inputs: i64,
    /// Index of the stream that layers compute.
    altup_active_idx: i64,
    /// Whether a learned scale applies to the stream that gates a layer's own input.
    altup_correct_scale: bool,
    /// Rank of the learned residual connection beside attention.
    laurel_rank: i64,
    /// Fraction of the MLP's gates that are set to 0, for each layer. Default: 0.95 in the first ten of more than ten
    /// layers, 0 in others.
    activation_sparsity_pattern: Option<EachLayer<f64>>,
    /// Must be the width of a head, as in published files: scores are not scaled.
    query_pre_attn_scalar: Option<f64>,
    /// Must be false: only causal models are supported.
    use_bidirectional_attention: Option<bool>,
}

impl DecoderFamily for Gemma3nConfig {
    const DEFAULTS: &'static str = r#"{
        "vocab_size": 262400, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 35,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768,
        "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
        "attention_bias": false, "sliding_window": 512, "final_logit_softcapping": 30.0,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "num_kv_shared_layers": 15,
        "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "laurel_rank": 64,
        "altup_num_inputs": 4, "altup_active_idx": 0, "altup_correct_scale": true
    }"#;

    fn decoder(self) -> Result<DecoderConfig> {
        causal(self.use_bidirectional_attention == Some(true))?;
        let (head_dim, local) = (self.common.head_dim()?, self.rope_local_base_freq);
        if let Some(scalar) = self.query_pre_attn_scalar.filter(|scalar| *scalar != head_dim as f64) {
            bail!(InputError::new(format!("config.json: `query_pre_attn_scalar` is {scalar}, not {head_dim}")));
        }
        let longest = self.common.max_position_embeddings;
        let rotary = self.common.rope.full_and_sliding((head_dim, 1e6), (head_dim, local), longest)?;
        let mut decoder = self.common.decoder_with(rotary)?;
        let n_layers = decoder.layers.len();
        self.inputs.apply(&mut decoder, &self.inputs.sliding(n_layers, 5)?)?;
        let sparse = if n_layers > 10 { 10 } else { 0 };
        let default = || EachLayer::Each([vec![0.95; sparse], vec![0.0; n_layers - sparse]].concat());
        let sparsity = self.activation_sparsity_pattern.unwrap_or_else(default);
        for (mlp, sparsity) in decoder.mlps().zip(sparsity.of_layers("activation_sparsity_pattern", n_layers)?) {
            mlp.sparsity = sparsity;
        }
        for layer in &mut decoder.layers {
            layer.laurel = Some(LaurelConfig { rank: self.laurel_rank });
        }
        decoder.embed.streams = Some(AltUpConfig {
            count: self.altup_num_inputs,
            active: self.altup_active_idx,
            scaled: self.altup_correct_scale,
        });
        Ok(decoder)
    }
}
