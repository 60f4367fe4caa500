//! Constraints of a training step: unit-norm decoder and gradient clipping.

use tch::Tensor;

use crate::sae::Weight;

/// Constraints on decoder and gradients.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Constraints {
    /// Keeps every decoder direction at norm 1: removes the parallel component of its gradient, and normalises it after
    /// the step (Bricken et al. 2023, appendix "Advice for training").
    pub unit_norm_decoder: bool,
    /// Maximum joint norm of all gradients; `None` disables clipping.
    pub clip_gradients: Option<f64>,
}

/// Lower bound of norms, small enough to affect only a zero direction, which then stays 0 instead of becoming NaN.
pub(crate) const LEAST_NORM: f64 = 1e-30;

fn norms(decoder: &Weight) -> Tensor {
    decoder.tensor.detach().norm_scalaropt_dim(2.0, [decoder.direction_dim()], true).clamp_min(LEAST_NORM)
}

/// Removes from the decoder's gradient the component parallel to each direction. A unit-norm decoder cannot follow it,
/// and it would distort Adam's moments.
pub(crate) fn remove_parallel_gradient(decoder: &Weight, gradient: &Tensor) {
    tch::no_grad(|| {
        let mut gradient = gradient.shallow_clone();
        let unit = decoder.tensor.detach() / norms(decoder);
        let parallel = (&gradient * &unit).sum_dim_intlist([decoder.direction_dim()].as_slice(), true, gradient.kind());
        gradient -= unit * parallel;
    });
}

/// Normalises each feature's direction in place.
pub(crate) fn normalize_decoder(decoder: &Weight) {
    tch::no_grad(|| {
        let _ = decoder.tensor.shallow_clone().g_div_(&norms(decoder));
    });
}

/// Scales gradients of joint norm `norm` down to at most `max_norm`, as PyTorch's `clip_grad_norm_` does.
pub(crate) fn clip_gradients(gradients: &mut [Tensor], norm: &Tensor, max_norm: f64) {
    tch::no_grad(|| {
        let factor = ((norm + 1e-6).reciprocal() * max_norm).clamp_max(1.0);
        for gradient in gradients {
            let _ = gradient.g_mul_(&factor);
        }
    });
}
