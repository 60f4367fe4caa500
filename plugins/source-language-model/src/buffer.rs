//! The buffer of activations. It serves random batches, and is refilled when half of it is served.

use dictlearn_core::machine::rng::Rng;
use dictlearn_core::prelude::*;
use rand::seq::SliceRandom;

/// Rows copied at a time when the buffer is compacted, which bounds the extra memory.
const CHUNK: usize = 16_384;

/// A buffer of rows of several tensors.
pub struct Buffer {
    /// Tensors [capacity, width].
    columns: Vec<Tensor>,
    capacity: usize,
    /// Row indices in serving order.
    order: Vec<u32>,
    /// A copy of `order` on the device, int64. Sending it once instead of batch by batch avoids a GPU sync per batch.
    order_on_device: Option<Tensor>,
    served: usize,
    /// True after an interrupted refill: the rows are not shuffled, and are served only after the refill is complete.
    unfilled: bool,
    rng: Rng,
}

impl Buffer {
    /// Makes an empty buffer. Allocates all memory now, so that a shortage shows at the start.
    pub fn new(columns: &[(i64, Kind)], capacity: usize, device: Device, rng: Rng) -> Self {
        let column = |(width, kind): &(i64, Kind)| Tensor::empty([capacity as i64, *width], (*kind, device));
        Buffer {
            columns: columns.iter().map(column).collect(),
            capacity,
            order: Vec::new(),
            order_on_device: None,
            served: 0,
            unfilled: false,
            rng,
        }
    }

    /// Returns the number of rows not yet served.
    pub fn unread(&self) -> usize {
        self.order.len() - self.served
    }

    /// True if less than half of the capacity is unread, or a refill was interrupted.
    pub fn wants_more(&self) -> bool {
        self.unfilled || self.unread() < self.capacity / 2
    }

    /// Refills the buffer: moves unread rows to the front, appends rows from `more` until it ends or the buffer is
    /// full, and shuffles. `more` gets the free rows of each column, and returns how many of them it wrote.
    ///
    /// If `more` fails, the rows so far are kept. The next refill continues there, with the same result.
    pub fn fill(&mut self, mut more: impl FnMut(&[Tensor]) -> Result<Option<i64>>) -> Result<()> {
        let mut unread = self.order.split_off(self.served);
        unread.sort_unstable();
        // In sorted order, no move overwrites a row that is still to be moved.
        for (chunk, start) in unread.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            let from: Vec<i64> = chunk.iter().map(|row| i64::from(*row)).collect();
            for column in &self.columns {
                let rows = column.index_select(0, &Tensor::from_slice(&from).to_device(column.device()));
                column.narrow(0, start, chunk.len() as i64).copy_(&rows);
            }
        }
        let mut count = unread.len();
        while count < self.capacity {
            let free = |column: &Tensor| column.narrow(0, count as i64, (self.capacity - count) as i64);
            let added = match more(&self.columns.iter().map(free).collect::<Vec<_>>()) {
                Ok(Some(added)) => added,
                Ok(None) => break,
                Err(error) => {
                    (self.order, self.served, self.unfilled) = ((0..count as u32).collect(), 0, true);
                    self.order_on_device = None;
                    return Err(error);
                }
            };
            count += added as usize;
        }
        (self.order, self.served, self.unfilled) = ((0..count as u32).collect(), 0, false);
        self.order_on_device = None;
        self.order.shuffle(&mut self.rng);
        Ok(())
    }

    /// Serves the next `count` rows; `None` if fewer are left.
    pub fn take(&mut self, count: usize) -> Option<Vec<Tensor>> {
        self.order.get(self.served..self.served + count)?;
        let (device, order) = (self.columns[0].device(), &self.order);
        let order = self.order_on_device.get_or_insert_with(|| {
            let order: Vec<i64> = order.iter().map(|row| i64::from(*row)).collect();
            Tensor::from_slice(&order).to_device(device)
        });
        let rows = order.narrow(0, self.served as i64, count as i64);
        self.served += count;
        Some(self.columns.iter().map(|column| column.index_select(0, &rows)).collect())
    }

    /// Returns the mean squared norm of a part of a column over the unread rows.
    pub fn mean_squared_norm(&self, column: usize, part: &Part) -> f64 {
        let filled = self.columns[column].narrow(0, 0, self.order.len() as i64);
        let mut sum = 0.0;
        for chunk in self.order[self.served..].chunks(CHUNK) {
            let rows: Vec<i64> = chunk.iter().map(|row| i64::from(*row)).collect();
            let rows = filled.index_select(0, &Tensor::from_slice(&rows).to_device(filled.device()));
            sum += part.of(&rows).square().sum(Kind::Double).double_value(&[]);
        }
        sum / self.unread().max(1) as f64
    }

    /// Drops all rows.
    pub fn clear(&mut self) {
        self.order.clear();
        self.order_on_device = None;
        (self.served, self.unfilled) = (0, false);
    }

    /// Returns one column of the first row, which is the oldest.
    pub fn first_row(&self, column: usize) -> Option<Tensor> {
        (!self.order.is_empty()).then(|| self.columns[column].get(0))
    }

    /// Returns the state: the unread rows of the columns from `kept` on, their order and the generator.
    pub fn state(&self, kept: usize) -> Result<State> {
        let mut unread = self.order[self.served..].to_vec();
        unread.sort_unstable();
        // Ranks among the unread rows are their indices once only these are saved.
        let rank = |row: &u32| unread.binary_search(row).unwrap_or_default() as u32;
        let order: Vec<u32> = self.order[self.served..].iter().map(rank).collect();
        let rows: Vec<i64> = unread.iter().map(|row| i64::from(*row)).collect();
        let mut state = State::new();
        for (index, column) in self.columns.iter().enumerate().skip(kept) {
            let rows = Tensor::from_slice(&rows).to_device(column.device());
            state.put_own(format!("column{index}"), column.index_select(0, &rows));
        }
        let order: Vec<i32> = order.into_iter().map(|row| row as i32).collect();
        state.put_own("order", Tensor::from_slice(&order));
        state.put("unfilled", self.unfilled)?;
        state.put("rng", &self.rng)?;
        Ok(state)
    }

    /// Restores a state from [`Buffer::state`], with all columns of its rows.
    pub fn restore(&mut self, state: &State, columns: &[Tensor]) -> Result<()> {
        let order = Vec::<i32>::try_from(state.tensor("order")?)?;
        if order.len() > self.capacity {
            bail!(InputError::new("the buffer in the checkpoint is larger than this run's"));
        }
        for (column, rows) in self.columns.iter().zip(columns) {
            column.narrow(0, 0, order.len() as i64).copy_(rows);
        }
        self.order = order.into_iter().map(|row| row as u32).collect();
        self.order_on_device = None;
        self.served = 0;
        self.unfilled = state.get("unfilled")?;
        self.rng = state.get("rng")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dictlearn_core::machine::rng::rng;

    /// Writes up to three numbered rows.
    fn write(room: &[Tensor], first: i64) -> i64 {
        let count = room[0].size()[0].min(3);
        let rows = Tensor::arange_start(first, first + count, (Kind::Float, Device::Cpu)).unsqueeze(1);
        room[0].narrow(0, 0, count).copy_(&rows);
        count
    }

    /// Refills a buffer with numbered rows, from `next` on.
    fn refill(buffer: &mut Buffer, next: &mut i64) {
        buffer
            .fill(|room| {
                let count = write(room, *next);
                *next += count;
                Ok(Some(count))
            })
            .unwrap();
    }

    fn columns(state: &State) -> Vec<Tensor> {
        vec![state.tensor("column0").unwrap().shallow_clone()]
    }

    fn served(buffer: &mut Buffer, next: &mut i64, batches: usize) -> Vec<f32> {
        let mut all = Vec::new();
        for _ in 0..batches {
            if buffer.wants_more() {
                refill(buffer, next);
            }
            all.extend(Vec::<f32>::try_from(buffer.take(2).unwrap()[0].reshape([-1])).unwrap());
        }
        all
    }

    /// Makes a buffer of ten rows; `name` seeds its order.
    fn small(name: &str) -> Buffer {
        Buffer::new(&[(1, Kind::Float)], 10, Device::Cpu, rng(1, name))
    }

    /// Returns the state of a buffer after `count` batches, the next row to fill in, and the rows of the 15 batches
    /// that follow.
    fn interrupted(count: usize) -> (State, i64, Vec<f32>) {
        let mut buffer = small("buffer");
        let mut next = 0;
        served(&mut buffer, &mut next, count);
        let (state, at) = (buffer.state(0).unwrap(), next);
        (state, at, served(&mut buffer, &mut next, 15))
    }

    #[test]
    fn every_row_is_served_once() {
        let mut buffer = small("buffer");
        let mut next = 0;
        let mut all = served(&mut buffer, &mut next, 20);
        while let Some(rows) = buffer.take(1) {
            all.push(rows[0].double_value(&[0, 0]) as f32);
        }
        assert_ne!(all[..10], (0..10).map(|row| row as f32).collect::<Vec<_>>()[..]);
        all.sort_by(f32::total_cmp);
        assert_eq!(all, (0..next).map(|row| row as f32).collect::<Vec<_>>());
    }

    #[test]
    fn an_interrupted_refill_continues_with_the_same_result() {
        let (state, at, expected) = interrupted(3);
        let new = || small("other");
        let mut broken = new();
        broken.restore(&state, &columns(&state)).unwrap();
        let mut next = at;
        let broke_off = broken.fill(|room| {
            if next > at {
                bail!("interrupted");
            }
            next += write(room, at);
            Ok(Some(next - at))
        });
        assert!(broke_off.is_err() && broken.wants_more());
        let state = broken.state(0).unwrap();
        for mut buffer in [broken, new()] {
            buffer.restore(&state, &columns(&state)).unwrap();
            let mut next = next;
            assert_eq!(served(&mut buffer, &mut next, 15), expected);
        }
    }

    #[test]
    fn a_restored_buffer_serves_the_same_rows() {
        let (state, mut next, expected) = interrupted(2);
        let mut other = small("other");
        other.restore(&state, &columns(&state)).unwrap();
        assert_eq!(served(&mut other, &mut next, 15), expected);
    }
}
