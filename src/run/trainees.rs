//! The SAEs of a run. One whose loss or gradients are not finite skips the batch, or stops while the others continue.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::Tensor;

use crate::config::RunConfig;
use crate::run::outputs::Outputs;
use crate::run::skips::{SKIPS, Skips};
use dictlearn_core::data::{Batch, OnNonfinite};
use dictlearn_core::error::InputError;
use dictlearn_core::files::state::State;
use dictlearn_core::sae::Dictionary;
use dictlearn_core::train::{NotFinite, Training, TrainingCx};

/// An SAE at one of the source's sites.
pub(super) struct Trainee {
    pub(super) training: Training,
    pub(super) cx: TrainingCx,
    pub(super) site: usize,
    /// Index of its entry in the config; an entry that trains at several sites has several SAEs.
    pub(super) entry: usize,
    /// Norm that its site's activations are divided by.
    norm: f64,
    /// Why it stopped; its weights are those before that step.
    stopped: Option<Stopped>,
    skipped: Skips,
}

/// Why an SAE stopped.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stopped {
    step: u64,
    why: String,
}

impl Trainee {
    pub(super) fn new(training: Training, cx: TrainingCx, site: usize, entry: usize) -> Self {
        Trainee { training, cx, site, entry, norm: 1.0, stopped: None, skipped: Skips::default() }
    }

    pub(super) fn name(&self) -> &str {
        &self.training.name
    }

    /// Returns the dictionary as it is saved.
    pub(super) fn folded(&self) -> Result<Box<dyn Dictionary>> {
        self.training.folded(self.norm)
    }
}

/// All SAEs of a run.
pub(super) struct Trainees(pub(super) Vec<Trainee>);

impl Trainees {
    /// Returns the SAEs that have not stopped.
    pub(super) fn active(&self) -> impl Iterator<Item = &Trainee> {
        self.0.iter().filter(|sae| sae.stopped.is_none())
    }

    /// Returns why the other SAEs stopped.
    pub(super) fn stops(&self) -> Vec<String> {
        self.0.iter().filter_map(|sae| Some(sae.stopped.as_ref()?.why.clone())).collect()
    }

    /// Sets the norms that activations are divided by.
    pub(super) fn divide_by(&mut self, norms: &[f64]) {
        self.0.iter_mut().for_each(|sae| sae.norm = norms[sae.site]);
    }

    /// Rescales SAEs with loaded weights, which are for unscaled activations, to divided ones.
    pub(super) fn rescale_loaded(&mut self, config: &RunConfig) -> Result<()> {
        for sae in self.0.iter_mut().filter(|sae| config.saes[sae.entry].init_from.is_some()) {
            sae.training.takes_divided(sae.norm)?;
        }
        Ok(())
    }

    /// Takes a step of every SAE that has not stopped. Returns the rows to log.
    pub(super) fn train_on(
        &mut self,
        step: u64,
        batches: &[Batch],
        logging: bool,
        outputs: &mut Outputs,
    ) -> Result<Vec<Map<String, Value>>> {
        let mut rows = Vec::new();
        for index in 0..self.0.len() {
            let sae = &mut self.0[index];
            if sae.stopped.is_some() {
                continue;
            }
            let error = match sae.training.step(step, &batches[sae.site], logging) {
                Ok(row) => {
                    sae.skipped.taken();
                    rows.extend(row);
                    continue;
                }
                Err(error) => error.downcast::<NotFinite>()?.message,
            };
            let skips = sae.training.on_nonfinite == OnNonfinite::SkipBatch;
            if skips && !sae.skipped.add(&error) {
                if sae.skipped.count == 1 {
                    tracing::warn!("{error}; the batch is skipped");
                }
                continue;
            }
            let again = if skips { format!(", as in the {} before it", SKIPS - 1) } else { String::new() };
            self.stop(index, step, format!("{error}{again}"), outputs)?;
        }
        Ok(rows)
    }

    /// Waits until a GPU has taken the steps so far, and stops SAEs whose losses or gradients were not finite.
    pub(super) fn settle(&mut self, config: &RunConfig, outputs: &mut Outputs) -> Result<()> {
        for index in 0..self.0.len() {
            if self.0[index].stopped.is_some() {
                continue;
            }
            let Err(error) = self.0[index].training.settle() else { continue };
            let NotFinite { message, .. } = error.downcast::<NotFinite>()?;
            // The SAE has taken steps since then.
            let step = self.go_back(index, config, outputs)?;
            self.stop(index, step, message, outputs)?;
        }
        Ok(())
    }

    /// Resets an SAE to the last checkpoint, or to the beginning. Returns the step.
    fn go_back(&mut self, index: usize, config: &RunConfig, outputs: &mut Outputs) -> Result<u64> {
        let sae = &mut self.0[index];
        let mut training = Training::new(&config.saes[sae.entry], &sae.cx)?;
        training.name.clone_from(&sae.training.name);
        let mut step = 0;
        outputs.finish_writing()?;
        if let Some((at, state)) = outputs.checkpoints().latest()? {
            training.restore(&state.under(&format!("saes/{}", training.name)))?;
            step = at;
        }
        sae.training = training;
        Ok(step)
    }

    /// Stops an SAE, and saves its weights of this step unless nothing of the run is kept.
    fn stop(&mut self, index: usize, step: u64, why: String, outputs: &mut Outputs) -> Result<()> {
        self.0[index].stopped = Some(Stopped { step, why: why.clone() });
        let others = self.active().next().is_some();
        if others || outputs.wrote_weights() || outputs.checkpoints().exist() {
            let goes_on = if others { "; the others continue" } else { "" };
            let name = self.0[index].name();
            tracing::warn!(
                "{why}: SAE `{name}` stops, and its weights of step {step} are saved in {name}/checkpoints{goes_on}"
            );
            write_weights(&self.0[index], step, outputs)?;
        }
        if others {
            return Ok(());
        }
        outputs.finish_writing()?;
        Err(NoneLeft.into())
    }

    /// Writes the weights of every SAE that has not stopped, apart from the final ones.
    pub(super) fn write_weights(&self, step: u64, outputs: &mut Outputs) -> Result<()> {
        self.active().try_for_each(|sae| write_weights(sae, step, outputs))
    }

    /// Returns notes for the end of the run.
    pub(super) fn notes(&self) -> impl Iterator<Item = String> {
        self.0.iter().filter_map(|sae| sae.skipped.note(&format!("SAE `{}`", sae.name())))
    }

    /// Adds the SAE's state to a checkpoint.
    pub(super) fn put_state(&self, state: &mut State) -> Result<()> {
        for sae in &self.0 {
            let name = sae.name();
            state.put_all(&format!("saes/{name}"), sae.training.state()?);
            state.put(format!("stopped/{name}"), &sae.stopped)?;
            state.put(format!("skipped/{name}"), &sae.skipped)?;
        }
        Ok(())
    }

    /// Restores what [`Trainees::put_state`] put.
    pub(super) fn restore(&mut self, state: &State) -> Result<()> {
        for sae in &mut self.0 {
            let name = sae.training.name.clone();
            sae.stopped = state.get(&format!("stopped/{name}"))?;
            sae.skipped = state.get(&format!("skipped/{name}"))?;
            sae.training.restore(&state.under(&format!("saes/{name}")))?;
        }
        Ok(())
    }
}

/// Writes an SAE's weights alone.
fn write_weights(sae: &Trainee, step: u64, outputs: &mut Outputs) -> Result<()> {
    let copy = |(name, tensor): (_, Tensor)| (String::from(name), tensor.detach().copy());
    let tensors = sae.folded()?.state_dict().into_iter().map(copy).collect();
    outputs.weights(sae.name(), step, tensors)
}

/// The error of a step after which every SAE has stopped.
#[derive(Debug, thiserror::Error)]
#[error("no SAE is left to train")]
pub(super) struct NoneLeft;

/// Returns the error of the SAEs that stopped.
pub fn stopped_error(stops: Vec<String>) -> InputError {
    InputError::new(stops.join("; ")).help(
        "inspect the activations (`dictlearn activations`), lower the learning rate, or set `normalize_activations: \
         true`; `on_nonfinite: skip_batch` skips single batches",
    )
}
