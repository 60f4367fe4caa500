//! A run: one stream of activations, every SAE of the config training on it.

pub mod checkpoint;
pub mod compare;
pub mod evaluate;
pub mod harvest;
mod saver;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::config::{self, RunConfig, SaveSteps, folder_name, to_yaml};
use crate::run::checkpoint::{Checkpoints, Machine, make_dir};
use crate::run::evaluate::{ALL_READ, Measured};
use crate::run::saver::{Saver, patiently};
use dictlearn_core::data::{ActivationSource, Activations, Batch, OnNonfinite, Site, Stream, describe_site};
use dictlearn_core::error::{InputError, Mistakes, Under};
use dictlearn_core::files::state::State;
use dictlearn_core::files::tensors::{self, write_file};
use dictlearn_core::files::yaml;
use dictlearn_core::hub::{Repo, hub};
use dictlearn_core::interrupt::Interrupt;
use dictlearn_core::machine::device;
use dictlearn_core::machine::device::Precision;
use dictlearn_core::machine::memory::{Plan, Size};
use dictlearn_core::progress::Progress;
use dictlearn_core::report::TaggedMetric;
use dictlearn_core::report::{Logger, Subject};
use dictlearn_core::sae::{Dictionary, saved};
use dictlearn_core::suggest::nearest;
use dictlearn_core::train::{
    Found, NotFinite, RunLength, SaeConfig, Training, TrainingCx, Watch, is_finite, saved_config,
};
use dictlearn_core::{files, hub, interrupt};

/// How a run ended.
#[derive(Debug)]
pub enum Ending {
    /// It is trained, saved and evaluated.
    Done {
        /// The figures of each SAE, by name.
        results: Vec<(String, Map<String, Value>)>,
        /// Why others were not trained to the end.
        stopped: Vec<String>,
        /// Whether the activations are those of a language model that can be given a text.
        reads_text: bool,
    },
    /// A signal stopped it before this step; everything is saved, and `--resume` goes on.
    Interrupted(u64),
    /// A signal stopped it before anything was trained; nothing was left behind.
    NotBegun,
}

/// Trains every SAE of a config, saves and evaluates them.
///
/// The config is completed with what follows from its source: defaults that adapt to the length of the run, and metrics.
/// `interrupt` is looked at before each step.
pub fn train(config: &mut RunConfig, run_dir: &Path, resume: bool, interrupt: &Interrupt) -> Result<Ending> {
    let checkpoints = Checkpoints::new(run_dir);
    // Held as long as the run goes on. What a directory holds is looked at when nobody else can change it.
    let held = if run_dir.is_dir() { Some(lock(run_dir)?) } else { None };
    let checkpoint = if resume { checkpoints.latest()? } else { None };
    let mut begun = None;
    match &checkpoint {
        None => refuse_other_run(run_dir, resume, &checkpoints)?,
        Some((_, state)) => {
            let path = run_dir.join("config.yaml");
            let text = fs::read_to_string(&path).map_err(|error| {
                InputError::new(format!("cannot read {}: {error}", path.display())).help(checkpoint::PUT_BACK)
            })?;
            adapt(config, None, Some(&text));
            begun = Some((checkpoints.check_config(&text, &to_yaml(config)?)?, text));
            // Branches of the Hub may have moved on.
            for (repo, commit) in state.get::<Vec<(Repo, String)>>("hub")? {
                hub()?.pin(&repo, &commit);
            }
        }
    }

    // Everything that can be wrong with the config is found before anything is written.
    let mut run = match Run::build(config, begun.as_ref().map(|(_, text)| &**text)) {
        // Whatever broke off then did so because it was asked to.
        Err(_) if interrupt.asked() => {
            return Ok(checkpoint.map_or(Ending::NotBegun, |(step, _)| Ending::Interrupted(step)));
        }
        built => built?,
    };
    let yaml = to_yaml(config)?;
    if let (Some((true, _)), Some((step, _))) = (&begun, &checkpoint) {
        run.check_steps(config, *step, run_dir)?;
    }
    let mut first = 0;
    if let Some((step, state)) = checkpoint {
        match run.restore(&state) {
            Err(_) if interrupt.asked() => return Ok(Ending::Interrupted(step)),
            done => done.context("cannot take up the checkpoint")?,
        }
        first = step;
        if begun.as_ref().is_some_and(|(_, text)| *text == yaml)
            && let Some(done) = run.already_done(config, run_dir, first)?
        {
            tracing::info!("the run is done already; --resume has nothing left to do");
            return Ok(done);
        }
        tracing::info!("resuming at step {step}");
    }
    run.memory.lines().iter().for_each(|line| tracing::info!("{line}"));
    let created = held.is_none();
    let before = entries(run_dir);
    fs::create_dir_all(run_dir).with_context(|| format!("cannot make the output directory {}", run_dir.display()))?;
    let _held = match held {
        Some(held) => held,
        None => {
            let held = lock(run_dir)?;
            // Another process may have made it meanwhile, and be done.
            refuse_other_run(run_dir, false, &checkpoints)?;
            held
        }
    };
    if begun.is_none_or(|(_, text)| text != yaml) {
        write_file(&run_dir.join("config.yaml"), yaml.as_bytes())?;
    }

    let result = run.train(config, run_dir, &checkpoints, first, resume, interrupt);
    let not_begun = matches!(result, Ok(Ending::NotBegun));
    if (result.is_err() || not_begun) && !run.saved && !checkpoints.exist() {
        // Nothing of it is of use, and a directory that holds half a run would only refuse the next one.
        for path in entries(run_dir).difference(&before) {
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
        if created {
            let _ = fs::remove_dir(run_dir);
        }
    }
    result
}

/// Keeps other processes from training in a directory, as long as it is held.
fn lock(run_dir: &Path) -> Result<fs::File> {
    let file = fs::File::open(run_dir).with_context(|| format!("cannot open {}", run_dir.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            bail!(
                InputError::new(format!("another process is training in {}", run_dir.display()))
                    .help("wait for it or stop it, or choose another `--output-dir`")
            )
        }
        // Not every file system has locks.
        Err(fs::TryLockError::Error(error)) => {
            tracing::warn!("{} cannot be locked: {error}; let no other run write to it", run_dir.display());
            Ok(file)
        }
    }
}

/// What lies in a directory.
fn entries(dir: &Path) -> BTreeSet<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// What is built from a config.
struct Run {
    device: Device,
    stream: Stream,
    sites: Vec<Site>,
    saes: Vec<Sae>,
    /// What each site's activations are divided by while training.
    norms: Vec<f64>,
    /// Each site's activations, on a GPU.
    watches: Vec<Watch>,
    /// Batches whose activations were not finite.
    skipped: Skips,
    machine: Machine,
    memory: Plan,
    /// Whether weights were written.
    saved: bool,
}

/// An SAE on one of the source's sites.
struct Sae {
    training: Training,
    cx: TrainingCx,
    site: usize,
    /// Its number in the config, where an SAE that trains on several sites stands once.
    entry: usize,
    /// Why it trains no more. It is as it was before that step.
    stopped: Option<Stop>,
    skipped: Skips,
}

/// Why an SAE stopped.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stop {
    step: u64,
    why: String,
}

/// Batches that were left out.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Skips {
    count: u64,
    in_a_row: u64,
    first: String,
}

/// So many batches are left out in a row at most: what is not finite by then will not become so.
const SKIPS: u64 = 100;

impl Skips {
    /// Counts one, and whether there are too many now.
    fn add(&mut self, why: &str) -> bool {
        if self.count == 0 {
            self.first = why.to_owned();
        }
        self.count += 1;
        self.in_a_row += 1;
        self.in_a_row >= SKIPS
    }

    fn note(&self, whose: &str) -> Option<String> {
        (self.count > 0)
            .then(|| format!("warning: {whose}: {} batches were left out, the first: {}", self.count, self.first))
    }
}

impl Run {
    /// Builds what a config names; `begun` is the config.yaml of the run that is resumed. An error has every mistake that building
    /// shows.
    fn build(config: &mut RunConfig, begun: Option<&str>) -> Result<Self> {
        let mut mistakes = Mistakes::new();
        if config.saes.is_empty() {
            mistakes.add(
                InputError::new("the config names no SAE to train")
                    .field("saes")
                    .help("add one under `saes:`, for example `- {trainer: {type: top_k}, dictionary: {k: 32}}`"),
            );
        }
        check_save_steps(config, &mut mistakes);
        check_stop_after(config, &mut mistakes);
        let device = config.device.device().map_err(anyhow::Error::from).under("device");
        // What is built where it cannot be is thrown away again.
        let device = mistakes.keep(device)?.unwrap_or(Device::Cpu);
        let (precision, _) = config.precision.precision(device);
        let source_cx = config.source_cx(device);
        let mut memory = Plan::new(device);
        let source = mistakes.keep(config.source.build(&source_cx).under("source"))?;
        let mut eval_source = match Measured::own(config) {
            None => None,
            Some(other) => mistakes.keep(other.build(&source_cx))?,
        };
        let Some(mut source) = source else {
            if let Some(other) = &mut eval_source {
                mistakes.keep(evaluate::check(&config.metrics, &mut **other))?;
            }
            adapt(config, None, begun);
            check_without_source(config, &mut mistakes)?;
            mistakes.into_result()?;
            bail!("the source could not be built");
        };
        mistakes.keep(memory.add(source.memory()).map_err(anyhow::Error::from))?;
        let sites = source.sites();
        let batch_size = source.batch_size().unwrap_or(0);
        let adapted = adapt(config, source.batch_size(), begun);
        let mut saes: Vec<Sae> = Vec::new();
        for entry in 0..config.saes.len() {
            interrupt::check()?;
            let built =
                build_sae(config, entry, &sites, (device, precision), &saes).under(format_args!("saes[{entry}]"));
            for sae in mistakes.keep(built)?.into_iter().flatten() {
                // What does not fit is one mistake, whatever comes beside it.
                if mistakes.is_empty() {
                    mistakes.keep(memory.add(sae.training.memory(batch_size)).map_err(anyhow::Error::from))?;
                }
                saes.push(sae);
            }
        }
        let features = saes.iter().map(|sae| sae.training.dictionary.dims().features).max().unwrap_or(0);
        // A source of the metrics' own is opened only to see that it can be: it is wanted at the end, and its model would fill memory till then.
        let separate = eval_source.is_some();
        let shared = eval_source.as_ref().and_then(|other| other.overlap(&source.describe()));
        let (measured, own): (&mut dyn ActivationSource, u64) = match &mut eval_source {
            None => (&mut *source, 0),
            Some(other) => {
                let own = other.memory().iter().filter(|need| !need.passing).map(|need| need.bytes).sum();
                (&mut **other, own)
            }
        };
        for sae in saes.iter().filter(|_| separate) {
            mistakes.keep(eval_site(measured, &sites[sae.site]))?;
        }
        mistakes.keep(evaluate::check(&config.metrics, measured))?;
        mistakes.into_result()?;
        if !config.written.says("metrics") {
            config.metrics = usual_metrics(measured, |metrics, source| {
                Ok(memory.clone().add(evaluate::memory(metrics, source, features, own)?))
            })?;
        }
        memory.add(evaluate::memory(&config.metrics, measured, features, own)?)?;
        drop(eval_source);
        if let Some(shared) = shared.filter(|_| !config.metrics.is_empty()) {
            evaluate::warn_of_overlap(&shared);
        }
        if !adapted.is_empty() {
            tracing::info!("defaults adapted to {} steps: {}", config.steps, adapted.join(", "));
        }
        let norms = vec![1.0; sites.len()];
        let watches = sites.iter().map(|_| Watch::default()).collect();
        let machine = Machine::here(device, precision);
        let stream = Stream::new(source);
        let skipped = Skips::default();
        Ok(Run { device, stream, sites, saes, norms, watches, skipped, machine, memory, saved: false })
    }

    /// Words that tell a site from the others, if there are others.
    fn at(&self, site: usize) -> String {
        if self.sites.len() == 1 { String::new() } else { format!(" at {}", self.sites[site].name) }
    }

    /// Takes each site's norm from the beginning of the stream.
    fn normalize(&mut self, config: &RunConfig) -> Result<()> {
        self.norms = self.stream.source().mean_squared_norms().under("source")?.into_iter().map(f64::sqrt).collect();
        for (site, norm) in self.norms.iter().enumerate() {
            let at = self.at(site);
            if *norm <= 0.0 || !norm.is_finite() {
                bail!(InputError::new(format!("activations{at} cannot be normalised: their norm is {norm}")));
            }
            tracing::info!("activations{at} are divided by {norm:.4} while training");
        }
        for sae in &mut self.saes {
            // What is loaded takes activations as the model makes them.
            if config.saes[sae.entry].init_from.is_some() {
                sae.training.takes_divided(self.norms[sae.site])?;
            }
        }
        Ok(())
    }

    /// A step's batches as the SAEs take them, one for each site.
    fn scaled(&self, activations: Activations) -> Vec<Batch> {
        let scaled = |(batch, norm): (Batch, &f64)| if *norm == 1.0 { batch } else { batch.scaled(1.0 / norm) };
        activations.sites.into_iter().zip(&self.norms).map(scaled).collect()
    }

    /// What is not finite in a step's activations. A GPU is not waited for, unless it would be left out.
    fn not_finite(&mut self, activations: &Activations, step: u64, skips: bool) -> Result<Option<InputError>> {
        for (site, batch) in activations.sites.iter().enumerate() {
            let tensors = [("x", &batch.x), ("target", &batch.target)];
            let tensors = if batch.is_autoencoding() { &tensors[..1] } else { &tensors };
            if !skips && !device::on_host(batch.x.device()) {
                // The sum of finite numbers is finite, unless they are far larger than any activation.
                let sums: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor.sum(Kind::Float))).collect();
                self.watches[site].see(step, sums.iter().map(|(name, sum)| (*name, sum)))?;
                continue;
            }
            for (_, tensor) in tensors {
                if !is_finite(tensor)? {
                    let bad = tensor.isfinite().all_dim(1, false).logical_not().nonzero().int64_value(&[0, 0]);
                    let origin = self.origin(activations, bad)?;
                    return Ok(Some(self.batch_not_finite(step, site, &origin)));
                }
            }
        }
        Ok(None)
    }

    /// Words that say where a row of a batch is from.
    fn origin(&mut self, activations: &Activations, row: i64) -> Result<String> {
        if let Some(origin) = self.stream.source_ref().origin(row) {
            return Ok(format!(", {origin}"));
        }
        let Some(tokens) = &activations.tokens else { return Ok(format!(", row {row} of it")) };
        let [id, context, position] = [0, 1, 2].map(|column| tokens.int64_value(&[row, column]));
        let text = match self.stream.source().language_model() {
            Some(model) => format!(" ({:?})", model.token_texts(&[id])?.concat()),
            None => String::new(),
        };
        Ok(format!(", token {id}{text} at position {position} of context {context}"))
    }

    fn batch_not_finite(&self, step: u64, site: usize, origin: &str) -> InputError {
        let at = self.at(site);
        InputError::new(format!("step {step}: the batch{at} has values that are not finite{origin}")).help(
            "look at the activations (`dictlearn activations`), mend or leave out what they are of, or set \
                   `on_nonfinite: skip_batch`",
        )
    }

    /// Waits for a GPU to have taken the steps that it was given; refuses activations that were not finite, and stops the SAEs
    /// whose losses were not.
    fn settle(&mut self, config: &RunConfig, keeping: &mut Keeping) -> Result<()> {
        for (site, watch) in self.watches.iter().enumerate() {
            if let Some(Found { step, .. }) = watch.found()? {
                bail!(self.batch_not_finite(step, site, ""));
            }
        }
        for index in 0..self.saes.len() {
            let sae = &self.saes[index];
            if sae.stopped.is_some() {
                continue;
            }
            let Err(error) = sae.training.settle() else { continue };
            let NotFinite { message, .. } = error.downcast::<NotFinite>()?;
            // It has gone on with numbers that are of no use.
            let step = self.go_back(index, config, keeping)?;
            self.stop(index, step, message, keeping)?;
        }
        Ok(())
    }

    /// Sets an SAE back to the last checkpoint, or to the beginning; to which step.
    fn go_back(&mut self, index: usize, config: &RunConfig, keeping: &mut Keeping) -> Result<u64> {
        let sae = &self.saes[index];
        let mut training = Training::new(&config.saes[sae.entry], &sae.cx)?;
        training.name.clone_from(&sae.training.name);
        let mut step = 0;
        keeping.saver.finish(keeping.interrupt, &|message| keeping.progress.say(message))?;
        if let Some((at, state)) = keeping.checkpoints.latest()? {
            training.restore(&state.under(&format!("saes/{}", training.name)))?;
            step = at;
        }
        self.saes[index].training = training;
        Ok(step)
    }

    /// Lets an SAE train no more. Its weights, those of so many steps, are kept, unless nothing of the run is.
    fn stop(&mut self, index: usize, step: u64, why: String, keeping: &mut Keeping) -> Result<()> {
        self.saes[index].stopped = Some(Stop { step, why: why.clone() });
        let others = self.saes.iter().any(|sae| sae.stopped.is_none());
        if others || self.saved || keeping.checkpoints.exist() {
            let goes_on = if others { "; the others go on" } else { "" };
            let name = &self.saes[index].training.name;
            keeping.progress.say(&format!(
                "warning: {why}: SAE `{name}` stops, and its weights of step {step} are kept in {name}/checkpoints{goes_on}"
            ));
            self.keep_weights(index, step, keeping)?;
        }
        if others {
            return Ok(());
        }
        keeping.saver.finish(keeping.interrupt, &|message| keeping.progress.say(message))?;
        Err(stopped_error(self.stops()).into())
    }

    /// Why SAEs stopped.
    fn stops(&self) -> Vec<String> {
        self.saes.iter().filter_map(|sae| Some(sae.stopped.as_ref()?.why.clone())).collect()
    }

    /// Takes a step of every SAE that has not stopped; the rows to be logged of it.
    fn step(
        &mut self,
        step: u64,
        batches: &[Batch],
        logging: bool,
        keeping: &mut Keeping,
    ) -> Result<Vec<Map<String, Value>>> {
        let mut rows = Vec::new();
        for index in 0..self.saes.len() {
            let sae = &mut self.saes[index];
            if sae.stopped.is_some() {
                continue;
            }
            let error = match sae.training.step(step, &batches[sae.site], logging) {
                Ok(row) => {
                    sae.skipped.in_a_row = 0;
                    rows.extend(row);
                    continue;
                }
                Err(error) => error.downcast::<NotFinite>()?.message,
            };
            let skips = sae.training.on_nonfinite == OnNonfinite::SkipBatch;
            if skips && !sae.skipped.add(&error) {
                if sae.skipped.count == 1 {
                    keeping.progress.say(&format!("warning: {error}; the batch is left out"));
                }
                continue;
            }
            let again = if skips { format!(", as in the {} before it", SKIPS - 1) } else { String::new() };
            self.stop(index, step, format!("{error}{again}"), keeping)?;
        }
        Ok(rows)
    }

    fn train(
        &mut self,
        config: &RunConfig,
        run_dir: &Path,
        checkpoints: &Checkpoints,
        first: u64,
        resume: bool,
        interrupt: &Interrupt,
    ) -> Result<Ending> {
        if config.normalize_activations && first == 0 {
            match self.normalize(config) {
                Err(_) if interrupt.asked() => return Ok(Ending::NotBegun),
                done => done?,
            }
        }
        let resume_at = resume.then_some(first);
        let mut loggers: Vec<Box<dyn Logger>> = config
            .loggers
            .iter()
            .enumerate()
            .map(|(index, logger)| logger.build(run_dir, resume_at).under(format_args!("loggers[{index}]")))
            .collect::<Result<_>>()?;
        let last = config.stop_after.unwrap_or(config.steps).min(config.steps);
        let mut keeping = Keeping {
            run_dir,
            checkpoints,
            saver: Saver::new(checkpoints.clone()),
            progress: Progress::of_steps(first, last),
            interrupt,
        };
        let mut log_fails = false;
        let save_steps = config.save_steps.as_ref().map(|steps| steps.of(config.steps)).unwrap_or_default();

        let mut step = first;
        if step == 0 && save_steps.contains(&0) {
            self.keep_all_weights(0, &mut keeping)?;
        }
        while step < last {
            if interrupt.asked() {
                return self.interrupted(config, step, &mut loggers, &mut keeping);
            }
            let activations = match self.stream.next_batch() {
                // Sources break off what takes long when they are asked to stop, and can be saved then.
                Err(_) if interrupt.asked() => {
                    return self.interrupted(config, step, &mut loggers, &mut keeping);
                }
                batch => batch.under("source").with_context(|| format!("step {step}"))?,
            };
            let Some(activations) = activations else {
                keeping.progress.say(&format!("the data ended after {step} of {last} steps"));
                break;
            };
            let tokens = activations.len();
            let logging = step.is_multiple_of(config.log_every) || step + 1 == last;
            let skips = config.on_nonfinite == OnNonfinite::SkipBatch;
            let rows = match self.not_finite(&activations, step, skips)? {
                None => {
                    self.skipped.in_a_row = 0;
                    let batches = self.scaled(activations);
                    self.step(step, &batches, logging, &mut keeping)?
                }
                Some(error) if !skips || self.skipped.add(error.message()) => bail!(error),
                Some(error) => {
                    if self.skipped.count == 1 {
                        keeping.progress.say(&format!("warning: {}; the batch is left out", error.message()));
                    }
                    Vec::new()
                }
            };
            if due(config.checkpoint_every, step + 1) && step + 1 < last {
                keeping.saver.due();
            }
            let saving = due(config.save_every, step + 1) || save_steps.contains(&(step + 1));
            let checkpointing = keeping.saver.wants_checkpoint();
            if logging || saving || checkpointing {
                self.settle(config, &mut keeping)?;
            }
            if !rows.is_empty() {
                // Every row to every logger: what it cannot write it keeps.
                let log = |logger: &mut Box<dyn Logger>| rows.iter().filter_map(|row| logger.log(row).err()).last();
                let failed = loggers.iter_mut().filter_map(log).last();
                if let Some(error) = failed.as_ref().filter(|_| !log_fails) {
                    keeping.progress.say(&format!("warning: {error:#}; training goes on, and it will be tried again"));
                }
                log_fails = failed.is_some();
            }
            if logging {
                keeping.progress.figures(&rows);
            }
            step += 1;
            keeping.progress.step(step, tokens);

            if saving {
                self.keep_all_weights(step, &mut keeping)?;
            }
            if checkpointing {
                // A checkpoint is of no use without the log up to it.
                match flush(&mut loggers) {
                    Ok(()) => {
                        keeping.saver.checkpoint(step, self.state(step)?, &|message| keeping.progress.say(message))?
                    }
                    Err(error) => keeping.saver.not_ready(&error, &|message| keeping.progress.say(message)),
                }
            }
            keeping.saver.look(&|message| keeping.progress.say(message))?;
        }
        self.settle(config, &mut keeping)?;
        let progress = &keeping.progress;
        progress.say(&progress.finish());
        if self.stream.passes() > 1 {
            progress.say(&format!("the data was read {} times", self.stream.passes()));
        }
        let skips = self.saes.iter().filter_map(|sae| sae.skipped.note(&format!("SAE `{}`", sae.training.name)));
        let notes = self.stream.source().notes().into_iter().chain(self.skipped.note("activations"));
        notes.chain(skips).for_each(|note| progress.say(&note));
        let checkpoint = config.checkpoint_every.map(|_| step);
        let missing = self.save_all(config, checkpoint, &mut loggers, &mut keeping)?;
        interrupt.nothing_to_lose();
        // Since then a signal ends the process; this one came before.
        if interrupt.asked() {
            return self.interrupted(config, step, &mut loggers, &mut keeping);
        }
        let results = self.evaluate(config, run_dir, &keeping)?;
        if let Some(error) = missing {
            return Err(error.context("what was trained is saved and evaluated, but this is missing"));
        }
        Ok(Ending::Done { results, stopped: self.stops(), reads_text: self.reads_text() })
    }

    /// Stops before a step, with everything saved that a later run needs.
    fn interrupted(
        &mut self,
        config: &RunConfig,
        step: u64,
        loggers: &mut [Box<dyn Logger>],
        keeping: &mut Keeping,
    ) -> Result<Ending> {
        self.settle(config, keeping)?;
        if step == 0 {
            return Ok(Ending::NotBegun);
        }
        match self.save_all(config, Some(step), loggers, keeping)? {
            Some(error) => Err(error),
            None => Ok(Ending::Interrupted(step)),
        }
    }

    /// Writes the log, a checkpoint if there is to be one, and the SAEs. These are also written where there is no room for the
    /// others; then the answer is why the others are missing.
    fn save_all(
        &mut self,
        config: &RunConfig,
        checkpoint: Option<u64>,
        loggers: &mut [Box<dyn Logger>],
        keeping: &mut Keeping,
    ) -> Result<Option<anyhow::Error>> {
        let Keeping { run_dir, checkpoints, saver, progress, interrupt } = keeping;
        let say = |message: &str| progress.say(message);
        saver.finish(interrupt, &say)?;
        let state = checkpoint.map(|step| Ok::<_, anyhow::Error>((step, self.state(step)?))).transpose()?;
        let mut saved = false;
        let others = patiently(interrupt, &say, || {
            let mut write = || {
                flush(loggers)?;
                state.as_ref().map_or(Ok(()), |(step, state)| checkpoints.save(*step, state))
            };
            let others = write();
            // Not later: whoever waits for room may be killed.
            if others.is_err() && !saved {
                saved = self.save(config, run_dir).is_ok();
            }
            others
        });
        if !saved {
            patiently(interrupt, &say, || self.save(config, run_dir))?;
        }
        Ok(others.err())
    }

    /// What an earlier process has found, if it has done all that there is to do.
    fn already_done(&self, config: &RunConfig, run_dir: &Path, step: u64) -> Result<Option<Ending>> {
        let last = config.stop_after.unwrap_or(config.steps).min(config.steps);
        if step < last {
            return Ok(None);
        }
        let mut results = Vec::new();
        for sae in self.saes.iter().filter(|sae| sae.stopped.is_none()) {
            let dir = run_dir.join(&sae.training.name);
            let figures = dir.join("eval.json");
            let whole = saved::FILES.iter().all(|file| dir.join(file).exists());
            if !whole || !(figures.exists() || config.metrics.is_empty()) {
                return Ok(None);
            }
            if let (false, Value::Object(figures)) = (config.metrics.is_empty(), files::read_json(&figures)?) {
                results.push((sae.training.name.clone(), figures));
            }
        }
        Ok(Some(Ending::Done { results, stopped: self.stops(), reads_text: self.reads_text() }))
    }

    /// Whether there is a language model with a tokenizer, which knows its first tokens by more than their numbers.
    fn reads_text(&self) -> bool {
        let ids: Vec<i64> = (0..20).collect();
        let texts = self.stream.source_ref().model_source().and_then(|source| source.token_texts(&ids).ok());
        texts.is_some_and(|texts| texts.iter().zip(&ids).any(|(text, id)| *text != id.to_string()))
    }

    /// Refuses to lay a run out for another number of steps than the one that its steps so far were taken for, if they depend
    /// on it.
    fn check_steps(&self, config: &RunConfig, done: u64, run_dir: &Path) -> Result<()> {
        if config.steps < done {
            let message = format!("`steps` is {}, and the run has taken {done} already", config.steps);
            bail!(
                InputError::new(message)
                    .field("steps")
                    .help("resume with the number of steps that it was begun with, or choose another --output-dir")
            );
        }
        let Some(sae) = self.saes.iter().find(|sae| sae.training.trainer.depends_on_steps()) else { return Ok(()) };
        let name = &sae.training.name;
        bail!(InputError::new(format!(
            "the run was begun with another `steps`, and the schedule of SAE `{name}` depends on it"
        ))
        .field("steps")
        .help(format!(
            "its learning rate has decayed, or its penalty has annealed, towards the old end. To train it further, start a new \
             run from its weights: another `output_dir`, and in this SAE `init_from: {}`. To finish the old run, resume with \
             its `steps`",
            run_dir.join(name).display()
        )));
    }

    fn evaluate(
        &mut self,
        config: &RunConfig,
        run_dir: &Path,
        keeping: &Keeping,
    ) -> Result<Vec<(String, Map<String, Value>)>> {
        let trained: Vec<&Sae> = self.saes.iter().filter(|sae| sae.stopped.is_none()).collect();
        let folded: Vec<_> = trained.iter().map(|sae| self.folded(sae)).collect::<Result<_>>()?;
        let names_and_sites: Vec<(String, usize)> =
            trained.iter().map(|sae| (sae.training.name.clone(), sae.site)).collect();
        let measured = Measured::own(config);
        let mut other = measured.map(|measured| measured.build(&config.source_cx(self.device))).transpose()?;
        let overlap_is_known = other.is_none() && self.stream.passes() > 1 && !config.metrics.is_empty();
        if overlap_is_known {
            let source = self.stream.source_ref();
            evaluate::warn_of_overlap(&source.overlap(&source.describe()).unwrap_or(ALL_READ.to_owned()));
        }
        let source: &mut dyn ActivationSource = match &mut other {
            Some(source) => &mut **source,
            None => self.stream.source(),
        };
        let mut subjects = Vec::new();
        for ((_, site), dictionary) in names_and_sites.iter().zip(&folded) {
            subjects.push(Subject { dictionary: &**dictionary, site: eval_site(source, &self.sites[*site])? });
        }
        let say = |message: &str| keeping.progress.say(message);
        let place = measured.unwrap_or_else(|| Measured::of(config));
        let measuring = evaluate::Measuring {
            key: place.key,
            origin: evaluate::origin(place.source)?,
            from_the_beginning: measured.is_some(),
            overlap_is_known,
            say: &say,
        };
        let results = evaluate::evaluate(&config.metrics, &subjects, source, &measuring)?;
        let names = names_and_sites.into_iter().map(|(name, _)| name);
        let results: Vec<_> = names.zip(results).collect();
        for (name, result) in &results {
            patiently(keeping.interrupt, &say, || evaluate::write(&run_dir.join(name), result))?;
        }
        Ok(results)
    }

    /// An SAE as it is saved.
    fn folded(&self, sae: &Sae) -> Result<Box<dyn Dictionary>> {
        sae.training.folded(self.norms[sae.site])
    }

    fn save(&mut self, config: &RunConfig, run_dir: &Path) -> Result<()> {
        self.saved = true;
        for sae in self.saes.iter().filter(|sae| sae.stopped.is_none()) {
            let buffer = describe_site(self.stream.source_ref(), sae.site);
            let saved = saved_config(&config.saes[sae.entry], &sae.training, &sae.cx, &buffer)?;
            let dir = run_dir.join(&sae.training.name);
            make_dir(&dir)?;
            saved::write(&dir, &*self.folded(sae)?, &saved)?;
        }
        Ok(())
    }

    /// The weights of every SAE that has not stopped.
    fn keep_all_weights(&mut self, step: u64, keeping: &mut Keeping) -> Result<()> {
        for index in 0..self.saes.len() {
            if self.saes[index].stopped.is_none() {
                self.keep_weights(index, step, keeping)?;
            }
        }
        Ok(())
    }

    /// The weights alone, kept beside the final ones.
    fn keep_weights(&mut self, index: usize, step: u64, keeping: &mut Keeping) -> Result<()> {
        // Those before the first step are no loss.
        self.saved |= step > 0;
        let sae = &self.saes[index];
        let path = keeping.run_dir.join(&sae.training.name).join(format!("checkpoints/ae_{step}.safetensors"));
        let folded = self.folded(sae)?;
        let copy = |(name, tensor): (_, Tensor)| (String::from(name), tensor.detach().copy());
        let tensors = folded.state_dict().into_iter().map(copy).collect();
        keeping.saver.weights(path, tensors, keeping.interrupt, &|message| keeping.progress.say(message))
    }

    /// After so many steps.
    fn state(&self, step: u64) -> Result<State> {
        let mut state = State::new();
        state.put(checkpoint::STEP, step)?;
        state.put("norms", &self.norms)?;
        state.put("machine", &self.machine)?;
        state.put("hub", hub::commits())?;
        state.put("skipped", &self.skipped)?;
        state.put_all("stream", self.stream.state()?);
        for sae in &self.saes {
            let name = &sae.training.name;
            state.put_all(&format!("saes/{name}"), sae.training.state()?);
            state.put(format!("stopped/{name}"), &sae.stopped)?;
            state.put(format!("skipped/{name}"), &sae.skipped)?;
        }
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.norms = state.get("norms")?;
        self.skipped = state.get("skipped")?;
        self.stream.restore(&state.under("stream"))?;
        for sae in &mut self.saes {
            let name = &sae.training.name;
            sae.stopped = state.get(&format!("stopped/{name}"))?;
            sae.skipped = state.get(&format!("skipped/{name}"))?;
            sae.training.restore(&state.under(&format!("saes/{name}")))?;
        }
        let differences = self.machine.differences(&state.get("machine")?);
        if !differences.is_empty() {
            tracing::warn!(
                "the run was begun elsewhere ({}): it goes on, but not to the same bits as if it had stayed there",
                differences.join(", ")
            );
        }
        Ok(())
    }
}

/// Where a run writes to, and to whom it speaks.
struct Keeping<'a> {
    run_dir: &'a Path,
    checkpoints: &'a Checkpoints,
    saver: Saver,
    progress: Progress,
    interrupt: &'a Interrupt,
}

/// The error of SAEs that stopped.
pub fn stopped_error(stops: Vec<String>) -> InputError {
    InputError::new(stops.join("; ")).help(
        "look at the activations (`dictlearn activations`), lower the learning rate, or set `normalize_activations: true`; \
         `on_nonfinite: skip_batch` leaves single batches out",
    )
}

/// Adapts the defaults of trainers that nobody wrote to the length of the run, or takes them from the config of the run that is
/// resumed. Returns what it changed.
fn adapt(config: &mut RunConfig, batch_size: Option<i64>, begun: Option<&str>) -> Vec<String> {
    let begun: Option<serde_yaml::Value> = begun.and_then(|text| yaml::parse(text).ok());
    let batch_size = batch_size.and_then(|size| u64::try_from(size).ok());
    let mut adapted: Vec<String> = Vec::new();
    let RunConfig { saes, written, steps, .. } = config;
    for (entry, sae) in saes.iter_mut().enumerate() {
        let says = |field: &str| written.says(&config::trainer_field(entry, field));
        let begun = begun.as_ref().and_then(|begun| begun.get("saes")?.get(entry)?.get("trainer"));
        let mut length = RunLength::new(*steps, batch_size, &says, begun);
        sae.trainer.adapt_defaults(&mut length);
        for one in length.into_adapted() {
            if !adapted.contains(&one) {
                adapted.push(one);
            }
        }
    }
    adapted
}

/// Refuses steps at which nothing could be saved.
fn check_save_steps(config: &RunConfig, mistakes: &mut Mistakes) {
    let Some(SaveSteps::Listed(listed)) = &config.save_steps else { return };
    for (index, step) in listed.iter().enumerate().filter(|(_, step)| **step > config.steps) {
        mistakes.add(
            InputError::new(format!("`save_steps` has step {step}, but the run has only {} steps", config.steps))
                .field(format!("save_steps[{index}]"))
                .help("leave it out, or write `save_steps: {log: N}`, which follows the length of the run"),
        );
    }
}

/// Refuses to stop after the end.
fn check_stop_after(config: &RunConfig, mistakes: &mut Mistakes) {
    if let Some(stop) = config.stop_after.filter(|stop| *stop > config.steps) {
        mistakes.add(
            InputError::new(format!("`stop_after` is {stop}, but the run has only {} steps", config.steps))
                .field("stop_after")
                .help("leave it out, or set it to `steps` or less"),
        );
    }
}

/// Adds the mistakes of SAEs that no source would mend: those that are the same at two widths. Errors that depend on the
/// source differ there, at least by the number of features that they name.
fn check_without_source(config: &RunConfig, mistakes: &mut Mistakes) -> Result<()> {
    for (entry, sae) in config.saes.iter().enumerate() {
        config::check_without_source(sae, entry, (config.steps, config.seed), mistakes)?;
    }
    Ok(())
}

/// The default metrics that a source allows and for which there is memory.
fn usual_metrics(
    source: &mut dyn ActivationSource,
    fits: impl Fn(&[Box<dyn TaggedMetric>], &mut dyn ActivationSource) -> Result<Result<(), InputError>>,
) -> Result<Vec<Box<dyn TaggedMetric>>> {
    let mut metrics = Vec::new();
    for metric in evaluate::usual(source)? {
        let metric = [metric];
        match fits(&metric, source)? {
            Ok(()) => metrics.extend(metric),
            Err(error) => tracing::warn!(
                "{} is not measured by default: {}; `metrics: [{{type: {}, batch_size: 1}}]` may do",
                metric[0].typetag_name(),
                error.message(),
                metric[0].typetag_name()
            ),
        }
    }
    Ok(metrics)
}

/// The SAEs of an entry of the config, one for each of its sites.
fn build_sae(
    config: &RunConfig,
    entry: usize,
    sites: &[Site],
    (device, precision): (Device, Precision),
    others: &[Sae],
) -> Result<Vec<Sae>> {
    let sae = &config.saes[entry];
    let chosen = chosen_sites(sae, sites)?;
    let mut built: Vec<Sae> = Vec::new();
    for site in &chosen {
        interrupt::check()?;
        let cx = TrainingCx {
            widths: sites[*site].widths(),
            parts: sites[*site].parts.clone(),
            steps: config.steps,
            seed: sae.seed.unwrap_or(config.seed),
            device,
            precision,
        };
        let mut training = Training::new(sae, &cx)?;
        if chosen.len() > 1 {
            training.name = format!("{}-{}", sae.name, sites[*site].name.replace(['/', '\\'], "_"));
            folder_name(&training.name).map_err(anyhow::Error::from).under("name")?;
        }
        if let Some(other) = others.iter().chain(&built).find(|other| other.training.name == training.name) {
            bail!(
                InputError::new(format!("two SAEs are named `{}`", training.name))
                    .field("name")
                    .help(format!("the other is made of saes[{}]: give each a `name` of its own", other.entry))
            );
        }
        training.on_nonfinite = sae.on_nonfinite.unwrap_or(config.on_nonfinite);
        built.push(Sae { training, cx, site: *site, entry, stopped: None, skipped: Skips::default() });
    }
    Ok(built)
}

/// The sites that an SAE of the config trains on.
fn chosen_sites(sae: &SaeConfig, sites: &[Site]) -> Result<Vec<usize>> {
    let Some(wanted) = &sae.site else { return Ok((0..sites.len()).collect()) };
    // A name may have characters that mean something else in a glob.
    if let Some(site) = sites.iter().position(|site| site.name == *wanted) {
        return Ok(vec![site]);
    }
    let glob = glob::Pattern::new(wanted).ok();
    let chosen: Vec<usize> =
        (0..sites.len()).filter(|site| glob.as_ref().is_some_and(|glob| glob.matches(&sites[*site].name))).collect();
    if !chosen.is_empty() {
        return Ok(chosen);
    }
    let names: Vec<&str> = sites.iter().map(|site| site.name.as_str()).collect();
    let near = nearest(wanted, names.iter().copied()).map(|near| format!("did you mean `{near}`? "));
    bail!(InputError::new(format!("the source has no site `{wanted}`")).field("site").help(format!(
        "{}its sites: {}",
        near.unwrap_or_default(),
        names.join(", ")
    )));
}

/// The number of a site in `eval_source`.
fn eval_site(source: &dyn ActivationSource, site: &Site) -> Result<usize> {
    let sites = source.sites();
    let Some(found) = Site::find(&sites, &site.name) else {
        let names: Vec<&str> = sites.iter().map(|site| site.name.as_str()).collect();
        bail!(
            InputError::new(format!("`eval_source` has no site `{}`, on which an SAE trains", site.name))
                .field("eval_source")
                .help(format!("its sites: {}", names.join(", ")))
        );
    };
    if sites[found].widths() != site.widths() {
        bail!(
            InputError::new(format!(
                "the activations of `eval_source` have width {}, but those of `source` {}",
                sites[found].activation_dim, site.activation_dim
            ))
            .field("eval_source")
        );
    }
    Ok(found)
}

fn due(every: Option<u64>, step: u64) -> bool {
    every.is_some_and(|every| step.is_multiple_of(every))
}

fn flush(loggers: &mut [Box<dyn Logger>]) -> Result<()> {
    loggers.iter_mut().try_for_each(|logger| logger.flush())
}

/// Refuses an output directory that holds another run, or anything else that a run would write over.
fn refuse_other_run(run_dir: &Path, resume: bool, checkpoints: &Checkpoints) -> Result<()> {
    if run_dir.is_file() {
        bail!(InputError::new(format!("the output directory {} is a file", run_dir.display())));
    }
    if resume && checkpoints.exist() {
        bail!(
            InputError::new(format!("no checkpoint of {} can be read", run_dir.display()))
                .help("to train anew, choose another `--output-dir` or remove it")
        );
    }
    let trained = entries(run_dir).iter().any(|sae| sae.join("ae.safetensors").exists());
    if resume && trained {
        bail!(
            InputError::new(format!("{} holds trained SAEs and no checkpoint to go on from", run_dir.display()))
                .help("to train anew, choose another `--output-dir` or remove it")
        );
    }
    if run_dir.join("config.yaml").exists() && !resume {
        bail!(
            InputError::new(format!("the output directory {} already holds a run", run_dir.display()))
                .help("choose another (`--output-dir`), go on with it (`--resume`), or remove it")
        );
    }
    Ok(())
}

/// The shapes and memory of a run, for `--dry-run`; nothing is written.
pub fn plan(config: &mut RunConfig) -> Result<String> {
    let mut run = Run::build(config, None)?;
    let (precision, why) = config.precision.precision(run.device);
    let mut lines = vec![
        format!("device: {}", device::name(run.device)),
        format!("matrix products in training: {precision} ({why})"),
    ];
    if run.device == Device::Cpu {
        lines.push(format!("loops beside them: {} on {} threads", device::cpu_vectors(), tch::get_num_threads()));
    }
    for (site, Site { activation_dim, output_dim, .. }) in run.sites.iter().enumerate() {
        lines.push(format!("activations{}: width {activation_dim} -> {output_dim}", run.at(site)));
    }
    for sae in &mut run.saes {
        let steps = match sae.training.why_autograd()? {
            None => "analytic gradients".to_owned(),
            Some(why) => format!("gradients by autograd ({why})"),
        };
        let dictionary = &sae.training.dictionary;
        let weights: usize = dictionary.state_dict().iter().map(|(_, tensor)| tensors::bytes(tensor)).sum();
        let dims = dictionary.dims();
        lines.push(format!(
            "{}: {} {} x {} features, {} of weights, {steps}",
            sae.training.name,
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
