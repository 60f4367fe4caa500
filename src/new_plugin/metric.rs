//! `example_name`: how alike the directions of a decoder are, to be changed into yours.

use dictlearn_core::prelude::*;

/// How alike the directions of a decoder are: the mean, over features, of the greatest cosine with another feature.
#[component(metric "example_name", summary = "How alike the directions of a decoder are",
    example = "{type: example_name}")]
pub struct ExampleNameConfig {
    /// At most so many features are compared, the first ones.
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
    /// Of directions [F, d].
    fn alike(&self, directions: &Tensor) -> f64 {
        let rows = directions.narrow(0, 0, self.features.min(directions.size()[0]));
        let unit = &rows / rows.norm_scalaropt_dim(2.0, [1], true).clamp_min(1e-12);
        let cosines = unit.matmul(&unit.tr()).fill_diagonal_(-1.0, false);
        cosines.amax([1], false).mean(Kind::Float).double_value(&[])
    }
}
