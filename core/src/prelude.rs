//! Everything a plugin needs in scope: `use dictlearn_core::prelude::*;`.

pub use anyhow::{Context, Result, bail};
pub use inventory;
pub use schemars::JsonSchema;
pub use serde::{Deserialize, Serialize};
pub use serde_json::{Map, Value};
pub use tch::{self, Device, Kind, Tensor};
pub use tracing;

pub use crate::data::OnNonfinite;
pub use crate::data::text::{Chat, Document, Record, TextConfig, TextStream};
pub use crate::data::{
    ActivationSource, Activations, Batch, CheckpointBuffer, HeldOut, ModelSource, Part, Purpose, Site, SitePart,
    SourceConfig, SourceCx,
};
pub use crate::error::{InputError, Mistakes, Under};
pub use crate::files::state::State;
pub use crate::files::{ConfigPath, PathOrName};
pub use crate::lm::{HookPoint, Hooks, Io, LanguageModel, Stop, Tokens};
pub use crate::machine::device::Precision;
pub use crate::machine::memory::{MemoryNeed, check as check_memory};
pub use crate::report::{Figures, Metric, MetricConfig, Subject, Variance, figures};
pub use crate::report::{Logger, LoggerConfig};
pub use crate::sae::Selection;
pub use crate::sae::two_layer::{
    ActivationFunction, Block, Derivatives, Elementwise, Input, Pointwise, Relu, Slope, relu,
};
pub use crate::sae::{
    Affine, Between, Code, Dictionary, DictionaryConfig, DictionaryCx, Dims, Encoder, Layout, SavedClass, SavedTensors,
    Weight, decoder_for, random_directions, scale_in_place, trained, trained_matrix,
};
pub use crate::sae::{Normalization, NormalizationKind};
pub use crate::train::Constraints;
pub use crate::train::Firing;
pub use crate::train::Gradients;
pub use crate::train::analytic::{AnalyticPass, AnalyticStep};
pub use crate::train::{Adam, AdamConfig};
pub use crate::train::{
    AfterStep, Pass, Role, Terms, Trainer, TrainerConfig, TrainerCx, cannot_train, mean_of_sums, penalizable,
};
pub use crate::train::{Modifier, ModifierConfig, ModifierCx, Requirement};
pub use crate::train::{Objective, Penalty, ResidualError, Seen};
pub use crate::train::{ResampleWeight, Resampling};
pub use crate::train::{RunLength, Schedule};

pub use crate::component;
pub use crate::data::TaggedSource;
pub use crate::data::text::TaggedText;
