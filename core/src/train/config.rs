//! The config of one SAE.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::modifier::TaggedModifier;
use super::trainer::TaggedTrainer;
use crate::data::OnNonfinite;
use crate::files::ConfigPath;
use crate::sae::TaggedDictionary;

/// One dictionary of a run and how it is trained.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SaeConfig {
    /// Its name and folder; the trainer's name by default.
    pub name: String,
    /// The site that it trains on, where the source has several: a name or a glob. Every one by default; those that
    /// train on more than one are named `<name>-<site>`.
    #[serde(default)]
    pub site: Option<String>,
    /// The architecture; the trainer's usual one by default.
    pub dictionary: Box<dyn TaggedDictionary>,
    /// The loss and its schedules.
    pub trainer: Box<dyn TaggedTrainer>,
    /// What is changed about the trainer.
    #[serde(default)]
    pub modifiers: Vec<Box<dyn TaggedModifier>>,
    /// Weights to start from: the directory of an SAE, trained or imported, that trains on as it is, or a .safetensors
    /// file of initial weights, of which what a trainer takes from the first batch (`b_dec` of the TopK family) still is
    /// taken from it. `k` and groups stay the dictionary's.
    #[serde(default)]
    pub init_from: Option<ConfigPath>,
    /// Seed of this SAE's initial weights and random choices; the run's `seed` by default. The stream of activations is the
    /// same for every SAE, so that `sweep: {seed: [0, 1]}` shows what the seed alone changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The run's `on_nonfinite`, if it is another for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_nonfinite: Option<OnNonfinite>,
}
