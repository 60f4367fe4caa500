//! Starts a run from scratch or from a checkpoint, or refuses to.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::config::{RunConfig, to_yaml};
use crate::run::build::{adapt, build};
use crate::run::checkpoint::{self, Checkpoints};
use crate::run::output_dir::{entries, lock, refuse_other_run};
use crate::run::outputs::last_step;
use crate::run::train_loop::{Ending, TrainLoop};
use dictlearn_core::error::InputError;
use dictlearn_core::files;
use dictlearn_core::files::tensors::write_file;
use dictlearn_core::hub::{Repo, hub};
use dictlearn_core::interrupt::Interrupt;
use dictlearn_core::sae::saved;

/// Trains every SAE of a config, saves and evaluates them.
///
/// Completes the config with defaults that adapt to the length of the run, and default metrics. Checks `interrupt`
/// before each step.
pub fn train(config: &mut RunConfig, run_dir: &Path, resume: bool, interrupt: &Interrupt) -> Result<Ending> {
    let checkpoints = Checkpoints::new(run_dir);
    // Held until the run ends. The directory is read only while no other process can change it.
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
            // Branches of the Hub may have moved since.
            for (repo, commit) in state.get::<Vec<(Repo, String)>>("hub")? {
                hub()?.pin(&repo, &commit);
            }
        }
    }

    // Find every mistake in the config before anything is written.
    let mut run = match build(config, begun.as_ref().map(|(_, text)| &**text)) {
        // The interrupt caused the error.
        Err(_) if interrupt.asked() => {
            return Ok(checkpoint.map_or(Ending::NotBegun, |(step, _)| Ending::Interrupted(step)));
        }
        built => built?,
    };
    let yaml = to_yaml(config)?;
    if let (Some((true, _)), Some((step, _))) = (&begun, &checkpoint) {
        check_steps(&run, config, *step, run_dir)?;
    }
    let mut first = 0;
    if let Some((step, state)) = checkpoint {
        match run.restore(&state) {
            Err(_) if interrupt.asked() => return Ok(Ending::Interrupted(step)),
            done => done.context("cannot restore the checkpoint")?,
        }
        first = step;
        if begun.as_ref().is_some_and(|(_, text)| *text == yaml)
            && let Some(done) = already_done(&run, config, run_dir, first)?
        {
            tracing::info!("the run is finished already; there is nothing to resume");
            return Ok(done);
        }
        tracing::info!("resuming at step {step}");
    }
    run.memory.lines().iter().for_each(|line| tracing::info!("{line}"));
    let created = held.is_none();
    let before = entries(run_dir);
    fs::create_dir_all(run_dir).with_context(|| format!("cannot create the output directory {}", run_dir.display()))?;
    let _held = match held {
        Some(held) => held,
        None => {
            let held = lock(run_dir)?;
            // Another process may have created it and finished in the meantime.
            refuse_other_run(run_dir, false, &checkpoints)?;
            held
        }
    };
    if begun.is_none_or(|(_, text)| text != yaml) {
        write_file(&run_dir.join("config.yaml"), yaml.as_bytes())?;
    }

    let result = run.train(config, run_dir, &checkpoints, interrupt, (first, resume));
    let useless = !matches!(result, Ok(Ending::Done { .. } | Ending::Interrupted(_)));
    if useless && !run.wrote_weights && !checkpoints.exist() {
        // Remove the useless start of a run: the directory would refuse the next one.
        for path in entries(run_dir).difference(&before) {
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
        if created {
            let _ = fs::remove_dir(run_dir);
        }
    }
    result
}

/// Returns the results of an earlier process, if it finished the run.
fn already_done(run: &TrainLoop, config: &RunConfig, run_dir: &Path, step: u64) -> Result<Option<Ending>> {
    if step < last_step(config) {
        return Ok(None);
    }
    let mut results = Vec::new();
    for sae in run.trainees.active() {
        let dir = run_dir.join(sae.name());
        let figures = dir.join("eval.json");
        let whole = saved::FILES.iter().all(|file| dir.join(file).exists());
        if !whole || !(figures.exists() || config.metrics.is_empty()) {
            return Ok(None);
        }
        if let (false, Value::Object(figures)) = (config.metrics.is_empty(), files::read_json(&figures)?) {
            results.push((sae.name().to_owned(), figures));
        }
    }
    Ok(Some(run.done(results)))
}

/// Refuses another number of steps if a schedule depends on it, or if more steps were taken already.
fn check_steps(run: &TrainLoop, config: &RunConfig, done: u64, run_dir: &Path) -> Result<()> {
    if config.steps < done {
        let message = format!("`steps` is {}, but the run has taken {done} already", config.steps);
        bail!(
            InputError::new(message)
                .field("steps")
                .help("resume with the number of steps that it was started with, or choose another --output-dir")
        );
    }
    let Some(sae) = run.trainees.0.iter().find(|sae| sae.training.trainer.depends_on_steps()) else { return Ok(()) };
    let name = sae.name();
    bail!(InputError::new(format!(
        "the run was started with another `steps`, and the schedule of SAE `{name}` depends on it"
    ))
    .field("steps")
    .help(format!(
        "its learning rate has decayed, or its penalty has annealed, towards the old end. To train it further, start a \
         new run from its weights: another `output_dir`, and in this SAE `init_from: {}`. To finish the old run, \
         resume with its `steps`",
        run_dir.join(name).display()
    )));
}
