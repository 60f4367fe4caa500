//! Softmax attention: projections, norms of queries and keys, rotary embedding, masks and biases.

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::blocks::Linear;
use super::build::Builder;
use super::context::{Alibi, Context, KeysValues};
use super::model::{Hooks, Stop};
use super::norm::{Norm, NormConfig, NormKind};
use crate::error::InputError;

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
    /// Factor on scores, usually 1 / √D.
    pub scale: f64,
    /// Number of positions that a query sees, including its own; `None` for all up to its own.
    pub window: Option<i64>,
    /// Index into [`DecoderConfig::rotary`](super::DecoderConfig::rotary); `None` without rotary embedding.
    pub rotary: Option<usize>,
    /// Norms of queries and keys, if any.
    pub qk_norm: Option<QkNorm>,
    /// Norm of each head's values, `v_norm`, if any; it has no weight.
    pub v_norm: Option<NormConfig>,
    /// Whether values are the projected keys, before norm and rotation; there is no projection to values then.
    pub values_are_keys: bool,
    /// Bound c on queries, keys and values: they are clamped to ± c.
    pub clip: Option<f64>,
    /// Soft cap c on scores: `c · tanh(score / c)` (Gemma 2, <https://arxiv.org/abs/2408.00118>).
    pub soft_cap: Option<f64>,
    /// Bias on scores by the key's position.
    pub alibi: Option<Alibi>,
    /// Attention sinks `[heads]` by name, if any: a logit per head that takes part in the softmax and has no value (Xiao
    /// et al. 2023, <https://arxiv.org/abs/2309.17453>).
    pub sinks: Option<&'static str>,
    /// Whether the projection to queries also makes a gate for each head: the head's output is multiplied with its
    /// sigmoid (Qiu et al. 2025, <https://arxiv.org/abs/2505.06708>).
    pub gated: bool,
    /// Earlier layer whose keys and values this one uses. It has no projections to its own then.
    pub keys_of: Option<usize>,
}

impl AttentionConfig {
    /// Returns multi-head attention without biases, norms and rotary embedding, scaled by 1 / √D.
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
            scale: (head_dim as f64).powf(-0.5),
            window: None,
            rotary: None,
            qk_norm: None,
            v_norm: None,
            values_are_keys: false,
            clip: None,
            soft_cap: None,
            alibi: None,
            sinks: None,
            gated: false,
            keys_of: None,
        }
    }

    /// Returns the same attention, with or without biases in all four projections.
    pub fn with_bias(mut self, bias: bool) -> Self {
        self.bias(bias);
        self
    }

    /// Sets whether all four projections have biases.
    pub fn bias(&mut self, bias: bool) {
        self.input_bias = bias;
        self.output_bias = bias;
    }

    pub(super) fn check(&self) -> Result<()> {
        let AttentionConfig { heads, kv_heads, head_dim, .. } = *self;
        let sizes = [("heads", heads), ("key/value heads", kv_heads), ("dimensions of a head", head_dim)];
        if let Some((what, found)) = sizes.iter().find(|(_, number)| *number < 1) {
            bail!(InputError::new(format!("config.json: the number of {what} is {found}")));
        }
        if heads % kv_heads != 0 {
            bail!(InputError::new(format!(
                "config.json: {heads} heads cannot share {kv_heads} key/value heads evenly"
            )));
        }
        if let Some(window) = self.window.filter(|window| *window < 1) {
            bail!(InputError::new(format!("config.json: `sliding_window` is {window}; a query sees at least itself")));
        }
        if !self.scale.is_finite() {
            bail!(InputError::new(format!(
                "config.json: the factor on attention scores is {}, not finite",
                self.scale
            )));
        }
        if let Some(cap) = self.soft_cap.filter(|cap| cap.is_nan() || *cap <= 0.0) {
            bail!(InputError::new(format!("config.json: `attn_logit_softcapping` is {cap}, not positive")));
        }
        let split = matches!(self.input, Projections::Separate { .. });
        let of_split = [
            ("norms of queries and keys", self.qk_norm.is_some()),
            ("a norm of values", self.v_norm.is_some()),
            ("keys as values", self.values_are_keys),
            ("clipping", self.clip.is_some()),
            ("gates", self.gated),
            ("another layer's keys", self.keys_of.is_some()),
        ];
        if let Some((what, _)) = of_split.iter().find(|(_, set)| *set && !split) {
            bail!("attention with {what} needs separate projections of queries, keys and values");
        }
        Ok(())
    }

    /// Returns the paths of modules that a layer with its own keys and values has, and that of one that uses those of
    /// another layer does not; files may have them all the same.
    pub(super) fn unused(&self) -> Vec<String> {
        let (Some(_), Projections::Separate { k, v, .. }) = (self.keys_of, self.input) else { return Vec::new() };
        let norm = self.qk_norm.map(|norm| norm.k);
        [Some(k), Some(v), norm].into_iter().flatten().map(|name| format!("{}.{name}", self.path)).collect()
    }

    /// Returns the widths of all queries together, and of all keys.
    fn widths(&self) -> (i64, i64) {
        (self.heads * self.head_dim, self.kv_heads * self.head_dim)
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
    /// One projection, ordered by key/value head: the queries that share the first one, its key, its value; then those
    /// of the next.
    Interleaved(&'static str),
}

impl Projections {
    /// The names of most families: `q_proj`, `k_proj` and `v_proj`.
    pub const SEPARATE: Self = Projections::Separate { q: "q_proj", k: "k_proj", v: "v_proj" };
}

/// Norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QkNorm {
    /// What one norm covers.
    pub over: NormedOver,
    /// Path of the norm of queries in attention.
    pub q: &'static str,
    /// Path of the norm of keys.
    pub k: &'static str,
    /// Kind, if it is not that of the model's other norms.
    pub norm: Option<NormConfig>,
}

impl QkNorm {
    /// Returns norms of the model's kind, named `q_norm` and `k_norm`.
    pub fn new(over: NormedOver) -> Self {
        QkNorm { over, q: "q_norm", k: "k_norm", norm: None }
    }
}

/// What a norm of queries or keys covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormedOver {
    /// Each head, with weights that all heads share.
    Head,
    /// Each head, with weights of its own: `norms.N.weight` for head N.
    EachHead,
    /// All heads together.
    All,
}

/// Name of the norm of values.
const V_NORM: &str = "v_norm";

/// Attention with its weights.
pub(super) struct Attention {
    config: AttentionConfig,
    layer: usize,
    q: Linear,
    k: Option<Linear>,
    v: Option<Linear>,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    v_norm: Option<Norm>,
    sinks: Option<Tensor>,
    out: Linear,
}

impl Attention {
    /// Builds the attention of a layer at the path `at`, for a residual stream of width `d`.
    pub fn build(
        config: &AttentionConfig,
        (layer, at): (usize, &str),
        d: i64,
        norm: NormConfig,
        builder: &mut Builder,
    ) -> Result<Self> {
        let path = format!("{at}.{}", config.path);
        let (wide, narrow) = config.widths();
        let gates = if config.gated { wide } else { 0 };
        let mut project = |name: &str, output: i64, input: i64, bias: bool| {
            let path = format!("{path}.{name}");
            match config.transposed {
                true => builder.transposed(&path, output, input, bias),
                false => builder.linear(&path, output, input, bias),
            }
        };
        let bias = config.input_bias;
        let own = config.keys_of.is_none();
        let (q, k, v) = match config.input {
            Projections::Separate { q, k, v } => (
                project(q, wide + gates, d, bias)?,
                own.then(|| project(k, narrow, d, bias)).transpose()?,
                (own && !config.values_are_keys).then(|| project(v, narrow, d, bias)).transpose()?,
            ),
            Projections::Joined(name) | Projections::Interleaved(name) => {
                (project(name, wide + 2 * narrow, d, bias)?, None, None)
            }
        };
        let out = project(config.output, d, wide, config.output_bias)?;
        let mut qk_norm = |name: fn(QkNorm) -> &'static str, heads: i64| {
            let Some(own) = config.qk_norm else { return Ok(None) };
            let (path, spec) = (format!("{path}.{}", name(own)), own.norm.unwrap_or(norm));
            Ok::<_, anyhow::Error>(Some(match own.over {
                NormedOver::Head => builder.norm(&path, config.head_dim, spec)?,
                NormedOver::All => builder.norm(&path, heads * config.head_dim, spec)?,
                NormedOver::EachHead => {
                    let mut weight =
                        |head: i64| builder.tensor(&format!("{path}.norms.{head}.weight"), &[config.head_dim]);
                    let weights = (0..heads).map(&mut weight).collect::<Result<Vec<_>>>()?;
                    Norm { config: spec, weight: Some(Tensor::stack(&weights, 0)), bias: None }
                }
            }))
        };
        let q_norm = qk_norm(|norm| norm.q, config.heads)?;
        let k_norm = if own { qk_norm(|norm| norm.k, config.kv_heads)? } else { None };
        let v_norm = config.v_norm.filter(|_| own);
        let v_norm = v_norm
            .map(|norm| builder.norm(V_NORM, config.head_dim, NormConfig { kind: NormKind::RmsNoWeight, ..norm }))
            .transpose()?;
        let sinks = config.sinks.map(|name| builder.tensor(&format!("{path}.{name}"), &[config.heads])).transpose()?;
        Ok(Attention { config: config.clone(), layer, q, k, v, q_norm, k_norm, v_norm, sinks, out })
    }

    /// Returns the output for the layer's input x [B, L, d].
    pub fn forward(
        &self,
        x: &Tensor,
        context: &Context,
        kept: &mut KeysValues,
        hooks: &mut Hooks,
    ) -> Result<Tensor, Stop> {
        let config = &self.config;
        let (q, gate, own) = self.project(x, hooks)?;
        let turned = |x: Tensor| match config.rotary {
            Some(index) => {
                let (rotary, tables) = context.rotary(index);
                rotary.rotate(&x, tables)
            }
            None => x,
        };
        let q = turned(q);
        let (k, v) = match (own, config.keys_of) {
            (Some((k, v)), _) => (turned(k), v),
            (None, layer) => kept.of(layer.expect("attention without keys uses those of a layer")),
        };
        if config.keys_of.is_none() && context.is_kept(self.layer) {
            kept.keep(self.layer, &k, &v);
        }
        let mut z = self.attend(&q, &k, &v, context);
        if let Some(gate) = gate {
            z *= gate.sigmoid();
        }
        hooks.linear(config.output, &z, &self.out)
    }

    /// Returns queries [B, H, L, D], the gate [B, L, H·D] if there is one, and own keys and values [B, G, L, D].
    #[allow(clippy::type_complexity)]
    fn project(
        &self,
        x: &Tensor,
        hooks: &mut Hooks,
    ) -> Result<(Tensor, Option<Tensor>, Option<(Tensor, Tensor)>), Stop> {
        let config = &self.config;
        let size = x.size();
        let (rows, length, head) = (size[0], size[1], config.head_dim);
        // [B, L, n·D] to [B, L, n, D].
        let heads = |x: &Tensor| x.reshape([rows, length, -1, head]);
        let swap = |x: &Tensor| x.transpose(1, 2);
        let (q, k, v) = match config.input {
            Projections::Separate { q, k, v } => {
                let mut q = hooks.linear(q, x, &self.q)?;
                let mut gate = None;
                if config.gated {
                    let both = q.view([rows, length, -1, 2 * head]).chunk(2, -1);
                    gate = Some(both[1].reshape([rows, length, -1]));
                    q = both[0].reshape([rows, length, -1]);
                }
                let q = self.normed(&q, true, hooks)?;
                let Some(to_k) = &self.k else { return Ok((swap(&heads(&self.clipped(q))), gate, None)) };
                let keys = hooks.linear(k, x, to_k)?;
                let values = match &self.v {
                    Some(to_v) => hooks.linear(v, x, to_v)?,
                    None => keys.shallow_clone(),
                };
                let keys = self.normed(&keys, false, hooks)?;
                let [q, k, v] = [q, keys, values].map(|x| heads(&self.clipped(x)));
                let v = match &self.v_norm {
                    Some(norm) => hooks.norm(V_NORM, &v, norm, v.kind())?,
                    None => v,
                };
                let [q, k, v] = [q, k, v].map(|x| swap(&x));
                return Ok((q, gate, Some((k, v))));
            }
            Projections::Interleaved(name) => {
                let joined = hooks.linear(name, x, &self.q)?;
                let group = config.heads / config.kv_heads;
                let by_group = joined.view([rows, length, config.kv_heads, group + 2, head]);
                let part = |start: i64, count: i64| by_group.narrow(3, start, count).flatten(2, 3);
                (part(0, group), part(group, 1), part(group + 1, 1))
            }
            Projections::Joined(name) => {
                let joined = hooks.linear(name, x, &self.q)?;
                let (wide, narrow) = config.widths();
                let part = |start: i64, width: i64| heads(&joined.narrow(-1, start, width));
                (part(0, wide), part(wide, narrow), part(wide + narrow, narrow))
            }
        };
        Ok((swap(&q), None, Some((swap(&k), swap(&v)))))
    }

    fn clipped(&self, x: Tensor) -> Tensor {
        match self.config.clip {
            Some(bound) => x.clamp(-bound, bound),
            None => x,
        }
    }

    /// Applies the norm of queries or keys to [B, L, n·D].
    fn normed(&self, x: &Tensor, queries: bool, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let norm = if queries { &self.q_norm } else { &self.k_norm };
        let (Some(names), Some(norm)) = (self.config.qk_norm, norm) else { return Ok(x.shallow_clone()) };
        let name = if queries { names.q } else { names.k };
        let size = x.size();
        match names.over {
            NormedOver::All => hooks.module(name, x, |_, x| Ok(norm.forward(x, x.kind()))),
            NormedOver::Head | NormedOver::EachHead => {
                let heads = x.reshape([size[0], size[1], -1, self.config.head_dim]);
                let normed = hooks.module(name, &heads, |_, x| {
                    Ok(match names.over {
                        NormedOver::EachHead => norm.scale(&norm.normalize(x)).to_kind(x.kind()),
                        _ => norm.forward(x, x.kind()),
                    })
                })?;
                Ok(normed.flatten(2, 3))
            }
        }
    }

    /// Returns the concatenated outputs of all heads, [B, L, H·D], for queries [B, H, L, D] and keys and values
    /// [B, G, L, D]. H / G neighbouring heads share a key and a value (grouped-query attention, Ainslie et al. 2023,
    /// <https://arxiv.org/abs/2305.13245>).
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, context: &Context) -> Tensor {
        let config = &self.config;
        let mask = context.mask(config.window);
        let (size, scale) = (q.size(), config.scale);
        let grouped = config.heads != config.kv_heads;
        let alibi = context.alibi().filter(|_| config.alibi.is_some());
        let z = if config.soft_cap.is_none() && self.sinks.is_none() && alibi.is_none() {
            Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, mask.is_none(), Some(scale), grouped)
        } else {
            let group = config.heads / config.kv_heads;
            let each = |x: &Tensor| match grouped {
                true => x.repeat_interleave_self_int(group, 1, config.heads),
                false => x.shallow_clone(),
            };
            let mut scores = q.matmul(&each(k).transpose(-2, -1)).to_kind(Kind::Float) * scale;
            if let Some(biases) = alibi {
                scores += biases;
            }
            if let Some(cap) = config.soft_cap {
                scores = (scores / cap).tanh() * cap;
            }
            let hidden = match mask {
                Some(mask) => mask.logical_not(),
                None => Tensor::ones([size[2], size[2]], (Kind::Bool, q.device())).triu(1),
            };
            let mut scores = scores.masked_fill(&hidden, f64::NEG_INFINITY);
            if let Some(sinks) = &self.sinks {
                let sinks = sinks.view([1, -1, 1, 1]).expand([size[0], size[1], size[2], 1], false);
                scores = Tensor::cat(&[&scores, &sinks], -1);
            }
            let weights = scores.softmax(-1, Kind::Float).narrow(-1, 0, size[2]);
            weights.to_kind(v.kind()).matmul(&each(v))
        };
        z.transpose(1, 2).reshape([size[0], size[2], config.heads * config.head_dim])
    }
}
