//! The output of a run: log, weights, checkpoints, progress.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};
use tch::Tensor;

use crate::config::RunConfig;
use crate::notes;
use crate::run::checkpoint::Checkpoints;
use crate::run::saver::{Saver, patiently};
use dictlearn_core::error::Under;
use dictlearn_core::files::state::State;
use dictlearn_core::interrupt::Interrupt;
use dictlearn_core::progress::Progress;
use dictlearn_core::report::Logger;

/// Writers and progress of a run.
pub(super) struct Outputs<'a> {
    config: &'a RunConfig,
    pub(super) run_dir: &'a Path,
    pub(super) interrupt: &'a Interrupt,
    checkpoints: &'a Checkpoints,
    saver: Saver,
    loggers: Vec<Box<dyn Logger>>,
    log_fails: bool,
    progress: Progress,
    /// The last step of this run.
    last: u64,
    /// Steps after which weights are written, in addition to `save_every`.
    save_steps: BTreeSet<u64>,
    wrote_weights: bool,
}

/// What to write after a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Due {
    pub(super) weights: bool,
    pub(super) checkpoint: bool,
}

impl<'a> Outputs<'a> {
    /// Opens the loggers of a run that starts at step `first`. If it `resumes`, they drop the rows from there on.
    pub(super) fn open(
        config: &'a RunConfig,
        run_dir: &'a Path,
        checkpoints: &'a Checkpoints,
        interrupt: &'a Interrupt,
        first: u64,
        resumes: bool,
    ) -> Result<Self> {
        let resume_at = resumes.then_some(first);
        let mut loggers = Vec::new();
        for (index, logger) in config.loggers.iter().enumerate() {
            loggers.push(logger.build(run_dir, resume_at).under(format_args!("loggers[{index}]"))?);
        }
        let last = last_step(config);
        Ok(Outputs {
            config,
            run_dir,
            interrupt,
            checkpoints,
            saver: Saver::new(checkpoints.clone()),
            loggers,
            log_fails: false,
            progress: Progress::of_steps(first, last),
            last,
            save_steps: config.save_steps.as_ref().map(|steps| steps.of(config.steps)).unwrap_or_default(),
            wrote_weights: false,
        })
    }

    pub(super) fn last(&self) -> u64 {
        self.last
    }

    pub(super) fn checkpoints(&self) -> &Checkpoints {
        self.checkpoints
    }

    /// True once trained weights were written.
    pub(super) fn wrote_weights(&self) -> bool {
        self.wrote_weights
    }

    /// True if this step, counted from 0, is logged.
    pub(super) fn logs(&self, step: u64) -> bool {
        step.is_multiple_of(self.config.log_every) || step + 1 == self.last
    }

    /// True if the initial weights are written.
    pub(super) fn saves_initial_weights(&self) -> bool {
        self.save_steps.contains(&0)
    }

    /// Returns what to write after `steps` steps. A checkpoint waits until the last one is on disk.
    pub(super) fn due(&mut self, steps: u64) -> Due {
        let every = |every: Option<u64>| every.is_some_and(|every| steps.is_multiple_of(every));
        if every(self.config.checkpoint_every) && steps < self.last {
            self.saver.due();
        }
        let weights = every(self.config.save_every) || self.save_steps.contains(&steps);
        Due { weights, checkpoint: self.saver.wants_checkpoint() }
    }

    /// Passes every row to every logger, which keeps the rows that it cannot write.
    pub(super) fn log(&mut self, rows: &[Map<String, Value>]) {
        if rows.is_empty() {
            return;
        }
        let log = |logger: &mut Box<dyn Logger>| rows.iter().filter_map(|row| logger.log(row).err()).last();
        let failed = self.loggers.iter_mut().filter_map(log).last();
        if let Some(error) = failed.as_ref().filter(|_| !self.log_fails) {
            tracing::warn!("{error:#}; training continues, and the write will be retried");
        }
        self.log_fails = failed.is_some();
    }

    /// Shows progress: `steps` steps taken, the last on `activations` activations, with the rows of a logged step.
    pub(super) fn show(&mut self, steps: u64, activations: i64, figures: Option<&[Map<String, Value>]>) {
        if let Some(rows) = figures {
            self.progress.figures(rows);
        }
        self.progress.step(steps, activations);
    }

    /// Writes an SAE's weights in the background.
    pub(super) fn weights(&mut self, name: &str, step: u64, tensors: Vec<(String, Tensor)>) -> Result<()> {
        // Initial weights can be remade.
        self.wrote_weights |= step > 0;
        let path = self.run_dir.join(name).join(format!("checkpoints/ae_{step}.safetensors"));
        self.saver.weights(path, tensors, self.interrupt)
    }

    /// Writes a checkpoint in the background, once the log is flushed: resuming needs the log up to it.
    pub(super) fn checkpoint(&mut self, step: u64, state: impl FnOnce() -> Result<State>) -> Result<()> {
        let flushed = flush(&mut self.loggers);
        match flushed {
            Ok(()) => self.saver.checkpoint(step, state()?),
            Err(error) => {
                self.saver.not_ready(&error);
                Ok(())
            }
        }
    }

    /// Reports failed writes, and retries them.
    pub(super) fn look(&mut self) -> Result<()> {
        self.saver.look()
    }

    /// Waits until everything is written.
    pub(super) fn finish_writing(&mut self) -> Result<()> {
        self.saver.finish(self.interrupt)
    }

    /// Ends the progress of training, and emits notes.
    pub(super) fn finish_progress(&self, notes: impl IntoIterator<Item = String>) {
        tracing::info!("{}", self.progress.finish());
        notes.into_iter().for_each(|note| notes::emit(&note));
    }

    /// Writes the log, a checkpoint if there is a state, and the SAEs (`save`). If only the SAEs can be written,
    /// returns the error of the others.
    pub(super) fn save_all(
        &mut self,
        state: Option<(u64, State)>,
        save: impl Fn() -> Result<()>,
    ) -> Result<Option<anyhow::Error>> {
        self.wrote_weights = true;
        let Outputs { checkpoints, interrupt, loggers, .. } = self;
        let mut saved = false;
        let others = patiently(interrupt, || {
            let mut write = || {
                flush(loggers)?;
                state.as_ref().map_or(Ok(()), |(step, state)| checkpoints.save(*step, state))
            };
            let others = write();
            // Save now: a process that waits for disk space may be killed.
            if others.is_err() && !saved {
                saved = save().is_ok();
            }
            others
        });
        if !saved {
            patiently(interrupt, &save)?;
        }
        Ok(others.err())
    }

    /// Writes a file that the run needs, with retries.
    pub(super) fn patiently(&self, write: impl FnMut() -> Result<()>) -> Result<()> {
        patiently(self.interrupt, write)
    }
}

/// Returns the last step of a run.
pub(super) fn last_step(config: &RunConfig) -> u64 {
    config.stop_after.unwrap_or(config.steps).min(config.steps)
}

fn flush(loggers: &mut [Box<dyn Logger>]) -> Result<()> {
    loggers.iter_mut().try_for_each(|logger| logger.flush())
}
