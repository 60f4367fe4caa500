//! Runs from YAML.

use std::path::{Path, PathBuf};

use dictlearn_core::interrupt::{self, Interrupt};
use serde_json::{Map, Value};

use crate::config::{self, RunConfig, Sources};
use crate::notes;
use crate::run::{self, Ending};
use crate::{Error, Result, Sae};

/// An experiment described by a YAML file, as `dictlearn train` runs it.
///
/// ```no_run
/// let outcome = dictlearn::Run::from_yaml("configs/quickstart.yaml")?.output_dir("runs/first").train()?;
/// for sae in &outcome.saes {
///     println!("{}: {}", sae.name, sae.figures["frac_variance_explained"]);
/// }
/// let sae = outcome.saes[0].load()?;
/// # Ok::<(), dictlearn::Error>(())
/// ```
#[derive(Debug)]
pub struct Run {
    config: RunConfig,
    output_dir: Option<PathBuf>,
    resume: bool,
}

/// The results of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The run's folder.
    pub dir: PathBuf,
    /// The trained SAEs, in the config's order.
    pub saes: Vec<TrainedSae>,
    /// Why the other SAEs stopped early.
    pub stopped: Vec<String>,
}

/// An SAE of a run.
#[derive(Debug)]
pub struct TrainedSae {
    /// Name in the run.
    pub name: String,
    /// Folder.
    pub dir: PathBuf,
    /// Results from the run's metrics.
    pub figures: Map<String, Value>,
}

impl TrainedSae {
    /// Loads the SAE. Errors as [`Sae::load`].
    pub fn load(&self) -> Result<Sae> {
        Sae::load(&self.dir)
    }
}

impl Run {
    /// Loads a run from a YAML file.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] with every mistake of the file, each with line, column and advice.
    pub fn from_yaml(file: impl AsRef<Path>) -> Result<Self> {
        Run::from_yaml_with(file, &[])
    }

    /// Loads a run from a YAML file with some keys overridden, as by `--set`: `["steps=100"]`.
    pub fn from_yaml_with(file: impl AsRef<Path>, set: &[&str]) -> Result<Self> {
        let sources = Sources {
            file: file.as_ref().to_owned(),
            set: set.iter().map(|&set| set.to_owned()).collect(),
            builds_rest: true,
            ..Sources::default()
        };
        let config = config::load(&sources)?;
        config.written.notes().iter().for_each(|note| notes::emit(note));
        Ok(Run { config, output_dir: None, resume: false })
    }

    /// Returns the config, to read or change before training.
    pub fn config(&mut self) -> &mut RunConfig {
        &mut self.config
    }

    /// Sets the output folder; the config's `output_dir` by default.
    pub fn output_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.output_dir = Some(dir.into());
        self
    }

    /// Sets whether to resume from the last checkpoint in the output folder, if there is one.
    pub fn resume(mut self, resume: bool) -> Self {
        self.resume = resume;
        self
    }

    /// Trains, saves and measures every SAE.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] for an invalid config, [`Error::Diverged`] if no SAE could be trained, [`Error::Interrupted`]
    /// if the run was interrupted.
    pub fn train(self) -> Result<Outcome> {
        self.train_until(&Interrupt::default())
    }

    /// As [`Run::train`], but saves and ends after the step in which `interrupt` is raised. The process may start other runs then.
    ///
    /// ```standalone_crate
    /// use dictlearn::{Error, Run};
    /// use dictlearn_core::interrupt::Interrupt;
    ///
    /// let dir = tempfile::tempdir().unwrap();
    /// let config = dir.path().join("config.yaml");
    /// let source = "{type: synthetic, activation_dim: 16, n_features: 32, batch_size: 64}";
    /// let saes = "[{dictionary: {type: top_k, dict_size: 32, k: 4}, trainer: {type: top_k}}]";
    /// std::fs::write(&config, format!("steps: 5\nsource: {source}\nsaes: {saes}\noutput_dir: run\n")).unwrap();
    /// let interrupt = Interrupt::default();
    /// interrupt.ask(2); // a handler of signals does this
    /// assert!(matches!(Run::from_yaml(&config)?.train_until(&interrupt), Err(Error::Interrupted)));
    /// assert_eq!(Run::from_yaml(&config)?.train()?.saes.len(), 1);
    /// # Ok::<(), dictlearn::Error>(())
    /// ```
    pub fn train_until(mut self, interrupt: &Interrupt) -> Result<Outcome> {
        let configured = self.config.output_dir.as_ref().map(|dir| dir.as_path().to_owned());
        let dir = self.output_dir.or(configured).unwrap_or_else(|| PathBuf::from("run"));
        let ending = run::train(&mut self.config, &dir, self.resume, interrupt);
        if interrupt.asked() {
            interrupt::forget();
        }
        match ending.map_err(|error| self.config.written.locate(error))? {
            Ending::Done { results, stopped, .. } => {
                let saes =
                    results.into_iter().map(|(name, figures)| TrainedSae { dir: dir.join(&name), name, figures });
                Ok(Outcome { saes: saes.collect(), stopped, dir })
            }
            Ending::Diverged(stops) => Err(Error::Diverged(run::stopped_error(stops).into())),
            Ending::Interrupted(_) | Ending::NotBegun => Err(Error::Interrupted),
        }
    }
}
