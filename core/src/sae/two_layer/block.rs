//! A tile of a batch's pre-activations, with the products that an analytic step needs.

use std::cell::OnceCell;
use std::ops::Range;

use tch::{Kind, Tensor};

use super::map;
use super::operand::Operand;
use super::pattern::Pattern;
use crate::machine::device::{Precision, on_host};

/// Pre-activations z of a range of features for all B rows: all of them `[B, n]`, or only the relevant ones
/// `[entries]`. A tensor "in the shape of z" has the same shape and element order as z.
#[derive(Debug)]
pub struct Block {
    /// Pre-activations.
    pub z: Tensor,
    features: Range<i64>,
    precision: Precision,
    entries: Option<Entries>,
}

/// Input of [`Block::map`]: one value for each entry of a block.
#[derive(Debug)]
pub enum Input<'a> {
    /// One value per entry: a tensor in the shape of z.
    Each(&'a Tensor),
    /// The same value for all.
    Same(f64),
}

/// Positions of the entries in a sparse block.
#[derive(Debug)]
enum Entries {
    /// On a CPU: a pattern that supports sparse products.
    Listed {
        pattern: Pattern,
        /// Each entry's feature, relative to the block's first, and row. Computed on first use.
        indices: OnceCell<(Tensor, Tensor)>,
    },
    /// As libtorch's `topk` returned them. Products use a dense matrix that is 0 elsewhere.
    Scattered {
        /// Flat index of each entry, row · number of features + feature, int64 `[entries]`.
        at: Tensor,
        rows: i64,
        /// Number of selections, each of the same size: one per row, or one for the batch.
        selections: i64,
    },
}

impl Entries {
    /// Returns each entry's feature and row.
    fn indices(&self, features: i64) -> (Tensor, Tensor) {
        match self {
            Entries::Listed { pattern, indices } => {
                let (features, rows) = indices.get_or_init(|| pattern.indices());
                (features.shallow_clone(), rows.shallow_clone())
            }
            Entries::Scattered { at, .. } => (at.remainder(features), at.divide_scalar_mode(features, "floor")),
        }
    }
}

impl Block {
    pub(crate) fn dense(z: Tensor, first: i64, precision: Precision) -> Self {
        let features = first..first + z.size()[1];
        Block { z, features, precision, entries: None }
    }

    pub(crate) fn sparse((pattern, z): (Pattern, Tensor), first: i64, precision: Precision) -> Self {
        let features = first..first + pattern.features() as i64;
        Block { z, features, precision, entries: Some(Entries::Listed { pattern, indices: OnceCell::new() }) }
    }

    /// Makes a block of the `selections` · k entries at flat indices `at` of a matrix `[rows, features]`.
    pub(crate) fn scattered(
        z: Tensor,
        at: Tensor,
        [rows, features]: [i64; 2],
        selections: i64,
        precision: Precision,
    ) -> Self {
        Block { z, features: 0..features, precision, entries: Some(Entries::Scattered { at, rows, selections }) }
    }

    fn width(&self) -> i64 {
        self.features.end - self.features.start
    }

    fn own(&self, of_all: &Tensor) -> Tensor {
        of_all.narrow(0, self.features.start, self.width())
    }

    /// Evaluates `function` on each entry in one pass over memory. Returns O outputs in the shape of z, in the
    /// precision's dtype, and S sums over each feature's entries, `[n]`. `function` receives an entry's inputs and its
    /// feature's elements of the vectors `[F]`.
    ///
    /// Panics if the block is not on a CPU.
    pub fn map<const I: usize, const P: usize, const O: usize, const S: usize>(
        &self,
        inputs: [Input; I],
        of_features: [&Tensor; P],
        function: impl Fn([f32; I], [f32; P]) -> ([f32; O], [f32; S]) + Sync,
    ) -> ([Tensor; O], [Tensor; S]) {
        assert!(on_host(self.z.device()), "`Block::map` needs a block on a CPU");
        let each = inputs.map(|input| match input {
            Input::Each(tensor) => {
                assert!(
                    tensor.size() == self.z.size(),
                    "shape {:?} is not that of z, {:?}",
                    tensor.size(),
                    self.z.size()
                );
                map::Row::of_each(tensor)
            }
            Input::Same(value) => map::Row::same(value as f32),
        });
        let of_features = of_features.map(|vector| match &self.entries {
            None => map::Row::repeated(&self.own(vector)),
            Some(entries) => map::Row::of_each(&self.own(vector).index_select(0, &entries.indices(self.width()).0)),
        });
        match &self.entries {
            None => map::tile(&self.z.size(), self.precision.kind(), each, of_features, function),
            Some(entries) => {
                let (outputs, summed) = map::list(self.z.size()[0], each, of_features, function);
                let sums = summed.map(|values| {
                    let mut sums = Tensor::zeros([self.width()], (Kind::Float, values.device()));
                    self.add_by_feature(entries, &values, &mut sums);
                    sums
                });
                (outputs, sums)
            }
        }
    }

    /// Adds per-feature sums `[n]` from [`Block::map`] to the block's features in `sums` `[F]`.
    pub fn add_sums(&self, found: &Tensor, sums: &Tensor) {
        let mut own = self.own(sums);
        own += found;
    }

    /// Expands a vector `[B]` so that it broadcasts with z.
    pub fn of_rows(&self, vector: &Tensor) -> Tensor {
        match &self.entries {
            None => vector.unsqueeze(1),
            Some(entries) => vector.index_select(0, &entries.indices(self.width()).1),
        }
    }

    /// Adds the sum of each feature's values, given in the shape of z, to `sums` `[F]`.
    pub fn sum_by_feature(&self, values: &Tensor, sums: &mut Tensor) {
        let mut own = self.own(sums);
        match &self.entries {
            None => own += values.sum_dim_intlist([0].as_slice(), false, Kind::Float),
            Some(entries) => self.add_by_feature(entries, &values.contiguous(), &mut own),
        }
    }

    fn add_by_feature(&self, entries: &Entries, values: &Tensor, sums: &mut Tensor) {
        match entries {
            Entries::Listed { pattern, .. } => pattern.sum_by_feature(values, sums),
            Entries::Scattered { .. } => drop(sums.index_add_(0, &entries.indices(self.width()).0, values)),
        }
    }

    /// Returns the sum of each row's values `[B]`, given in the shape of z.
    pub fn sum_by_row(&self, values: &Tensor) -> Tensor {
        match &self.entries {
            None => values.sum_dim_intlist([1].as_slice(), false, Kind::Float),
            Some(Entries::Listed { pattern, .. }) => {
                pattern.fold_rows(&values.contiguous(), 0.0, |sum, value| sum + value)
            }
            Some(entries @ Entries::Scattered { rows, .. }) => {
                let sums = Tensor::zeros([*rows], (Kind::Float, values.device()));
                sums.index_add(0, &entries.indices(self.width()).1, values)
            }
        }
    }

    /// Returns the smallest positive pre-activation of each selection (row or batch), or infinity if there is none.
    /// Listed entries give one value per row either way.
    pub fn smallest_positive(&self) -> Tensor {
        let z = self.z.masked_fill(&self.z.le(0.0), f64::INFINITY);
        match &self.entries {
            None => z.amin([1], false),
            Some(Entries::Listed { pattern, .. }) => pattern.fold_rows(&z, f32::INFINITY, f32::min),
            Some(Entries::Scattered { selections, .. }) => z.view([*selections, -1]).amin([1], false),
        }
    }

    /// Turns scattered entries into a dense block.
    pub(crate) fn matrix(self) -> Block {
        match &self.entries {
            Some(Entries::Scattered { .. }) => {
                Block::dense(self.full(&self.z, self.z.kind()), self.features.start, self.precision)
            }
            _ => self,
        }
    }

    /// Returns the features in `range`, relative to the block's first. The block must not have scattered entries.
    pub(crate) fn narrow(&self, range: Range<i64>) -> Block {
        let first = self.features.start + range.start;
        match &self.entries {
            None => Block::dense(self.z.narrow(1, range.start, range.end - range.start), first, self.precision),
            Some(Entries::Scattered { .. }) => unreachable!("`matrix` makes scattered blocks dense"),
            Some(Entries::Listed { pattern, .. }) => {
                let (pattern, own) = pattern.narrow(range.start as usize..range.end as usize);
                let z = self.z.narrow(0, own.start as i64, own.len() as i64);
                Block::sparse((pattern, z), first, self.precision)
            }
        }
    }

    /// out `[B, d]` += V W, for values V in the shape of z and directions W `[F, d]`.
    pub(crate) fn decode(&self, values: &Tensor, weight: &Operand, out: &mut Tensor) {
        match &self.entries {
            None | Some(Entries::Scattered { .. }) => {
                let (values, weight) = (self.cast(values), self.own(weight.for_products()));
                match self.precision {
                    Precision::Float32 => drop(out.addmm_(&values, &weight)),
                    Precision::BFloat16 => *out += self.precision.product(&values, &weight),
                }
            }
            Some(Entries::Listed { pattern, .. }) => {
                pattern.decode(&values.contiguous(), &self.own(weight.exact()), out)
            }
        }
    }

    /// Returns the entries of X Wᵀ in the shape of z, in the precision's dtype, for X `[B, d]` and W `[F, d]`.
    pub(crate) fn products(&self, vectors: &Operand, weight: &Operand) -> Tensor {
        match &self.entries {
            None => vectors.for_products().matmul(&self.own(weight.for_products()).tr()),
            Some(Entries::Scattered { at, .. }) => {
                vectors.for_products().matmul(&self.own(weight.for_products()).tr()).take(at)
            }
            Some(Entries::Listed { pattern, .. }) => pattern.products(vectors.exact(), &self.own(weight.exact())),
        }
    }

    /// out `[F, d]` = Vᵀ X in the block's rows, for values V in the shape of z and X `[B, d]`.
    pub(crate) fn accumulate(&self, values: &Tensor, vectors: &Operand, out: &mut Tensor) {
        let mut own = self.own(out);
        match &self.entries {
            None | Some(Entries::Scattered { .. }) => {
                let (values, vectors) = (self.cast(values).tr(), vectors.for_products());
                match self.precision {
                    Precision::Float32 => drop(values.mm_out(&own, vectors)),
                    Precision::BFloat16 => own.copy_(&values.matmul(vectors)),
                }
            }
            Some(Entries::Listed { pattern, .. }) => {
                pattern.accumulate(&values.contiguous(), vectors.exact(), &mut own)
            }
        }
    }

    /// Returns values as a matrix in the dtype of products.
    fn cast(&self, values: &Tensor) -> Tensor {
        match self.entries {
            Some(Entries::Scattered { .. }) => self.full(values, self.precision.kind()),
            _ => values.to_kind(self.precision.kind()),
        }
    }

    /// Returns values as a matrix `[B, n]` that is 0 elsewhere.
    fn full(&self, values: &Tensor, kind: Kind) -> Tensor {
        match &self.entries {
            Some(Entries::Scattered { at, rows, .. }) => {
                let mut full = Tensor::zeros([rows * self.width()], (kind, values.device()));
                full.scatter_(0, at, &values.to_kind(kind)).view([*rows, self.width()])
            }
            _ => values.to_kind(kind),
        }
    }
}
