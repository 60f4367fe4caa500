//! BLOOM (BigScience 2022, <https://arxiv.org/abs/2211.05100>): attention biases that grow with the distance (ALiBi,
//! Press et al. 2021, <https://arxiv.org/abs/2108.12409>) instead of position embeddings, and a norm of the embeddings.
//! As in Hugging Face, the modules of attention and MLP add the residual stream to their output themselves.

use dictlearn_core::lm::decoder::{EmbedConfig, FeedForward, HeadConfig, LayerConfig, NormNames, Residual};
use dictlearn_core::lm::{
    Activation, Alibi, AttentionConfig, DecoderConfig, DecoderFamily, MlpConfig, NormConfig, NormKind, Projections,
};
use dictlearn_core::prelude::*;

/// Fields of a BLOOM config.json that affect the computation, with Hugging Face's defaults.
#[component(model "bloom", summary = "BLOOM, BLOOMZ",
    paper = "BigScience 2022, BLOOM, https://arxiv.org/abs/2211.05100")]
pub struct BloomConfig {
    /// Number of token ids.
    #[default(250880)]
    vocab_size: i64,
    /// Width of the residual stream.
    #[default(64)]
    hidden_size: i64,
    /// Width of the residual stream, in older files; takes precedence over `hidden_size`.
    n_embed: Option<i64>,
    /// Number of layers.
    #[default(2)]
    #[serde(alias = "num_hidden_layers")]
    n_layer: usize,
    /// Number of attention heads per layer.
    #[default(8)]
    #[serde(alias = "num_attention_heads")]
    n_head: i64,
    /// Epsilon added to the variance in layer norms.
    #[default(1e-5)]
    layer_norm_epsilon: f64,
    /// Whether attention and MLP add their output to their normalised input instead of the residual stream.
    #[default]
    apply_residual_connection_post_layernorm: bool,
    /// Whether head and token embedding share one weight.
    #[default(true)]
    tie_word_embeddings: bool,
}

impl DecoderFamily for BloomConfig {
    fn decoder(self) -> Result<DecoderConfig> {
        let (d, heads) = (self.n_embed.unwrap_or(self.hidden_size), self.n_head);
        let head_dim = DecoderConfig::head_dim(d, heads)?;
        let input = Projections::Interleaved("query_key_value");
        let attention = AttentionConfig {
            alibi: Some(Alibi { heads, rounded: false, factor: 1.0 }),
            ..AttentionConfig::new("self_attention", (heads, head_dim), input, "dense").with_bias(true)
        };
        let mlp = MlpConfig {
            act_path: "gelu_impl",
            ..MlpConfig::plain(4 * d, ("dense_h_to_4h", "dense_4h_to_h"), Activation::GeluTanh)
        };
        let norms = NormNames::before("input_layernorm", "post_attention_layernorm");
        let layer = LayerConfig {
            residual: match self.apply_residual_connection_post_layernorm {
                true => Residual::InsideToNormed,
                false => Residual::Inside,
            },
            ..LayerConfig::new(attention, FeedForward::Mlp(mlp), norms)
        };
        Ok(DecoderConfig {
            hidden_size: d,
            vocab_size: self.vocab_size,
            max_positions: None,
            layers: vec![layer; self.n_layer],
            rotary: Vec::new(),
            root: "transformer",
            layers_name: "h",
            embed: EmbedConfig { norm: Some("word_embeddings_layernorm"), ..EmbedConfig::tokens("word_embeddings") },
            norm: NormConfig { kind: NormKind::Layer, eps: self.layer_norm_epsilon },
            final_norm: Some("ln_f"),
            head: HeadConfig::new(self.tie_word_embeddings),
            aliases: Vec::new(),
        })
    }
}
