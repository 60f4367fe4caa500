//! The blocks that families are made of: attention, linear maps, norms, activations.

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::hook_point::Tokens;
use super::kernels;
use super::rotary::Rotary;
use crate::error::InputError;
use crate::machine::device::Precision;

/// What the layers of one forward pass share.
#[derive(Debug)]
pub struct Context {
    /// Which key a query may see, [B, 1, L, L] or [L, L], bool, for each window that layers of the model have; `None`
    /// where causality is all.
    masks: Vec<(Option<i64>, Option<Tensor>)>,
    /// Cosines and sines of each rotary embedding of the model, [L, rotated width], float32.
    rotary: Vec<(Tensor, Tensor)>,
}

impl Context {
    /// The context of a batch, for layers of these windows. Positions are counted from the row's first column, padded
    /// or not, as Hugging Face's models do when they are given no positions.
    pub fn new(tokens: &Tokens, windows: &[Option<i64>], rotary: &[Rotary]) -> Self {
        let (_, length) = tokens.size();
        let device = tokens.ids.device();
        let padded = !bool::try_from(tokens.mask.all()).unwrap_or(false);
        let mask = |window: Option<i64>| {
            let window = window.filter(|window| *window < length);
            if !padded && window.is_none() {
                return None;
            }
            let mut visible = Tensor::ones([length, length], (Kind::Bool, device)).tril(0);
            if let Some(window) = window {
                // A query sees itself and the `window - 1` positions before it.
                visible = visible.triu(1 - window);
            }
            if padded {
                visible = tokens.mask.unsqueeze(1).unsqueeze(1).logical_and(&visible);
                // A padded position sees nothing and would divide 0 by 0; let it see itself, nobody reads it.
                visible = visible.logical_or(&Tensor::eye(length, (Kind::Bool, device)));
            }
            Some(visible)
        };
        Context {
            masks: windows.iter().map(|window| (*window, mask(*window))).collect(),
            rotary: rotary.iter().map(|rotary| rotary.tables(length, device)).collect(),
        }
    }

    fn mask(&self, window: Option<i64>) -> Option<&Tensor> {
        self.masks.iter().find(|(known, _)| *known == window).and_then(|(_, mask)| mask.as_ref())
    }
}

/// Scaled dot-product attention over heads, causal.
#[derive(Debug, Clone)]
pub struct Attention {
    /// What scores are multiplied by; usually 1 / √D.
    pub scale: f64,
    /// How many positions a query sees, itself among them; `None` for all before it.
    pub window: Option<i64>,
    /// Which of the model's rotary embeddings turns queries and keys, if one does.
    pub rotary: Option<usize>,
    /// Scores are bounded to ± this by `cap · tanh(score / cap)`, where the family does that (Gemma 2,
    /// <https://arxiv.org/abs/2408.00118>).
    pub soft_cap: Option<f64>,
}

impl Attention {
    /// Every head's output side by side, [B, L, H·D], of queries [B, H, L, D] and keys and values [B, G, L, D], where
    /// H / G neighbouring heads share a key and a value (grouped-query attention, Ainslie et al. 2023,
    /// <https://arxiv.org/abs/2305.13245>).
    pub fn heads(&self, q: &Tensor, k: &Tensor, v: &Tensor, context: &Context) -> Tensor {
        let (q, k) = match self.rotary.map(|index| &context.rotary[index]) {
            Some(tables) => (Rotary::rotate(q, tables), Rotary::rotate(k, tables)),
            None => (q.shallow_clone(), k.shallow_clone()),
        };
        let mask = context.mask(self.window);
        let size = q.size();
        let grouped = size[1] != k.size()[1];
        let z = match self.soft_cap {
            None => {
                let causal = mask.is_none();
                Tensor::scaled_dot_product_attention(&q, &k, v, mask, 0.0, causal, Some(self.scale), grouped)
            }
            Some(cap) => {
                let groups = size[1] / k.size()[1];
                let each = |x: &Tensor| {
                    if grouped { x.repeat_interleave_self_int(groups, 1, size[1]) } else { x.shallow_clone() }
                };
                let scores = q.matmul(&each(&k).transpose(-2, -1)).to_kind(Kind::Float) * (self.scale / cap);
                let scores = scores.tanh() * cap;
                let hidden = match mask {
                    Some(mask) => mask.logical_not(),
                    None => Tensor::ones([size[2], size[2]], (Kind::Bool, q.device())).triu(1),
                };
                let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Float);
                weights.to_kind(v.kind()).matmul(&each(v))
            }
        };
        z.transpose(1, 2).reshape([size[0], size[2], size[1] * size[3]])
    }
}

/// An affine map.
#[derive(Debug)]
pub struct Linear {
    /// [out, in].
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// The type of its product, and of its output.
    pub precision: Precision,
}

impl Linear {
    /// x [.., in] to [.., out].
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let kind = self.precision.kind();
        let bias = self.bias.as_ref().map(|bias| bias.to_kind(kind));
        x.to_kind(kind).linear(&self.weight.to_kind(kind), bias)
    }

    /// Width of its output.
    pub fn width(&self) -> i64 {
        self.weight.size()[0]
    }
}

/// What a norm does to its input before it is scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// Layer norm: mean 0 and variance 1 (Ba et al. 2016, <https://arxiv.org/abs/1607.06450>).
    Layer,
    /// RMS norm: mean square 1 (Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>).
    Rms,
    /// RMS norm that scales by 1 + weight, as Gemma's do.
    RmsPlusOne,
}

/// A norm over the last dimension.
#[derive(Debug)]
pub struct Norm {
    /// What it does.
    pub kind: NormKind,
    /// `[d]`.
    pub weight: Tensor,
    /// `[d]`.
    pub bias: Option<Tensor>,
    /// Added to the variance, or to the mean square.
    pub eps: f64,
}

impl Norm {
    /// x [.., d], normalised in float32, scaled and shifted, in the type `out`.
    pub fn forward(&self, x: &Tensor, out: Kind) -> Tensor {
        let rms = self.kind != NormKind::Layer && matches!(out, Kind::Float | Kind::BFloat16);
        if rms && kernels::fit([x, &self.weight]) {
            let plus_one = (self.kind == NormKind::RmsPlusOne).then(|| &self.weight + 1.0);
            return kernels::rms_norm(x, plus_one.as_ref().unwrap_or(&self.weight), self.eps, out);
        }
        let x = x.to_kind(Kind::Float);
        let normed = match self.kind {
            NormKind::Layer => x.layer_norm(self.weight.size(), Some(&self.weight), self.bias.as_ref(), self.eps, true),
            NormKind::Rms => x.rms_norm(self.weight.size(), Some(&self.weight), self.eps),
            NormKind::RmsPlusOne => x.rms_norm(self.weight.size(), Some(&(&self.weight + 1.0)), self.eps),
        };
        normed.to_kind(out)
    }
}

impl Norm {
    /// x [.., d], normalised in float32, before it is scaled and shifted.
    pub fn normalize(&self, x: &Tensor) -> Tensor {
        let (x, none) = (x.to_kind(Kind::Float), None::<&Tensor>);
        match self.kind {
            NormKind::Layer => x.layer_norm(self.weight.size(), none, none, self.eps, true),
            NormKind::Rms | NormKind::RmsPlusOne => x.rms_norm(self.weight.size(), none, self.eps),
        }
    }

    /// What [`Norm::normalize`] gave, scaled and shifted.
    pub fn scale(&self, normed: &Tensor) -> Tensor {
        let scaled = match self.kind {
            NormKind::RmsPlusOne => normed * (&self.weight + 1.0),
            NormKind::Layer | NormKind::Rms => normed * &self.weight,
        };
        match &self.bias {
            Some(bias) => scaled + bias,
            None => scaled,
        }
    }
}

/// What an MLP does between its projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x Φ(x) (Hendrycks and Gimpel 2016, <https://arxiv.org/abs/1606.08415>).
    Gelu,
    /// The same with Φ by a hyperbolic tangent.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// x σ(x), also called swish.
    Silu,
}

/// The activation that a Hugging Face config names.
pub fn activation(name: &str) -> Result<Activation> {
    Ok(match name {
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "silu" | "swish" => Activation::Silu,
        other => bail!(
            InputError::new(format!("config.json: the activation `{other}` is not supported"))
                .help("supported are gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu and silu")
        ),
    })
}

impl Activation {
    /// Of each number of x.
    pub fn forward(self, x: &Tensor) -> Tensor {
        match self {
            Activation::Gelu => x.gelu("none"),
            Activation::GeluTanh => x.gelu("tanh"),
            Activation::Relu => x.relu(),
            Activation::Silu => x.silu(),
        }
    }
}

/// x + y in float32, which the stream between layers is kept in whatever the products' type.
pub(super) fn residual(x: &Tensor, y: &Tensor) -> Tensor {
    match kernels::fit([x, y]) && x.size() == y.size() {
        true => kernels::add(x, y),
        false => x + y,
    }
}

/// Zeros of a shape that take no memory, for passes that only ask for widths.
pub(super) fn shape_only(shape: &[i64]) -> Tensor {
    Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand(shape, false)
}
