//! The input of a run: the stream of activations, checked and divided by each site's norm.

use anyhow::{Result, bail};
use tch::Kind;

use crate::run::skips::Skips;
use dictlearn_core::data::{ActivationSource, Activations, Batch, OnNonfinite, Site, Stream};
use dictlearn_core::error::{InputError, Under};
use dictlearn_core::files::state::State;
use dictlearn_core::machine::{device, ranks};
use dictlearn_core::train::{Found, Watch, is_finite};

/// The batches of a run.
pub(super) struct Incoming {
    pub(super) stream: Stream,
    pub(super) sites: Vec<Site>,
    /// Norms that each site's activations are divided by during training.
    pub(super) norms: Vec<f64>,
    /// Deferred checks of each site's activations on a GPU.
    watches: Vec<Watch>,
    skipped: Skips,
    skips: bool,
}

impl Incoming {
    pub(super) fn new(source: Box<dyn ActivationSource>, sites: Vec<Site>, on_nonfinite: OnNonfinite) -> Self {
        Incoming {
            stream: Stream::new(source),
            norms: vec![1.0; sites.len()],
            watches: sites.iter().map(|_| Watch::default()).collect(),
            sites,
            skipped: Skips::default(),
            skips: on_nonfinite == OnNonfinite::SkipBatch,
        }
    }

    /// Returns ` at SITE` for a message, if there are several sites.
    pub(super) fn at(&self, site: usize) -> String {
        if self.sites.len() == 1 { String::new() } else { format!(" at {}", self.sites[site].name) }
    }

    /// Measures each site's norm at the beginning of the stream.
    pub(super) fn take_norms(&mut self) -> Result<()> {
        let squared = self.stream.source().mean_squared_norms().under("source")?;
        self.norms = squared.into_iter().map(|squared| ranks::mean(squared).sqrt()).collect();
        for (site, norm) in self.norms.iter().enumerate() {
            let at = self.at(site);
            if *norm <= 0.0 || !norm.is_finite() {
                bail!(InputError::new(format!("activations{at} cannot be normalised: their norm is {norm}")));
            }
            tracing::info!("activations{at} are divided by {norm:.4} during training");
        }
        Ok(())
    }

    /// Returns the activations of a step; `None` at the end of the data, which is the same for all ranks.
    pub(super) fn next(&mut self) -> Result<Option<Activations>> {
        let activations = self.stream.next_batch().under("source")?;
        Ok(if ranks::vote(activations.is_none()) { None } else { activations })
    }

    /// Returns a step's batch for each site, divided by its norm; `None` if the batch is not finite and is skipped.
    pub(super) fn checked(&mut self, step: u64, activations: Activations) -> Result<Option<Vec<Batch>>> {
        let found = self.not_finite(step, &activations)?;
        if !ranks::vote(found.is_some()) {
            self.skipped.taken();
            let scaled = |(batch, norm): (Batch, &f64)| if *norm == 1.0 { batch } else { batch.scaled(1.0 / norm) };
            return Ok(Some(activations.sites.into_iter().zip(&self.norms).map(scaled).collect()));
        }
        let error =
            found.unwrap_or_else(|| InputError::new(format!("step {step}: the batch of another rank is not finite")));
        if !self.skips || self.skipped.add(error.message()) {
            bail!(error);
        }
        if self.skipped.count == 1 {
            tracing::warn!("{}; the batch is skipped", error.message());
        }
        Ok(None)
    }

    /// Checks that a step's activations are finite, unless the source has checked already. Does not wait for a GPU,
    /// unless batches are skipped.
    fn not_finite(&mut self, step: u64, activations: &Activations) -> Result<Option<InputError>> {
        if self.stream.source_ref().gives_finite() {
            return Ok(None);
        }
        for (site, batch) in activations.sites.iter().enumerate() {
            let tensors = [("x", &batch.x), ("target", &batch.target)];
            let tensors = if batch.is_autoencoding() { &tensors[..1] } else { &tensors };
            if !self.skips && !device::on_host(batch.x.device()) {
                // The sum of finite numbers is finite, unless they are far larger than any activation.
                let sums: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor.sum(Kind::Float))).collect();
                self.watches[site].see(step, sums.iter().map(|(name, sum)| (*name, sum)))?;
                continue;
            }
            for (_, tensor) in tensors {
                if !is_finite(tensor)? {
                    let bad = tensor.isfinite().all_dim(1, false).logical_not().nonzero().int64_value(&[0, 0]);
                    let origin = self.origin(activations, bad)?;
                    return Ok(Some(self.batch_not_finite(step, site, &origin)));
                }
            }
        }
        Ok(None)
    }

    /// Describes where a row of a batch comes from, for a message.
    fn origin(&mut self, activations: &Activations, row: i64) -> Result<String> {
        if let Some(origin) = self.stream.source_ref().origin(row) {
            return Ok(format!(", {origin}"));
        }
        let Some(tokens) = &activations.tokens else { return Ok(format!(", in row {row}")) };
        let [id, context, position] = [0, 1, 2].map(|column| tokens.int64_value(&[row, column]));
        let text = match self.stream.source().language_model() {
            Some(model) => format!(" ({:?})", model.token_texts(&[id])?.concat()),
            None => String::new(),
        };
        Ok(format!(", token {id}{text} at position {position} of context {context}"))
    }

    fn batch_not_finite(&self, step: u64, site: usize, origin: &str) -> InputError {
        let at = self.at(site);
        InputError::new(format!("step {step}: the batch{at} has values that are not finite{origin}")).help(
            "inspect the activations (`dictlearn activations`), fix or remove their data, or set \
             `on_nonfinite: skip_batch`",
        )
    }

    /// Waits until a GPU has checked the activations so far. An error if some were not finite.
    pub(super) fn settle(&self) -> Result<()> {
        for (site, watch) in self.watches.iter().enumerate() {
            if let Some(Found { step, .. }) = watch.found()? {
                bail!(self.batch_not_finite(step, site, ""));
            }
        }
        Ok(())
    }

    /// Returns notes for the end of the run.
    pub(super) fn notes(&mut self) -> Vec<String> {
        let passes = self.stream.passes();
        let read = (passes > 1).then(|| format!("the data was read {passes} times"));
        let notes = self.stream.source().notes();
        read.into_iter().chain(notes).chain(self.skipped.note("activations")).collect()
    }

    /// True if there is a language model with a tokenizer: its first tokens are texts, not only their ids.
    pub(super) fn reads_text(&self) -> bool {
        let ids: Vec<i64> = (0..20).collect();
        let texts = self.stream.source_ref().model_source().and_then(|source| source.token_texts(&ids).ok());
        texts.is_some_and(|texts| texts.iter().zip(&ids).any(|(text, id)| *text != id.to_string()))
    }

    /// Puts its state into a checkpoint.
    pub(super) fn put_state(&self, state: &mut State) -> Result<()> {
        state.put("norms", &self.norms)?;
        state.put("skipped", &self.skipped)?;
        state.put_all("stream", self.stream.state()?);
        Ok(())
    }

    /// Restores what [`Incoming::put_state`] put.
    pub(super) fn restore(&mut self, state: &State) -> Result<()> {
        self.norms = state.get("norms")?;
        self.skipped = state.get("skipped")?;
        self.stream.restore(&state.under("stream"))
    }
}
