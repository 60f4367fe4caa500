//! GPT-NeoX: the family of Pythia (Biderman et al. 2023, <https://arxiv.org/abs/2304.01373>), of GPT-NeoX-20B (Black et
//! al. 2022, <https://arxiv.org/abs/2204.06745>), and of the bundled model.
//!
//! A layer adds attention and MLP to the residual stream, both of the layer's input (`use_parallel_residual`) or one
//! after the other. Queries, keys and values come from one projection, head by head; the first dimensions of each head
//! are rotated by position.

use dictlearn_core::lm::config::read;
use dictlearn_core::lm::decoder::{
    AttentionConfig, EmbedConfig, HeadConfig, LayerConfig, MlpConfig, MlpLayout, NormConfig, Projections,
};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelCx, ModelFamily, NormKind, Rope, activation};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "gpt_neox";

/// The fields of a GPT-NeoX config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct GptNeoxConfig {
    /// Number of token ids.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Heads of a layer.
    pub num_attention_heads: i64,
    /// Width of an MLP.
    pub intermediate_size: i64,
    /// The longest context.
    pub max_position_embeddings: i64,
    /// The MLP's activation.
    #[serde(default = "gelu")]
    pub hidden_act: String,
    /// Added to the variance in layer norms.
    #[serde(default = "layer_norm_eps")]
    pub layer_norm_eps: f64,
    /// Which part of a head is rotated.
    #[serde(default = "rotary_pct")]
    pub rotary_pct: f64,
    /// Base of the rotary frequencies.
    #[serde(default = "rotary_emb_base")]
    pub rotary_emb_base: f64,
    /// What newer files have in the place of these two, and how frequencies are changed for long contexts.
    #[serde(flatten)]
    pub rope: Rope,
    /// Whether attention and MLP both read the layer's input.
    #[serde(default = "yes")]
    pub use_parallel_residual: bool,
    /// Whether attention's projections have biases.
    #[serde(default = "yes")]
    pub attention_bias: bool,
    /// Whether the head is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
}

fn gelu() -> String {
    "gelu".to_owned()
}

fn layer_norm_eps() -> f64 {
    1e-5
}

fn rotary_pct() -> f64 {
    0.25
}

fn rotary_emb_base() -> f64 {
    10_000.0
}

fn yes() -> bool {
    true
}

register! {
    model GptNeoxConfig, MODEL_TYPE,
    summary: "GPT-NeoX: Pythia, GPT-NeoX-20B, the bundled model",
    paper: "Biderman et al. 2023, Pythia, https://arxiv.org/abs/2304.01373",
    example: "",
}

inventory::submit! {
    ModelFamily {
        model_type: MODEL_TYPE,
        load: |config, weights, cx| Ok(Box::new(Decoder::open(decoder(&read(config)?)?, weights, cx)?)),
    }
}

/// A model with random weights: normal of deviation 0.02, projections back to the stream divided by √(2 · layers).
pub fn random(config: &GptNeoxConfig, cx: &ModelCx) -> Result<Decoder> {
    let deviation = 0.02;
    let back = deviation / (2.0 * config.num_hidden_layers as f64).sqrt();
    Decoder::with(decoder(config)?, cx, |name, shape| {
        let float = (Kind::Float, cx.device);
        Ok(if name.contains("norm.weight") {
            Tensor::ones(shape, float)
        } else if name.ends_with("bias") {
            Tensor::zeros(shape, float)
        } else if name.ends_with("dense.weight") || name.ends_with("dense_4h_to_h.weight") {
            Tensor::randn(shape, float) * back
        } else {
            Tensor::randn(shape, float) * deviation
        })
    })
}

fn decoder(config: &GptNeoxConfig) -> Result<DecoderConfig> {
    let (d, heads) = (config.hidden_size, config.num_attention_heads);
    let head_dim = DecoderConfig::head_dim(d, heads)?;
    let mut rope = config.rope.clone();
    rope.partial_rotary_factor.get_or_insert(config.rotary_pct);
    let layer = LayerConfig { window: None, rotary: Some(0), scale: (head_dim as f64).powf(-0.5) };
    Ok(DecoderConfig {
        hidden_size: d,
        vocab_size: config.vocab_size,
        max_positions: Some(config.max_position_embeddings),
        layers: vec![layer; config.num_hidden_layers],
        rotary: vec![rope.rotary(head_dim, config.rotary_emb_base, config.max_position_embeddings)?],
        layers_path: "gpt_neox.layers",
        embed: EmbedConfig { tokens: "gpt_neox.embed_in", positions: None, scale: 1.0, scale_inside: false },
        norm: NormConfig {
            kind: NormKind::Layer,
            eps: config.layer_norm_eps,
            before_attention: Some("input_layernorm"),
            after_attention: None,
            before_mlp: Some("post_attention_layernorm"),
            after_mlp: None,
        },
        attention: AttentionConfig {
            path: "attention",
            heads,
            kv_heads: heads,
            head_dim,
            input: Projections::Interleaved("query_key_value"),
            output: "dense",
            input_bias: config.attention_bias,
            output_bias: config.attention_bias,
            transposed: false,
            qk_norm: None,
            soft_cap: None,
        },
        mlp: MlpConfig {
            path: "mlp",
            width: config.intermediate_size,
            layout: MlpLayout::Plain { up: "dense_h_to_4h", down: "dense_4h_to_h" },
            act_path: "act",
            act: activation(&config.hidden_act)?,
            bias: true,
            transposed: false,
        },
        parallel: config.use_parallel_residual,
        final_norm: "gpt_neox.final_layer_norm",
        head: HeadConfig { path: "embed_out", tied: config.tie_word_embeddings, soft_cap: None },
    })
}
