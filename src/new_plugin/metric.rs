//! `example_name`: the similarity of decoder directions. Change it into your own.

use dictlearn_core::prelude::*;

/// Similarity of decoder directions: the mean, over features, of the greatest cosine with another feature.
#[component(metric "example_name", summary = "Similarity of decoder directions",
    example = "{type: example_name}")]
pub struct ExampleNameConfig {
    /// Maximum number of features compared: the first ones.
    #[default(4096)]
    #[schemars(range(min = 2))]
    pub features: i64,
}

impl Metric for ExampleNameConfig {
    fn evaluate(&mut self, subjects: &[Subject], _source: &mut dyn ActivationSource) -> Result<Option<Vec<Figures>>> {
        let found = |subject: &Subject| {
            let alike = subject.dictionary.directions().map_or(f64::NAN, |directions| self.alike(&directions));
            figures([("example_name", alike)])
        };
        Ok(Some(subjects.iter().map(found).collect()))
    }
}

impl ExampleNameConfig {
    /// Returns the similarity of directions [F, d].
    fn alike(&self, directions: &Tensor) -> f64 {
        let rows = directions.narrow(0, 0, self.features.min(directions.size()[0]));
        let unit = &rows / rows.norm_scalaropt_dim(2.0, [1], true).clamp_min(1e-12);
        let cosines = unit.matmul(&unit.tr()).fill_diagonal_(-1.0, false);
        cosines.amax([1], false).mean(Kind::Float).double_value(&[])
    }
}
