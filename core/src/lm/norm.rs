//! Norms over the width of a tensor.

use tch::{Kind, Tensor};

use super::kernels;

/// Kind and epsilon of a norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormConfig {
    /// Kind.
    pub kind: NormKind,
    /// Epsilon added to the variance or the mean square.
    pub eps: f64,
}

/// Kind of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Layer norm: mean 0 and variance 1 (Ba et al. 2016, <https://arxiv.org/abs/1607.06450>).
    Layer,
    /// Layer norm without a bias.
    LayerNoBias,
    /// Layer norm without weight and bias.
    LayerNoWeight,
    /// RMS norm: mean square 1 (Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>).
    Rms,
    /// RMS norm that scales by 1 + weight, as Gemma's do.
    RmsPlusOne,
    /// RMS norm without a weight.
    RmsNoWeight,
}

impl NormKind {
    fn is_layer(self) -> bool {
        matches!(self, NormKind::Layer | NormKind::LayerNoBias | NormKind::LayerNoWeight)
    }

    /// Returns true if the norm has a weight.
    pub(super) fn has_weight(self) -> bool {
        !matches!(self, NormKind::LayerNoWeight | NormKind::RmsNoWeight)
    }
}

/// A norm over the last dimension.
#[derive(Debug)]
pub struct Norm {
    /// Kind and epsilon.
    pub config: NormConfig,
    /// Scale `[d]`; `None` if the kind has no weight.
    pub weight: Option<Tensor>,
    /// Shift `[d]`; `None` if the kind has no bias.
    pub bias: Option<Tensor>,
}

impl Norm {
    /// Normalises x [.., d] in float32, scales and shifts it, and returns it as dtype `out`.
    pub fn forward(&self, x: &Tensor, out: Kind) -> Tensor {
        let NormConfig { kind, eps } = self.config;
        if let Some(weight) = self.weight.as_ref().filter(|_| !kind.is_layer())
            && matches!(out, Kind::Float | Kind::BFloat16)
            && kernels::fit([x, weight])
        {
            let plus_one = (kind == NormKind::RmsPlusOne).then(|| weight + 1.0);
            return kernels::rms_norm(x, plus_one.as_ref().unwrap_or(weight), eps, out);
        }
        let x = x.to_kind(Kind::Float);
        let width = [*x.size().last().expect("a normalised tensor has a width")];
        let weight = match kind {
            NormKind::RmsPlusOne => self.weight.as_ref().map(|weight| weight + 1.0),
            _ => self.weight.as_ref().map(Tensor::shallow_clone),
        };
        let normed = match kind.is_layer() {
            true => x.layer_norm(width, weight.as_ref(), self.bias.as_ref(), eps, true),
            false => x.rms_norm(width, weight.as_ref(), eps),
        };
        normed.to_kind(out)
    }

    /// Normalises x [.., d] in float32, without scale and shift.
    pub fn normalize(&self, x: &Tensor) -> Tensor {
        let NormConfig { kind, eps } = self.config;
        let (x, none) = (x.to_kind(Kind::Float), None::<&Tensor>);
        let width = [*x.size().last().expect("a normalised tensor has a width")];
        match kind.is_layer() {
            true => x.layer_norm(width, none, none, eps, true),
            false => x.rms_norm(width, none, eps),
        }
    }

    /// Scales and shifts the result of [`Norm::normalize`].
    pub fn scale(&self, normed: &Tensor) -> Tensor {
        let scaled = match (self.config.kind, &self.weight) {
            (NormKind::RmsPlusOne, Some(weight)) => normed * (weight + 1.0),
            (_, Some(weight)) => normed * weight,
            (_, None) => normed.shallow_clone(),
        };
        match &self.bias {
            Some(bias) => scaled + bias,
            None => scaled,
        }
    }
}
