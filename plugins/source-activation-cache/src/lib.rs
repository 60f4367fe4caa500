//! Activations that `dictlearn activations` wrote, or `examples/write_activations.py` for a model that we lack.
//!
//! Memory is `buffer_size` activations and a batch, however large the folder. It is read in pieces of consecutive rows,
//! whose order is drawn anew for each pass; as many pieces as the buffer holds are read at once, and their rows served
//! in an order drawn for them. Neighbours in the text are far apart in the stream, and a folder that fits into the buffer
//! is shuffled perfectly. With `shuffle: false` activations come in the order in which they were written.
//!
//! The folder's manifest says what each shard must be. Names, lengths, types and shapes are checked when it is opened, and
//! a shard's hash when it is first read.

mod folder;

use std::ops::Range;

use dictlearn_core::prelude::*;
use dictlearn_core::rng::rng;
use rand::seq::SliceRandom;

use folder::Folder;

const NAME: &str = "activation_cache";

/// The longest piece that is read at once: consecutive rows of one shard.
const PIECE: u64 = 64;
/// Pieces in the buffer, at least, so that it mixes rows of many places.
const PIECES: u64 = 1024;

/// Activations that `dictlearn activations` wrote.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ActivationCacheConfig {
    /// The folder, with its `meta.json`.
    pub path: ConfigPath,
    /// Activations in a training batch.
    #[serde(default = "batch_size")]
    #[schemars(range(min = 1))]
    pub batch_size: u64,
    /// Whether each pass has a random order of its own.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Activations held in memory, among which they are shuffled.
    #[serde(default = "buffer_size")]
    #[schemars(range(min = 1))]
    pub buffer_size: u64,
    /// Whether a shard's hash is checked when it is first read; names, lengths, types and shapes always are.
    #[serde(default = "yes")]
    pub verify: bool,
}

fn batch_size() -> u64 {
    2048
}

fn buffer_size() -> u64 {
    131_072
}

fn yes() -> bool {
    true
}

register! {
    source ActivationCacheConfig, NAME,
    summary: "Activations that `dictlearn activations` wrote, shuffled across shards",
    paper: "",
    example: "{type: activation_cache, path: activations, batch_size: 64}",
}

#[typetag::serde(name = NAME)]
impl SourceConfig for ActivationCacheConfig {
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        let folder = Folder::open(self.path.as_path(), self.verify).under("path")?;
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
}

/// The rows of all shards in pieces of consecutive rows, none of which crosses from one shard to the next.
struct Pieces {
    /// Rows of each shard.
    shards: Vec<u64>,
    /// Rows in a piece, but for the last of a shard.
    length: u64,
    /// The number of each shard's first piece, and last how many there are.
    firsts: Vec<u64>,
}

impl Pieces {
    fn new(shards: Vec<u64>, length: u64) -> Self {
        let mut firsts = vec![0];
        for rows in &shards {
            firsts.push(firsts[firsts.len() - 1] + rows.div_ceil(length));
        }
        Pieces { shards, length, firsts }
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
}

struct ActivationCache {
    described: Value,
    folder: Folder,
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
            self.order.shuffle(&mut rng(self.cx.seed, &format!("{NAME} pass {pass}")));
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
        let places: Vec<(usize, Range<u64>)> = pieces.iter().map(|piece| self.pieces.get(*piece)).collect();
        let columns = self.folder.read(&places)?;
        let order = self.shuffle.then(|| {
            let mut order: Vec<i64> = (0..columns[0].size()[0]).collect();
            order.shuffle(&mut rng(self.cx.seed, &format!("{NAME} pass {} buffer {}", self.pass, self.window)));
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
        dictlearn_core::source::sampled_mean_squared_norms(self)
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
            bail!(InputError::new("the folder of activations is not the one that the run was begun with")
                .field("source")
                .help("put that one back, or train anew in another `--output-dir`"));
        }
        self.begin_pass(state.get("pass")?);
        self.window = state.get("window")?;
        self.served = state.get("served")?;
        Ok(())
    }
}
