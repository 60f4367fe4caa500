//! GPT-Neo (Black et al. 2021, <https://doi.org/10.5281/zenodo.5297715>), also the family of TinyStories: GPT-2 with
//! unscaled attention scores, and layers that alternate between full and sliding-window attention.

use dictlearn_core::lm::decoder::{EmbedConfig, FeedForward, HeadConfig, LayerConfig, NormNames};
use dictlearn_core::lm::{
    AttentionConfig, DecoderConfig, DecoderFamily, MlpConfig, NormConfig, NormKind, Projections, activation,
};
use dictlearn_core::prelude::*;

/// Fields of a GPT-Neo config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gpt_neo", summary = "GPT-Neo, TinyStories",
    paper = "Black et al. 2021, GPT-Neo, https://doi.org/10.5281/zenodo.5297715",
    example = "{num_layers: 2, num_heads: 4, attention_types: [[[global, local], 1]]}")]
pub struct GptNeoConfig {
    /// Number of token ids.
    #[default(50_257)]
    vocab_size: i64,
    /// Width of the residual stream.
    #[default(2048)]
    hidden_size: i64,
    /// Number of layers.
    #[default(24)]
    num_layers: usize,
    /// Number of attention heads per layer.
    #[default(16)]
    num_heads: i64,
    /// Width of the MLP. Default: 4 · `hidden_size`.
    intermediate_size: Option<i64>,
    /// Longest context, in tokens.
    #[default(2048)]
    max_position_embeddings: i64,
    /// Kinds of attention, and how often to repeat the list: [[["global", "local"], 12]].
    attention_types: Option<Vec<(Vec<String>, usize)>>,
    /// Kind of attention of each layer; takes precedence over `attention_types`.
    attention_layers: Option<Vec<String>>,
    /// Window of a local layer in tokens, including the query's own.
    #[default(256)]
    window_size: i64,
    /// Activation function of the MLP.
    #[default("gelu_new")]
    activation_function: String,
    /// Epsilon added to the variance in layer norms.
    #[default(1e-5)]
    layer_norm_epsilon: f64,
    /// Whether head and token embedding share one weight.
    #[default(true)]
    tie_word_embeddings: bool,
}

/// Returns the window of each layer.
fn windows(config: &GptNeoConfig) -> Result<Vec<Option<i64>>> {
    let repeated = |types: &Vec<(Vec<String>, usize)>| -> Vec<String> {
        types.iter().flat_map(|(types, count)| types.iter().cycle().take(types.len() * count).cloned()).collect()
    };
    let types = match (&config.attention_layers, &config.attention_types) {
        (Some(layers), _) => layers.clone(),
        (None, Some(types)) => repeated(types),
        (None, None) => repeated(&vec![(vec!["global".to_owned(), "local".to_owned()], config.num_layers.div_ceil(2))]),
    };
    if types.len() != config.num_layers {
        bail!(InputError::new(format!(
            "config.json: kinds of attention are given for {} layers, but the model has {}",
            types.len(),
            config.num_layers
        )));
    }
    let window = |name: &String| match name.as_str() {
        "global" => Ok(None),
        "local" => Ok(Some(config.window_size)),
        other => bail!(
            InputError::new(format!("config.json: the kind of attention `{other}` is not supported"))
                .help("supported: global, local")
        ),
    };
    types.iter().map(window).collect()
}

impl DecoderFamily for GptNeoConfig {
    fn decoder(self) -> Result<DecoderConfig> {
        let act = activation(&self.activation_function)?;
        let head_dim = DecoderConfig::head_dim(self.hidden_size, self.num_heads)?;
        let heads = (self.num_heads, head_dim);
        let layer = |window: Option<i64>| {
            let attention = AttentionConfig {
                output_bias: true,
                // Scores are not scaled.
                scale: 1.0,
                window,
                ..AttentionConfig::new("attn.attention", heads, Projections::SEPARATE, "out_proj")
            };
            let width = self.intermediate_size.unwrap_or(4 * self.hidden_size);
            let mlp = MlpConfig::plain(width, ("c_fc", "c_proj"), act);
            LayerConfig::new(attention, FeedForward::Mlp(mlp), NormNames::before("ln_1", "ln_2"))
        };
        let layers = windows(&self)?.into_iter().map(layer).collect();
        Ok(DecoderConfig {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_positions: Some(self.max_position_embeddings),
            layers,
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
