//! Sources: where activations come from.

use std::fmt::Debug;
use std::ops::Range;

use anyhow::{Result, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::error::InputError;
use crate::files::state::State;
use crate::lm::{HookPoint, LanguageModel, Tokens};
use crate::machine::device::Precision;
use crate::machine::memory::MemoryNeed;

/// What a source is built for.
#[derive(Debug, Clone, Copy)]
pub struct SourceCx {
    /// Seed of the shuffling.
    pub seed: u64,
    /// Where the batches are wanted.
    pub device: Device,
    /// The type of a model's matrix products.
    pub precision: Precision,
    /// What [`ActivationSource::state`] has of a buffer of activations that a model made.
    pub checkpoint_buffer: CheckpointBuffer,
    /// Whether activations that are not finite end the run or are left out.
    pub on_nonfinite: OnNonfinite,
    /// What its activations are for, where it holds some back from training ([`SourceConfig::held_out`]).
    pub purpose: Purpose,
}

/// What a source's activations are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Purpose {
    /// Training: the rows that are not held out.
    #[default]
    Training,
    /// Metrics: the rows that are held out; all of them where none are.
    Evaluation,
}

impl Default for SourceCx {
    /// On the CPU, in float32, with seed 0.
    fn default() -> Self {
        SourceCx {
            seed: 0,
            device: Device::Cpu,
            precision: Precision::Float32,
            checkpoint_buffer: CheckpointBuffer::default(),
            on_nonfinite: OnNonfinite::default(),
            purpose: Purpose::default(),
        }
    }
}

/// What a checkpoint has of a buffer of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointBuffer {
    /// All of it: as much disk as the buffer takes memory, and resuming takes no longer than reading it.
    #[default]
    Contents,
    /// Which tokens its activations are of: 28 bytes each, whatever the model's width. On resuming the model is run over
    /// their contexts again.
    Replay,
}

/// The config of a source.
pub trait SourceConfig: Debug + Send + Sync {
    /// Opens the source: reads headers, loads the model.
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>>;

    /// The rows that it holds back from training for the metrics, if any. Such a source is opened a second time, with
    /// [`Purpose::Evaluation`], and then gives these rows alone.
    fn held_out(&self) -> Option<HeldOut> {
        None
    }
}

crate::tagged::tagged! {
    /// A source's config, by `type`.
    TaggedSource: SourceConfig => Source {}
}

/// Rows held back from training, for metrics.
///
/// The rows are divided into strata of `1 / fraction` consecutive rows, and one row of each is held out, drawn by the seed.
/// So the part is exact, evenly spread, and found without a list of all rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeldOut {
    fraction: f64,
    seed: u64,
}

impl HeldOut {
    /// What a source's fields `held_out` and `held_out_seed` ask for; `None` where the fraction is 0.
    pub fn new(fraction: f64, seed: u64) -> Option<Self> {
        (fraction > 0.0).then_some(HeldOut { fraction, seed })
    }

    /// The rows of a range that are wanted for a purpose, as ranges of consecutive rows, in order.
    pub fn wanted(self, rows: Range<u64>, purpose: Purpose) -> Vec<Range<u64>> {
        let held = self.held(&rows);
        if purpose == Purpose::Evaluation {
            return held.into_iter().map(|row| row..row + 1).collect();
        }
        let starts = std::iter::once(rows.start).chain(held.iter().map(|row| row + 1));
        let ends = held.iter().copied().chain([rows.end]);
        starts.zip(ends).map(|(start, end)| start..end).filter(|range| !range.is_empty()).collect()
    }

    /// Whether a row is wanted for a purpose.
    pub fn wants(self, row: u64, purpose: Purpose) -> bool {
        !self.wanted(row..row + 1, purpose).is_empty()
    }

    /// The rows of a range that are held out, in order.
    fn held(self, rows: &Range<u64>) -> Vec<u64> {
        let stratum = |row: u64| (row as f64 * self.fraction) as u64;
        let start = |stratum: u64| (stratum as f64 / self.fraction).ceil() as u64;
        // One stratum more at both ends, where rounding may have put the row.
        (stratum(rows.start).saturating_sub(1)..stratum(rows.end) + 2)
            .map(|stratum| {
                let (first, next) = (start(stratum), start(stratum + 1));
                first + mixed(self.seed, stratum) % (next - first).max(1)
            })
            .filter(|row| rows.contains(row))
            .collect()
    }

    /// Refuses a part of so many rows that leaves none for the purpose.
    pub fn check(self, rows: u64, purpose: Purpose) -> Result<()> {
        if self.fraction >= 1.0 {
            bail!(
                InputError::new("nothing is left to train on")
                    .field("held_out")
                    .help("`held_out` is the part of the rows kept for the metrics, such as 0.1")
            );
        }
        // Whether there is one at all shows in the first two strata.
        let first = rows.min((2.0 / self.fraction.min(1.0 - self.fraction)).ceil() as u64);
        if self.wanted(0..first, purpose).is_empty() {
            let (held, left) = match purpose {
                Purpose::Evaluation => ("for the metrics", "larger"),
                Purpose::Training => ("to train on", "smaller"),
            };
            bail!(
                InputError::new(format!("`held_out: {}` of {rows} rows leaves none {held}", self.fraction))
                    .field("held_out")
                    .help(format!("make `held_out` {left}, or add data"))
            );
        }
        Ok(())
    }
}

/// A number drawn for each pair of numbers (SplitMix64).
fn mixed(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A place whose activations a source gives: a module's value, one attention head's, a tensor of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Site {
    /// Its name, by which an SAE of the config chooses it.
    pub name: String,
    /// Width of an activation, d.
    pub activation_dim: i64,
    /// Width of what is to be reconstructed.
    pub output_dim: i64,
    /// What an SAE's config.json says of the site, beside what [`ActivationSource::describe`] says of the source.
    #[serde(default)]
    pub settings: Map<String, Value>,
    /// What its activations are joined of, side by side, where they are: the same token at several places.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<SitePart>,
}

/// A part of a site whose activations are joined.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SitePart {
    /// Its name.
    pub name: String,
    /// How many columns of the activations it has.
    pub activation_dim: i64,
    /// How many columns of what is to be reconstructed.
    pub output_dim: i64,
}

impl Site {
    /// A site of which there is no more to say.
    pub fn new(name: impl Into<String>, (activation_dim, output_dim): (i64, i64)) -> Self {
        Site { name: name.into(), activation_dim, output_dim, settings: Map::new(), parts: Vec::new() }
    }

    /// Width of an activation, and of what is to be reconstructed.
    pub fn widths(&self) -> (i64, i64) {
        (self.activation_dim, self.output_dim)
    }

    /// The number of the site of that name; where there is only one it is that one, whatever its name.
    pub fn find(sites: &[Site], name: &str) -> Option<usize> {
        sites.iter().position(|site| site.name == name).or((sites.len() == 1).then_some(0))
    }
}

/// Activations of the same tokens at every site of a source.
#[derive(Debug)]
pub struct Activations {
    /// A batch for each site, in the order of [`ActivationSource::sites`]. A row is the same token in all of them.
    pub sites: Vec<Batch>,
    /// Where each row is from, if that is known: token id, number of the context in the pass, position in the context;
    /// [B, 3], int64.
    pub tokens: Option<Tensor>,
}

impl From<Batch> for Activations {
    /// The activations of a source with one site.
    fn from(batch: Batch) -> Self {
        Activations { sites: vec![batch], tokens: None }
    }
}

impl Activations {
    /// Number of rows.
    pub fn len(&self) -> i64 {
        self.sites.first().map_or(0, Batch::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A batch of activations at one site.
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
    /// The places whose activations it gives, at least one. Most sources have one: `vec![Site::new(name, widths)]`.
    fn sites(&self) -> Vec<Site>;

    /// The next batch of each site (`Batch::of(x).into()` where there is one), or `None` at the end of the data. The last
    /// batch of a pass may be smaller. After the end, [`ActivationSource::rewind`] starts another pass.
    fn next_batch(&mut self) -> Result<Option<Activations>>;

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

    /// Mean over activations of the squared norm, ‖x‖², at each site, from a sample at the beginning of the stream. No
    /// activation is lost to training by it.
    fn mean_squared_norms(&mut self) -> Result<Vec<f64>>;

    /// The language model behind the activations, for metrics that change what it computes.
    fn language_model(&mut self) -> Option<&mut dyn ModelSource> {
        None
    }

    /// The same, to be looked at.
    fn model_source(&self) -> Option<&dyn ModelSource> {
        None
    }

    /// The directions that activations are made of, [n, d], where they are known: for metrics that look for them.
    fn true_features(&self) -> Option<Tensor> {
        None
    }

    /// What it takes memory for: a model, activations that it holds, a copy of them in a checkpoint.
    fn memory(&self) -> Vec<MemoryNeed> {
        Vec::new()
    }

    /// Activations in a batch, at most, where that is known beforehand.
    fn batch_size(&self) -> Option<i64> {
        None
    }

    /// What an SAE's config.json says of it, under `buffer`.
    fn describe(&self) -> Value;

    /// True if the source itself refuses or leaves out activations that are not finite, so that batches need not be checked.
    fn gives_finite(&self) -> bool {
        false
    }

    /// Where a row of the batch that was given last is from, for messages, if the row's token does not say it: a file and the
    /// row there.
    fn origin(&self, row: i64) -> Option<String> {
        let _ = row;
        None
    }

    /// What of its data is also in that of a source that described itself so ([`ActivationSource::describe`]) and was trained
    /// on, and what would keep the two apart; for a warning when it is measured on. `None` where nothing is, or nobody can
    /// tell.
    fn overlap(&self, trained: &Value) -> Option<String> {
        let _ = trained;
        None
    }

    /// Where the stream stands.
    fn state(&self) -> Result<State>;

    /// Takes the stream to where [`ActivationSource::state`] was called.
    fn restore(&mut self, state: &State) -> Result<()>;

    /// What the user should know at the end: records skipped, activations dropped.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// [`ActivationSource::mean_squared_norms`] of the first 100 batches, which the source then goes back over.
pub fn sampled_mean_squared_norms(source: &mut dyn ActivationSource) -> Result<Vec<f64>> {
    let before = source.state()?;
    let mut sums = vec![0.0; source.sites().len()];
    let mut count = 0;
    while count < 100 {
        let Some(activations) = source.next_batch()? else { break };
        for (sum, batch) in sums.iter_mut().zip(&activations.sites) {
            *sum += batch.x.square().sum_dim_intlist(1, false, Kind::Float).mean(Kind::Float).double_value(&[]);
        }
        count += 1;
    }
    source.restore(&before)?;
    Ok(sums.into_iter().map(|sum| sum / f64::from(count.max(1))).collect())
}

/// What an SAE's config.json says, under `buffer`, of a source at one of its sites.
pub fn describe_site(source: &dyn ActivationSource, site: usize) -> Value {
    let mut described = source.describe();
    let sites = source.sites();
    if let Some(described) = described.as_object_mut() {
        described.extend(sites[site].settings.clone());
        if sites.len() > 1 {
            described.insert("site".to_owned(), sites[site].name.as_str().into());
        }
    }
    described
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

    /// The source, to be looked at.
    pub fn source_ref(&self) -> &dyn ActivationSource {
        &*self.source
    }

    /// How many passes over the source were begun.
    pub fn passes(&self) -> u64 {
        self.pass + 1
    }

    /// The next batch; `None` when the source allows no further pass.
    pub fn next_batch(&mut self) -> Result<Option<Activations>> {
        loop {
            if let Some(activations) = self.source.next_batch()? {
                self.batches_in_pass += 1;
                return Ok(Some(activations));
            }
            if self.batches_in_pass == 0 {
                let notes = self.source.notes().join("; ");
                let notes = if notes.is_empty() { notes } else { format!(" ({notes})") };
                bail!(
                    InputError::new(format!("the source gave not one batch of activations{notes}"))
                        .help("its data is shorter than one batch: add data, or make the batches smaller")
                );
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

    /// The place in it whose value a dictionary on this site reads.
    fn reads(&self, site: usize) -> &Part;

    /// The place in it whose value a dictionary on this site reconstructs; the same unless the source has pairs.
    fn writes(&self, site: usize) -> &Part;

    /// Positions of its longest contexts.
    fn context_length(&self) -> i64;

    /// The next `rows` contexts of the text (fewer at its end), or `None` where there are no more.
    fn next_tokens(&mut self, rows: i64) -> Result<Option<Tokens>>;

    /// The text of each of these tokens; their numbers where there is no tokenizer.
    fn token_texts(&self, ids: &[i64]) -> Result<Vec<String>> {
        Ok(ids.iter().map(i64::to_string).collect())
    }
}

/// The value at a place in a language model, or some of its columns: those of one attention head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The place.
    pub point: HookPoint,
    /// Width of the whole value.
    pub whole: i64,
    /// The first of its columns.
    pub start: i64,
    /// How many columns.
    pub width: i64,
    /// Whether the mean over its columns is taken off.
    pub center: bool,
}

impl Part {
    /// A whole value.
    pub fn whole(point: HookPoint, width: i64) -> Self {
        Part { point, whole: width, start: 0, width, center: false }
    }

    /// Its columns of the value, [.., width].
    pub fn of(&self, value: &Tensor) -> Tensor {
        let columns = self.columns(value);
        match self.center {
            true => &columns - mean(&columns),
            false => columns,
        }
    }

    /// The value with its columns replaced.
    pub fn replaced(&self, value: &Tensor, by: &Tensor) -> Tensor {
        let by = match self.center {
            true => by + mean(&self.columns(value)),
            false => by.shallow_clone(),
        }
        .to_kind(value.kind());
        if self.width == self.whole {
            return by;
        }
        let replaced = value.copy();
        replaced.narrow(-1, self.start, self.width).copy_(&by);
        replaced
    }

    fn columns(&self, value: &Tensor) -> Tensor {
        if self.width == self.whole {
            return value.shallow_clone();
        }
        value.narrow(-1, self.start, self.width).contiguous()
    }
}

/// The mean over the last dimension, which is kept.
fn mean(value: &Tensor) -> Tensor {
    value.mean_dim([-1].as_slice(), true, value.kind())
}

/// What is done with an SAE whose loss or gradient is not finite, and with activations that are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnNonfinite {
    /// The SAE stops as it was before that step, and the others go on.
    #[default]
    Stop,
    /// The SAE goes on with the next batch as if that one had not been.
    SkipBatch,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(held_out: HeldOut, count: u64, purpose: Purpose) -> Vec<u64> {
        held_out.wanted(0..count, purpose).into_iter().flatten().collect()
    }

    #[test]
    fn every_row_is_either_trained_on_or_held_out() {
        for (fraction, count) in
            [(0.1, 1000), (0.1, 1003), (0.25, 400), (0.3, 997), (0.5, 10), (0.9, 500), (1e-3, 5000)]
        {
            let held_out = HeldOut::new(fraction, 7).unwrap();
            let (held, trained) =
                (rows(held_out, count, Purpose::Evaluation), rows(held_out, count, Purpose::Training));
            let expected = count as f64 * fraction;
            assert!((held.len() as f64 - expected).abs() <= 1.0, "{fraction} of {count}: {}", held.len());
            let mut all = [held.clone(), trained].concat();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..count), "{fraction} of {count}");
            // The rows are the same whichever ranges they are asked for in.
            let parts = (0..count).step_by(13).map(|start| start..(start + 13).min(count));
            let parts: Vec<u64> = parts.flat_map(|part| held_out.wanted(part, Purpose::Evaluation)).flatten().collect();
            assert_eq!(parts, held, "{fraction} of {count}");
        }
    }

    #[test]
    fn the_seed_decides_which_rows_are_held_out() {
        let held = |seed| rows(HeldOut::new(0.1, seed).unwrap(), 1000, Purpose::Evaluation);
        assert_eq!(held(1), held(1));
        let same = held(1).iter().filter(|row| held(2).contains(row)).count();
        assert!(same < 30, "{same}");
        // Not the same place in each stratum.
        let places: std::collections::BTreeSet<u64> = held(1).iter().map(|row| row % 10).collect();
        assert_eq!(places.len(), 10);
    }

    #[test]
    fn a_part_that_leaves_nothing_is_refused() {
        assert_eq!(HeldOut::new(0.0, 0), None);
        let refused = |fraction, rows, purpose| HeldOut::new(fraction, 0).unwrap().check(rows, purpose).is_err();
        assert!(refused(1.0, 100, Purpose::Training) && refused(1e-3, 3, Purpose::Evaluation));
        assert!(!refused(0.1, 100, Purpose::Training) && !refused(0.1, 100, Purpose::Evaluation));
        assert!(!refused(1e-3, 3, Purpose::Training));
    }
}
