//! Detects values that are not finite without a GPU sync at every step.

use std::cell::Cell;

use anyhow::Result;
use tch::{Kind, Tensor};

/// Records scalars of each step on the device, until asked whether they are finite.
///
/// Recording reads no value, because a sync would leave the GPU idle until its next work arrives.
#[derive(Debug, Default)]
pub struct Watch {
    names: Vec<&'static str>,
    /// Values of the steps since the last check, `[STEPS, n]`.
    seen: Option<Tensor>,
    steps: Vec<u64>,
    found: Cell<Option<Found>>,
}

/// A value that is not finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// Step, counted from 0.
    pub step: u64,
    /// Name of the value, for example a term of the loss.
    pub name: &'static str,
    /// The value.
    pub value: f64,
}

/// Steps recorded between checks.
const STEPS: i64 = 1024;

impl Watch {
    /// Records a step's scalars by name.
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

    /// Returns the first value that was not finite. Waits for the GPU.
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
    fn first_nonfinite_value_is_kept() {
        let mut watch = Watch::default();
        assert_eq!(watch.found().unwrap(), None);
        let found = Some(Found { step: 4, name: "b", value: f64::INFINITY });
        for (step, a, b) in [(3, 1.0, 2.0), (4, 2.0, f32::INFINITY), (5, f32::NAN, 1.0)] {
            let [one, a, b] = [1.0, a, b].map(Tensor::from);
            watch.see(step, [("one", &one), ("a", &a), ("b", &b)]).unwrap();
            assert_eq!(watch.found().unwrap(), if step == 3 { None } else { found });
        }
        // Different names, and more steps than the buffer holds.
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
