//! Numbers that must be finite, watched without waiting for a GPU.

use std::cell::Cell;

use anyhow::Result;
use tch::{Kind, Tensor};

/// Remembers some numbers of each step until it is asked whether they were finite.
///
/// Nothing is read while it looks: a GPU would have to be waited for, and would stand still until it got its next work.
#[derive(Debug, Default)]
pub struct Watch {
    names: Vec<&'static str>,
    /// Of the steps since it was asked, [STEPS, n].
    seen: Option<Tensor>,
    steps: Vec<u64>,
    found: Cell<Option<Found>>,
}

/// A number that was not finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// Step, counted from 0.
    pub step: u64,
    /// Its name: that of a term of the loss, say.
    pub name: &'static str,
    /// The number.
    pub value: f64,
}

/// How many steps are remembered; then it asks itself.
const STEPS: i64 = 1024;

impl Watch {
    /// Looks at the numbers of a step by their names, scalars.
    pub fn see<'a>(&mut self, step: u64, numbers: impl IntoIterator<Item = (&'static str, &'a Tensor)>) -> Result<()> {
        let (names, values): (Vec<_>, Vec<Tensor>) =
            numbers.into_iter().map(|(name, number)| (name, number.to_kind(Kind::Float))).unzip();
        if names != self.names || self.steps.len() as i64 == STEPS {
            self.found()?;
            self.steps.clear();
            self.names = names;
            self.seen = None;
        }
        let Some(first) = values.first() else { return Ok(()) };
        let size = [STEPS, values.len() as i64];
        let seen = self.seen.get_or_insert_with(|| Tensor::zeros(size, (Kind::Float, first.device())));
        let _ = tch::no_grad(|| Tensor::stack_out(&seen.get(self.steps.len() as i64), &values, 0));
        self.steps.push(step);
        Ok(())
    }

    /// The first number that was not finite. Waits for the GPU.
    pub fn found(&self) -> Result<Option<Found>> {
        if let (None, Some(seen)) = (self.found.get(), &self.seen) {
            let seen = seen.narrow(0, 0, self.steps.len() as i64).reshape([-1]);
            let values = Vec::<f32>::try_from(seen)?;
            let rows = values.chunks_exact(self.names.len()).zip(&self.steps);
            let mut all = rows.flat_map(|(row, step)| {
                let named = row.iter().zip(&self.names);
                named.map(|(value, name)| Found { step: *step, name, value: f64::from(*value) })
            });
            self.found.set(all.find(|number| !number.value.is_finite()));
        }
        Ok(self.found.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_remembered() {
        let mut watch = Watch::default();
        assert_eq!(watch.found().unwrap(), None);
        let found = Some(Found { step: 4, name: "b", value: f64::INFINITY });
        for (step, a, b) in [(3, 1.0, 2.0), (4, 2.0, f32::INFINITY), (5, f32::NAN, 1.0)] {
            let [one, a, b] = [1.0, a, b].map(Tensor::from);
            watch.see(step, [("one", &one), ("a", &a), ("b", &b)]).unwrap();
            assert_eq!(watch.found().unwrap(), if step == 3 { None } else { found });
        }
        // Other numbers, and more steps than have room.
        for step in 6..3000 {
            watch.see(step, [("other", &Tensor::from(1.0_f32))]).unwrap();
        }
        assert_eq!(watch.found().unwrap(), found);
        let mut watch = Watch::default();
        for step in 0..3000 {
            watch.see(step, [("a", &Tensor::from(if step == 1500 { f32::NAN } else { 1.0 }))]).unwrap();
        }
        assert_eq!(watch.found().unwrap().map(|found| found.step), Some(1500));
    }
}
