//! A part of a batch's pre-activations, with the products that a step by hand takes of it.

use std::cell::OnceCell;
use std::ops::Range;

use tch::{Kind, Tensor};

use super::map;
use super::pattern::Pattern;
use super::Operand;
use crate::device::Precision;

/// Pre-activations z of some of the features, for all B rows of a batch: either all of them, [B, n], or only those that
/// matter, `[entries]`. Where it says "as z", a tensor has z's shape, and belongs to it number by number.
#[derive(Debug)]
pub struct Block {
    /// The pre-activations.
    pub z: Tensor,
    features: Range<i64>,
    precision: Precision,
    entries: Option<Entries>,
}

/// One number for each entry of a block, to calculate with.
#[derive(Debug)]
pub enum Input<'a> {
    /// Its own: a tensor as z.
    Each(&'a Tensor),
    /// Its feature's: of a vector `[F]`.
    Feature(&'a Tensor),
    /// The same for all.
    Same(f64),
}

/// Of a block that holds some entries alone.
#[derive(Debug)]
struct Entries {
    pattern: Pattern,
    /// Each entry's feature, counted from the block's first, and row, where they are asked for.
    indices: OnceCell<(Tensor, Tensor)>,
}

impl Entries {
    fn of_features(&self, vector: &Tensor) -> Tensor {
        vector.index_select(0, &self.indices.get_or_init(|| self.pattern.indices()).0)
    }

    fn of_rows(&self, vector: &Tensor) -> Tensor {
        vector.index_select(0, &self.indices.get_or_init(|| self.pattern.indices()).1)
    }
}

impl Block {
    pub(super) fn dense(z: Tensor, first: i64, precision: Precision) -> Self {
        let features = first..first + z.size()[1];
        Block { z, features, precision, entries: None }
    }

    pub(super) fn sparse((pattern, z): (Pattern, Tensor), first: i64, precision: Precision) -> Self {
        let features = first..first + pattern.features() as i64;
        Block { z, features, precision, entries: Some(Entries { pattern, indices: OnceCell::new() }) }
    }

    fn own(&self, of_all: &Tensor) -> Tensor {
        of_all.narrow(0, self.features.start, self.features.end - self.features.start)
    }

    /// Calculates for each entry O numbers, as z but of the kind of the products' operands, and S numbers of which each feature's sum is taken, `[n]`, in one pass
    /// over memory. The block must be on a CPU.
    pub fn map<const I: usize, const O: usize, const S: usize>(
        &self,
        inputs: [Input; I],
        function: impl Fn([f32; I]) -> ([f32; O], [f32; S]) + Sync,
    ) -> ([Tensor; O], [Tensor; S]) {
        let owned = inputs.map(|input| match (input, &self.entries) {
            (Input::Each(tensor), _) => {
                assert!(tensor.size() == self.z.size(), "{:?} is not as z, {:?}", tensor.size(), self.z.size());
                map::Row::of_each(tensor)
            }
            (Input::Feature(vector), None) => map::Row::repeated(&self.own(vector)),
            (Input::Feature(vector), Some(entries)) => map::Row::of_each(&entries.of_features(&self.own(vector))),
            (Input::Same(value), _) => map::Row::same(value as f32),
        });
        match &self.entries {
            None => map::tile(&self.z.size(), self.precision.kind(), owned, function),
            Some(entries) => {
                let (outputs, summed) = map::list(self.z.size()[0], owned, function);
                let features = [self.features.end - self.features.start];
                let sums = summed.map(|values| {
                    let mut sums = Tensor::zeros(features, (Kind::Float, values.device()));
                    entries.pattern.sum_by_feature(&values, &mut sums);
                    sums
                });
                (outputs, sums)
            }
        }
    }

    /// Adds to each feature of `sums` `[F]` what [`Block::map`] found for the block's.
    pub fn add_sums(&self, found: &Tensor, sums: &Tensor) {
        let mut own = self.own(sums);
        own += found;
    }

    /// Of a vector `[B]` each entry's number: what can be calculated with z.
    pub fn of_rows(&self, vector: &Tensor) -> Tensor {
        match &self.entries {
            None => vector.unsqueeze(1),
            Some(entries) => entries.of_rows(vector),
        }
    }

    /// Adds to each feature of `sums` `[F]` the sum of its values, which are as z.
    pub fn sum_by_feature(&self, values: &Tensor, sums: &mut Tensor) {
        let mut own = self.own(sums);
        match &self.entries {
            None => own += values.sum_dim_intlist([0].as_slice(), false, Kind::Float),
            Some(entries) => entries.pattern.sum_by_feature(&values.contiguous(), &mut own),
        }
    }

    /// For each row the sum of its values, which are as z: `[B]`.
    pub fn sum_by_row(&self, values: &Tensor) -> Tensor {
        match &self.entries {
            None => values.sum_dim_intlist([1].as_slice(), false, Kind::Float),
            Some(entries) => entries.pattern.fold_rows(&values.contiguous(), 0.0, |sum, value| sum + value),
        }
    }

    /// For each row its smallest pre-activation above 0: `[B]`, infinite where there is none.
    pub fn smallest_positive(&self) -> Tensor {
        let z = self.z.masked_fill(&self.z.le(0.0), f64::INFINITY);
        match &self.entries {
            None => z.amin([1], false),
            Some(entries) => entries.pattern.fold_rows(&z, f32::INFINITY, f32::min),
        }
    }

    /// The features `range` of the block, counted from its first.
    pub(super) fn narrow(&self, range: Range<i64>) -> Block {
        let first = self.features.start + range.start;
        match &self.entries {
            None => Block::dense(self.z.narrow(1, range.start, range.end - range.start), first, self.precision),
            Some(entries) => {
                let (pattern, own) = entries.pattern.narrow(range.start as usize..range.end as usize);
                let z = self.z.narrow(0, own.start as i64, own.len() as i64);
                Block::sparse((pattern, z), first, self.precision)
            }
        }
    }

    /// out [B, d] += V W: what features of these values, as z, decode to by directions W [F, d].
    pub(super) fn decode(&self, values: &Tensor, weight: &Operand, out: &mut Tensor) {
        match &self.entries {
            None => {
                let (values, weight) = (self.cast(values), self.own(weight.for_products()));
                match self.precision {
                    Precision::Float32 => drop(out.addmm_(&values, &weight)),
                    Precision::BFloat16 => *out += self.precision.product(&values, &weight),
                }
            }
            Some(entries) => entries.pattern.decode(&values.contiguous(), &self.own(weight.exact()), out),
        }
    }

    /// As z, but of the kind of the products' operands, each entry's product of its row of X [B, d] and its feature's row of
    /// W [F, d].
    pub(super) fn products(&self, vectors: &Operand, weight: &Operand) -> Tensor {
        match &self.entries {
            None => vectors.for_products().matmul(&self.own(weight.for_products()).tr()),
            Some(entries) => entries.pattern.products(vectors.exact(), &self.own(weight.exact())),
        }
    }

    /// out [F, d] = Vᵀ X, in the block's rows, for values as z and X [B, d].
    pub(super) fn accumulate(&self, values: &Tensor, vectors: &Operand, out: &mut Tensor) {
        let mut own = self.own(out);
        match &self.entries {
            None => {
                let (values, vectors) = (self.cast(values).tr(), vectors.for_products());
                match self.precision {
                    Precision::Float32 => drop(values.mm_out(&own, vectors)),
                    Precision::BFloat16 => own.copy_(&values.matmul(vectors)),
                }
            }
            Some(entries) => entries.pattern.accumulate(&values.contiguous(), vectors.exact(), &mut own),
        }
    }

    fn cast(&self, values: &Tensor) -> Tensor {
        values.to_kind(self.precision.kind())
    }
}
