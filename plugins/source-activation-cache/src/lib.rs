//! Activations written by `dictlearn activations`, or by `examples/write_activations.py` for models that dictlearn does
//! not run.
//!
//! Memory is `buffer_size` activations and a batch, whatever the size of the folder. The folder is divided into pieces
//! of consecutive rows, whose order is redrawn for each pass. The source reads as many pieces as fit into the buffer
//! and serves their rows in random order. Neighbours in the text are far apart in the stream, and a folder that fits
//! into the buffer is shuffled perfectly. With `shuffle: false`, activations come in the order in which they were
//! written.
//!
//! With `held_out: 0.1`, training never reads a tenth of the rows, and metrics read only these.
//!
//! The folder's manifest describes each shard. Names, lengths, dtypes and shapes are checked on opening, and a shard's
//! hash when it is first read.

mod folder;

use std::ops::Range;

use dictlearn_core::machine::rng::rng;
use dictlearn_core::prelude::*;
use rand::seq::SliceRandom;

use folder::Folder;

/// Maximum rows in a piece: consecutive rows of one shard.
const PIECE: u64 = 64;
/// Minimum pieces in a buffer, so that it mixes rows from many places.
const PIECES: u64 = 1024;

/// Activations written by `dictlearn activations`.
#[component(source "activation_cache",
    summary = "Activations written by `dictlearn activations`, shuffled across shards",
    example = "{type: activation_cache, path: activations, batch_size: 64}")]
pub struct ActivationCacheConfig {
    /// Folder of activations, with its `meta.json`.
    pub path: ConfigPath,
    /// Activations per training batch.
    #[default(2048)]
    #[schemars(range(min = 1))]
    pub batch_size: u64,
    /// Draw a new random order for each pass. `false` serves the rows in the order in which they were written.
    #[default(true)]
    pub shuffle: bool,
    /// Number of activations held in memory and shuffled together. More memory shuffles better.
    #[default(131_072)]
    #[schemars(range(min = 1))]
    pub buffer_size: u64,
    /// Check a shard's hash when it is first read. Names, lengths, dtypes and shapes are always checked.
    #[default(true)]
    pub verify: bool,
    /// Fraction of the rows, from 0 to 1, that training never reads and metrics are computed on; `0.1` is a good
    /// choice. With 0, metrics continue with the rows that training has not read, and reuse rows once none are left.
    /// For an `eval_source` with its own `path`, set `held_out: 0` to evaluate on all of its rows.
    #[default]
    #[schemars(range(min = 0, max = 1))]
    pub held_out: f64,
    /// Seed that draws the held-out rows. It is independent of the run's `seed`, so that runs with different seeds are
    /// evaluated on the same rows.
    #[default]
    pub held_out_seed: u64,
}

impl SourceConfig for ActivationCacheConfig {
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        let folder = Folder::open(self.path.as_path(), self.verify).under("path")?;
        let held_out = self.held_out();
        if let Some(held_out) = held_out {
            held_out.check(folder.rows(), cx.purpose)?;
        }
        let mut described = folder.manifest().source.clone();
        if !described.is_object() {
            described = Value::Object(Map::new());
        }
        let own = serde_json::to_value(self)?;
        for (key, value) in own.as_object().into_iter().flatten() {
            described[key] = value.clone();
        }
        described["out_batch_size"] = self.batch_size.into();
        let mut source = ActivationCache {
            described,
            pieces: Pieces::new(folder.shard_rows(), (self.buffer_size / PIECES).clamp(1, PIECE)),
            folder,
            held_out,
            batch_size: self.batch_size as usize,
            buffer_size: self.buffer_size,
            shuffle: self.shuffle,
            order: Vec::new(),
            pass: 0,
            window: 0,
            served: 0,
            held: None,
            cx: *cx,
        };
        source.begin_pass(0);
        Ok(Box::new(source))
    }

    fn held_out(&self) -> Option<HeldOut> {
        HeldOut::new(self.held_out, self.held_out_seed)
    }
}

/// The rows of all shards, divided into pieces of consecutive rows. No piece crosses a shard boundary.
struct Pieces {
    /// Number of rows in each shard.
    shards: Vec<u64>,
    /// Index of each shard's first row in the folder.
    starts: Vec<u64>,
    /// Rows in a piece; the last piece of a shard may be shorter.
    length: u64,
    /// Index of each shard's first piece, followed by the number of pieces.
    firsts: Vec<u64>,
}

impl Pieces {
    fn new(shards: Vec<u64>, length: u64) -> Self {
        let (mut firsts, mut starts) = (vec![0], vec![0]);
        for rows in &shards {
            firsts.push(firsts[firsts.len() - 1] + rows.div_ceil(length));
            starts.push(starts[starts.len() - 1] + rows);
        }
        Pieces { shards, starts, length, firsts }
    }

    fn count(&self) -> u64 {
        self.firsts[self.shards.len()]
    }

    /// Returns a piece's shard, and its rows within the shard.
    fn get(&self, piece: u32) -> (usize, Range<u64>) {
        let piece = u64::from(piece);
        let shard = self.firsts.partition_point(|first| *first <= piece) - 1;
        let start = (piece - self.firsts[shard]) * self.length;
        (shard, start..(start + self.length).min(self.shards[shard]))
    }

    /// Returns the rows of a piece for a purpose: the held-out rows for metrics, the others for training.
    fn wanted(&self, piece: u32, held_out: Option<HeldOut>, purpose: Purpose) -> Vec<(usize, Range<u64>)> {
        let (shard, rows) = self.get(piece);
        let Some(held_out) = held_out else { return vec![(shard, rows)] };
        // Rows are held out by their index in the folder, not in the shard.
        let start = self.starts[shard];
        let wanted = held_out.wanted(start + rows.start..start + rows.end, purpose).into_iter();
        wanted.map(|rows| (shard, rows.start - start..rows.end - start)).collect()
    }
}

struct ActivationCache {
    described: Value,
    folder: Folder,
    held_out: Option<HeldOut>,
    pieces: Pieces,
    batch_size: usize,
    buffer_size: u64,
    shuffle: bool,
    /// The order of the pieces in this pass.
    order: Vec<u32>,
    pass: u64,
    /// Index of the current buffer in this pass.
    window: usize,
    /// Rows of the current buffer already served.
    served: usize,
    /// The current buffer, once it is read.
    held: Option<Held>,
    cx: SourceCx,
}

/// A buffer of rows.
struct Held {
    /// A tensor [n, width] for each column of the folder.
    columns: Vec<Tensor>,
    /// The order in which rows are served; `None` for the order of the folder.
    order: Option<Tensor>,
}

impl Held {
    fn rows(&self) -> usize {
        self.columns[0].size()[0] as usize
    }

    fn take(&self, rows: Range<usize>) -> Vec<Tensor> {
        let (start, count) = (rows.start as i64, rows.len() as i64);
        match &self.order {
            None => self.columns.iter().map(|column| column.narrow(0, start, count)).collect(),
            Some(order) => {
                let rows = order.narrow(0, start, count);
                self.columns.iter().map(|column| column.index_select(0, &rows)).collect()
            }
        }
    }
}

impl ActivationCache {
    fn begin_pass(&mut self, pass: u64) {
        self.pass = pass;
        (self.window, self.served, self.held) = (0, 0, None);
        self.order = (0..self.pieces.count() as u32).collect();
        if self.shuffle {
            // One generator for each pass and each buffer makes every position of the stream seekable.
            self.order.shuffle(&mut rng(self.cx.seed, &format!("{} pass {pass}", ActivationCacheConfig::NAME)));
        }
    }

    /// Returns the number of pieces in a buffer.
    fn window_pieces(&self) -> usize {
        (self.buffer_size / self.pieces.length).max(1) as usize
    }

    /// Returns the current buffer, reading it first if necessary; `None` at the end of the pass.
    fn held(&mut self) -> Result<Option<&Held>> {
        if self.held.is_none() {
            let pieces: Vec<u32> =
                self.order.chunks(self.window_pieces()).nth(self.window).unwrap_or_default().to_vec();
            if pieces.is_empty() {
                return Ok(None);
            }
            self.held = Some(self.read(pieces)?);
        }
        Ok(self.held.as_ref())
    }

    fn read(&mut self, mut pieces: Vec<u32>) -> Result<Held> {
        // Read in disk order: the rows are shuffled afterwards.
        pieces.sort_unstable();
        let wanted = |piece: &u32| self.pieces.wanted(*piece, self.held_out, self.cx.purpose);
        let places: Vec<(usize, Range<u64>)> = pieces.iter().flat_map(wanted).collect();
        let columns = self.folder.read(&places)?;
        let order = self.shuffle.then(|| {
            let mut order: Vec<i64> = (0..columns[0].size()[0]).collect();
            order.shuffle(&mut rng(
                self.cx.seed,
                &format!("{} pass {} buffer {}", ActivationCacheConfig::NAME, self.pass, self.window),
            ));
            Tensor::from_slice(&order)
        });
        Ok(Held { columns, order })
    }
}

impl ActivationSource for ActivationCache {
    fn sites(&self) -> Vec<Site> {
        self.folder.manifest().sites.iter().map(|cached| cached.site.clone()).collect()
    }

    fn next_batch(&mut self) -> Result<Option<Activations>> {
        let mut parts: Vec<Vec<Tensor>> = Vec::new();
        let mut missing = self.batch_size;
        while missing > 0 {
            let served = self.served;
            let Some(held) = self.held()? else { break };
            let here = missing.min(held.rows() - served);
            if here > 0 {
                parts.push(held.take(served..served + here));
            }
            missing -= here;
            self.served += here;
            if missing > 0 {
                (self.window, self.served, self.held) = (self.window + 1, 0, None);
            }
        }
        if parts.is_empty() {
            return Ok(None);
        }
        let column = |index: usize| Tensor::cat(&parts.iter().map(|part| &part[index]).collect::<Vec<_>>(), 0);
        let columns: Vec<Tensor> = (0..parts[0].len()).map(column).collect();
        Ok(Some(self.folder.activations(&columns, self.cx.device)))
    }

    fn rewind(&mut self) -> Result<()> {
        self.begin_pass(self.pass + 1);
        Ok(())
    }

    fn mean_squared_norms(&mut self) -> Result<Vec<f64>> {
        dictlearn_core::data::sampled_mean_squared_norms(self)
    }

    fn memory(&self) -> Vec<MemoryNeed> {
        let bytes = self.folder.row_bytes() * self.buffer_size.min(self.folder.rows());
        vec![MemoryNeed::lasting("the buffer of activations", bytes, "`buffer_size`").on_host()]
    }

    fn batch_size(&self) -> Option<i64> {
        Some(self.batch_size as i64)
    }

    fn notes(&self) -> Vec<String> {
        let manifest = self.folder.manifest();
        let broken_off = || format!("note: the harvest was interrupted after {} activations", manifest.activations);
        (!manifest.complete).then(broken_off).into_iter().collect()
    }

    fn describe(&self) -> Value {
        self.described.clone()
    }

    fn overlap(&self, trained: &Value) -> Option<String> {
        let folder = |described: &Value| std::fs::canonicalize(described["path"].as_str()?).ok();
        let own = folder(&self.described)?;
        if folder(trained)? != own {
            return None;
        }
        let parted = ["held_out", "held_out_seed"].iter().all(|key| self.described[key] == trained[key]);
        let apart = self.held_out.is_some() && self.cx.purpose == Purpose::Evaluation && parted;
        (!apart)
            .then(|| format!("rows of {}: set `held_out: 0.1` in `source` to hold rows out of training", own.display()))
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.put("pass", self.pass)?;
        state.put("window", self.window)?;
        state.put("served", self.served)?;
        state.put("sha256", &self.folder.manifest().sha256)?;
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        if state.get::<String>("sha256")? != self.folder.manifest().sha256 {
            bail!(
                InputError::new("the folder of activations has changed since the run started")
                    .field("source")
                    .help("restore the original folder, or start a new run in another `--output-dir`")
            );
        }
        self.begin_pass(state.get("pass")?);
        self.window = state.get("window")?;
        self.served = state.get("served")?;
        Ok(())
    }
}
