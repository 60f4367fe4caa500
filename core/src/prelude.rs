//! What a plugin brings into scope: `use dictlearn_core::prelude::*;`.

pub use anyhow::{Context, Result, bail};
pub use inventory;
pub use schemars::JsonSchema;
pub use serde::{Deserialize, Serialize};
pub use serde_json::{Map, Value};
pub use tch::{self, Device, Kind, Tensor};

pub use crate::adapted::{Normalization, NormalizationKind};
pub use crate::autoencoder::{Autoencoder, Nonlinearity};
pub use crate::component;
pub use crate::component::{TaggedSource, TaggedText};
pub use crate::config::{ConfigPath, InputError, Mistakes, PathOrName, Under};
pub use crate::constraint::Constraints;
pub use crate::device::Precision;
pub use crate::dictionary::{
    Code, Decoder, Dictionary, DictionaryConfig, DictionaryCx, Dims, Encoder, SavedClass, decoder_for,
    random_directions, saved_shape, trained, trained_matrix, without_bias,
};
pub use crate::firing::Firing;
pub use crate::logger::{Logger, LoggerConfig};
pub use crate::memory::{Need as MemoryNeed, check as check_memory};
pub use crate::metric::{Figures, Metric, MetricConfig, Subject, Variance, figures};
pub use crate::model::{HookPoint, Hooks, Io, LanguageModel, Stop, Tokens};
pub use crate::modifier::{Modifier, ModifierConfig, ModifierCx, Need};
pub use crate::optim::{Adam, AdamConfig};
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
    AfterStep, ByHand, HandPass, Pass, Role, Terms, Trainer, TrainerConfig, TrainerCx, mean_of_sums, penalizable,
};
pub use crate::training::OnNonfinite;
pub use crate::two_layer::{ActivationFunction, Block, Derivatives, Input, Relu, Slope, TwoLayer, Weight};
