//! Uploads a trained SAE to the Hub: the files of its folder, and a model card.

use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use indicatif::HumanBytes;
use serde_json::Value;
use tch::Device;

use dictlearn_core::error::InputError;
use dictlearn_core::files;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::files::yaml;
use dictlearn_core::formats;
use dictlearn_core::formats::Python;
use dictlearn_core::hub::{CommitMessage, Content, Hub, Repo, RepoKind, Upload};
use dictlearn_core::machine::device::Precision;
use dictlearn_core::registry;
use dictlearn_core::sae::saved;

/// Files of an SAE's folder to upload, as dictlearn and sae_lens write them.
const FILES: [&str; 7] = [
    "ae.safetensors",
    "ae.pt",
    "config.json",
    "eval.json",
    "cfg.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
];
const CARD: &str = "README.md";
const CONFIG: &str = "config.yaml";
/// Folder names that the Hub reserves.
const FORBIDDEN: [&str; 2] = [".git", ".cache"];
/// Maximum bytes of a repository's card that are read to see who wrote it.
const CARD_LIMIT: u64 = 1 << 20;

/// An upload of an SAE.
pub struct Push {
    repo: Repo,
    /// The folder in the repository; empty for its root.
    path: String,
    /// The SAE's name.
    name: String,
    /// Everything but the card, by path in the repository.
    files: Vec<Upload>,
    card: String,
    /// Mark by which a README.md is this SAE's generated card; `None` if the user wrote the card.
    mark: Option<String>,
}

impl Push {
    /// Collects the files of an SAE's folder for `owner/name[@branch]`, in a folder of the repository or its root.
    pub fn of(sae_dir: &Path, repo: &str, path: &str) -> Result<Self> {
        let about = About::read(sae_dir)?;
        let repo = parse_repo(repo)?;
        let path = parse_path(path)?;
        let mut files: Vec<Upload> = Vec::new();
        for name in FILES {
            let file = sae_dir.join(name);
            if file.is_file() {
                files.push(Upload { path: below(&path, name), content: Content::File(file) });
            }
        }
        for (file, json) in [("config.json", &about.config), ("cfg.json", &about.lens), ("eval.json", &about.eval)] {
            warn_of_paths(file, &absolute(json, ""));
        }
        let config = run_config(sae_dir)?;
        if let Some(config) = &config {
            if let Ok(config) = yaml::parse::<Value>(config) {
                warn_of_paths(CONFIG, &absolute(&config, ""));
            }
            let content = Content::Bytes(config.clone().into_bytes());
            files.push(Upload { path: below(&path, CONFIG), content });
        }
        let own = sae_dir.join(CARD);
        let (card, mark) = if own.is_file() {
            let card = fs::read_to_string(&own);
            (card.map_err(|error| InputError::new(format!("cannot read {}: {error}", own.display())))?, None)
        } else {
            let mark = format!("<!-- dictlearn: the card of /{path} -->");
            (card(&about, &repo, &path, config.as_deref(), &mark), Some(mark))
        };
        Ok(Push { repo, path, name: about.name, files, card, mark })
    }

    /// Uploads the files in one commit. Returns its URL.
    pub fn upload(mut self, hub: &dyn Hub, message: Option<&str>, private: bool) -> Result<String> {
        let message = match message {
            Some(text) if text.trim().is_empty() => {
                bail!(InputError::new("--message is empty").help("describe the commit, or omit --message"))
            }
            Some(text) => CommitMessage::of(text),
            None => CommitMessage::of(&format!("Upload {} with dictlearn", self.name)),
        };
        let there = hub.before_upload(&self.repo)?.unwrap_or_default();
        let place = match there.iter().any(|file| file == CARD) {
            true => self.place_beside(hub)?,
            false => Some(CARD.to_owned()),
        };
        let left_out = place.is_none();
        if let Some(path) = place {
            let content = Content::Bytes(std::mem::take(&mut self.card).into_bytes());
            self.files.push(Upload { path, content });
        }
        let url = hub.upload(&self.repo, &self.files, &message, private)?;
        if left_out {
            tracing::info!(
                "the repository keeps its own README.md; to replace it, put one into the SAE's folder \
                 (`--dry-run` prints the generated one)"
            );
        }
        Ok(url)
    }

    /// Returns the card's path in a repository that has a README.md; `None` if it would replace one that someone wrote.
    fn place_beside(&self, hub: &dyn Hub) -> Result<Option<String>> {
        let written = self.mark.is_none();
        if self.path.is_empty() && written {
            return Ok(Some(CARD.to_owned()));
        }
        let mut there = Vec::new();
        if let Some(card) = hub.stream(&self.repo, CARD)? {
            card.take(CARD_LIMIT).read_to_end(&mut there).context("cannot read the repository's README.md")?;
        }
        let same = match &self.mark {
            Some(mark) => String::from_utf8_lossy(&there).contains(mark.as_str()),
            None => there == self.card.as_bytes(),
        };
        Ok(match (same, self.path.is_empty()) {
            (true, _) => Some(CARD.to_owned()),
            (false, false) => Some(below(&self.path, CARD)),
            (false, true) => None,
        })
    }
}

/// Shows the files to upload with their sizes, and the card.
impl fmt::Display for Push {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<(String, u64)> = Vec::new();
        for file in &self.files {
            let size = match &file.content {
                Content::Bytes(bytes) => bytes.len() as u64,
                Content::File(path) => path.metadata().map_or(0, |about| about.len()),
            };
            rows.push((file.path.clone(), size));
        }
        rows.push((CARD.to_owned(), self.card.len() as u64));
        let width = rows.iter().map(|(path, _)| path.len()).max().unwrap_or_default();
        writeln!(f, "to {}:", self.repo)?;
        for (path, size) in rows {
            writeln!(f, "  {path:width$}  {}", HumanBytes(size))?;
        }
        let other = match (self.path.is_empty(), &self.mark) {
            (false, _) => format!(" ({} if the repository has one of its own)", below(&self.path, CARD)),
            (true, Some(_)) => " (skipped if the repository has one of its own)".to_owned(),
            (true, None) => String::new(),
        };
        write!(f, "\n{CARD}{other}:\n\n{}", self.card)
    }
}

fn below(folder: &str, file: &str) -> String {
    if folder.is_empty() { file.to_owned() } else { format!("{folder}/{file}") }
}

fn parse_repo(name: &str) -> Result<Repo> {
    let Some(repo) = Repo::parse(RepoKind::Model, name) else {
        bail!(
            InputError::new(format!("`{name}` is not a Hub repository"))
                .help("give it as owner/name, or owner/name@branch")
        );
    };
    if !repo.id.contains('/') {
        bail!(
            InputError::new(format!("`{name}` does not name the repository's owner")).help(format!(
                "give it as owner/name, with your name on the Hub or an organization's: OWNER/{}",
                repo.id
            ))
        );
    }
    let is_commit = repo.revision.len() == 40 && repo.revision.chars().all(|c| c.is_ascii_hexdigit());
    if is_commit {
        bail!(
            InputError::new(format!("`{}` is a commit, to which nothing can be added", repo.revision))
                .help("name a branch, or omit it for main")
        );
    }
    Ok(repo)
}

fn parse_path(path: &str) -> Result<String> {
    let path = path.trim_end_matches('/');
    let good = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && !FORBIDDEN.contains(&part)
            && !part.contains(|c: char| "\\\"'`*?".contains(c) || c.is_control())
    };
    if !path.is_empty() && !path.split('/').all(good) {
        bail!(InputError::new(format!("`{path}` cannot be a folder of a repository")).help(
            "give one below its root, such as `layer_3/top_k`, without `.`, `..`, `.git`, `.cache`, quotes or wildcards"
        ));
    }
    Ok(path.to_owned())
}

/// Facts about an SAE.
struct About {
    name: String,
    /// config.json, or null.
    config: Value,
    /// cfg.json, as sae_lens writes it, or null.
    lens: Value,
    /// eval.json, or null.
    eval: Value,
    /// Formats of the files.
    formats: Vec<&'static str>,
    /// Python code that loads it with the same features.
    python: Vec<Python>,
}

impl About {
    /// Reads an SAE's folder, and refuses one that cannot be loaded.
    fn read(dir: &Path) -> Result<Self> {
        let file = |name: &str| Some(dir.join(name)).filter(|file| file.is_file());
        let json = |name: &str| file(name).map_or(Ok(Value::Null), |file| files::read_json(&file));
        let lens = file("cfg.json").zip(file("sae_weights.safetensors"));
        let mut sae = None;
        if let (Some((_, weights)), None) = (&lens, file("ae.safetensors")) {
            TensorFile::open(weights)?;
        } else {
            // Refuse what `eval` and `encode` refuse.
            sae = Some(saved::read(dir, Device::Cpu, Precision::Float32)?);
        }
        let named = registry::names(registry::ComponentKind::Format).into_iter();
        let named = named.filter_map(|name| Some((name, formats::named(name).ok()?)));
        let own: Vec<_> = named.filter(|(_, format)| format.is_in(dir)).collect();
        let python = own.iter().filter_map(|(_, format)| format.python(sae.as_ref())).collect();
        let formats = own.iter().map(|(name, _)| *name).collect();
        let dir = std::path::absolute(dir)?;
        let name = dir.file_name().map_or_else(|| "SAE".to_owned(), |name| name.to_string_lossy().into_owned());
        Ok(About {
            name,
            config: json("config.json")?,
            lens: if lens.is_some() { json("cfg.json")? } else { Value::Null },
            eval: json("eval.json")?,
            formats,
            python,
        })
    }

    fn trainer(&self, key: &str) -> Option<&Value> {
        self.config.get("trainer")?.get(key).filter(|value| !value.is_null())
    }

    /// Returns the Hub's models and datasets that its configs name.
    fn repos(&self) -> (BTreeSet<String>, BTreeSet<String>) {
        let mut texts = Vec::new();
        for json in [&self.config, &self.lens] {
            strings(json, &mut Vec::new(), &mut texts);
        }
        let named = |kind: RepoKind, keys: &[&str]| {
            let named = texts.iter().filter(|(path, _)| path.last().is_some_and(|key| keys.contains(key)));
            let repos = named.filter_map(|(_, text)| Some(Repo::parse(kind, text)?.id));
            // A bare name may mean something else to another program.
            repos.filter(|id| id.contains('/') && !Path::new(id).exists()).collect()
        };
        (
            named(RepoKind::Model, &["model", "lm_name", "model_name"]),
            named(RepoKind::Dataset, &["repo", "dataset_path", "dataset"]),
        )
    }
}

/// Collects the strings in a JSON value, with the keys that lead to them.
fn strings<'a>(json: &'a Value, path: &mut Vec<&'a str>, found: &mut Vec<(Vec<&'a str>, &'a str)>) {
    match json {
        Value::String(text) => found.push((path.clone(), text)),
        Value::Array(items) => items.iter().for_each(|item| strings(item, path, found)),
        Value::Object(fields) => {
            for (key, value) in fields {
                path.push(key);
                strings(value, path, found);
                path.pop();
            }
        }
        _ => {}
    }
}

/// Returns the keys whose values are absolute paths.
fn absolute(json: &Value, key: &str) -> Vec<String> {
    match json {
        Value::String(text) if Path::new(text).is_absolute() => vec![key.to_owned()],
        Value::Array(items) => {
            items.iter().enumerate().flat_map(|(index, item)| absolute(item, &format!("{key}[{index}]"))).collect()
        }
        Value::Object(fields) => {
            let dot = if key.is_empty() { "" } else { "." };
            fields.iter().flat_map(|(name, value)| absolute(value, &format!("{key}{dot}{name}"))).collect()
        }
        _ => Vec::new(),
    }
}

fn warn_of_paths(file: &str, keys: &[String]) {
    if !keys.is_empty() {
        tracing::warn!("{file} is uploaded with absolute paths of this machine: {}", keys.join(", "));
    }
}

/// Returns the config that an SAE was trained with, without `output_dir`.
fn run_config(sae_dir: &Path) -> Result<Option<String>> {
    let read = |path: PathBuf| -> Result<Option<String>> {
        if !path.is_file() {
            return Ok(None);
        }
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) => bail!(InputError::new(format!("cannot read {}: {error}", path.display()))),
        }
    };
    let config = match read(sae_dir.join(CONFIG))? {
        Some(own) => Some(own),
        None => {
            let dir = std::path::absolute(sae_dir)?;
            let outer = dir.parent().map_or(Ok(None), |run| read(run.join(CONFIG)))?;
            let dir = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // Take the config of the folder above only if it names this SAE: others are private.
            outer.filter(|text| {
                let outer = yaml::parse::<Value>(text).unwrap_or_default();
                let mut names = outer["saes"].as_array().into_iter().flatten().filter_map(|sae| sae["name"].as_str());
                // An SAE of several sites has the site in its folder's name.
                names.any(|name| dir.strip_prefix(name).is_some_and(|site| site.is_empty() || site.starts_with('-')))
            })
        }
    };
    Ok(config.map(|text| {
        let mut dropped = false;
        let mut kept = String::new();
        for line in text.split_inclusive('\n') {
            // The value may continue on the next lines, indented.
            dropped = line.starts_with("output_dir:") || (dropped && line.starts_with([' ', '\t']));
            if !dropped {
                kept += line;
            }
        }
        kept
    }))
}

/// Display names of metrics, with their number of decimals; `None` for fractions, which are shown as percentages.
const FIGURES: [(&str, &str, Option<usize>); 13] = [
    ("frac_variance_explained", "Variance explained", None),
    ("l0", "L0 (mean number of active features)", Some(1)),
    ("l1_loss", "L1 (sum of features)", Some(2)),
    ("l2_loss", "L2 (norm of the error)", Some(2)),
    ("cossim", "Cosine similarity of reconstruction and activation", Some(3)),
    ("l2_ratio", "Relative norm of the reconstruction", Some(3)),
    ("relative_reconstruction_bias", "Relative reconstruction bias", Some(3)),
    ("frac_alive", "Features alive", None),
    ("frac_recovered", "Cross entropy recovered", None),
    ("loss_original", "Cross entropy of the model", Some(4)),
    ("loss_reconstructed", "Cross entropy with reconstructed activations", Some(4)),
    ("loss_zero", "Cross entropy with zeroed activations", Some(4)),
    ("frac_features_recovered", "True features recovered", None),
];

/// Formats text as code in a table cell.
fn code(text: &str) -> String {
    format!("`{}`", text.replace(['`', '\n'], " ").replace('|', "\\|"))
}

fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(code(text)),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(yes) => Some(yes.to_string()),
        _ => None,
    }
}

/// Returns the rows of a table that describe an SAE.
fn facts(about: &About) -> Vec<(&'static str, String)> {
    let trainer = |key: &str| about.trainer(key).and_then(plain);
    let buffer = |key: &str| about.config.get("buffer").and_then(|buffer| plain(buffer.get(key)?));
    let lens = |key: &str| {
        let metadata = || about.lens.get("metadata").and_then(|metadata| metadata.get(key));
        about.lens.get(key).filter(|value| !value.is_null()).or_else(metadata).and_then(plain)
    };
    let normalization = about.config.pointer("/trainer/normalization/type").and_then(plain);
    let rows = [
        ("class", trainer("dict_class").or_else(|| lens("architecture"))),
        ("features", trainer("dict_size").or_else(|| lens("d_sae"))),
        ("activation width", trainer("activation_dim").or_else(|| lens("d_in"))),
        ("output width", trainer("output_dim").or_else(|| lens("d_out"))),
        ("k", trainer("k").or_else(|| lens("k"))),
        ("model", trainer("lm_name").or_else(|| lens("model_name"))),
        ("submodule", trainer("submodule_name").or_else(|| lens("hook_name"))),
        ("side of the submodule", buffer("io")),
        ("site", buffer("site")),
        ("layer", trainer("layer").or_else(|| lens("hook_layer"))),
        ("target", buffer("target")),
        ("context length", buffer("ctx_len").or_else(|| lens("context_size"))),
        ("contexts start with BOS", buffer("prepend_bos").or_else(|| lens("prepend_bos"))),
        ("activations are centred", buffer("center")),
        (
            "normalisation of each activation",
            normalization.or_else(|| lens("normalize_activations").filter(|how| how != "none")),
        ),
        ("dtype", trainer("dtype")),
        ("imported from", about.config.pointer("/imported/from").and_then(plain)),
        ("trainer", trainer("trainer_class")),
        ("steps", trainer("steps")),
        ("learning rate", trainer("lr")),
        ("seed", trainer("seed")),
    ];
    rows.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

/// Returns the metrics of its eval.json as rows of a table.
fn figures(eval: &Value) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    for (key, name, decimals) in FIGURES {
        if let Some(figure) = eval.get(key).and_then(Value::as_f64) {
            let figure = match decimals {
                Some(decimals) => format!("{figure:.decimals$}"),
                None => format!("{:.1}%", 100.0 * figure),
            };
            rows.push((name.to_owned(), figure));
        }
    }
    for (key, value) in eval.as_object().into_iter().flatten() {
        if let (Some(figure), false) = (value.as_f64(), FIGURES.iter().any(|(known, ..)| known == key)) {
            rows.push((code(key), format!("{figure:.4}")));
        }
    }
    rows
}

fn table<'a>(head: [&str; 2], rows: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let rows: String = rows.into_iter().map(|(name, value)| format!("| {name} | {value} |\n")).collect();
    format!("| {} | {} |\n| --- | --- |\n{rows}", head[0], head[1])
}

/// Returns Python code that loads the SAE, for each library that can.
fn python(about: &About, repo: &Repo, path: &str) -> String {
    let mut text = String::new();
    let revision = if repo.revision == "main" { String::new() } else { format!(", revision=\"{}\"", repo.revision) };
    let some = if path.is_empty() { String::new() } else { format!(", allow_patterns=\"{path}/*\"") };
    let below = if path.is_empty() { String::new() } else { format!(" + \"/{path}\"") };
    for Python { library, import, load } in &about.python {
        let _ = write!(
            text,
            "With {library}:\n\n```python\n{import}\nfrom huggingface_hub import snapshot_download\n\nfolder = \
             snapshot_download(\"{}\"{revision}{some}){below}\n{load}\n```\n\n",
            repo.id
        );
    }
    text
}

/// Returns the model card.
fn card(about: &About, repo: &Repo, path: &str, config: Option<&str>, mark: &str) -> String {
    let (models, datasets) = about.repos();
    let mut text =
        "---\nlibrary_name: dictlearn\ntags:\n- sparse-autoencoder\n- sae\n- mechanistic-interpretability\n".to_owned();
    for (key, ids) in [("base_model", &models), ("datasets", &datasets)] {
        if !ids.is_empty() {
            text += &format!("{key}:\n");
            text.extend(ids.iter().map(|id| format!("- {id}\n")));
        }
    }
    text += &format!("---\n{mark}\n\n# {}\n\nA dictionary of features", about.name);
    if !models.is_empty() {
        let links = models.iter().map(|id| format!("[{id}](https://huggingface.co/{id})"));
        text += &format!(" for activations of {}", links.collect::<Vec<_>>().join(" and "));
    }
    text += ".\n\n";
    text += &table(["", ""], facts(about).iter().map(|(name, value)| (*name, value.as_str())));
    let figures = figures(&about.eval);
    if !figures.is_empty() {
        text += "\n## Metrics\n\n";
        text += &table(["metric", "value"], figures.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    }
    text += "\n## Usage\n\n";
    text += &python(about, repo, path);
    if let Some(format) = about.formats.first() {
        let source = below(&repo.to_string(), path).trim_end_matches('/').to_owned();
        let source = if source.contains(' ') { format!("'{source}'") } else { source };
        text += &format!(
            "With dictlearn:\n\n```sh\ndictlearn import {format} {source} --out {name}\ndictlearn encode {name} --input \
             x.safetensors --output y.safetensors\n```\n",
            name = about.name.replace(char::is_whitespace, "_")
        );
    }
    if let Some(config) = config {
        // A fence longer than any in the config.
        let fence = "`".repeat(1 + config.split(|c| c != '`').map(str::len).max().unwrap_or(0).max(2));
        text += &format!(
            "\n<details>\n<summary>Config of the source, and of the training run if there was one</summary>\n\n{fence}yaml\n{}\n{fence}\n\n</details>\n",
            config.trim_end()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_repositories_and_folders_are_refused() {
        for good in ["", "a", "a/b", "layer 3/top_k/"] {
            assert_eq!(parse_path(good).unwrap(), good.trim_end_matches('/'));
        }
        for wrong in ["..", "a/../b", "./a", "/a", "a//b", ".git", "a/.cache/b", "a\\b"] {
            assert!(parse_path(wrong).is_err(), "{wrong}");
        }
        for wrong in ["a/b/c", "name", "", "o/n@", "o/n@0123456789abcdef0123456789abcdef01234567"] {
            assert!(parse_repo(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_repo("o/n@v1").unwrap().to_string(), "o/n@v1");
    }

    #[test]
    fn absolute_paths_are_found() {
        let json = serde_json::json!({"a": {"b": "/data/x"}, "c": ["y", "/z"], "d": "owner/name", "e": "/"});
        assert_eq!(absolute(&json, ""), ["a.b", "c[1]", "e"]);
    }
}
