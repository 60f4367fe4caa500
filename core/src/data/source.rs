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

/// The context in which a source is built.
#[derive(Debug, Clone, Copy)]
pub struct SourceCx {
    /// Seed for shuffling.
    pub seed: u64,
    /// Device of the batches.
    pub device: Device,
    /// Precision of a model's matrix products.
    pub precision: Precision,
    /// What [`ActivationSource::state`] saves of a buffer of harvested activations.
    pub checkpoint_buffer: CheckpointBuffer,
    /// Whether non-finite activations end the run or are skipped.
    pub on_nonfinite: OnNonfinite,
    /// Purpose of its activations, if it holds some out from training ([`SourceConfig::held_out`]).
    pub purpose: Purpose,
}

/// The purpose of a source's activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Purpose {
    /// Training, on the rows that are not held out.
    #[default]
    Training,
    /// Metrics, on the held-out rows, or on all rows if none are held out.
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

/// What a checkpoint saves of a buffer of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointBuffer {
    /// The activations: as much disk as the buffer takes memory. Resuming only reads them.
    #[default]
    Contents,
    /// The tokens of its activations: 28 bytes each, whatever the model's width. Resuming runs the model over their
    /// contexts again.
    Replay,
}

/// The config of a source.
pub trait SourceConfig: Debug + Send + Sync {
    /// Opens the source: reads headers, loads the model.
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>>;

    /// Returns the rows that it holds out from training for metrics, if any. Such a source is opened a second time with
    /// [`Purpose::Evaluation`], and then returns only these rows.
    fn held_out(&self) -> Option<HeldOut> {
        None
    }
}

crate::tagged::tagged! {
    /// A source's config, by `type`.
    TaggedSource: SourceConfig => Source {}
}

/// Rows held out from training, for metrics.
///
/// The rows are divided into strata of `1 / fraction` consecutive rows, and the seed draws one row of each. The
/// held-out fraction is therefore exact, evenly spread, and found without a list of all rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeldOut {
    fraction: f64,
    seed: u64,
}

impl HeldOut {
    /// Creates the rows for a source's fields `held_out` and `held_out_seed`; `None` if the fraction is 0.
    pub fn new(fraction: f64, seed: u64) -> Option<Self> {
        (fraction > 0.0).then_some(HeldOut { fraction, seed })
    }

    /// Returns the rows of a range that serve a purpose, as ranges of consecutive rows, in order.
    pub fn wanted(self, rows: Range<u64>, purpose: Purpose) -> Vec<Range<u64>> {
        let held = self.held(&rows);
        if purpose == Purpose::Evaluation {
            return held.into_iter().map(|row| row..row + 1).collect();
        }
        let starts = std::iter::once(rows.start).chain(held.iter().map(|row| row + 1));
        let ends = held.iter().copied().chain([rows.end]);
        starts.zip(ends).map(|(start, end)| start..end).filter(|range| !range.is_empty()).collect()
    }

    /// True if a row serves a purpose.
    pub fn wants(self, row: u64, purpose: Purpose) -> bool {
        !self.wanted(row..row + 1, purpose).is_empty()
    }

    /// Returns the held-out rows of a range, in order.
    fn held(self, rows: &Range<u64>) -> Vec<u64> {
        let stratum = |row: u64| (row as f64 * self.fraction) as u64;
        let start = |stratum: u64| (stratum as f64 / self.fraction).ceil() as u64;
        // Include one more stratum at each end, since rounding can move its row into the range.
        (stratum(rows.start).saturating_sub(1)..stratum(rows.end) + 2)
            .map(|stratum| {
                let (first, next) = (start(stratum), start(stratum + 1));
                first + mixed(self.seed, stratum) % (next - first).max(1)
            })
            .filter(|row| rows.contains(row))
            .collect()
    }

    /// Fails if none of `rows` rows is left for the purpose.
    pub fn check(self, rows: u64, purpose: Purpose) -> Result<()> {
        if self.fraction >= 1.0 {
            bail!(
                InputError::new("nothing is left to train on")
                    .field("held_out")
                    .help("`held_out` is the fraction of the rows kept for metrics, such as 0.1")
            );
        }
        // The first two strata show whether there is any row.
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

/// Returns a pseudo-random number for each pair of numbers (SplitMix64).
fn mixed(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A place of a source at which dictionaries train: a module's value, an attention head's, or a tensor in a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Site {
    /// The name by which an SAE in the config selects it.
    pub name: String,
    /// Width of an activation, d.
    pub activation_dim: i64,
    /// Width of a target, d_out.
    pub output_dim: i64,
    /// Entries about the site in an SAE's config.json, added to those of [`ActivationSource::describe`].
    #[serde(default)]
    pub settings: Map<String, Value>,
    /// The parts of a joined site: the same token's activations at several places, side by side. Otherwise empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<SitePart>,
}

/// A part of a joined site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SitePart {
    /// Name.
    pub name: String,
    /// Number of its columns in an activation.
    pub activation_dim: i64,
    /// Number of its columns in a target.
    pub output_dim: i64,
}

impl Site {
    /// Creates a site without settings or parts, with widths (d, d_out).
    pub fn new(name: impl Into<String>, (activation_dim, output_dim): (i64, i64)) -> Self {
        Site { name: name.into(), activation_dim, output_dim, settings: Map::new(), parts: Vec::new() }
    }

    /// Returns the widths of activations and targets, (d, d_out).
    pub fn widths(&self) -> (i64, i64) {
        (self.activation_dim, self.output_dim)
    }

    /// Returns the index of the site with this name. A source's only site matches any name.
    pub fn find(sites: &[Site], name: &str) -> Option<usize> {
        sites.iter().position(|site| site.name == name).or((sites.len() == 1).then_some(0))
    }
}

/// Activations of the same tokens at every site of a source.
#[derive(Debug)]
pub struct Activations {
    /// One batch per site, in the order of [`ActivationSource::sites`]. A row is the same token in all of them.
    pub sites: Vec<Batch>,
    /// Origin of each row, [B, 3] in int64, if known: token id, index of its context in the pass, position in it.
    pub tokens: Option<Tensor>,
}

impl From<Batch> for Activations {
    /// The activations of a source with one site.
    fn from(batch: Batch) -> Self {
        Activations { sites: vec![batch], tokens: None }
    }
}

impl Activations {
    /// Returns the number of rows.
    pub fn len(&self) -> i64 {
        self.sites.first().map_or(0, Batch::len)
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A batch of activations at one site.
#[derive(Debug)]
pub struct Batch {
    /// Input of the dictionary, [B, d], float32.
    pub x: Tensor,
    /// Target of the reconstruction, [B, d_out]; the same tensor as `x` unless the source has pairs.
    pub target: Tensor,
}

impl Batch {
    /// Creates a batch whose target is its input.
    pub fn of(x: Tensor) -> Self {
        Batch { target: x.shallow_clone(), x }
    }

    /// Returns the number of activations.
    pub fn len(&self) -> i64 {
        self.x.size()[0]
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True if the target is the input.
    pub fn is_autoencoding(&self) -> bool {
        self.x.data_ptr() == self.target.data_ptr()
    }

    /// Returns the batch with every value multiplied by `factor`.
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
    /// Returns its sites, at least one. Most sources have one: `vec![Site::new(name, widths)]`.
    fn sites(&self) -> Vec<Site>;

    /// Returns the next batch of each site (`Batch::of(x).into()` for a single site), or `None` at the end of the data.
    /// The last batch of a pass may be smaller. After the end, [`ActivationSource::rewind`] starts another pass.
    fn next_batch(&mut self) -> Result<Option<Activations>>;

    /// Returns to the beginning of the data. Shuffling then draws a different order.
    fn rewind(&mut self) -> Result<()>;

    /// Returns how many passes over the data training may make; `None` for no limit.
    fn passes(&self) -> Option<u64> {
        None
    }

    /// True if a pass has no end.
    fn is_endless(&self) -> bool {
        false
    }

    /// Returns the mean squared norm of activations, ‖x‖², at each site, from a sample at the beginning of the stream.
    /// Training still gets the sampled activations.
    fn mean_squared_norms(&mut self) -> Result<Vec<f64>>;

    /// Returns the language model behind the activations, for metrics that intervene in its forward pass.
    fn language_model(&mut self) -> Option<&mut dyn ModelSource> {
        None
    }

    /// Returns the same by shared reference.
    fn model_source(&self) -> Option<&dyn ModelSource> {
        None
    }

    /// Returns the true directions in the activations, [n, d], if known, for metrics that compare features with them.
    fn true_features(&self) -> Option<Tensor> {
        None
    }

    /// Returns its memory needs: a model, the activations that it holds, a copy of them in a checkpoint.
    fn memory(&self) -> Vec<MemoryNeed> {
        Vec::new()
    }

    /// Returns the maximum number of activations in a batch, if known in advance.
    fn batch_size(&self) -> Option<i64> {
        None
    }

    /// Returns its description for the `buffer` section of an SAE's config.json.
    fn describe(&self) -> Value;

    /// True if the source itself refuses or skips non-finite activations, so that batches need no check.
    fn gives_finite(&self) -> bool {
        false
    }

    /// Returns the origin of a row of the last batch, for messages: a file and its row. `None` if the row's token
    /// identifies it.
    fn origin(&self, row: i64) -> Option<String> {
        let _ = row;
        None
    }

    /// Returns a warning for evaluation if its data overlaps that of a source used in training, and how to avoid that.
    /// `trained` is that source's [`ActivationSource::describe`]. `None` if there is no overlap or it is unknown.
    fn overlap(&self, trained: &Value) -> Option<String> {
        let _ = trained;
        None
    }

    /// Returns the state of the stream.
    fn state(&self) -> Result<State>;

    /// Restores a state from [`ActivationSource::state`].
    fn restore(&mut self, state: &State) -> Result<()>;

    /// Returns notes for the end of a run: records skipped, activations dropped.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Computes [`ActivationSource::mean_squared_norms`] over the next 100 batches, then restores the source.
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

/// Returns the `buffer` section of an SAE's config.json for a source at one of its sites.
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

/// A source read in repeated passes, as many as it allows.
pub struct Stream {
    source: Box<dyn ActivationSource>,
    pass: u64,
    batches_in_pass: u64,
}

impl Stream {
    /// Creates a stream at the source's beginning.
    pub fn new(source: Box<dyn ActivationSource>) -> Self {
        Stream { source, pass: 0, batches_in_pass: 0 }
    }

    /// Returns the source.
    pub fn source(&mut self) -> &mut dyn ActivationSource {
        &mut *self.source
    }

    /// Returns the source by shared reference.
    pub fn source_ref(&self) -> &dyn ActivationSource {
        &*self.source
    }

    /// Returns the number of passes begun.
    pub fn passes(&self) -> u64 {
        self.pass + 1
    }

    /// Returns the next batch, or `None` if the source allows no further pass. Fails if a whole pass has no batch.
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
                    InputError::new(format!("the source returned no batch of activations{notes}"))
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

    /// Returns the state of the stream.
    pub fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.put("pass", self.pass)?;
        state.put("batches_in_pass", self.batches_in_pass)?;
        state.put_all("source", self.source.state()?);
        Ok(state)
    }

    /// Restores a state from [`Stream::state`].
    pub fn restore(&mut self, state: &State) -> Result<()> {
        self.pass = state.get("pass")?;
        self.batches_in_pass = state.get("batches_in_pass")?;
        self.source.restore(&state.under("source"))
    }
}

/// A source that harvests a language model.
pub trait ModelSource {
    /// Returns the model.
    fn model(&self) -> &dyn LanguageModel;

    /// Returns the part of the model that a dictionary at this site reads.
    fn reads(&self, site: usize) -> &Part;

    /// Returns the part that a dictionary at this site reconstructs: the one it reads, unless the source has pairs.
    fn writes(&self, site: usize) -> &Part;

    /// Returns the maximum length of a context, in tokens.
    fn context_length(&self) -> i64;

    /// Returns the next `rows` contexts of the text (fewer at its end), or `None` if there are no more.
    fn next_tokens(&mut self, rows: i64) -> Result<Option<Tokens>>;

    /// Returns the text of each token, or its id if there is no tokenizer.
    fn token_texts(&self, ids: &[i64]) -> Result<Vec<String>> {
        Ok(ids.iter().map(i64::to_string).collect())
    }
}

/// The value at a hook point, or some of its columns, such as those of one attention head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The hook point.
    pub point: HookPoint,
    /// Width of the whole value.
    pub whole: i64,
    /// Index of the first column.
    pub start: i64,
    /// Number of columns.
    pub width: i64,
    /// True if the mean over the columns is subtracted.
    pub center: bool,
}

impl Part {
    /// Creates the part that is a whole value.
    pub fn whole(point: HookPoint, width: i64) -> Self {
        Part { point, whole: width, start: 0, width, center: false }
    }

    /// Returns this part of a value, [.., width].
    pub fn of(&self, value: &Tensor) -> Tensor {
        let columns = self.columns(value);
        match self.center {
            true => &columns - mean(&columns),
            false => columns,
        }
    }

    /// Returns the value with this part replaced.
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

/// Returns the mean over the last dimension, which is kept.
fn mean(value: &Tensor) -> Tensor {
    value.mean_dim([-1].as_slice(), true, value.kind())
}

/// What happens when a loss, a gradient or an activation is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnNonfinite {
    /// The SAE stops in its state before that step, and the others continue.
    #[default]
    Stop,
    /// The SAE skips the batch and continues with the next one.
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
            // The rows do not depend on the requested ranges.
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
    fn held_out_fraction_that_leaves_no_rows_is_refused() {
        assert_eq!(HeldOut::new(0.0, 0), None);
        let refused = |fraction, rows, purpose| HeldOut::new(fraction, 0).unwrap().check(rows, purpose).is_err();
        assert!(refused(1.0, 100, Purpose::Training) && refused(1e-3, 3, Purpose::Evaluation));
        assert!(!refused(0.1, 100, Purpose::Training) && !refused(0.1, 100, Purpose::Evaluation));
        assert!(!refused(1e-3, 3, Purpose::Training));
    }
}
