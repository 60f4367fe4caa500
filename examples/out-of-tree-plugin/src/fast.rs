//! The step by hand: no graph is built, nothing is computed twice.
//!
//! For features f = ReLU(π), π = W_e (x − b) + b_e, a reconstruction x̂ = W_d f + b and B activations, with r = x̂ − x:
//!
//! ```text
//! ∂L/∂x̂  = 2 r / B
//! ∂L/∂W_d = (∂L/∂x̂)ᵀ f
//! ∂L/∂π   = (∂L/∂x̂ W_d + λ (1 − tanh²(f / s)) / (s B)) ⊙ 1[f > 0]
//! ∂L/∂W_e = (∂L/∂π)ᵀ (x − b)      ∂L/∂b_e = Σ ∂L/∂π      ∂L/∂b = Σ ∂L/∂x̂ − (Σ ∂L/∂π) W_e
//! ```

use dictlearn_core::prelude::*;

use crate::TanhConfig;

/// The step on the reference's `AutoEncoder`; any other dictionary is left to autograd.
pub fn by_hand(config: &TanhConfig, pass: &HandPass, terms: &mut Terms) -> Result<Option<ByHand>> {
    if pass.dictionary.class() != "AutoEncoder" {
        return Ok(None);
    }
    let (w_enc, w_dec) = (pass.parameter("encoder.weight")?, pass.parameter("decoder.weight")?); // [F, d], [d, F]
    let (b, b_enc) = (pass.parameter("bias")?, pass.parameter("encoder.bias")?);
    let count = pass.batch.len() as f64;

    let centred = &pass.batch.x - &b;
    let features = centred.linear(&w_enc, Some(&b_enc)).relu();
    let x_hat = features.linear(&w_dec, None::<Tensor>) + &b;
    let residual = &x_hat - &pass.batch.target;
    let saturated = (&features / config.scale).tanh();
    terms.add_reconstruction("mse_loss", mean_of_sums(&residual.square()));
    terms.add_sparsity("sparsity_loss", mean_of_sums(&saturated), config.sparsity_penalty);

    let by_x_hat = residual * (2.0 / count);
    let slope: Tensor = (saturated.square() - 1.0) * (-config.sparsity_penalty / (config.scale * count));
    let by_pre = (by_x_hat.matmul(&w_dec) + slope) * features.gt(0.0);
    let sum = |rows: &Tensor| rows.sum_dim_intlist([0].as_slice(), false, Kind::Float);
    let gradients = vec![
        ("decoder.weight", by_x_hat.tr().matmul(&features)),
        ("encoder.weight", by_pre.tr().matmul(&centred)),
        ("encoder.bias", sum(&by_pre)),
        ("bias", sum(&by_x_hat) - sum(&by_pre).matmul(&w_enc)),
    ];
    let fired = features.gt(0.0).sum_dim_intlist([0].as_slice(), false, Kind::Int64);
    Ok(Some(ByHand { fired: Some(fired), x_hat, gradients }))
}
