//! Constraints of a training step: the unit-norm decoder and the clipped gradient.

use tch::{Kind, Tensor};

use crate::dictionary::{Decoder, Dictionary};

/// Removes from the decoder's gradient the part along each feature's direction, which a unit-norm decoder could not
/// follow anyway and which would only spoil Adam's moments (Bricken et al. 2023, appendix "Advice for training").
///
/// `eps` is added to the norms that the directions are divided by.
pub fn remove_parallel_gradient(decoder: &Decoder, eps: f64) {
    let grad = decoder.weight.grad();
    if !grad.defined() {
        return;
    }
    tch::no_grad(|| {
        let dim = [decoder.direction_dim()];
        let weight = decoder.weight.detach();
        let unit = &weight / (weight.norm_scalaropt_dim(2.0, dim, true) + eps);
        let parallel = (&grad * &unit).sum_dim_intlist(dim.as_slice(), true, Kind::Float);
        let mut grad = grad;
        grad -= unit * parallel;
    });
}

/// Scales each feature's direction to norm 1, in place. `eps` is added to the norm that it is divided by.
pub fn normalize_decoder(decoder: &Decoder, eps: f64) {
    tch::no_grad(|| {
        let mut weight = decoder.weight.shallow_clone();
        let norms = weight.norm_scalaropt_dim(2.0, [decoder.direction_dim()], true) + eps;
        let _ = weight.g_div_(&norms);
    });
}

/// Scales the gradients of all parameters so that their joint norm is at most `max_norm`, as PyTorch's
/// `clip_grad_norm_` does.
pub fn clip_gradients(dictionary: &dyn Dictionary, max_norm: f64) {
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
