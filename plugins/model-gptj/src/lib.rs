//! GPT-J (Wang and Komatsuzaki 2021, <https://github.com/kingoflolz/mesh-transformer-jax>): attention and MLP read the
//! layer's normalised input in parallel; neighbouring dimensions of a part of each head are rotated with each other.

use dictlearn_core::lm::decoder::{EmbedConfig, FeedForward, HeadConfig, LayerConfig, NormNames};
use dictlearn_core::lm::{
    AttentionConfig, DecoderConfig, DecoderFamily, MlpConfig, NormConfig, NormKind, Projections, Rotary, activation,
};
use dictlearn_core::prelude::*;

/// Fields of a GPT-J config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gptj", summary = "GPT-J",
    paper = "Wang and Komatsuzaki 2021, GPT-J-6B, https://github.com/kingoflolz/mesh-transformer-jax",
    example = "{rotary_dim: 4}")]
pub struct GptJConfig {
    /// Number of token ids.
    #[default(50400)]
    vocab_size: i64,
    /// Width of the residual stream.
    #[default(4096)]
    #[serde(alias = "hidden_size")]
    n_embd: i64,
    /// Number of layers.
    #[default(28)]
    #[serde(alias = "num_hidden_layers")]
    n_layer: usize,
    /// Number of attention heads per layer.
    #[default(16)]
    #[serde(alias = "num_attention_heads")]
    n_head: i64,
    /// Width of the MLP. Default: 4 · `n_embd`.
    n_inner: Option<i64>,
    /// Longest context, in tokens.
    #[default(2048)]
    #[serde(alias = "max_position_embeddings")]
    n_positions: i64,
    /// Number of rotated dimensions of a head; null for all.
    #[default(Some(64))]
    rotary_dim: Option<i64>,
    /// Activation function of the MLP.
    #[default("gelu_new")]
    activation_function: String,
    /// Epsilon added to the variance in layer norms.
    #[default(1e-5)]
    layer_norm_epsilon: f64,
    /// Whether head and token embedding share one weight.
    #[default]
    tie_word_embeddings: bool,
}

impl DecoderFamily for GptJConfig {
    fn decoder(self) -> Result<DecoderConfig> {
        let head_dim = DecoderConfig::head_dim(self.n_embd, self.n_head)?;
        let rotated = self.rotary_dim.unwrap_or(head_dim);
        if rotated % 2 != 0 || !(2..=head_dim).contains(&rotated) {
            bail!(InputError::new(format!(
                "config.json: `rotary_dim` is {rotated}; it must be even, and from 2 to a head's width, {head_dim}"
            )));
        }
        let attention = AttentionConfig {
            rotary: Some(0),
            ..AttentionConfig::new("attn", (self.n_head, head_dim), Projections::SEPARATE, "out_proj")
        };
        let width = self.n_inner.unwrap_or(4 * self.n_embd);
        let mlp = MlpConfig::plain(width, ("fc_in", "fc_out"), activation(&self.activation_function)?);
        let norms = NormNames { before_attention: Some("ln_1"), ..NormNames::default() };
        let layer = LayerConfig { parallel: true, ..LayerConfig::new(attention, FeedForward::Mlp(mlp), norms) };
        Ok(DecoderConfig {
            hidden_size: self.n_embd,
            vocab_size: self.vocab_size,
            max_positions: Some(self.n_positions),
            layers: vec![layer; self.n_layer],
            rotary: vec![Rotary::new(rotated, 10_000.0)?.interleaved()],
            root: "transformer",
            layers_name: "h",
            embed: EmbedConfig::tokens("wte"),
            norm: NormConfig { kind: NormKind::Layer, eps: self.layer_norm_epsilon },
            final_norm: Some("ln_f"),
            head: HeadConfig { bias: true, ..HeadConfig::new(self.tie_word_embeddings) },
            aliases: Vec::new(),
        })
    }
}
