//! What a plugin brings into scope: `use dictlearn_core::prelude::*;`.

pub use anyhow::{bail, Context, Result};
pub use inventory;
pub use schemars::JsonSchema;
pub use serde::{Deserialize, Serialize};
pub use serde_json::{Map, Value};
pub use tch::{self, Device, Kind, Tensor};
pub use typetag;

pub use crate::adapted::{Normalization, NormalizationKind};
pub use crate::autoencoder::{Autoencoder, Nonlinearity};
pub use crate::config::{ConfigPath, InputError, Mistakes, PathOrName, Under};
pub use crate::constraint::Constraints;
pub use crate::device::Precision;
pub use crate::dictionary::{
    decoder_for, dict_size, random_directions, saved_shape, trained, trained_matrix, without_bias, Code, Decoder,
    Dictionary, DictionaryConfig, DictionaryCx, Dims, Encoder, SavedClass,
};
pub use crate::firing::Firing;
pub use crate::logger::{Logger, LoggerConfig};
pub use crate::memory::{check as check_memory, Need as MemoryNeed};
pub use crate::metric::{figures, Figures, Metric, MetricConfig, Subject, Variance};
pub use crate::model::{HookPoint, Hooks, Io, LanguageModel, Stop, Tokens};
pub use crate::modifier::{Modifier, ModifierConfig, ModifierCx, Need};
pub use crate::optim::{Adam, AdamConfig};
pub use crate::register;
pub use crate::resample::{ResampleWeight, Resampling};
pub use crate::schedule::{RunLength, Schedule};
pub use crate::source::{
    ActivationSource, Activations, Batch, CheckpointBuffer, HeldOut, ModelSource, Part, Purpose, Site, SitePart,
    SourceConfig, SourceCx,
};
pub use crate::state::State;
pub use crate::text::{Chat, Document, Record, TextConfig, TextStream};
pub use crate::top_k::Selection;
pub use crate::trainer::{
    mean_of_sums, penalizable, AfterStep, ByHand, HandPass, Pass, Role, Terms, Trainer, TrainerConfig, TrainerCx,
};
pub use crate::training::OnNonfinite;
pub use crate::two_layer::{ActivationFunction, Block, Derivatives, Input, Relu, Slope, TwoLayer, Weight};
