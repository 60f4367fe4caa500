//! Activations that `dictlearn activations` wrote, or `examples/write_activations.py` for a model that we lack.
//!
//! Memory is `buffer_size` activations and a batch, however large the folder. It is read in pieces of consecutive rows,
//! whose order is drawn anew for each pass; as many pieces as the buffer holds are read at once, and their rows served
//! in an order drawn for them. Neighbours in the text are far apart in the stream, and a folder that fits into the buffer
//! is shuffled perfectly. With `shuffle: false` activations come in the order in which they were written.
//!
//! With `held_out: 0.1` training never reads a tenth of the rows, and metrics read these alone.
//!
//! The folder's manifest says what each shard must be. Names, lengths, types and shapes are checked when it is opened, and
//! a shard's hash when it is first read.

mod folder;

use std::ops::Range;

use dictlearn_core::machine::rng::rng;
use dictlearn_core::prelude::*;
use rand::seq::SliceRandom;

use folder::Folder;

/// The longest piece that is read at once: consecutive rows of one shard.
const PIECE: u64 = 64;
/// Pieces in the buffer, at least, so that it mixes rows of many places.
const PIECES: u64 = 1024;

/// Activations that `dictlearn activations` wrote.
#[component(source "activation_cache",
    summary = "Activations that `dictlearn activations` wrote, shuffled across shards",
    example = "{type: activation_cache, path: activations, batch_size: 64}")]
pub struct ActivationCacheConfig {
    /// The folder, with its `meta.json`.
    pub path: ConfigPath,
    /// Activations in a training batch.
    #[default(2048)]
    #[schemars(range(min = 1))]
    pub batch_size: u64,
    /// Whether each pass has a random order of its own.
    #[default(true)]
    pub shuffle: bool,
    /// Activations held in memory, among which they are shuffled.
    #[default(131_072)]
    #[schemars(range(min = 1))]
    pub buffer_size: u64,
    /// Whether a shard's hash is checked when it is first read; names, lengths, types and shapes always are.
    #[default(true)]
    pub verify: bool,
    /// Part of the rows that training never reads and metrics are measured on, from 0 to 1; `0.1` is a good choice. With
    /// 0 the metrics go on with the rows that training has not read, and take the same rows again when there are none. An
    /// `eval_source` with a `path` of its own needs `held_out: 0`, unless it is to be measured in part.
    #[default]
    #[schemars(range(min = 0, max = 1))]
    pub held_out: f64,
    /// Seed that draws the held-out rows. The run's own `seed` has no part in it, so that runs with different seeds are
    /// measured on the same rows.
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

/// The rows of all shards in pieces of consecutive rows, none of which crosses from one shard to the next.
struct Pieces {
    /// Rows of each shard.
    shards: Vec<u64>,
    /// The number of each shard's first row.
    starts: Vec<u64>,
    /// Rows in a piece, but for the last of a shard.
    length: u64,
    /// The number of each shard's first piece, and last how many there are.
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

    /// The shard of a piece and its rows there.
    fn get(&self, piece: u32) -> (usize, Range<u64>) {
        let piece = u64::from(piece);
        let shard = self.firsts.partition_point(|first| *first <= piece) - 1;
        let start = (piece - self.firsts[shard]) * self.length;
        (shard, start..(start + self.length).min(self.shards[shard]))
    }

    /// The rows of a piece that are wanted, of those that are held out or of the others.
    fn wanted(&self, piece: u32, held_out: Option<HeldOut>, purpose: Purpose) -> Vec<(usize, Range<u64>)> {
        let (shard, rows) = self.get(piece);
        let Some(held_out) = held_out else { return vec![(shard, rows)] };
        // Rows are held out by their number in the folder.
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
    /// How many buffers of this pass are served.
    window: usize,
    /// Rows served of the one after them.
    served: usize,
    /// That one, once it is read.
    held: Option<Held>,
    cx: SourceCx,
}

/// Rows in memory.
struct Held {
    /// A tensor [n, width] for each of the folder's.
    columns: Vec<Tensor>,
    /// The order in which they are served, where it is not the folder's.
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
            // A generator for each pass and each buffer, so that any place in the stream can be gone to.
            self.order.shuffle(&mut rng(self.cx.seed, &format!("{} pass {pass}", ActivationCacheConfig::NAME)));
        }
    }

    /// Pieces in one buffer.
    fn window_pieces(&self) -> usize {
        (self.buffer_size / self.pieces.length).max(1) as usize
    }

    /// The rows that are being served, read if need be; `None` at the end of the pass.
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
        // In the order of the disk; it is the rows that are shuffled.
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
            .then(|| format!("rows of {}: `held_out: 0.1` in `source` keeps rows back from training", own.display()))
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
                InputError::new("the folder of activations is not the one that the run was begun with")
                    .field("source")
                    .help("put that one back, or train anew in another `--output-dir`")
            );
        }
        self.begin_pass(state.get("pass")?);
        self.window = state.get("window")?;
        self.served = state.get("served")?;
        Ok(())
    }
}
