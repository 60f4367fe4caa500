//! The config of a run: what a YAML file may say, and how it is read.

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
    /// Seed of everything random: initial weights, shuffling, resampling. An SAE may have a `seed` of its own.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
    #[serde(default)]
    pub device: DeviceChoice,
    /// The type of the matrix products: `float32`, `bfloat16` or `auto`. Weights, moments and losses stay float32.
    #[serde(default)]
    pub precision: PrecisionChoice,
    /// How many batches to train on.
    #[serde(default = "default_steps")]
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// End at this step, saved, with the schedules still laid out for `steps`; no more than `steps`.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub stop_after: Option<u64>,
    /// Where the run is written; relative to the config's folder.
    #[serde(default)]
    pub output_dir: Option<ConfigPath>,
    /// Scale activations to unit mean squared norm while training; the factor is folded into what is saved. Of pairs it is
    /// the inputs' norm, by which what is to be predicted is divided too.
    #[serde(default)]
    pub normalize_activations: bool,
    /// Log every so many steps.
    #[serde(default = "default_log_every")]
    #[schemars(range(min = 1))]
    pub log_every: u64,
    /// Save the whole training state, for `--resume`, every so many steps; null for never.
    #[serde(default = "default_checkpoint_every")]
    #[schemars(range(min = 1))]
    pub checkpoint_every: Option<u64>,
    /// What a checkpoint has of a buffer of activations: its `contents`, or which tokens they are of, for the model to be run
    /// over them again on resuming (`replay`). The first takes as much disk as the buffer does memory and resumes at once, the
    /// second hardly any and as long as filling the buffer a few times.
    #[serde(default)]
    pub checkpoint_buffer: CheckpointBuffer,
    /// What happens when a loss, a gradient or an activation is not finite: the SAE stops as it was before that step while the
    /// others go on (`stop`; activations stop all), or the batch is left out (`skip_batch`).
    #[serde(default)]
    pub on_nonfinite: OnNonfinite,
    /// Keep the weights alone every so many steps, in `<sae>/checkpoints/ae_<step>.safetensors`.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub save_every: Option<u64>,
    /// Keep the weights at these steps too: a list (`[0, 100, 1000]`; 0 is before the first step), or `{log: N}` for step 0
    /// and N - 1 steps from 0.1% of the run on, evenly spaced by ratio and before its end. `{log: 7}` gives the steps of the
    /// reference's demo.
    #[serde(default)]
    pub save_steps: Option<SaveSteps>,
    /// Where activations come from.
    pub source: Box<dyn TaggedSource>,
    /// Where the metrics' activations come from: `source` with these keys changed, say to a held-out text. By default they
    /// are the rows that `source` holds out (`held_out`), or else the metrics go on with what training has not read.
    #[serde(default)]
    pub eval_source: Option<Box<dyn TaggedSource>>,
    /// The dictionaries; all of them train on the same stream.
    #[serde(default)]
    pub saes: Vec<SaeConfig>,
    /// What is measured at the end of training and by `dictlearn eval`. If absent, what the source allows: `reconstruction`, and
    /// `loss_recovered` for a language model. With `[]` training measures nothing, and `dictlearn eval` measures the default.
    #[serde(default)]
    pub metrics: Vec<Box<dyn TaggedMetric>>,
    /// Where the figures go: to a file in the run's folder unless told otherwise; `[]` for nowhere.
    #[serde(default)]
    pub loggers: Vec<Box<dyn TaggedLogger>>,
    /// The files that say it.
    #[serde(skip)]
    pub written: Written,
}

impl RunConfig {
    /// What its sources are built for.
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
