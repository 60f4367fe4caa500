//! Metrics: how good a trained dictionary is.

use std::fmt::Debug;

use anyhow::Result;
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use crate::data::ActivationSource;
use crate::sae::Dictionary;

/// The config of a metric. A config that implements [`Metric`] itself is its own metric and needs no implementation.
pub trait MetricConfig: Debug + Send + Sync {
    /// The metric.
    fn build(&self) -> Result<Box<dyn Metric>>;
}

impl<M: Metric + Debug + Clone + Send + Sync + 'static> MetricConfig for M {
    fn build(&self) -> Result<Box<dyn Metric>> {
        Ok(Box::new(self.clone()))
    }
}

crate::tagged::tagged! {
    /// A metric's config, by `type`.
    TaggedMetric: MetricConfig => Metric {}
}

/// What a metric found of one dictionary, by name: numbers, or lists and maps of them.
pub type Figures = Map<String, Value>;

/// Figures that are numbers. One that is not finite becomes null, as JSON has it.
pub fn figures<const N: usize>(found: [(&str, f64); N]) -> Figures {
    found.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}

/// A dictionary to measure.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The dictionary.
    pub dictionary: &'a dyn Dictionary,
    /// Which of the source's sites it is for, by number.
    pub site: usize,
}

/// A metric. All dictionaries of a run are measured on the same data.
pub trait Metric {
    /// Measures each dictionary on its site; one map of name and figure for each, in their order.
    ///
    /// Names are the reference's. Dictionaries come as saved: they take activations as the model makes them. `None`
    /// where the source had nothing left to measure on; the metric is then asked again from the beginning of the data.
    fn evaluate(&mut self, subjects: &[Subject], source: &mut dyn ActivationSource) -> Result<Option<Vec<Figures>>>;

    /// Bytes that measuring takes beside the dictionary's own step, at most.
    fn memory(&self, source: &mut dyn ActivationSource) -> u64 {
        let _ = source;
        0
    }

    /// Why the metric cannot be computed on this source, if it cannot.
    fn refuses(&self, source: &mut dyn ActivationSource) -> Option<String> {
        let _ = source;
        None
    }
}

/// Variance of vectors, dimension by dimension, over several batches. It is merged from each batch's mean and squared
/// deviations (Chan et al. 1983), so that neither a large mean nor a long run loses digits.
#[derive(Debug, Default)]
pub struct Variance {
    count: f64,
    mean: Option<Tensor>,
    squared_deviations: f64,
}

impl Variance {
    /// Adds a batch, [B, d].
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

    /// Sum over dimensions, up to a factor that all have in common.
    pub fn total(&self) -> f64 {
        self.squared_deviations
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn variance_in_parts_is_variance_of_the_whole() {
        let x = Tensor::randn([100, 3], (Kind::Float, Device::Cpu)) + 1000.0;
        let mut parts = Variance::default();
        for part in x.split(7, 0) {
            parts.add(&part);
        }
        let whole = x.to_kind(Kind::Double).var_dim([0].as_slice(), true, false).sum(Kind::Double).double_value(&[]);
        assert!((parts.total() / 99.0 / whole - 1.0).abs() < 1e-9);
    }
}
