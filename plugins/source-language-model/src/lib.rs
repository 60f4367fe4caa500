//! Activations of a language model, served from the reference's buffer.
//!
//! The text is tokenised into contexts. The model runs on them up to the hooked module, and the activations at text
//! positions go into a buffer of `n_ctxs · ctx_len` rows. Batches are drawn from it at random without replacement. When
//! less than half of it is unread, it is refilled. Memory is the buffer, one forward pass and one batch.
//!
//! With `shuffle: false` there is no buffer: activations come in the text's order.
//!
//! Several submodules, or the heads of an attention, are sites: one forward pass feeds all of them, and a row is the
//! same token at each.
//!
//! Where this differs from the reference: `remove_bos` removes each context's first token, not every token with the BOS
//! id. `max_activation_norm_multiple` takes the median over text positions, without padding. Activations that do not
//! fit into the buffer wait for the next refill instead of being dropped.

mod ahead;
mod buffer;
mod chat;
mod contexts;
mod harvested;
mod held_out;
mod sites;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

use chrono::{Local, NaiveDate};
use dictlearn_core::formats::WrittenSource;
use dictlearn_core::interrupt;
use dictlearn_core::lm::{ModelFiles, open_model};
use dictlearn_core::machine::rng::rng;
use dictlearn_core::prelude::*;

use ahead::Ahead;
use buffer::Buffer;
use contexts::{Contexts, ContextsCx, Place, Row};
use harvested::{Columns, Harvested};
use held_out::PartOfText;
pub use sites::{Heads, IoChoice, Submodules};
use sites::{LanguageModelSite, sites};

/// Activations of a language model.
#[component(source "language_model", summary = "Activations of a language model, served from a shuffling buffer",
    example = "{type: language_model, model: \"embedded:austen\", submodule: gpt_neox.layers.2, text: {type: \
        embedded, name: austen}, ctx_len: 64, n_ctxs: 64, out_batch_size: 256, pack: true}", default)]
pub struct LanguageModelConfig {
    /// The model: a folder in Hugging Face's layout, a Hub repository `owner/name[@revision]`, or `embedded:NAME`.
    /// Weights are read from `model.safetensors` or, without it, from `pytorch_model.bin`; both may be sharded.
    pub model: PathOrName,
    /// Module to harvest: its path in the Hugging Face model (`gpt_neox.layers.1.mlp`), or a TransformerLens name
    /// (`blocks.1.hook_mlp_out`). A list makes one site for each entry.
    pub submodule: Submodules,
    /// Harvest the module's output (`out`), its input (`in`), or both as pairs (`in_to_out`). A TransformerLens name
    /// already implies one of them.
    #[default]
    pub io: IoChoice,
    /// Hook point to predict from the submodule: a module, whose output is the target, or a TransformerLens name. Null
    /// reconstructs the submodule's own value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Subtract from every activation its mean over dimensions. This matches TransformerLens's `center_writing_weights`
    /// for values written to the residual stream.
    #[default]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub center: bool,
    /// Treat the outputs of attention heads (`blocks.1.attn.hook_z`) as one concatenated site (`joined`), or as one
    /// site per head (`separate`), named `<submodule>.head0` and so on.
    #[default]
    pub heads: Heads,
    /// The text that the model reads.
    pub text: Box<dyn TaggedText>,
    /// Tokens per context. Rows of a `token_file` keep their own length.
    #[default(128)]
    #[schemars(range(min = 1))]
    pub ctx_len: u64,
    /// Contexts held in the buffer. It is refilled when half of it is used.
    #[default(3000)]
    #[schemars(range(min = 1))]
    pub n_ctxs: u64,
    /// Contexts per forward pass.
    #[default(64)]
    #[schemars(range(min = 1))]
    pub refresh_batch_size: u64,
    /// Activations per training batch.
    #[default(2048)]
    #[schemars(range(min = 1))]
    pub out_batch_size: u64,
    /// Skip the activation at the first text position of each context. This is the BOS token, if there is one, and
    /// usually the model's attention sink.
    #[default]
    pub remove_bos: bool,
    /// Let the tokenizer add its special tokens to each document.
    #[default(true)]
    pub add_special_tokens: bool,
    /// `true`: start every context with the BOS token, whatever the tokenizer does. `false`: the tokenizer adds no
    /// special tokens. Null: the tokenizer decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepend_bos: Option<bool>,
    /// Skip the activations of special tokens: `true` for BOS, EOS, padding and separator as named by the model's
    /// files, or a list of token ids. The model still reads these tokens.
    #[default]
    #[serde(skip_serializing_if = "Exclude::is_none")]
    pub exclude_special_tokens: Exclude,
    /// Today's date for chat templates, `YYYY-MM-DD`; null uses the day on which the run starts. Some templates write
    /// it into the system message (Llama 3.1 and later, gpt-oss). Set it to get the same tokens on another day.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_date: Option<String>,
    /// Skip activations whose norm exceeds this multiple of the median norm in their forward pass; 10 is common. With
    /// several submodules, a token skipped at one is skipped at all. Null keeps every activation.
    #[schemars(range(min = 0))]
    pub max_activation_norm_multiple: Option<f64>,
    /// Draw batches from the buffer at random. `false` serves activations in the text's order, without a buffer.
    #[default(true)]
    pub shuffle: bool,
    /// Join documents with the end-of-text token and cut them into full contexts. `false` makes one context of each
    /// document, truncated to `ctx_len`.
    #[default]
    pub pack: bool,
    /// Fraction of the documents, from 0 to 1, that training never reads and metrics are computed on. With 0, metrics
    /// continue with the text that training has not read. For an `eval_source` with its own `text`, set `held_out: 0`
    /// to evaluate on all of it. Documents of one book or page may fall into both parts; use an `eval_source` if that
    /// matters.
    #[default]
    #[serde(skip_serializing_if = "is_zero")]
    #[schemars(range(min = 0, max = 1))]
    pub held_out: f64,
    /// Seed that draws the held-out documents. It is independent of the run's `seed`, so that runs with different seeds
    /// are evaluated on the same documents.
    #[default]
    #[serde(skip_serializing_if = "is_first")]
    pub held_out_seed: u64,
    /// Maximum number of passes over the text; null for as many as the run needs.
    #[schemars(range(min = 1))]
    pub epochs: Option<u64>,
}

/// Tokens whose activations are skipped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Exclude {
    /// All special tokens, or none.
    Special(bool),
    /// The tokens with these ids.
    Ids(Vec<i64>),
}

dictlearn_core::inline_schema!(Exclude, {"type": ["boolean", "array"], "items": {"type": "integer"}});

impl Default for Exclude {
    fn default() -> Self {
        Exclude::Special(false)
    }
}

impl Exclude {
    fn is_none(&self) -> bool {
        *self == Exclude::Special(false)
    }

    /// Returns the token ids. Returns an error for ids outside `0..vocab_size`.
    fn ids(&self, contexts: &Contexts, vocab_size: i64) -> Result<Vec<i64>> {
        let field = "exclude_special_tokens";
        match self {
            Exclude::Special(false) => Ok(Vec::new()),
            Exclude::Special(true) => match contexts.special_ids() {
                [] => bail!(
                    InputError::new("the model's files name no special tokens")
                        .field(field)
                        .help("give their ids: `exclude_special_tokens: [0, 1]`")
                ),
                ids => Ok(ids.to_vec()),
            },
            Exclude::Ids(ids) => {
                if let Some(index) = ids.iter().position(|id| !(0..vocab_size).contains(id)) {
                    bail!(
                        InputError::new(format!(
                            "token id {}, but the model embeds only the ids 0 to {}",
                            ids[index],
                            vocab_size - 1
                        ))
                        .field(format!("{field}[{index}]"))
                        .help("give ids from the model's tokenizer")
                    );
                }
                Ok(ids.clone())
            }
        }
    }
}

fn is_zero(number: &f64) -> bool {
    *number == 0.0
}

fn is_first(seed: &u64) -> bool {
    *seed == 0
}

inventory::submit! {
    WrittenSource {
        config: |site, text| {
            let mut source = serde_json::json!({"type": LanguageModelConfig::NAME, "model": site.model, "submodule": site.submodule});
            let mut add = |key: &str, value: Option<Value>| {
                if let Some(value) = value {
                    source[key] = value;
                }
            };
            add("io", site.io.map(Value::from));
            add("target", site.target.as_deref().map(Value::from));
            add("heads", site.head.map(|_| "separate".into()));
            add("ctx_len", site.ctx_len.map(Value::from));
            add("prepend_bos", site.prepend_bos.map(Value::from));
            add("center", site.center.then_some(true.into()));
            add("text", Some(text));
            source
        },
    }
}

impl SourceConfig for LanguageModelConfig {
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        let mut mistakes = Mistakes::new();
        self.check(&mut mistakes);
        let text = mistakes.keep(self.text.build().under("text"))?;
        // Do not download a model if the config already has mistakes.
        let at_hand = self.model.0.starts_with("embedded:") || Path::new(&self.model.0).exists();
        let mut opened = None;
        if mistakes.is_empty() || at_hand {
            opened = mistakes.keep(open_model(&self.model.0, cx.device, cx.precision).under("model"))?;
        }
        let mut places = None;
        if let Some((model, _)) = &opened {
            places = mistakes.keep(sites(&**model, self))?;
            if let Some(text) = &text {
                self.check_lengths(&**text, &**model, &mut mistakes);
            }
        }
        mistakes.into_result()?;
        let (Some(text), Some((model, files)), Some(sites)) = (text, opened, places) else {
            bail!("the source could not be built");
        };
        let capacity = self.capacity();
        let chosen = self.chat_date.as_deref().and_then(|date| date.parse::<NaiveDate>().ok());
        let contexts_cx = ContextsCx {
            ctx_len: self.ctx_len as usize,
            pack: self.pack,
            add_special_tokens: self.add_special_tokens && self.prepend_bos != Some(false),
            prepend_bos: self.prepend_bos == Some(true),
            vocab_size: model.vocab_size(),
            max_positions: model.max_positions(),
            today: chosen.unwrap_or_else(|| Local::now().date_naive()),
            date_is_chosen: chosen.is_some(),
        };
        let text = match self.held_out() {
            None => text,
            Some(held_out) => Box::new(PartOfText { text, held_out, purpose: cx.purpose }),
        };
        let context_length = text.longest_row().unwrap_or(self.ctx_len as i64);
        let contexts = Contexts::new(text, &files, contexts_cx).under("model")?;
        let text_files = contexts.files();
        let excluded = self.exclude_special_tokens.ids(&contexts, model.vocab_size())?;
        let excluded = (!excluded.is_empty()).then(|| Tensor::from_slice(&excluded).to_device(model.device()));
        let today = contexts.today();
        let contexts = Ahead::new(contexts, 2 * self.refresh_batch_size as usize);
        let mut settings = serde_json::to_value(self)?;
        if let Some(commit) = files.commit() {
            settings["commit"] = commit.into();
        }
        settings["device"] = dictlearn_core::machine::device::name(cx.device).into();
        let mut points: Vec<(HookPoint, i64)> = Vec::new();
        for part in sites.iter().flat_map(|site| [&site.reads, &site.writes]) {
            if !points.iter().any(|(point, _)| *point == part.point) {
                points.push((part.point.clone(), part.whole));
            }
        }
        let read = |point: &HookPoint| sites.iter().any(|site| site.reads.point == *point);
        let inputs = (0..points.len()).filter(|index| read(&points[*index].0)).collect();
        Ok(Box::new(LanguageModelSource {
            settings,
            files,
            text_files,
            sites,
            today,
            harvest: Harvest {
                remove_bos: self.remove_bos,
                excluded,
                max_norm: self.max_activation_norm_multiple,
                rows: self.refresh_batch_size as usize,
                contexts,
                model,
                points,
                inputs,
                pending: Vec::new(),
                context: 0,
                starts: VecDeque::new(),
                ended: false,
                gave: false,
                leaves_out: cx.on_nonfinite == OnNonfinite::SkipBatch,
                left_out: None,
            },
            buffer: None,
            capacity: self.shuffle.then_some(capacity as usize),
            batch_size: self.out_batch_size as usize,
            epochs: self.epochs,
            context_length,
            cx: *cx,
        }))
    }

    fn held_out(&self) -> Option<HeldOut> {
        HeldOut::new(self.held_out, self.held_out_seed)
    }
}

impl LanguageModelConfig {
    /// Returns the number of activations that the buffer holds.
    fn capacity(&self) -> u64 {
        self.n_ctxs.saturating_mul(self.ctx_len)
    }

    /// Adds the mistakes that can be found without the model and the text.
    fn check(&self, mistakes: &mut Mistakes) {
        let capacity = self.capacity();
        if self.shuffle && self.out_batch_size.saturating_mul(2) > capacity {
            mistakes.add(
                InputError::new(format!(
                    "a batch of {} activations is more than half of the buffer's {capacity}",
                    self.out_batch_size
                ))
                .field("out_batch_size")
                .help("raise `n_ctxs` or lower `out_batch_size`"),
            );
        }
        if self.held_out >= 1.0 {
            mistakes.add(
                InputError::new("no documents are left to train on")
                    .field("held_out")
                    .help("`held_out` is the fraction of the documents reserved for metrics, such as 0.1"),
            );
        }
        if self.prepend_bos == Some(true) && self.ctx_len < 2 {
            mistakes.add(
                InputError::new("a context of one token holds only the BOS token")
                    .field("ctx_len")
                    .help("set it to 2 or more"),
            );
        }
        if let Some(date) = self.chat_date.as_deref().filter(|date| date.parse::<NaiveDate>().is_err()) {
            mistakes.add(
                InputError::new(format!("`{date}` is not a date"))
                    .field("chat_date")
                    .help("write it as YYYY-MM-DD: 2024-07-26"),
            );
        }
    }

    /// Adds the mistakes of contexts that are too long for the model.
    fn check_lengths(&self, text: &dyn TextStream, model: &dyn LanguageModel, mistakes: &mut Mistakes) {
        let Some(most) = model.max_positions() else { return };
        if let Some(row) = text.longest_row().filter(|row| *row > most) {
            mistakes.add(
                InputError::new(format!("the rows of tokens have {row} positions, but the model takes at most {most}"))
                    .field("text")
                    .help("shorten the rows, or choose a model with longer contexts"),
            );
        }
        if !text.is_tokenized() && self.ctx_len as i64 > most {
            mistakes.add(
                InputError::new(format!("`ctx_len` is {}, but the model takes at most {most} positions", self.ctx_len))
                    .field("ctx_len")
                    .help(format!("set `ctx_len` to {most} or less")),
            );
        }
    }
}

struct LanguageModelSource {
    settings: Value,
    files: ModelFiles,
    /// The text's files, with their lengths.
    text_files: BTreeMap<String, u64>,
    sites: Vec<LanguageModelSite>,
    /// Today's date for chat templates.
    today: NaiveDate,
    harvest: Harvest,
    /// Allocated at the first batch: reading only tokens needs no buffer.
    buffer: Option<Buffer>,
    /// Capacity of the buffer; `None` without `shuffle`.
    capacity: Option<usize>,
    batch_size: usize,
    epochs: Option<u64>,
    /// Positions of the longest context.
    context_length: i64,
    cx: SourceCx,
}

/// Runs the model over the text, and returns activations in the text's order.
struct Harvest {
    remove_bos: bool,
    /// Token ids whose activations are skipped.
    excluded: Option<Tensor>,
    max_norm: Option<f64>,
    rows: usize,
    contexts: Ahead,
    model: Box<dyn LanguageModel>,
    /// The hook points to read, each once, with their widths.
    points: Vec<(HookPoint, i64)>,
    /// Indices of the points that dictionaries read; the others are only reconstructed.
    inputs: Vec<usize>,
    /// Harvested rows that are not in the buffer yet: a tensor of activations for each point, and last their tokens.
    /// Empty, or all of the same length.
    pending: Vec<Tensor>,
    /// Contexts read so far in this pass over the text.
    context: i64,
    /// Position in the text before each forward pass that still has rows in the buffer, with the index of its first
    /// context.
    starts: VecDeque<(i64, Place)>,
    ended: bool,
    /// True once an activation was harvested.
    gave: bool,
    /// True if non-finite activations are skipped; otherwise they are an error.
    leaves_out: bool,
    /// Number of skipped activations, and the reason for the first.
    left_out: Option<(u64, String)>,
}

impl Harvest {
    /// Returns the next contexts of the text, and the index of the first.
    fn next_rows(&mut self, count: usize) -> Result<(Vec<Row>, i64)> {
        let rows = self.contexts.next_rows(count)?;
        let first = self.context;
        self.context += rows.len() as i64;
        Ok((rows, first))
    }

    /// Runs the next forward pass. Returns the activations at its text positions; `None` at the end of the text.
    fn forward(&mut self) -> Result<Option<Harvested>> {
        interrupt::check()?;
        let start = (self.context, self.contexts.place());
        let (rows, first) = self.next_rows(self.rows)?;
        if rows.is_empty() {
            self.ended = true;
            return Ok(None);
        }
        self.starts.push_back(start);
        let points: Vec<HookPoint> = self.points.iter().map(|(point, _)| point.clone()).collect();
        // Run rows of similar length together, to minimise padding, and only as many as fit into the caches.
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|row| rows[*row].len());
        let mut parts = Vec::new();
        let mut rest = &order[..];
        while !rest.is_empty() {
            if interrupt::asked() {
                // Undo the pass: a resumed run reads its contexts again.
                self.starts.pop_back();
                self.context = start.0;
                self.contexts.end_at(start.1);
                interrupt::check()?;
            }
            let (now, later) = rest.split_at(self.rows_at_once(&rows, rest).max(1));
            rest = later;
            let batch: Vec<&Row> = now.iter().map(|row| &rows[*row]).collect();
            let contexts: Vec<i64> = now.iter().map(|row| first + *row as i64).collect();
            let (columns, counts) = self.forward_at_once(&batch, &contexts, &points)?;
            parts.push((columns, now.iter().copied().zip(counts).collect()));
        }
        let harvested = Harvested::new(parts, rows.len());
        Ok(Some(match self.max_norm {
            Some(multiple) => harvested.without_outliers(multiple, &self.inputs),
            None => harvested,
        }))
    }

    /// Returns how many rows to run together, from the start of `order`.
    fn rows_at_once(&self, rows: &[Row], order: &[usize]) -> usize {
        if !matches!(self.model.device(), Device::Cpu) {
            return order.len();
        }
        let most = self.model.tokens_at_once();
        // Lengths are ascending, so row n is the longest of the first n + 1.
        order.iter().enumerate().take_while(|(n, row)| (n + 1) * rows[**row].len() <= most).count()
    }

    /// Runs some rows together. Returns the activations at their text positions, row by row, and the number of each
    /// row.
    fn forward_at_once(
        &mut self,
        rows: &[&Row],
        contexts: &[i64],
        points: &[HookPoint],
    ) -> Result<(Columns, Vec<i64>)> {
        let tokens = Contexts::batch(rows, self.model.device());
        tch::no_grad(|| {
            let mut hooks = Hooks::read(points, true);
            let _ = self.model.forward(&tokens, &mut hooks);
            // Values that all rows share (embedded positions) have one row.
            let count = rows.len() as i64;
            let of_all =
                |value: Tensor| if value.size()[0] < count { value.expand([count, -1, -1], true) } else { value };
            let values: Vec<Tensor> = points.iter().filter_map(|point| hooks.take(point)).collect();
            if let Some((value, point)) = values.iter().zip(points).find(|(value, _)| value.dim() != 3) {
                bail!(InputError::new(format!(
                    "{point} has the shape {:?}, but a site has one vector for each token",
                    value.size()
                )));
            }
            let values: Vec<Tensor> = values.into_iter().map(of_all).collect();
            let mask = if self.remove_bos { tokens.without_first() } else { tokens.mask.shallow_clone() };
            let mask = match &self.excluded {
                Some(ids) => mask.logical_and(&Tensor::isin(&tokens.ids, ids, false, true)),
                None => mask,
            };
            let mask = self.finite(&values, mask, rows)?;
            let counts = Vec::<i64>::try_from(mask.sum_dim_intlist([1].as_slice(), false, Kind::Int64))?;
            // Each kept position as its row, its position in the row, and its flat index.
            let kept = mask.nonzero();
            let (row, position) = (kept.select(1, 0), kept.select(1, 1));
            let all = &row * mask.size()[1] + &position;
            let contexts = Tensor::from_slice(contexts).to_device(mask.device()).index_select(0, &row);
            let ids = tokens.ids.flatten(0, 1).index_select(0, &all);
            let activations = values.iter().map(|value| value.flatten(0, 1).index_select(0, &all).to_kind(Kind::Float));
            let columns = activations.chain([Tensor::stack(&[&ids, &contexts, &position], 1)]).collect();
            Ok((columns, counts))
        })
    }

    /// Returns the mask without the positions of non-finite values, or an error for these. The check is done here because
    /// batches no longer know the document of a value, and cannot skip single tokens.
    fn finite(&mut self, values: &[Tensor], mut mask: Tensor, rows: &[&Row]) -> Result<Tensor> {
        for (value, (point, _)) in values.iter().zip(&self.points) {
            let bad = value.isfinite().all_dim(-1, false).logical_not().logical_and(&mask);
            if !bool::try_from(bad.any())? {
                continue;
            }
            let at = bad.nonzero();
            let (row, position) = (at.int64_value(&[0, 0]), at.int64_value(&[0, 1]));
            let origin = &rows[row as usize].origin;
            let why = format!("the model's value at {point} is not finite for {origin}, token {position}");
            if !self.leaves_out {
                bail!(
                    InputError::new(why)
                        .help("try `precision: float32`, remove that text, or set `on_nonfinite: skip_batch`")
                );
            }
            self.left_out.get_or_insert((0, why)).0 += at.size()[0] as u64;
            mask = mask.logical_and(&bad.logical_not());
        }
        Ok(mask)
    }

    /// Harvests the activations of these tokens [n, 3] again, in the text's order, starting at a place before the
    /// first.
    fn replay(&mut self, tokens: &Tensor, start: (i64, Place)) -> Result<Columns> {
        let changed = || {
            InputError::new("the text or the model has changed since the checkpoint was saved: the tokens differ")
                .field("source")
                .help("restore the original, or start a new run in another `--output-dir`")
        };
        (self.context, self.ended) = (start.0, false);
        self.contexts.seek(start.1)?;
        let contexts = Vec::<i64>::try_from(tokens.select(1, 1))?;
        let (count, mut done) = (contexts.len(), 0);
        let mut parts: Vec<Columns> = Vec::new();
        while done < count {
            // Skip passes without wanted tokens: read their contexts, but do not run the model.
            if self.context + self.rows as i64 <= contexts[done] {
                interrupt::check()?;
                if self.next_rows(self.rows)?.0.is_empty() {
                    bail!(changed());
                }
                continue;
            }
            let Some(harvested) = self.forward()? else { bail!(changed()) };
            let columns = harvested.in_order(&self.columns(), self.model.device());
            let here = contexts[done..].partition_point(|context| *context < self.context);
            let wanted = tokens.narrow(0, done as i64, here as i64);
            done += here;
            let Some(given) = columns.last() else { bail!(changed()) };
            // Both are ascending.
            let key = |tokens: &Tensor| (tokens.select(1, 1) * (1_i64 << 32) + tokens.select(1, 2)).contiguous();
            let (keys, wanted_keys) = (key(given), key(&wanted));
            let at = wanted_keys.searchsorted(&keys, false, false, "left", None::<&Tensor>);
            let last = given.size()[0] - 1;
            if here > 0 && (last < 0 || !given.index_select(0, &at.clamp_max(last)).equal(&wanted)) {
                bail!(changed());
            }
            parts.push(columns.iter().map(|column| column.index_select(0, &at)).collect());
        }
        let column = |index: usize| {
            let (width, kind) = self.columns()[index];
            let none = Tensor::empty([0, width], (kind, self.model.device()));
            let parts = parts.iter().map(|columns: &Columns| columns[index].shallow_clone());
            Tensor::cat(&std::iter::once(none).chain(parts).collect::<Vec<_>>(), 0)
        };
        Ok((0..=self.points.len()).map(column).collect())
    }

    /// Writes at least one activation to the first rows of `out`, [rows, width] for each column. Returns their number;
    /// `None` at the end of the text.
    fn take(&mut self, out: &[Tensor]) -> Result<Option<i64>> {
        let room = out[0].size()[0];
        while self.available() == 0 {
            self.pending.clear();
            match self.forward()? {
                None if self.excluded.is_some() && !self.gave && self.context > 0 => {
                    bail!(
                        InputError::new(format!(
                            "`exclude_special_tokens` excludes every token of the text ({} contexts)",
                            self.context
                        ))
                        .field("exclude_special_tokens")
                        .help("list fewer token ids, or choose another text")
                    );
                }
                None => return Ok(None),
                Some(harvested) if (1..=room).contains(&harvested.count()) => {
                    self.gave = true;
                    harvested.write(out);
                    return Ok(Some(harvested.count()));
                }
                Some(harvested) => self.pending = harvested.in_order(&self.columns(), self.model.device()),
            }
        }
        self.gave = true;
        let here = self.available().min(room);
        let rest = self.available() - here;
        for (out, pending) in out.iter().zip(&mut self.pending) {
            out.narrow(0, 0, here).copy_(&pending.narrow(0, 0, here));
            *pending = pending.narrow(0, here, rest);
        }
        Ok(Some(here))
    }

    /// Returns width and dtype of the activations at each point, and last of the tokens.
    fn columns(&self) -> Vec<(i64, Kind)> {
        let activations = self.points.iter().map(|(_, width)| (*width, Kind::Float));
        activations.chain([(3, Kind::Int64)]).collect()
    }

    fn available(&self) -> i64 {
        self.pending.first().map_or(0, |tensor| tensor.size()[0])
    }
}

impl LanguageModelSource {
    /// Returns a file that both this text and another config's text read. A text that cannot be opened shares no file.
    fn shared_file(&self, theirs: &Value) -> Option<String> {
        if self.text_files.is_empty() || !names_files(theirs) {
            return None;
        }
        let theirs: Box<dyn TaggedText> = serde_json::from_value(theirs.clone()).ok()?;
        let real = |files: BTreeMap<String, u64>| -> BTreeSet<std::path::PathBuf> {
            files.keys().filter_map(|file| std::fs::canonicalize(file).ok()).collect()
        };
        let (own, theirs) = (real(self.text_files.clone()), real(theirs.build().ok()?.files()));
        own.intersection(&theirs).next().map(|file| file.display().to_string())
    }

    /// Returns the batch of each site, and the tokens, from rows of every column.
    fn activations(&self, columns: &[Tensor]) -> Activations {
        let part = |part: &Part| part.of(&columns[self.column(part)]);
        let batch = |site: &LanguageModelSite| match site.reads == site.writes {
            true => Batch::of(part(&site.reads)),
            false => Batch { x: part(&site.reads), target: part(&site.writes) },
        };
        let tokens = columns.last().map(Tensor::shallow_clone);
        Activations { sites: self.sites.iter().map(batch).collect(), tokens }
    }

    /// Returns the index of a part's hook point.
    fn column(&self, part: &Part) -> usize {
        let found = self.harvest.points.iter().position(|(point, _)| *point == part.point);
        found.expect("the point of every site is harvested")
    }

    /// Returns the next batch in the text's order; the last one of a pass may be smaller.
    fn next_in_order(&mut self) -> Result<Option<Activations>> {
        let rows = self.batch_size as i64;
        let column = |(width, kind): (i64, Kind)| Tensor::empty([rows, width], (kind, self.harvest.model.device()));
        let columns: Columns = self.harvest.columns().into_iter().map(column).collect();
        let mut count = 0;
        while count < rows {
            let room: Columns = columns.iter().map(|column| column.narrow(0, count, rows - count)).collect();
            let Some(taken) = self.harvest.take(&room)? else { break };
            count += taken;
        }
        if count == 0 {
            return Ok(None);
        }
        let columns: Columns = columns.iter().map(|column| column.narrow(0, 0, count)).collect();
        Ok(Some(self.activations(&columns)))
    }

    fn filled_buffer(&mut self, capacity: usize) -> Result<&mut Buffer> {
        let harvest = &mut self.harvest;
        let buffer = self.buffer.get_or_insert_with(|| {
            Buffer::new(&harvest.columns(), capacity, self.cx.device, rng(self.cx.seed, LanguageModelConfig::NAME))
        });
        if buffer.wants_more() && !(harvest.ended && harvest.available() == 0) {
            buffer.fill(|free| harvest.take(free))?;
            // The buffer's rows are in the text's order.
            let oldest = buffer.first_row(harvest.points.len()).map_or(harvest.context, |row| row.int64_value(&[1]));
            while harvest.starts.get(1).is_some_and(|(context, _)| *context <= oldest) {
                harvest.starts.pop_front();
            }
        }
        Ok(buffer)
    }
}

/// True if a text's config equals another one, or one of the texts that the other mixes.
fn is_part_of(part: &Value, whole: &Value) -> bool {
    part == whole
        || match whole {
            Value::Object(fields) => fields.values().any(|value| is_part_of(part, value)),
            Value::Array(items) => items.iter().any(|item| is_part_of(part, item)),
            _ => false,
        }
}

/// True if a text's config names local files.
fn names_files(config: &Value) -> bool {
    match config {
        Value::Object(fields) => fields.iter().any(|(name, value)| name == "path" || names_files(value)),
        Value::Array(items) => items.iter().any(names_files),
        _ => false,
    }
}

impl ActivationSource for LanguageModelSource {
    fn sites(&self) -> Vec<Site> {
        self.sites.iter().map(|site| site.site.clone()).collect()
    }

    fn next_batch(&mut self) -> Result<Option<Activations>> {
        let Some(capacity) = self.capacity else { return self.next_in_order() };
        let batch_size = self.batch_size;
        let buffer = self.filled_buffer(capacity)?;
        // At the end of the text, the rest is a smaller batch.
        let count = batch_size.min(buffer.unread());
        let columns = if count == 0 { None } else { buffer.take(count) };
        Ok(columns.map(|columns| self.activations(&columns)))
    }

    fn rewind(&mut self) -> Result<()> {
        self.harvest.contexts.rewind()?;
        self.harvest.context = 0;
        self.harvest.pending.clear();
        self.harvest.starts.clear();
        self.harvest.ended = false;
        if let Some(buffer) = &mut self.buffer {
            buffer.clear();
        }
        Ok(())
    }

    fn gives_finite(&self) -> bool {
        true
    }

    fn passes(&self) -> Option<u64> {
        self.epochs
    }

    fn mean_squared_norms(&mut self) -> Result<Vec<f64>> {
        let Some(capacity) = self.capacity else { return dictlearn_core::data::sampled_mean_squared_norms(self) };
        self.filled_buffer(capacity)?;
        let Some(buffer) = &self.buffer else { return Ok(Vec::new()) };
        let norm = |site: &LanguageModelSite| buffer.mean_squared_norm(self.column(&site.reads), &site.reads);
        Ok(self.sites.iter().map(norm).collect())
    }

    fn language_model(&mut self) -> Option<&mut dyn ModelSource> {
        Some(self)
    }

    fn model_source(&self) -> Option<&dyn ModelSource> {
        Some(self)
    }

    fn memory(&self) -> Vec<MemoryNeed> {
        let model = &*self.harvest.model;
        let row: i64 = self.harvest.columns().iter().map(|(width, kind)| width * kind.elt_size_in_bytes() as i64).sum();
        let (length, contexts) = (self.context_length(), self.harvest.rows as i64);
        let at_once = match model.device() {
            Device::Cpu => (model.tokens_at_once() as i64).max(length).min(contexts * length),
            _ => contexts * length,
        };
        // Peak of a layer: several copies of the residual stream and of its widest value, ignoring logits.
        let widths = model.modules().into_iter().flat_map(|module| [module.input, module.output]);
        let widest = widths.filter(|width| *width != model.vocab_size()).max().unwrap_or(0);
        let pass = at_once * (4 * model.hidden_size() + 3 * widest) * 4;
        // First in parts, then joined.
        let harvested = 2 * contexts * length * row;
        let mut needs = vec![
            MemoryNeed::lasting("the model", model.memory(), "`model`, or `precision` to bfloat16"),
            MemoryNeed::passing("a pass of the model", (pass + harvested) as u64, "`refresh_batch_size`"),
        ];
        if let Some(capacity) = self.capacity {
            // Includes the order in which rows are served.
            let buffer = capacity as u64 * (row as u64 + 12);
            needs.push(MemoryNeed::lasting("the buffer of activations", buffer, "`n_ctxs`"));
            let copy = match self.cx.checkpoint_buffer {
                CheckpointBuffer::Contents => buffer,
                CheckpointBuffer::Replay => capacity as u64 * 28,
            };
            let knob = "`n_ctxs`, or `checkpoint_buffer` to replay";
            needs.push(MemoryNeed::lasting("the buffer in a checkpoint", copy, knob).on_host());
        }
        needs
    }

    fn batch_size(&self) -> Option<i64> {
        Some(self.batch_size as i64)
    }

    fn describe(&self) -> Value {
        self.settings.clone()
    }

    fn overlap(&self, trained: &Value) -> Option<String> {
        let (own, theirs) = (&self.settings["text"], &trained["text"]);
        let same = !own.is_null() && (is_part_of(own, theirs) || is_part_of(theirs, own));
        let parted = ["held_out", "held_out_seed"].iter().all(|key| self.settings[*key] == trained[*key]);
        let apart = self.cx.purpose == Purpose::Evaluation && !self.settings["held_out"].is_null() && parted;
        if apart && own == theirs {
            return None;
        }
        let keep_apart = ": set `held_out: 0.1` in `source`, or give an `eval_source` its own `text`, to separate them";
        if same {
            return Some(format!("the same text{keep_apart}"));
        }
        self.shared_file(theirs).map(|file| format!("the file {file} among others{keep_apart}"))
    }

    fn state(&self) -> Result<State> {
        let harvest = &self.harvest;
        let mut state = State::new();
        state.put("place", harvest.contexts.place())?;
        state.put("text_files", &self.text_files)?;
        state.put("today", self.today.to_string())?;
        state.put("context", harvest.context)?;
        state.put("starts", &harvest.starts)?;
        state.put("ended", harvest.ended)?;
        state.put("pending", harvest.pending.len())?;
        let replay = self.cx.checkpoint_buffer == CheckpointBuffer::Replay;
        state.put("replay", replay)?;
        // The last column holds the tokens of the others.
        let kept = if replay { harvest.points.len() } else { 0 };
        for (index, tensor) in harvest.pending.iter().enumerate().skip(kept) {
            state.put_tensor(format!("pending{index}"), tensor);
        }
        state.put("buffer", self.buffer.is_some())?;
        if let Some(buffer) = &self.buffer {
            state.put_all("buffer", buffer.state(kept)?);
        }
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        let before: BTreeMap<String, u64> = state.get("text_files")?;
        if before != self.text_files {
            let all: BTreeSet<&String> = before.keys().chain(self.text_files.keys()).collect();
            let show = |length: Option<&u64>| length.map_or("absent".to_owned(), |length| format!("{length} bytes"));
            let changed = all.into_iter().filter(|file| before.get(*file) != self.text_files.get(*file));
            let changed: Vec<String> = changed
                .map(|file| format!("{file}: {} -> {}", show(before.get(file)), show(self.text_files.get(file))))
                .collect();
            bail!(
                InputError::new(format!("the text has changed since the run started: {}", changed.join(", ")))
                    .field("text")
                    .help("restore the original files, or start a new run in another `--output-dir`")
            );
        }
        // Chats keep their text when the run resumes on another day.
        if let Ok(today) = state.get::<String>("today")?.parse() {
            self.today = today;
            self.harvest.contexts.set_today(today);
        }
        let (device, points) = (self.cx.device, self.harvest.points.len());
        let saved = |name: String| Ok(state.tensor(&name)?.to_device(device));
        let pending: usize = state.get("pending")?;
        let filled = state.get("buffer")? && self.capacity.is_some();
        // The rows in the buffer, and the harvested rows that are not in it yet.
        let (mut buffered, mut harvested): (Columns, Columns) = (Vec::new(), Vec::new());
        if state.get("replay")? {
            let none = Tensor::empty([0, 3], (Kind::Int64, device));
            let tokens_of =
                |is_there: bool, name: String| if is_there { saved(name) } else { Ok(none.shallow_clone()) };
            let parts = [
                tokens_of(filled, format!("buffer/column{points}"))?,
                tokens_of(pending > 0, format!("pending{points}"))?,
            ];
            let starts: VecDeque<(i64, Place)> = state.get("starts")?;
            if let Some(start) = starts.front() {
                tracing::info!("running the model again to restore the buffer");
                let columns = self.harvest.replay(&Tensor::cat(&parts, 0), *start)?;
                let split = [parts[0].size()[0], parts[1].size()[0]];
                for mut column in columns.into_iter().map(|column| column.split_with_sizes(split, 0)) {
                    harvested.extend(column.pop());
                    buffered.extend(column.pop());
                }
            }
            if pending == 0 {
                harvested.clear();
            }
        } else {
            harvested = (0..pending).map(|index| saved(format!("pending{index}"))).collect::<Result<_>>()?;
            if filled {
                buffered = (0..=points).map(|index| saved(format!("buffer/column{index}"))).collect::<Result<_>>()?;
            }
        }
        self.harvest.contexts.seek(state.get("place")?)?;
        self.harvest.context = state.get("context")?;
        self.harvest.starts = state.get("starts")?;
        self.harvest.ended = state.get("ended")?;
        self.harvest.pending = harvested;
        self.buffer = None;
        if let (true, Some(capacity)) = (filled, self.capacity) {
            let mut buffer =
                Buffer::new(&self.harvest.columns(), capacity, device, rng(self.cx.seed, LanguageModelConfig::NAME));
            buffer.restore(&state.under("buffer"), &buffered)?;
            self.buffer = Some(buffer);
        }
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        let left_out = self.harvest.left_out.as_ref();
        let left_out =
            left_out.map(|(count, why)| format!("warning: {count} activations were skipped, the first: {why}"));
        self.harvest.contexts.note().into_iter().chain(left_out).collect()
    }
}

impl ModelSource for LanguageModelSource {
    fn token_texts(&self, ids: &[i64]) -> Result<Vec<String>> {
        contexts::token_texts(&self.files, ids)
    }

    fn model(&self) -> &dyn LanguageModel {
        &*self.harvest.model
    }

    fn reads(&self, site: usize) -> &Part {
        &self.sites[site].reads
    }

    fn writes(&self, site: usize) -> &Part {
        &self.sites[site].writes
    }

    fn context_length(&self) -> i64 {
        self.context_length
    }

    fn next_tokens(&mut self, rows: i64) -> Result<Option<Tokens>> {
        let (rows, _) = self.harvest.next_rows(rows as usize)?;
        Ok((!rows.is_empty()).then(|| Contexts::batch(&rows.iter().collect::<Vec<_>>(), self.harvest.model.device())))
    }
}
