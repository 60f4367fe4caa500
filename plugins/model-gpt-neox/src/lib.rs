//! GPT-NeoX: the family of Pythia (Biderman et al. 2023, <https://arxiv.org/abs/2304.01373>), GPT-NeoX-20B (Black et
//! al. 2022, <https://arxiv.org/abs/2204.06745>) and the bundled model.
//!
//! With `use_parallel_residual`, attention and MLP both read the layer's input, and both outputs are added to the
//! residual stream; otherwise they run one after the other. One projection makes queries, keys and values, interleaved
//! by head. Rotary embeddings apply to the first dimensions of each head.

use dictlearn_core::lm::decoder::{EmbedConfig, FeedForward, HeadConfig, LayerConfig, NormNames};
use dictlearn_core::lm::{
    AttentionConfig, Decoder, DecoderConfig, DecoderFamily, MlpConfig, ModelCx, NormConfig, NormKind, Projections,
    Rope, activation,
};
use dictlearn_core::prelude::*;

/// Fields of a GPT-NeoX config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gpt_neox", summary = "GPT-NeoX: Pythia, GPT-NeoX-20B, the bundled model",
    paper = "Biderman et al. 2023, Pythia, https://arxiv.org/abs/2304.01373")]
#[derive(Serialize)]
pub struct GptNeoxConfig {
    /// Number of token ids.
    #[default(50_432)]
    pub vocab_size: i64,
    /// Width of the residual stream.
    #[default(6144)]
    pub hidden_size: i64,
    /// Number of layers.
    #[default(44)]
    pub num_hidden_layers: usize,
    /// Number of attention heads per layer.
    #[default(64)]
    pub num_attention_heads: i64,
    /// Width of the MLP.
    #[default(24_576)]
    pub intermediate_size: i64,
    /// Longest context, in tokens.
    #[default(2048)]
    pub max_position_embeddings: i64,
    /// Activation function of the MLP.
    #[default("gelu")]
    pub hidden_act: String,
    /// Epsilon added to the variance in layer norms.
    #[default(1e-5)]
    pub layer_norm_eps: f64,
    /// Fraction of each head's dimensions that is rotated.
    #[default(0.25)]
    pub rotary_pct: f64,
    /// Base of the rotary frequencies.
    #[default(10_000.0)]
    pub rotary_emb_base: f64,
    /// Rotary fields of newer files, which take precedence over these two, and scaling for long contexts.
    #[serde(flatten)]
    pub rope: Rope,
    /// Whether attention and MLP both read the layer's input.
    #[default(true)]
    pub use_parallel_residual: bool,
    /// Whether the projections of attention have biases.
    #[default(true)]
    pub attention_bias: bool,
    /// Whether head and token embedding share one weight.
    #[default]
    pub tie_word_embeddings: bool,
}

/// Returns a model with random weights: normal with standard deviation 0.02, divided by √(2 · layers) in projections
/// back to the residual stream.
pub fn random(config: &GptNeoxConfig, cx: &ModelCx) -> Result<Decoder> {
    let deviation = 0.02;
    let back = deviation / (2.0 * config.num_hidden_layers as f64).sqrt();
    Decoder::with(config.clone().decoder()?, cx, |name, shape| {
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

impl DecoderFamily for GptNeoxConfig {
    fn decoder(self) -> Result<DecoderConfig> {
        let (d, heads) = (self.hidden_size, self.num_attention_heads);
        let head_dim = DecoderConfig::head_dim(d, heads)?;
        let input = Projections::Interleaved("query_key_value");
        let attention = AttentionConfig {
            rotary: Some(0),
            ..AttentionConfig::new("attention", (heads, head_dim), input, "dense").with_bias(self.attention_bias)
        };
        let act = activation(&self.hidden_act)?;
        let mlp = MlpConfig::plain(self.intermediate_size, ("dense_h_to_4h", "dense_4h_to_h"), act);
        let norms = NormNames::before("input_layernorm", "post_attention_layernorm");
        let layer = LayerConfig {
            parallel: self.use_parallel_residual,
            ..LayerConfig::new(attention, FeedForward::Mlp(mlp), norms)
        };
        let mut rope = self.rope.clone();
        rope.partial_rotary_factor.get_or_insert(self.rotary_pct);
        Ok(DecoderConfig {
            hidden_size: d,
            vocab_size: self.vocab_size,
            max_positions: Some(self.max_position_embeddings),
            layers: vec![layer; self.num_hidden_layers],
            rotary: vec![rope.rotary(head_dim, self.rotary_emb_base, self.max_position_embeddings)?],
            root: "gpt_neox",
            layers_name: "layers",
            embed: EmbedConfig::tokens("embed_in"),
            norm: NormConfig { kind: NormKind::Layer, eps: self.layer_norm_eps },
            final_norm: Some("final_layer_norm"),
            head: HeadConfig { path: "embed_out", ..HeadConfig::new(self.tie_word_embeddings) },
            aliases: Vec::new(),
        })
    }
}
