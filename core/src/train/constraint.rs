//! Constraints of a training step: the unit-norm decoder and the clipped gradient.

use tch::Tensor;

use crate::sae::Weight;

/// What a trainer holds the decoder and the gradients to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Constraints {
    /// Each feature's direction keeps norm 1: its gradient loses the part along it, and after the step it is scaled
    /// back (Bricken et al. 2023, appendix "Advice for training").
    pub unit_norm_decoder: bool,
    /// The joint norm of all gradients is at most this.
    pub clip_gradients: Option<f64>,
}

/// So small that only a direction of norm 0 is touched by it, which then stays 0 instead of becoming NaN.
pub(crate) const LEAST_NORM: f64 = 1e-30;

fn norms(decoder: &Weight) -> Tensor {
    decoder.tensor.detach().norm_scalaropt_dim(2.0, [decoder.direction_dim()], true).clamp_min(LEAST_NORM)
}

/// Removes from the decoder's gradient the part along each feature's direction, which a unit-norm decoder could not
/// follow anyway and which would only spoil Adam's moments.
pub(crate) fn remove_parallel_gradient(decoder: &Weight, gradient: &Tensor) {
    tch::no_grad(|| {
        let mut gradient = gradient.shallow_clone();
        let unit = decoder.tensor.detach() / norms(decoder);
        let parallel = (&gradient * &unit).sum_dim_intlist([decoder.direction_dim()].as_slice(), true, gradient.kind());
        gradient -= unit * parallel;
    });
}

/// Scales each feature's direction to norm 1, in place.
pub(crate) fn normalize_decoder(decoder: &Weight) {
    tch::no_grad(|| {
        let _ = decoder.tensor.shallow_clone().g_div_(&norms(decoder));
    });
}

/// Scales gradients, whose joint norm is `norm`, so that it is at most `max_norm`, as PyTorch's `clip_grad_norm_` does.
pub(crate) fn clip_gradients(gradients: &mut [Tensor], norm: &Tensor, max_norm: f64) {
    tch::no_grad(|| {
        let factor = ((norm + 1e-6).reciprocal() * max_norm).clamp_max(1.0);
        for gradient in gradients {
            let _ = gradient.g_mul_(&factor);
        }
    });
}
