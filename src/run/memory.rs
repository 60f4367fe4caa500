//! The memory that an SAE needs in training.

use dictlearn_core::files::tensors::bytes;
use dictlearn_core::machine::device;
use dictlearn_core::machine::memory::MemoryNeed;
use dictlearn_core::sae::{Between, Selection};
use dictlearn_core::train::Training;

/// Returns the memory that an SAE needs in training, with batches of `batch_size` activations.
pub(super) fn of_training(training: &Training, batch_size: i64) -> Vec<MemoryNeed> {
    let dictionary = &training.dictionary;
    let dims = dictionary.dims();
    let weights = dictionary.parameters().iter().map(|(_, tensor)| bytes(tensor) as u64).sum::<u64>();
    let batch = |width: i64| batch_size as u64 * width as u64 * 4;
    let between = if training.is_modified() { None } else { dictionary.between() };
    let on_host = device::on_host(dictionary.device());
    let k = dictionary.selection().map(Selection::k);
    // Quarters of a float32 tensor [B, F]. Measured on a CPU (docs/performance.md), where an analytic step with few
    // selected features never holds all. Counted on a GPU, which holds values, values among zeros, and derivatives.
    let quarters = match between {
        Some(Between::Selection(selection)) if on_host && 4 * selection.k() <= dims.features => 0,
        Some(Between::Selection(_)) if !on_host => 12,
        Some(Between::Elementwise(_)) if on_host => 5,
        Some(Between::Elementwise(activation)) if activation.on_gpu() => 20,
        _ => 36,
    };
    // Selected entries: k of each row, or the activations' width while k is annealed. The TopK family's auxiliary loss
    // selects half as many dead features, and copies their weights.
    let selected = k.map_or(0, |k| batch_size as u64 * (k + dims.input) as u64 * 64 + 2 * weights);
    let features = quarters * batch(dims.features) / 4 + selected;
    let step = features + 6 * (batch(dims.input) + batch(dims.output));
    let name = &training.name;
    let knob = "its `dict_size`, or the number of SAEs";
    vec![
        MemoryNeed::lasting(format!("SAE `{name}` with gradients and moments"), 4 * weights, knob),
        MemoryNeed::lasting(format!("SAE `{name}` in a checkpoint"), 3 * weights, knob).on_host(),
        MemoryNeed::passing(format!("a step of SAE `{name}`"), step, "the source's batch size"),
        // Folded, and packed for Python.
        MemoryNeed::passing(format!("SAE `{name}` while it is saved"), 3 * weights, knob).on_host(),
    ]
}
