//! Mixtures of experts (Shazeer et al. 2017, <https://arxiv.org/abs/1701.06538>): a router sends each token to a few of
//! many MLPs. Only the experts that a batch reaches are read from the file and computed.

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::blocks::{Activation, Linear};
use super::build::{Builder, Lazy};
use super::kernels;
use super::mlp::{Mlp, MlpConfig};
use super::model::{Hooks, Stop};
use super::norm::{Norm, NormConfig, NormKind};
use crate::error::InputError;
use crate::machine::parallel;

/// Mixture of experts of a layer, in place of an MLP.
#[derive(Debug, Clone)]
pub struct ExpertsConfig {
    /// Path in a layer; empty if router and experts are modules of the layer.
    pub path: &'static str,
    /// Router, a linear map to one logit per expert.
    pub router: &'static str,
    /// Whether the router has a bias.
    pub router_bias: bool,
    /// Scales of the router's input and of the experts' probabilities, if there are any.
    pub router_scales: Option<RouterScales>,
    /// Number of experts.
    pub count: i64,
    /// Number of experts per token.
    pub per_token: i64,
    /// Width of an expert.
    pub width: i64,
    /// Whether the chosen experts' probabilities are divided by their sum.
    pub renormalised: bool,
    /// Gate of an expert.
    pub glu: Glu,
    /// Tensors of the experts.
    pub layout: ExpertLayout,
    /// An expert that every token reaches, if there is one.
    pub shared: Option<SharedExpert>,
}

impl ExpertsConfig {
    /// Returns a mixture with router `gate`, and three projections for each of its experts: `experts.N.gate_proj`, ...
    pub fn new(path: &'static str, (count, per_token): (i64, i64), width: i64, act: Activation) -> Self {
        ExpertsConfig {
            path,
            router: "gate",
            router_bias: false,
            router_scales: None,
            count,
            per_token,
            width,
            renormalised: true,
            glu: Glu::Plain(act),
            layout: ExpertLayout::Each { gate: "gate_proj", up: "up_proj", down: "down_proj" },
            shared: None,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        let ExpertsConfig { count, per_token, width, .. } = *self;
        if let Some((what, found)) = [("experts", count), ("dimensions of an expert", width)].iter().find(|it| it.1 < 1)
        {
            bail!(InputError::new(format!("config.json: the number of {what} is {found}")));
        }
        if !(1..=count).contains(&per_token) {
            bail!(InputError::new(format!("config.json: a token reaches {per_token} of {count} experts")));
        }
        if count > MOST_EXPERTS {
            bail!(InputError::new(format!("config.json: {count} experts are more than any model has")));
        }
        match &self.shared {
            Some(shared) => shared.mlp.check(),
            None => Ok(()),
        }
    }
}

/// Scales of a router (Gemma 4), in the module `router`: it reads `norm(x) · scale / √d`, where the norm has no weight, and
/// the chosen experts' probabilities are multiplied with `per_expert_scale` `[E]`.
#[derive(Debug, Clone, Copy)]
pub struct RouterScales {
    /// Epsilon of the norm.
    pub eps: f64,
}

/// Upper bound on experts. Allocating for a bogus number would exhaust memory before a missing tensor is found.
const MOST_EXPERTS: i64 = 10_000;

/// Product of an expert's gate and up projection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Glu {
    /// act(gate) · up.
    Plain(Activation),
    /// gate · σ(alpha · gate) · (up + 1), with gate at most `limit` and up within ± `limit` (gpt-oss,
    /// <https://arxiv.org/abs/2508.10925>).
    Clamped {
        /// Bound.
        limit: f64,
        /// Factor in the sigmoid.
        alpha: f64,
    },
}

impl Glu {
    fn forward(self, gate: &Tensor, up: &Tensor) -> Tensor {
        match self {
            Glu::Plain(act) => act.gated(gate, up),
            Glu::Clamped { limit, alpha } => {
                let gate = gate.clamp_max(limit);
                let gate = &gate * (&gate * alpha).sigmoid();
                gate * (up.clamp(-limit, limit) + 1)
            }
        }
    }
}

/// Tensors of the experts, in the module `experts`.
#[derive(Debug, Clone, Copy)]
pub enum ExpertLayout {
    /// Three projections for each expert, as in `experts.N.gate_proj.weight`. Files that stack them, as
    /// `experts.gate_up_proj` [E, 2·I, d] (gate first) and `experts.down_proj` [E, d, I], are read too.
    Each {
        /// Gate projection.
        gate: &'static str,
        /// Up projection.
        up: &'static str,
        /// Back to the residual stream's width.
        down: &'static str,
    },
    /// All experts in `gate_up_proj` [E, 2·I, d] (gate first) and `down_proj` [E, d, I].
    Stacked,
    /// All experts in `gate_up_proj` [E, d, 2·I] (gates in even columns) and `down_proj` [E, I, d], with biases
    /// `gate_up_proj_bias` [E, 2·I] and `down_proj_bias` [E, d].
    StackedTransposed,
}

/// An expert that every token reaches.
#[derive(Debug, Clone)]
pub struct SharedExpert {
    /// The expert.
    pub mlp: MlpConfig,
    /// Linear map to one logit, if there is one: its sigmoid multiplies the expert's output.
    pub gate: Option<&'static str>,
}

/// One expert.
struct Expert {
    /// Gate and up: two maps, or one.
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

impl Expert {
    fn build(config: &ExpertsConfig, path: &str, index: i64, d: i64, builder: &mut Builder) -> Result<Self> {
        let ExpertsConfig { count, width, .. } = *config;
        let precision = builder.precision();
        match config.layout {
            ExpertLayout::Each { gate, up, down } => {
                let mut project = |name: &str, output: i64, input: i64| {
                    builder.linear(&format!("{path}.{index}.{name}"), output, input, false)
                };
                Ok(Expert {
                    gate: Some(project(gate, width, d)?),
                    up: project(up, width, d)?,
                    down: project(down, d, width)?,
                })
            }
            ExpertLayout::Stacked => {
                let mut project = |name: &str, output: i64, input: i64| {
                    let weight = builder.part(&format!("{path}.{name}"), &[count, output, input], index)?;
                    Ok::<_, anyhow::Error>(Linear { weight, bias: None, precision })
                };
                Ok(Expert {
                    gate: None,
                    up: project("gate_up_proj", 2 * width, d)?,
                    down: project("down_proj", d, width)?,
                })
            }
            ExpertLayout::StackedTransposed => {
                let mut project = |name: &str, output: i64, input: i64| {
                    let weight = builder.part(&format!("{path}.{name}"), &[count, input, output], index)?.tr();
                    let bias = Some(builder.part(&format!("{path}.{name}_bias"), &[count, output], index)?);
                    Ok::<_, anyhow::Error>(Linear { weight, bias, precision })
                };
                Ok(Expert {
                    gate: None,
                    up: project("gate_up_proj", 2 * width, d)?,
                    down: project("down_proj", d, width)?,
                })
            }
        }
    }

    /// Returns the activations [N, width] for rows x [N, d]; `down` maps them to the output.
    fn wide(&self, config: &ExpertsConfig, x: &Tensor) -> Tensor {
        let up = self.up.forward(x);
        match (&self.gate, config.layout) {
            (Some(gate), _) => config.glu.forward(&gate.forward(x), &up),
            (None, ExpertLayout::StackedTransposed) => {
                let pairs = up.unflatten(-1, [-1, 2]);
                config.glu.forward(&pairs.select(-1, 0), &pairs.select(-1, 1))
            }
            (None, _) => {
                let both = up.chunk(2, -1);
                config.glu.forward(&both[0], &both[1])
            }
        }
    }
}

/// An expert, the tokens that it reads, and where its outputs begin among those of all experts.
struct Work<'a> {
    expert: &'a Expert,
    tokens: Tensor,
    start: i64,
}

/// A mixture of experts with its weights.
pub(super) struct Experts {
    config: ExpertsConfig,
    router: Linear,
    /// Norm and scale of the router's input, and scale of the experts' probabilities.
    scales: Option<(Norm, Tensor, Tensor)>,
    experts: Vec<Lazy<Expert>>,
    shared: Option<(Mlp, Option<Linear>)>,
}

impl Experts {
    /// Builds the experts of a layer at the path `at`, for a residual stream of width `d`.
    pub fn build(config: &ExpertsConfig, at: &str, d: i64, builder: &mut Builder) -> Result<Self> {
        let mut config = config.clone();
        let path = if config.path.is_empty() { at.to_owned() } else { format!("{at}.{}", config.path) };
        let router = builder.linear(&format!("{path}.{}", config.router), config.count, d, config.router_bias)?;
        let scales = config.router_scales.map(|scales| {
            let norm = NormConfig { kind: NormKind::RmsNoWeight, eps: scales.eps };
            let norm = builder.norm("", d, norm)?;
            let input = builder.tensor(&format!("{path}.router.scale"), &[d])?;
            let experts = builder.tensor(&format!("{path}.router.per_expert_scale"), &[config.count])?;
            Ok::<_, anyhow::Error>((norm, input, experts))
        });
        let scales = scales.transpose()?;
        let experts = format!("{path}.experts");
        let is_each = matches!(config.layout, ExpertLayout::Each { .. });
        if is_each && builder.has(&format!("{experts}.gate_up_proj")) {
            config.layout = ExpertLayout::Stacked;
        }
        let expert = |index: i64, builder: &mut Builder| {
            let (config, experts) = (config.clone(), experts.clone());
            builder.lazily(move |builder| Expert::build(&config, &experts, index, d, builder))
        };
        let experts = (0..config.count).map(|index| expert(index, builder)).collect::<Result<_>>()?;
        let shared = match &config.shared {
            None => None,
            Some(shared) => {
                let gate =
                    shared.gate.map(|name| builder.linear(&format!("{path}.{name}"), 1, d, false)).transpose()?;
                Some((Mlp::build(&shared.mlp, &path, d, builder)?, gate))
            }
        };
        Ok(Experts { config, router, scales, experts, shared })
    }

    /// Reads all experts.
    pub fn read(&self) {
        for expert in &self.experts {
            expert.get();
        }
    }

    /// Returns the output for x [B, L, d]. Sites: the router's logits [B, L, E], the experts' sum (`experts`) and the
    /// shared expert.
    pub fn forward(&self, x: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let logits = self.route(x, hooks)?;
        let sum = self.sum(x, &logits, hooks)?;
        let (Some((shared, gate)), Some(names)) = (&self.shared, &self.config.shared) else { return Ok(sum) };
        let shared = hooks.module(names.mlp.path, x, |hooks, x| shared.forward(x, hooks))?;
        Ok(match (gate, names.gate) {
            (Some(gate), Some(name)) => sum + hooks.linear(name, x, gate)?.sigmoid() * shared,
            _ => sum + shared,
        })
    }

    /// Returns the router's logits [B, L, E] for x [B, L, d].
    pub fn route(&self, x: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let name = self.config.router;
        let Some((norm, scale, _)) = &self.scales else { return hooks.linear(name, x, &self.router) };
        let x = hooks.norm("router.norm", x, norm, Kind::Float)? * scale;
        let root = (*x.size().last().expect("a residual stream has a width") as f64).sqrt();
        hooks.linear(name, &(x / root), &self.router)
    }

    /// Returns the sum of the experts' outputs for x [B, L, d], as the module `experts`.
    pub fn sum(&self, x: &Tensor, logits: &Tensor, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        hooks.module("experts", x, |hooks, x| match hooks.records() {
            true => Ok(x.zeros_like()),
            false => Ok(self.weighted(x, logits)),
        })
    }

    /// Returns the sum of the chosen experts' outputs, weighted by their probabilities.
    fn weighted(&self, x: &Tensor, logits: &Tensor) -> Tensor {
        let ExpertsConfig { count, per_token, renormalised, .. } = self.config;
        let size = x.size();
        let x = x.reshape([-1, *size.last().expect("a residual stream has a width")]);
        let probabilities = logits.reshape([-1, count]).softmax(-1, Kind::Float);
        let (mut weights, chosen) = probabilities.topk(per_token, -1, true, false);
        if renormalised {
            weights = &weights / weights.sum_dim_intlist(-1, true, Kind::Float);
        }
        if let Some((.., scale)) = &self.scales {
            weights = &weights * scale.index(&[Some(&chosen)]);
        }
        // Choices ordered by expert: each expert has a range of them.
        let chosen = chosen.flatten(0, 1);
        let order = chosen.argsort_stable(true, 0, false);
        let tokens = order.divide_scalar_mode(per_token, "floor");
        let counts = Vec::<i64>::try_from(chosen.bincount::<Tensor>(None, count)).expect("counts are integers");
        let (mut work, mut start) = (Vec::new(), 0);
        for (expert, count) in self.experts.iter().zip(counts).filter(|(_, count)| *count > 0) {
            work.push(Work { expert: expert.get(), tokens: tokens.narrow(0, start, count), start });
            start += count;
        }
        let outputs = self.outputs(&x, &work, start);
        // Where each choice went.
        let place = order.argsort_stable(true, 0, false);
        kernels::weighted_sums(&outputs, &place.view([-1, per_token]), &weights).reshape(size)
    }

    /// Returns the outputs of experts for their tokens of x, one below the other, [`count`, d].
    fn outputs(&self, x: &Tensor, work: &[Work], count: i64) -> Tensor {
        let wide = |work: &Work| work.expert.wide(&self.config, &x.index_select(0, &work.tokens));
        if x.device() != Device::Cpu || x.requires_grad() {
            let outputs = work.iter().map(|work| work.expert.down.forward(&wide(work)));
            return Tensor::cat(&outputs.collect::<Vec<_>>(), 0);
        }
        let outputs = Tensor::empty([count, x.size()[1]], (self.router.precision.kind(), Device::Cpu));
        // An expert has few rows: many products on one thread each are faster than one after the other on all threads.
        parallel::each(work, |work| {
            let place = outputs.narrow(0, work.start, work.tokens.size()[0]);
            work.expert.down.forward_into(&wide(work), &place);
        });
        outputs
    }
}
