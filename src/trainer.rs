//! Training one SAE in code, without YAML.

use std::path::{Path, PathBuf};

use dictlearn_core::data::{Batch, SitePart};
use dictlearn_core::error::InputError;
use dictlearn_core::files::from_yaml;
use dictlearn_core::machine::device::{DeviceChoice, Precision};
use dictlearn_core::registry::ComponentKind;
use dictlearn_core::sae::TaggedDictionary;
use dictlearn_core::train::{RunLength, SaeConfig, TaggedModifier, TaggedTrainer, Training, TrainingCx, saved_config};
use serde_json::{Map, Value, json};
use tch::Tensor;

use crate::config::check_component;
use crate::{Result, Sae};

/// One SAE in training.
///
/// ```
/// use dictlearn::Trainer;
/// use dictlearn::plugins::method_top_k::{TopKConfig, TopKDictionaryConfig};
/// use tch::{Kind, Tensor, kind};
///
/// let dictionary = TopKDictionaryConfig { k: 4, dict_size: Some(64), expansion_factor: None };
/// let mut trainer = Trainer::builder(dictionary, TopKConfig::default()).steps(20).build(16)?;
/// for _ in 0..20 {
///     trainer.step(&Tensor::randn([256, 16], kind::FLOAT_CPU))?;
/// }
/// let stats = trainer.step_with_stats(&Tensor::randn([256, 16], kind::FLOAT_CPU))?;
/// println!("loss {}, L0 {}", stats.loss(), stats.l0());
/// let sae = trainer.finish()?;
/// assert_eq!(sae.dims().features, 64);
/// # Ok::<(), dictlearn::Error>(())
/// ```
pub struct Trainer {
    training: Training,
    config: SaeConfig,
    cx: TrainingCx,
    step: u64,
    stats: Option<StepStats>,
}

/// Settings of a [`Trainer`].
#[derive(Debug)]
pub struct TrainerBuilder {
    config: SaeConfig,
    steps: u64,
    seed: u64,
    output_dim: Option<i64>,
    parts: Vec<SitePart>,
    device: DeviceChoice,
    precision: Precision,
}

impl TrainerBuilder {
    /// Number of steps that schedules span; default 10,000.
    pub fn steps(mut self, steps: u64) -> Self {
        self.steps = steps;
        self
    }

    /// Seed of initial weights and random choices; default 42.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Adds a modifier. Modifiers apply in the order in which they are added.
    pub fn modifier(mut self, modifier: impl TaggedModifier + 'static) -> Self {
        self.config.modifiers.push(Box::new(modifier));
        self
    }

    /// Width of the output if it differs from the input's, as in transcoders.
    pub fn output_dim(mut self, width: i64) -> Self {
        self.output_dim = Some(width);
        self
    }

    /// Names and widths of the parts of an activation, side by side in this order, as crosscoders read them.
    pub fn parts(mut self, parts: Vec<SitePart>) -> Self {
        self.parts = parts;
        self
    }

    /// Starts from the weights in an SAE's folder instead of random ones.
    pub fn init_from(mut self, dir: impl Into<PathBuf>) -> Self {
        self.config.init_from = Some(dir.into().into());
        self
    }

    /// Device to train on; default: the first GPU, or the CPU if there is none.
    pub fn device(mut self, device: DeviceChoice) -> Self {
        self.device = device;
        self
    }

    /// Dtype of matrix products; default float32. Weights, moments and losses are always float32.
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// Name of the SAE in messages; default `sae`.
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.config.name);
        self
    }

    /// Returns the trainer, with random initial weights, for activations of this width.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) if the trainer cannot train this dictionary with these settings.
    pub fn build(mut self, activation_dim: i64) -> Result<Trainer> {
        check_component(ComponentKind::Dictionary, &self.config.dictionary, "dictionary")?;
        check_component(ComponentKind::Trainer, &self.config.trainer, "trainer")?;
        for modifier in &self.config.modifiers {
            check_component(ComponentKind::Modifier, modifier, "modifier")?;
        }
        for width in [Some(activation_dim), self.output_dim].into_iter().flatten() {
            if width < 1 {
                return Err(InputError::new(format!("activations cannot have width {width}")).into());
            }
        }
        let written = written(&*self.config.trainer)?;
        self.config.trainer.adapt_defaults(&mut RunLength::new(self.steps, None, &written, None));
        let cx = TrainingCx {
            widths: (activation_dim, self.output_dim.unwrap_or(activation_dim)),
            parts: self.parts,
            steps: self.steps,
            seed: self.seed,
            device: self.device.device()?,
            precision: self.precision,
        };
        Ok(Trainer { training: Training::new(&self.config, &cx)?, config: self.config, cx, step: 0, stats: None })
    }
}

impl Trainer {
    /// Starts a builder from the config structs of a dictionary and a trainer, the ones that YAML names. Fields at
    /// their defaults adapt to the number of steps, as in a config.
    pub fn builder(
        dictionary: impl TaggedDictionary + 'static,
        trainer: impl TaggedTrainer + 'static,
    ) -> TrainerBuilder {
        TrainerBuilder {
            config: SaeConfig {
                name: "sae".to_owned(),
                site: None,
                dictionary: Box::new(dictionary),
                trainer: Box::new(trainer),
                modifiers: Vec::new(),
                init_from: None,
                seed: None,
                on_nonfinite: None,
            },
            steps: 10_000,
            seed: 42,
            output_dim: None,
            parts: Vec::new(),
            device: DeviceChoice::default(),
            precision: Precision::Float32,
        }
    }

    /// Takes one step on activations [B, d].
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) for a batch of another shape, [`Error::Diverged`](crate::Error::Diverged)
    /// if the loss or a
    /// gradient is not finite. On a CPU the failed step changes nothing; on a GPU the error is reported by
    /// [`Trainer::save`] and
    /// [`Trainer::finish`].
    pub fn step(&mut self, x: &Tensor) -> Result<()> {
        self.take(Batch::of(self.own(x, self.cx.widths.0)?), false)
    }

    /// Takes one step on pairs: predicts `target` [B, d_out] from `x` [B, d]. Errors as [`Trainer::step`].
    pub fn step_on_pairs(&mut self, x: &Tensor, target: &Tensor) -> Result<()> {
        let (x, target) = (self.own(x, self.cx.widths.0)?, self.own(target, self.cx.widths.1)?);
        if x.size()[0] != target.size()[0] {
            return Err(InputError::new(format!(
                "the batch has {} inputs but {} targets: a pair needs one of each",
                x.size()[0],
                target.size()[0]
            ))
            .into());
        }
        self.take(Batch { x, target }, false)
    }

    /// Takes a step as [`Trainer::step`], slightly slower, and returns its metrics from the same forward pass.
    pub fn step_with_stats(&mut self, x: &Tensor) -> Result<&StepStats> {
        self.take(Batch::of(self.own(x, self.cx.widths.0)?), true)?;
        Ok(self.stats.get_or_insert_default())
    }

    /// Returns the metrics of the last [`Trainer::step_with_stats`].
    pub fn stats(&self) -> Option<&StepStats> {
        self.stats.as_ref()
    }

    /// Returns the number of steps taken.
    pub fn steps_taken(&self) -> u64 {
        self.step
    }

    /// Writes the current SAE to a folder: `ae.safetensors`, `ae.pt` and `config.json`. [`Sae::load`] reads it.
    ///
    /// # Errors
    ///
    /// [`Error::Diverged`](crate::Error::Diverged) as for [`Trainer::step`], [`Error::Io`](crate::Error::Io) if the
    /// folder cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.training.settle()?;
        let folded = self.training.folded(1.0)?;
        Ok(dictlearn_core::sae::saved::write(dir.as_ref(), &*folded, &self.saved_config()?)?)
    }

    /// Returns the trained SAE. Errors as [`Trainer::save`].
    pub fn finish(self) -> Result<Sae> {
        self.training.settle()?;
        let config = self.saved_config()?;
        Ok(Sae::with_config(&self.config.name, self.training.folded(1.0)?, config))
    }

    /// Returns the underlying dictionary, trainer and optimiser.
    pub fn training(&mut self) -> &mut Training {
        &mut self.training
    }

    fn saved_config(&self) -> Result<Value> {
        Ok(saved_config(&self.config, &self.training, &self.cx, &json!({}))?)
    }

    fn take(&mut self, batch: Batch, measured: bool) -> Result<()> {
        let figures = self.training.step(self.step, &batch, measured)?;
        self.step += 1;
        if let Some(figures) = figures {
            self.stats = Some(StepStats { step: self.step, figures });
        }
        Ok(())
    }

    fn own(&self, tensor: &Tensor, width: i64) -> Result<Tensor> {
        if tensor.size().len() != 2 || tensor.size()[1] != width || tensor.size()[0] == 0 || !tensor.is_floating_point()
        {
            return Err(InputError::new(format!(
                "a batch has shape {:?} and type {:?}; this trainer takes floats [B, {width}]",
                tensor.size(),
                tensor.kind()
            ))
            .into());
        }
        Ok(tensor.detach().to_device(self.cx.device).to_kind(tch::Kind::Float))
    }
}

/// Returns a predicate for fields of a trainer's config that differ from their defaults.
fn written(trainer: &dyn TaggedTrainer) -> Result<impl Fn(&str) -> bool + use<>> {
    let fields = |trainer: &dyn TaggedTrainer| serde_json::to_value(trainer).map_err(anyhow::Error::from);
    let own = fields(trainer)?;
    let default: Option<Box<dyn TaggedTrainer>> = from_yaml(&format!("{{type: {}}}", trainer.typetag_name())).ok();
    let default = default.map(|trainer| fields(&*trainer)).transpose()?.unwrap_or_default();
    Ok(move |field: &str| own[field] != default[field])
}

/// Metrics of one step.
#[derive(Debug, Clone, Default)]
pub struct StepStats {
    /// Number of the step, counted from 1.
    pub step: u64,
    /// Every value that a run logs, by its name in `metrics.jsonl`.
    pub figures: Map<String, Value>,
}

impl StepStats {
    /// Returns a metric by name; NaN if the trainer does not log it.
    pub fn get(&self, name: &str) -> f64 {
        self.figures.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN)
    }

    /// Returns the loss.
    pub fn loss(&self) -> f64 {
        self.get("loss")
    }

    /// Returns L0, the mean number of active features of an activation.
    pub fn l0(&self) -> f64 {
        self.get("l0")
    }

    /// Returns the fraction of the activations' variance that the reconstruction explains.
    pub fn explained(&self) -> f64 {
        self.get("frac_variance_explained")
    }
}
