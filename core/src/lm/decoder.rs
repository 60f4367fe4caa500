//! The decoder-only transformer that most families are variants of.
//!
//! A family's [`DecoderConfig`] states embeddings, layers and head. A [`LayerConfig`] states what a layer is made of: its
//! norms, its attention, its MLP or experts, each with the layout and names of its projections. Modules have Hugging
//! Face's paths, so that a hook means the same as in Python. Any other architecture implements [`LanguageModel`] from the
//! same blocks.
//!
//! A layer is read from its file when a pass first reaches it: layers past the last hook are never loaded.

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::altup::{AltUpConfig, StreamMaps};
use super::attention::AttentionConfig;
use super::blocks::Linear;
use super::build::{Builder, Lazy, ModelWeights, shape_only};
use super::context::{Context, ContextConfig, KeysValues};
use super::hook_point::Tokens;
pub use super::layer::{FeedForward, LayerConfig, Mixer, NormNames, Residual};
use super::layer::{Layer, ModelParts, normed};
use super::mlp::MlpConfig;
use super::model::{Hidden, Hooks, LanguageModel, Stop, Visit};
use super::names::Names;
use super::norm::{Norm, NormConfig};
use super::per_layer::{PerLayerConfig, PerLayerInputs};
use super::rotary::Rotary;
use super::weights::{ModelCx, Wanted, Weights};
use crate::error::InputError;
use crate::files::tensors::{bytes, kind_size};

/// Config of a decoder.
#[derive(Debug, Clone)]
pub struct DecoderConfig {
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Number of token ids.
    pub vocab_size: i64,
    /// Longest context, if there is a limit.
    pub max_positions: Option<i64>,
    /// The layers.
    pub layers: Vec<LayerConfig>,
    /// Rotary embeddings that layers refer to.
    pub rotary: Vec<Rotary>,
    /// Path of the module that holds embeddings and layers: `model`.
    pub root: &'static str,
    /// Name of the list of layers in it: `layers`.
    pub layers_name: &'static str,
    /// Token and position embeddings.
    pub embed: EmbedConfig,
    /// Kind and epsilon of all norms that state no other.
    pub norm: NormConfig,
    /// Final norm, in `root`; `None` if there is none.
    pub final_norm: Option<&'static str>,
    /// Head.
    pub head: HeadConfig,
    /// Other names of modules, and the names that the model uses.
    pub aliases: Vec<(&'static str, &'static str)>,
}

/// Embeddings of tokens and positions.
#[derive(Debug, Clone)]
pub struct EmbedConfig {
    /// Name of the token embedding, in the root.
    pub tokens: &'static str,
    /// Width of the token embedding, if it is not that of the residual stream: `project_in` maps to it then.
    pub width: Option<i64>,
    /// Learned position embedding, if there is one.
    pub positions: Option<PositionsConfig>,
    /// Factor on token embeddings.
    pub scale: f64,
    /// Whether a hook on the token embedding sees its output with this factor applied.
    pub scale_inside: bool,
    /// Norm of the token embedding, in the root, if there is one.
    pub norm: Option<&'static str>,
    /// Residual streams that the embeddings become, if there are several.
    pub streams: Option<AltUpConfig>,
    /// Inputs of each layer beside the residual stream, if there are any.
    pub per_layer: Option<PerLayerConfig>,
}

/// A learned position embedding.
#[derive(Debug, Clone, Copy)]
pub struct PositionsConfig {
    /// Name, in the root.
    pub name: &'static str,
    /// Added to a position to find its row of the table.
    pub offset: i64,
    /// Whether positions count the text tokens of a row, instead of all its columns.
    pub of_text: bool,
}

impl EmbedConfig {
    /// Returns token embeddings alone, without a factor.
    pub fn tokens(name: &'static str) -> Self {
        EmbedConfig {
            tokens: name,
            width: None,
            positions: None,
            scale: 1.0,
            scale_inside: false,
            norm: None,
            streams: None,
            per_layer: None,
        }
    }

    /// Adds a learned position embedding.
    pub fn with_positions(self, name: &'static str) -> Self {
        EmbedConfig { positions: Some(PositionsConfig { name, offset: 0, of_text: false }), ..self }
    }
}

/// Head: from the residual stream to logits.
#[derive(Debug, Clone)]
pub struct HeadConfig {
    /// Path.
    pub path: &'static str,
    /// Whether it shares the token embedding's weight.
    pub tied: bool,
    /// Whether it has a bias.
    pub bias: bool,
    /// Factor on logits.
    pub scale: f64,
    /// Soft cap c on logits: `c · tanh(logit / c)`.
    pub soft_cap: Option<f64>,
}

impl HeadConfig {
    /// Returns the head `lm_head`, without bias, factor and cap.
    pub fn new(tied: bool) -> Self {
        HeadConfig { path: "lm_head", tied, bias: false, scale: 1.0, soft_cap: None }
    }
}

impl DecoderConfig {
    /// Returns the softmax attention of all layers that have one.
    pub fn attentions(&mut self) -> impl Iterator<Item = &mut AttentionConfig> {
        self.layers.iter_mut().filter_map(|layer| match &mut layer.mixer {
            Mixer::Attention(attention) => Some(attention),
            Mixer::DeltaNet(_) => None,
        })
    }

    /// Returns the MLPs of all layers that have one.
    pub fn mlps(&mut self) -> impl Iterator<Item = &mut MlpConfig> {
        self.layers.iter_mut().filter_map(|layer| match &mut layer.feed_forward {
            FeedForward::Mlp(mlp) => Some(mlp),
            FeedForward::Experts(_) => None,
        })
    }

    /// Returns the default width of a head: `hidden_size / heads`.
    pub fn head_dim(hidden_size: i64, heads: i64) -> Result<i64> {
        if heads < 1 || hidden_size % heads != 0 {
            bail!(InputError::new(format!("config.json: width {hidden_size} is not divisible by {heads} heads")));
        }
        Ok(hidden_size / heads)
    }

    fn check(&self) -> Result<()> {
        let sizes = [("the width", self.hidden_size), ("the number of token ids", self.vocab_size)];
        if let Some((what, found)) = sizes.iter().find(|(_, number)| *number < 1) {
            bail!(InputError::new(format!("config.json: {what} is {found}")));
        }
        let HeadConfig { scale, soft_cap, .. } = self.head;
        if !scale.is_finite() {
            bail!(InputError::new(format!("config.json: the factor on logits is {scale}, not finite")));
        }
        if let Some(cap) = soft_cap.filter(|cap| cap.is_nan() || *cap <= 0.0) {
            bail!(InputError::new(format!("config.json: `final_logit_softcapping` is {cap}, not positive")));
        }
        if self.norm.eps.is_nan() || self.norm.eps < 0.0 {
            bail!(InputError::new(format!(
                "config.json: the epsilon of norms is {}, which is negative",
                self.norm.eps
            )));
        }
        for layer in &self.layers {
            layer.check()?;
        }
        self.check_shared_keys()?;
        self.embed.streams.map_or(Ok(()), |streams| streams.check())?;
        self.embed.per_layer.map_or(Ok(()), |inputs| inputs.check())
    }

    fn check_shared_keys(&self) -> Result<()> {
        let of = |layer: usize| self.layers.get(layer).and_then(|layer| layer.mixer.as_attention());
        for (index, attention) in (0..self.layers.len()).filter_map(|index| Some((index, of(index)?))) {
            let Some(other) = attention.keys_of else { continue };
            let sizes = |attention: &AttentionConfig| (attention.kv_heads, attention.head_dim);
            let fits = |it: &&AttentionConfig| it.keys_of.is_none() && sizes(it) == sizes(attention);
            if other >= index || of(other).filter(fits).is_none() {
                bail!(InputError::new(format!("config.json: layer {index} cannot use the keys of layer {other}")));
            }
        }
        Ok(())
    }

    /// Lets the last `count` layers use the keys and values of the last other layer of their kind; `kinds` has one for
    /// each layer.
    ///
    /// # Errors
    /// Fails if there is no such layer.
    pub fn share_keys<K: PartialEq>(&mut self, count: usize, kinds: &[K]) -> Result<()> {
        let own = kinds.len().saturating_sub(count);
        for (attention, kind) in self.attentions().zip(kinds).skip(own) {
            attention.keys_of = kinds[..own].iter().rposition(|other| other == kind);
            if attention.keys_of.is_none() {
                bail!(
                    InputError::new(format!(
                        "config.json: `num_kv_shared_layers` is {count} of {} layers",
                        kinds.len()
                    ))
                    .help("of each type of layer that shares keys and values, an earlier one must have its own")
                );
            }
        }
        Ok(())
    }

    fn inside(&self, name: &str) -> String {
        format!("{}.{name}", self.root)
    }

    fn parts(&self) -> ModelParts {
        let EmbedConfig { streams, per_layer, .. } = self.embed;
        ModelParts { d: self.hidden_size, norm: self.norm, streams, inputs: per_layer }
    }

    fn layer_path(&self, index: usize) -> String {
        format!("{}.{}.{index}", self.root, self.layers_name)
    }

    /// Returns the names of weights that files may have, but that layers with another layer's keys do not use.
    fn unused(&self) -> Vec<String> {
        let of_layer = |(index, layer): (usize, &LayerConfig)| {
            let unused = layer.mixer.as_attention().map(AttentionConfig::unused).unwrap_or_default();
            let at = self.layer_path(index);
            let both = |path: String| ["weight", "bias"].map(|kind| format!("{at}.{path}.{kind}"));
            unused.into_iter().flat_map(both).collect::<Vec<_>>()
        };
        self.layers.iter().enumerate().flat_map(of_layer).collect()
    }

    fn names(&self) -> Names {
        Names {
            layers: self.inside(self.layers_name),
            embed: self.inside(self.embed.tokens),
            positions: self.embed.positions.map(|positions| self.inside(positions.name)),
            final_norm: self.final_norm.map(|name| self.inside(name)),
            of_layer: self.layers.iter().map(LayerConfig::names).collect(),
            aliases: self.aliases.clone(),
        }
    }

    fn context(&self) -> ContextConfig {
        let attentions: Vec<_> = self.layers.iter().filter_map(|layer| layer.mixer.as_attention()).collect();
        let mut windows: Vec<_> = attentions.iter().map(|attention| attention.window).collect();
        windows.sort_unstable();
        windows.dedup();
        let mut kept: Vec<_> = attentions.iter().filter_map(|attention| attention.keys_of).collect();
        kept.sort_unstable();
        kept.dedup();
        let alibi = attentions.iter().find_map(|attention| attention.alibi);
        ContextConfig { windows, rotary: self.rotary.clone(), alibi, kept }
    }
}

/// A decoder with its weights.
pub struct Decoder {
    config: Arc<DecoderConfig>,
    names: Names,
    context: ContextConfig,
    cx: ModelCx,
    parts: Parts,
    /// The files, or all weights.
    weights: Stored,
    visits: Vec<Visit>,
    /// Size of all weights in bytes.
    bytes: u64,
}

enum Stored {
    Files(Arc<ModelWeights>),
    All(Vec<(String, Tensor)>),
}

struct Parts {
    embed: Lazy<Embed>,
    layers: Vec<Lazy<Layer>>,
    end: Lazy<End>,
}

struct Embed {
    tokens: Tensor,
    project: Option<Linear>,
    positions: Option<Tensor>,
    norm: Option<Norm>,
    streams: Option<StreamMaps>,
    per_layer: Option<PerLayerInputs>,
}

struct End {
    streams: Option<StreamMaps>,
    norm: Option<Norm>,
    project: Option<Linear>,
    /// `None` if it shares the embedding's weight.
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Parts {
    fn build(config: &Arc<DecoderConfig>, builder: &mut Builder) -> Result<Self> {
        let own = config.clone();
        let embed = builder.lazily(move |builder| Embed::build(&own, builder))?;
        let layer = |index: usize, builder: &mut Builder| {
            let own = config.clone();
            builder.lazily(move |builder| {
                let at = own.layer_path(index);
                Layer::build(&own.layers[index], own.parts(), (index, &at), builder)
            })
        };
        let layers = (0..config.layers.len()).map(|index| layer(index, builder)).collect::<Result<_>>()?;
        let own = config.clone();
        let end = builder.lazily(move |builder| End::build(&own, builder))?;
        Ok(Parts { embed, layers, end })
    }
}

impl Embed {
    fn build(config: &DecoderConfig, builder: &mut Builder) -> Result<Self> {
        let (d, embed) = (config.hidden_size, &config.embed);
        let width = embed.width.unwrap_or(d);
        let tokens = builder.matrix(&format!("{}.weight", config.inside(embed.tokens)), &[config.vocab_size, width])?;
        let project =
            (width != d).then(|| builder.linear(&config.inside("project_in"), d, width, false)).transpose()?;
        let positions = embed.positions.map(|positions| {
            let rows = config.max_positions.unwrap_or(0) + positions.offset;
            builder.tensor(&format!("{}.weight", config.inside(positions.name)), &[rows, d])
        });
        let positions = positions.transpose()?;
        let norm = embed.norm.map(|name| builder.norm(&config.inside(name), d, config.norm)).transpose()?;
        let maps = |streams| StreamMaps::build(&streams, config.inside("altup_projections"), d, builder);
        let streams = embed.streams.map(maps).transpose()?;
        let to_all = (config.root, config.layers.len());
        let inputs = |inputs| PerLayerInputs::build(inputs, to_all, d, config.norm, builder);
        let per_layer = embed.per_layer.map(inputs).transpose()?;
        Ok(Embed { tokens, project, positions, norm, streams, per_layer })
    }
}

impl End {
    fn build(config: &DecoderConfig, builder: &mut Builder) -> Result<Self> {
        let (d, head) = (config.hidden_size, &config.head);
        let maps = |streams| StreamMaps::build(&streams, config.inside("altup_unembed_projections"), d, builder);
        let streams = config.embed.streams.map(maps).transpose()?;
        let norm = config.final_norm.map(|name| builder.norm(&config.inside(name), d, config.norm)).transpose()?;
        let width = config.embed.width.unwrap_or(d);
        let project =
            (width != d).then(|| builder.linear(&config.inside("project_out"), width, d, false)).transpose()?;
        let (weight, bias) = (format!("{}.weight", head.path), format!("{}.bias", head.path));
        let weight = (!head.tied).then(|| builder.matrix(&weight, &[config.vocab_size, width])).transpose()?;
        let bias = head.bias.then(|| builder.matrix(&bias, &[config.vocab_size])).transpose()?;
        Ok(End { streams, norm, project, weight, bias })
    }
}

impl Decoder {
    /// Creates a decoder that reads its weights lazily.
    ///
    /// # Errors
    /// Fails if a weight is missing or has another shape than the config says, or if the file has other weights.
    pub fn open(mut config: DecoderConfig, mut weights: Weights, cx: &ModelCx) -> Result<Self> {
        if let Some(root) = cx.text_root {
            config.root = root;
        }
        config.check()?;
        let [embedding, head] =
            [&config.inside(config.embed.tokens), config.head.path].map(|path| format!("{path}.weight"));
        weights.check_has_text(&embedding, &head)?;
        if config.head.tied {
            config.head.tied = weights.tie(&embedding, &head)?;
        } else if !weights.has(&head) && weights.has(&embedding) {
            bail!(
                InputError::new(format!("the model has no head: there is no tensor `{head}`"))
                    .help("if head and embedding share a weight, set `\"tie_word_embeddings\": true` in config.json")
            );
        }
        let tied = config.head.tied.then_some(head);
        let config = Arc::new(config);
        let (mut asked, mut bytes) = (Vec::new(), 0);
        let has = |name: &str| weights.in_file(name);
        let mut provide = |wanted: Wanted| {
            // Parts of one tensor are asked for one after the other.
            if asked.last().is_none_or(|last| last != wanted.name) {
                weights.check(wanted.name, wanted.shape)?;
                asked.push(wanted.name.to_owned());
            }
            bytes += wanted.size().iter().product::<i64>() as u64 * kind_size(wanted.kind) as u64;
            Ok(shape_only(wanted.size()))
        };
        let checked = Parts::build(&config, &mut Builder::new(cx.precision, &has, &mut provide))?;
        asked.extend(config.unused());
        weights.check_none_left(&asked, tied.as_deref())?;
        let weights = ModelWeights::checked(weights, cx.precision);
        let mut decoder = Decoder {
            names: config.names(),
            context: config.context(),
            cx: *cx,
            parts: checked,
            weights: Stored::Files(weights.clone()),
            visits: Vec::new(),
            bytes,
            config,
        };
        decoder.visits = decoder.record();
        decoder.parts = weights.read(|builder| Parts::build(&decoder.config, builder));
        Ok(decoder)
    }

    /// Creates a decoder with weights from `provide`, by name and shape, in float32.
    pub fn with(
        config: DecoderConfig,
        cx: &ModelCx,
        mut provide: impl FnMut(&str, &[i64]) -> Result<Tensor>,
    ) -> Result<Self> {
        config.check()?;
        let config = Arc::new(config);
        let build = |provide: &mut dyn FnMut(Wanted) -> Result<Tensor>| {
            Parts::build(&config, &mut Builder::new(cx.precision, &|_| false, provide))
        };
        let (mut parameters, mut size) = (Vec::new(), 0);
        let shapes = build(&mut |wanted| Ok(shape_only(wanted.size())))?;
        let parts = build(&mut |wanted| {
            let tensor = provide(wanted.name, wanted.size())?;
            size += bytes(&tensor) as u64;
            parameters.push((wanted.name.to_owned(), tensor.shallow_clone()));
            Ok(tensor)
        })?;
        let mut decoder = Decoder {
            names: config.names(),
            context: config.context(),
            cx: *cx,
            parts: shapes,
            weights: Stored::All(parameters),
            visits: Vec::new(),
            bytes: size,
            config,
        };
        decoder.visits = decoder.record();
        decoder.parts = parts;
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
}

impl LanguageModel for Decoder {
    fn hidden_size(&self) -> i64 {
        self.config.hidden_size
    }

    fn n_layers(&self) -> usize {
        self.config.layers.len()
    }

    fn n_heads(&self) -> i64 {
        let attention = self.config.layers.iter().find_map(|layer| layer.mixer.as_attention());
        attention.map_or(0, |attention| attention.heads)
    }

    fn vocab_size(&self) -> i64 {
        self.config.vocab_size
    }

    fn max_positions(&self) -> Option<i64> {
        // A dynamic base follows the context's length.
        self.config.max_positions.filter(|_| !self.config.rotary.iter().any(Rotary::is_dynamic))
    }

    fn names(&self) -> &Names {
        &self.names
    }

    fn device(&self) -> Device {
        self.cx.device
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.parts.embed.get();
        for layer in &self.parts.layers {
            layer.get().read();
        }
        self.parts.end.get();
        match &self.weights {
            Stored::Files(weights) => weights.read_so_far(),
            Stored::All(all) => all.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect(),
        }
    }

    fn memory(&self) -> u64 {
        self.bytes
    }

    fn tokens_at_once(&self) -> usize {
        // An expert's product needs about as many rows as that of an MLP.
        let sparse = self.config.layers.iter().map(LayerConfig::tokens_per_row).max().unwrap_or(1);
        1024 * sparse.clamp(1, 8) as usize
    }

    fn modules(&self) -> Vec<Visit> {
        self.visits.clone()
    }

    fn begin(&self, tokens: &Tokens, hooks: &mut Hooks) -> Result<Hidden, Stop> {
        let embed = self.parts.embed.get();
        let EmbedConfig { scale, scale_inside, positions, norm, .. } = self.config.embed;
        let scaled = |x: Tensor, here: bool| if here && scale != 1.0 { x * scale } else { x };
        let x = hooks.module(&self.names.embed, &tokens.ids, |_, ids| {
            let x = Tensor::embedding(&embed.tokens, ids, -1, false, false).to_kind(Kind::Float);
            Ok(scaled(x, scale_inside))
        })?;
        let mut x = scaled(x, !scale_inside);
        if let Some(norm_name) = norm {
            x = normed(hooks, Some(&self.config.inside(norm_name)), &embed.norm, &x, Kind::Float)?;
        }
        if let Some(project) = &embed.project {
            x = hooks.linear(&self.config.inside("project_in"), &x, project)?.to_kind(Kind::Float);
        }
        if let (Some(positions), Some(table)) = (positions, &embed.positions) {
            let ids = match positions.of_text {
                true => tokens.text_positions(),
                false => Tensor::arange(tokens.size().1, (Kind::Int64, tokens.ids.device())).unsqueeze(0),
            };
            let ids = ids + positions.offset;
            let path = self.config.inside(positions.name);
            let positions = hooks.module(&path, &ids, |_, ids| Ok(Tensor::embedding(table, ids, -1, false, false)))?;
            // Not in place: a hook may hold the embeddings.
            x = &x + positions;
        }
        let inputs = embed.per_layer.as_ref().map(|inputs| inputs.forward(&tokens.ids, &x, hooks)).transpose()?;
        if let Some(streams) = &embed.streams {
            x = streams.spread(&x, hooks)?;
        }
        let context = Context::new(tokens, &self.context).with_inputs(inputs);
        Ok(Hidden { x, context: Rc::new(context), kept: KeysValues::default() })
    }

    fn layer(&self, index: usize, hidden: &Hidden, hooks: &mut Hooks) -> Result<Hidden, Stop> {
        let mut next = hidden.fork();
        let own = (&self.config.layers[index], self.cx.precision.kind());
        let (path, context) = (self.names.layer(index), &hidden.context);
        let run = |hooks: &mut Hooks, x: &Tensor| {
            self.parts.layers[index].get().forward(own, (x, context.input(index)), context, &mut next.kept, hooks)
        };
        next.x = match self.config.embed.streams {
            Some(altup) => altup.layer(hooks, &path, &hidden.x, run)?,
            None => hooks.module(&path, &hidden.x, run)?,
        };
        Ok(next)
    }

    fn end(&self, hidden: &Hidden, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let end = self.parts.end.get();
        let kind = self.cx.precision.kind();
        let mut x = match &end.streams {
            Some(streams) => streams.merge(&hidden.x, hooks)?,
            None => hidden.x.shallow_clone(),
        };
        if let Some(name) = self.config.final_norm {
            x = normed(hooks, Some(&self.config.inside(name)), &end.norm, &x, kind)?;
        }
        if let Some(project) = &end.project {
            x = hooks.linear(&self.config.inside("project_out"), &x, project)?;
        }
        let HeadConfig { path, scale, soft_cap, .. } = self.config.head;
        let weight = end.weight.as_ref().unwrap_or_else(|| &self.parts.embed.get().tokens).shallow_clone();
        let bias = end.bias.as_ref().map(Tensor::shallow_clone);
        let head = Linear { weight, bias, precision: self.cx.precision };
        let logits = hooks.linear(path, &x, &head)?.to_kind(Kind::Float);
        let logits = if scale == 1.0 { logits } else { logits * scale };
        Ok(match soft_cap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        })
    }
}
