//! Selects the relevant entries of pre-activations `[B, F]` that arrive tile by tile, so that only one tile is ever in
//! memory.

// Negated comparisons treat NaN as above every bound.
#![allow(clippy::neg_cmp_op_on_partial_ord)]

use std::ops::Range;

use multiversion::multiversion;
use tch::{Kind, Tensor};

use super::pattern::{Entry, Pattern};
use crate::machine::parallel::{Bf16, Number, Output, numbers, share_in};

/// Which positive pre-activations are kept. NaN counts as the largest value, so that it propagates.
pub(crate) enum Kept {
    /// The k largest of each row. Ties keep the lower features.
    OfEach(usize),
    /// The n largest of all rows together. Ties keep the earlier rows, then the lower features.
    OfBatch(usize),
}

/// Collects the kept entries of successive tiles.
pub(crate) struct Selector {
    kept: Kept,
    /// Candidates so far, a superset of the kept entries.
    rows: Vec<Vec<Entry>>,
    /// Lower bounds on kept values: one per row, or one for the batch.
    bounds: Vec<f32>,
    /// For the batch: number of entries in each bucket.
    histogram: Vec<u32>,
    features: usize,
}

/// Bucket of an entry: its value's exponent and five bits of the mantissa.
fn bucket(entry: Entry) -> usize {
    ((entry.value().to_bits() & 0x7fff_ffff) >> 18) as usize
}

const BUCKETS: usize = 1 << 13;

/// Features in the first part of a batch, which has no bound yet: all their positive entries are candidates.
const FEW: usize = 128;

impl Selector {
    pub fn new(kept: Kept, rows: usize) -> Self {
        let (bounds, histogram, room) = match kept {
            Kept::OfEach(k) => (vec![0.0; rows], Vec::new(), full(k) + GROUP),
            Kept::OfBatch(_) => (vec![0.0], vec![0; BUCKETS], 0),
        };
        let rows = (0..rows).map(|_| Vec::with_capacity(room)).collect();
        Selector { kept, rows, bounds, histogram, features: 0 }
    }

    /// Adds the next features of all rows. `tile` is a product without biases.
    pub fn offer(&mut self, tile: &Tile) {
        let count = self.rows.len();
        assert!(tile.rows() == count);
        let first = self.features as u32;
        self.features += tile.width();
        match self.kept {
            Kept::OfEach(k) => {
                let rows = Output::over(&mut self.rows);
                let bounds = Output::over(&mut self.bounds);
                share_in(count, 16, |range| {
                    let mut buffer = vec![0.0; tile.width()];
                    // SAFETY: ranges of rows do not overlap.
                    let (rows, bounds) = unsafe { (rows.part(range.clone()), bounds.part(range.clone())) };
                    for ((row, found), bound) in range.zip(rows).zip(bounds) {
                        tile.row(row, 0, &mut buffer);
                        scan_each(&buffer, first, found, bound, k);
                    }
                });
            }
            Kept::OfBatch(n) => {
                let mut from = 0;
                while from < tile.width() {
                    // At most as many as were seen so far, so that about n new candidates come in.
                    let to = tile.width().min(from + FEW.max(first as usize + from));
                    self.offer_to_batch(tile, from..to, first, n);
                    from = to;
                }
            }
        }
    }

    /// Adds some columns of a tile, whose first feature is `first`, to the candidates for the n largest of all rows.
    fn offer_to_batch(&mut self, tile: &Tile, columns: Range<usize>, first: u32, n: usize) {
        let count = self.rows.len();
        let rows = Output::over(&mut self.rows);
        let bound = self.bounds[0];
        // One histogram per group of rows, summed in order.
        let shares = 32.min(count.max(1));
        let share = count.div_ceil(shares);
        let mut histograms = vec![0_u32; shares * BUCKETS];
        let histogram = Output::over(&mut histograms);
        share_in(count, share, |range| {
            let index = range.start / share;
            let mut buffer = vec![0.0; columns.len()];
            // SAFETY: ranges of rows do not overlap, and have a histogram each.
            let (rows, histogram) =
                unsafe { (rows.part(range.clone()), histogram.part(index * BUCKETS..(index + 1) * BUCKETS)) };
            for (row, found) in range.zip(rows) {
                let before = found.len();
                tile.row(row, columns.start, &mut buffer);
                scan(&buffer, bound, first + columns.start as u32, found);
                for entry in &found[before..] {
                    histogram[bucket(*entry)] += 1;
                }
            }
        });
        for part in histograms.chunks_exact(BUCKETS) {
            for (sum, count) in self.histogram.iter_mut().zip(part) {
                *sum += count;
            }
        }
        if let Some((bucket, _)) = self.last_bucket(n) {
            // Just below the bucket's smallest value, so that all of the bucket still passes.
            let least = f32::from_bits((bucket as u32) << 18);
            let bound = bound.max(least.next_down().max(0.0));
            self.bounds[0] = bound;
            // Drops candidates at or below the new bound, to keep the lists short.
            share_in(count, share, |range| {
                // SAFETY: ranges of rows do not overlap.
                for found in unsafe { rows.part(range) } {
                    found.retain(|entry| !(entry.value() <= bound));
                }
            });
        }
    }

    /// Returns the bucket of the n-th largest entry, and the number of entries above it; `None` if there are fewer than
    /// n.
    fn last_bucket(&self, n: usize) -> Option<(usize, usize)> {
        let mut above = 0;
        for (bucket, count) in self.histogram.iter().enumerate().rev() {
            if above + *count as usize >= n {
                return Some((bucket, above));
            }
            above += *count as usize;
        }
        None
    }

    /// Returns the kept entries and their values.
    pub fn finish(mut self) -> (Pattern, Tensor) {
        match self.kept {
            Kept::OfEach(k) => {
                let rows = Output::over(&mut self.rows);
                share_in(self.bounds.len(), 16, |range| {
                    // SAFETY: ranges of rows do not overlap.
                    for row in unsafe { rows.part(range) } {
                        if row.len() > k {
                            trim(row, k);
                        }
                        row.sort_unstable_by_key(|entry| entry.feature());
                    }
                });
            }
            Kept::OfBatch(n) => {
                if let Some((last, above)) = self.last_bucket(n) {
                    let mut values: Vec<f32> = self
                        .rows
                        .iter()
                        .flatten()
                        .filter(|entry| bucket(**entry) == last)
                        .map(|entry| entry.value())
                        .collect();
                    // The bucket has at least `nth` values. The bits of positive values are ordered like the values.
                    let nth = n - above;
                    let (more, least, _) =
                        values.select_nth_unstable_by_key(nth.max(1) - 1, |value| std::cmp::Reverse(value.to_bits()));
                    let least = least.to_bits();
                    let mut equal = nth - more.iter().filter(|value| value.to_bits() > least).count();
                    for row in &mut self.rows {
                        row.retain(|entry| match entry.value().to_bits().cmp(&least) {
                            std::cmp::Ordering::Greater => true,
                            std::cmp::Ordering::Equal if equal > 0 => {
                                equal -= 1;
                                true
                            }
                            _ => false,
                        });
                    }
                }
            }
        }
        Pattern::new(&self.rows, self.features)
    }
}

/// Keeps the k largest entries, in any order, and returns the smallest of these values.
fn trim(found: &mut Vec<Entry>, k: usize) -> f32 {
    let less = found.len() - k;
    let least = found.select_nth_unstable(less).1.value();
    found.drain(..less);
    least
}

/// Makes an entry of a positive value or NaN; clears the sign of NaN.
#[inline(always)]
fn kept(feature: u32, value: f32) -> Entry {
    Entry::new(feature, f32::from_bits(value.to_bits() & 0x7fff_ffff))
}

/// Values that are tested together and skipped if none is above the bound.
const GROUP: usize = 16;

/// Length at which a row is trimmed to k: twice k, to amortise the cost.
fn full(k: usize) -> usize {
    2 * k + GROUP
}

/// Adds the entries of a row that may be among its k largest.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn scan_each(row: &[f32], first: u32, found: &mut Vec<Entry>, bound: &mut f32, k: usize) {
    let full = full(k);
    for (group, values) in row.chunks(GROUP).enumerate() {
        let limit = *bound;
        if values.iter().map(|value| u32::from(!(*value <= limit))).sum::<u32>() == 0 {
            continue;
        }
        for (feature, value) in (first + (group * GROUP) as u32..).zip(values) {
            if !(*value <= limit) {
                found.push(kept(feature, *value));
            }
        }
        if found.len() >= full {
            let least = trim(found, k);
            // `max` ignores NaN, which bounds nothing.
            *bound = bound.max(least);
        }
    }
}

/// Adds the entries of a row above a bound, which is at least 0.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn scan(row: &[f32], bound: f32, first: u32, found: &mut Vec<Entry>) {
    for (group, values) in row.chunks(GROUP).enumerate() {
        if values.iter().map(|value| u32::from(!(*value <= bound))).sum::<u32>() == 0 {
            continue;
        }
        for (feature, value) in (first + (group * GROUP) as u32..).zip(values) {
            if !(*value <= bound) {
                found.push(kept(feature, *value));
            }
        }
    }
}

/// Product of a tile of features `[B, n]`, float32 or bfloat16, and the features' biases.
pub(crate) struct Tile<'a> {
    numbers: Numbers<'a>,
    bias: &'a [f32],
}

enum Numbers<'a> {
    Float(&'a [f32]),
    BFloat16(&'a [Bf16]),
}

impl<'a> Tile<'a> {
    pub fn new(product: &'a Tensor, bias: &'a [f32]) -> Self {
        assert!(product.size()[1] == bias.len() as i64);
        let numbers = match product.kind() {
            Kind::BFloat16 => Numbers::BFloat16(numbers(product)),
            _ => Numbers::Float(numbers(product)),
        };
        Tile { numbers, bias }
    }

    pub fn width(&self) -> usize {
        self.bias.len()
    }

    fn rows(&self) -> usize {
        match self.numbers {
            Numbers::Float(numbers) => numbers.len() / self.width(),
            Numbers::BFloat16(numbers) => numbers.len() / self.width(),
        }
    }

    /// Writes the part of a row that starts at column `from`, with the biases added, to `out`.
    fn row(&self, row: usize, from: usize, out: &mut [f32]) {
        let start = row * self.width() + from;
        let (part, bias) = (start..start + out.len(), &self.bias[from..from + out.len()]);
        match self.numbers {
            Numbers::Float(numbers) => add(&numbers[part], bias, out),
            Numbers::BFloat16(numbers) => add(&numbers[part], bias, out),
        }
    }

    /// Writes the tile with biases to z `[B, n]`. Returns the number of entries above their feature's bound `[n]`.
    pub fn finish(&self, bounds: &[f32], z: &mut Tensor) -> usize {
        let (rows, width) = (self.rows(), self.width());
        assert!(z.size() == [rows as i64, width as i64] && bounds.len() == width);
        let mut counts = vec![0_u64; rows];
        let (out, count) = (Output::<f32>::of(z), Output::over(&mut counts));
        share_in(rows, 64, |range| {
            for row in range {
                // SAFETY: ranges of rows do not overlap.
                let (out, count) = unsafe { (out.part(row * width..(row + 1) * width), count.part(row..row + 1)) };
                self.row(row, 0, out);
                count[0] = count_row(out, bounds).into();
            }
        });
        counts.iter().sum::<u64>() as usize
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn add<T: Number>(row: &[T], bias: &[f32], out: &mut [f32]) {
    for ((out, value), bias) in out.iter_mut().zip(row).zip(bias) {
        *out = value.get() + bias;
    }
}

fn row_slices(tile: &[f32], width: usize, rows: Range<usize>) -> impl Iterator<Item = &[f32]> {
    rows.map(move |row| &tile[row * width..(row + 1) * width])
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn count_row(row: &[f32], bounds: &[f32]) -> u32 {
    row.iter().zip(bounds).map(|(value, bound)| u32::from(!(value <= bound))).sum()
}

/// Returns the entries of a tile `[B, n]` above their feature's bound `[n]`, and their values.
pub(crate) fn above(tile: &Tensor, bounds: &[f32]) -> (Pattern, Tensor) {
    let (rows, width) = (tile.size()[0] as usize, bounds.len());
    let tile = numbers::<f32>(tile);
    let mut found = vec![Vec::new(); rows];
    let out = Output::over(&mut found);
    share_in(rows, 16, |range| {
        // SAFETY: ranges of rows do not overlap.
        for (found, row) in unsafe { out.part(range.clone()) }.iter_mut().zip(row_slices(tile, width, range)) {
            scan_above(row, bounds, found);
        }
    });
    Pattern::new(&found, width)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn scan_above(row: &[f32], bounds: &[f32], found: &mut Vec<Entry>) {
    for (group, (values, bounds)) in row.chunks(GROUP).zip(bounds.chunks(GROUP)).enumerate() {
        if values.iter().zip(bounds).map(|(value, bound)| u32::from(!(value <= bound))).sum::<u32>() == 0 {
            continue;
        }
        for ((feature, value), bound) in ((group * GROUP) as u32..).zip(values).zip(bounds) {
            if !(value <= bound) {
                found.push(Entry::new(feature, *value));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn select(kept: Kept, rows: &Tensor, tile: i64) -> Tensor {
        let size = rows.size();
        let mut selector = Selector::new(kept, size[0] as usize);
        for first in (0..size[1]).step_by(tile as usize) {
            let count = tile.min(size[1] - first);
            let product = (rows.narrow(1, first, count) - 0.0).contiguous();
            selector.offer(&Tile::new(&product, &vec![0.0; count as usize]));
        }
        let (pattern, values) = selector.finish();
        let (feature, row) = pattern.indices();
        let selected = rows.zeros_like();
        selected.index_put(&[Some(row.to_kind(Kind::Int64)), Some(feature.to_kind(Kind::Int64))], &values, false)
    }

    /// Selects with libtorch's `topk`.
    fn plainly(k: i64, rows: &Tensor) -> Tensor {
        let (values, indices) = rows.relu().topk(k.min(rows.size()[1]), -1, true, false);
        rows.zeros_like().scatter(-1, &indices, &values)
    }

    fn same(found: &Tensor, expected: &Tensor) {
        assert!(found.allclose(expected, 0.0, 0.0, true), "{found}\n{expected}");
    }

    #[test]
    fn selection_matches_libtorch() {
        let options = (Kind::Float, Device::Cpu);
        for (rows, features, tile) in
            [(1, 1, 1), (1, 50, 7), (3, 17, 100), (40, 333, 64), (130, 64, 64), (20, 700, 600)]
        {
            for shift in [0.0, -1.0, -100.0, 3.0] {
                let z = Tensor::randn([rows, features], options) + shift;
                for k in [1, 2, features / 3 + 1, features] {
                    same(&select(Kept::OfEach(k as usize), &z, tile), &plainly(k, &z));
                    let all = plainly(k * rows, &z.reshape([1, -1])).view_as(&z);
                    same(&select(Kept::OfBatch((k * rows) as usize), &z, tile), &all);
                }
            }
        }
    }

    #[test]
    fn ties_keep_the_first_entries() {
        let z = Tensor::from_slice2(&[[1.0f32, 2.0, 2.0, 2.0, 0.0, -0.0], [2.0, 1.0, 1.0, 1.0, 1.0, 3.0]]);
        let each = Tensor::from_slice2(&[[0.0f32, 2.0, 2.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0, 3.0]]);
        same(&select(Kept::OfEach(2), &z, 4), &each);
        let batch = Tensor::from_slice2(&[[0.0f32, 2.0, 2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 3.0]]);
        same(&select(Kept::OfBatch(4), &z, 4), &batch);
        // Enough ties to trim rows before the end.
        let ones = Tensor::ones([2, 500], (Kind::Float, Device::Cpu));
        let first = Tensor::arange(500, (Kind::Int64, Device::Cpu)).less(3).to_kind(Kind::Float).expand_as(&ones);
        same(&select(Kept::OfEach(3), &ones, 64), &first);
    }

    #[test]
    fn nan_and_infinity_are_selected() {
        let mut z = Tensor::randn([4, 400], (Kind::Float, Device::Cpu));
        let _ = z.get(2).narrow(0, 390, 1).fill_(f64::NAN);
        let _ = z.get(1).narrow(0, 3, 1).fill_(f64::INFINITY);
        for kept in [Kept::OfEach(2), Kept::OfBatch(8)] {
            let selected = select(kept, &z, 100);
            assert!(
                selected.get(2).isnan().any().int64_value(&[]) == 1 && selected.isinf().any().int64_value(&[]) == 1
            );
        }
        z = z.fill_(f64::NAN);
        assert!(select(Kept::OfEach(2), &z, 100).isnan().any().int64_value(&[]) == 1);
    }

    #[test]
    fn entries_above_bounds_match_libtorch() {
        let z = Tensor::randn([37, 100], (Kind::Float, Device::Cpu));
        let bounds = Tensor::randn([100], (Kind::Float, Device::Cpu));
        let (pattern, values) = above(&z, numbers(&bounds));
        let expected = z.greater_tensor(&bounds);
        assert_eq!(pattern.len() as i64, expected.sum(Kind::Int64).int64_value(&[]));
        for kind in [Kind::Float, Kind::BFloat16] {
            let (product, bias) = (z.to_kind(kind), Tensor::randn([100], (Kind::Float, Device::Cpu)));
            let mut finished = z.empty_like();
            let count = Tile::new(&product, numbers(&bias)).finish(numbers(&bounds), &mut finished);
            let expected = product.to_kind(Kind::Float) + &bias;
            same(&finished, &expected);
            assert_eq!(count as i64, expected.greater_tensor(&bounds).sum(Kind::Int64).int64_value(&[]));
        }
        let (feature, row) = pattern.indices();
        same(&values, &z.index(&[Some(row), Some(feature)]));
    }
}
