//! Fused CPU kernels for the operations between the products of a layer, each in one pass over memory.
//!
//! libtorch takes several passes for a norm, a rotation or a gate, with a temporary tensor between each two. On a CPU
//! that costs a fifth (float32) to a third (bfloat16) of a model's forward pass. Every function here takes tensors that
//! [`fit`] and computes the same as the plain expression next to its call, in float32, rounded once at the end.
//! libtorch's threads share the rows; their assignment changes no result.

use std::slice;

use multiversion::multiversion;
use tch::{Device, Kind, Tensor};

use crate::machine::parallel::{Bf16, Number, Output, numbers, share, share_in};

/// Returns true if these kernels support all tensors: non-empty, on a CPU, float32 or bfloat16, without gradients.
pub(super) fn fit<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    tensors.into_iter().all(|tensor| {
        tensor.device() == Device::Cpu
            && matches!(tensor.kind(), Kind::Float | Kind::BFloat16)
            && !tensor.requires_grad()
            && tensor.numel() > 0
    })
}

/// Calls a function with the element types of an input and an output.
macro_rules! by_kind {
    ($function:ident, $input:expr, $output:expr, ($($argument:expr),*)) => {
        match ($input, $output) {
            (Kind::Float, Kind::Float) => $function::<f32, f32>($($argument),*),
            (Kind::Float, _) => $function::<f32, Bf16>($($argument),*),
            (_, Kind::Float) => $function::<Bf16, f32>($($argument),*),
            _ => $function::<Bf16, Bf16>($($argument),*),
        }
    };
}

/// Number of partial sums, added in parallel by SIMD.
const LANES: usize = 32;

/// Returns the RMS norm of x [.., d] over its last dimension, scaled by `weight` [d], as dtype `out`.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, out: Kind) -> Tensor {
    let x = x.contiguous();
    let mut normed = Tensor::empty(x.size(), (out, Device::Cpu));
    let weight = weight.to_kind(Kind::Float).contiguous();
    by_kind!(rms_norm_of, x.kind(), out, (&x, numbers(&weight), eps as f32, &mut normed));
    normed
}

fn rms_norm_of<A: Number, B: Number>(x: &Tensor, weight: &[f32], eps: f32, out: &mut Tensor) {
    let (x, width, out) = (numbers::<A>(x), weight.len(), Output::<B>::of(out));
    share(x.len() / width, width, |rows| {
        let part = rows.start * width..rows.end * width;
        // SAFETY: ranges of rows do not overlap.
        rms_norm_rows(&x[part.clone()], weight, eps, unsafe { out.part(part) });
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn rms_norm_rows<A: Number, B: Number>(x: &[A], weight: &[f32], eps: f32, out: &mut [B]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mut sums = [0.0_f32; LANES];
        let (chunks, rest) = x.split_at(x.len() / LANES * LANES);
        for chunk in chunks.chunks_exact(LANES) {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *sum += x.get() * x.get();
            }
        }
        let sum: f32 = sums.iter().sum::<f32>() + rest.iter().map(|x| x.get() * x.get()).sum::<f32>();
        let scale = 1.0 / (sum / weight.len() as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = B::of(x.get() * scale * weight);
        }
    }
}

/// Fills `out` from x and y of the same shape, split among threads.
fn by_element<A: Number, B: Number, C: Number>(
    x: &Tensor,
    y: &Tensor,
    out: &mut Tensor,
    fill: impl Fn(&[A], &[B], &mut [C]) + Sync,
) {
    let (x, y, out) = (numbers::<A>(x), numbers::<B>(y), Output::<C>::of(out));
    share(x.len(), 1, |part| {
        // SAFETY: ranges do not overlap.
        fill(&x[part.clone()], &y[part.clone()], unsafe { out.part(part) });
    });
}

/// Returns SiLU(gate) · up; both have the same shape and dtype.
pub(super) fn silu_times(gate: &Tensor, up: &Tensor) -> Tensor {
    let (gate, up) = (gate.contiguous(), up.contiguous());
    let mut product = up.empty_like();
    by_kind!(silu_times_of, up.kind(), up.kind(), (&gate, &up, &mut product));
    product
}

fn silu_times_of<A: Number, B: Number>(gate: &Tensor, up: &Tensor, out: &mut Tensor) {
    by_element::<A, A, B>(gate, up, out, silu_times_part);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn silu_times_part<A: Number, B: Number>(gate: &[A], up: &[A], out: &mut [B]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        let gate = gate.get();
        *out = B::of(gate / (1.0 + exp(-gate)) * up.get());
    }
}

/// Returns e^x to two units in the last place, without a branch: x = n ln 2 + r and a polynomial for e^r (Cephes
/// `expf`).
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding and subtracting it rounds to an integer.
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4_f32;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 0.166_666_66;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    p * f32::from_bits((((n as i32) + 127) << 23) as u32)
}

/// Returns x + y as float32; both have the same shape.
pub(super) fn add(x: &Tensor, y: &Tensor) -> Tensor {
    let (x, y) = (x.contiguous(), y.contiguous());
    let mut sum = Tensor::empty(x.size(), (Kind::Float, Device::Cpu));
    by_kind!(add_of, x.kind(), y.kind(), (&x, &y, &mut sum));
    sum
}

fn add_of<A: Number, B: Number>(x: &Tensor, y: &Tensor, out: &mut Tensor) {
    by_element::<A, B, f32>(x, y, out, add_part);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn add_part<A: Number, B: Number>(x: &[A], y: &[B], out: &mut [f32]) {
    for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
        *out = x.get() + y.get();
    }
}

/// Returns sums of rows [R, d] as float32 [N, d]: for each n, the rows at `places` [N, k] times `weights` [N, k].
pub(super) fn weighted_sums(rows: &Tensor, places: &Tensor, weights: &Tensor) -> Tensor {
    if !fit([rows, weights]) {
        let chosen = rows.index_select(0, &places.flatten(0, 1)).unflatten(0, places.size());
        return (chosen * weights.unsqueeze(-1)).sum_dim_intlist(1, false, Kind::Float);
    }
    let (rows, weights) = (rows.contiguous(), weights.to_kind(Kind::Float).contiguous());
    let places = Vec::<i64>::try_from(places.flatten(0, 1).to_device(Device::Cpu)).expect("places are integers");
    let mut sums = Tensor::empty([weights.size()[0], rows.size()[1]], (Kind::Float, Device::Cpu));
    match rows.kind() {
        Kind::Float => weighted_sums_of::<f32>(&rows, &places, numbers(&weights), &mut sums),
        _ => weighted_sums_of::<Bf16>(&rows, &places, numbers(&weights), &mut sums),
    }
    sums
}

fn weighted_sums_of<A: Number>(rows: &Tensor, places: &[i64], weights: &[f32], sums: &mut Tensor) {
    let [count, width] = [sums.size()[0], sums.size()[1]].map(|n| n as usize);
    let each = places.len() / count;
    let (rows, sums) = (numbers::<A>(rows), Output::<f32>::of(sums));
    share(count, width * each, |range| {
        for row in range {
            let chosen = row * each..(row + 1) * each;
            // SAFETY: ranges of rows do not overlap.
            let sum = unsafe { sums.part(row * width..(row + 1) * width) };
            weighted_sum(rows, &places[chosen.clone()], &weights[chosen], sum);
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn weighted_sum<A: Number>(rows: &[A], places: &[i64], weights: &[f32], sum: &mut [f32]) {
    sum.fill(0.0);
    for (place, weight) in places.iter().zip(weights) {
        let row = &rows[*place as usize * sum.len()..][..sum.len()];
        for (sum, x) in sum.iter_mut().zip(row) {
            *sum += weight * x.get();
        }
    }
}

/// Rotates heads x [B, H, L, D] by float32 cosines and sines [L, width], whose upper half repeats the lower one.
/// Dimensions beyond `width` pass unchanged. The last dimension of x must be contiguous; the others may have any
/// stride. The result is laid out in memory as [B, L, H, D].
pub(super) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let size = x.size();
    let mut turned = Tensor::empty([size[0], size[2], size[1], size[3]], (x.kind(), Device::Cpu));
    by_kind!(rotate_of, x.kind(), x.kind(), (x, cos, sin, &mut turned));
    turned.transpose(1, 2)
}

fn rotate_of<A: Number, B: Number>(x: &Tensor, cos: &Tensor, sin: &Tensor, out: &mut Tensor) {
    let (size, stride) = (x.size(), x.stride());
    assert!(stride[3] == 1 && cos.size() == [size[2], cos.size()[1]] && cos.size() == sin.size());
    let [heads, length, head] = [size[1], size[2], size[3]].map(|n| n as usize);
    let [of_row, of_head, of_position] = [stride[0], stride[1], stride[2]].map(|n| n as usize);
    let width = cos.size()[1] as usize;
    assert!(width <= head && width.is_multiple_of(2));
    // Elements from the tensor's first to its last.
    let span = (0..4).map(|i| (size[i] - 1) * stride[i]).sum::<i64>() as usize + 1;
    // SAFETY: a tensor's strides reach no further, and it is borrowed.
    let x: &[A] = unsafe { slice::from_raw_parts(x.data_ptr().cast(), span) };
    let (cos, sin, out) = (numbers::<f32>(cos), numbers::<f32>(sin), Output::<B>::of(out));
    share(size[0] as usize * length, heads * head, |rows| {
        for row in rows {
            let (batch, position) = (row / length, row % length);
            let table = position * width..(position + 1) * width;
            // SAFETY: ranges of rows do not overlap.
            let out = unsafe { out.part(row * heads * head..(row + 1) * heads * head) };
            let from = &x[batch * of_row + position * of_position..];
            rotate_heads(from, of_head, &cos[table.clone()], &sin[table], out, head);
        }
    });
}

/// Rotates the heads of one position; each begins `stride` elements after the previous one.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn rotate_heads<A: Number, B: Number>(x: &[A], stride: usize, cos: &[f32], sin: &[f32], out: &mut [B], head: usize) {
    let half = cos.len() / 2;
    let (cos, sin) = (&cos[..half], &sin[..half]);
    for (index, out) in out.chunks_exact_mut(head).enumerate() {
        let x = &x[index * stride..][..head];
        let (turned, rest) = out.split_at_mut(2 * half);
        let (lower, upper) = turned.split_at_mut(half);
        for i in 0..half {
            let (a, b) = (x[i].get(), x[half + i].get());
            lower[i] = B::of(a * cos[i] - b * sin[i]);
            upper[i] = B::of(b * cos[i] + a * sin[i]);
        }
        for (out, x) in rest.iter_mut().zip(&x[2 * half..]) {
            *out = B::of(x.get());
        }
    }
}

/// Convolves each channel of x [B, L, C] with its own weights [C, 1, K] over the current and the K - 1 positions before
/// it, and returns SiLU of the result, float32.
pub(super) fn convolve_silu(x: &Tensor, weight: &Tensor) -> Tensor {
    let x = x.contiguous();
    let mut out = Tensor::empty(x.size(), (Kind::Float, Device::Cpu));
    // [K, C]: one row for each position.
    let weight = weight.squeeze_dim(1).tr().contiguous();
    match x.kind() {
        Kind::Float => convolve_silu_of::<f32>(&x, &weight, &mut out),
        _ => convolve_silu_of::<Bf16>(&x, &weight, &mut out),
    }
    out
}

fn convolve_silu_of<A: Number>(x: &Tensor, weight: &Tensor, out: &mut Tensor) {
    let [length, width] = [x.size()[1], x.size()[2]].map(|n| n as usize);
    let (x, weight, out) = (numbers::<A>(x), numbers::<f32>(weight), Output::<f32>::of(out));
    share(x.len() / width, width, |rows| {
        for row in rows {
            let seen = (weight.len() / width).min(row % length + 1);
            let x = &x[(row + 1 - seen) * width..(row + 1) * width];
            // SAFETY: rows do not overlap.
            let out = unsafe { out.part(row * width..(row + 1) * width) };
            convolve_silu_row(x, &weight[weight.len() - seen * width..], out);
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn convolve_silu_row<A: Number>(x: &[A], weight: &[f32], out: &mut [f32]) {
    let width = out.len();
    out.fill(0.0);
    for (x, weight) in x.chunks_exact(width).zip(weight.chunks_exact(width)) {
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out += x.get() * weight;
        }
    }
    for out in out {
        *out /= 1.0 + exp(-*out);
    }
}

/// Columns of a state that a thread computes at a time: with 128 rows, a core's first cache holds them.
const COLUMNS: usize = 32;

/// Returns the outputs [B, L, V, E] of the gated delta rule for queries and keys [B, L, H, D] and values [B, L, V, E],
/// which may be parts of a wider tensor. V / H neighbouring value heads share a query and a key, which are divided by
/// their length (`eps` is added to its square); queries also by √D. `decay` and `beta` are [B, L, V]. All are float32.
///
/// A thread takes some columns of one head's state through all positions: columns do not depend on each other.
pub(super) fn delta_rule([q, k, v]: [&Tensor; 3], decay: &Tensor, beta: &Tensor, eps: f64) -> Tensor {
    let size = v.size();
    let mut out = Tensor::empty(&size, (Kind::Float, Device::Cpu));
    let [length, heads, width] = [size[1], size[2], size[3]].map(|n| n as usize);
    let group = heads / q.size()[2] as usize;
    let (decay, beta) = (decay.contiguous(), beta.contiguous());
    let (decay, beta, outputs) = (numbers::<f32>(&decay), numbers::<f32>(&beta), Output::<f32>::of(&mut out));
    let [q, k, v] = [q, k, v].map(Vectors::of);
    let blocks = width.div_ceil(COLUMNS);
    share_in(size[0] as usize * heads * blocks, 1, |parts| {
        for part in parts {
            let (row, head, start) = (part / blocks / heads, part / blocks % heads, part % blocks * COLUMNS);
            let columns = start..width.min(start + COLUMNS);
            let mut state = State::new(q.width, eps as f32);
            for position in 0..length {
                let index = (row * length + position) * heads + head;
                // SAFETY: columns of heads do not overlap.
                let out = unsafe { outputs.part(index * width + columns.start..index * width + columns.end) };
                // A product with a smaller factor would be subnormal, and slow.
                let decay = if decay[index] < 1e-30 { 0.0 } else { decay[index] };
                let vectors = [(&q, head / group), (&k, head / group), (&v, head)];
                let [q, k, v] = vectors.map(|(vectors, head)| vectors.get(row, position, head));
                step(&mut state, [q, k, &v[columns.clone()]], decay, beta[index], out);
            }
        }
    });
    out
}

/// Vectors [B, L, H, D] in a float32 tensor, of which only the last dimension must be contiguous.
struct Vectors<'a> {
    numbers: &'a [f32],
    stride: [usize; 3],
    width: usize,
}

impl<'a> Vectors<'a> {
    fn of(tensor: &'a Tensor) -> Self {
        let (size, stride) = (tensor.size(), tensor.stride());
        assert!(stride[3] == 1 && tensor.kind() == Kind::Float && tensor.device() == Device::Cpu && tensor.numel() > 0);
        let span = (0..4).map(|i| (size[i] - 1) * stride[i]).sum::<i64>() as usize + 1;
        // SAFETY: a tensor's strides reach no further, and it is borrowed.
        let numbers = unsafe { slice::from_raw_parts(tensor.data_ptr().cast(), span) };
        Vectors { numbers, stride: [stride[0], stride[1], stride[2]].map(|n| n as usize), width: size[3] as usize }
    }

    fn get(&self, row: usize, position: usize, head: usize) -> &'a [f32] {
        let start = row * self.stride[0] + position * self.stride[1] + head * self.stride[2];
        &self.numbers[start..][..self.width]
    }
}

/// Columns of a state [D, E] of the delta rule.
struct State {
    rows: Vec<[f32; COLUMNS]>,
    /// Query and key of the current position, divided by their length.
    q: Vec<f32>,
    k: Vec<f32>,
    eps: f32,
}

impl State {
    fn new(keys: usize, eps: f32) -> Self {
        State { rows: vec![[0.0; COLUMNS]; keys], q: vec![0.0; keys], k: vec![0.0; keys], eps }
    }
}

/// Returns the sum of the products of two vectors.
#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let whole = x.len() / LANES * LANES;
    for (x, y) in x.chunks_exact(LANES).zip(y.chunks_exact(LANES)) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + x[whole..].iter().zip(&y[whole..]).map(|(x, y)| x * y).sum::<f32>()
}

/// Changes a state by one position, for the values `v` of its columns, and writes what the query reads to `out`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn step(state: &mut State, [q, k, v]: [&[f32]; 3], decay: f32, beta: f32, out: &mut [f32]) {
    let State { rows, q: unit_q, k: unit_k, eps } = state;
    for (from, to, factor) in [(q, &mut *unit_q, 1.0 / (q.len() as f32).sqrt()), (k, &mut *unit_k, 1.0)] {
        let factor = factor / (dot(from, from) + *eps).sqrt();
        for (to, from) in to.iter_mut().zip(from) {
            *to = from * factor;
        }
    }
    // What the key and the query read from the old state.
    let (mut by_k, mut by_q) = ([0.0_f32; COLUMNS], [0.0_f32; COLUMNS]);
    for ((row, k), q) in rows.iter().zip(&*unit_k).zip(&*unit_q) {
        for ((by_k, by_q), row) in by_k.iter_mut().zip(&mut by_q).zip(row) {
            *by_k += k * row;
            *by_q += q * row;
        }
    }
    let mut correction = [0.0_f32; COLUMNS];
    for ((correction, v), by_k) in correction.iter_mut().zip(v).zip(by_k) {
        *correction = beta * (v - decay * by_k);
    }
    let both = dot(unit_q, unit_k);
    for ((out, correction), by_q) in out.iter_mut().zip(correction).zip(by_q) {
        *out = decay * by_q + both * correction;
    }
    for (row, k) in rows.iter_mut().zip(&*unit_k) {
        for (row, correction) in row.iter_mut().zip(correction) {
            *row = decay * *row + k * correction;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

    /// Draws numbers of both signs and many magnitudes, including zeros.
    fn random(size: &[i64], kind: Kind) -> Tensor {
        let options = (Kind::Float, Device::Cpu);
        let large = Tensor::randn(size, options) * (Tensor::randn(size, options) * 3.0).exp();
        (large * Tensor::rand(size, options).greater(0.1)).to_kind(kind)
    }

    /// Asserts equality up to the last digits of the dtype.
    fn close(found: &Tensor, expected: &Tensor) {
        assert_eq!((found.size(), found.kind()), (expected.size(), expected.kind()));
        let precision = if expected.kind() == Kind::Float { 1e-5 } else { 2e-2 };
        let (found, expected) = (found.to_kind(Kind::Float), expected.to_kind(Kind::Float));
        assert!(found.allclose(&expected, precision, 1e-6, true), "{found}\n{expected}");
    }

    /// One row and many, narrower and wider than a SIMD register, in one chunk and in several.
    const SIZES: [[i64; 2]; 6] = [[1, 1], [1, 31], [3, 64], [7, 100], [300, 576], [41, 4097]];

    #[test]
    fn rms_norm_matches_libtorch() {
        for (size, input, output) in
            SIZES.iter().flat_map(|s| KINDS.iter().flat_map(move |a| KINDS.map(|b| (s, *a, b))))
        {
            let (x, weight) = (random(size, input), random(&size[1..], Kind::Float));
            let expected = x.to_kind(Kind::Float).rms_norm(&size[1..], Some(&weight), 1e-6).to_kind(output);
            close(&rms_norm(&x, &weight, 1e-6, output), &expected);
        }
        let zero = Tensor::zeros([2, 64], (Kind::Float, Device::Cpu));
        close(&rms_norm(&zero, &Tensor::ones([64], (Kind::Float, Device::Cpu)), 1e-6, Kind::Float), &zero);
    }

    #[test]
    fn silu_times_and_add_match_libtorch() {
        for (size, kind) in SIZES.iter().flat_map(|size| KINDS.map(|kind| (size, kind))) {
            let (a, b) = (random(size, kind), random(size, kind));
            let float = |x: &Tensor| x.to_kind(Kind::Float);
            close(&silu_times(&a, &b), &(float(&a).silu() * float(&b)).to_kind(kind));
            let x = random(size, Kind::Float);
            close(&add(&x, &b), &(x + float(&b)));
        }
        // Infinity and NaN propagate; large magnitudes saturate correctly.
        let odd = Tensor::from_slice(&[f32::INFINITY, f32::NAN, -200.0, 200.0]);
        let gated = silu_times(&odd, &odd.ones_like());
        assert_eq!(gated.double_value(&[0]), f64::INFINITY);
        assert!(gated.double_value(&[1]).is_nan());
        assert!(gated.double_value(&[2]).abs() < 1e-30 && gated.double_value(&[3]) == 200.0);
    }

    #[test]
    fn weighted_sums_match_libtorch() {
        for (size, kind) in [[1, 1, 1], [7, 2, 100], [300, 8, 64]].iter().flat_map(|s| KINDS.map(|kind| (s, kind))) {
            let [count, each, width] = *size;
            let rows = random(&[count * each, width], kind);
            let places = Tensor::randperm(count * each, (Kind::Int64, Device::Cpu)).view([count, each]);
            let weights = Tensor::rand([count, each], (Kind::Float, Device::Cpu));
            let chosen = rows.to_kind(Kind::Float).index_select(0, &places.flatten(0, 1)).view([count, each, width]);
            close(
                &weighted_sums(&rows, &places, &weights),
                &(chosen * weights.unsqueeze(-1)).sum_dim_intlist(1, false, None),
            );
        }
    }

    #[test]
    fn rotate_matches_libtorch() {
        for (heads, head, width) in [(1, 2, 2), (3, 64, 64), (4, 20, 8)] {
            for kind in KINDS {
                let x = random(&[2, 9, heads * head + 5], kind).narrow(2, 5, heads * head);
                let x = x.unflatten(2, [heads, head]).transpose(1, 2);
                let angles = Tensor::rand([9, width / 2], (Kind::Float, Device::Cpu)) * 6.0;
                let angles = Tensor::cat(&[&angles, &angles], 1);
                let (cos, sin) = (angles.cos(), angles.sin());
                let expected = super::super::Rotary::rotate_plainly(&x.to_kind(Kind::Float), &cos, &sin);
                close(&rotate(&x, &cos, &sin), &expected.to_kind(kind));
            }
        }
    }

    #[test]
    fn convolve_silu_matches_libtorch() {
        for (length, width, positions) in [(1, 1, 4), (3, 70, 4), (50, 96, 1), (130, 33, 3)] {
            for kind in KINDS {
                let (x, weight) = (random(&[2, length, width], kind), random(&[width, 1, positions], Kind::Float));
                let by_channel = x.to_kind(Kind::Float).transpose(1, 2);
                let convolved = by_channel.conv1d(&weight, None::<&Tensor>, 1, positions - 1, 1, width);
                let expected = convolved.narrow(2, 0, length).silu().transpose(1, 2);
                let found = convolve_silu(&x, &weight);
                assert!(found.allclose(&expected, 1e-4, 1e-4, false), "{found}\n{expected}");
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let (x, weight) = (random(&[1000, 333], Kind::Float), random(&[333], Kind::Float));
        let on = |threads| {
            let before = tch::get_num_threads();
            tch::set_num_threads(threads);
            let found = (rms_norm(&x, &weight, 1e-6, Kind::BFloat16), silu_times(&x, &x));
            tch::set_num_threads(before);
            found
        };
        let (one, three) = (on(1), on(3));
        assert!(one.0.equal(&three.0) && one.1.equal(&three.1));
    }
}
