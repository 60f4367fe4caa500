//! What a run writes on its way, checkpoints and weights, written beside the training by a thread. What cannot be written
//! now (a full disk, a folder that may only be read, a file system that is gone) is tried again, while training goes on.

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

/// How long to wait before the first try anew; then twice as long each time, up to a minute.
const PAUSE: Duration = Duration::from_secs(1);

/// How long it is tried to write what the run cannot go on without.
const PATIENCE: Duration = Duration::from_secs(600);

/// The same for a run that was told to end.
const PATIENCE_AT_THE_END: Duration = Duration::from_secs(4);

/// Weights that may wait in memory to be written.
const WAITING: usize = 4;

/// Writes checkpoints and weights.
pub(crate) struct Saver {
    checkpoints: Checkpoints,
    /// Not written yet, in this order.
    waiting: VecDeque<Weights>,
    writing: Option<JoinHandle<(Job, Result<()>)>>,
    /// Whether a checkpoint is due.
    due: bool,
    trouble: Option<Trouble>,
}

/// Weights to be kept in a file.
struct Weights {
    path: PathBuf,
    tensors: Vec<(String, Tensor)>,
}

enum Job {
    /// With the weights that come before it: a run that is resumed from it never goes over their steps again.
    Checkpoint(u64, State, VecDeque<Weights>),
    Weights(Weights),
}

impl Job {
    /// Weights that are written need not be written again, should what comes after them fail.
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

/// Writing that does not succeed.
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
    /// Writes to these checkpoints, and weights to any place.
    pub fn new(checkpoints: Checkpoints) -> Self {
        Saver { checkpoints, waiting: VecDeque::new(), writing: None, due: false, trouble: None }
    }

    /// From now on a checkpoint is due, until one is written that was taken later.
    pub fn due(&mut self) {
        self.due = true;
    }

    /// Whether a checkpoint is due and could be written now: it is taken as late as that, and there is never more than one in
    /// memory.
    pub fn wants_checkpoint(&self) -> bool {
        self.due
            && self.writing.is_none()
            && self.trouble.as_ref().is_none_or(|trouble| Instant::now() >= trouble.again)
    }

    /// Writes a checkpoint that [`Saver::wants_checkpoint`], after the weights that it has been given so far.
    pub fn checkpoint(&mut self, step: u64, state: State) -> Result<()> {
        self.written()?;
        self.due = false;
        let before = std::mem::take(&mut self.waiting);
        self.start(Job::Checkpoint(step, state, before))
    }

    /// What could not be made ready for a checkpoint: it is tried again later.
    pub fn not_ready(&mut self, error: &anyhow::Error) {
        self.failed(error);
        self.due = true;
    }

    /// Writes weights to a file, as soon as it can. Waits while too many cannot be written.
    pub fn weights(&mut self, path: PathBuf, tensors: Vec<(String, Tensor)>, interrupt: &Interrupt) -> Result<()> {
        self.waiting.push_back(Weights { path, tensors });
        self.look()?;
        if self.waiting.len() > WAITING {
            self.finish(interrupt)?;
        }
        Ok(())
    }

    /// Sees what was written, and goes on writing. Takes no time.
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

    /// Waits until all that was given is written, if it can be.
    pub fn finish(&mut self, interrupt: &Interrupt) -> Result<()> {
        // A checkpoint that fails now is not tried again: who waits here writes a later one, or needs none.
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

    /// Waits for what is being written.
    fn written(&mut self) -> Result<()> {
        let Some(writing) = self.writing.take() else { return Ok(()) };
        let (job, result) = writing.join().map_err(|_| anyhow!("what was to be saved could not be written"))?;
        match result {
            Ok(()) => {
                if self.trouble.take().is_some() {
                    tracing::info!("writing succeeds again");
                }
            }
            Err(error) => {
                self.failed(&error);
                match job {
                    // A later state is worth more.
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
            tracing::warn!("{error:#}; training goes on, and it will be tried again");
        }
        self.trouble = Some(Trouble::after(self.trouble.take()));
    }
}

impl Drop for Saver {
    /// What is being written is not broken off: the program may end after this.
    fn drop(&mut self) {
        if let Some(writing) = self.writing.take() {
            let _ = writing.join();
        }
    }
}

/// Writes what the run cannot go on without, again and again until it succeeds or patience ends.
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
            tracing::warn!("{error:#}; it will be tried again");
        }
        let now = Trouble::after(trouble);
        while Instant::now() < now.again {
            let patience = if interrupt.asked() { PATIENCE_AT_THE_END } else { PATIENCE };
            if started.elapsed() > patience {
                return Err(error).with_context(|| format!("not written, though it was tried for {patience:?}"));
            }
            thread::sleep(Duration::from_millis(50));
        }
        trouble = Some(now);
    }
}
