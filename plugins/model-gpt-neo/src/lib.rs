//! GPT-Neo (Black et al. 2021, <https://doi.org/10.5281/zenodo.5297715>), the family of TinyStories: GPT-2 with unscaled
//! scores and layers that attend by turns to all positions and to a window.

use dictlearn_core::lm::config::read;
use dictlearn_core::lm::decoder::{
    AttentionConfig, EmbedConfig, HeadConfig, LayerConfig, MlpConfig, MlpLayout, NormConfig, Projections,
};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily, NormKind, activation};
use dictlearn_core::prelude::*;

const MODEL_TYPE: &str = "gpt_neo";

/// The fields of a GPT-Neo config.json that change what it computes, with Hugging Face's defaults.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct GptNeoConfig {
    /// Number of token ids.
    vocab_size: i64,
    /// Width of the residual stream.
    hidden_size: i64,
    /// Number of layers.
    num_layers: usize,
    /// Heads of a layer.
    num_heads: i64,
    /// Width of an MLP; four times the stream's where it is not given.
    intermediate_size: Option<i64>,
    /// The longest context.
    max_position_embeddings: i64,
    /// Kinds of attention and how often the list of them is repeated: [[["global", "local"], 12]].
    attention_types: Option<Vec<(Vec<String>, usize)>>,
    /// The same for each layer, which comes first where both are given.
    attention_layers: Option<Vec<String>>,
    /// How many positions a token of a local layer sees, itself among them.
    #[serde(default = "window_size")]
    window_size: i64,
    /// The MLP's activation.
    #[serde(default = "gelu_new")]
    activation_function: String,
    /// Added to the variance in layer norms.
    #[serde(default = "layer_norm_epsilon")]
    layer_norm_epsilon: f64,
    /// Whether the head is the embedding.
    #[serde(default = "yes")]
    tie_word_embeddings: bool,
}

fn window_size() -> i64 {
    256
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
    model GptNeoConfig, MODEL_TYPE,
    summary: "GPT-Neo, TinyStories",
    paper: "Black et al. 2021, GPT-Neo, https://doi.org/10.5281/zenodo.5297715",
    example: "{num_layers: 2, num_heads: 4, attention_types: [[[global, local], 1]]}",
}

inventory::submit! {
    ModelFamily {
        model_type: MODEL_TYPE,
        load: |config, weights, cx| Ok(Box::new(Decoder::open(decoder(read(config)?)?, weights, cx)?)),
    }
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
            "config.json: the kinds of attention are given for {} layers, and there are {}",
            types.len(),
            config.num_layers
        )));
    }
    let layer = |name: &String| {
        let window = match name.as_str() {
            "global" => None,
            "local" => Some(config.window_size),
            other => bail!(
                InputError::new(format!("config.json: attention of kind `{other}` is not supported"))
                    .help("supported are global and local")
            ),
        };
        Ok(LayerConfig { window, rotary: None, scale: 1.0 })
    };
    types.iter().map(layer).collect()
}

fn decoder(config: GptNeoConfig) -> Result<DecoderConfig> {
    Ok(DecoderConfig {
        hidden_size: config.hidden_size,
        vocab_size: config.vocab_size,
        max_positions: Some(config.max_position_embeddings),
        layers: layers(&config)?,
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
            path: "attn.attention",
            heads: config.num_heads,
            kv_heads: config.num_heads,
            head_dim: DecoderConfig::head_dim(config.hidden_size, config.num_heads)?,
            input: Projections::Separate { q: "q_proj", k: "k_proj", v: "v_proj" },
            output: "out_proj",
            input_bias: false,
            output_bias: true,
            transposed: false,
            qk_norm: None,
            soft_cap: None,
        },
        mlp: MlpConfig {
            path: "mlp",
            width: config.intermediate_size.unwrap_or(4 * config.hidden_size),
            layout: MlpLayout::Plain { up: "c_fc", down: "c_proj" },
            act_path: "act",
            act: activation(&config.activation_function)?,
            bias: true,
            transposed: false,
        },
        parallel: false,
        final_norm: "transformer.ln_f",
        head: HeadConfig { path: "lm_head", tied: config.tie_word_embeddings, soft_cap: None },
    })
}
