//! The activations of one forward pass, put into the text's order.

use dictlearn_core::prelude::*;

/// Activations of rows that ran together, [n, width] for each hook point, and last their tokens, [n, 3].
pub type Columns = Vec<Tensor>;

/// Activations of a forward pass over several contexts. Contexts of similar length ran together; writing restores the
/// text's order.
pub struct Harvested {
    parts: Vec<Part>,
    count: i64,
}

struct Part {
    columns: Columns,
    /// Index of each row in the text's order, int64 `[n]`.
    at: Tensor,
}

impl Harvested {
    /// Combines parts. Each comes with the indices of its contexts and their numbers of rows; `contexts` is the number
    /// of all contexts.
    pub fn new(parts: Vec<(Columns, Vec<(usize, i64)>)>, contexts: usize) -> Self {
        let mut starts = vec![0; contexts + 1];
        for (context, count) in parts.iter().flat_map(|(_, counts)| counts) {
            starts[context + 1] = *count;
        }
        for context in 0..contexts {
            starts[context + 1] += starts[context];
        }
        let part = |(columns, counts): (Columns, Vec<(usize, i64)>)| {
            let rows = counts.iter().flat_map(|(context, count)| starts[*context]..starts[*context] + count);
            let at = Tensor::from_slice(&rows.collect::<Vec<i64>>()).to_device(columns[0].device());
            Part { columns, at }
        };
        Harvested { count: starts[contexts], parts: parts.into_iter().map(part).collect() }
    }

    /// Returns the number of rows.
    pub fn count(&self) -> i64 {
        self.count
    }

    /// Writes all rows to the first rows of `out`, [at least count, width] for each column, in the text's order.
    pub fn write(&self, out: &[Tensor]) {
        for Part { columns, at } in &self.parts {
            for (out, column) in out.iter().zip(columns) {
                let _ = out.narrow(0, 0, self.count).index_copy_(0, at, column);
            }
        }
    }

    /// Returns the rows in the text's order, in new tensors.
    pub fn in_order(&self, columns: &[(i64, Kind)], device: Device) -> Columns {
        let column = |(width, kind): &(i64, Kind)| Tensor::empty([self.count, *width], (*kind, device));
        let columns: Columns = columns.iter().map(column).collect();
        self.write(&columns);
        columns
    }

    /// Removes rows whose norm, in any of the columns `of`, exceeds `multiple` times the median over all rows.
    pub fn without_outliers(self, multiple: f64, of: &[usize]) -> Self {
        let Some(first) = self.parts.first() else { return self };
        let kept = Tensor::ones([self.count], (Kind::Bool, first.at.device()));
        for column in of {
            let norms = self.parts.iter().map(|part| part.columns[*column].norm_scalaropt_dim(2.0, [-1], false));
            let norms: Vec<Tensor> = norms.collect();
            let most = Tensor::cat(&norms, 0).median() * multiple;
            for (part, norms) in self.parts.iter().zip(&norms) {
                let both = kept.index_select(0, &part.at).logical_and(&norms.le_tensor(&most));
                let _ = kept.shallow_clone().index_copy_(0, &part.at, &both);
            }
        }
        let ranks = kept.cumsum(0, Kind::Int64) - 1;
        let part = |Part { columns, at }: Part| {
            let here = kept.index_select(0, &at).nonzero().reshape([-1]);
            let columns = columns.iter().map(|column| column.index_select(0, &here)).collect();
            Part { columns, at: ranks.index_select(0, &at.index_select(0, &here)) }
        };
        let parts: Vec<Part> = self.parts.into_iter().map(part).collect();
        Harvested { count: parts.iter().map(|part| part.at.size()[0]).sum(), parts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(rows: &[f32]) -> Tensor {
        Tensor::from_slice(rows).unsqueeze(1)
    }

    /// Contexts 0, 2 and 3 ran together, then the longer context 1 alone.
    fn harvested() -> Harvested {
        let together = (vec![column(&[0.0, 1.0, 5.0])], vec![(2, 0), (0, 2), (3, 1)]);
        Harvested::new(vec![together, (vec![column(&[-2.0, 3.0, 90.0])], vec![(1, 3)])], 4)
    }

    fn numbers(harvested: &Harvested) -> Vec<f32> {
        let columns = harvested.in_order(&[(1, Kind::Float)], Device::Cpu);
        Vec::try_from(columns[0].reshape([-1])).unwrap()
    }

    #[test]
    fn rows_are_written_in_the_order_of_the_text() {
        assert_eq!((harvested().count(), numbers(&harvested())), (6, vec![0.0, 1.0, -2.0, 3.0, 90.0, 5.0]));
        let out = Tensor::full([8, 1], -1.0, (Kind::Float, Device::Cpu));
        harvested().write(&[out.narrow(0, 1, 7)]);
        let out = Vec::<f32>::try_from(out.reshape([-1])).unwrap();
        assert_eq!(out, [-1.0, 0.0, 1.0, -2.0, 3.0, 90.0, 5.0, -1.0]);
    }

    #[test]
    fn removed_outliers_leave_no_gap() {
        // The median of the norms 0, 1, 2, 3, 5, 90 is 2.
        assert_eq!(numbers(&harvested().without_outliers(2.0, &[0])), [0.0, 1.0, -2.0, 3.0]);
        assert_eq!(numbers(&harvested().without_outliers(2.5, &[0])), [0.0, 1.0, -2.0, 3.0, 5.0]);
    }
}
