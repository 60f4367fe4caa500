//! GPT-Neo (Black et al. 2021, <https://doi.org/10.5281/zenodo.5297715>), also the family of TinyStories: GPT-2 with
//! unscaled attention scores, and layers that alternate between full and sliding-window attention.

use dictlearn_core::lm::decoder::{
    AttentionConfig, EmbedConfig, HeadConfig, LayerConfig, MlpConfig, NormConfig, Projections,
};
use dictlearn_core::lm::{DecoderConfig, DecoderFamily, NormKind, activation};
use dictlearn_core::prelude::*;

/// Fields of a GPT-Neo config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gpt_neo", summary = "GPT-Neo, TinyStories",
    paper = "Black et al. 2021, GPT-Neo, https://doi.org/10.5281/zenodo.5297715",
    example = "{num_layers: 2, num_heads: 4, attention_types: [[[global, local], 1]]}")]
pub struct GptNeoConfig {
    /// Number of token ids.
    vocab_size: i64,
    /// Width of the residual stream.
    hidden_size: i64,
    /// Number of layers.
    num_layers: usize,
    /// Number of attention heads per layer.
    num_heads: i64,
    /// Width of the MLP. Default: 4 · `hidden_size`.
    intermediate_size: Option<i64>,
    /// Longest context, in tokens.
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

fn layers(config: &GptNeoConfig) -> Result<Vec<LayerConfig>> {
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
    let layer = |name: &String| {
        let window = match name.as_str() {
            "global" => None,
            "local" => Some(config.window_size),
            other => bail!(
                InputError::new(format!("config.json: the kind of attention `{other}` is not supported"))
                    .help("supported: global, local")
            ),
        };
        Ok(LayerConfig { window, rotary: None, scale: 1.0 })
    };
    types.iter().map(layer).collect()
}

impl DecoderFamily for GptNeoConfig {
    fn decoder(self) -> Result<DecoderConfig> {
        let act = activation(&self.activation_function)?;
        let head_dim = DecoderConfig::head_dim(self.hidden_size, self.num_heads)?;
        let input = Projections::Separate { q: "q_proj", k: "k_proj", v: "v_proj" };
        Ok(DecoderConfig {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_positions: Some(self.max_position_embeddings),
            layers: layers(&self)?,
            rotary: Vec::new(),
            layers_path: "transformer.h",
            embed: EmbedConfig { positions: Some("transformer.wpe"), ..EmbedConfig::tokens("transformer.wte") },
            norm: NormConfig::before(NormKind::Layer, self.layer_norm_epsilon, "ln_1", "ln_2"),
            attention: AttentionConfig {
                output_bias: true,
                ..AttentionConfig::new("attn.attention", (self.num_heads, head_dim), input, "out_proj")
            },
            mlp: MlpConfig::plain(self.intermediate_size.unwrap_or(4 * self.hidden_size), ("c_fc", "c_proj"), act),
            parallel: false,
            final_norm: "transformer.ln_f",
            head: HeadConfig { path: "lm_head", tied: self.tie_word_embeddings, soft_cap: None },
        })
    }
}
