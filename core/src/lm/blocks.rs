//! Building blocks of all families: attention, linear maps, norms, activation functions.

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::hook_point::Tokens;
use super::kernels;
use super::rotary::Rotary;
use crate::error::InputError;
use crate::machine::device::Precision;

/// Attention masks and rotary tables that the layers of one forward pass share.
#[derive(Debug)]
pub struct Context {
    /// Mask of visible keys, [B, 1, L, L] or [L, L], bool, for each window of the model's layers; `None` if the mask is
    /// purely causal.
    masks: Vec<(Option<i64>, Option<Tensor>)>,
    /// Cosines and sines of each rotary embedding of the model, [L, rotated width], float32.
    rotary: Vec<(Tensor, Tensor)>,
}

impl Context {
    /// Computes the context of a batch for layers with these windows. Positions count from the row's first column,
    /// padded or not, as in Hugging Face models that get no `position_ids`.
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
                // A padded position sees no key, and softmax would return NaN. Let it see itself: its output is unused.
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
    /// Factor on scores, usually 1 / √D.
    pub scale: f64,
    /// Number of positions that a query sees, including its own; `None` for all up to its own.
    pub window: Option<i64>,
    /// Index of the model's rotary embedding to apply, if any.
    pub rotary: Option<usize>,
    /// Soft cap on scores, `cap · tanh(score / cap)` (Gemma 2, <https://arxiv.org/abs/2408.00118>).
    pub soft_cap: Option<f64>,
}

impl Attention {
    /// Returns the concatenated outputs of all heads, [B, L, H·D], for queries [B, H, L, D] and keys and values
    /// [B, G, L, D]. H / G neighbouring heads share a key and a value (grouped-query attention, Ainslie et al. 2023,
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
    /// Weight [out, in].
    pub weight: Tensor,
    /// Bias `[out]`.
    pub bias: Option<Tensor>,
    /// Precision of its product and output.
    pub precision: Precision,
}

impl Linear {
    /// Maps x [.., in] to [.., out].
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let kind = self.precision.kind();
        let bias = self.bias.as_ref().map(|bias| bias.to_kind(kind));
        x.to_kind(kind).linear(&self.weight.to_kind(kind), bias)
    }

    /// Returns the width of its output.
    pub fn width(&self) -> i64 {
        self.weight.size()[0]
    }
}

/// Kind of a norm.
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
    /// Kind.
    pub kind: NormKind,
    /// Scale `[d]`.
    pub weight: Tensor,
    /// Shift `[d]`.
    pub bias: Option<Tensor>,
    /// Epsilon added to the variance or the mean square.
    pub eps: f64,
}

impl Norm {
    /// Normalises x [.., d] in float32, scales and shifts it, and returns it as dtype `out`.
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
    /// Normalises x [.., d] in float32, without scale and shift.
    pub fn normalize(&self, x: &Tensor) -> Tensor {
        let (x, none) = (x.to_kind(Kind::Float), None::<&Tensor>);
        match self.kind {
            NormKind::Layer => x.layer_norm(self.weight.size(), none, none, self.eps, true),
            NormKind::Rms | NormKind::RmsPlusOne => x.rms_norm(self.weight.size(), none, self.eps),
        }
    }

    /// Scales and shifts the result of [`Norm::normalize`].
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

/// Activation function of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x Φ(x) (Hendrycks and Gimpel 2016, <https://arxiv.org/abs/1606.08415>).
    Gelu,
    /// GELU with the tanh approximation of Φ.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// x σ(x), also called swish.
    Silu,
}

/// Returns the activation function of a Hugging Face name.
pub fn activation(name: &str) -> Result<Activation> {
    Ok(match name {
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "silu" | "swish" => Activation::Silu,
        other => bail!(
            InputError::new(format!("config.json: the activation `{other}` is not supported"))
                .help("supported: gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu, silu")
        ),
    })
}

impl Activation {
    /// Applies the function elementwise.
    pub fn forward(self, x: &Tensor) -> Tensor {
        match self {
            Activation::Gelu => x.gelu("none"),
            Activation::GeluTanh => x.gelu("tanh"),
            Activation::Relu => x.relu(),
            Activation::Silu => x.silu(),
        }
    }
}

/// Returns x + y in float32: the residual stream is float32 whatever the precision of products.
pub(super) fn residual(x: &Tensor, y: &Tensor) -> Tensor {
    match kernels::fit([x, y]) && x.size() == y.size() {
        true => kernels::add(x, y),
        false => x + y,
    }
}

/// Returns zeros of a shape that occupy one element, for passes that only record widths.
pub(super) fn shape_only(shape: &[i64]) -> Tensor {
    Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand(shape, false)
}
