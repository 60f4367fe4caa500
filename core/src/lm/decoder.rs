//! The decoder-only transformer that most families are variants of.
//!
//! A family's [`DecoderConfig`] states its norms, the layout and names of its projections, and its attention windows;
//! this module does the rest. Modules have Hugging Face's paths, so that a hook means the same as in Python. Any other
//! architecture implements [`LanguageModel`] from the same blocks.
//!
//! A layer is read from its file when a pass first reaches it: layers past the last hook are never loaded.

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::blocks::{Activation, Attention, Context, Linear, Norm, NormKind, residual, shape_only};
use super::hook_point::Tokens;
use super::kernels;
use super::model::{Hidden, Hooks, LanguageModel, Stop, Visit};
use super::rotary::Rotary;
use super::weights::Weights;
use super::{ModelCx, Names};
use crate::error::InputError;
use crate::files::tensors::kind_size;
use crate::machine::device::Precision;

/// Config of a decoder: widths, module names, and the choices that distinguish its family.
#[derive(Debug, Clone)]
pub struct DecoderConfig {
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Number of token ids.
    pub vocab_size: i64,
    /// Longest context, if there is a limit.
    pub max_positions: Option<i64>,
    /// Settings of each layer.
    pub layers: Vec<LayerConfig>,
    /// Rotary embeddings that layers refer to.
    pub rotary: Vec<Rotary>,
    /// Path of the list of layers: `model.layers`.
    pub layers_path: &'static str,
    /// Token and position embeddings.
    pub embed: EmbedConfig,
    /// Norms of a layer.
    pub norm: NormConfig,
    /// Attention of a layer.
    pub attention: AttentionConfig,
    /// MLP of a layer.
    pub mlp: MlpConfig,
    /// Whether attention and MLP both read the layer's input, instead of one after the other.
    pub parallel: bool,
    /// Path of the final norm.
    pub final_norm: &'static str,
    /// Head.
    pub head: HeadConfig,
}

/// Settings that differ between layers.
#[derive(Debug, Clone, Copy)]
pub struct LayerConfig {
    /// Number of positions that a query sees, including its own; `None` for all up to its own.
    pub window: Option<i64>,
    /// Index into [`DecoderConfig::rotary`]; `None` without rotary embedding.
    pub rotary: Option<usize>,
    /// Factor on attention scores.
    pub scale: f64,
}

/// Embeddings of tokens and positions.
#[derive(Debug, Clone)]
pub struct EmbedConfig {
    /// Path of the token embedding.
    pub tokens: &'static str,
    /// Path of the learned position embedding, if there is one.
    pub positions: Option<&'static str>,
    /// Factor on token embeddings.
    pub scale: f64,
    /// Whether a hook on the token embedding sees its output with this factor applied.
    pub scale_inside: bool,
}

impl EmbedConfig {
    /// Returns token embeddings alone, without a factor.
    pub fn tokens(path: &'static str) -> Self {
        EmbedConfig { tokens: path, positions: None, scale: 1.0, scale_inside: false }
    }
}

/// Norms of a layer, by name; `None` for those that a family lacks.
#[derive(Debug, Clone)]
pub struct NormConfig {
    /// Kind of all norms, including the final one.
    pub kind: NormKind,
    /// Epsilon added to the variance or the mean square.
    pub eps: f64,
    /// Norm of attention's input.
    pub before_attention: Option<&'static str>,
    /// Norm of attention's output.
    pub after_attention: Option<&'static str>,
    /// Norm of the MLP's input.
    pub before_mlp: Option<&'static str>,
    /// Norm of the MLP's output.
    pub after_mlp: Option<&'static str>,
}

impl NormConfig {
    /// Returns norms of the inputs only.
    pub fn before(kind: NormKind, eps: f64, attention: &'static str, mlp: &'static str) -> Self {
        NormConfig {
            kind,
            eps,
            before_attention: Some(attention),
            after_attention: None,
            before_mlp: Some(mlp),
            after_mlp: None,
        }
    }
}

/// Attention of a layer.
#[derive(Debug, Clone)]
pub struct AttentionConfig {
    /// Path in a layer.
    pub path: &'static str,
    /// Number of heads.
    pub heads: i64,
    /// Number of key/value heads, shared by neighbouring query heads.
    pub kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Projections to queries, keys and values.
    pub input: Projections,
    /// Output projection.
    pub output: &'static str,
    /// Whether the input projections have biases.
    pub input_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// Whether weights are stored transposed, [in, out], as in GPT-2.
    pub transposed: bool,
    /// Norms of queries and keys, if any.
    pub qk_norm: Option<QkNorm>,
    /// Soft cap c on scores: `c · tanh(score / c)`.
    pub soft_cap: Option<f64>,
}

impl AttentionConfig {
    /// Returns multi-head attention without biases and norms.
    pub fn new(path: &'static str, (heads, head_dim): (i64, i64), input: Projections, output: &'static str) -> Self {
        AttentionConfig {
            path,
            heads,
            kv_heads: heads,
            head_dim,
            input,
            output,
            input_bias: false,
            output_bias: false,
            transposed: false,
            qk_norm: None,
            soft_cap: None,
        }
    }
}

/// Projections to queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub enum Projections {
    /// Three projections.
    Separate {
        /// To queries.
        q: &'static str,
        /// To keys.
        k: &'static str,
        /// To values.
        v: &'static str,
    },
    /// One projection: queries of all heads, then keys, then values.
    Joined(&'static str),
    /// One projection, ordered by head: query, key and value of the first head, then of the next.
    Interleaved(&'static str),
}

/// Norms of queries (`q_norm`) and keys (`k_norm`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Normalises each head.
    Head,
    /// Normalises all heads together.
    All,
}

/// MLP of a layer.
#[derive(Debug, Clone)]
pub struct MlpConfig {
    /// Path in a layer.
    pub path: &'static str,
    /// Width.
    pub width: i64,
    /// Projections.
    pub layout: MlpLayout,
    /// Path of the activation function in the MLP.
    pub act_path: &'static str,
    /// Activation function.
    pub act: Activation,
    /// Whether the projections have biases.
    pub bias: bool,
    /// Whether weights are stored transposed, [in, out], as in GPT-2.
    pub transposed: bool,
}

impl MlpConfig {
    /// Returns an MLP with biases and without a gate: module `mlp`, activation function in `act`.
    pub fn plain(width: i64, (up, down): (&'static str, &'static str), act: Activation) -> Self {
        MlpConfig {
            path: "mlp",
            width,
            layout: MlpLayout::Plain { up, down },
            act_path: "act",
            act,
            bias: true,
            transposed: false,
        }
    }
}

/// Projections of an MLP, by name.
#[derive(Debug, Clone, Copy)]
pub enum MlpLayout {
    /// down(act(up(x))).
    Plain {
        /// To the MLP's width.
        up: &'static str,
        /// Back to the residual stream's width.
        down: &'static str,
    },
    /// down(act(gate(x)) · up(x)) (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).
    Gated {
        /// Gate projection.
        gate: &'static str,
        /// Up projection.
        up: &'static str,
        /// Back to the residual stream's width.
        down: &'static str,
    },
    /// `Gated` with gate and up in one projection, in this order.
    GatedJoined {
        /// Gate and up projection.
        gate_up: &'static str,
        /// Back to the residual stream's width.
        down: &'static str,
    },
}

/// Head: from the residual stream to logits.
#[derive(Debug, Clone)]
pub struct HeadConfig {
    /// Path.
    pub path: &'static str,
    /// Whether it shares the token embedding's weight.
    pub tied: bool,
    /// Soft cap c on logits: `c · tanh(logit / c)`.
    pub soft_cap: Option<f64>,
}

/// Provides the weight of a name, shape and dtype. Matrices and biases of products and token embeddings have the dtype
/// of the products, everything else float32.
type Provide<'a> = dyn FnMut(&str, &[i64], Kind) -> Result<Tensor> + 'a;

/// A decoder with its weights.
pub struct Decoder {
    config: DecoderConfig,
    names: Names,
    cx: ModelCx,
    weights: Option<Weights>,
    embed: OnceCell<Embed>,
    layers: Vec<OnceCell<Layer>>,
    end: OnceCell<End>,
    windows: Vec<Option<i64>>,
    /// Weights read so far, by name.
    parameters: RefCell<Vec<(String, Tensor)>>,
    visits: Vec<Visit>,
    /// Size of all weights in bytes.
    bytes: u64,
}

struct Embed {
    tokens: Tensor,
    positions: Option<Tensor>,
}

struct Layer {
    norms: [Option<Norm>; 4],
    q: Linear,
    kv: Option<(Linear, Linear)>,
    qk_norm: Option<(Norm, Norm)>,
    out: Linear,
    attention: Attention,
    up: Linear,
    gate: Option<Linear>,
    down: Linear,
}

struct End {
    norm: Norm,
    head: Linear,
}

/// Builds the parts of a model. Shapes follow from the config, values come from `provide`.
struct Builder<'a, 'b> {
    config: &'a DecoderConfig,
    precision: Precision,
    provide: &'a mut Provide<'b>,
}

impl Builder<'_, '_> {
    fn tensor(&mut self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
        (self.provide)(name, shape, kind)
    }

    fn linear(&mut self, path: &str, output: i64, input: i64, bias: bool, transposed: bool) -> Result<Linear> {
        let kind = self.precision.kind();
        let name = format!("{path}.weight");
        let weight = match transposed {
            true => self.tensor(&name, &[input, output], kind)?.tr(),
            false => self.tensor(&name, &[output, input], kind)?,
        };
        let bias = bias.then(|| self.tensor(&format!("{path}.bias"), &[output], kind)).transpose()?;
        Ok(Linear { weight, bias, precision: self.precision })
    }

    fn norm(&mut self, path: &str, width: i64) -> Result<Norm> {
        let NormConfig { kind, eps, .. } = self.config.norm;
        let weight = self.tensor(&format!("{path}.weight"), &[width], Kind::Float)?;
        let bias = kind == NormKind::Layer;
        let bias = bias.then(|| self.tensor(&format!("{path}.bias"), &[width], Kind::Float)).transpose()?;
        Ok(Norm { kind, weight, bias, eps })
    }

    fn embed(&mut self) -> Result<Embed> {
        let config = self.config;
        let (d, kind) = (config.hidden_size, self.precision.kind());
        let tokens = self.tensor(&format!("{}.weight", config.embed.tokens), &[config.vocab_size, d], kind)?;
        let most = config.max_positions.unwrap_or(0);
        let positions = config.embed.positions;
        let positions =
            positions.map(|path| self.tensor(&format!("{path}.weight"), &[most, d], Kind::Float)).transpose()?;
        Ok(Embed { tokens, positions })
    }

    fn layer(&mut self, index: usize) -> Result<Layer> {
        let config = self.config;
        let at = format!("{}.{index}", config.layers_path);
        let d = config.hidden_size;
        let norm = &config.norm;
        let mut norms = [None, None, None, None];
        let names = [norm.before_attention, norm.after_attention, norm.before_mlp, norm.after_mlp];
        for (slot, name) in norms.iter_mut().zip(names) {
            *slot = name.map(|name| self.norm(&format!("{at}.{name}"), d)).transpose()?;
        }

        let attention = &config.attention;
        let path = format!("{at}.{}", attention.path);
        let (wide, narrow) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
        let mut input = |name: &str, width: i64| {
            self.linear(&format!("{path}.{name}"), width, d, attention.input_bias, attention.transposed)
        };
        let (q, kv) = match attention.input {
            Projections::Separate { q, k, v } => (input(q, wide)?, Some((input(k, narrow)?, input(v, narrow)?))),
            Projections::Joined(name) | Projections::Interleaved(name) => (input(name, wide + 2 * narrow)?, None),
        };
        let qk_norm = match attention.qk_norm {
            None => None,
            Some(over) => {
                let head = attention.head_dim;
                let widths = if over == QkNorm::Head { (head, head) } else { (wide, narrow) };
                Some((self.norm(&format!("{path}.q_norm"), widths.0)?, self.norm(&format!("{path}.k_norm"), widths.1)?))
            }
        };
        let output = format!("{path}.{}", attention.output);
        let out = self.linear(&output, d, wide, attention.output_bias, attention.transposed)?;

        let mlp = &config.mlp;
        let path = format!("{at}.{}", mlp.path);
        let mut project = |name: &str, output: i64, input: i64| {
            self.linear(&format!("{path}.{name}"), output, input, mlp.bias, mlp.transposed)
        };
        let (gate, up, down) = match mlp.layout {
            MlpLayout::Plain { up, down } => (None, project(up, mlp.width, d)?, project(down, d, mlp.width)?),
            MlpLayout::Gated { gate, up, down } => {
                let gate = project(gate, mlp.width, d)?;
                (Some(gate), project(up, mlp.width, d)?, project(down, d, mlp.width)?)
            }
            MlpLayout::GatedJoined { gate_up, down } => {
                (None, project(gate_up, 2 * mlp.width, d)?, project(down, d, mlp.width)?)
            }
        };
        let LayerConfig { window, rotary, scale } = config.layers[index];
        let attention = Attention { scale, window, rotary, soft_cap: attention.soft_cap };
        Ok(Layer { norms, q, kv, qk_norm, out, attention, up, gate, down })
    }

    fn end(&mut self, embed: &Embed) -> Result<End> {
        let config = self.config;
        let norm = self.norm(config.final_norm, config.hidden_size)?;
        let head = if config.head.tied {
            Linear { weight: embed.tokens.shallow_clone(), bias: None, precision: self.precision }
        } else {
            self.linear(config.head.path, config.vocab_size, config.hidden_size, false, false)?
        };
        Ok(End { norm, head })
    }
}

impl DecoderConfig {
    fn check(&self) -> Result<()> {
        let AttentionConfig { heads, kv_heads, head_dim, .. } = self.attention;
        let positive = [
            ("the width", self.hidden_size),
            ("the number of token ids", self.vocab_size),
            ("the number of heads", heads),
            ("the number of key/value heads", kv_heads),
            ("the width of a head", head_dim),
            ("the width of the MLP", self.mlp.width),
        ];
        if let Some((what, found)) = positive.iter().find(|(_, number)| *number < 1) {
            bail!(InputError::new(format!("config.json: {what} is {found}")));
        }
        if heads % kv_heads != 0 {
            bail!(InputError::new(format!(
                "config.json: {heads} heads cannot share {kv_heads} key/value heads evenly"
            )));
        }
        Ok(())
    }

    /// Returns the default width of a head: `hidden_size / heads`.
    pub fn head_dim(hidden_size: i64, heads: i64) -> Result<i64> {
        if heads < 1 || hidden_size % heads != 0 {
            bail!(InputError::new(format!("config.json: width {hidden_size} is not divisible by {heads} heads")));
        }
        Ok(hidden_size / heads)
    }

    fn names(&self) -> Names {
        let norm = &self.norm;
        let (mlp_in, mlp_gate, mlp_out) = match self.mlp.layout {
            MlpLayout::Plain { up, down } => (Some(up), None, down),
            MlpLayout::Gated { gate, up, down } => (Some(gate), Some(up), down),
            MlpLayout::GatedJoined { down, .. } => (None, None, down),
        };
        let in_attention = |name: &str| format!("{}.{name}", self.attention.path);
        let in_mlp = |name: &str| format!("{}.{name}", self.mlp.path);
        Names {
            layers: self.layers_path.to_owned(),
            embed: self.embed.tokens.to_owned(),
            positions: self.embed.positions.map(str::to_owned),
            final_norm: self.final_norm.to_owned(),
            attention_out: in_attention(self.attention.output),
            attention_added: norm.after_attention.unwrap_or(self.attention.path).to_owned(),
            mlp_in: mlp_in.map(in_mlp),
            mlp_up: mlp_gate.map(in_mlp),
            mlp_out: in_mlp(mlp_out),
            mlp_added: norm.after_mlp.unwrap_or(self.mlp.path).to_owned(),
            norm1: norm.before_attention.map(str::to_owned),
            norm2: norm.before_mlp.map(str::to_owned),
            middle: (!self.parallel).then(|| norm.before_mlp.unwrap_or(self.mlp.path).to_owned()),
        }
    }
}

impl Decoder {
    /// Creates a decoder that reads its weights lazily.
    ///
    /// # Errors
    /// Fails if a weight is missing or has another shape than the config says, or if the file has other weights.
    pub fn open(mut config: DecoderConfig, mut weights: Weights, cx: &ModelCx) -> Result<Self> {
        config.check()?;
        let [embedding, head] = [config.embed.tokens, config.head.path].map(|path| format!("{path}.weight"));
        if config.head.tied {
            config.head.tied = weights.tie(&embedding, &head)?;
        } else if !weights.has(&head) && weights.has(&embedding) {
            bail!(
                InputError::new(format!("the model has no head: there is no tensor `{head}`"))
                    .help("if head and embedding share a weight, set `\"tie_word_embeddings\": true` in config.json")
            );
        }
        let tied = config.head.tied.then_some(head);
        let (mut asked, mut bytes) = (Vec::new(), 0);
        let decoder = Self::build(config, cx, &mut |name, shape, kind| {
            weights.check(name, shape)?;
            asked.push(name.to_owned());
            bytes += shape.iter().product::<i64>() as u64 * kind_size(kind) as u64;
            Ok(shape_only(shape))
        })?;
        weights.check_none_left(&asked, tied.as_deref())?;
        let visits = decoder.record();
        Ok(Decoder { weights: Some(weights), visits, bytes, ..Self::unread(decoder.config, cx) })
    }

    /// Creates a decoder with weights from `provide`, by name and shape, in float32.
    pub fn with(
        config: DecoderConfig,
        cx: &ModelCx,
        mut provide: impl FnMut(&str, &[i64]) -> Result<Tensor>,
    ) -> Result<Self> {
        config.check()?;
        let visits = Self::build(config.clone(), cx, &mut |_, shape, _| Ok(shape_only(shape)))?.record();
        let (mut parameters, mut bytes) = (Vec::new(), 0);
        let decoder = Self::build(config, cx, &mut |name, shape, _| {
            let tensor = provide(name, shape)?;
            bytes += crate::files::tensors::bytes(&tensor) as u64;
            parameters.push((name.to_owned(), tensor.shallow_clone()));
            Ok(tensor)
        })?;
        Ok(Decoder { visits, parameters: parameters.into(), bytes, ..decoder })
    }

    fn unread(config: DecoderConfig, cx: &ModelCx) -> Self {
        let mut windows: Vec<_> = config.layers.iter().map(|layer| layer.window).collect();
        windows.sort_unstable();
        windows.dedup();
        Decoder {
            names: config.names(),
            cx: *cx,
            weights: None,
            embed: OnceCell::new(),
            layers: config.layers.iter().map(|_| OnceCell::new()).collect(),
            end: OnceCell::new(),
            windows,
            parameters: RefCell::default(),
            visits: Vec::new(),
            bytes: 0,
            config,
        }
    }

    fn build(config: DecoderConfig, cx: &ModelCx, provide: &mut Provide) -> Result<Self> {
        let mut decoder = Self::unread(config, cx);
        let mut builder = Builder { config: &decoder.config, precision: cx.precision, provide };
        let embed = builder.embed()?;
        decoder.layers =
            (0..decoder.layers.len()).map(|index| Ok(builder.layer(index)?.into())).collect::<Result<_>>()?;
        decoder.end = builder.end(&embed)?.into();
        decoder.embed = embed.into();
        Ok(decoder)
    }

    /// Returns the modules of a recording pass, which computes no products.
    fn record(&self) -> Vec<Visit> {
        let ids = Tensor::zeros([1, 2], (Kind::Int64, Device::Cpu));
        let mask = Tensor::ones([1, 2], (Kind::Bool, Device::Cpu));
        let mut hooks = Hooks::record();
        let _ = tch::no_grad(|| (self as &dyn LanguageModel).forward(&Tokens { ids, mask }, &mut hooks));
        hooks.into_visits()
    }

    /// Reads a part of the model from its file.
    fn read<T>(&self, part: impl FnOnce(&mut Builder) -> Result<T>) -> T {
        let weights = self.weights.as_ref().expect("a decoder without a file has all its weights");
        let mut provide = |name: &str, shape: &[i64], kind: Kind| {
            let tensor = weights.get(name, shape, kind)?;
            self.parameters.borrow_mut().push((name.to_owned(), tensor.shallow_clone()));
            Ok(tensor)
        };
        let mut builder = Builder { config: &self.config, precision: self.cx.precision, provide: &mut provide };
        // Names, shapes and types were checked when the file was opened.
        tch::no_grad(|| part(&mut builder)).expect("a checked tensor can be read")
    }

    fn embedding(&self) -> &Embed {
        self.embed.get_or_init(|| self.read(|builder| builder.embed()))
    }

    fn end_of_model(&self) -> &End {
        self.end.get_or_init(|| self.read(|builder| builder.end(self.embedding())))
    }

    fn layer_at(&self, index: usize) -> &Layer {
        self.layers[index].get_or_init(|| self.read(|builder| builder.layer(index)))
    }

    fn run_layer(&self, layer: &Layer, x: &Tensor, context: &Context, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let norm = &self.config.norm;
        let kind = self.cx.precision.kind();
        let normed =
            |hooks: &mut Hooks, name: Option<&str>, norm: &Option<Norm>, x: &Tensor, out: Kind| match (name, norm) {
                (Some(name), Some(norm)) => hooks.norm(name, x, norm, out),
                _ => Ok(x.shallow_clone()),
            };
        let [before_attention, after_attention, before_mlp, after_mlp] = &layer.norms;
        let read = normed(hooks, norm.before_attention, before_attention, x, kind)?;
        let attend = |hooks: &mut Hooks, x: &Tensor| self.attend(layer, x, context, hooks);
        let attention = match self.config.attention.path.split_once('.') {
            None => hooks.module(self.config.attention.path, &read, attend)?,
            Some((outer, inner)) => hooks.module(outer, &read, |hooks, x| hooks.module(inner, x, attend))?,
        };
        let attention = normed(hooks, norm.after_attention, after_attention, &attention, Kind::Float)?;
        let middle = if self.config.parallel { x.shallow_clone() } else { residual(x, &attention) };
        let read = normed(hooks, norm.before_mlp, before_mlp, &middle, kind)?;
        let mlp = hooks.module(self.config.mlp.path, &read, |hooks, x| self.mlp(layer, x, hooks))?;
        let mlp = normed(hooks, norm.after_mlp, after_mlp, &mlp, Kind::Float)?;
        // The order of Hugging Face, for equal rounding.
        Ok(if self.config.parallel { mlp + attention + x } else { residual(&middle, &mlp) })
    }

    fn attend(&self, layer: &Layer, x: &Tensor, context: &Context, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let config = &self.config.attention;
        let size = x.size();
        let (rows, length, head) = (size[0], size[1], config.head_dim);
        // [B, L, n·D] to [B, n, L, D].
        let heads = |x: &Tensor| x.view([rows, length, -1, head]).transpose(1, 2);
        let (q, k, v) = match (config.input, &layer.kv) {
            (Projections::Separate { q, k, v }, Some((to_k, to_v))) => {
                let normed = |hooks: &mut Hooks, x: Tensor, name: &str, norm: Option<&Norm>, over: QkNorm| match norm {
                    Some(norm) if config.qk_norm == Some(over) => {
                        hooks.module(name, &x, |_, x| Ok(norm.forward(x, x.kind())))
                    }
                    _ => Ok(x),
                };
                let norms = layer.qk_norm.as_ref();
                let mut project = |name: &str, linear: &Linear, norm_name: &str, norm: Option<&Norm>| {
                    let x = hooks.linear(name, x, linear)?;
                    let x = normed(hooks, x, norm_name, norm, QkNorm::All)?;
                    // Norms over a head come before the transpose, as in Hugging Face.
                    let x = x.view([rows, length, -1, head]);
                    Ok(normed(hooks, x, norm_name, norm, QkNorm::Head)?.transpose(1, 2))
                };
                let q = project(q, &layer.q, "q_norm", norms.map(|(q, _)| q))?;
                let k = project(k, to_k, "k_norm", norms.map(|(_, k)| k))?;
                (q, k, heads(&hooks.linear(v, x, to_v)?))
            }
            (Projections::Interleaved(name), _) => {
                let joined = hooks.linear(name, x, &layer.q)?;
                let parts = joined.view([rows, length, config.heads, 3 * head]).transpose(1, 2).chunk(3, -1);
                (parts[0].shallow_clone(), parts[1].shallow_clone(), parts[2].shallow_clone())
            }
            (Projections::Joined(name) | Projections::Separate { q: name, .. }, _) => {
                let joined = hooks.linear(name, x, &layer.q)?;
                let (wide, narrow) = (config.heads * head, config.kv_heads * head);
                let part = |start: i64, width: i64| {
                    let part = joined.narrow(-1, start, width);
                    part.reshape([rows, length, -1, head]).transpose(1, 2)
                };
                (part(0, wide), part(wide, narrow), part(wide + narrow, narrow))
            }
        };
        let z = layer.attention.heads(&q, &k, &v, context);
        hooks.linear(config.output, &z, &layer.out)
    }

    fn mlp(&self, layer: &Layer, x: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let config = &self.config.mlp;
        let act = |hooks: &mut Hooks, x: &Tensor| hooks.module(config.act_path, x, |_, x| Ok(config.act.forward(x)));
        let (wide, down) = match (config.layout, &layer.gate) {
            (MlpLayout::Gated { gate, up, down }, Some(to_gate)) => {
                let gate = hooks.linear(gate, x, to_gate)?;
                // No hook reads the activation, so no tensor is made for it.
                if config.act == Activation::Silu && !hooks.sees(config.act_path) {
                    let up = hooks.linear(up, x, &layer.up)?;
                    if kernels::fit([&gate, &up]) {
                        return hooks.linear(down, &kernels::silu_times(&gate, &up), &layer.down);
                    }
                    return hooks.linear(down, &(gate.silu() * up), &layer.down);
                }
                let gate = act(hooks, &gate)?;
                (gate * hooks.linear(up, x, &layer.up)?, down)
            }
            (MlpLayout::GatedJoined { gate_up, down }, _) => {
                let both = hooks.linear(gate_up, x, &layer.up)?.chunk(2, -1);
                (&both[1] * act(hooks, &both[0])?, down)
            }
            (MlpLayout::Plain { up, down } | MlpLayout::Gated { up, down, .. }, _) => {
                let wide = hooks.linear(up, x, &layer.up)?;
                (act(hooks, &wide)?, down)
            }
        };
        hooks.linear(down, &wide, &layer.down)
    }
}

impl LanguageModel for Decoder {
    fn hidden_size(&self) -> i64 {
        self.config.hidden_size
    }

    fn n_layers(&self) -> usize {
        self.layers.len()
    }

    fn n_heads(&self) -> i64 {
        self.config.attention.heads
    }

    fn vocab_size(&self) -> i64 {
        self.config.vocab_size
    }

    fn max_positions(&self) -> Option<i64> {
        self.config.max_positions
    }

    fn names(&self) -> &Names {
        &self.names
    }

    fn device(&self) -> Device {
        self.cx.device
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.end_of_model();
        for index in 0..self.layers.len() {
            self.layer_at(index);
        }
        self.parameters.borrow().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    fn memory(&self) -> u64 {
        self.bytes
    }

    fn modules(&self) -> Vec<Visit> {
        self.visits.clone()
    }

    fn begin(&self, tokens: &Tokens, hooks: &mut Hooks) -> Result<Hidden, Stop> {
        let embed = self.embedding();
        let EmbedConfig { tokens: path, positions, scale, scale_inside } = self.config.embed;
        let scaled = |x: Tensor, here: bool| if here && scale != 1.0 { x * scale } else { x };
        let x = hooks.module(path, &tokens.ids, |_, ids| {
            let x = Tensor::embedding(&embed.tokens, ids, -1, false, false).to_kind(Kind::Float);
            Ok(scaled(x, scale_inside))
        })?;
        let mut x = scaled(x, !scale_inside);
        if let (Some(path), Some(table)) = (positions, &embed.positions) {
            let ids = Tensor::arange(tokens.size().1, (Kind::Int64, tokens.ids.device())).unsqueeze(0);
            let positions = hooks.module(path, &ids, |_, ids| Ok(Tensor::embedding(table, ids, -1, false, false)))?;
            // Not in place: a hook may hold the embeddings.
            x = &x + positions;
        }
        let context = Context::new(tokens, &self.windows, &self.config.rotary);
        Ok(Hidden { x, context: Rc::new(context) })
    }

    fn layer(&self, index: usize, hidden: &Hidden, hooks: &mut Hooks) -> Result<Hidden, Stop> {
        let x = hooks.module(&self.names.layer(index), &hidden.x, |hooks, x| {
            self.run_layer(self.layer_at(index), x, &hidden.context, hooks)
        })?;
        Ok(Hidden { x, context: hidden.context.clone() })
    }

    fn end(&self, hidden: &Hidden, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let end = self.end_of_model();
        let kind = self.cx.precision.kind();
        let x = hooks.norm(self.config.final_norm, &hidden.x, &end.norm, kind)?;
        let logits = hooks.linear(self.config.head.path, &x, &end.head)?.to_kind(Kind::Float);
        Ok(match self.config.head.soft_cap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        })
    }
}
