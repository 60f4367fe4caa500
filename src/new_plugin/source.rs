//! `example_name`: activations that are cosine waves. Change it into your own.

use dictlearn_core::prelude::*;
use dictlearn_core::data::sampled_mean_squared_norms;

/// Waves: dimension i of the n-th activation is cos((i + 1) n / 10).
#[component(source "example_name", summary = "Activations that are waves", example = "{type: example_name, width: 32}")]
pub struct ExampleNameConfig {
    /// Width of an activation, d.
    #[schemars(range(min = 1))]
    pub width: i64,
    /// Number of activations in a batch.
    #[default(256)]
    #[schemars(range(min = 1))]
    pub batch_size: i64,
}

impl SourceConfig for ExampleNameConfig {
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        Ok(Box::new(ExampleName { config: self.clone(), batch: 0, cx: *cx }))
    }
}

struct ExampleName {
    config: ExampleNameConfig,
    /// Number of batches delivered.
    batch: i64,
    cx: SourceCx,
}

impl ActivationSource for ExampleName {
    fn sites(&self) -> Vec<Site> {
        vec![Site::new(ExampleNameConfig::NAME, (self.config.width, self.config.width))]
    }

    fn next_batch(&mut self) -> Result<Option<Activations>> {
        // Draw random numbers from `dictlearn_core::machine::rng`, whose state can be saved.
        let options = (Kind::Float, self.cx.device);
        let first = self.batch * self.config.batch_size;
        self.batch += 1;
        let rows = Tensor::arange_start(first, first + self.config.batch_size, options).unsqueeze(1);
        let waves = Tensor::arange_start(1, self.config.width + 1, options);
        Ok(Some(Batch::of((rows * waves * 0.1).cos()).into()))
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
