//! Formats: dictionaries that others published, read; ours, written for others.
//!
//! A format is a component of its own: it says which files make an SAE, and turns them into one of the registered
//! classes, exactly, or refuses by name what it cannot. Where the files lie, a folder here or a repository of the Hub, is
//! no concern of it.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value, json};
use tch::{Device, Tensor};

use crate::adapted::Normalization;
use crate::component::TaggedFormat;
use crate::config::{InputError, from_yaml, printable};
use crate::device::Precision;
use crate::dictionary::Dictionary;
use crate::hub::{Repo, RepoKind, hub};
use crate::registry::{self, Kind, nearest};
use crate::saved::{self, Saved};
use crate::tensors::{self, write_file};
use crate::text::{self, Wanted};

/// A format of dictionaries on disk.
pub trait Format: Debug + Send + Sync {
    /// The SAEs that a request means, at least one; none of them is read yet.
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        Ok(vec![Place::parse(request.named()?)?])
    }

    /// Reads the SAE at a place.
    fn read(&self, place: &Place) -> Result<Published>;

    /// What can be had by name, for `--list`: names that [`Format::find`] takes, and a word on each.
    fn offers(&self, request: &Request) -> Result<Vec<(String, String)>> {
        let _ = request;
        bail!(
            InputError::new("this format has no table of what was published")
                .help("name the folder or the Hub repository that you know of")
        )
    }

    /// Writes an SAE into a folder, which is there and empty, as the format's own readers take it.
    fn write(&self, sae: &Saved, dir: &Path) -> Result<()> {
        let _ = (sae, dir);
        let able: Vec<&str> = writers();
        bail!(
            InputError::new("this format can be imported, and not exported")
                .help(format!("those that can be: {}", able.join(", ")))
        )
    }

    /// Whether [`Format::write`] can write anything.
    fn writes(&self) -> bool {
        false
    }

    /// Files that an SAE of this format has, any of them and no other format's: for a hint where another format was asked.
    fn marks(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether a folder here holds an SAE of this format, for the card of one that is uploaded.
    fn is_in(&self, dir: &Path) -> bool {
        let _ = dir;
        false
    }

    /// Python that loads the SAE in such a folder with the same features, where the format's library does; the variable
    /// `folder` is where it lies. `sae` is the SAE as we read it, if we do.
    fn python(&self, sae: Option<&Saved>) -> Option<Python> {
        let _ = sae;
        None
    }
}

/// Python that loads an SAE: [`Format::python`].
#[derive(Debug, Clone, Copy)]
pub struct Python {
    /// The library, as a link in Markdown.
    pub library: &'static str,
    /// What is imported of it: a line.
    pub import: &'static str,
    /// What loads the SAE in `folder`: a line.
    pub load: &'static str,
}

/// The names of the formats that can be exported to.
pub fn writers() -> Vec<&'static str> {
    registry::names(Kind::Format).into_iter().filter(|name| named(name).is_ok_and(|format| format.writes())).collect()
}

/// The format of that name.
pub fn named(name: &str) -> Result<Box<dyn TaggedFormat>> {
    let known = registry::names(Kind::Format);
    if !known.contains(&name) {
        let near = nearest(name, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
        bail!(InputError::new(format!("unknown format `{name}`")).help(format!(
            "{}known: {}",
            near.unwrap_or_default(),
            known.join(", ")
        )));
    }
    Ok(from_yaml(&format!("{{type: {name}}}"))?)
}

/// What a user asks a format for.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// A folder, a file, `owner/name/path` on the Hub, or a name that the format knows.
    pub place: Option<String>,
    /// A name, or a glob of names, in the format's own set of published SAEs.
    pub pretrained: Option<String>,
    /// The file of sae_lens's table of releases.
    pub releases: Option<String>,
}

impl Request {
    /// The place, which most formats need.
    pub fn named(&self) -> Result<&str> {
        match (&self.place, &self.pretrained) {
            (Some(place), None) => Ok(place),
            (_, Some(_)) => bail!(
                InputError::new("this format has no set of published SAEs for `--pretrained`")
                    .help("name the folder or the Hub repository that you know of")
            ),
            (None, None) => bail!(
                InputError::new("nothing is named that could be imported")
                    .help("give a folder, or `owner/name/path` of a repository on the Hub")
            ),
        }
    }
}

/// Where an SAE's files lie: in a folder here, or in a repository of the Hub, below some path.
#[derive(Debug, Clone)]
pub struct Place {
    /// What to call the SAE: its path, or the name by which it was asked for.
    pub name: String,
    root: Root,
    /// Below the root, of parts joined by `/`; empty for the root itself.
    path: String,
    /// What a table of releases says of it beside that.
    pub table: Map<String, Value>,
    /// The format whose files they are, where a table names another than the one that was asked.
    pub format: Option<String>,
}

#[derive(Debug, Clone)]
enum Root {
    Folder(PathBuf),
    Hub(Repo),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.path.is_empty() { "" } else { "/" };
        match &self.root {
            Root::Folder(folder) if self.path.is_empty() => write!(f, "{}", folder.display()),
            Root::Folder(folder) => write!(f, "{}", folder.join(&self.path).display()),
            Root::Hub(repo) => write!(f, "{repo}{slash}{}", self.path),
        }
    }
}

impl Place {
    /// A folder or file that is there, or `owner/name[@revision][/path]` on the Hub.
    pub fn parse(text: &str) -> Result<Self> {
        let local = Path::new(text);
        if local.exists() {
            return Place::local(local);
        }
        let parts: Vec<&str> = text.split('/').collect();
        // Who names a folder that is there means what is in it.
        if parts.len() > 1 && !parts[0].is_empty() && Path::new(parts[0]).is_dir() || text.starts_with('/') {
            bail!(InputError::new(format!("there is no {text}")).help("look at the path"));
        }
        if !local.is_absolute()
            && parts.len() >= 2
            && !parts.iter().any(|part| ["", ".", ".."].contains(part))
            && let Some(repo) = Repo::parse(RepoKind::Model, &parts[..2].join("/"))
        {
            return Ok(Place::on_hub(repo, &parts[2..].join("/")));
        }
        bail!(
            InputError::new(format!("`{text}` is no folder here, and cannot be a repository of the Hub"))
                .help("give a folder, or `owner/name[@revision]/path` of a repository on the Hub")
        )
    }

    /// A folder or file here.
    pub fn local(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path)?;
        let last = || path.file_name().map(|name| name.to_string_lossy().into_owned());
        let new = |root: &Path, inner: String, name: String| Place {
            name,
            root: Root::Folder(root.to_owned()),
            path: inner,
            table: Map::new(),
            format: None,
        };
        if path.is_dir() {
            return Ok(new(&path, String::new(), last().unwrap_or_else(|| "sae".to_owned())));
        }
        let (Some(folder), Some(file)) = (path.parent(), last()) else {
            bail!(InputError::no_file(&path));
        };
        Ok(new(folder, file.clone(), file))
    }

    /// A path in a repository; empty for the repository itself.
    pub fn on_hub(repo: Repo, path: &str) -> Self {
        let name = if path.is_empty() { repo.id.clone() } else { format!("{}/{path}", repo.id) };
        Place { name, root: Root::Hub(repo), path: path.to_owned(), table: Map::new(), format: None }
    }

    /// A place further below.
    pub fn below(&self, path: &str) -> Self {
        let path = if self.path.is_empty() { path.to_owned() } else { format!("{}/{path}", self.path) };
        let name = match &self.root {
            Root::Hub(repo) => format!("{}/{path}", repo.id),
            Root::Folder(_) => path.clone(),
        };
        Place { name, root: self.root.clone(), path, ..self.clone() }
    }

    /// The place that this one lies in; none for a root.
    pub fn above(&self) -> Option<Self> {
        if self.path.is_empty() {
            let Root::Folder(folder) = &self.root else { return None };
            return folder.parent().and_then(|folder| Place::local(folder).ok());
        }
        let path = self.path.rsplit_once('/').map_or("", |(above, _)| above).to_owned();
        Some(Place { path, ..self.clone() })
    }

    /// The repository, if it is on the Hub.
    pub fn repo(&self) -> Option<&Repo> {
        match &self.root {
            Root::Hub(repo) => Some(repo),
            Root::Folder(_) => None,
        }
    }

    /// Everything that its path says, from the repository's name or the file system's root down: formats read layers and
    /// widths from it.
    pub fn words(&self) -> String {
        match &self.root {
            Root::Hub(repo) => format!("{}/{}", repo.id, self.path),
            Root::Folder(folder) => format!("{}/{}", folder.display(), self.path),
        }
    }

    /// A file below it (or the place itself, if `name` is empty), fetched if need be; `None` where there is none.
    pub fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        let path = [self.path.as_str(), name].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
        match &self.root {
            // Who names one of an SAE's files means the others beside it.
            Root::Folder(folder) if !name.is_empty() && folder.join(&self.path).is_file() => {
                let beside = folder.join(&self.path).with_file_name(name);
                Ok(Some(beside).filter(|path| path.is_file()))
            }
            Root::Folder(folder) => Ok(Some(folder.join(path)).filter(|path| path.is_file())),
            Root::Hub(repo) => hub()?.file(repo, &path),
        }
    }

    /// A file below it that must be there.
    pub fn need(&self, name: &str) -> Result<PathBuf> {
        if let Some(file) = self.file(name)? {
            return Ok(file);
        }
        let files = self.files().unwrap_or_default();
        let mut folders: Vec<&str> = files.iter().filter_map(|file| file.strip_suffix(&format!("/{name}"))).collect();
        folders.sort_by_key(|folder| folder.len());
        let error = InputError::new(format!("{self} has no {name}"));
        bail!(if folders.is_empty() {
            let shown: Vec<&str> = files.iter().take(8).map(String::as_str).collect();
            error.help(match shown.is_empty() {
                true => "there is nothing; look at the name".to_owned(),
                false => format!("there are: {}{}", shown.join(", "), if files.len() > 8 { ", ..." } else { "" }),
            })
        } else {
            let more = if folders.len() > 12 { ", ..." } else { "" };
            folders.truncate(12);
            error.help(format!("name one of its folders that have one: {}{more}", folders.join(", ")))
        })
    }

    /// A JSON file below it that must be there.
    pub fn json(&self, name: &str) -> Result<Value> {
        saved::read_json(&self.need(name)?)
    }

    /// The files below it, by their paths from it, sorted.
    pub fn files(&self) -> Result<Vec<String>> {
        let prefix = if self.path.is_empty() { String::new() } else { format!("{}/", self.path) };
        match &self.root {
            Root::Hub(repo) => {
                let files = hub()?.list(repo)?;
                Ok(files.iter().filter_map(|file| file.strip_prefix(&prefix)).map(str::to_owned).collect())
            }
            Root::Folder(folder) => {
                let mut found = Vec::new();
                collect(&folder.join(&self.path), "", 0, &mut found);
                found.sort();
                Ok(found)
            }
        }
    }
}

/// Files of a folder and of those in it.
fn collect(folder: &Path, prefix: &str, depth: usize, found: &mut Vec<String>) {
    /// Published sets have layer, width and sparsity at most, and no user wants his home searched.
    const DEEPEST: usize = 6;
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => {
                if depth < DEEPEST && !name.starts_with('.') {
                    collect(&entry.path(), &format!("{prefix}{name}/"), depth + 1, found);
                }
            }
            _ => found.push(format!("{prefix}{name}")),
        }
    }
}

/// A place in a language model that a published SAE reads.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelSite {
    /// The model's repository on the Hub.
    pub model: String,
    /// A TransformerLens name or a module path.
    pub submodule: String,
    /// `in` or `out`, where the name leaves it open.
    pub io: Option<&'static str>,
    /// For transcoders: the place whose value is predicted.
    pub target: Option<String>,
    /// For an SAE on one attention head: its number.
    pub head: Option<i64>,
    /// Whether each context begins with the BOS token.
    pub prepend_bos: Option<bool>,
    /// Tokens in a context.
    pub ctx_len: Option<i64>,
    /// The dataset's repository on the Hub.
    pub dataset: Option<String>,
    /// Whether the mean over dimensions is taken off each activation, as TransformerLens does.
    pub center: bool,
}

impl ModelSite {
    /// Takes a module path with the value's end, `model.layers.3.output`, as some formats write it.
    pub fn at(&mut self, hook: &str) {
        (self.submodule, self.io) = match hook.rsplit_once('.') {
            Some((module, "input")) => (module.to_owned(), Some("in")),
            Some((module, "output")) => (module.to_owned(), Some("out")),
            _ => (hook.to_owned(), None),
        };
    }

    /// What config.json says of it under `buffer`.
    fn buffer(&self) -> Value {
        let mut buffer = Map::new();
        let mut add = |name: &str, value: Value| {
            if !value.is_null() {
                buffer.insert(name.to_owned(), value);
            }
        };
        add("model", self.model.as_str().into());
        add("submodule", self.submodule.as_str().into());
        add("io", self.io.into());
        add("target", self.target.as_deref().into());
        add("head", self.head.into());
        add("site", self.head.map(|head| format!("{}.head{head}", self.submodule)).into());
        add("ctx_len", self.ctx_len.into());
        add("prepend_bos", self.prepend_bos.into());
        add("center", if self.center { true.into() } else { Value::Null });
        let dataset = self.dataset.as_deref().and_then(|dataset| text::written(Wanted::Dataset(dataset)));
        add("text", dataset.unwrap_or(Value::Null));
        Value::Object(buffer)
    }

    /// The text that it is to be read on: its own dataset, or what there is.
    fn text(&self) -> Value {
        let own = self.dataset.as_deref().and_then(|dataset| text::written(Wanted::Dataset(dataset)));
        own.or_else(|| text::written(Wanted::Bundled)).unwrap_or(Value::Null)
    }

    /// The number of the layer, if the name has one.
    fn layer(&self) -> Option<u64> {
        self.submodule.split('.').find_map(|part| part.parse().ok())
    }
}

/// How a place in a model is written as the `source` of a config. Submitted by the plugin that has the source.
pub struct WrittenSource {
    /// The config of a source that gives the place's activations on a text.
    pub config: fn(&ModelSite, Value) -> Value,
}

inventory::collect!(WrittenSource);

/// A published SAE, read.
#[derive(Debug, Default)]
pub struct Published {
    /// Which of the registered classes it is: `JumpReluAutoEncoder`.
    pub class: String,
    /// The class's tensors.
    pub tensors: BTreeMap<String, Tensor>,
    /// What is done to an activation before all that.
    pub normalization: Option<Normalization>,
    /// `bfloat16` or `float16`, where its publishers compute in these.
    pub dtype: Option<&'static str>,
    /// Where it reads, as far as that is known.
    pub site: Option<ModelSite>,
    /// What else config.json is to say under `trainer`.
    pub trainer: Map<String, Value>,
    /// log10 of how often each feature fires, `[F]`, where it was published.
    pub sparsity: Option<Tensor>,
    /// What biases and thresholds are still to be multiplied with, in backups of a training on scaled activations.
    pub scale: Option<f64>,
    /// Whether it is a file of the reference's, to which its `from_pretrained` does what it does.
    pub pretrained: bool,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// An SAE as most formats have it: x̂ = σ((x [− b_dec]) W_enc + b_enc) W_dec + b_dec.
#[derive(Debug)]
pub struct Affine {
    /// [d, F].
    pub w_enc: Tensor,
    /// `[F]`.
    pub b_enc: Tensor,
    /// [F, d_out].
    pub w_dec: Tensor,
    /// `[d_out]`.
    pub b_dec: Tensor,
    /// [d_out, d], of a skip connection.
    pub w_skip: Option<Tensor>,
    /// Whether b_dec is subtracted from an activation first.
    pub subtract_b_dec: bool,
    /// Whether it predicts something else than it reads.
    pub transcodes: bool,
    /// σ.
    pub activation: Activation,
}

/// How pre-activations become features.
#[derive(Debug)]
pub enum Activation {
    /// The positive ones.
    Relu,
    /// The k largest of the positive ones.
    TopK(i64),
    /// Those above a threshold, `[F]`, and above 0.
    Jump(Tensor),
}

/// The shape of a tensor that must have N dimensions.
fn shape<const N: usize>(name: &str, tensor: &Tensor) -> Result<[i64; N]> {
    let size = tensor.size();
    let wrong = || InputError::new(format!("`{name}` has shape {size:?}, which does not have {N} dimensions"));
    let shape: [i64; N] = size.as_slice().try_into().map_err(|_| wrong())?;
    if shape.contains(&0) {
        bail!(InputError::new(format!("`{name}` has shape {size:?}: there is nothing in it")));
    }
    Ok(shape)
}

impl Affine {
    /// Checks that the tensors fit each other; gives d, F, d_out.
    pub fn check(&self) -> Result<(i64, i64, i64)> {
        let [d, features] = shape("W_enc", &self.w_enc)?;
        let [rows, d_out] = shape("W_dec", &self.w_dec)?;
        let fits =
            |name: &str, tensor: &Tensor, wanted: &[i64]| -> Result<()> {
                if tensor.size() != wanted {
                    bail!(
                        InputError::new(format!("`{name}` has shape {:?}, not {wanted:?}", tensor.size()))
                            .help(format!("with W_enc {:?} and W_dec {:?}", self.w_enc.size(), self.w_dec.size()))
                    );
                }
                Ok(())
            };
        if rows != features {
            bail!(
                InputError::new(format!("W_enc has {features} features and W_dec has {rows}"))
                    .help("W_enc is [d, F], W_dec [F, d]")
            );
        }
        fits("b_enc", &self.b_enc, &[features])?;
        fits("b_dec", &self.b_dec, &[d_out])?;
        if let Some(w_skip) = &self.w_skip {
            fits("W_skip", w_skip, &[d_out, d])?;
        }
        match &self.activation {
            Activation::Jump(threshold) => fits("threshold", threshold, &[features])?,
            Activation::TopK(k) if !(1..=features).contains(k) => {
                bail!(InputError::new(format!("`k` is {k}, and there are {features} features")))
            }
            _ => {}
        }
        if !self.transcodes && d != d_out {
            bail!(
                InputError::new(format!("it reads activations of width {d} and reconstructs width {d_out}"))
                    .help("only a transcoder does, and this is not said to be one")
            );
        }
        if self.transcodes && self.subtract_b_dec && d != d_out {
            bail!(InputError::new("b_dec cannot be subtracted from activations of another width"));
        }
        Ok((d, features, d_out))
    }

    /// The class that does exactly this, and its tensors, in float32: what a class has in its input is moved from or to the
    /// encoder's bias, where it is elsewhere here.
    pub fn into_class(mut self) -> Result<(&'static str, BTreeMap<String, Tensor>)> {
        self.check()?;
        let Some(class) = inventory::iter::<AffineClass>.into_iter().find(|class| (class.holds)(&self)) else {
            bail!(InputError::new(format!("no dictionary that is linked in does this: {}", self.words())));
        };
        let float = |tensor: &Tensor| tensor.to_device(Device::Cpu).to_kind(tch::Kind::Float).contiguous();
        self.w_enc = float(&self.w_enc);
        if class.subtracts_b_dec != self.subtract_b_dec {
            let moved = through(&self.b_dec, &self.w_enc);
            let b_enc = self.b_enc.to_device(Device::Cpu).to_kind(tch::Kind::Double);
            self.b_enc = if class.subtracts_b_dec { b_enc + moved } else { b_enc - moved };
        }
        for tensor in [&mut self.b_enc, &mut self.w_dec, &mut self.b_dec].into_iter().chain(&mut self.w_skip) {
            *tensor = float(tensor);
        }
        if let Activation::Jump(threshold) = &mut self.activation {
            *threshold = float(threshold);
        }
        let tensors = (class.tensors)(self).into_iter();
        Ok((class.class, tensors.map(|(name, tensor)| (name.to_owned(), tensor.contiguous())).collect()))
    }

    fn words(&self) -> String {
        let activation = match self.activation {
            Activation::Relu => "ReLU",
            Activation::TopK(_) => "TopK",
            Activation::Jump(_) => "JumpReLU",
        };
        let what = if self.transcodes { "transcoder" } else { "autoencoder" };
        let skip = if self.w_skip.is_some() { " with a skip connection" } else { "" };
        format!("{activation} {what}{skip}")
    }
}

impl Activation {
    /// The tensors of it that a class saves: `k` and an unknown `threshold`, or the thresholds.
    pub fn tensors(self) -> Vec<(&'static str, Tensor)> {
        match self {
            Activation::Relu => Vec::new(),
            Activation::TopK(k) => vec![("k", Tensor::from(k as i32)), ("threshold", Tensor::from(-1f32))],
            Activation::Jump(threshold) => vec![("threshold", threshold)],
        }
    }
}

/// A class that some [`Affine`] SAEs are. Submitted by the plugin that owns the class.
pub struct AffineClass {
    /// Its name.
    pub class: &'static str,
    /// Whether it subtracts b_dec from what it reads.
    pub subtracts_b_dec: bool,
    /// Whether it does what this one does, wherever the bias is; of two classes no SAE is both.
    pub holds: fn(&Affine) -> bool,
    /// The class's tensors of one that it holds, in float32, its bias where the class has it.
    pub tensors: fn(Affine) -> Vec<(&'static str, Tensor)>,
}

inventory::collect!(AffineClass);

/// b W, `[F]`, of a vector `[d]` and an encoder [d, F], added up in double precision.
pub fn through(vector: &Tensor, encoder: &Tensor) -> Tensor {
    // A copy of the whole encoder in double precision may not fit into memory.
    let row = vector.to_kind(tch::Kind::Double).unsqueeze(0);
    let pieces =
        encoder.split(4096, 1).into_iter().map(|piece| row.matmul(&piece.to_kind(tch::Kind::Double)).squeeze_dim(0));
    Tensor::cat(&pieces.collect::<Vec<_>>(), 0)
}

/// Imports what a request means into folders, each whole or not at all, and gives their paths.
///
/// One SAE becomes the folder `out`; several become folders in it, by name. Without `out` they go to `saes/<name>`.
pub fn import(format_name: &str, request: &Request, out: Option<&Path>) -> Result<Vec<PathBuf>> {
    let format = named(format_name)?;
    let asked = request.place.as_deref().and_then(|place| Place::parse(place).ok());
    let places = format.find(request).map_err(|error| match &asked {
        Some(place) => with_other_format(error, &*format, place),
        None => error,
    })?;
    let mut written = Vec::new();
    for place in &places {
        let dir = match out {
            Some(out) if places.len() == 1 => out.to_owned(),
            Some(out) => out.join(folder(&place.name)),
            None => Path::new("saes").join(folder(&place.name)),
        };
        let cannot = || format!("cannot import {place}");
        // Before hours of fetching; but a folder of our naming may hold other SAEs of a place that is none itself, and then
        // the place is what is wrong.
        if out.is_some() {
            refuse_other(&dir)?;
        }
        let published = read(&*format, place)?;
        if out.is_none() {
            refuse_other(&dir)?;
        }
        for note in &published.notes {
            crate::say!("warning: {}", printable(&format!("{place}: {note}")));
        }
        let origin = json!({"format": place.format.as_deref().unwrap_or(format_name), "from": place.to_string(), "name": place.name});
        whole_folder(&dir, |dir| write(dir, &published, &origin).with_context(cannot))?;
        written.push(dir);
    }
    Ok(written)
}

/// A name as the path of a folder below another: no part of it leads anywhere else.
fn folder(name: &str) -> PathBuf {
    let part = |part: &str| -> String {
        part.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.=".contains(c) { c } else { '_' }).collect()
    };
    name.split(['/', ':']).filter(|part| !["", ".", ".."].contains(part)).map(part).collect()
}

/// Refuses to write over something else.
fn refuse_other(dir: &Path) -> Result<()> {
    if dir.is_symlink() && !dir.exists() {
        bail!(
            InputError::new(format!("{} is a link that leads nowhere", dir.display()))
                .help("give another folder with `--out`")
        );
    }
    if dir.is_file() {
        bail!(InputError::new(format!("{} is a file", dir.display())).help("give another folder with `--out`"));
    }
    let empty = match fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    };
    if !empty {
        bail!(
            InputError::new(format!("{} is there already", dir.display()))
                .help("give another folder with `--out`, or remove it first")
        );
    }
    Ok(())
}

/// Makes a folder that is whole or not there: filled beside its place, then renamed.
pub fn whole_folder(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    // Where a link leads, not the link.
    let dir = fs::canonicalize(dir).or_else(|_| std::path::absolute(dir))?;
    let above = dir.parent().unwrap_or(Path::new("/"));
    let cannot = || format!("cannot write {}", dir.display());
    fs::create_dir_all(above).with_context(cannot)?;
    let beside = tempfile::Builder::new().prefix(".partial-").tempdir_in(above).with_context(cannot)?;
    fill(beside.path())?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // A temporary folder is private; a result is as readable as anything else the user writes.
        fs::set_permissions(beside.path(), fs::Permissions::from_mode(0o755)).with_context(cannot)?;
    }
    // A rename replaces an empty folder, and nothing else.
    fs::rename(beside.path(), &dir).with_context(cannot)?;
    let _ = beside.keep();
    Ok(())
}

/// The dictionary that a published SAE is, and what config.json says of it under `trainer`.
pub fn dictionary(published: &Published, origin: &str) -> Result<(Box<dyn Dictionary>, Map<String, Value>)> {
    for (name, tensor) in &published.tensors {
        if tensor.is_floating_point() && tensor.isnan().any().int64_value(&[]) != 0 {
            bail!(
                InputError::new(format!("tensor `{name}` has values that are not numbers"))
                    .help("the file is damaged, or was saved after training had failed")
            );
        }
    }
    let mut trainer = published.trainer.clone();
    trainer.insert("dict_class".to_owned(), published.class.as_str().into());
    let settings = Value::Object(trainer.clone());
    let mut dictionary =
        saved::fitting(&published.class, &published.tensors, &settings, Device::Cpu, Precision::Float32)?;
    dictionary.load(&published.tensors, Path::new(origin))?;
    trainer.insert("dict_class".to_owned(), dictionary.class().into());
    if let Some(scale) = published.scale {
        dictionary.scale_biases(scale);
    }
    if published.pretrained {
        dictionary.pretrained();
    }
    let dims = dictionary.dims();
    let mut add = |name: &str, value: Value| {
        trainer.entry(name).or_insert(value);
    };
    add("activation_dim", dims.input.into());
    add("dict_size", dims.features.into());
    if dims.output != dims.input {
        add("output_dim", dims.output.into());
    }
    if let Some(selection) = dictionary.selection() {
        add("k", selection.k().into());
    }
    if let Some(normalization) = published.normalization {
        add("normalization", serde_json::to_value(normalization)?);
    }
    if let Some(dtype) = published.dtype {
        add("dtype", dtype.into());
    }
    if let Some(site) = &published.site {
        add("lm_name", site.model.as_str().into());
        add("submodule_name", site.submodule.as_str().into());
        add("layer", site.layer().into());
    }
    Ok((dictionary, trainer))
}

/// Loads a published SAE without writing anything: from its folder, the Hub's cache or the Hub.
///
/// `place` is what `dictlearn import` takes: a folder, `owner/name/path`, for `sae_lens` also `release:sae_id`.
pub fn load(format_name: &str, place: &str, device: Device) -> Result<Box<dyn Dictionary>> {
    let format = named(format_name)?;
    let places = format.find(&Request { place: Some(place.to_owned()), ..Request::default() })?;
    let [place] = &places[..] else {
        let names: Vec<&str> = places.iter().map(|place| place.name.as_str()).collect();
        bail!(
            InputError::new(format!("`{place}` means {} SAEs", places.len()))
                .help(format!("name one of them: {}", names.join(", ")))
        );
    };
    let published = read(&*format, place)?;
    let (read, trainer) = dictionary(&published, &place.to_string())?;
    let tensors = read.state_dict().into_iter().map(|(name, tensor)| (name.to_owned(), tensor.detach())).collect();
    let mut moved = saved::shaped(read.class(), &tensors, &Value::Object(trainer), device, Precision::Float32)?;
    moved.load(&tensors, Path::new(&place.to_string()))?;
    Ok(saved::adapted(moved, published.normalization, published.dtype))
}

fn read(format: &dyn TaggedFormat, place: &Place) -> Result<Published> {
    let read = match &place.format {
        Some(other) => named(other)?.read(place),
        None => format.read(place),
    };
    let read = read.map_err(|error| with_other_format(error, format, place));
    read.with_context(|| format!("cannot import {place}"))
}

/// The error, with the format that the files are of, where another was asked.
fn with_other_format(error: anyhow::Error, asked: &dyn TaggedFormat, place: &Place) -> anyhow::Error {
    let input = match InputError::take(error) {
        Ok(input) => input,
        Err(other) => return other,
    };
    let files = place.files().unwrap_or_default();
    let has = |format: &dyn TaggedFormat| format.marks().iter().any(|mark| files.iter().any(|file| file == mark));
    if has(asked) {
        return input.into();
    }
    let other = registry::names(Kind::Format).into_iter().find(|name| named(name).is_ok_and(|format| has(&*format)));
    match other {
        Some(other) => {
            input.and_help(&format!("the files are those of `{other}`: `dictlearn import {other} ...`")).into()
        }
        None => input.into(),
    }
}

/// Writes an imported SAE's folder: weights, config.json, and the config.yaml that says where it reads.
fn write(dir: &Path, published: &Published, origin: &Value) -> Result<()> {
    let (dictionary, trainer) = dictionary(published, origin["from"].as_str().unwrap_or_default())?;
    let mut config = json!({"trainer": trainer});
    if let Some(site) = &published.site {
        config["buffer"] = site.buffer();
    }
    config["imported"] = origin.clone();
    saved::write(dir, &*dictionary, &config)?;
    if let Some(sparsity) = &published.sparsity {
        tensors::write(&dir.join("sparsity.safetensors"), &[("sparsity", sparsity.shallow_clone())])?;
    }
    let source = inventory::iter::<WrittenSource>.into_iter().next();
    if let (Some(site), Some(source)) = (&published.site, source) {
        let yaml = serde_yaml::to_string(&json!({"source": (source.config)(site, site.text())}))?;
        let yaml = format!("# Where this SAE reads, for `dictlearn eval` and `dictlearn encode --text`.\n{yaml}");
        write_file(&dir.join("config.yaml"), yaml.as_bytes())?;
    }
    Ok(())
}

/// Exports an SAE into a folder, whole or not at all.
pub fn export(sae: &Saved, format_name: &str, out: &Path) -> Result<()> {
    let format = named(format_name)?;
    refuse_other(out)?;
    whole_folder(out, |dir| format.write(sae, dir))
}

/// A glob of names, in which `*` stands for `/` too.
pub fn glob(text: &str) -> Result<glob::Pattern> {
    glob::Pattern::new(text).map_err(|error| InputError::new(format!("`{text}` is no glob: {error}")).into())
}

/// Sees that nothing in a published config changes what the SAE computes without being honoured.
///
/// The keys `off` would, in ways that no dictionary here does: any value but null, false, 0, "none" or an empty one is
/// refused by name. `known` are the keys that the reader takes, and those that say only how the SAE was trained. The note
/// that it returns names the keys that are neither, which are ignored.
pub fn check_keys(config: &Value, file: &str, off: &[&str], known: &[&str]) -> Result<Option<String>> {
    let Some(config) = config.as_object() else {
        bail!(InputError::new(format!("{file} is not a JSON object")));
    };
    let is_off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        // Python's enums may not call a member None.
        Value::String(text) => text.is_empty() || text.trim_end_matches('_').eq_ignore_ascii_case("none"),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    };
    for key in off {
        if let Some(value) = config.get(*key).filter(|value| !is_off(value)) {
            bail!(
                InputError::new(format!("{file}: `{key}: {value}` is not supported"))
                    .help("it changes what the SAE computes, in a way that no dictionary here does")
            );
        }
    }
    let unknown: Vec<String> = config
        .keys()
        .filter(|key| !off.contains(&key.as_str()) && !known.contains(&key.as_str()))
        .map(|key| format!("`{key}`"))
        .collect();
    Ok((!unknown.is_empty()).then(|| format!("{file} has unknown keys, which are ignored: {}", unknown.join(", "))))
}

/// Refuses tensors that are left when all that an SAE has were taken: they would change it, and nobody knows how.
pub fn nothing_left(tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    bail!(InputError::new(format!(
        "the weights have tensors that such an SAE does not: {}",
        tensors.keys().cloned().collect::<Vec<_>>().join(", ")
    )))
}

/// A tensor of a file of weights, or an error that lists what there is.
pub fn take(tensors: &mut BTreeMap<String, Tensor>, name: &str) -> Result<Tensor> {
    match tensors.remove(name) {
        Some(tensor) => Ok(tensor),
        None => {
            let mut others: Vec<&str> = tensors.keys().map(String::as_str).collect();
            let more = if others.len() > 12 { ", ..." } else { "" };
            others.truncate(12);
            Err(anyhow!(InputError::new(format!("tensor `{name}` is missing")).help(match others.is_empty() {
                true => "beside those that were read there are none".to_owned(),
                false => format!("beside those that were read there are: {}{more}", others.join(", ")),
            })))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_changes_what_is_computed_is_refused_and_an_unknown_one_is_named() {
        let check = |config: Value| check_keys(&config, "cfg.json", &["tied", "n_sources"], &["k"]);
        let fine = json!({"k": 3, "tied": false, "n_sources": 0});
        assert_eq!(check(fine).unwrap(), None);
        for off in [json!(null), json!("none"), json!("None_"), json!([]), json!({}), json!(0.0)] {
            assert_eq!(check(json!({ "tied": off })).unwrap(), None, "{off}");
        }
        for (on, word) in [(json!({"tied": true}), "`tied: true`"), (json!({"n_sources": 2}), "`n_sources: 2`")] {
            let error = InputError::take(check(on).unwrap_err()).unwrap();
            assert!(error.message().contains(word) && error.message().contains("cfg.json"), "{error}");
        }
        assert!(check(json!({"k": 1, "odd": true})).unwrap().unwrap().contains("`odd`"));
        assert!(check(json!([1])).is_err());
    }
}
