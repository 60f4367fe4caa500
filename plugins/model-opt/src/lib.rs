//! OPT (Zhang et al. 2022, <https://arxiv.org/abs/2205.01068>) and Galactica (Taylor et al. 2022,
//! <https://arxiv.org/abs/2211.09085>): learned position embeddings that count the text's tokens, and an MLP whose
//! projections are modules of the layer. OPT-350m normalises after each sum, and its embeddings are narrower.

use dictlearn_core::lm::decoder::{EmbedConfig, FeedForward, HeadConfig, LayerConfig, NormNames, PositionsConfig};
use dictlearn_core::lm::{
    AttentionConfig, DecoderConfig, DecoderFamily, MlpConfig, NormConfig, NormKind, Projections, activation,
};
use dictlearn_core::prelude::*;

/// Fields of an OPT config.json that affect the computation, with Hugging Face's defaults.
#[component(model "opt", summary = "OPT, Galactica",
    paper = "Zhang et al. 2022, OPT, https://arxiv.org/abs/2205.01068", example = "{ffn_dim: 48}")]
pub struct OptConfig {
    /// Number of token ids.
    #[default(50272)]
    vocab_size: i64,
    /// Width of the residual stream.
    #[default(768)]
    hidden_size: i64,
    /// Width of the token embedding. Default: `hidden_size`.
    word_embed_proj_dim: Option<i64>,
    /// Number of layers.
    #[default(12)]
    num_hidden_layers: usize,
    /// Number of attention heads per layer.
    #[default(12)]
    num_attention_heads: i64,
    /// Width of the MLP.
    #[default(3072)]
    ffn_dim: i64,
    /// Longest context, in tokens.
    #[default(2048)]
    max_position_embeddings: i64,
    /// Activation function of the MLP.
    #[default("relu")]
    activation_function: String,
    /// Whether norms precede attention and MLP, instead of following their sum with the residual stream.
    #[default(true)]
    do_layer_norm_before: bool,
    /// Whether the final norm is missing, as in some older fine-tuned models.
    #[default]
    #[serde(rename = "_remove_final_layer_norm")]
    remove_final_layer_norm: bool,
    /// Whether the projections of the layers have biases.
    #[default(true)]
    enable_bias: bool,
    /// Whether norms have a weight and a bias.
    #[default(true)]
    layer_norm_elementwise_affine: bool,
    /// Whether head and token embedding share one weight.
    #[default(true)]
    tie_word_embeddings: bool,
}

impl DecoderFamily for OptConfig {
    fn decoder(self) -> Result<DecoderConfig> {
        let (d, heads) = (self.hidden_size, self.num_attention_heads);
        let head_dim = DecoderConfig::head_dim(d, heads)?;
        let attention = AttentionConfig::new("self_attn", (heads, head_dim), Projections::SEPARATE, "out_proj")
            .with_bias(self.enable_bias);
        let mlp = MlpConfig {
            path: "",
            act_path: "activation_fn",
            bias: self.enable_bias,
            ..MlpConfig::plain(self.ffn_dim, ("fc1", "fc2"), activation(&self.activation_function)?)
        };
        let (of_attention, of_mlp) = ("self_attn_layer_norm", "final_layer_norm");
        let norms = match self.do_layer_norm_before {
            true => NormNames::before(of_attention, of_mlp),
            false => NormNames {
                after_attention_sum: Some(of_attention),
                after_mlp_sum: Some(of_mlp),
                ..NormNames::default()
            },
        };
        let has_final_norm = self.do_layer_norm_before && !self.remove_final_layer_norm;
        let kind = if self.layer_norm_elementwise_affine { NormKind::Layer } else { NormKind::LayerNoWeight };
        Ok(DecoderConfig {
            hidden_size: d,
            vocab_size: self.vocab_size,
            max_positions: Some(self.max_position_embeddings),
            layers: vec![LayerConfig::new(attention, FeedForward::Mlp(mlp), norms); self.num_hidden_layers],
            rotary: Vec::new(),
            root: "model.decoder",
            layers_name: "layers",
            embed: EmbedConfig {
                width: self.word_embed_proj_dim,
                // The table begins with two rows that no token uses.
                positions: Some(PositionsConfig { name: "embed_positions", offset: 2, of_text: true }),
                ..EmbedConfig::tokens("embed_tokens")
            },
            norm: NormConfig { kind, eps: 1e-5 },
            final_norm: has_final_norm.then_some("final_layer_norm"),
            head: HeadConfig::new(self.tie_word_embeddings),
            aliases: Vec::new(),
        })
    }
}
