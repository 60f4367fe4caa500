//! Metrics: how good a trained dictionary is.

use std::collections::BTreeMap;
use std::fmt::Debug;

use anyhow::Result;

use crate::dictionary::Dictionary;
use crate::source::ActivationSource;

/// The config of a metric.
#[typetag::serde(tag = "type")]
pub trait MetricConfig: Debug + Send + Sync {
    /// The metric.
    fn build(&self) -> Result<Box<dyn Metric>>;
}

/// What a metric found of one dictionary, by name.
pub type Figures = BTreeMap<&'static str, f64>;

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

    /// Why the metric cannot be computed on this source, if it cannot.
    fn refuses(&self, source: &mut dyn ActivationSource) -> Option<String> {
        let _ = source;
        None
    }
}
