//! GPT-2 (Radford et al. 2019,
//! <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>): learned
//! position embeddings, layer norms before attention and MLP, transposed weights.

use dictlearn_core::lm::decoder::{EmbedConfig, FeedForward, HeadConfig, LayerConfig, NormNames};
use dictlearn_core::lm::{
    AttentionConfig, DecoderConfig, DecoderFamily, MlpConfig, NormConfig, NormKind, Projections, activation,
};
use dictlearn_core::prelude::*;

/// Fields of a GPT-2 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gpt2", summary = "GPT-2, DistilGPT-2 and models of the same architecture",
    paper = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, \
        https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf",
    example = "{n_embd: 32, n_layer: 2, n_head: 4, n_positions: 64}")]
pub struct Gpt2Config {
    /// Number of token ids.
    #[default(50_257)]
    vocab_size: i64,
    /// Width of the residual stream.
    #[default(768)]
    n_embd: i64,
    /// Number of layers.
    #[default(12)]
    n_layer: usize,
    /// Number of attention heads per layer.
    #[default(12)]
    n_head: i64,
    /// Width of the MLP. Default: 4 · `n_embd`.
    n_inner: Option<i64>,
    /// Longest context, in tokens.
    #[default(1024)]
    n_positions: i64,
    /// Activation function of the MLP.
    #[default("gelu_new")]
    activation_function: String,
    /// Epsilon added to the variance in layer norms.
    #[default(1e-5)]
    layer_norm_epsilon: f64,
    /// Whether attention scores are divided by the square root of a head's width.
    #[default(true)]
    scale_attn_weights: bool,
    /// Whether attention scores are also divided by the layer's number, counted from 1.
    #[default]
    scale_attn_by_inverse_layer_idx: bool,
    /// Whether head and token embedding share one weight.
    #[default(true)]
    tie_word_embeddings: bool,
}

impl DecoderFamily for Gpt2Config {
    fn decoder(self) -> Result<DecoderConfig> {
        let head_dim = DecoderConfig::head_dim(self.n_embd, self.n_head)?;
        let act = activation(&self.activation_function)?;
        let layer = |index: usize| {
            let scale = if self.scale_attn_weights { (head_dim as f64).powf(-0.5) } else { 1.0 };
            let by_layer = if self.scale_attn_by_inverse_layer_idx { index as f64 + 1.0 } else { 1.0 };
            let attention = AttentionConfig {
                transposed: true,
                scale: scale / by_layer,
                ..AttentionConfig::new("attn", (self.n_head, head_dim), Projections::Joined("c_attn"), "c_proj")
                    .with_bias(true)
            };
            let width = self.n_inner.unwrap_or(4 * self.n_embd);
            let mlp = MlpConfig { transposed: true, ..MlpConfig::plain(width, ("c_fc", "c_proj"), act) };
            LayerConfig::new(attention, FeedForward::Mlp(mlp), NormNames::before("ln_1", "ln_2"))
        };
        Ok(DecoderConfig {
            hidden_size: self.n_embd,
            vocab_size: self.vocab_size,
            max_positions: Some(self.n_positions),
            layers: (0..self.n_layer).map(layer).collect(),
            rotary: Vec::new(),
            root: "transformer",
            layers_name: "h",
            embed: EmbedConfig::tokens("wte").with_positions("wpe"),
            norm: NormConfig { kind: NormKind::Layer, eps: self.layer_norm_epsilon },
            final_norm: Some("ln_f"),
            head: HeadConfig::new(self.tie_word_embeddings),
            aliases: Vec::new(),
        })
    }
}
