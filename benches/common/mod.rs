//! Helpers shared by the benchmarks of a training step.

use dictlearn_core::data::Batch;
use dictlearn_core::train::Training;
use tch::Tensor;

/// Lowers the biases until one feature in a hundred fires, as later in training. Returns false, and changes nothing, if
/// k decides how many fire.
pub fn silence(training: &Training, batch: &Batch) -> bool {
    let dictionary = &training.dictionary;
    let Some(encoder) = dictionary.encoder().filter(|_| dictionary.selection().is_none()) else { return false };
    let code = tch::no_grad(|| dictionary.forward(&batch.x));
    let Some(pre_activations) = code.get("pre_activations") else { return false };
    let shift = pre_activations.std(false).double_value(&[]) * 2.33;
    for (name, mut bias) in dictionary.parameters() {
        // `r_mag` is a scale; it is listed because resampling resets it too.
        if encoder.biases.contains(&name) && name != "r_mag" {
            let shifted: Tensor = bias.detach() - shift;
            tch::no_grad(|| bias.copy_(&shifted));
        }
    }
    true
}
