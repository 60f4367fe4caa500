//! Sources: where activations come from.

use std::fmt::Debug;

use anyhow::{bail, Result};
use tch::{Device, Kind, Tensor};

use crate::config::InputError;
use crate::device::Precision;
use crate::model::{HookPoint, LanguageModel, Tokens};
use crate::state::State;

/// What a source is built for.
#[derive(Debug, Clone, Copy)]
pub struct SourceCx {
    /// Seed of the shuffling.
    pub seed: u64,
    /// Where the batches are wanted.
    pub device: Device,
    /// The type of a model's matrix products.
    pub precision: Precision,
}

/// The config of a source.
#[typetag::serde(tag = "type")]
pub trait SourceConfig: Debug + Send + Sync {
    /// Opens the source: reads headers, loads the model.
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>>;
}

/// A batch of activations.
#[derive(Debug)]
pub struct Batch {
    /// What the dictionary reads, [B, d], float32.
    pub x: Tensor,
    /// What it is to reconstruct, [B, d_out]; the same tensor as `x` unless the source has pairs.
    pub target: Tensor,
}

impl Batch {
    /// A batch whose target is its input.
    pub fn of(x: Tensor) -> Self {
        Batch { target: x.shallow_clone(), x }
    }

    /// Number of activations.
    pub fn len(&self) -> i64 {
        self.x.size()[0]
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the target is the input.
    pub fn is_autoencoding(&self) -> bool {
        self.x.data_ptr() == self.target.data_ptr()
    }

    /// The first `count` activations, or all if there are fewer.
    #[must_use]
    pub fn first(&self, count: i64) -> Batch {
        let first = |tensor: &Tensor| tensor.narrow(0, 0, count.min(self.len()));
        if self.is_autoencoding() {
            return Batch::of(first(&self.x));
        }
        Batch { x: first(&self.x), target: first(&self.target) }
    }

    /// The batch with every value multiplied.
    pub fn scaled(&self, factor: f64) -> Batch {
        let x = &self.x * factor;
        if self.is_autoencoding() {
            return Batch::of(x);
        }
        Batch { x, target: &self.target * factor }
    }
}

/// A stream of activations.
pub trait ActivationSource: Send {
    /// Width of an activation, d, and of what is to be reconstructed.
    fn widths(&self) -> (i64, i64);

    /// The next batch, or `None` at the end of the data. After the end, [`ActivationSource::rewind`] starts another
    /// pass.
    fn next_batch(&mut self) -> Result<Option<Batch>>;

    /// Goes back to the beginning of the data. What a shuffle draws next is not what it drew the first time.
    fn rewind(&mut self) -> Result<()>;

    /// How many passes over the data training may take; `None` for as many as it needs.
    fn passes(&self) -> Option<u64> {
        None
    }

    /// Whether a pass has no end.
    fn is_endless(&self) -> bool {
        false
    }

    /// Mean over activations of the squared norm, ‖x‖², from a sample at the beginning of the stream. No activation is
    /// lost to training by it.
    fn mean_squared_norm(&mut self) -> Result<f64>;

    /// The language model behind the activations, for metrics that change what it computes.
    fn language_model(&mut self) -> Option<&mut dyn ModelSource> {
        None
    }

    /// The directions that activations are made of, [n, d], where they are known: for metrics that look for them.
    fn true_features(&self) -> Option<Tensor> {
        None
    }

    /// Bytes that it holds of activations, at most.
    fn memory(&self) -> u64 {
        0
    }

    /// What an SAE's config.json says of it, under `buffer`.
    fn describe(&self) -> serde_json::Value;

    /// Where the stream stands.
    fn state(&self) -> Result<State>;

    /// Takes the stream to where [`ActivationSource::state`] was called.
    fn restore(&mut self, state: &State) -> Result<()>;

    /// What the user should know at the end: records skipped, activations dropped.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// [`ActivationSource::mean_squared_norm`] of the first 100 batches, which the source then goes back over.
pub fn sampled_mean_squared_norm(source: &mut dyn ActivationSource) -> Result<f64> {
    let before = source.state()?;
    let (mut sum, mut count) = (0.0, 0);
    while count < 100 {
        let Some(batch) = source.next_batch()? else { break };
        sum += batch.x.square().sum_dim_intlist(1, false, Kind::Float).mean(Kind::Float).double_value(&[]);
        count += 1;
    }
    source.restore(&before)?;
    Ok(sum / f64::from(count.max(1)))
}

/// A source read over and over, as often as it allows.
pub struct Stream {
    source: Box<dyn ActivationSource>,
    pass: u64,
    batches_in_pass: u64,
}

impl Stream {
    /// The stream at its beginning.
    pub fn new(source: Box<dyn ActivationSource>) -> Self {
        Stream { source, pass: 0, batches_in_pass: 0 }
    }

    /// The source.
    pub fn source(&mut self) -> &mut dyn ActivationSource {
        &mut *self.source
    }

    /// How many passes over the source were begun.
    pub fn passes(&self) -> u64 {
        self.pass + 1
    }

    /// The next batch; `None` when the source allows no further pass.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        loop {
            if let Some(batch) = self.source.next_batch()? {
                self.batches_in_pass += 1;
                return Ok(Some(batch));
            }
            if self.batches_in_pass == 0 {
                let notes = self.source.notes().join("; ");
                let notes = if notes.is_empty() { notes } else { format!(" ({notes})") };
                bail!(InputError::new(format!("the source gave not one batch of activations{notes}"))
                    .field("source")
                    .help("its data is shorter than one batch: add data, or make the batches smaller"));
            }
            if self.source.passes().is_some_and(|passes| self.pass + 1 >= passes) {
                return Ok(None);
            }
            self.pass += 1;
            self.batches_in_pass = 0;
            self.source.rewind()?;
        }
    }

    /// Where the stream stands.
    pub fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.put("pass", self.pass)?;
        state.put("batches_in_pass", self.batches_in_pass)?;
        state.put_all("source", self.source.state()?);
        Ok(state)
    }

    /// Takes the stream to where [`Stream::state`] was called.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        self.pass = state.get("pass")?;
        self.batches_in_pass = state.get("batches_in_pass")?;
        self.source.restore(&state.under("source"))
    }
}

/// A source that harvests a language model.
pub trait ModelSource {
    /// The model.
    fn model(&self) -> &dyn LanguageModel;

    /// The place in it whose value a dictionary reads.
    fn reads(&self) -> &HookPoint;

    /// The place in it whose value a dictionary reconstructs; the same unless the source has pairs.
    fn writes(&self) -> &HookPoint;

    /// The next `rows` contexts of the text (fewer at its end), or `None` where there are no more.
    fn next_tokens(&mut self, rows: i64) -> Result<Option<Tokens>>;
}
