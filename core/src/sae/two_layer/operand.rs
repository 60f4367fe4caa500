//! Factors of products.

use std::cell::OnceCell;

use tch::Tensor;

use crate::machine::device::Precision;

/// A factor of products: its numbers, and these in the type that products are computed in.
#[derive(Debug)]
pub(crate) struct Operand {
    pub(crate) exact: Tensor,
    pub(crate) precision: Precision,
    pub(crate) cast: OnceCell<Tensor>,
}

impl Operand {
    pub(crate) fn new(exact: Tensor, precision: Precision) -> Self {
        Operand { exact, precision, cast: OnceCell::new() }
    }

    pub(crate) fn exact(&self) -> &Tensor {
        &self.exact
    }

    pub(crate) fn for_products(&self) -> &Tensor {
        match self.precision {
            Precision::Float32 => &self.exact,
            precision => self.cast.get_or_init(|| self.exact.to_kind(precision.kind())),
        }
    }

    /// Some rows.
    pub(crate) fn select(&self, rows: &Tensor) -> Self {
        Operand::new(self.exact.index_select(0, rows), self.precision)
    }

    /// With so many rows of zeros more.
    pub(crate) fn and_zeros(self, rows: i64) -> Self {
        Operand::new(self.exact.constant_pad_nd([0, 0, 0, rows]), self.precision)
    }
}
