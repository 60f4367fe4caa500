//! GPT-NeoX: the family of Pythia (Biderman et al. 2023, <https://arxiv.org/abs/2304.01373>), of GPT-NeoX-20B (Black et
//! al. 2022, <https://arxiv.org/abs/2204.06745>), and of the bundled model.
//!
//! A layer adds attention and MLP to the residual stream, both of the layer's input (`use_parallel_residual`) or one
//! after the other. Queries, keys and values come from one projection, head by head; the first dimensions of each head
//! are rotated by position.

use dictlearn_core::lm::{activation, Attention, Context, Linear, ModelCx, ModelFamily, Names, Norm, Rotary};
use dictlearn_core::model::Hidden;
use dictlearn_core::prelude::*;
use std::rc::Rc;

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
        load: |config, weights, cx| {
            if config.get("rope_scaling").is_some_and(|scaling| !scaling.is_null()) {
                bail!(InputError::new("config.json: `rope_scaling` is not supported for gpt_neox")
                    .help("it changes what the model computes, so it is not ignored"));
            }
            let config = GptNeoxConfig::deserialize(config)
                .map_err(|error| InputError::new(format!("config.json: {error}")))?;
            Ok(Box::new(GptNeox::build(config, cx, |name, shape| weights.get(name, shape))?))
        },
    }
}

/// A GPT-NeoX model.
pub struct GptNeox {
    config: GptNeoxConfig,
    device: Device,
    names: Names,
    embed_in: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: Norm,
    embed_out: Linear,
    rotary: Rotary,
    parameters: Vec<(String, Tensor)>,
}

struct Layer {
    input_layernorm: Norm,
    query_key_value: Linear,
    dense: Linear,
    post_attention_layernorm: Norm,
    dense_h_to_4h: Linear,
    dense_4h_to_h: Linear,
    act: fn(&Tensor) -> Tensor,
    attention: Attention,
}

impl GptNeox {
    /// A model with random weights: normal of deviation 0.02, projections back to the stream divided by √(2 · layers).
    pub fn random(config: GptNeoxConfig, cx: &ModelCx) -> Result<Self> {
        let deviation = 0.02;
        let back = deviation / (2.0 * config.num_hidden_layers as f64).sqrt();
        Self::build(config, cx, |name, shape| {
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

    /// The model's config.
    pub fn config(&self) -> &GptNeoxConfig {
        &self.config
    }

    fn build(
        config: GptNeoxConfig,
        cx: &ModelCx,
        mut tensor: impl FnMut(&str, &[i64]) -> Result<Tensor>,
    ) -> Result<Self> {
        let d = config.hidden_size;
        if config.num_attention_heads < 1 || d % config.num_attention_heads != 0 {
            bail!(InputError::new(format!(
                "config.json: a `hidden_size` of {d} does not divide into {} heads",
                config.num_attention_heads
            )));
        }
        let head = d / config.num_attention_heads;
        let rotary = Rotary { width: (head as f64 * config.rotary_pct) as i64, theta: config.rotary_emb_base };
        if rotary.width % 2 != 0 {
            bail!(InputError::new(format!("config.json: `rotary_pct` rotates {} dimensions, not pairs", rotary.width)));
        }
        let act = activation(&config.hidden_act)?;
        let mut parameters = Vec::new();
        let mut tensor = |name: String, shape: &[i64]| -> Result<Tensor> {
            let tensor = tensor(&name, shape)?;
            parameters.push((name, tensor.shallow_clone()));
            Ok(tensor)
        };
        macro_rules! norm {
            ($name:expr) => {{
                let name = $name;
                Norm {
                    weight: tensor(format!("{name}.weight"), &[d])?,
                    bias: Some(tensor(format!("{name}.bias"), &[d])?),
                    eps: config.layer_norm_eps,
                }
            }};
        }
        macro_rules! linear {
            ($name:expr, $out:expr, $in:expr, $bias:expr) => {{
                let name = $name;
                Linear {
                    weight: tensor(format!("{name}.weight"), &[$out, $in])?,
                    bias: if $bias { Some(tensor(format!("{name}.bias"), &[$out])?) } else { None },
                    precision: cx.precision,
                }
            }};
        }
        let wide = config.intermediate_size;
        let embed_in = tensor("gpt_neox.embed_in.weight".to_owned(), &[config.vocab_size, d])?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| {
                let at = format!("gpt_neox.layers.{index}");
                Ok(Layer {
                    input_layernorm: norm!(format!("{at}.input_layernorm")),
                    query_key_value: linear!(
                        format!("{at}.attention.query_key_value"),
                        3 * d,
                        d,
                        config.attention_bias
                    ),
                    dense: linear!(format!("{at}.attention.dense"), d, d, config.attention_bias),
                    post_attention_layernorm: norm!(format!("{at}.post_attention_layernorm")),
                    dense_h_to_4h: linear!(format!("{at}.mlp.dense_h_to_4h"), wide, d, true),
                    dense_4h_to_h: linear!(format!("{at}.mlp.dense_4h_to_h"), d, wide, true),
                    act,
                    attention: Attention { rotary: Some(rotary.clone()) },
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let final_layer_norm = norm!("gpt_neox.final_layer_norm");
        let embed_out = if config.tie_word_embeddings {
            Linear { weight: embed_in.shallow_clone(), bias: None, precision: cx.precision }
        } else {
            linear!("embed_out", config.vocab_size, d, false)
        };
        let names = Names {
            layers: "gpt_neox.layers",
            embed: "gpt_neox.embed_in",
            final_norm: "gpt_neox.final_layer_norm",
            attention: "attention",
            attention_out: "attention.dense",
            mlp: "mlp",
            mlp_in: "mlp.dense_h_to_4h",
            mlp_out: "mlp.dense_4h_to_h",
            norm1: "input_layernorm",
            norm2: "post_attention_layernorm",
            sequential: !config.use_parallel_residual,
        };
        Ok(GptNeox {
            device: cx.device,
            names,
            embed_in,
            layers,
            final_layer_norm,
            embed_out,
            rotary,
            parameters,
            config,
        })
    }

    /// x + attention(norm(x)) + mlp(norm(x)), or the MLP after attention; [B, L, d].
    fn run_layer(&self, layer: &Layer, x: &Tensor, context: &Context, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let normed = hooks.module("input_layernorm", x, |_, x| Ok(layer.input_layernorm.forward(x)))?;
        let attention = hooks.module("attention", &normed, |hooks, x| self.attend(layer, x, context, hooks))?;
        let middle = x + &attention;
        let mlp_reads = if self.config.use_parallel_residual { x } else { &middle };
        let normed = hooks
            .module("post_attention_layernorm", mlp_reads, |_, x| Ok(layer.post_attention_layernorm.forward(x)))?;
        let mlp = hooks.module("mlp", &normed, |hooks, x| {
            let wide = hooks.module("dense_h_to_4h", x, |_, x| Ok(layer.dense_h_to_4h.forward(x)))?;
            let wide = hooks.module("act", &wide, |_, x| Ok((layer.act)(x)))?;
            hooks.module("dense_4h_to_h", &wide, |_, x| Ok(layer.dense_4h_to_h.forward(x)))
        })?;
        // In the order in which Hugging Face adds them: rounding is the same.
        Ok(if self.config.use_parallel_residual { mlp + attention + x } else { mlp + middle })
    }

    fn attend(&self, layer: &Layer, x: &Tensor, context: &Context, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let size = x.size();
        let heads = self.config.num_attention_heads;
        let qkv = hooks.module("query_key_value", x, |_, x| Ok(layer.query_key_value.forward(x)))?;
        // [B, L, H, 3·D] to three of [B, H, L, D].
        let qkv = qkv.view([size[0], size[1], heads, -1]).transpose(1, 2).chunk(3, -1);
        let z = layer.attention.heads(&qkv[0], &qkv[1], &qkv[2], context);
        hooks.module("dense", &z, |_, z| Ok(layer.dense.forward(z)))
    }
}

impl LanguageModel for GptNeox {
    fn hidden_size(&self) -> i64 {
        self.config.hidden_size
    }

    fn n_layers(&self) -> usize {
        self.layers.len()
    }

    fn vocab_size(&self) -> i64 {
        self.config.vocab_size
    }

    fn max_positions(&self) -> Option<i64> {
        Some(self.config.max_position_embeddings)
    }

    fn names(&self) -> &Names {
        &self.names
    }

    fn device(&self) -> Device {
        self.device
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    fn begin(&self, tokens: &Tokens, hooks: &mut Hooks) -> Result<Hidden, Stop> {
        let x = hooks.module("gpt_neox.embed_in", &tokens.ids, |_, ids| {
            Ok(Tensor::embedding(&self.embed_in, ids, -1, false, false))
        })?;
        Ok(Hidden { x, context: Rc::new(Context::new(tokens, Some(&self.rotary))) })
    }

    fn layer(&self, index: usize, hidden: &Hidden, hooks: &mut Hooks) -> Result<Hidden, Stop> {
        let x = hooks.module(&self.names.layer(index), &hidden.x, |hooks, x| {
            self.run_layer(&self.layers[index], x, &hidden.context, hooks)
        })?;
        Ok(Hidden { x, context: hidden.context.clone() })
    }

    fn end(&self, hidden: &Hidden, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let x = hooks.module("gpt_neox.final_layer_norm", &hidden.x, |_, x| Ok(self.final_layer_norm.forward(x)))?;
        hooks.module("embed_out", &x, |_, x| Ok(self.embed_out.forward(x)))
    }
}
