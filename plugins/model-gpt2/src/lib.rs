//! GPT-2 (Radford et al. 2019,
//! <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>): learned
//! positions, layer norms before attention and MLP, weights that lie transposed.

use dictlearn_core::lm::config::read;
use dictlearn_core::lm::decoder::{
    AttentionConfig, EmbedConfig, HeadConfig, LayerConfig, MlpConfig, MlpLayout, NormConfig, Projections,
};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily, NormKind, activation};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "gpt2";

/// The fields of a GPT-2 config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct Gpt2Config {
    /// Number of token ids.
    vocab_size: i64,
    /// Width of the residual stream.
    n_embd: i64,
    /// Number of layers.
    n_layer: usize,
    /// Heads of a layer.
    n_head: i64,
    /// Width of an MLP; four times the stream's where it is not given.
    n_inner: Option<i64>,
    /// The longest context.
    n_positions: i64,
    /// The MLP's activation.
    #[serde(default = "gelu_new")]
    activation_function: String,
    /// Added to the variance in layer norms.
    #[serde(default = "layer_norm_epsilon")]
    layer_norm_epsilon: f64,
    /// Whether scores are divided by the root of a head's width.
    #[serde(default = "yes")]
    scale_attn_weights: bool,
    /// Whether they are divided by the layer's number as well, counted from 1.
    #[serde(default)]
    scale_attn_by_inverse_layer_idx: bool,
    /// Whether the head is the embedding.
    #[serde(default = "yes")]
    tie_word_embeddings: bool,
}

fn gelu_new() -> String {
    "gelu_new".to_owned()
}

fn layer_norm_epsilon() -> f64 {
    1e-5
}

fn yes() -> bool {
    true
}

register! {
    model Gpt2Config, MODEL_TYPE,
    summary: "GPT-2, DistilGPT-2, and other models of their architecture",
    paper: "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, \
            https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf",
    example: "{n_embd: 32, n_layer: 2, n_head: 4, n_positions: 64}",
}

inventory::submit! {
    ModelFamily {
        model_type: MODEL_TYPE,
        load: |config, weights, cx| Ok(Box::new(Decoder::open(decoder(read(config)?)?, weights, cx)?)),
    }
}

fn decoder(config: Gpt2Config) -> Result<DecoderConfig> {
    let head_dim = DecoderConfig::head_dim(config.n_embd, config.n_head)?;
    let layer = |index: usize| {
        let scale = if config.scale_attn_weights { (head_dim as f64).powf(-0.5) } else { 1.0 };
        let by_layer = if config.scale_attn_by_inverse_layer_idx { index as f64 + 1.0 } else { 1.0 };
        LayerConfig { window: None, rotary: None, scale: scale / by_layer }
    };
    Ok(DecoderConfig {
        hidden_size: config.n_embd,
        vocab_size: config.vocab_size,
        max_positions: Some(config.n_positions),
        layers: (0..config.n_layer).map(layer).collect(),
        rotary: Vec::new(),
        layers_path: "transformer.h",
        embed: EmbedConfig {
            tokens: "transformer.wte",
            positions: Some("transformer.wpe"),
            scale: 1.0,
            scale_inside: false,
        },
        norm: NormConfig {
            kind: NormKind::Layer,
            eps: config.layer_norm_epsilon,
            before_attention: Some("ln_1"),
            after_attention: None,
            before_mlp: Some("ln_2"),
            after_mlp: None,
        },
        attention: AttentionConfig {
            path: "attn",
            heads: config.n_head,
            kv_heads: config.n_head,
            head_dim,
            input: Projections::Joined("c_attn"),
            output: "c_proj",
            input_bias: true,
            output_bias: true,
            transposed: true,
            qk_norm: None,
            soft_cap: None,
        },
        mlp: MlpConfig {
            path: "mlp",
            width: config.n_inner.unwrap_or(4 * config.n_embd),
            layout: MlpLayout::Plain { up: "c_fc", down: "c_proj" },
            act_path: "act",
            act: activation(&config.activation_function)?,
            bias: true,
            transposed: true,
        },
        parallel: false,
        final_norm: "transformer.ln_f",
        head: HeadConfig { path: "lm_head", tied: config.tie_word_embeddings, soft_cap: None },
    })
}
