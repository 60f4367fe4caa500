//! `example_name`: a logarithmic penalty on features, added to the trainer's loss. Change it into your own.
//!
//! ```text
//! L += weight · mean Σ log(1 + f)
//! ```

use dictlearn_core::prelude::*;

/// A logarithmic penalty on features.
#[component(modifier "example_name", summary = "A logarithmic penalty on features",
    example = "{type: example_name, weight: 0.01}")]
pub struct ExampleNameConfig {
    /// Weight of the penalty in the loss.
    #[schemars(range(min = 0))]
    pub weight: f64,
}

impl ModifierConfig for ExampleNameConfig {
    // `fn needs` declares requirements on the dictionary and the trainer; this modifier has none.

    fn build(&self, _cx: &ModifierCx) -> Result<Box<dyn Modifier>> {
        Ok(Box::new(self.clone()))
    }
}

impl Modifier for ExampleNameConfig {
    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        terms.add("example_name", mean_of_sums(&pass.code.penalized().log1p()), self.weight);
        Ok(())
    }
}
