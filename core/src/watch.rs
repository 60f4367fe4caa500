//! Numbers that must be finite, watched without waiting for a GPU.

use tch::{Kind, Tensor};

/// Remembers when any of some numbers was first not finite.
///
/// Nothing is read while it looks: a GPU would have to be waited for, and would stand still until it got its next work.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    names: Vec<&'static str>,
    /// For each name the first step at which it was not finite, int64 `[n]`; [`NEVER`] if it always was.
    first: Option<Tensor>,
}

const NEVER: i64 = i64::MAX;

impl Watch {
    /// Looks at the numbers of a step by their names, tensors of any shape.
    pub fn see<'a>(&mut self, step: u64, numbers: impl IntoIterator<Item = (&'static str, &'a Tensor)>) {
        let (names, finite): (Vec<_>, Vec<_>) = numbers
            .into_iter()
            .map(|(name, tensor)| (name, if tensor.dim() == 0 { tensor.isfinite() } else { tensor.isfinite().all() }))
            .unzip();
        let finite = Tensor::stack(&finite, 0);
        let never = Tensor::full([1], NEVER, (Kind::Int64, finite.device()));
        let now = never.where_self(&finite, &Tensor::full([1], step as i64, (Kind::Int64, finite.device())));
        let before = self.first.take().filter(|_| self.names == names);
        self.first = Some(before.map_or_else(|| now.shallow_clone(), |before| before.minimum(&now)));
        self.names = names;
    }

    /// The first step at which something was not finite, and the last of its names. Waits for the GPU.
    pub fn found(&self) -> Option<(u64, &'static str)> {
        let first = Vec::<i64>::try_from(self.first.as_ref()?).ok()?;
        let earliest = *first.iter().min().filter(|step| **step < NEVER)?;
        let name = self.names.iter().zip(&first).filter(|(_, step)| **step == earliest).next_back()?.0;
        Some((earliest as u64, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_remembered() {
        let mut watch = Watch::default();
        assert_eq!(watch.found(), None);
        let one = Tensor::from(1.0);
        let matrix = |value: f32| Tensor::from_slice(&[1.0, value]);
        for (step, a, b) in [(3, 1.0, 2.0), (4, 2.0, f32::INFINITY), (5, f32::NAN, 1.0)] {
            watch.see(step, [("one", &one), ("a", &matrix(a)), ("b", &matrix(b))]);
            assert_eq!(watch.found(), (step > 3).then_some((4, "b")));
        }
    }
}
