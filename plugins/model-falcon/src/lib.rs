//! Falcon (Almazrouei et al. 2023, <https://arxiv.org/abs/2311.16867>), Falcon 2 and Falcon-RW: attention and MLP in
//! parallel, and one key and value for all heads or for groups of heads. Falcon-RW has ALiBi, biases, and attention and
//! MLP one after the other.
//!
//! Hugging Face's eager attention adds the biases of ALiBi twice: to its mask and to the scores. This family does too, as
//! in the recorded results; Hugging Face's other attentions add them once.

use dictlearn_core::lm::decoder::{EmbedConfig, FeedForward, HeadConfig, LayerConfig, NormNames};
use dictlearn_core::lm::{
    Alibi, AttentionConfig, DecoderConfig, DecoderFamily, MlpConfig, NormConfig, NormKind, Projections, Rope,
    activation,
};
use dictlearn_core::prelude::*;

/// Fields of a Falcon config.json that affect the computation, with Hugging Face's defaults.
#[component(model "falcon", summary = "Falcon, Falcon 2, Falcon-RW",
    paper = "Almazrouei et al. 2023, The Falcon Series of Open Language Models, https://arxiv.org/abs/2311.16867")]
pub struct FalconConfig {
    /// Number of token ids.
    #[default(65024)]
    vocab_size: i64,
    /// Width of the residual stream.
    #[default(4544)]
    hidden_size: i64,
    /// Width of the residual stream, in older files; takes precedence over `hidden_size`.
    n_embed: Option<i64>,
    /// Number of layers.
    #[default(32)]
    num_hidden_layers: usize,
    /// Number of attention heads per layer.
    #[default(71)]
    num_attention_heads: i64,
    /// Number of key/value heads per layer in the new architecture. Default: one per query head.
    num_kv_heads: Option<i64>,
    /// Whether all heads share one key and value; ignored in the new architecture.
    #[default(true)]
    multi_query: bool,
    /// Whether groups of heads share a key and value, and attention and MLP may have a norm each.
    #[default]
    new_decoder_architecture: bool,
    /// Whether attention and MLP both read the layer's input.
    #[default(true)]
    parallel_attn: bool,
    /// Number of norms in the new architecture: 2, or 1 that attention and MLP share. Default: 2.
    num_ln_in_parallel_attn: Option<i64>,
    /// Width of the MLP. Default: 4 · `hidden_size`.
    ffn_hidden_size: Option<i64>,
    /// Longest context, in tokens.
    #[default(2048)]
    max_position_embeddings: i64,
    /// Activation function of the MLP.
    #[default("gelu")]
    activation: String,
    /// Epsilon added to the variance in layer norms.
    #[default(1e-5)]
    layer_norm_epsilon: f64,
    /// Whether the projections of the layers have biases.
    #[default]
    bias: bool,
    /// Whether attention has biases that grow with the distance (ALiBi), instead of rotary embedding.
    #[default]
    alibi: bool,
    /// Rotary embedding.
    #[serde(flatten)]
    rope: Rope,
    /// Whether head and token embedding share one weight.
    #[default(true)]
    tie_word_embeddings: bool,
}

impl DecoderFamily for FalconConfig {
    fn decoder(self) -> Result<DecoderConfig> {
        let (d, heads) = (self.n_embed.unwrap_or(self.hidden_size), self.num_attention_heads);
        let (head_dim, longest) = (DecoderConfig::head_dim(d, heads)?, self.max_position_embeddings);
        let (new, parallel) = (self.new_decoder_architecture, self.parallel_attn);
        if new && !parallel {
            bail!(
                InputError::new("config.json: `new_decoder_architecture` is true, but `parallel_attn` is false")
                    .help("in the new architecture, attention and MLP both read the layer's input")
            );
        }
        let own_mlp_norm = new && self.num_ln_in_parallel_attn.is_none_or(|norms| norms == 2);
        let norms = match (parallel, own_mlp_norm) {
            (false, _) => NormNames::before("input_layernorm", "post_attention_layernorm"),
            (true, true) => NormNames::before("ln_attn", "ln_mlp"),
            (true, false) => NormNames { before_attention: Some("input_layernorm"), ..NormNames::default() },
        };
        let input = Projections::Interleaved("query_key_value");
        let attention = AttentionConfig {
            kv_heads: match (new, self.multi_query) {
                (true, _) => self.num_kv_heads.unwrap_or(heads),
                (false, true) => 1,
                (false, false) => heads,
            },
            rotary: (!self.alibi).then_some(0),
            alibi: self.alibi.then_some(Alibi { heads, rounded: true, factor: 2.0 * (head_dim as f64).powf(-0.5) }),
            ..AttentionConfig::new("self_attention", (heads, head_dim), input, "dense").with_bias(self.bias)
        };
        let width = self.ffn_hidden_size.unwrap_or(4 * d);
        let mlp = MlpConfig {
            bias: self.bias,
            ..MlpConfig::plain(width, ("dense_h_to_4h", "dense_4h_to_h"), activation(&self.activation)?)
        };
        let layer = LayerConfig { parallel, ..LayerConfig::new(attention, FeedForward::Mlp(mlp), norms) };
        Ok(DecoderConfig {
            hidden_size: d,
            vocab_size: self.vocab_size,
            max_positions: Some(longest),
            layers: vec![layer; self.num_hidden_layers],
            rotary: match self.alibi {
                true => Vec::new(),
                false => vec![self.rope.rotary(head_dim, 10_000.0, longest)?],
            },
            root: "transformer",
            layers_name: "h",
            embed: EmbedConfig::tokens("word_embeddings"),
            norm: NormConfig { kind: NormKind::Layer, eps: self.layer_norm_epsilon },
            final_norm: Some("ln_f"),
            head: HeadConfig::new(self.tie_word_embeddings),
            aliases: Vec::new(),
        })
    }
}
