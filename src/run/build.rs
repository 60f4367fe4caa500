//! Builds a run from a config, and finds every mistake before anything is written.

use anyhow::{Result, bail};
use tch::Device;

use crate::config::{self, RunConfig, SaveSteps, folder_name};
use crate::run::batches::Incoming;
use crate::run::checkpoint::Machine;
use crate::run::evaluate::{self, Measured, eval_site};
use crate::run::memory;
use crate::run::train_loop::TrainLoop;
use crate::run::trainees::{Trainee, Trainees};
use dictlearn_core::data::{ActivationSource, Site};
use dictlearn_core::error::{InputError, Mistakes, Under};
use dictlearn_core::files::yaml;
use dictlearn_core::interrupt;
use dictlearn_core::machine::device::Precision;
use dictlearn_core::machine::memory::Plan;
use dictlearn_core::report::TaggedMetric;
use dictlearn_core::suggest::nearest;
use dictlearn_core::train::{RunLength, SaeConfig, Training, TrainingCx};

/// Builds a config's components; `begun` is the config.yaml of the run being resumed. The error lists every mistake
/// that building finds.
pub(super) fn build(config: &mut RunConfig, begun: Option<&str>) -> Result<TrainLoop> {
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
    // Without the device, build on the CPU to find further mistakes; the result is thrown away.
    let device = mistakes.keep(device)?.unwrap_or(Device::Cpu);
    let (precision, _) = config.precision.precision(device);
    let source_cx = config.source_cx(device);
    let mut plan = Plan::new(device);
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
    mistakes.keep(plan.add(source.memory()).map_err(anyhow::Error::from))?;
    let sites = source.sites();
    let batch_size = source.batch_size().unwrap_or(0);
    let adapted = adapt(config, source.batch_size(), begun);
    let mut saes: Vec<Trainee> = Vec::new();
    for entry in 0..config.saes.len() {
        interrupt::check()?;
        let built = build_sae(config, entry, &sites, (device, precision), &saes).under(format_args!("saes[{entry}]"));
        for sae in mistakes.keep(built)?.into_iter().flatten() {
            // Report a lack of memory once, and only if nothing else is wrong.
            if mistakes.is_empty() {
                mistakes.keep(plan.add(memory::of_training(&sae.training, batch_size)).map_err(anyhow::Error::from))?;
            }
            saes.push(sae);
        }
    }
    let features = saes.iter().map(|sae| sae.training.dictionary.dims().features).max().unwrap_or(0);
    // A separate source for the metrics is opened only to check it: its model would fill memory until the end.
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
        config.metrics = default_metrics(measured, |metrics, source| {
            Ok(plan.clone().add(evaluate::memory(metrics, source, features, own)?))
        })?;
    }
    plan.add(evaluate::memory(&config.metrics, measured, features, own)?)?;
    drop(eval_source);
    if let Some(shared) = shared.filter(|_| !config.metrics.is_empty()) {
        evaluate::warn_of_overlap(&shared);
    }
    if !adapted.is_empty() {
        tracing::info!("defaults adapted to {} steps: {}", config.steps, adapted.join(", "));
    }
    let machine = Machine::here(device, precision);
    let batches = Incoming::new(source, sites, config.on_nonfinite);
    Ok(TrainLoop { device, batches, trainees: Trainees(saes), machine, memory: plan, wrote_weights: false })
}

/// Adapts trainers' unwritten defaults to the length of the run, or takes them from the config of the run being
/// resumed. Returns the changes.
pub(super) fn adapt(config: &mut RunConfig, batch_size: Option<i64>, begun: Option<&str>) -> Vec<String> {
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

/// Refuses `save_steps` beyond the end of the run.
fn check_save_steps(config: &RunConfig, mistakes: &mut Mistakes) {
    let Some(SaveSteps::Listed(listed)) = &config.save_steps else { return };
    for (index, step) in listed.iter().enumerate().filter(|(_, step)| **step > config.steps) {
        mistakes.add(
            InputError::new(format!("`save_steps` has step {step}, but the run has only {} steps", config.steps))
                .field(format!("save_steps[{index}]"))
                .help("remove it, or write `save_steps: {log: N}`, which follows the length of the run"),
        );
    }
}

/// Refuses a `stop_after` beyond the end of the run.
fn check_stop_after(config: &RunConfig, mistakes: &mut Mistakes) {
    if let Some(stop) = config.stop_after.filter(|stop| *stop > config.steps) {
        mistakes.add(
            InputError::new(format!("`stop_after` is {stop}, but the run has only {} steps", config.steps))
                .field("stop_after")
                .help("remove it, or set it to `steps` or less"),
        );
    }
}

/// Adds mistakes of SAEs that do not depend on the source: those that are the same at two widths. Errors that depend on
/// the source differ, at least in the number of features.
fn check_without_source(config: &RunConfig, mistakes: &mut Mistakes) -> Result<()> {
    for (entry, sae) in config.saes.iter().enumerate() {
        config::check_without_source(sae, entry, (config.steps, config.seed), mistakes)?;
    }
    Ok(())
}

/// Returns the default metrics that the source supports and that fit in memory.
fn default_metrics(
    source: &mut dyn ActivationSource,
    fits: impl Fn(&[Box<dyn TaggedMetric>], &mut dyn ActivationSource) -> Result<Result<(), InputError>>,
) -> Result<Vec<Box<dyn TaggedMetric>>> {
    let mut metrics = Vec::new();
    for metric in evaluate::default_metrics(source)? {
        let metric = [metric];
        match fits(&metric, source)? {
            Ok(()) => metrics.extend(metric),
            Err(error) => tracing::warn!(
                "the default metric {} is skipped: {}; `metrics: [{{type: {}, batch_size: 1}}]` may fit",
                metric[0].typetag_name(),
                error.message(),
                metric[0].typetag_name()
            ),
        }
    }
    Ok(metrics)
}

/// Builds the SAEs of a config entry, one for each of its sites.
fn build_sae(
    config: &RunConfig,
    entry: usize,
    sites: &[Site],
    (device, precision): (Device, Precision),
    others: &[Trainee],
) -> Result<Vec<Trainee>> {
    let sae = &config.saes[entry];
    let chosen = chosen_sites(sae, sites)?;
    let mut built: Vec<Trainee> = Vec::new();
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
                    .help(format!("the other comes from saes[{}]: give each a unique `name`", other.entry))
            );
        }
        training.on_nonfinite = sae.on_nonfinite.unwrap_or(config.on_nonfinite);
        built.push(Trainee::new(training, cx, *site, entry));
    }
    Ok(built)
}

/// Returns the indices of the sites that an SAE trains at.
fn chosen_sites(sae: &SaeConfig, sites: &[Site]) -> Result<Vec<usize>> {
    let Some(wanted) = &sae.site else { return Ok((0..sites.len()).collect()) };
    // A name may contain characters that are special in a glob.
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
