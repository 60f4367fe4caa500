//! `example_name`: how alike the directions of a decoder are, to be changed into yours.

use dictlearn_core::prelude::*;

/// The name in a config.
const NAME: &str = "example_name";

/// How alike the directions of a decoder are: the mean, over features, of the greatest cosine with another feature.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExampleNameConfig {
    /// At most so many features are compared, the first ones.
    #[serde(default = "features")]
    #[schemars(range(min = 2))]
    pub features: i64,
}

fn features() -> i64 {
    4096
}

register! {
    metric ExampleNameConfig, NAME,
    summary: "How alike the directions of a decoder are",
    paper: "",
    example: "{type: example_name}",
}

#[typetag::serde(name = NAME)]
impl MetricConfig for ExampleNameConfig {
    fn build(&self) -> Result<Box<dyn Metric>> {
        Ok(Box::new(self.clone()))
    }
}

impl Metric for ExampleNameConfig {
    fn evaluate(&mut self, subjects: &[Subject], _source: &mut dyn ActivationSource) -> Result<Option<Vec<Figures>>> {
        let figures = |subject: &Subject| {
            let alike = subject.dictionary.decoder().map_or(f64::NAN, |decoder| self.alike(&decoder));
            Figures::from([("example_name", alike)])
        };
        Ok(Some(subjects.iter().map(figures).collect()))
    }
}

impl ExampleNameConfig {
    fn alike(&self, decoder: &Decoder) -> f64 {
        let rows = if decoder.feature_dim == 0 { decoder.weight.shallow_clone() } else { decoder.weight.tr() };
        let rows = rows.narrow(0, 0, self.features.min(rows.size()[0]));
        let unit = &rows / rows.norm_scalaropt_dim(2.0, [1], true).clamp_min(1e-12);
        let cosines = unit.matmul(&unit.tr()).fill_diagonal_(-1.0, false);
        cosines.amax([1], false).mean(Kind::Float).double_value(&[])
    }
}
