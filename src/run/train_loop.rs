//! The training loop of a run.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use tch::Device;

use crate::config::RunConfig;
use crate::run::batches::Incoming;
use crate::run::checkpoint::{self, Checkpoints, Machine, make_dir};
use crate::run::evaluate::{self, ALL_READ, Measured, eval_site};
use crate::run::outputs::Outputs;
use crate::run::trainees::{NoneLeft, Trainee, Trainees};
use dictlearn_core::data::{ActivationSource, describe_site};
use dictlearn_core::files::state::State;
use dictlearn_core::hub;
use dictlearn_core::interrupt::Interrupt;
use dictlearn_core::machine::memory::Plan;
use dictlearn_core::machine::ranks;
use dictlearn_core::report::Subject;
use dictlearn_core::sae::saved;
use dictlearn_core::train::saved_config;

/// How a run ended.
#[derive(Debug)]
pub enum Ending {
    /// It is trained, saved and evaluated.
    Done {
        /// The metrics of each SAE, by name.
        results: Vec<(String, Map<String, Value>)>,
        /// Why the other SAEs stopped early.
        stopped: Vec<String>,
        /// Whether the source has a language model that can read text.
        reads_text: bool,
    },
    /// Every SAE stopped, because its loss or gradients were not finite: why, for each.
    Diverged(Vec<String>),
    /// A signal stopped it before this step; everything is saved, and `--resume` continues.
    Interrupted(u64),
    /// A signal stopped it before the first step; no files remain.
    NotBegun,
}

/// A run built from a config: the batches, and the SAEs that train on them.
pub(super) struct TrainLoop {
    pub(super) device: Device,
    pub(super) batches: Incoming,
    pub(super) trainees: Trainees,
    pub(super) machine: Machine,
    pub(super) memory: Plan,
    /// True once trained weights were written.
    pub(super) wrote_weights: bool,
}

impl TrainLoop {
    /// Trains from step `first` on, which is a checkpoint's step if the run `resumes`.
    pub(super) fn train(
        &mut self,
        config: &RunConfig,
        run_dir: &Path,
        checkpoints: &Checkpoints,
        interrupt: &Interrupt,
        (first, resumes): (u64, bool),
    ) -> Result<Ending> {
        if config.normalize_activations && first == 0 {
            match self.normalize(config) {
                Err(_) if interrupt.asked() => return Ok(Ending::NotBegun),
                done => done?,
            }
        }
        let mut outputs = Outputs::open(config, run_dir, checkpoints, interrupt, first, resumes)?;
        let ending = self.take_steps(config, first, &mut outputs);
        self.wrote_weights = outputs.wrote_weights();
        match ending {
            Err(error) if error.is::<NoneLeft>() => Ok(Ending::Diverged(self.trainees.stops())),
            ending => ending,
        }
    }

    fn normalize(&mut self, config: &RunConfig) -> Result<()> {
        self.batches.take_norms()?;
        self.trainees.divide_by(&self.batches.norms);
        self.trainees.rescale_loaded(config)
    }

    /// Takes steps until the run or the data ends.
    fn take_steps(&mut self, config: &RunConfig, first: u64, outputs: &mut Outputs) -> Result<Ending> {
        let (mut step, last) = (first, outputs.last());
        if step == 0 && outputs.saves_initial_weights() {
            self.trainees.write_weights(0, outputs)?;
        }
        while step < last {
            if ranks::vote(outputs.interrupt.asked()) {
                return self.interrupted(config, step, outputs);
            }
            let activations = match self.batches.next() {
                // Sources stop long work when interrupted, in a state that can be saved.
                Err(_) if outputs.interrupt.asked() => return self.interrupted(config, step, outputs),
                activations => activations.with_context(|| format!("step {step}"))?,
            };
            let Some(activations) = activations else {
                tracing::info!("the data ended after {step} of {last} steps");
                break;
            };
            let (count, logging) = (activations.len(), outputs.logs(step));
            let rows = match self.batches.checked(step, activations)? {
                Some(batches) => self.trainees.train_on(step, &batches, logging, outputs)?,
                None => Vec::new(),
            };
            step += 1;

            let due = outputs.due(step);
            if logging || due.weights || due.checkpoint {
                self.settle(config, outputs)?;
            }
            outputs.log(&rows);
            outputs.show(step, count, logging.then_some(&rows[..]));
            if due.weights {
                self.trainees.write_weights(step, outputs)?;
            }
            if due.checkpoint {
                outputs.checkpoint(step, || self.state(step))?;
            }
            outputs.look()?;
        }
        self.settle(config, outputs)?;
        self.end(config, step, outputs)
    }

    /// Waits until a GPU has taken all steps. Nothing may be logged or written before.
    fn settle(&mut self, config: &RunConfig, outputs: &mut Outputs) -> Result<()> {
        self.batches.settle()?;
        self.trainees.settle(config, outputs)
    }

    /// Saves and evaluates the trained SAEs.
    fn end(&mut self, config: &RunConfig, step: u64, outputs: &mut Outputs) -> Result<Ending> {
        outputs.finish_progress(self.batches.notes().into_iter().chain(self.trainees.notes()));
        // An earlier checkpoint, of a signal, must not be resumed from.
        let checkpoint = config.checkpoint_every.is_some() || outputs.checkpoints().exist();
        let missing = self.save_all(config, checkpoint.then_some(step), outputs)?;
        outputs.interrupt.nothing_to_lose();
        // From here on a signal ends the process; this one came before.
        if outputs.interrupt.asked() {
            return self.interrupted(config, step, outputs);
        }
        let results = self.evaluate(config, outputs)?;
        match missing {
            Some(error) => Err(error.context(
                "the trained SAEs are saved and evaluated, but the log or the checkpoint could not be written",
            )),
            None => Ok(self.done(results)),
        }
    }

    pub(super) fn done(&self, results: Vec<(String, Map<String, Value>)>) -> Ending {
        Ending::Done { results, stopped: self.trainees.stops(), reads_text: self.batches.reads_text() }
    }

    /// Stops before a step, and saves everything that resuming needs.
    fn interrupted(&mut self, config: &RunConfig, step: u64, outputs: &mut Outputs) -> Result<Ending> {
        self.settle(config, outputs)?;
        if step == 0 {
            return Ok(Ending::NotBegun);
        }
        match self.save_all(config, Some(step), outputs)? {
            Some(error) => Err(error),
            None => Ok(Ending::Interrupted(step)),
        }
    }

    /// Writes the log, a checkpoint if a step is given, and the SAEs. If only the SAEs can be written, returns the
    /// error of the others.
    fn save_all(
        &self,
        config: &RunConfig,
        checkpoint: Option<u64>,
        outputs: &mut Outputs,
    ) -> Result<Option<anyhow::Error>> {
        outputs.finish_writing()?;
        let state = checkpoint.map(|step| Ok::<_, anyhow::Error>((step, self.state(step)?))).transpose()?;
        let run_dir = outputs.run_dir;
        outputs.save_all(state, || self.trainees.active().try_for_each(|sae| self.save(sae, config, run_dir)))
    }

    /// Writes an SAE's folder.
    fn save(&self, sae: &Trainee, config: &RunConfig, run_dir: &Path) -> Result<()> {
        let buffer = describe_site(self.batches.stream.source_ref(), sae.site);
        let about = saved_config(&config.saes[sae.entry], &sae.training, &sae.cx, &buffer)?;
        let dir = run_dir.join(sae.name());
        make_dir(&dir)?;
        saved::write(&dir, &*sae.folded()?, &about)
    }

    /// Returns the state of a checkpoint after `step` steps.
    fn state(&self, step: u64) -> Result<State> {
        let mut state = State::new();
        state.put(checkpoint::STEP, step)?;
        state.put("machine", &self.machine)?;
        state.put("hub", hub::commits())?;
        self.batches.put_state(&mut state)?;
        self.trainees.put_state(&mut state)?;
        Ok(state)
    }

    /// Restores the state of a checkpoint.
    pub(super) fn restore(&mut self, state: &State) -> Result<()> {
        self.batches.restore(state)?;
        self.trainees.divide_by(&self.batches.norms);
        self.trainees.restore(state)?;
        let differences = self.machine.differences(&state.get("machine")?);
        if !differences.is_empty() {
            tracing::warn!(
                "resuming with another machine or version ({}); results will not be bit-identical",
                differences.join(", ")
            );
        }
        Ok(())
    }

    /// Evaluates every SAE that was trained to the end, and writes its metrics to its folder. Returns them by name.
    fn evaluate(&mut self, config: &RunConfig, outputs: &Outputs) -> Result<Vec<(String, Map<String, Value>)>> {
        let trained: Vec<&Trainee> = self.trainees.active().collect();
        let folded: Vec<_> = trained.iter().map(|sae| sae.folded()).collect::<Result<_>>()?;
        let names_and_sites: Vec<(String, usize)> =
            trained.iter().map(|sae| (sae.name().to_owned(), sae.site)).collect();
        let measured = Measured::own(config);
        let mut other = measured.map(|measured| measured.build(&config.source_cx(self.device))).transpose()?;
        let overlap_is_known = other.is_none() && self.batches.stream.passes() > 1 && !config.metrics.is_empty();
        if overlap_is_known {
            let source = self.batches.stream.source_ref();
            evaluate::warn_of_overlap(&source.overlap(&source.describe()).unwrap_or(ALL_READ.to_owned()));
        }
        let source: &mut dyn ActivationSource = match &mut other {
            Some(source) => &mut **source,
            None => self.batches.stream.source(),
        };
        let mut subjects = Vec::new();
        for ((_, site), dictionary) in names_and_sites.iter().zip(&folded) {
            subjects.push(Subject { dictionary: &**dictionary, site: eval_site(source, &self.batches.sites[*site])? });
        }
        let place = measured.unwrap_or_else(|| Measured::of(config));
        let measuring = evaluate::Measuring {
            key: place.key,
            origin: evaluate::origin(place.source)?,
            from_the_beginning: measured.is_some(),
            overlap_is_known,
        };
        let results = evaluate::evaluate(&config.metrics, &subjects, source, &measuring)?;
        let names = names_and_sites.into_iter().map(|(name, _)| name);
        let results: Vec<_> = names.zip(results).collect();
        for (name, result) in &results {
            outputs.patiently(|| evaluate::write(&outputs.run_dir.join(name), result))?;
        }
        Ok(results)
    }
}
