//! The config of a run: its fields, and how YAML files are loaded.

mod check;
mod example;
mod layers;
mod load;
mod spans;
mod steps;
mod unsourced;

pub(crate) use check::check_component;
pub use example::example;
pub use layers::{Sources, variables};
pub use load::{Written, folder_name, json_schema, load, to_yaml, type_name};
pub use steps::SaveSteps;
pub use unsourced::{check_without_source, trainer_field};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use dictlearn_core::data::TaggedSource;
use dictlearn_core::data::{CheckpointBuffer, OnNonfinite, Purpose, SourceCx};
use dictlearn_core::files::ConfigPath;
use dictlearn_core::machine::device::{DeviceChoice, PrecisionChoice};
use dictlearn_core::report::TaggedLogger;
use dictlearn_core::report::TaggedMetric;
use dictlearn_core::train::SaeConfig;

/// One experiment: a stream of activations and the dictionaries that train on it.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Random seed of initial weights, shuffling and resampling. An SAE's own `seed` replaces it for that SAE.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
    #[serde(default)]
    pub device: DeviceChoice,
    /// Dtype of matrix products: `float32`, `bfloat16` or `auto`. Weights, moments and losses stay float32.
    #[serde(default)]
    pub precision: PrecisionChoice,
    /// Number of training steps, one batch each.
    #[serde(default = "default_steps")]
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Stop after this step and save, with schedules that still span `steps`; at most `steps`.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub stop_after: Option<u64>,
    /// Output folder of the run, relative to the config's folder.
    #[serde(default)]
    pub output_dir: Option<ConfigPath>,
    /// Scale activations to unit mean squared norm during training; the saved weights include the factor. For
    /// input-target pairs, targets are divided by the inputs' norm too.
    #[serde(default)]
    pub normalize_activations: bool,
    /// Logging interval, in steps.
    #[serde(default = "default_log_every")]
    #[schemars(range(min = 1))]
    pub log_every: u64,
    /// Interval between checkpoints of the whole training state, in steps, for `--resume`; null for none.
    #[serde(default = "default_checkpoint_every")]
    #[schemars(range(min = 1))]
    pub checkpoint_every: Option<u64>,
    /// How a checkpoint stores the activation buffer. `contents` saves its activations: as much disk as the buffer
    /// takes memory, and resuming only reads them. `replay` saves only their tokens: 28 bytes per activation, and
    /// resuming runs the model over their contexts again.
    #[serde(default)]
    pub checkpoint_buffer: CheckpointBuffer,
    /// What to do if a loss, gradient or activation is not finite. `stop` undoes that SAE's step and stops the SAE,
    /// while the others continue; a non-finite activation stops the run. `skip_batch` skips the batch.
    #[serde(default)]
    pub on_nonfinite: OnNonfinite,
    /// Interval between saves of the weights alone, in steps, to `<sae>/checkpoints/ae_<step>.safetensors`.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub save_every: Option<u64>,
    /// Also save the weights at these steps: a list (`[0, 100, 1000]`; 0 is before the first step), or `{log: N}` for
    /// step 0 and N - 1 log-spaced steps from 0.1% of the run to before its end. `{log: 7}` gives the steps of the
    /// reference's demo.
    #[serde(default)]
    pub save_steps: Option<SaveSteps>,
    /// Source of the activations.
    pub source: Box<dyn TaggedSource>,
    /// Source of the metrics' activations: `source` with these keys changed, for example to held-out text. By default,
    /// the metrics use the rows that `source` holds out (`held_out`), or else data that training has not read.
    #[serde(default)]
    pub eval_source: Option<Box<dyn TaggedSource>>,
    /// The SAEs, which all train on the same stream.
    #[serde(default)]
    pub saes: Vec<SaeConfig>,
    /// Metrics computed at the end of training and by `dictlearn eval`. Default: `reconstruction`, and for a language
    /// model `loss_recovered`, if the source allows them. With `[]`, training computes none; `dictlearn eval` uses the
    /// default.
    #[serde(default)]
    pub metrics: Vec<Box<dyn TaggedMetric>>,
    /// Where logged metrics go: by default to a file in the run's folder; `[]` for nowhere.
    #[serde(default)]
    pub loggers: Vec<Box<dyn TaggedLogger>>,
    /// The files, variables and arguments that it was loaded from.
    #[serde(skip)]
    pub written: Written,
}

impl RunConfig {
    /// Returns the context in which its sources are built.
    pub fn source_cx(&self, device: tch::Device) -> SourceCx {
        SourceCx {
            seed: self.seed,
            device,
            precision: self.precision.precision(device).0,
            checkpoint_buffer: self.checkpoint_buffer,
            on_nonfinite: self.on_nonfinite,
            purpose: Purpose::default(),
        }
    }
}

fn default_seed() -> u64 {
    42
}

fn default_steps() -> u64 {
    10_000
}

fn default_log_every() -> u64 {
    100
}

fn default_checkpoint_every() -> Option<u64> {
    Some(1000)
}
