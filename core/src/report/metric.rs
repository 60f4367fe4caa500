//! Metrics: measure trained dictionaries.

use std::fmt::Debug;

use anyhow::Result;
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use crate::data::ActivationSource;
use crate::sae::Dictionary;

/// The config of a metric. Any type that implements [`Metric`] is its own config.
pub trait MetricConfig: Debug + Send + Sync {
    /// Builds the metric.
    fn build(&self) -> Result<Box<dyn Metric>>;
}

impl<M: Metric + Debug + Clone + Send + Sync + 'static> MetricConfig for M {
    fn build(&self) -> Result<Box<dyn Metric>> {
        Ok(Box::new(self.clone()))
    }
}

crate::tagged::tagged! {
    /// A metric's config, tagged by `type`.
    TaggedMetric: MetricConfig => Metric {}
}

/// Figures of one dictionary by name: numbers, or lists and maps of numbers.
pub type Figures = Map<String, Value>;

/// Makes figures from numbers. A number that is not finite becomes null, since JSON cannot represent it.
pub fn figures<const N: usize>(found: [(&str, f64); N]) -> Figures {
    found.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}

/// A dictionary to measure.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The dictionary.
    pub dictionary: &'a dyn Dictionary,
    /// Index of the source's site that the dictionary belongs to.
    pub site: usize,
}

/// A metric. All dictionaries of a run are measured on the same data.
pub trait Metric {
    /// Measures each dictionary on its site. Returns one map of figures per dictionary, in order.
    ///
    /// Figures have the reference's names. Dictionaries are as saved: they take activations as the model makes them.
    /// Returns `None` if the source has no data left; the metric is then called again from the start of the data.
    fn evaluate(&mut self, subjects: &[Subject], source: &mut dyn ActivationSource) -> Result<Option<Vec<Figures>>>;

    /// Returns an upper bound of the memory that measuring needs beyond the dictionary's own step, in bytes.
    fn memory(&self, source: &mut dyn ActivationSource) -> u64 {
        let _ = source;
        0
    }

    /// Returns whether the metric gives dictionaries whole contexts `[.., L, d]`, which some need
    /// ([`Dictionary::reads_contexts`]). By default it gives single activations.
    fn gives_contexts(&self) -> bool {
        false
    }

    /// Returns why the metric cannot be computed on this source; `None` if it can.
    fn refuses(&self, source: &mut dyn ActivationSource) -> Option<String> {
        let _ = source;
        None
    }
}

/// Variance of vectors, per dimension, over several batches. Merges each batch's mean and squared deviations (Chan et
/// al. 1983), which is accurate for large means and long runs.
#[derive(Debug, Default)]
pub struct Variance {
    count: f64,
    mean: Option<Tensor>,
    squared_deviations: f64,
}

impl Variance {
    /// Adds a batch `[B, d]`.
    pub fn add(&mut self, x: &Tensor) {
        let x = x.to_kind(Kind::Double);
        let count = x.size()[0] as f64;
        let mean = x.mean_dim([0].as_slice(), false, Kind::Double);
        self.squared_deviations += (x - &mean).square().sum(Kind::Double).double_value(&[]);
        let all = self.count + count;
        self.mean = Some(match &self.mean {
            None => mean,
            Some(before) => {
                let apart = &mean - before;
                self.squared_deviations +=
                    apart.square().sum(Kind::Double).double_value(&[]) * self.count * count / all;
                before + apart * (count / all)
            }
        });
        self.count = all;
    }

    /// Returns the sum over dimensions, up to a constant factor.
    pub fn total(&self) -> f64 {
        self.squared_deviations
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn variance_of_parts_matches_variance_of_the_whole() {
        let x = Tensor::randn([100, 3], (Kind::Float, Device::Cpu)) + 1000.0;
        let mut parts = Variance::default();
        for part in x.split(7, 0) {
            parts.add(&part);
        }
        let whole = x.to_kind(Kind::Double).var_dim([0].as_slice(), true, false).sum(Kind::Double).double_value(&[]);
        assert!((parts.total() / 99.0 / whole - 1.0).abs() < 1e-9);
    }
}
