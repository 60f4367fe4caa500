//! `example_name`: activations of independent normal numbers, to be changed into yours.

use dictlearn_core::prelude::*;
use dictlearn_core::source::sampled_mean_squared_norms;

/// The name in a config.
const NAME: &str = "example_name";

/// Independent normal numbers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExampleNameConfig {
    /// Width of an activation, d.
    #[schemars(range(min = 1))]
    pub width: i64,
    /// Activations in a batch.
    #[serde(default = "batch_size")]
    #[schemars(range(min = 1))]
    pub batch_size: i64,
}

fn batch_size() -> i64 {
    256
}

register! {
    source ExampleNameConfig, NAME,
    summary: "Independent normal numbers",
    paper: "",
    example: "{type: example_name, width: 32}",
}

#[typetag::serde(name = NAME)]
impl SourceConfig for ExampleNameConfig {
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        Ok(Box::new(ExampleName { config: self.clone(), batch: 0, cx: *cx }))
    }
}

struct ExampleName {
    config: ExampleNameConfig,
    /// How many batches were given.
    batch: i64,
    cx: SourceCx,
}

impl ActivationSource for ExampleName {
    fn sites(&self) -> Vec<Site> {
        vec![Site::new(NAME, (self.config.width, self.config.width))]
    }

    fn next_batch(&mut self) -> Result<Option<Activations>> {
        // Each batch has a seed of its own, so that where the stream stands is one number.
        tch::manual_seed(self.cx.seed as i64 + self.batch);
        self.batch += 1;
        let x = Tensor::randn([self.config.batch_size, self.config.width], (Kind::Float, Device::Cpu));
        Ok(Some(Batch::of(x.to_device(self.cx.device)).into()))
    }

    fn is_endless(&self) -> bool {
        true
    }

    fn rewind(&mut self) -> Result<()> {
        self.batch = 0;
        Ok(())
    }

    fn mean_squared_norms(&mut self) -> Result<Vec<f64>> {
        sampled_mean_squared_norms(self)
    }

    fn describe(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.put("batch", self.batch)?;
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.batch = state.get("batch")?;
        Ok(())
    }
}
