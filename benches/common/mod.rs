//! What the benchmarks of a training step share.

use dictlearn_core::data::Batch;
use dictlearn_core::train::Training;
use tch::Tensor;

/// Lowers the biases until one feature in a hundred fires, as after the beginning of training; not, and false, where k
/// decides that.
pub fn silence(training: &Training, batch: &Batch) -> bool {
    let dictionary = &training.dictionary;
    let Some(encoder) = dictionary.encoder().filter(|_| dictionary.selection().is_none()) else { return false };
    let code = tch::no_grad(|| dictionary.forward(&batch.x));
    let Some(pre_activations) = code.get("pre_activations") else { return false };
    let shift = pre_activations.std(false).double_value(&[]) * 2.33;
    for (name, mut bias) in dictionary.parameters() {
        // A scale is none, though what starts anew forgets it too.
        if encoder.biases.contains(&name) && name != "r_mag" {
            let shifted: Tensor = bias.detach() - shift;
            tch::no_grad(|| bias.copy_(&shifted));
        }
    }
    true
}
