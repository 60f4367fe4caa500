//! Finding the entries that matter in pre-activations [B, F] that come a tile of features at a time, so that there is
//! never more of them than a tile.

use std::ops::Range;

use multiversion::multiversion;
use tch::Tensor;

use super::pattern::{Entry, Pattern};
use crate::parallel::{numbers, share_in, Output};

/// The pre-activations above 0 that are kept. What is no number counts as the largest, so that it is not overlooked.
pub(super) enum Kept {
    /// The k largest of each row; of equal ones the first.
    OfEach(usize),
    /// The n largest of all rows together; of equal ones the first, row after row.
    OfBatch(usize),
}

/// Finds them.
pub(super) struct Selector {
    kept: Kept,
    /// What is kept so far, and some more.
    rows: Vec<Vec<Entry>>,
    /// Only what is above it can be among the kept: of each row, or of all.
    bounds: Vec<f32>,
    /// Of all rows together: how many entries fall into each bucket.
    histogram: Vec<u32>,
    features: usize,
}

/// A positive number's bucket: its exponent and five bits of its mantissa.
fn bucket(value: f32) -> usize {
    ((value.to_bits() & 0x7fff_ffff) >> 18) as usize
}

const BUCKETS: usize = 1 << 13;

/// Larger first, and what is no number before all.
fn larger_first(a: &f32, b: &f32) -> std::cmp::Ordering {
    (b.is_nan(), *b).partial_cmp(&(a.is_nan(), *a)).unwrap_or(std::cmp::Ordering::Equal)
}

impl Selector {
    pub fn new(kept: Kept, rows: usize) -> Self {
        let (bounds, histogram) = match kept {
            Kept::OfEach(_) => (vec![0.0; rows], Vec::new()),
            Kept::OfBatch(_) => (vec![0.0], vec![0; BUCKETS]),
        };
        Selector { kept, rows: vec![Vec::new(); rows], bounds, histogram, features: 0 }
    }

    /// Takes the next features of all rows, a contiguous float32 tensor [B, n].
    pub fn offer(&mut self, tile: &Tensor) {
        let (count, width) = (self.rows.len(), tile.size()[1] as usize);
        assert!(tile.size()[0] == count as i64);
        let (first, tile) = (self.features as u32, numbers::<f32>(tile));
        self.features += width;
        let row_of = |row: usize| &tile[row * width..(row + 1) * width];
        let rows = Output::over(&mut self.rows);
        match self.kept {
            Kept::OfEach(k) => {
                let bounds = Output::over(&mut self.bounds);
                share_in(count, 16, |range| {
                    // SAFETY: ranges of rows do not overlap.
                    let (rows, bounds) = unsafe { (rows.part(range.clone()), bounds.part(range.clone())) };
                    for ((row, found), bound) in range.zip(rows).zip(bounds) {
                        scan_each(row_of(row), first, found, bound, k);
                    }
                });
            }
            Kept::OfBatch(n) => {
                let bound = self.bounds[0];
                // A histogram for each share of the rows, added up in order.
                let shares = 16.min(count.max(1));
                let share = count.div_ceil(shares);
                let mut histograms = vec![0_u32; shares * BUCKETS];
                let histogram = Output::over(&mut histograms);
                share_in(count, share, |range| {
                    let index = range.start / share;
                    // SAFETY: ranges of rows do not overlap, and have a histogram each.
                    let (rows, histogram) =
                        unsafe { (rows.part(range.clone()), histogram.part(index * BUCKETS..(index + 1) * BUCKETS)) };
                    for (row, found) in range.zip(rows) {
                        let before = found.len();
                        scan(row_of(row), bound, first, found);
                        for entry in &found[before..] {
                            histogram[bucket(entry.value)] += 1;
                        }
                    }
                });
                for part in histograms.chunks_exact(BUCKETS) {
                    for (sum, count) in self.histogram.iter_mut().zip(part) {
                        *sum += count;
                    }
                }
                if let Some((bucket, _)) = self.last_bucket(n) {
                    // Just below the bucket's least number: all of it is still taken.
                    let least = f32::from_bits((bucket as u32) << 18);
                    self.bounds[0] = bound.max(least.next_down().max(0.0));
                }
            }
        }
    }

    /// The bucket in which the n-th largest lies, and how many lie above it; none if there are not that many.
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

    /// The kept entries, and their values.
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
                        row.sort_unstable_by_key(|entry| entry.feature);
                    }
                });
            }
            Kept::OfBatch(n) => {
                if let Some((last, above)) = self.last_bucket(n) {
                    let mut values: Vec<f32> =
                        self.rows.iter().flatten().map(|entry| entry.value).filter(|v| bucket(*v) == last).collect();
                    // There are at least so many, and at least one.
                    let nth = n - above;
                    let (more, least, _) = values.select_nth_unstable_by(nth.max(1) - 1, larger_first);
                    let least = *least;
                    let mut equal = nth - more.iter().filter(|value| larger_first(value, &least).is_lt()).count();
                    for row in &mut self.rows {
                        row.retain(|entry| match larger_first(&entry.value, &least) {
                            std::cmp::Ordering::Less => true,
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

/// Keeps the k largest of more, in any order, and gives the least of them.
fn trim(found: &mut Vec<Entry>, k: usize) -> f32 {
    let by_value = |a: &Entry, b: &Entry| larger_first(&a.value, &b.value).then(a.feature.cmp(&b.feature));
    let least = found.select_nth_unstable_by(k - 1, by_value).1.value;
    found.truncate(k);
    least
}

/// Numbers that are looked at together, to be passed over if none is above the bound.
const GROUP: usize = 16;

/// Adds the entries of a row that may be among its k largest.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn scan_each(row: &[f32], first: u32, found: &mut Vec<Entry>, bound: &mut f32, k: usize) {
    // Room for as many again, so that trimming costs little.
    let full = 2 * k + GROUP;
    for (group, values) in row.chunks(GROUP).enumerate() {
        let limit = *bound;
        if values.iter().map(|value| u32::from(!(*value <= limit))).sum::<u32>() == 0 {
            continue;
        }
        for (feature, value) in (first + (group * GROUP) as u32..).zip(values) {
            if !(*value <= limit) {
                found.push(Entry { feature, value: *value });
            }
        }
        if found.len() >= full {
            let least = trim(found, k);
            // Never below what it was: what is no number bounds nothing.
            *bound = bound.max(least);
        }
    }
}

/// Adds the entries of a row that are above a bound.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn scan(row: &[f32], bound: f32, first: u32, found: &mut Vec<Entry>) {
    for (group, values) in row.chunks(GROUP).enumerate() {
        if values.iter().map(|value| u32::from(!(*value <= bound))).sum::<u32>() == 0 {
            continue;
        }
        for (feature, value) in (first + (group * GROUP) as u32..).zip(values) {
            if !(*value <= bound) {
                found.push(Entry { feature, value: *value });
            }
        }
    }
}

/// How many entries of a tile [B, n] are above their feature's bound, `[n]`.
pub(super) fn count_above(tile: &Tensor, bounds: &[f32]) -> usize {
    let (rows, tile) = (tile.size()[0] as usize, numbers::<f32>(tile));
    let mut counts = vec![0_u64; rows];
    let out = Output::over(&mut counts);
    share_in(rows, 64, |range| {
        // SAFETY: ranges of rows do not overlap.
        for (count, row) in unsafe { out.part(range.clone()) }.iter_mut().zip(row_slices(tile, bounds.len(), range)) {
            *count = count_row(row, bounds).into();
        }
    });
    counts.iter().sum::<u64>() as usize
}

fn row_slices(tile: &[f32], width: usize, rows: Range<usize>) -> impl Iterator<Item = &[f32]> {
    rows.map(move |row| &tile[row * width..(row + 1) * width])
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn count_row(row: &[f32], bounds: &[f32]) -> u32 {
    row.iter().zip(bounds).map(|(value, bound)| u32::from(!(value <= bound))).sum()
}

/// The entries of a tile [B, n] above their feature's bound, `[n]`, and their values.
pub(super) fn above(tile: &Tensor, bounds: &[f32]) -> (Pattern, Tensor) {
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
                found.push(Entry { feature, value: *value });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn select(kept: Kept, rows: &Tensor, tile: i64) -> Tensor {
        let size = rows.size();
        let mut selector = Selector::new(kept, size[0] as usize);
        for first in (0..size[1]).step_by(tile as usize) {
            selector.offer(&rows.narrow(1, first, tile.min(size[1] - first)).contiguous());
        }
        let (pattern, values) = selector.finish();
        let (feature, row) = pattern.indices();
        let selected = rows.zeros_like();
        selected.index_put(&[Some(row.to_kind(Kind::Int64)), Some(feature.to_kind(Kind::Int64))], &values, false)
    }

    /// What libtorch selects.
    fn plainly(k: i64, rows: &Tensor) -> Tensor {
        let (values, indices) = rows.relu().topk(k.min(rows.size()[1]), -1, true, false);
        rows.zeros_like().scatter(-1, &indices, &values)
    }

    fn same(found: &Tensor, expected: &Tensor) {
        assert!(found.allclose(expected, 0.0, 0.0, true), "{found}\n{expected}");
    }

    #[test]
    fn as_libtorch_selects() {
        let options = (Kind::Float, Device::Cpu);
        for (rows, features, tile) in [(1, 1, 1), (1, 50, 7), (3, 17, 100), (40, 333, 64), (130, 64, 64)] {
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
    fn of_equal_ones_the_first() {
        let z = Tensor::from_slice2(&[[1.0f32, 2.0, 2.0, 2.0, 0.0, -0.0], [2.0, 1.0, 1.0, 1.0, 1.0, 3.0]]);
        let each = Tensor::from_slice2(&[[0.0f32, 2.0, 2.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0, 3.0]]);
        same(&select(Kept::OfEach(2), &z, 4), &each);
        let batch = Tensor::from_slice2(&[[0.0f32, 2.0, 2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 3.0]]);
        same(&select(Kept::OfBatch(4), &z, 4), &batch);
        // So many that they are trimmed on the way.
        let ones = Tensor::ones([2, 500], (Kind::Float, Device::Cpu));
        let first = Tensor::arange(500, (Kind::Int64, Device::Cpu)).less(3).to_kind(Kind::Float).expand_as(&ones);
        same(&select(Kept::OfEach(3), &ones, 64), &first);
    }

    #[test]
    fn what_is_no_number_is_not_overlooked() {
        let mut z = Tensor::randn([4, 400], (Kind::Float, Device::Cpu));
        let _ = z.get(2).narrow(0, 390, 1).fill_(f64::NAN);
        let _ = z.get(1).narrow(0, 3, 1).fill_(f64::INFINITY);
        for kept in [Kept::OfEach(2), Kept::OfBatch(8)] {
            let selected = select(kept, &z, 100);
            assert!(selected.get(2).isnan().any().int64_value(&[]) == 1 && selected.isinf().any().int64_value(&[]) == 1);
        }
        z = z.fill_(f64::NAN);
        assert!(select(Kept::OfEach(2), &z, 100).isnan().any().int64_value(&[]) == 1);
    }

    #[test]
    fn above_bounds() {
        let z = Tensor::randn([37, 100], (Kind::Float, Device::Cpu));
        let bounds = Tensor::randn([100], (Kind::Float, Device::Cpu));
        let (pattern, values) = above(&z, numbers(&bounds));
        let expected = z.greater_tensor(&bounds);
        assert_eq!(pattern.len() as i64, expected.sum(Kind::Int64).int64_value(&[]));
        assert_eq!(count_above(&z, numbers(&bounds)), pattern.len());
        let (feature, row) = pattern.indices();
        same(&values, &z.index(&[Some(row), Some(feature)]));
    }
}
