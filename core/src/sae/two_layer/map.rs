//! Elementwise calculations between products, in one pass over memory.

use multiversion::multiversion;
use tch::{Device, Kind, Tensor};

use crate::machine::parallel::{Bf16, Number, Output, numbers, share_in};

/// Input of a calculation: a matrix, a repeated row, or one value.
pub(super) enum Row {
    Each(Tensor),
    Repeated(Tensor),
    Same(f32),
}

impl Row {
    pub fn of_each(tensor: &Tensor) -> Self {
        Row::Each(tensor.contiguous())
    }

    pub fn repeated(vector: &Tensor) -> Self {
        Row::Repeated(vector.contiguous())
    }

    pub fn same(value: f32) -> Self {
        Row::Same(value)
    }

    fn numbers(&self) -> Numbers<'_> {
        match self {
            Row::Each(tensor) if tensor.kind() == Kind::BFloat16 => Numbers::EachBf16(numbers(tensor)),
            Row::Each(tensor) => Numbers::Each(numbers(tensor)),
            Row::Repeated(vector) => Numbers::Repeated(numbers(vector)),
            Row::Same(value) => Numbers::Same(*value),
        }
    }
}

/// Borrowed view of a [`Row`] that threads can share.
enum Numbers<'a> {
    Each(&'a [f32]),
    EachBf16(&'a [Bf16]),
    Repeated(&'a [f32]),
    Same(f32),
}

impl Numbers<'_> {
    /// Copies the values of `out.len()` entries, starting at `start`, of a row of this width.
    #[inline(always)]
    fn copy(&self, row: usize, width: usize, start: usize, out: &mut [f32]) {
        match self {
            Numbers::Each(numbers) => out.copy_from_slice(&numbers[row * width + start..][..out.len()]),
            Numbers::EachBf16(numbers) => {
                out.iter_mut().zip(&numbers[row * width + start..]).for_each(|(out, number)| *out = number.get());
            }
            Numbers::Repeated(numbers) => out.copy_from_slice(&numbers[start..][..out.len()]),
            Numbers::Same(value) => out.fill(*value),
        }
    }
}

/// Destination of outputs.
enum Results {
    Float(Output<f32>),
    BFloat16(Output<Bf16>),
}

impl Results {
    fn of(tensor: &mut Tensor) -> Self {
        match tensor.kind() {
            Kind::BFloat16 => Results::BFloat16(Output::of(tensor)),
            _ => Results::Float(Output::of(tensor)),
        }
    }

    /// # Safety
    /// No two threads may write parts that overlap.
    #[inline(always)]
    unsafe fn write(&self, start: usize, values: &[f32]) {
        let range = start..start + values.len();
        // SAFETY: as the caller promises.
        match self {
            Results::Float(out) => unsafe { out.part(range) }.copy_from_slice(values),
            Results::BFloat16(out) => {
                let out = unsafe { out.part(range) };
                out.iter_mut().zip(values).for_each(|(out, value)| *out = Bf16::of(*value));
            }
        }
    }
}

/// Entries that are calculated together.
const WIDTH: usize = 64;

/// Number of row groups with their own partial sums, fixed so that results do not depend on the number of threads.
const SHARES: usize = 64;

/// Inputs of a calculation: per entry and per feature.
struct Inputs<'a, const I: usize, const P: usize> {
    each: [Numbers<'a>; I],
    of_features: [Numbers<'a>; P],
    /// Entries per row.
    width: usize,
}

impl<'a, const I: usize, const P: usize> Inputs<'a, I, P> {
    fn new(each: &'a [Row; I], of_features: &'a [Row; P], width: usize) -> Self {
        Inputs { each: each.each_ref().map(Row::numbers), of_features: of_features.each_ref().map(Row::numbers), width }
    }

    /// Calculates `count` entries of a row from `start`, through local arrays that the compiler knows not to overlap.
    #[inline(always)]
    fn map<const O: usize, const S: usize>(
        &self,
        row: usize,
        start: usize,
        count: usize,
        function: &impl Fn([f32; I], [f32; P]) -> ([f32; O], [f32; S]),
    ) -> ([[f32; WIDTH]; O], [[f32; WIDTH]; S]) {
        let (mut x, mut of_features) = ([[0.0_f32; WIDTH]; I], [[0.0_f32; WIDTH]; P]);
        for (x, input) in x.iter_mut().zip(&self.each).chain(of_features.iter_mut().zip(&self.of_features)) {
            input.copy(row, self.width, start, &mut x[..count]);
        }
        let (mut out, mut summed) = ([[0.0_f32; WIDTH]; O], [[0.0_f32; WIDTH]; S]);
        for lane in 0..WIDTH {
            let (found, sums) =
                function(std::array::from_fn(|i| x[i][lane]), std::array::from_fn(|i| of_features[i][lane]));
            for (out, found) in out.iter_mut().zip(found) {
                out[lane] = found;
            }
            for (summed, sum) in summed.iter_mut().zip(sums) {
                summed[lane] = sum;
            }
        }
        (out, summed)
    }
}

/// Maps tiles of this size `[B, n]` to outputs of the same size and sums over rows `[n]`.
pub(super) fn tile<const I: usize, const P: usize, const O: usize, const S: usize>(
    size: &[i64],
    kind: Kind,
    each: [Row; I],
    of_features: [Row; P],
    function: impl Fn([f32; I], [f32; P]) -> ([f32; O], [f32; S]) + Sync,
) -> ([Tensor; O], [Tensor; S]) {
    let (rows, width) = (size[0] as usize, size[1] as usize);
    let mut outputs: [Tensor; O] = std::array::from_fn(|_| Tensor::empty(size, (kind, Device::Cpu)));
    let out = outputs.each_mut().map(Results::of);
    let inputs = Inputs::new(&each, &of_features, width);
    let share = rows.div_ceil(SHARES).max(1);
    let mut sums = vec![0.0_f32; SHARES * S * width];
    let all_sums = Output::over(&mut sums);
    share_in(rows, share, |range| {
        let index = range.start / share * S * width;
        // SAFETY: shares have sums of their own.
        let sums = unsafe { all_sums.part(index..index + S * width) };
        for row in range {
            // SAFETY: ranges of rows do not overlap.
            unsafe { map_row(&inputs, row, &out, sums, &function) };
        }
    });
    let sums = std::array::from_fn(|index| {
        let mut sum = vec![0.0_f32; width];
        for share in sums.chunks_exact((S * width).max(1)) {
            sum.iter_mut().zip(&share[index * width..]).for_each(|(sum, part)| *sum += part);
        }
        Tensor::from_slice(&sum)
    });
    (outputs, sums)
}

/// Maps lists of this length to outputs of the same length and values that the caller sums.
pub(super) fn list<const I: usize, const P: usize, const O: usize, const S: usize>(
    length: i64,
    each: [Row; I],
    of_features: [Row; P],
    function: impl Fn([f32; I], [f32; P]) -> ([f32; O], [f32; S]) + Sync,
) -> ([Tensor; O], [Tensor; S]) {
    let options = (Kind::Float, Device::Cpu);
    let mut outputs: [Tensor; O] = std::array::from_fn(|_| Tensor::empty([length], options));
    let mut summed: [Tensor; S] = std::array::from_fn(|_| Tensor::empty([length], options));
    let (out, sums) = (outputs.each_mut().map(Output::of), summed.each_mut().map(Output::of));
    let inputs = Inputs::new(&each, &of_features, length as usize);
    share_in(length as usize, 1 << 14, |range| {
        for start in range.clone().step_by(WIDTH) {
            let count = WIDTH.min(range.end - start);
            let found = map_part(&inputs, start, count, &function);
            for (out, found) in out.iter().zip(&found.0).chain(sums.iter().zip(&found.1)) {
                // SAFETY: ranges do not overlap.
                unsafe { out.part(start..start + count) }.copy_from_slice(&found[..count]);
            }
        }
    });
    (outputs, summed)
}

/// # Safety
/// No two threads may ask for the same row.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
unsafe fn map_row<const I: usize, const P: usize, const O: usize, const S: usize>(
    inputs: &Inputs<I, P>,
    row: usize,
    out: &[Results; O],
    sums: &mut [f32],
    function: &(impl Fn([f32; I], [f32; P]) -> ([f32; O], [f32; S]) + Sync),
) {
    let width = inputs.width;
    for start in (0..width).step_by(WIDTH) {
        let count = WIDTH.min(width - start);
        let (found, summed) = inputs.map(row, start, count, function);
        for (out, found) in out.iter().zip(&found) {
            // SAFETY: the row is this thread's.
            unsafe { out.write(row * width + start, &found[..count]) };
        }
        for (index, summed) in summed.iter().enumerate() {
            let sums = &mut sums[index * width + start..][..count];
            sums.iter_mut().zip(summed).for_each(|(sum, value)| *sum += value);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn map_part<const I: usize, const P: usize, const O: usize, const S: usize>(
    inputs: &Inputs<I, P>,
    start: usize,
    count: usize,
    function: &(impl Fn([f32; I], [f32; P]) -> ([f32; O], [f32; S]) + Sync),
) -> ([[f32; WIDTH]; O], [[f32; WIDTH]; S]) {
    inputs.map(0, start, count, function)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_match_libtorch() {
        let options = (Kind::Float, Device::Cpu);
        for size in [[1, 1], [3, 64], [50, 100], [200, 513]] {
            let (a, b) = (Tensor::randn(size, options), Tensor::randn([size[1]], options));
            let each = [Row::of_each(&a), Row::same(2.0)];
            let function = |[a, c]: [f32; 2], [b]: [f32; 1]| ([a * b + c, a.max(0.0)], [a - b, c]);
            let close = |found: &Tensor, expected: &Tensor| assert!(found.allclose(expected, 1e-4, 1e-4, false));
            let ([product, relu], [difference, count]) = tile(&size, Kind::Float, each, [Row::repeated(&b)], function);
            close(&product, &(&a * &b + 2.0));
            close(&relu, &a.relu());
            let sum = |tensor: &Tensor| tensor.sum_dim_intlist([0].as_slice(), false, Kind::Float);
            close(&difference, &sum(&(&a - &b)));
            close(&count, &(a.ones_like() * 2.0).sum_dim_intlist([0].as_slice(), false, Kind::Float));
            // From bfloat16 and back.
            let halves = [Row::of_each(&a.to_kind(Kind::BFloat16)), Row::same(1.0)];
            let ([more], []) = tile(&size, Kind::BFloat16, halves, [], |[a, b], []| ([a + b], []));
            assert_eq!(
                more,
                a.to_kind(Kind::BFloat16).to_kind(Kind::Float).f_add_scalar(1.0).unwrap().to_kind(Kind::BFloat16)
            );
            let flat = a.reshape([-1]);
            let ([doubled], [same]) =
                list(a.numel() as i64, [Row::of_each(&flat), Row::same(2.0)], [], |[a, c], []| ([a * c], [a]));
            close(&doubled, &(&flat * 2.0));
            close(&same, &flat);
        }
    }
}
