//! Blocks of all families: affine maps, activation functions, the residual sum.

use anyhow::{Result, bail};
use tch::Tensor;

use super::kernels;
use crate::error::InputError;
use crate::machine::device::Precision;

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

    /// Maps x [N, in] into `out` [N, out], a tensor in the products' dtype, without gradients.
    pub(super) fn forward_into(&self, x: &Tensor, out: &Tensor) {
        let kind = self.precision.kind();
        let bias = self.bias.as_ref().map(|bias| bias.to_kind(kind));
        let _ = x.to_kind(kind).linear_out(out, &self.weight.to_kind(kind), bias.as_ref());
    }

    /// Returns the width of its output.
    pub fn width(&self) -> i64 {
        self.weight.size()[0]
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

    /// Returns act(gate) · up.
    pub fn gated(self, gate: &Tensor, up: &Tensor) -> Tensor {
        match self == Activation::Silu && kernels::fit([gate, up]) {
            true => kernels::silu_times(gate, up),
            false => self.forward(gate) * up,
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
