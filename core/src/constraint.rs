//! Constraints of a training step: the unit-norm decoder and the clipped gradient.

use tch::Tensor;

use crate::dictionary::{Decoder, Dictionary};

/// What a trainer holds the decoder and the gradients to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Constraints {
    /// Each feature's direction keeps norm 1: its gradient loses the part along it, and after the step it is scaled
    /// back (Bricken et al. 2023, appendix "Advice for training").
    pub unit_norm_decoder: bool,
    /// The joint norm of all gradients is at most this.
    pub clip_gradients: Option<f64>,
}

impl Constraints {
    /// Between the backward pass and the optimiser's step.
    pub(crate) fn on_gradients(&self, dictionary: &dyn Dictionary) {
        if let Some(decoder) = dictionary.decoder().filter(|_| self.unit_norm_decoder) {
            remove_parallel_gradient(&decoder);
        }
        if let Some(max_norm) = self.clip_gradients {
            clip_gradients(dictionary, max_norm);
        }
    }

    /// After the optimiser's step.
    pub(crate) fn on_weights(&self, dictionary: &dyn Dictionary) {
        if let Some(decoder) = dictionary.decoder().filter(|_| self.unit_norm_decoder) {
            normalize_decoder(&decoder);
        }
    }
}

/// So small that only a direction of norm 0 is touched by it, which then stays 0 instead of becoming NaN.
pub(crate) const LEAST_NORM: f64 = 1e-30;

fn norms(decoder: &Decoder) -> Tensor {
    decoder.weight.detach().norm_scalaropt_dim(2.0, [decoder.direction_dim()], true).clamp_min(LEAST_NORM)
}

/// Removes from the decoder's gradient the part along each feature's direction, which a unit-norm decoder could not
/// follow anyway and which would only spoil Adam's moments.
fn remove_parallel_gradient(decoder: &Decoder) {
    let mut grad = decoder.weight.grad();
    if !grad.defined() {
        return;
    }
    tch::no_grad(|| {
        let unit = decoder.weight.detach() / norms(decoder);
        let parallel = (&grad * &unit).sum_dim_intlist([decoder.direction_dim()].as_slice(), true, grad.kind());
        grad -= unit * parallel;
    });
}

/// Scales each feature's direction to norm 1, in place.
fn normalize_decoder(decoder: &Decoder) {
    tch::no_grad(|| {
        let _ = decoder.weight.shallow_clone().g_div_(&norms(decoder));
    });
}

/// Scales the gradients of all parameters so that their joint norm is at most `max_norm`, as PyTorch's
/// `clip_grad_norm_` does.
fn clip_gradients(dictionary: &dyn Dictionary, max_norm: f64) {
    tch::no_grad(|| {
        let mut grads: Vec<Tensor> = dictionary
            .parameters()
            .into_iter()
            .map(|(_, parameter)| parameter.grad())
            .filter(Tensor::defined)
            .collect();
        let norms: Vec<Tensor> = grads.iter().map(Tensor::norm).collect();
        if norms.is_empty() {
            return;
        }
        let factor = (Tensor::stack(&norms, 0).norm() + 1e-6).reciprocal() * max_norm;
        let factor = factor.clamp_max(1.0);
        for grad in &mut grads {
            let _ = grad.g_mul_(&factor);
        }
    });
}
