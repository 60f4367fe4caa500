//! Describes a run for `--dry-run`.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::config::RunConfig;
use crate::run::build::build;
use dictlearn_core::data::{Batch, Site};
use dictlearn_core::files::tensors;
use dictlearn_core::machine::device;
use dictlearn_core::machine::memory::Size;
use dictlearn_core::train::analytic::AnalyticPass;
use dictlearn_core::train::{Gradients, Terms, Training};

/// Describes the shapes and the memory of a run. Writes nothing.
pub fn plan(config: &mut RunConfig) -> Result<String> {
    let mut run = build(config, None)?;
    let (precision, why) = config.precision.precision(run.device);
    let mut lines = vec![
        format!("device: {}", device::name(run.device)),
        format!("matrix products in training: {precision} ({why})"),
    ];
    if run.device == Device::Cpu {
        lines.push(format!("other loops: {} on {} threads", device::cpu_vectors(), tch::get_num_threads()));
    }
    for (site, Site { activation_dim, output_dim, .. }) in run.batches.sites.iter().enumerate() {
        lines.push(format!("activations{}: width {activation_dim} -> {output_dim}", run.batches.at(site)));
    }
    for sae in &mut run.trainees.0 {
        let steps = match why_autograd(&mut sae.training)? {
            None => "analytic gradients".to_owned(),
            Some(why) => format!("gradients by autograd ({why})"),
        };
        let dictionary = &sae.training.dictionary;
        let weights: usize = dictionary.state_dict().iter().map(|(_, tensor)| tensors::bytes(tensor)).sum();
        let dims = dictionary.dims();
        lines.push(format!(
            "{}: {} {} x {} features, {} of weights, {steps}",
            sae.name(),
            dictionary.class(),
            dims.input,
            dims.features,
            Size(weights as u64)
        ));
        for (name, tensor) in dictionary.state_dict() {
            lines.push(format!("  {name} {:?}", tensor.size()));
        }
    }
    lines.extend(run.memory.lines());
    lines.extend(run.memory.parts());
    Ok(lines.join("\n"))
}

/// Returns why an SAE's steps need autograd, if they are not analytic. Takes the loss of a batch of zeros, so the SAE
/// must not be trained afterwards.
fn why_autograd(training: &mut Training) -> Result<Option<&'static str>> {
    if training.is_modified() {
        return Ok(Some("its modifiers need it"));
    }
    let dictionary = &*training.dictionary;
    let dims = dictionary.dims();
    let zeros = |width| Tensor::zeros([1, width], (Kind::Float, dictionary.device()));
    let batch = Batch { x: zeros(dims.input), target: zeros(dims.output) };
    let gradients = Gradients::new(dictionary.parameters());
    let pass = AnalyticPass { step: 0, batch: &batch, dictionary, gradients: &gradients, logging: false };
    if tch::no_grad(|| training.trainer.analytic(&pass, &mut Terms::new()))?.is_some() {
        return Ok(None);
    }
    Ok(Some(if device::on_host(dictionary.device()) {
        "the trainer or the dictionary has no analytic step"
    } else {
        "the trainer or the dictionary has no analytic step on a GPU"
    }))
}
