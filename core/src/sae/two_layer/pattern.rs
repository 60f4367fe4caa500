//! Sparse entries of a matrix `[B, n]`, and the products that need only these.

use std::ops::Range;

use multiversion::multiversion;
use tch::{Device, Kind, Tensor};

use crate::machine::parallel::{Output, numbers, share, share_in};

/// One entry of a row: the bits of its value, then its inverted feature index. A larger integer means a larger positive
/// value (NaN is the largest) or, among equal values, a lower feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry(u64);

impl Entry {
    #[inline(always)]
    pub fn new(feature: u32, value: f32) -> Self {
        Entry(u64::from(value.to_bits()) << 32 | u64::from(!feature))
    }

    #[inline(always)]
    pub fn feature(self) -> u32 {
        !(self.0 as u32)
    }

    #[inline(always)]
    pub fn value(self) -> f32 {
        f32::from_bits((self.0 >> 32) as u32)
    }
}

/// Positions of the entries, ordered by feature and then by row. A vector with one value per entry in this order
/// represents a matrix that is 0 elsewhere.
#[derive(Debug)]
pub(crate) struct Pattern {
    /// Offset of each feature's first entry, `[n + 1]`.
    of_feature: Vec<u32>,
    /// Feature of each entry.
    feature: Vec<u32>,
    /// Row of each entry.
    row: Vec<u32>,
    /// Offset of each row's part of `by_row`, `[B + 1]`.
    of_row: Vec<u32>,
    /// Indices of the entries, ordered by row and then by feature.
    by_row: Vec<u32>,
}

impl Pattern {
    /// Builds the pattern and the entries' values from rows of entries in ascending feature order.
    pub fn new(rows: &[Vec<Entry>], features: usize) -> (Self, Tensor) {
        let count: usize = rows.iter().map(Vec::len).sum();
        assert!(u32::try_from(count).is_ok(), "{count} entries are too many for a list");
        let mut next = vec![0_u32; features + 1];
        for entry in rows.iter().flatten() {
            next[entry.feature() as usize + 1] += 1;
        }
        for feature in 0..features {
            next[feature + 1] += next[feature];
        }
        let of_feature = next.clone();
        let (mut feature, mut row, mut by_row) = (vec![0; count], vec![0; count], Vec::with_capacity(count));
        let (mut of_row, mut values) = (Vec::with_capacity(rows.len() + 1), vec![0.0_f32; count]);
        of_row.push(0);
        for (index, entries) in rows.iter().enumerate() {
            for entry in entries {
                let place = &mut next[entry.feature() as usize];
                let at = *place as usize;
                *place += 1;
                (feature[at], row[at], values[at]) = (entry.feature(), index as u32, entry.value());
                by_row.push(at as u32);
            }
            of_row.push(by_row.len() as u32);
        }
        (Pattern { of_feature, feature, row, of_row, by_row }, Tensor::from_slice(&values))
    }

    pub fn rows(&self) -> usize {
        self.of_row.len() - 1
    }

    pub fn features(&self) -> usize {
        self.of_feature.len() - 1
    }

    pub fn len(&self) -> usize {
        self.row.len()
    }

    fn entries_of(&self, feature: usize) -> Range<usize> {
        self.of_feature[feature] as usize..self.of_feature[feature + 1] as usize
    }

    fn entries_in(&self, row: usize) -> &[u32] {
        &self.by_row[self.of_row[row] as usize..self.of_row[row + 1] as usize]
    }

    /// Returns the pattern of a range of features, and the range of its entries.
    pub fn narrow(&self, features: Range<usize>) -> (Self, Range<usize>) {
        let entries = self.of_feature[features.start] as usize..self.of_feature[features.end] as usize;
        let first = entries.start as u32;
        let (mut of_row, mut by_row) = (vec![0], Vec::with_capacity(entries.len()));
        for row in 0..self.rows() {
            let own = self.entries_in(row).iter().filter(|entry| entries.contains(&(**entry as usize)));
            by_row.extend(own.map(|entry| entry - first));
            of_row.push(by_row.len() as u32);
        }
        let narrowed = Pattern {
            of_feature: self.of_feature[features.start..=features.end].iter().map(|entry| entry - first).collect(),
            feature: self.feature[entries.clone()].iter().map(|feature| feature - features.start as u32).collect(),
            row: self.row[entries.clone()].to_vec(),
            of_row,
            by_row,
        };
        (narrowed, entries)
    }

    /// Returns each entry's feature and row, int32.
    pub fn indices(&self) -> (Tensor, Tensor) {
        let tensor = |indices: &[u32]| Tensor::from_slice(&indices.iter().map(|i| *i as i32).collect::<Vec<_>>());
        (tensor(&self.feature), tensor(&self.row))
    }

    /// Returns the work per row or feature, in multiplications, if the entries are divided among `count` of them.
    fn load(&self, count: usize, width: usize) -> usize {
        (self.len() * width / count.max(1)).max(1)
    }

    /// out `[B, d]` += V W, for the matrix V of `values` and W `[n, d]`.
    pub fn decode(&self, values: &Tensor, weight: &Tensor, out: &mut Tensor) {
        let width = self.check(values, weight, self.features());
        assert!(out.size() == [self.rows() as i64, width as i64]);
        let (values, weight, out) = (numbers::<f32>(values), numbers::<f32>(weight), Output::<f32>::of(out));
        share(self.rows(), self.load(self.rows(), width), |rows| {
            for row in rows {
                // SAFETY: ranges of rows do not overlap.
                let out = unsafe { out.part(row * width..(row + 1) * width) };
                let entries = self.entries_in(row);
                add_rows(out, weight, entries.len(), |i| {
                    let entry = entries[i] as usize;
                    (values[entry], self.feature[entry] as usize)
                });
            }
        });
    }

    /// out `[n, d]` = Vᵀ X, for the matrix V of `values` and X `[B, d]`.
    pub fn accumulate(&self, values: &Tensor, vectors: &Tensor, out: &mut Tensor) {
        let width = self.check(values, vectors, self.rows());
        assert!(out.size() == [self.features() as i64, width as i64]);
        let (values, vectors, out) = (numbers::<f32>(values), numbers::<f32>(vectors), Output::<f32>::of(out));
        share(self.features(), self.load(self.features(), width), |features| {
            for feature in features {
                // SAFETY: ranges of features do not overlap.
                let out = unsafe { out.part(feature * width..(feature + 1) * width) };
                let entries = self.entries_of(feature);
                out.fill(0.0);
                add_rows(out, vectors, entries.len(), |i| {
                    (values[entries.start + i], self.row[entries.start + i] as usize)
                });
            }
        });
    }

    /// Returns the entries of X Wᵀ, for X `[B, d]` and W `[n, d]`.
    pub fn products(&self, vectors: &Tensor, weight: &Tensor) -> Tensor {
        let width = weight.size()[1] as usize;
        assert!(vectors.size() == [self.rows() as i64, width as i64] && weight.size()[0] == self.features() as i64);
        let mut products = Tensor::empty([self.len() as i64], (Kind::Float, Device::Cpu));
        let (vectors, weight, out) = (numbers::<f32>(vectors), numbers::<f32>(weight), Output::of(&mut products));
        share(self.features(), self.load(self.features(), width), |features| {
            for feature in features {
                let entries = self.entries_of(feature);
                // SAFETY: features share no entries.
                let out = unsafe { out.part(entries.clone()) };
                dots(out, &weight[feature * width..(feature + 1) * width], vectors, &self.row[entries]);
            }
        });
        products
    }

    /// out `[n]` += the sum of each feature's values.
    pub fn sum_by_feature(&self, values: &Tensor, out: &mut Tensor) {
        assert!(values.size() == [self.len() as i64] && out.size() == [self.features() as i64]);
        let (values, out) = (numbers::<f32>(values), Output::<f32>::of(out));
        share_in(self.features(), 1 << 10, |features| {
            // SAFETY: ranges of features do not overlap.
            let out = unsafe { out.part(features.clone()) };
            for (out, feature) in out.iter_mut().zip(features) {
                *out += values[self.entries_of(feature)].iter().sum::<f32>();
            }
        });
    }

    /// Folds each row's values, `[B]`.
    pub fn fold_rows(&self, values: &Tensor, start: f32, fold: impl Fn(f32, f32) -> f32) -> Tensor {
        assert!(values.size() == [self.len() as i64]);
        let values = numbers::<f32>(values);
        let of = |row| self.entries_in(row).iter().fold(start, |sum, entry| fold(sum, values[*entry as usize]));
        Tensor::from_slice(&(0..self.rows()).map(of).collect::<Vec<f32>>())
    }

    /// Asserts that the shapes fit, and returns the width of `matrix`.
    fn check(&self, values: &Tensor, matrix: &Tensor, rows: usize) -> usize {
        let size = matrix.size();
        assert!(values.size() == [self.len() as i64] && size[0] == rows as i64);
        size[1] as usize
    }
}

/// out += Σ value · matrix row, over `count` pairs of a value and a row index.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn add_rows(out: &mut [f32], matrix: &[f32], count: usize, pair: impl Fn(usize) -> (f32, usize)) {
    let width = out.len();
    let row = |index: usize| &matrix[index * width..(index + 1) * width];
    let fours = count / 4 * 4;
    for i in (0..fours).step_by(4) {
        let [(a, x), (b, y), (c, z), (d, w)] = [pair(i), pair(i + 1), pair(i + 2), pair(i + 3)];
        let (x, y, z, w) = (row(x), row(y), row(z), row(w));
        for ((((out, x), y), z), w) in out.iter_mut().zip(x).zip(y).zip(z).zip(w) {
            *out += (a * x + b * y) + (c * z + d * w);
        }
    }
    for i in fours..count {
        let (value, index) = pair(i);
        for (out, x) in out.iter_mut().zip(row(index)) {
            *out += value * x;
        }
    }
}

/// Partial sums that vector instructions accumulate in parallel.
const LANES: usize = 32;

/// out[i] = weight · row `rows[i]` of the matrix.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2+fma"))]
fn dots(out: &mut [f32], weight: &[f32], matrix: &[f32], rows: &[u32]) {
    let width = weight.len();
    for (out, row) in out.iter_mut().zip(rows) {
        let x = &matrix[*row as usize * width..(*row as usize + 1) * width];
        let mut sums = [0.0_f32; LANES];
        let (x_lanes, w_lanes) = (x.chunks_exact(LANES), weight.chunks_exact(LANES));
        let rest: f32 = x_lanes.remainder().iter().zip(w_lanes.remainder()).map(|(x, w)| x * w).sum();
        for (x, w) in x_lanes.zip(w_lanes) {
            for ((sum, x), w) in sums.iter_mut().zip(x).zip(w) {
                *sum += x * w;
            }
        }
        *out = sums.iter().sum::<f32>() + rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_products_match_dense_ones() {
        let options = (Kind::Float, Device::Cpu);
        for (rows, features, width, part) in [(1, 1, 1, 1.0), (5, 7, 33, 0.4), (64, 100, 96, 0.1), (9, 40, 512, 0.0)] {
            let dense = Tensor::randn([rows, features], options) * Tensor::rand([rows, features], options).less(part);
            let list = |row: i64| -> Vec<Entry> {
                let values = Vec::<f32>::try_from(dense.get(row)).unwrap();
                let entries = values.into_iter().zip(0..);
                entries.filter(|(v, _)| *v != 0.0).map(|(value, feature)| Entry::new(feature, value)).collect()
            };
            let (pattern, values) = Pattern::new(&(0..rows).map(list).collect::<Vec<_>>(), features as usize);
            let (x, w) = (Tensor::randn([rows, width], options), Tensor::randn([features, width], options));
            let close = |found: &Tensor, expected: &Tensor| {
                assert!(found.allclose(expected, 1e-4, 1e-4, false), "{found}\n{expected}");
            };
            let mut decoded = Tensor::ones([rows, width], options);
            pattern.decode(&values, &w, &mut decoded);
            close(&decoded, &(dense.matmul(&w) + 1.0));
            let mut accumulated = Tensor::zeros([features, width], options);
            pattern.accumulate(&values, &x, &mut accumulated);
            close(&accumulated, &dense.tr().matmul(&x));
            let mut sums = Tensor::zeros([features], options);
            pattern.sum_by_feature(&values, &mut sums);
            close(&sums, &dense.sum_dim_intlist([0].as_slice(), false, Kind::Float));
            close(
                &pattern.fold_rows(&values, 0.0, |a, b| a + b),
                &dense.sum_dim_intlist([1].as_slice(), false, Kind::Float),
            );
            let (feature, row) = pattern.indices();
            let expected = x.matmul(&w.tr()).index(&[Some(row), Some(feature)]);
            close(&pattern.products(&x, &w), &expected);
            // Same for a range of features.
            let half = features / 2..features;
            let (narrowed, entries) = pattern.narrow(half.start as usize..half.end as usize);
            let (first, count) = (half.start, half.end - half.start);
            let values = values.narrow(0, entries.start as i64, entries.len() as i64);
            let mut decoded = Tensor::zeros([rows, width], options);
            narrowed.decode(&values, &w.narrow(0, first, count), &mut decoded);
            close(&decoded, &dense.narrow(1, first, count).matmul(&w.narrow(0, first, count)));
        }
    }
}
