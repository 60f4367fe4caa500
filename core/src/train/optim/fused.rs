//! The optimiser's step on a CPU, in two passes. The first finds the gradients' norm and whether it is finite. The
//! second fuses projection of the decoder's gradient, clipping, Adam and the decoder's normalisation.

use multiversion::multiversion;
use tch::{Kind, Tensor};

use super::{AdamConfig, GradientNorm, Moments};
use crate::machine::device::on_host;
use crate::machine::parallel::{Output, numbers, share_in};
use crate::sae::Weight;
use crate::train::constraint::{Constraints, LEAST_NORM};
use crate::train::gradients::Gradients;

/// Values of one parameter, as rows.
struct Rows<'a> {
    parameter: Tensor,
    gradient: Tensor,
    moments: &'a mut Moments,
    transposed: bool,
    width: usize,
    /// Whether each row is a feature's direction, which keeps norm 1.
    directions: bool,
}

/// Coefficients of the update of one value.
#[derive(Clone, Copy)]
struct Update {
    /// Factor of the gradient.
    scale: f32,
    /// 1 − β₁ and β₁.
    mean: (f32, f32),
    /// 1 − β₂ and β₂.
    square: (f32, f32),
    /// lr / (1 − β₁ᵗ)
    step: f32,
    /// 1 / √(1 − β₂ᵗ)
    correction: f32,
    eps: f32,
}

/// Takes the step if the gradients are finite. Returns `None` if the memory layouts do not allow it.
pub(super) fn step(
    config: AdamConfig,
    steps: u64,
    moments: &mut [Moments],
    gradients: &Gradients,
    lr: f64,
    constraints: &Constraints,
    decoder: Option<&Weight>,
) -> Option<GradientNorm> {
    let decoder = decoder.filter(|_| constraints.unit_norm_decoder);
    let gradients = gradients.iter().map(|(_, gradient)| gradient);
    let all = moments.iter_mut().zip(gradients).map(|(moments, gradient)| rows(moments, gradient, decoder));
    let mut all = all.collect::<Option<Vec<_>>>()?;
    if decoder.is_some() && !all.iter().any(|rows| rows.directions) {
        return None;
    }
    let clips = constraints.clip_gradients;
    let mut squared = 0.0;
    for rows in &all {
        let own = squared_norm(rows, clips.is_some());
        if !own.is_finite() {
            return Some(GradientNorm::NotFinite { name: rows.moments.name.clone(), norm: own.sqrt() });
        }
        squared += own;
    }
    // As in PyTorch's `clip_grad_norm_`.
    let scale = clips.map_or(1.0, |max_norm| (max_norm / (squared.sqrt() + 1e-6)).min(1.0));
    let (beta1, beta2) = config.betas;
    let steps = steps as f64;
    let update = Update {
        scale: scale as f32,
        mean: ((1.0 - beta1) as f32, beta1 as f32),
        square: ((1.0 - beta2) as f32, beta2 as f32),
        step: (lr / (1.0 - beta1.powf(steps))) as f32,
        correction: (1.0 / (1.0 - beta2.powf(steps)).sqrt()) as f32,
        eps: config.eps as f32,
    };
    for rows in &mut all {
        let (count, width, directions) = (rows.parameter.numel().div_ceil(rows.width), rows.width, rows.directions);
        let turn = |tensor: &Tensor| if rows.transposed { tensor.tr() } else { tensor.shallow_clone() };
        let (mut mean, mut square) = (turn(&rows.moments.exp_avg), turn(&rows.moments.exp_avg_sq));
        let gradient = numbers::<f32>(&rows.gradient);
        let parts = [&mut rows.parameter, &mut mean, &mut square].map(Output::<f32>::of);
        share_in(count, (1 << 14) / width, |range| {
            for row in range {
                let part = row * width..((row + 1) * width).min(gradient.len());
                // SAFETY: neither the ranges of rows nor the three tensors overlap.
                let [parameter, mean, square] = parts.each_ref().map(|output| unsafe { output.part(part.clone()) });
                adam(parameter, mean, square, &gradient[part], update, directions);
            }
        });
    }
    Some(GradientNorm::Finite)
}

/// Row width of parameters other than the decoder; the last row may be shorter.
const PIECE: usize = 1 << 10;

fn rows<'a>(moments: &'a mut Moments, gradient: &Tensor, decoder: Option<&Weight>) -> Option<Rows<'a>> {
    let (parameter, gradient) = (moments.parameter.detach(), gradient.shallow_clone());
    let own_decoder = decoder.filter(|decoder| decoder.name == moments.name);
    // Each direction must be contiguous to be processed as a row.
    let transposed = own_decoder.map_or(!parameter.is_contiguous(), |decoder| decoder.feature_dim == 1);
    if transposed && parameter.dim() != 2 {
        return None;
    }
    let turn = |tensor: Tensor| if transposed { tensor.tr() } else { tensor };
    let fits = |tensor: &Tensor| {
        on_host(tensor.device()) && tensor.kind() == Kind::Float && tensor.is_contiguous() && tensor.numel() > 0
    };
    let (parameter, gradient) = (turn(parameter), turn(gradient));
    let others = [moments.exp_avg.shallow_clone(), moments.exp_avg_sq.shallow_clone()].map(turn);
    if ![&parameter, &gradient, &others[0], &others[1]].into_iter().all(fits) {
        return None;
    }
    let width = if own_decoder.is_some() { parameter.size()[1] as usize } else { PIECE };
    Some(Rows { parameter, gradient, moments, transposed, width, directions: own_decoder.is_some() })
}

/// Returns the squared norm of a gradient; with `exact`, without the components along directions that keep norm 1.
fn squared_norm(rows: &Rows, exact: bool) -> f64 {
    let (parameter, gradient) = (numbers::<f32>(&rows.parameter), numbers::<f32>(&rows.gradient));
    let mut squares = vec![0.0_f64; gradient.len().div_ceil(rows.width)];
    let (out, width, across) = (Output::over(&mut squares), rows.width, exact && rows.directions);
    share_in(gradient.len().div_ceil(width), (1 << 14) / width, |range| {
        // SAFETY: ranges of rows do not overlap.
        for (square, row) in unsafe { out.part(range.clone()) }.iter_mut().zip(range) {
            let part = row * width..((row + 1) * width).min(gradient.len());
            if !across {
                *square = f64::from(sum_of_squares(&gradient[part]));
                continue;
            }
            let sums = products(&parameter[part.clone()], &gradient[part]);
            *square = f64::from(sums.gradient);
            // `max` would turn NaN into 0.
            if square.is_finite() && sums.parameter > 0.0 {
                *square = (*square - f64::from(sums.both).powi(2) / f64::from(sums.parameter)).max(0.0);
            }
        }
    });
    squares.iter().sum()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn sum_of_squares(numbers: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let chunks = numbers.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|number| number * number).sum();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, number)| *sum += number * number);
    }
    rest + sums.iter().sum::<f32>()
}

/// θ·θ, g·g and θ·g.
struct Products {
    parameter: f32,
    gradient: f32,
    both: f32,
}

const LANES: usize = 16;

#[inline(always)]
fn products_of(parameter: &[f32], gradient: &[f32]) -> Products {
    let mut sums = [[0.0_f32; LANES]; 3];
    let (parameters, gradients) = (parameter.chunks_exact(LANES), gradient.chunks_exact(LANES));
    let rest = parameters.remainder().iter().zip(gradients.remainder());
    let mut total = Products { parameter: 0.0, gradient: 0.0, both: 0.0 };
    for (p, g) in rest {
        total.parameter += p * p;
        total.gradient += g * g;
        total.both += p * g;
    }
    for (p, g) in parameters.zip(gradients) {
        for lane in 0..LANES {
            sums[0][lane] += p[lane] * p[lane];
            sums[1][lane] += g[lane] * g[lane];
            sums[2][lane] += p[lane] * g[lane];
        }
    }
    total.parameter += sums[0].iter().sum::<f32>();
    total.gradient += sums[1].iter().sum::<f32>();
    total.both += sums[2].iter().sum::<f32>();
    total
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn products(parameter: &[f32], gradient: &[f32]) -> Products {
    products_of(parameter, gradient)
}

/// Applies Adam to a row. For a direction, removes the parallel component of its gradient first, and normalises it
/// after.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn adam(
    parameter: &mut [f32],
    mean: &mut [f32],
    square: &mut [f32],
    gradient: &[f32],
    update: Update,
    direction: bool,
) {
    let mut along = 0.0;
    if direction {
        let sums = products_of(parameter, gradient);
        along = if sums.parameter > 0.0 { sums.both / sums.parameter } else { 0.0 };
    }
    let Update { scale, mean: (new, old), square: (new_square, old_square), step, correction, eps } = update;
    for (((p, m), v), g) in parameter.iter_mut().zip(mean).zip(square).zip(gradient) {
        let g = (g - *p * along) * scale;
        *m = *m * old + g * new;
        *v = *v * old_square + g * g * new_square;
        *p -= step * *m / (v.sqrt() * correction + eps);
    }
    if direction {
        let norm = products_of(parameter, gradient).parameter.sqrt().max(LEAST_NORM as f32);
        parameter.iter_mut().for_each(|p| *p /= norm);
    }
}
