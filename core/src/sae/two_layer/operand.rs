//! Factors of matrix products.

use std::cell::OnceCell;

use tch::Tensor;

use crate::machine::device::Precision;

/// A factor of matrix products: its exact values, and a lazy copy in the dtype of products.
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

    /// Selects rows.
    pub(crate) fn select(&self, rows: &Tensor) -> Self {
        Operand::new(self.exact.index_select(0, rows), self.precision)
    }

    /// Appends this many rows of zeros.
    pub(crate) fn and_zeros(self, rows: i64) -> Self {
        Operand::new(self.exact.constant_pad_nd([0, 0, 0, rows]), self.precision)
    }
}
