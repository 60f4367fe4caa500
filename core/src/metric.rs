//! Metrics: how good a trained dictionary is.

use std::collections::BTreeMap;
use std::fmt::Debug;

use anyhow::Result;

use crate::dictionary::Dictionary;
use crate::source::ActivationSource;

/// The config of a metric.
#[typetag::serde(tag = "type")]
pub trait MetricConfig: Debug + Send + Sync {
    /// The metric for these dictionaries (their number; the runtime side keeps totals for each).
    fn build(&self) -> Result<Box<dyn Metric>>;
}

/// A metric. All dictionaries of a run are measured on the same data.
pub trait Metric {
    /// Measures each dictionary; one map of name and figure for each, in their order.
    ///
    /// Names are the reference's. Dictionaries come as saved: they take activations as the model makes them.
    fn evaluate(
        &mut self,
        dictionaries: &[&dyn Dictionary],
        source: &mut dyn ActivationSource,
    ) -> Result<Vec<BTreeMap<&'static str, f64>>>;

    /// Why the metric cannot be computed on this source, if it cannot.
    fn refuses(&self, source: &mut dyn ActivationSource) -> Option<String> {
        let _ = source;
        None
    }
}
