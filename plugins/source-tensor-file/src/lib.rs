//! Activations from files: .safetensors (mapped, never loaded whole), .npy and .npz.
//!
//! A pass serves every row once. With `shuffle: true` each pass has its own random order; with `shuffle: false` rows
//! come in file order. The last partial batch of a pass is dropped. Training repeats passes as often as it needs.
//!
//! With `held_out: 0.1` training never reads a tenth of the rows. Metrics read only these rows, including the last
//! partial batch.

use std::path::{Path, PathBuf};

use dictlearn_core::files::numpy;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::machine::rng::{Rng, rng};
use dictlearn_core::prelude::*;
use rand::seq::SliceRandom;

/// Activations from .safetensors, .npy and .npz files.
#[component(source "tensor_file", summary = "Activations from .safetensors, .npy and .npz files",
    example = "{type: tensor_file, path: activations.safetensors, batch_size: 64}")]
pub struct TensorFileConfig {
    /// A file, or a glob of files to concatenate.
    pub path: ConfigPath,
    /// Name of the tensor [N, d] in a .safetensors or .npz file.
    #[default("activations")]
    pub tensor: String,
    /// Name of the tensor [N, d_out] to reconstruct, for dictionaries whose target differs from their input.
    pub target_tensor: Option<String>,
    /// Activations per training batch.
    #[default(2048)]
    #[schemars(range(min = 1))]
    pub batch_size: u64,
    /// Draw a new random order of the rows for each pass. `false` serves them in file order.
    #[default(true)]
    pub shuffle: bool,
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

impl SourceConfig for TensorFileConfig {
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        let inputs = Rows::open(self.path.as_path(), &self.tensor, "tensor")?;
        if u32::try_from(inputs.count).is_err() {
            bail!(
                InputError::new(format!(
                    "{} has {} rows, more than the supported {}",
                    self.path,
                    inputs.count,
                    u32::MAX
                ))
                .field("path")
                .help("split it, or write it as an `activation_cache`")
            );
        }
        let targets = self.target_tensor.as_ref();
        let targets = targets.map(|name| Rows::open(self.path.as_path(), name, "target_tensor")).transpose()?;
        if let Some(targets) = targets.as_ref().filter(|targets| targets.count != inputs.count) {
            bail!(
                InputError::new(format!(
                    "{}: tensor `{}` has {} rows, but `{}` has {}",
                    self.path, self.tensor, inputs.count, targets.name, targets.count
                ))
                .field("target_tensor")
                .help("give a target for each activation: row i of one tensor belongs to row i of the other")
            );
        }
        let part: Option<Vec<u32>> = match self.held_out() {
            None => None,
            Some(held_out) => {
                held_out.check(inputs.count as u64, cx.purpose)?;
                let rows = held_out.wanted(0..inputs.count as u64, cx.purpose).into_iter().flatten();
                Some(rows.map(|row| row as u32).collect())
            }
        };
        let count = part.as_ref().map_or(inputs.count, Vec::len);
        let batch_size = self.batch_size as usize;
        let evaluates_part = part.is_some() && cx.purpose == Purpose::Evaluation;
        if count < batch_size && !evaluates_part {
            let of = if part.is_some() { " to train on" } else { "" };
            bail!(
                InputError::new(format!(
                    "{} has {count} activations{of}, fewer than one batch of {batch_size}",
                    self.path
                ))
                .field("batch_size")
                .help("lower `batch_size`")
            );
        }
        let mut source = TensorFileSource {
            config: serde_json::to_value(self)?,
            order: Vec::new(),
            shuffle: self.shuffle,
            rng: rng(cx.seed, Self::NAME),
            rng_at_pass: rng(cx.seed, Self::NAME),
            inputs,
            targets,
            part,
            count,
            evaluates_part,
            batch_size,
            position: 0,
            device: cx.device,
            gives_all: cx.on_nonfinite == OnNonfinite::SkipBatch,
            last: Vec::new(),
        };
        source.begin_pass();
        Ok(Box::new(source))
    }

    fn held_out(&self) -> Option<HeldOut> {
        HeldOut::new(self.held_out, self.held_out_seed)
    }
}

/// Lists the files of a path or glob.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let pattern = path.to_string_lossy();
    let paths: Vec<PathBuf> = if path.exists() {
        vec![path.to_owned()]
    } else {
        let found = glob::glob(&pattern).map_err(|error| {
            InputError::new(format!("`{pattern}` is neither a path nor a glob: {error}")).field("path")
        })?;
        found.filter_map(Result::ok).collect()
    };
    if paths.is_empty() {
        bail!(InputError::no_file(path).field("path"));
    }
    Ok(paths)
}

/// The rows of one tensor, concatenated over all files.
struct Rows {
    name: String,
    parts: Vec<(PathBuf, usize, Part)>,
    count: usize,
    width: i64,
}

/// One file's rows.
enum Part {
    File(TensorFile),
    Memory(Tensor),
}

impl Rows {
    /// Opens the tensor `name` of all files; `field` is the config's field with that name.
    fn open(path: &Path, name: &str, field: &str) -> Result<Self> {
        let paths = files(path)?;
        let mut rows = Rows { name: name.to_owned(), parts: Vec::new(), count: 0, width: 0 };
        for path in paths {
            let part = Part::open(&path, name).under("path")?;
            let (count, width) = part.size(&path, name).under(field)?;
            if !rows.parts.is_empty() && width != rows.width {
                bail!(
                    InputError::new(format!(
                        "{} has activations of width {width}, but {} of width {}",
                        path.display(),
                        rows.parts[0].0.display(),
                        rows.width
                    ))
                    .field("path")
                    .help("all files of a source must have the same width")
                );
            }
            rows.width = width;
            rows.count += count;
            rows.parts.push((path, count, part));
        }
        Ok(rows)
    }

    /// Returns the rows `wanted`, numbered across all files, as float32 [n, d].
    fn take(&self, wanted: &[usize]) -> Result<Tensor> {
        // Read each run of rows from the same file at once, in the given order.
        let mut pieces = Vec::new();
        let mut rest = wanted;
        while let Some(first) = rest.first() {
            let (start, (_, count, part)) =
                self.file_of(*first).ok_or_else(|| anyhow::anyhow!("row {first} of {}", self.count))?;
            let inside = |row: &usize| (start..start + count).contains(row);
            let length = rest.iter().take_while(|row| inside(row)).count();
            let local = rest[..length].iter().map(|row| row - start);
            pieces.push(match part {
                Part::File(file) => file.rows(&self.name, local)?.to_kind(Kind::Float),
                Part::Memory(tensor) => {
                    let indices: Vec<i64> = local.map(|row| row as i64).collect();
                    tensor.index_select(0, &Tensor::from_slice(&indices)).to_kind(Kind::Float)
                }
            });
            rest = &rest[length..];
        }
        Ok(if pieces.len() == 1 { pieces.remove(0) } else { Tensor::cat(&pieces, 0) })
    }

    /// Returns the file of a row, and the number of that file's first row.
    fn file_of(&self, row: usize) -> Option<(usize, &(PathBuf, usize, Part))> {
        let mut start = 0;
        let found = self.parts.iter().find(|(_, count, _)| {
            let here = row < start + count;
            start += if here { 0 } else { *count };
            here
        });
        found.map(|part| (start, part))
    }

    /// Returns an error if a value of these rows is not finite.
    fn check(&self, values: &Tensor, rows: &[usize]) -> Result<()> {
        if bool::try_from(values.isfinite().all())? {
            return Ok(());
        }
        let bad = values.isfinite().all_dim(1, false).logical_not().nonzero().int64_value(&[0, 0]);
        bail!(
            InputError::new(format!("{} has a value that is not finite", self.origin(rows[bad as usize])))
                .help("repair or remove the row, or set `on_nonfinite: skip_batch`")
        );
    }

    fn origin(&self, row: usize) -> String {
        let place = self.file_of(row).map(|(start, (path, _, _))| (path.display().to_string(), row - start));
        let (file, row) = place.unwrap_or_default();
        format!("{file}: row {row} of tensor `{}`", self.name)
    }
}

impl Part {
    fn open(path: &Path, name: &str) -> Result<Self> {
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        match extension {
            "safetensors" => Ok(Part::File(TensorFile::open(path)?)),
            "npy" => Ok(Part::Memory(numpy::read_npy(path)?)),
            "npz" => Ok(Part::Memory(numpy::Npz::open(path)?.array(name)?)),
            other => bail!(
                InputError::new(format!("{}: files of type `{other}` are not supported", path.display()))
                    .help("give a .safetensors, .npy or .npz file")
            ),
        }
    }

    fn size(&self, path: &Path, name: &str) -> Result<(usize, i64)> {
        let size = match self {
            Part::Memory(tensor) => tensor.size(),
            Part::File(file) => match file.shape(name) {
                Some(shape) => shape,
                None => file.tensor(name)?.size(),
            },
        };
        match size[..] {
            [count, width] if width > 0 => Ok((count as usize, width)),
            _ => bail!(InputError::new(format!(
                "{}: tensor `{name}` has shape {size:?}, which is not [activations, width]",
                path.display()
            ))),
        }
    }
}

struct TensorFileSource {
    config: Value,
    inputs: Rows,
    targets: Option<Rows>,
    /// The rows to serve; `None` for all rows.
    part: Option<Vec<u32>>,
    /// Number of rows in a pass, including those of a dropped partial batch.
    count: usize,
    /// Serves the held-out rows, including the last partial batch.
    evaluates_part: bool,
    batch_size: usize,
    shuffle: bool,
    /// The rows in the order of this pass; empty for all rows in file order.
    order: Vec<u32>,
    rng: Rng,
    /// The generator before it drew `order`: a checkpoint saves it instead of the order.
    rng_at_pass: Rng,
    /// Rows already served in this pass.
    position: usize,
    device: Device,
    /// Serves batches with non-finite values, which the run then skips.
    gives_all: bool,
    /// The rows of the last batch.
    last: Vec<usize>,
}

impl TensorFileSource {
    fn begin_pass(&mut self) {
        self.position = 0;
        self.rng_at_pass = self.rng.clone();
        self.order.clear();
        match &self.part {
            Some(part) => self.order.extend(part),
            None if self.shuffle => self.order.extend(0..self.inputs.count as u32),
            None => {}
        }
        if self.shuffle {
            self.order.shuffle(&mut self.rng);
        }
    }
}

impl ActivationSource for TensorFileSource {
    fn sites(&self) -> Vec<Site> {
        let output_dim = self.targets.as_ref().map_or(self.inputs.width, |targets| targets.width);
        vec![Site::new(&self.inputs.name, (self.inputs.width, output_dim))]
    }

    fn next_batch(&mut self) -> Result<Option<Activations>> {
        let mut end = self.position + self.batch_size;
        if self.evaluates_part {
            end = end.min(self.count);
        }
        if end > self.count || end == self.position {
            return Ok(None);
        }
        let rows: Vec<usize> = match self.order.get(self.position..end) {
            Some(order) => order.iter().map(|row| *row as usize).collect(),
            None => (self.position..end).collect(),
        };
        self.position = end;
        let take = |from: &Rows| -> Result<Tensor> {
            let values = from.take(&rows)?;
            if !self.gives_all {
                from.check(&values, &rows)?;
            }
            Ok(values.to_device(self.device))
        };
        let x = take(&self.inputs)?;
        let batch = match &self.targets {
            Some(targets) => Batch { x, target: take(targets)? },
            None => Batch::of(x),
        };
        self.last = rows;
        Ok(Some(batch.into()))
    }

    fn origin(&self, row: i64) -> Option<String> {
        self.last.get(row as usize).map(|row| self.inputs.origin(*row))
    }

    fn rewind(&mut self) -> Result<()> {
        self.begin_pass();
        Ok(())
    }

    fn mean_squared_norms(&mut self) -> Result<Vec<f64>> {
        dictlearn_core::data::sampled_mean_squared_norms(self)
    }

    fn memory(&self) -> Vec<MemoryNeed> {
        let in_memory = |(_, _, part): &(PathBuf, usize, Part)| match part {
            Part::File(_) => 0,
            Part::Memory(tensor) => (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64,
        };
        let rows = [Some(&self.inputs), self.targets.as_ref()];
        let bytes = rows.into_iter().flatten().flat_map(|rows| &rows.parts).map(in_memory).sum();
        vec![MemoryNeed::lasting("activations of .npy and .npz files", bytes, "them to .safetensors").on_host()]
    }

    fn batch_size(&self) -> Option<i64> {
        Some(self.batch_size as i64)
    }

    fn describe(&self) -> Value {
        let mut described = self.config.clone();
        described["d_submodule"] = self.inputs.width.into();
        described["out_batch_size"] = self.batch_size.into();
        described
    }

    fn overlap(&self, trained: &Value) -> Option<String> {
        let path = |config: &Value| config["path"].as_str().map(PathBuf::from);
        let of = |path: PathBuf| -> std::collections::BTreeSet<PathBuf> {
            let files = files(&path).unwrap_or_default().into_iter();
            files.map(|file| file.canonicalize().unwrap_or(file)).collect()
        };
        let (own, others) = (of(path(&self.config)?), of(path(trained)?));
        let shared = own.intersection(&others).next()?;
        let parted = ["held_out", "held_out_seed"].iter().all(|key| self.config[key] == trained[key]);
        if self.evaluates_part && own == others && parted {
            return None;
        }
        let file = shared.file_name().unwrap_or_default().to_string_lossy();
        Some(match self.config["held_out"].as_f64().filter(|part| *part > 0.0) {
            Some(_) => format!("rows of {file}: training used another `held_out`, `held_out_seed` or `path`"),
            None => format!("rows of {file}: set `held_out: 0.1` in `source` to hold rows out of training"),
        })
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.put("position", self.position)?;
        state.put("rows", self.inputs.count)?;
        state.put("rng_at_pass", &self.rng_at_pass)?;
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        let rows: usize = state.get("rows")?;
        if rows != self.inputs.count {
            bail!(
                InputError::new(format!(
                    "{} has {} activations, but had {rows} when the run started",
                    self.config["path"].as_str().unwrap_or_default(),
                    self.inputs.count
                ))
                .field("path")
                .help("restore the original files, or start a new run in another `--output-dir`")
            );
        }
        self.rng = state.get("rng_at_pass")?;
        self.begin_pass();
        self.position = state.get("position")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &tempfile::TempDir, shuffle: bool) -> TensorFileConfig {
        TensorFileConfig {
            path: dir.path().join("*.safetensors").into(),
            tensor: "activations".to_owned(),
            target_tensor: None,
            batch_size: 4,
            shuffle,
            held_out: 0.0,
            held_out_seed: 0,
        }
    }

    fn source(shuffle: bool) -> (tempfile::TempDir, Box<dyn ActivationSource>) {
        let dir = tempfile::tempdir().unwrap();
        for (part, start) in [("a", 0), ("b", 7)] {
            let rows = Tensor::arange_start(start * 2, start * 2 + 14, (Kind::Float, Device::Cpu)).reshape([7, 2]);
            let path = dir.path().join(format!("{part}.safetensors"));
            dictlearn_core::files::tensors::write(&path, &[("activations", rows)]).unwrap();
        }
        let cx = SourceCx { seed: 1, ..SourceCx::default() };
        let source = config(&dir, shuffle).build(&cx).unwrap();
        (dir, source)
    }

    fn pass(source: &mut dyn ActivationSource) -> Vec<f32> {
        let mut rows = Vec::new();
        while let Some(activations) = source.next_batch().unwrap() {
            rows.extend(Vec::<f32>::try_from(activations.sites[0].x.select(1, 0)).unwrap());
        }
        rows
    }

    #[test]
    fn without_shuffle_rows_come_in_file_order_without_the_partial_batch() {
        let (_dir, mut source) = source(false);
        // 14 rows in batches of 4 make three batches; the second spans both files.
        let expected: Vec<f32> = (0..12).map(|row| row as f32 * 2.0).collect();
        assert_eq!(pass(&mut *source), expected);
        source.rewind().unwrap();
        assert_eq!(pass(&mut *source), expected);
    }

    #[test]
    fn each_pass_has_a_new_order_that_restore_continues() {
        let (_dir, mut source) = source(true);
        let first = pass(&mut *source);
        source.rewind().unwrap();
        source.next_batch().unwrap();
        let state = source.state().unwrap();
        let rest = pass(&mut *source);
        source.restore(&state).unwrap();
        assert_eq!(pass(&mut *source), rest);
        assert_ne!(first[4..], rest);
        let mut sorted = first.clone();
        sorted.sort_by(f32::total_cmp);
        sorted.dedup();
        assert_eq!(sorted.len(), 12);
    }

    #[test]
    fn held_out_rows_are_evaluated_and_never_trained_on() {
        let (dir, _) = source(false);
        let open = |shuffle, purpose, seed, held_out_seed| {
            let config = TensorFileConfig { batch_size: 2, held_out: 0.25, held_out_seed, ..config(&dir, shuffle) };
            config.build(&SourceCx { seed, purpose, ..SourceCx::default() }).unwrap()
        };
        // One of every four rows: three of the first 12, and perhaps one of the last two.
        let held = pass(&mut *open(false, Purpose::Evaluation, 1, 0));
        assert!((3..=4).contains(&held.len()), "{held:?}");
        for shuffle in [false, true] {
            let mut trained = open(shuffle, Purpose::Training, 1, 0);
            for _ in 0..3 {
                let rows = pass(&mut *trained);
                assert_eq!(rows.len(), 10);
                assert!(rows.iter().all(|row| !held.contains(row)), "{rows:?} {held:?}");
                trained.rewind().unwrap();
            }
        }
        // `held_out_seed` decides which rows are held out; the run's seed does not.
        let sorted = |mut rows: Vec<f32>| {
            rows.sort_by(f32::total_cmp);
            rows
        };
        assert_eq!(sorted(pass(&mut *open(true, Purpose::Evaluation, 2, 0))), held);
        assert!((1..5).any(|seed| pass(&mut *open(false, Purpose::Evaluation, 1, seed)) != held));
        // A resumed source continues with the same rows.
        let mut one = open(true, Purpose::Training, 1, 0);
        one.next_batch().unwrap();
        let state = one.state().unwrap();
        let rest = pass(&mut *one);
        let mut other = open(true, Purpose::Training, 1, 0);
        other.restore(&state).unwrap();
        assert_eq!(pass(&mut *other), rest);
    }

    #[test]
    fn an_overlap_with_training_rows_is_reported() {
        let (dir, all) = source(false);
        let described = |file: &str, held_out: f64| {
            let config = TensorFileConfig {
                path: dir.path().join(file).into(),
                tensor: "activations".to_owned(),
                target_tensor: None,
                batch_size: 2,
                shuffle: true,
                held_out,
                held_out_seed: 0,
            };
            let measured = config.build(&SourceCx { purpose: Purpose::Evaluation, ..SourceCx::default() }).unwrap();
            (measured.describe(), measured)
        };
        assert!(all.overlap(&all.describe()).unwrap().contains("a.safetensors"));
        assert!(all.overlap(&described("b.safetensors", 0.0).0).unwrap().contains("b.safetensors"));
        let (trained, measured) = described("*.safetensors", 0.25);
        assert_eq!(measured.overlap(&trained), None);
        assert!(all.overlap(&trained).is_some() && measured.overlap(&all.describe()).is_some());
        let (_, other) = described("a.safetensors", 0.0);
        assert_eq!(other.overlap(&described("b.safetensors", 0.0).0), None);
        assert_eq!(other.overlap(&serde_json::json!({"model": "gpt2"})), None);
    }
}
