//! The blocks that families are made of.

use anyhow::{bail, Result};
use tch::{Device, Kind, Tensor};

use crate::config::InputError;
use crate::device::Precision;
use crate::model::Tokens;

/// What the layers of one forward pass share.
#[derive(Debug)]
pub struct Context {
    /// Which key a query may see, [B, 1, L, L], bool; `None` where there is no padding and causality is all.
    mask: Option<Tensor>,
    /// Cosines and sines of the rotary embedding, [L, rotated width], where the family has one.
    rotary: Option<(Tensor, Tensor)>,
}

impl Context {
    /// The context of a batch. Positions are counted from the row's first column, padded or not, as Hugging Face's
    /// models do when they are given no positions.
    pub fn new(tokens: &Tokens, rotary: Option<&Rotary>) -> Self {
        let (_, length) = tokens.size();
        let device = tokens.ids.device();
        let all = bool::try_from(tokens.mask.all()).unwrap_or(false);
        let mask = (!all).then(|| {
            let causal = Tensor::ones([length, length], (Kind::Bool, device)).tril(0);
            let visible = tokens.mask.unsqueeze(1).unsqueeze(1).logical_and(&causal);
            // A padded position sees nothing and would divide 0 by 0; let it see itself, nobody reads it.
            visible.logical_or(&Tensor::eye(length, (Kind::Bool, device)))
        });
        Context { mask, rotary: rotary.map(|rotary| rotary.tables(length, device)) }
    }
}

/// Rotary position embedding (Su et al. 2021, <https://arxiv.org/abs/2104.09864>), in the half-split form of GPT-NeoX.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// How many of a head's dimensions are rotated; the rest stay.
    pub width: i64,
    /// Base of the frequencies.
    pub theta: f64,
}

impl Rotary {
    fn tables(&self, length: i64, device: Device) -> (Tensor, Tensor) {
        let float = (Kind::Float, device);
        let powers = Tensor::arange_start_step(0, self.width, 2, float) / self.width as f64;
        let frequencies = (powers * -self.theta.ln()).exp();
        let angles = Tensor::arange(length, float).unsqueeze(1) * frequencies.unsqueeze(0);
        let angles = Tensor::cat(&[&angles, &angles], -1);
        (angles.cos(), angles.sin())
    }

    /// Rotates heads [B, H, L, D].
    fn rotate(&self, x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Tensor {
        let rotated = x.narrow(-1, 0, self.width);
        let half = self.width / 2;
        let turned = Tensor::cat(&[-rotated.narrow(-1, half, half), rotated.narrow(-1, 0, half)], -1);
        let rotated = &rotated * cos + turned * sin;
        let rest = x.size()[3] - self.width;
        if rest == 0 {
            return rotated;
        }
        Tensor::cat(&[rotated, x.narrow(-1, self.width, rest)], -1)
    }
}

/// Scaled dot-product attention over heads, causal.
#[derive(Debug, Clone)]
pub struct Attention {
    /// Rotary embedding, where the family has one.
    pub rotary: Option<Rotary>,
}

impl Attention {
    /// Every head's output side by side, [B, L, H·D], of queries, keys and values [B, H, L, D].
    pub fn heads(&self, q: &Tensor, k: &Tensor, v: &Tensor, context: &Context) -> Tensor {
        let (q, k) = match (&self.rotary, &context.rotary) {
            (Some(rotary), Some(tables)) => (rotary.rotate(q, tables), rotary.rotate(k, tables)),
            _ => (q.shallow_clone(), k.shallow_clone()),
        };
        let causal = context.mask.is_none();
        let z = Tensor::scaled_dot_product_attention(&q, &k, v, context.mask.as_ref(), 0.0, causal, None, false);
        let size = z.size();
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
    /// The type of its product.
    pub precision: Precision,
}

impl Linear {
    /// x [.., in] to [.., out].
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.precision.linear(x, &self.weight, self.bias.as_ref())
    }
}

/// Layer norm.
#[derive(Debug)]
pub struct Norm {
    /// `[d]`.
    pub weight: Tensor,
    /// `[d]`.
    pub bias: Option<Tensor>,
    /// Added to the variance.
    pub eps: f64,
}

impl Norm {
    /// x [.., d] with mean 0 and variance 1, scaled and shifted.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), self.bias.as_ref(), self.eps, true)
    }
}

/// The activation that a Hugging Face config names by `hidden_act`.
pub fn activation(name: &str) -> Result<fn(&Tensor) -> Tensor> {
    Ok(match name {
        "gelu" => |x| x.gelu("none"),
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => |x| x.gelu("tanh"),
        "relu" => |x| x.relu(),
        "silu" | "swish" => |x| x.silu(),
        other => bail!(InputError::new(format!("config.json: the activation `{other}` is not supported"))
            .help("supported are gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu and silu")),
    })
}
