//! Gated DeltaNet (Yang et al. 2024, <https://arxiv.org/abs/2412.06464>): linear attention whose heads keep a state in
//! place of keys and values. The state decays, and each token corrects what the state returns for its key.

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::blocks::{Activation, Linear};
use super::build::Builder;
use super::context::Context;
use super::kernels;
use super::model::{Hooks, Stop};
use super::norm::{Norm, NormConfig, NormKind};
use crate::error::InputError;

/// Gated DeltaNet of a layer.
#[derive(Debug, Clone)]
pub struct DeltaNetConfig {
    /// Path in a layer.
    pub path: &'static str,
    /// Number of heads of queries and keys, each shared by neighbouring value heads.
    pub key_heads: i64,
    /// Number of heads of values.
    pub value_heads: i64,
    /// Width of a query or key.
    pub key_dim: i64,
    /// Width of a value.
    pub value_dim: i64,
    /// Number of positions that the convolution of queries, keys and values covers, including the current one.
    pub kernel: i64,
    /// Activation function after the convolution.
    pub act: Activation,
    /// Projections of the input.
    pub input: DeltaProjections,
    /// Output projection.
    pub output: &'static str,
}

/// Projections to queries q, keys k, values v, gates z of the output, and, for each value head, b (how much of a
/// correction is made) and a (how fast the state decays).
#[derive(Debug, Clone, Copy)]
pub enum DeltaProjections {
    /// One projection each for q, k and v (all queries, then keys, then values), z, b and a.
    Separate {
        /// To queries, keys and values.
        qkv: &'static str,
        /// To gates.
        z: &'static str,
        /// To b.
        b: &'static str,
        /// To a.
        a: &'static str,
    },
    /// Two projections ordered by key head: its query, its key, values and gates of the value heads that share it; and
    /// b and a of these heads. Those of the next key head follow.
    Interleaved {
        /// To queries, keys, values and gates.
        qkvz: &'static str,
        /// To b and a.
        ba: &'static str,
    },
}

impl DeltaProjections {
    /// The names of Qwen 3.5.
    pub const SEPARATE: Self =
        DeltaProjections::Separate { qkv: "in_proj_qkv", z: "in_proj_z", b: "in_proj_b", a: "in_proj_a" };
    /// The names of Qwen3-Next.
    pub const INTERLEAVED: Self = DeltaProjections::Interleaved { qkvz: "in_proj_qkvz", ba: "in_proj_ba" };
}

/// Upper bound on each size. A bogus one would overflow products of sizes before a missing tensor is found.
const LARGEST: i64 = 1 << 20;

impl DeltaNetConfig {
    pub(super) fn check(&self) -> Result<()> {
        let DeltaNetConfig { key_heads, value_heads, key_dim, value_dim, kernel, .. } = *self;
        let sizes = [
            ("linear key heads", key_heads),
            ("linear value heads", value_heads),
            ("dimensions of a linear key", key_dim),
            ("dimensions of a linear value", value_dim),
            ("positions of the linear layers' convolution", kernel),
        ];
        if let Some((what, found)) = sizes.iter().find(|(_, number)| !(1..=LARGEST).contains(number)) {
            bail!(InputError::new(format!("config.json: the number of {what} is {found}")));
        }
        if value_heads % key_heads != 0 {
            bail!(InputError::new(format!(
                "config.json: {value_heads} linear value heads cannot share {key_heads} key heads evenly"
            )));
        }
        Ok(())
    }

    /// Returns the widths of all keys together, and of all values.
    fn widths(&self) -> (i64, i64) {
        (self.key_heads * self.key_dim, self.value_heads * self.value_dim)
    }
}

/// Input projection: its name and weights.
type Input = (&'static str, Linear);

/// Input projections, in the order of [`DeltaProjections`].
enum Inputs {
    Separate([Input; 4]),
    Interleaved([Input; 2]),
}

/// Results of the input projections.
struct Projected {
    /// Queries, keys and values of all heads, [B, L, C].
    qkv: Tensor,
    /// Gates, [B, L, V, value_dim].
    z: Tensor,
    /// [B, L, V].
    b: Tensor,
    /// [B, L, V].
    a: Tensor,
}

/// Gated DeltaNet with its weights.
pub(super) struct DeltaNet {
    config: DeltaNetConfig,
    inputs: Inputs,
    /// Convolution of each channel of queries, keys and values, [C, 1, kernel].
    conv: Tensor,
    /// Logarithm of the rate of decay, `[V]`.
    a_log: Tensor,
    /// Added to a, `[V]`.
    dt_bias: Tensor,
    norm: Norm,
    out: Linear,
}

impl DeltaNet {
    /// Builds the DeltaNet of a layer at the path `at`, for a residual stream of width `d`; `norm` is the kind of the
    /// model's norms.
    pub fn build(config: &DeltaNetConfig, at: &str, d: i64, norm: NormConfig, builder: &mut Builder) -> Result<Self> {
        let path = format!("{at}.{}", config.path);
        let ((keys, values), heads) = (config.widths(), config.value_heads);
        let mut project = |name: &'static str, output: i64, input: i64| {
            Ok::<_, anyhow::Error>((name, builder.linear(&format!("{path}.{name}"), output, input, false)?))
        };
        let inputs = match config.input {
            DeltaProjections::Separate { qkv, z, b, a } => Inputs::Separate([
                project(qkv, 2 * keys + values, d)?,
                project(z, values, d)?,
                project(b, heads, d)?,
                project(a, heads, d)?,
            ]),
            DeltaProjections::Interleaved { qkvz, ba } => {
                Inputs::Interleaved([project(qkvz, 2 * (keys + values), d)?, project(ba, 2 * heads, d)?])
            }
        };
        let (_, out) = project(config.output, d, values)?;
        let conv = builder.tensor(&format!("{path}.conv1d.weight"), &[2 * keys + values, 1, config.kernel])?;
        let a_log = builder.tensor(&format!("{path}.A_log"), &[heads])?;
        let dt_bias = builder.tensor(&format!("{path}.dt_bias"), &[heads])?;
        // Its weight is a plain factor, even where that of the model's other norms is 1 + weight.
        let norm = NormConfig { kind: NormKind::Rms, ..norm };
        let norm = builder.norm(&format!("{path}.norm"), config.value_dim, norm)?;
        Ok(DeltaNet { config: config.clone(), inputs, conv, a_log, dt_bias, norm, out })
    }

    /// Returns the output for the layer's input x [B, L, d]. Sites: the projections, and `norm`, the gated norm of the
    /// heads' outputs [B, L, V, value_dim].
    pub fn forward(&self, x: &Tensor, context: &Context, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let x = match context.text() {
            Some(text) => x * text.unsqueeze(-1),
            None => x.shallow_clone(),
        };
        let Projected { qkv, z, b, a } = self.project(&x, hooks)?;
        let output = match hooks.records() {
            true => z.to_kind(Kind::Float),
            false => self.recur(&qkv, &b, &a),
        };
        let output = hooks.module("norm", &output, |_, output| {
            let normed = self.norm.forward(output, Kind::Float);
            Ok(Activation::Silu.gated(&z.to_kind(Kind::Float), &normed))
        })?;
        hooks.linear(self.config.output, &output.flatten(2, 3), &self.out)
    }

    fn project(&self, x: &Tensor, hooks: &mut Hooks) -> Result<Projected, Stop> {
        let DeltaNetConfig { key_heads, value_heads, key_dim, value_dim, .. } = self.config;
        let mut through = |(name, linear): &Input| hooks.linear(name, x, linear);
        let by_value_head = |z: Tensor| z.unflatten(-1, [value_heads, value_dim]);
        match &self.inputs {
            Inputs::Separate([qkv, z, b, a]) => {
                Ok(Projected { qkv: through(qkv)?, z: by_value_head(through(z)?), b: through(b)?, a: through(a)? })
            }
            Inputs::Interleaved([qkvz, ba]) => {
                let group = value_heads / key_heads;
                let parts = |x: Tensor, widths: &[i64]| -> Vec<Tensor> {
                    let parts = x.unflatten(-1, [key_heads, -1]).split_with_sizes(widths, -1);
                    parts.iter().map(|part| part.flatten(2, 3)).collect()
                };
                let qkvz = parts(through(qkvz)?, &[key_dim, key_dim, group * value_dim, group * value_dim]);
                let ba = parts(through(ba)?, &[group, group]);
                Ok(Projected {
                    qkv: Tensor::cat(&qkvz[..3], -1),
                    z: by_value_head(qkvz[3].shallow_clone()),
                    b: ba[0].shallow_clone(),
                    a: ba[1].shallow_clone(),
                })
            }
        }
    }

    /// Returns the outputs of the heads, [B, L, V, value_dim], float32.
    fn recur(&self, qkv: &Tensor, b: &Tensor, a: &Tensor) -> Tensor {
        let DeltaNetConfig { key_heads, value_heads, key_dim, value_dim, act, .. } = self.config;
        let (keys, values) = self.config.widths();
        let beta = b.to_kind(Kind::Float).sigmoid();
        let log_decay = (a.to_kind(Kind::Float) + &self.dt_bias).softplus() * -self.a_log.exp();
        let on_cpu = kernels::fit([qkv, b, a, &self.conv]);
        let qkv = match on_cpu && act == Activation::Silu {
            true => kernels::convolve_silu(qkv, &self.conv),
            false => {
                let (length, padding, channels) = (qkv.size()[1], self.config.kernel - 1, 2 * keys + values);
                let x = qkv.to_kind(Kind::Float).transpose(1, 2);
                let x = x.conv1d(&self.conv, None::<&Tensor>, 1, padding, 1, channels).narrow(2, 0, length);
                act.forward(&x.transpose(1, 2)).contiguous()
            }
        };
        let part =
            |start: i64, heads: i64, width: i64| qkv.narrow(-1, start, heads * width).unflatten(-1, [heads, width]);
        let heads = Heads {
            q: part(0, key_heads, key_dim),
            k: part(keys, key_heads, key_dim),
            v: part(2 * keys, value_heads, value_dim),
            beta,
            log_decay,
        };
        if on_cpu { heads.step_by_step() } else { heads.by_chunk() }
    }
}

/// Inputs of the gated delta rule. Every value head has a state S [key_dim, value_dim], at first 0. At each position,
/// with q / (|q| √key_dim) and k / |k|:
///
/// S ← exp(log_decay) S, S ← S + k (β (v − Sᵀ k))ᵀ, output Sᵀ q (equation 10 of the paper).
struct Heads {
    /// Queries, [B, L, H, key_dim].
    q: Tensor,
    /// Keys, [B, L, H, key_dim].
    k: Tensor,
    /// Values, [B, L, V, value_dim].
    v: Tensor,
    /// Part of a correction that is made, [B, L, V].
    beta: Tensor,
    /// Logarithm of the factor on the state, [B, L, V].
    log_decay: Tensor,
}

/// Added to the squared lengths of queries and keys.
const EPS: f64 = 1e-6;

/// Number of positions of a chunk.
const CHUNK: i64 = 64;

impl Heads {
    /// Returns the outputs [B, L, V, value_dim], computed on a CPU as defined: a core's cache holds the state, and the
    /// chunks of [`Heads::by_chunk`] would save no operations.
    fn step_by_step(&self) -> Tensor {
        kernels::delta_rule([&self.q, &self.k, &self.v], &self.log_decay.exp(), &self.beta, EPS)
    }

    /// Returns the same, computed by products over chunks (section 3.3 of the paper): in a chunk, the corrections u
    /// solve a triangular system, and the state changes from chunk to chunk.
    fn by_chunk(&self) -> Tensor {
        let (size, keys) = (self.v.size(), self.k.size());
        let ([rows, length, heads, width], [key_heads, key_dim]) =
            ([size[0], size[1], size[2], size[3]], [keys[2], keys[3]]);
        let group = heads / key_heads;
        let unit = |x: &Tensor| {
            let squared = x.square().sum_dim_intlist(-1, true, Kind::Float);
            let x = x * (squared + EPS).rsqrt();
            // [B, L, H, D] to [B, V, L, D].
            x.repeat_interleave_self_int(group, 2, heads).transpose(1, 2)
        };
        let (q, k, v) = (unit(&self.q) * (key_dim as f64).powf(-0.5), unit(&self.k), self.v.transpose(1, 2));
        let (beta, log_decay) = (self.beta.transpose(1, 2).unsqueeze(-1), self.log_decay.transpose(1, 2));
        let mut state = Tensor::zeros([rows, heads, key_dim, width], (Kind::Float, v.device()));
        let mut outputs = Vec::new();
        for start in (0..length).step_by(CHUNK as usize) {
            let of_chunk = |x: &Tensor| x.narrow(2, start, CHUNK.min(length - start));
            let [q, k, v, beta, log_decay] = [&q, &k, &v, &beta, &log_decay].map(of_chunk);
            // Decay since the chunk's start, and between two positions of the chunk.
            let since_start = log_decay.cumsum(-1, Kind::Float);
            let between = since_start.unsqueeze(-1) - since_start.unsqueeze(-2);
            let later = between.ones_like().to_kind(Kind::Bool).triu(1);
            let between = between.masked_fill(&later, f64::NEG_INFINITY).exp();
            let decay = since_start.unsqueeze(-1).exp();

            let system = k.matmul(&k.transpose(-1, -2)) * &between * &beta;
            let wanted = &beta * (v - &decay * k.matmul(&state));
            // The diagonal counts as 1.
            let u = Tensor::linalg_solve_triangular(&system, &wanted, false, true, true);
            let inside = (q.matmul(&k.transpose(-1, -2)) * &between).matmul(&u);
            outputs.push(&decay * q.matmul(&state) + inside);

            let last = since_start.narrow(-1, -1, 1);
            let to_end = (&last - &since_start).exp().unsqueeze(-1);
            state = state * last.unsqueeze(-1).exp() + k.transpose(-1, -2).matmul(&(u * to_end));
        }
        Tensor::cat(&outputs, 2).transpose(1, 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn random(size: [i64; 3], [key_heads, heads, key_dim, width]: [i64; 4], pads: [i64; 2]) -> Heads {
        let [rows, length, _] = size;
        let float = (Kind::Float, Device::Cpu);
        let normal = |heads: i64, width: i64| {
            let x = Tensor::randn([rows, length, heads, width], float);
            let text = Tensor::arange(length, float);
            let text = text.ge(pads[0] as f64).logical_and(&text.lt((length - pads[1]) as f64));
            x * text.view([1, length, 1, 1])
        };
        let rates = Tensor::rand([heads], float) * 4.0;
        Heads {
            q: normal(key_heads, key_dim),
            k: normal(key_heads, key_dim),
            v: normal(heads, width),
            beta: Tensor::randn([rows, length, heads], float).sigmoid(),
            log_decay: Tensor::randn([rows, length, heads], float).softplus() * -rates,
        }
    }

    /// The definition, in float64, without regard to speed.
    fn defined(heads: &Heads) -> Tensor {
        let double = |x: &Tensor| x.to_kind(Kind::Double);
        let (size, key) = (heads.v.size(), heads.k.size());
        let unit = |x: &Tensor| {
            let x = double(x).repeat_interleave_self_int(size[2] / key[2], 2, size[2]);
            &x / (x.square().sum_dim_intlist(-1, true, Kind::Double) + EPS).sqrt()
        };
        let (q, k, v) = (unit(&heads.q) / (key[3] as f64).sqrt(), unit(&heads.k), double(&heads.v));
        let (beta, decay) = (double(&heads.beta).unsqueeze(-1), double(&heads.log_decay).exp());
        let mut state = Tensor::zeros([size[0], size[2], key[3], size[3]], (Kind::Double, Device::Cpu));
        let outputs = (0..size[1]).map(|t| {
            let at = |x: &Tensor| x.select(1, t);
            let read = |state: &Tensor, by: &Tensor| state.transpose(-1, -2).matmul(&by.unsqueeze(-1)).squeeze_dim(-1);
            let decayed = &state * at(&decay).unsqueeze(-1).unsqueeze(-1);
            let correction = at(&beta) * (at(&v) - read(&decayed, &at(&k)));
            state = decayed + at(&k).unsqueeze(-1) * correction.unsqueeze(-2);
            read(&state, &at(&q))
        });
        Tensor::stack(&outputs.collect::<Vec<_>>(), 1)
    }

    #[test]
    fn both_forms_of_the_delta_rule_match_its_definition() {
        tch::manual_seed(1);
        for (length, pads) in [(1, [0, 0]), (7, [0, 0]), (64, [0, 5]), (65, [3, 0]), (150, [70, 0]), (200, [1, 66])] {
            for sizes in [[1, 1, 8, 8], [2, 4, 16, 24], [3, 3, 5, 70], [2, 6, 40, 32]] {
                let heads = random([2, length, 0], sizes, pads);
                let expected = defined(&heads).to_kind(Kind::Float);
                for found in [heads.by_chunk(), heads.step_by_step()] {
                    assert_eq!(found.size(), expected.size());
                    let apart = ((found - &expected).norm() / expected.norm()).double_value(&[]);
                    assert!(apart < 2e-6, "{length} positions, {sizes:?}: {apart}");
                }
            }
        }
    }
}
