//! Writes checkpoints and weights during training, on a background thread. Failed writes (a full disk, a read-only
//! folder, a missing file system) are retried while training continues.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use tch::Tensor;

use crate::run::checkpoint::{Checkpoints, make_dir};
use dictlearn_core::files::state::State;
use dictlearn_core::files::tensors;
use dictlearn_core::interrupt::Interrupt;

/// Pause before the first retry; it doubles each time, up to a minute.
const PAUSE: Duration = Duration::from_secs(1);

/// How long to retry a write that the run needs.
const PATIENCE: Duration = Duration::from_secs(600);

/// The same for a run that was interrupted.
const PATIENCE_AT_THE_END: Duration = Duration::from_secs(4);

/// Maximum number of weights that wait in memory.
const WAITING: usize = 4;

/// Writes checkpoints and weights.
pub(crate) struct Saver {
    checkpoints: Checkpoints,
    /// Weights not written yet, in order.
    waiting: VecDeque<Weights>,
    writing: Option<JoinHandle<(Job, Result<()>)>>,
    /// Whether a checkpoint is due.
    due: bool,
    trouble: Option<Trouble>,
}

/// Weights for a file.
struct Weights {
    path: PathBuf,
    tensors: Vec<(String, Tensor)>,
}

enum Job {
    /// With the weights of earlier steps, which a run resumed from this checkpoint does not repeat.
    Checkpoint(u64, State, VecDeque<Weights>),
    Weights(Weights),
}

impl Job {
    /// Writes the job. A retry does not rewrite weights that were written.
    fn write(&mut self, checkpoints: &Checkpoints) -> Result<()> {
        match self {
            Job::Checkpoint(step, state, before) => {
                while let Some(weights) = before.front() {
                    weights.write()?;
                    before.pop_front();
                }
                checkpoints.save(*step, state)
            }
            Job::Weights(weights) => weights.write(),
        }
    }
}

impl Weights {
    fn write(&self) -> Result<()> {
        if let Some(dir) = self.path.parent() {
            dir.parent().map_or(Ok(()), make_dir)?;
            make_dir(dir)?;
        }
        tensors::write(&self.path, &self.tensors)
    }
}

/// State of failing writes.
struct Trouble {
    pause: Duration,
    again: Instant,
}

impl Trouble {
    fn after(before: Option<Trouble>) -> Self {
        let pause = before.map_or(PAUSE, |before| (2 * before.pause).min(Duration::from_secs(60)));
        Trouble { pause, again: Instant::now() + pause }
    }
}

impl Saver {
    /// Returns a saver that writes to these checkpoints.
    pub fn new(checkpoints: Checkpoints) -> Self {
        Saver { checkpoints, waiting: VecDeque::new(), writing: None, due: false, trouble: None }
    }

    /// Marks a checkpoint as due, until one taken later is written.
    pub fn due(&mut self) {
        self.due = true;
    }

    /// True if a checkpoint is due and can be written now. Until then none is taken, so at most one is in memory.
    pub fn wants_checkpoint(&self) -> bool {
        self.due
            && self.writing.is_none()
            && self.trouble.as_ref().is_none_or(|trouble| Instant::now() >= trouble.again)
    }

    /// Writes a checkpoint that [`Saver::wants_checkpoint`], after all waiting weights.
    pub fn checkpoint(&mut self, step: u64, state: State) -> Result<()> {
        self.written()?;
        self.due = false;
        let before = std::mem::take(&mut self.waiting);
        self.start(Job::Checkpoint(step, state, before))
    }

    /// Reports that a checkpoint could not be prepared, and retries later.
    pub fn not_ready(&mut self, error: &anyhow::Error) {
        self.failed(error);
        self.due = true;
    }

    /// Writes weights to a file in the background. Blocks while too many wait.
    pub fn weights(&mut self, path: PathBuf, tensors: Vec<(String, Tensor)>, interrupt: &Interrupt) -> Result<()> {
        self.waiting.push_back(Weights { path, tensors });
        self.look()?;
        if self.waiting.len() > WAITING {
            self.finish(interrupt)?;
        }
        Ok(())
    }

    /// Checks the current write, and starts the next. Does not block.
    pub fn look(&mut self) -> Result<()> {
        if self.writing.as_ref().is_some_and(JoinHandle::is_finished) {
            self.written()?;
        }
        let patient = self.trouble.as_ref().is_none_or(|trouble| Instant::now() >= trouble.again);
        if self.writing.is_none()
            && patient
            && let Some(weights) = self.waiting.pop_front()
        {
            self.start(Job::Weights(weights))?;
        }
        Ok(())
    }

    /// Waits until all weights are written, or retries fail.
    pub fn finish(&mut self, interrupt: &Interrupt) -> Result<()> {
        // A checkpoint that fails now is not retried: the caller writes a later one, or needs none.
        self.written()?;
        let checkpoints = self.checkpoints.clone();
        while let Some(weights) = self.waiting.pop_front() {
            let mut job = Job::Weights(weights);
            patiently(interrupt, || job.write(&checkpoints))?;
        }
        Ok(())
    }

    fn start(&mut self, mut job: Job) -> Result<()> {
        let checkpoints = self.checkpoints.clone();
        let write = move || {
            let result = job.write(&checkpoints);
            (job, result)
        };
        let thread = thread::Builder::new().name("saver".to_owned()).spawn(write).context("cannot start a thread")?;
        self.writing = Some(thread);
        Ok(())
    }

    /// Waits for the current write.
    fn written(&mut self) -> Result<()> {
        let Some(writing) = self.writing.take() else { return Ok(()) };
        let (job, result) =
            writing.join().map_err(|_| anyhow!("the thread that writes checkpoints and weights panicked"))?;
        match result {
            Ok(()) => {
                if self.trouble.take().is_some() {
                    tracing::info!("writing succeeds again");
                }
            }
            Err(error) => {
                self.failed(&error);
                match job {
                    // Retry with a later state.
                    Job::Checkpoint(_, _, mut before) => {
                        self.due = true;
                        before.append(&mut self.waiting);
                        self.waiting = before;
                    }
                    Job::Weights(weights) => self.waiting.push_front(weights),
                }
            }
        }
        Ok(())
    }

    fn failed(&mut self, error: &anyhow::Error) {
        if self.trouble.is_none() {
            tracing::warn!("{error:#}; training continues, and the write will be retried");
        }
        self.trouble = Some(Trouble::after(self.trouble.take()));
    }
}

impl Drop for Saver {
    /// Finishes the current write: the program may end after this.
    fn drop(&mut self) {
        if let Some(writing) = self.writing.take() {
            let _ = writing.join();
        }
    }
}

/// Retries a write that the run needs until it succeeds or patience ends.
pub(crate) fn patiently<T>(interrupt: &Interrupt, mut write: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let mut trouble: Option<Trouble> = None;
    loop {
        let error = match write() {
            Ok(done) => {
                if trouble.is_some() {
                    tracing::info!("writing succeeds again");
                }
                return Ok(done);
            }
            Err(error) => error,
        };
        if trouble.is_none() {
            tracing::warn!("{error:#}; the write will be retried");
        }
        let now = Trouble::after(trouble);
        while Instant::now() < now.again {
            let patience = if interrupt.asked() { PATIENCE_AT_THE_END } else { PATIENCE };
            if started.elapsed() > patience {
                return Err(error).with_context(|| format!("not written after retries for {patience:?}"));
            }
            thread::sleep(Duration::from_millis(50));
        }
        trouble = Some(now);
    }
}
