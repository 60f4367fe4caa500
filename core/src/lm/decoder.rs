//! The decoder-only transformer that most families are variants of.
//!
//! A family's [`DecoderConfig`] states what each layer is made of: its norms, its attention, its MLP or experts, each with the
//! layout and names of its projections. This module connects them. Modules have Hugging Face's paths, so that a hook
//! means the same as in Python. Any other architecture implements [`LanguageModel`] from the same blocks.
//!
//! A layer is read from its file when a pass first reaches it: layers past the last hook are never loaded.

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::altup::{AltUp, AltUpConfig, StreamMaps};
use super::attention::{Attention, AttentionConfig};
use super::beside::{Beside, BesideConfig};
use super::blocks::{Linear, residual};
use super::build::{Builder, Lazy, ModelWeights, Wanted, shape_only};
use super::context::{Context, ContextConfig, KeysValues};
use super::delta_net::{DeltaNet, DeltaNetConfig};
use super::experts::{Experts, ExpertsConfig};
use super::hook_point::Tokens;
use super::laurel::{Laurel, LaurelConfig};
use super::mlp::{Mlp, MlpConfig};
use super::model::{Hidden, Hooks, LanguageModel, Stop, Visit};
use super::names::{LayerNames, Names};
use super::norm::{Norm, NormConfig};
use super::per_layer::{PerLayer, PerLayerConfig, PerLayerInputs};
use super::rotary::Rotary;
use super::weights::{ModelCx, Weights};
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

/// Config of a layer.
#[derive(Debug, Clone)]
pub struct LayerConfig {
    /// What mixes positions.
    pub mixer: Mixer,
    /// What follows.
    pub feed_forward: FeedForward,
    /// Norms.
    pub norms: NormNames,
    /// Whether attention and MLP both read the layer's input, instead of one after the other. Without a norm of its own,
    /// the MLP reads what attention reads.
    pub parallel: bool,
    /// How the outputs of attention and MLP enter the residual stream.
    pub residual: Residual,
    /// Factor on the outputs of attention and MLP.
    pub branch_scale: f64,
    /// Learned residual connection beside attention, if there is one.
    pub laurel: Option<LaurelConfig>,
    /// Experts beside the MLP, if there are any.
    pub beside: Option<BesideConfig>,
    /// Learned factor [1] on the layer's output by name, if there is one.
    pub scalar: Option<&'static str>,
}

/// What mixes positions in a layer.
#[derive(Debug, Clone)]
pub enum Mixer {
    /// Softmax attention.
    Attention(AttentionConfig),
    /// Gated DeltaNet, a linear attention.
    DeltaNet(DeltaNetConfig),
}

impl Mixer {
    fn path(&self) -> &'static str {
        match self {
            Mixer::Attention(attention) => attention.path,
            Mixer::DeltaNet(net) => net.path,
        }
    }

    fn as_attention(&self) -> Option<&AttentionConfig> {
        match self {
            Mixer::Attention(attention) => Some(attention),
            Mixer::DeltaNet(_) => None,
        }
    }
}

/// What a layer applies to each position.
#[derive(Debug, Clone)]
pub enum FeedForward {
    /// One MLP.
    Mlp(MlpConfig),
    /// A mixture of experts.
    Experts(ExpertsConfig),
}

impl FeedForward {
    fn path(&self) -> &'static str {
        match self {
            FeedForward::Mlp(mlp) => mlp.path,
            FeedForward::Experts(experts) => experts.path,
        }
    }
}

/// How the outputs of attention and MLP enter the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// The layer adds them.
    Outside,
    /// Attention and MLP add their output to the residual stream themselves, so that hooks on them see the sum (BLOOM).
    Inside,
    /// As `Inside`, but they add it to their normalised input.
    InsideToNormed,
}

/// Norms of a layer, by name; `None` for those that a family lacks.
#[derive(Debug, Clone, Copy, Default)]
pub struct NormNames {
    /// Norm of attention's input.
    pub before_attention: Option<&'static str>,
    /// Norm of attention's output.
    pub after_attention: Option<&'static str>,
    /// Norm of the residual stream after attention's output is added.
    pub after_attention_sum: Option<&'static str>,
    /// Norm of the MLP's input.
    pub before_mlp: Option<&'static str>,
    /// Norm of the MLP's output.
    pub after_mlp: Option<&'static str>,
    /// Norm of the residual stream after the MLP's output is added.
    pub after_mlp_sum: Option<&'static str>,
}

impl NormNames {
    /// Returns norms of the inputs only.
    pub fn before(attention: &'static str, mlp: &'static str) -> Self {
        NormNames { before_attention: Some(attention), before_mlp: Some(mlp), ..NormNames::default() }
    }

    /// Returns norms of the outputs only.
    pub fn after(attention: &'static str, mlp: &'static str) -> Self {
        NormNames { after_attention: Some(attention), after_mlp: Some(mlp), ..NormNames::default() }
    }

    /// Returns norms of inputs and outputs, as Gemma 2 names them.
    pub fn sandwich() -> Self {
        NormNames {
            before_attention: Some("input_layernorm"),
            after_attention: Some("post_attention_layernorm"),
            before_mlp: Some("pre_feedforward_layernorm"),
            after_mlp: Some("post_feedforward_layernorm"),
            ..NormNames::default()
        }
    }

    fn all(self) -> [Option<&'static str>; 6] {
        let NormNames { before_attention, after_attention, after_attention_sum, .. } = self;
        let NormNames { before_mlp, after_mlp, after_mlp_sum, .. } = self;
        [before_attention, after_attention, after_attention_sum, before_mlp, after_mlp, after_mlp_sum]
    }
}

impl LayerConfig {
    /// Returns a layer that adds the outputs of attention and MLP one after the other.
    pub fn new(attention: AttentionConfig, feed_forward: FeedForward, norms: NormNames) -> Self {
        LayerConfig {
            mixer: Mixer::Attention(attention),
            feed_forward,
            norms,
            parallel: false,
            residual: Residual::Outside,
            branch_scale: 1.0,
            laurel: None,
            beside: None,
            scalar: None,
        }
    }

    fn names(&self) -> LayerNames {
        let inside = |path: &str, name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        let norms = self.norms;
        let own = |name: Option<&str>| name.map(str::to_owned);
        let attention = self.mixer.as_attention();
        let attention_out = attention.map(|attention| inside(attention.path, attention.output));
        let mlp_path = self.feed_forward.path();
        let in_mlp = |name: &str| inside(mlp_path, name);
        let (mlp_in, mlp_up, mlp_out) = match &self.feed_forward {
            FeedForward::Mlp(mlp) => {
                let (first, up, last) = mlp.layout.names();
                (first.map(in_mlp), up.map(in_mlp), Some(in_mlp(last)))
            }
            FeedForward::Experts(_) => (None, None, None),
        };
        // Where a module adds the residual stream itself, its projection's output is what it adds.
        let outside = self.residual == Residual::Outside;
        let attention_added = own(norms.after_attention)
            .or_else(|| attention_out.clone().filter(|_| !outside))
            .unwrap_or_else(|| self.mixer.path().to_owned());
        let mlp_added = own(norms.after_mlp)
            .or_else(|| mlp_out.clone().filter(|_| !outside || mlp_path.is_empty()))
            .unwrap_or_else(|| mlp_path.to_owned());
        let first_of_mlp = if mlp_path.is_empty() { mlp_in.clone() } else { Some(mlp_path.to_owned()) };
        LayerNames {
            attention_out,
            attention_added,
            mlp_in,
            mlp_up,
            mlp_out,
            mlp_added,
            norm1: own(norms.before_attention),
            norm2: own(norms.before_mlp),
            middle: own(norms.before_mlp).or(first_of_mlp).filter(|_| !self.parallel),
        }
    }
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
        for layer in &self.layers {
            match &layer.mixer {
                Mixer::Attention(attention) => attention.check()?,
                Mixer::DeltaNet(net) => net.check()?,
            }
            match &layer.feed_forward {
                FeedForward::Mlp(mlp) => mlp.check()?,
                FeedForward::Experts(experts) => experts.check()?,
            }
            layer.laurel.map_or(Ok(()), |laurel| laurel.check())?;
            layer.beside.as_ref().map_or(Ok(()), |beside| beside.experts.check())?;
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

struct Layer {
    norms: [Option<Norm>; 6],
    mixer: MixerPart,
    laurel: Option<Laurel>,
    feed_forward: FeedForwardPart,
    beside: Option<Beside>,
    altup: Option<AltUp>,
    per_layer: Option<PerLayer>,
    scalar: Option<Tensor>,
}

enum MixerPart {
    Attention(Attention),
    DeltaNet(DeltaNet),
}

enum FeedForwardPart {
    Mlp(Mlp),
    Experts(Box<Experts>),
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
            builder.lazily(move |builder| Layer::build(&own, index, builder))
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

impl Layer {
    fn build(config: &DecoderConfig, index: usize, builder: &mut Builder) -> Result<Self> {
        let (d, at, own) = (config.hidden_size, config.layer_path(index), &config.layers[index]);
        let mut norms = [const { None }; 6];
        for (norm, name) in norms.iter_mut().zip(own.norms.all()) {
            *norm = name.map(|name| builder.norm(&format!("{at}.{name}"), d, config.norm)).transpose()?;
        }
        let mixer = match &own.mixer {
            Mixer::Attention(attention) => {
                MixerPart::Attention(Attention::build(attention, (index, &at), d, config.norm, builder)?)
            }
            Mixer::DeltaNet(net) => MixerPart::DeltaNet(DeltaNet::build(net, &at, d, config.norm, builder)?),
        };
        let feed_forward = match &own.feed_forward {
            FeedForward::Mlp(mlp) => FeedForwardPart::Mlp(Mlp::build(mlp, &at, d, builder)?),
            FeedForward::Experts(experts) => {
                FeedForwardPart::Experts(Box::new(Experts::build(experts, &at, d, builder)?))
            }
        };
        let norm = config.norm;
        let laurel = own.laurel.map(|laurel| Laurel::build(laurel, &at, d, norm, builder)).transpose()?;
        let beside = own.beside.as_ref().map(|beside| Beside::build(beside, &at, d, norm, builder)).transpose()?;
        let altup = config.embed.streams.map(|altup| AltUp::build(altup, &at, d, norm, builder)).transpose()?;
        let input = |input| PerLayer::build(input, &at, d, norm, builder);
        let per_layer = config.embed.per_layer.map(input).transpose()?;
        let scalar = own.scalar.map(|name| builder.tensor(&format!("{at}.{name}"), &[1])).transpose()?;
        Ok(Layer { norms, mixer, laurel, feed_forward, beside, altup, per_layer, scalar })
    }

    /// Returns the layer's output for its input x: the residual stream [B, L, d], or all of AltUp's [A, B, L, d]. `input`
    /// [B, L, p] is the layer's input beside the stream.
    fn forward(
        &self,
        own: (&LayerConfig, Kind),
        (x, input): (&Tensor, Option<Tensor>),
        context: &Context,
        kept: &mut KeysValues,
        hooks: &mut Hooks,
    ) -> Result<Tensor, Stop> {
        // What the layer's input adds to the stream, gated by the stream.
        let added = |gating: &Tensor, hooks: &mut Hooks| match (&self.per_layer, &input) {
            (Some(per_layer), Some(input)) => per_layer.forward(gating, input, hooks).map(Some),
            _ => Ok(None),
        };
        if let Some(altup) = &self.altup {
            let predicted = altup.predict(x, hooks)?;
            let computed = self.branches(own, &altup.active(&predicted), context, kept, hooks)?;
            let streams = altup.correct(&predicted, &computed, hooks)?;
            return Ok(match added(&altup.gating(&streams), hooks)? {
                Some(added) => altup.add_to_others(&streams, &added),
                None => streams,
            });
        }
        let mut x = self.branches(own, x, context, kept, hooks)?;
        if let Some(added) = added(&x, hooks)? {
            x = residual(&x, &added);
        }
        Ok(match &self.scalar {
            Some(scalar) => x * scalar,
            None => x,
        })
    }

    /// Returns the residual stream x [B, L, d] after attention and MLP.
    fn branches(
        &self,
        (own, kind): (&LayerConfig, Kind),
        x: &Tensor,
        context: &Context,
        kept: &mut KeysValues,
        hooks: &mut Hooks,
    ) -> Result<Tensor, Stop> {
        let LayerConfig { norms, parallel, branch_scale, .. } = *own;
        let [before_attention, after_attention, after_attention_sum, before_mlp, after_mlp, after_mlp_sum] =
            &self.norms;
        let scaled = |branch: Tensor| match branch_scale == 1.0 {
            true => branch,
            false => branch.to_kind(Kind::Float) * branch_scale,
        };
        // What attention and MLP add to their output themselves.
        let carried = |stream: &Tensor, read: &Tensor| match own.residual {
            Residual::Outside => None,
            Residual::Inside => Some(stream.shallow_clone()),
            Residual::InsideToNormed => Some(read.shallow_clone()),
        };
        let with = |stream: &Option<Tensor>, output: Tensor| match stream {
            Some(stream) => residual(stream, &output),
            None => output,
        };

        let read = normed(hooks, norms.before_attention, before_attention, x, kind)?;
        let stream = carried(x, &read);
        let attention = nested(hooks, own.mixer.path(), &read, |hooks, x| {
            let output = match &self.mixer {
                MixerPart::Attention(attention) => attention.forward(x, context, kept, hooks)?,
                MixerPart::DeltaNet(net) => net.forward(x, context, hooks)?,
            };
            Ok(with(&stream, output))
        })?;
        let attention = scaled(normed(hooks, norms.after_attention, after_attention, &attention, Kind::Float)?);
        let middle = match (parallel, stream) {
            (true, _) => x.shallow_clone(),
            (false, Some(_)) => attention.shallow_clone(),
            (false, None) => residual(x, &attention),
        };
        let middle = match &self.laurel {
            Some(laurel) => laurel.join(&middle, &read, hooks)?,
            None => middle,
        };
        let middle = normed(hooks, norms.after_attention_sum, after_attention_sum, &middle, Kind::Float)?;
        let read = match norms.before_mlp.is_none() && parallel {
            true => read,
            false => normed(hooks, norms.before_mlp, before_mlp, &middle, kind)?,
        };
        let stream = carried(&middle, &read);
        let mlp = nested(hooks, own.feed_forward.path(), &read, |hooks, x| {
            let output = match &self.feed_forward {
                FeedForwardPart::Mlp(mlp) => mlp.forward(x, hooks)?,
                FeedForwardPart::Experts(experts) => experts.forward(x, hooks)?,
            };
            Ok(with(&stream, output))
        })?;
        let mlp = match &self.beside {
            Some(beside) => beside.join(&mlp, &middle, kind, hooks)?,
            None => mlp,
        };
        let mlp = scaled(normed(hooks, norms.after_mlp, after_mlp, &mlp, Kind::Float)?);
        let sum = match (parallel, stream) {
            // The order of Hugging Face, for equal rounding.
            (true, _) => mlp + attention + x,
            (false, Some(_)) => mlp,
            (false, None) => residual(&middle, &mlp),
        };
        normed(hooks, norms.after_mlp_sum, after_mlp_sum, &sum, Kind::Float)
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

/// Applies a norm, if the family has it, as dtype `out`.
fn normed(hooks: &mut Hooks, name: Option<&str>, norm: &Option<Norm>, x: &Tensor, out: Kind) -> Result<Tensor, Stop> {
    match (name, norm) {
        (Some(name), Some(norm)) => hooks.norm(name, x, norm, out),
        _ => Ok(x.shallow_clone()),
    }
}

/// Runs the module at a path of one or two names; an empty path is no module.
fn nested(
    hooks: &mut Hooks,
    path: &str,
    input: &Tensor,
    run: impl FnOnce(&mut Hooks, &Tensor) -> Result<Tensor, Stop>,
) -> Result<Tensor, Stop> {
    match path.split_once('.') {
        None if path.is_empty() => run(hooks, input),
        None => hooks.module(path, input, run),
        Some((outer, inner)) => hooks.module(outer, input, |hooks, x| hooks.module(inner, x, run)),
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
        self.config.max_positions
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
            let layer = layer.get();
            if let FeedForwardPart::Experts(experts) = &layer.feed_forward {
                experts.read();
            }
            if let Some(beside) = &layer.beside {
                beside.experts().read();
            }
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
