//! A run: one stream of activations, every SAE of the config training on it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::Checkpoints;
use crate::config::{folder_name, InputError, RunConfig, SaeConfig, Under};
use crate::device;
use crate::dictionary::Dictionary;
use crate::evaluate;
use crate::interrupt::Interrupt;
use crate::logger::Logger;
use crate::metric::Subject;
use crate::progress::Progress;
use crate::registry::nearest;
use crate::saved;
use crate::source::{describe_site, ActivationSource, Activations, Batch, Site, Stream};
use crate::state::{self, State};
use crate::tensors::{self, write_file};
use crate::training::{check_finite, not_finite, saved_config, Training, TrainingCx};
use crate::watch::{NotFinite, Watch};

/// How a run ended.
#[derive(Debug)]
pub enum Ending {
    /// It is trained, saved and evaluated: the figures of each SAE, by name.
    Done(Vec<(String, Map<String, Value>)>),
    /// A signal stopped it before this step; everything is saved, and `--resume` goes on.
    Interrupted(u64),
    /// A signal stopped it before anything was trained; nothing was left behind.
    NotBegun,
}

/// Trains every SAE of a config, saves and evaluates them.
///
/// `yaml` is the config with every default spelled out. `interrupt` is looked at before each step.
pub fn train(config: &RunConfig, yaml: &str, run_dir: &Path, resume: bool, interrupt: &Interrupt) -> Result<Ending> {
    let checkpoints = Checkpoints::new(run_dir);
    let checkpoint = if resume { checkpoints.latest()? } else { None };
    if checkpoint.is_none() {
        refuse_other_run(run_dir, resume)?;
    } else {
        checkpoints.check_config(&fs::read_to_string(run_dir.join("config.yaml"))?, yaml)?;
    }

    // Everything that can be wrong with the config is found before anything is written.
    let mut run = match Run::build(config) {
        // Whatever broke off then did so because it was asked to.
        Err(_) if interrupt.asked() => return Ok(Ending::NotBegun),
        built => built?,
    };
    let created = !run_dir.exists();
    let before = entries(run_dir);
    fs::create_dir_all(run_dir).with_context(|| format!("cannot make the output directory {}", run_dir.display()))?;
    // Held as long as the run goes on.
    let lock = fs::File::open(run_dir).with_context(|| format!("cannot open {}", run_dir.display()))?;
    if lock.try_lock().is_err() {
        bail!(InputError::new(format!("another process is training in {}", run_dir.display())));
    }
    write_file(&run_dir.join("config.yaml"), yaml.as_bytes())?;
    let mut first = 0;
    if let Some((step, state)) = checkpoint {
        run.restore(&state).context("cannot take up the checkpoint")?;
        eprintln!("resuming at step {step}");
        first = step;
    }

    let result = run.train(config, run_dir, &checkpoints, first, resume, interrupt);
    let not_begun = matches!(result, Ok(Ending::NotBegun));
    if (result.is_err() || not_begun) && !run.saved && checkpoints.latest()?.is_none() {
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
}

impl Run {
    fn build(config: &RunConfig) -> Result<Self> {
        if config.saes.is_empty() {
            bail!(InputError::new("the config names no SAE to train")
                .field("saes")
                .help("add one under `saes:`, for example `- {trainer: {type: top_k}, dictionary: {k: 32}}`"));
        }
        let device = config.device.device().map_err(anyhow::Error::from).under("device")?;
        let (precision, _) = config.precision.precision(device);
        let source_cx = config.source_cx(device);
        let mut source = config.source.build(&source_cx).under("source")?;
        let sites = source.sites();
        let mut saes: Vec<Sae> = Vec::new();
        for (entry, sae) in config.saes.iter().enumerate() {
            let key = format!("saes[{entry}]");
            let chosen = chosen_sites(sae, &sites).under(&key)?;
            for site in &chosen {
                let widths = sites[*site].widths();
                let parts = sites[*site].parts.clone();
                let cx = TrainingCx { widths, parts, steps: config.steps, seed: config.seed, device, precision };
                let mut training = Training::new(sae, &cx).under(&key)?;
                if chosen.len() > 1 {
                    training.name = format!("{}-{}", sae.name, sites[*site].name.replace(['/', '\\'], "_"));
                    folder_name(&training.name).map_err(anyhow::Error::from).under(format_args!("{key}.name"))?;
                }
                if let Some(other) = saes.iter().find(|other| other.training.name == training.name) {
                    bail!(InputError::new(format!("two SAEs are named `{}`", training.name))
                        .field(format!("{key}.name"))
                        .help(format!("the other is made of saes[{}]: give each a `name` of its own", other.entry)));
                }
                saes.push(Sae { training, cx, site: *site, entry });
            }
        }
        match &config.eval_source {
            None => evaluate::check(&config.metrics, &mut *source)?,
            // Opened only to see that it can be: it is wanted at the end, and its model would fill memory till then.
            Some(other) => {
                let mut other = other.build(&source_cx).under("eval_source")?;
                evaluate::check(&config.metrics, &mut *other)?;
                for sae in &saes {
                    eval_site(&*other, &sites[sae.site])?;
                }
            }
        }
        let norms = vec![1.0; sites.len()];
        let watches = sites.iter().map(|_| Watch::default()).collect();
        Ok(Run { device, stream: Stream::new(source), sites, saes, norms, watches, saved: false })
    }

    /// Words that tell a site from the others, if there are others.
    fn at(&self, site: usize) -> String {
        if self.sites.len() == 1 {
            String::new()
        } else {
            format!(" at {}", self.sites[site].name)
        }
    }

    /// Takes each site's norm from the beginning of the stream.
    fn normalize(&mut self, config: &RunConfig) -> Result<()> {
        self.norms = self.stream.source().mean_squared_norms().under("source")?.into_iter().map(f64::sqrt).collect();
        for (site, norm) in self.norms.iter().enumerate() {
            let at = self.at(site);
            if *norm <= 0.0 || !norm.is_finite() {
                bail!(InputError::new(format!("activations{at} cannot be normalised: their norm is {norm}")));
            }
            eprintln!("activations{at} are divided by {norm:.4} while training");
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
    fn scaled(&mut self, activations: Activations, step: u64) -> Result<Vec<Batch>> {
        let mut batches = Vec::with_capacity(self.sites.len());
        for (site, batch) in activations.sites.into_iter().enumerate() {
            let tensors = [("x", &batch.x), ("target", &batch.target)];
            let tensors = if batch.is_autoencoding() { &tensors[..1] } else { &tensors };
            if !device::at_hand(batch.x.device()) {
                // The sum of finite numbers is finite, unless they are far larger than any activation.
                let sums: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor.sum(Kind::Float))).collect();
                self.watches[site].see(step, sums.iter().map(|(name, sum)| (*name, sum)))?;
            } else {
                let check = |(_, tensor): &(_, &Tensor)| check_finite(tensor, || self.batch_not_finite(step, site));
                tensors.iter().try_for_each(check)?;
            }
            let norm = self.norms[site];
            batches.push(if norm == 1.0 { batch } else { batch.scaled(1.0 / norm) });
        }
        Ok(batches)
    }

    fn batch_not_finite(&self, step: u64, site: usize) -> String {
        format!("step {step}: the batch{} has values that are not finite", self.at(site))
    }

    /// Waits for a GPU to have taken the steps that it was given, and refuses what came of numbers that were not finite.
    fn settle(&self) -> Result<()> {
        for (site, watch) in self.watches.iter().enumerate() {
            if let Some(NotFinite { step, .. }) = watch.found()? {
                return Err(not_finite(self.batch_not_finite(step, site)));
            }
        }
        self.saes.iter().try_for_each(|sae| sae.training.settle())
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
        let mut progress = Progress::of_steps(first, last);

        let mut step = first;
        while step < last {
            if interrupt.asked() {
                return self.interrupted(config, run_dir, checkpoints, step, &mut loggers);
            }
            let activations = match self.stream.next_batch() {
                // Sources break off what takes long when they are asked to stop, and can be saved then.
                Err(_) if interrupt.asked() => {
                    return self.interrupted(config, run_dir, checkpoints, step, &mut loggers);
                }
                batch => batch.under("source").with_context(|| format!("step {step}"))?,
            };
            let Some(activations) = activations else {
                progress.say(&format!("the data ended after {step} of {last} steps"));
                break;
            };
            let tokens = activations.len();
            let batches = self.scaled(activations, step)?;

            let logging = step.is_multiple_of(config.log_every) || step + 1 == last;
            let mut rows = Vec::new();
            for sae in &mut self.saes {
                rows.extend(sae.training.step(step, &batches[sae.site], logging)?);
            }
            if logging || due(config.save_every, step + 1) || due(config.checkpoint_every, step + 1) {
                self.settle()?;
            }
            for row in &rows {
                loggers.iter_mut().try_for_each(|logger| logger.log(row))?;
            }
            if logging {
                progress.figures(&rows);
            }
            step += 1;
            progress.step(step, tokens);

            if due(config.save_every, step) {
                self.save_weights(run_dir, step)?;
            }
            if due(config.checkpoint_every, step) && step < last {
                flush(&mut loggers)?;
                checkpoints.save(step, &self.state()?)?;
            }
        }
        self.settle()?;
        flush(&mut loggers)?;
        progress.say(&progress.finish());
        if self.stream.passes() > 1 {
            progress.say(&format!("the data was read {} times", self.stream.passes()));
        }
        for note in self.stream.source().notes() {
            progress.say(&note);
        }
        if step < config.steps && config.checkpoint_every.is_some() {
            checkpoints.save(step, &self.state()?)?;
        }
        self.save(config, run_dir)?;
        interrupt.nothing_to_lose();
        self.evaluate(config, run_dir).map(Ending::Done)
    }

    /// Stops before a step, with everything saved that a later run needs.
    fn interrupted(
        &mut self,
        config: &RunConfig,
        run_dir: &Path,
        checkpoints: &Checkpoints,
        step: u64,
        loggers: &mut [Box<dyn Logger>],
    ) -> Result<Ending> {
        self.settle()?;
        flush(loggers)?;
        if step == 0 {
            return Ok(Ending::NotBegun);
        }
        checkpoints.save(step, &self.state()?)?;
        self.save(config, run_dir)?;
        Ok(Ending::Interrupted(step))
    }

    fn evaluate(&mut self, config: &RunConfig, run_dir: &Path) -> Result<Vec<(String, Map<String, Value>)>> {
        let folded: Vec<_> = self.saes.iter().map(|sae| self.folded(sae)).collect::<Result<_>>()?;
        let mut other = match &config.eval_source {
            None => None,
            Some(source) => Some(source.build(&config.source_cx(self.device)).under("eval_source")?),
        };
        let source: &mut dyn ActivationSource = match &mut other {
            Some(source) => &mut **source,
            None => self.stream.source(),
        };
        let mut subjects = Vec::new();
        for (sae, dictionary) in self.saes.iter().zip(&folded) {
            subjects.push(Subject { dictionary: &**dictionary, site: eval_site(source, &self.sites[sae.site])? });
        }
        let results = evaluate::evaluate(&config.metrics, &subjects, source, config.eval_source.is_some())?;
        let names = self.saes.iter().map(|sae| sae.training.name.clone());
        let results: Vec<_> = names.zip(results).collect();
        for (name, result) in &results {
            evaluate::write(&run_dir.join(name), result)?;
        }
        Ok(results)
    }

    /// An SAE as it is saved.
    fn folded(&self, sae: &Sae) -> Result<Box<dyn Dictionary>> {
        sae.training.folded(self.norms[sae.site])
    }

    fn save(&mut self, config: &RunConfig, run_dir: &Path) -> Result<()> {
        self.saved = true;
        for sae in &self.saes {
            let buffer = describe_site(self.stream.source_ref(), sae.site);
            let saved = saved_config(&config.saes[sae.entry], &sae.training, &sae.cx, &buffer)?;
            saved::write(&run_dir.join(&sae.training.name), &*self.folded(sae)?, &saved)?;
        }
        Ok(())
    }

    /// The weights alone, kept beside the final ones.
    fn save_weights(&mut self, run_dir: &Path, step: u64) -> Result<()> {
        self.saved = true;
        for sae in &self.saes {
            let dir = run_dir.join(&sae.training.name).join("checkpoints");
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
            let path = dir.join(format!("ae_{step}.safetensors"));
            tensors::write(&path, &self.folded(sae)?.state_dict())?;
        }
        Ok(())
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.put("norms", &self.norms)?;
        state.put_all("stream", self.stream.state()?);
        for sae in &self.saes {
            state.put_all(&format!("saes/{}", sae.training.name), sae.training.state()?);
        }
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.norms = state.get("norms")?;
        self.stream.restore(&state.under("stream"))?;
        for sae in &mut self.saes {
            sae.training.restore(&state.under(&format!("saes/{}", sae.training.name)))?;
        }
        Ok(())
    }
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
        bail!(InputError::new(format!("`eval_source` has no site `{}`, on which an SAE trains", site.name))
            .field("eval_source")
            .help(format!("its sites: {}", names.join(", "))));
    };
    if sites[found].widths() != site.widths() {
        bail!(InputError::new(format!(
            "the activations of `eval_source` have width {}, but those of `source` {}",
            sites[found].activation_dim, site.activation_dim
        ))
        .field("eval_source"));
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
fn refuse_other_run(run_dir: &Path, resume: bool) -> Result<()> {
    if run_dir.is_file() {
        bail!(InputError::new(format!("the output directory {} is a file", run_dir.display())));
    }
    let trained = entries(run_dir).iter().any(|sae| sae.join("ae.safetensors").exists());
    if resume && trained {
        bail!(InputError::new(format!("{} holds trained SAEs and no checkpoint to go on from", run_dir.display()))
            .help("to train anew, choose another `--output-dir` or remove it"));
    }
    if run_dir.join("config.yaml").exists() && !resume {
        bail!(InputError::new(format!("the output directory {} already holds a run", run_dir.display()))
            .help("choose another (`--output-dir`), go on with it (`--resume`), or remove it"));
    }
    Ok(())
}

/// The shapes and memory of a run, for `--dry-run`; nothing is written.
pub fn plan(config: &RunConfig) -> Result<String> {
    let mut run = Run::build(config)?;
    let buffer = run.stream.source().memory() as usize;
    let (precision, why) = config.precision.precision(run.device);
    let megabytes = |bytes: usize| bytes as f64 / 1e6;
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
    lines.push(format!("buffer: {:.1} MB of activations", megabytes(buffer)));
    let mut total = 0;
    for sae in &mut run.saes {
        let steps = match sae.training.why_autograd()? {
            None => "gradients by hand".to_owned(),
            Some(why) => format!("gradients by autograd ({why})"),
        };
        let dictionary = &sae.training.dictionary;
        let weights: usize = dictionary.state_dict().iter().map(|(_, tensor)| state::bytes(tensor)).sum();
        let dims = dictionary.dims();
        // Weights, their gradients and two moments.
        total += 4 * weights;
        lines.push(format!(
            "{}: {} {} x {} features, {:.1} MB with gradients and moments, {steps}",
            sae.training.name,
            dictionary.class(),
            dims.input,
            dims.features,
            megabytes(4 * weights)
        ));
        for (name, tensor) in dictionary.state_dict() {
            lines.push(format!("  {name} {:?}", tensor.size()));
        }
    }
    lines.push(format!(
        "in all, with the buffer: {:.1} MB, beside the model and the batch in work",
        megabytes(total + buffer)
    ));
    Ok(lines.join("\n"))
}
