//! The config of one SAE.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::modifier::TaggedModifier;
use super::trainer::TaggedTrainer;
use crate::data::OnNonfinite;
use crate::files::ConfigPath;
use crate::sae::TaggedDictionary;

/// One dictionary of a run, and how it is trained.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SaeConfig {
    /// Name of the SAE and its folder. Default: the trainer's name.
    pub name: String,
    /// Site to train on, a name or a glob, for sources with several. Default: every site. An SAE that matches several
    /// sites is trained on each, as `<name>-<site>`.
    #[serde(default)]
    pub site: Option<String>,
    /// Architecture. Default: the trainer's default dictionary.
    pub dictionary: Box<dyn TaggedDictionary>,
    /// Loss and schedules.
    pub trainer: Box<dyn TaggedTrainer>,
    /// Changes to the trainer.
    #[serde(default)]
    pub modifiers: Vec<Box<dyn TaggedModifier>>,
    /// Weights to start from. A folder of an SAE, trained or imported, continues training that SAE. A .safetensors file
    /// gives initial weights; values that a trainer initialises from the first batch (`b_dec` of the TopK family) are
    /// still initialised. `k` and groups come from this config.
    #[serde(default)]
    pub init_from: Option<ConfigPath>,
    /// Seed of initial weights and random choices. Default: the run's `seed`. Every SAE sees the same activations, so
    /// `sweep: {seed: [0, 1]}` isolates the effect of the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Overrides the run's `on_nonfinite`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_nonfinite: Option<OnNonfinite>,
}
