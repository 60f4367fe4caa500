//! One layer of a decoder: what it is made of, and how its parts are connected.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::altup::{AltUp, AltUpConfig};
use super::attention::{Attention, AttentionConfig};
use super::beside::{Beside, BesideConfig};
use super::blocks::residual;
use super::build::Builder;
use super::context::{Context, KeysValues};
use super::delta_net::{DeltaNet, DeltaNetConfig};
use super::experts::{Experts, ExpertsConfig};
use super::laurel::{Laurel, LaurelConfig};
use super::mlp::{Mlp, MlpConfig};
use super::model::{Hooks, Stop};
use super::names::LayerNames;
use super::norm::{Norm, NormConfig};
use super::per_layer::{PerLayer, PerLayerConfig};

/// Config of a layer.
#[derive(Debug, Clone)]
pub struct LayerConfig {
    /// Attention, or a linear form of it.
    pub mixer: Mixer,
    /// MLP or experts.
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
    /// Learned factor `[1]` on the layer's output by name, if there is one.
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

    pub(super) fn as_attention(&self) -> Option<&AttentionConfig> {
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

    /// Returns the number of tokens of which an expert reads one, on average; 1 without experts.
    pub(super) fn tokens_per_row(&self) -> i64 {
        let experts = match &self.feed_forward {
            FeedForward::Experts(experts) => Some(experts),
            FeedForward::Mlp(_) => self.beside.as_ref().map(|beside| &beside.experts),
        };
        experts.map_or(1, |experts| (experts.count / experts.per_token).max(1))
    }

    pub(super) fn check(&self) -> Result<()> {
        match &self.mixer {
            Mixer::Attention(attention) => attention.check()?,
            Mixer::DeltaNet(net) => net.check()?,
        }
        match &self.feed_forward {
            FeedForward::Mlp(mlp) => mlp.check()?,
            FeedForward::Experts(experts) => experts.check()?,
        }
        self.laurel.map_or(Ok(()), |laurel| laurel.check())?;
        self.beside.as_ref().map_or(Ok(()), |beside| beside.experts.check())
    }

    pub(super) fn names(&self) -> LayerNames {
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

/// What the layers of a model have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModelParts {
    /// Width of the residual stream.
    pub d: i64,
    /// Kind and epsilon of norms.
    pub norm: NormConfig,
    /// Residual streams, if there are several.
    pub streams: Option<AltUpConfig>,
    /// Inputs of layers beside the residual stream, if there are any.
    pub inputs: Option<PerLayerConfig>,
}

/// A layer with its weights.
pub(super) struct Layer {
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

impl Layer {
    /// Builds the layer of this index at the path `at`.
    pub fn build(
        own: &LayerConfig,
        model: ModelParts,
        (index, at): (usize, &str),
        builder: &mut Builder,
    ) -> Result<Self> {
        let ModelParts { d, norm, streams, inputs } = model;
        let mut norms = [const { None }; 6];
        for (slot, name) in norms.iter_mut().zip(own.norms.all()) {
            *slot = name.map(|name| builder.norm(&format!("{at}.{name}"), d, norm)).transpose()?;
        }
        let mixer = match &own.mixer {
            Mixer::Attention(attention) => {
                MixerPart::Attention(Attention::build(attention, (index, at), d, norm, builder)?)
            }
            Mixer::DeltaNet(net) => MixerPart::DeltaNet(DeltaNet::build(net, at, d, norm, builder)?),
        };
        let feed_forward = match &own.feed_forward {
            FeedForward::Mlp(mlp) => FeedForwardPart::Mlp(Mlp::build(mlp, at, d, builder)?),
            FeedForward::Experts(experts) => {
                FeedForwardPart::Experts(Box::new(Experts::build(experts, at, d, builder)?))
            }
        };
        let laurel = own.laurel.map(|laurel| Laurel::build(laurel, at, d, norm, builder)).transpose()?;
        let beside = own.beside.as_ref().map(|beside| Beside::build(beside, at, d, norm, builder)).transpose()?;
        let altup = streams.map(|altup| AltUp::build(altup, at, d, norm, builder)).transpose()?;
        let input = |input| PerLayer::build(input, at, d, norm, builder);
        let per_layer = inputs.map(input).transpose()?;
        let scalar = own.scalar.map(|name| builder.tensor(&format!("{at}.{name}"), &[1])).transpose()?;
        Ok(Layer { norms, mixer, laurel, feed_forward, beside, altup, per_layer, scalar })
    }

    /// Reads all experts.
    pub fn read(&self) {
        if let FeedForwardPart::Experts(experts) = &self.feed_forward {
            experts.read();
        }
        if let Some(beside) = &self.beside {
            beside.experts().read();
        }
    }

    /// Returns the layer's output for its input x: the residual stream [B, L, d], or all of AltUp's [A, B, L, d]. `input`
    /// [B, L, p] is the layer's input beside the stream.
    pub fn forward(
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

/// Applies a norm, if the family has it, as dtype `out`.
pub(super) fn normed(
    hooks: &mut Hooks,
    name: Option<&str>,
    norm: &Option<Norm>,
    x: &Tensor,
    out: Kind,
) -> Result<Tensor, Stop> {
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
