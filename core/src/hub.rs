//! Interface to the Hugging Face Hub: files of repositories, by name.
//!
//! Core does not implement the Hub's protocol. A plugin does, and registers itself as [`HubPlugin`]. Models,
//! tokenizers, datasets and published dictionaries all come through it.

use std::cell::Cell;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::error::InputError;

/// The error of a failed request to the Hub, with advice.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct HubError(pub String);

/// Kind of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RepoKind {
    /// A model or dictionaries.
    Model,
    /// A dataset.
    Dataset,
}

impl fmt::Display for RepoKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RepoKind::Model => "model",
            RepoKind::Dataset => "dataset",
        })
    }
}

/// A repository of the Hub at a revision.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Repo {
    /// Model or dataset.
    pub kind: RepoKind,
    /// `owner/name`, or a bare `name` (`gpt2`).
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl Repo {
    /// Parses `owner/name[@revision]`; `None` if the text is not of that form.
    pub fn parse(kind: RepoKind, name: &str) -> Option<Repo> {
        let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
        let part = |part: &str| {
            let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.len() <= 96 && part.chars().all(good) && !part.starts_with(['.', '-'])
        };
        let good = id.split('/').count() <= 2 && id.split('/').all(part) && !revision.is_empty();
        good.then(|| Repo { kind, id: id.to_owned(), revision: revision.to_owned() })
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

/// A file to upload.
#[derive(Debug, Clone)]
pub struct Upload {
    /// Path in the repository: `layer_3/ae.safetensors`.
    pub path: String,
    /// Content.
    pub content: Content,
}

/// Content of a file to upload.
#[derive(Debug, Clone)]
pub enum Content {
    /// Bytes in memory.
    Bytes(Vec<u8>),
    /// A local file, read while it is sent.
    File(PathBuf),
}

/// Message of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitMessage {
    /// First line.
    pub summary: String,
    /// Remaining text; may be empty.
    pub description: String,
}

impl CommitMessage {
    /// Splits a text into its first line and the rest.
    pub fn of(text: &str) -> Self {
        let (summary, description) = text.trim().split_once('\n').unwrap_or((text.trim(), ""));
        CommitMessage { summary: summary.trim().to_owned(), description: description.trim().to_owned() }
    }
}

/// How this process reaches the Hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct About {
    /// Folder of the cache.
    pub cache: PathBuf,
    /// URL of the Hub.
    pub endpoint: String,
    /// True if only the cache is read.
    pub offline: bool,
    /// True if there is a token. The token itself is not exposed.
    pub token: bool,
}

/// Reads files of repositories through the cache, and uploads files.
pub trait Hub: Send + Sync {
    /// Returns the cache and the address, for `dictlearn doctor`.
    fn about(&self) -> About;

    /// Returns the local path of a repository's file, downloading it if it is not cached. `None` if the repository has
    /// no such file.
    fn file(&self, repo: &Repo, path: &str) -> Result<Option<PathBuf>>;

    /// Streams a file of a repository from the cache, or from the Hub without caching it. `None` if the repository has
    /// no such file.
    fn stream(&self, repo: &Repo, path: &str) -> Result<Option<Box<dyn Read + Send>>>;

    /// Returns the paths of a repository's files, sorted; offline, only those in the cache.
    fn list(&self, repo: &Repo) -> Result<Vec<String>>;

    /// Resolves the repository's revision to a commit.
    fn commit(&self, repo: &Repo) -> Result<String>;

    /// Returns every repository read so far, at the requested revision, with the commit that it resolved to.
    fn commits(&self) -> Vec<(Repo, String)>;

    /// Resolves the repository's revision to this commit from now on, without asking the Hub.
    fn pin(&self, repo: &Repo, commit: &str);

    /// Returns the cached files of that name at the root of any repository.
    fn cached(&self, name: &str) -> Vec<PathBuf>;

    /// Returns the paths of the files that an upload's target has on the Hub now. `None` if the repository or branch
    /// does not exist yet.
    ///
    /// # Errors
    /// Fails if uploading is impossible: offline or without a token.
    fn before_upload(&self, repo: &Repo) -> Result<Option<Vec<String>>>;

    /// Uploads files in one atomic commit and returns the commit's URL. Creates repository and branch if they are
    /// missing. With `private`, creates a private repository and refuses an existing public one. If nothing would
    /// change, makes no commit and returns the URL of the last one.
    fn upload(&self, repo: &Repo, files: &[Upload], message: &CommitMessage, private: bool) -> Result<String>;
}

/// The plugin that implements the Hub's protocol.
pub struct HubPlugin {
    /// Opens the Hub as the environment configures it (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, ...).
    pub open: fn() -> Result<Box<dyn Hub>>,
    /// Opens a cache folder only, as with HF_HUB_OFFLINE.
    pub open_cache: fn(&Path) -> Result<Box<dyn Hub>>,
}

inventory::collect!(HubPlugin);

static OPEN: OnceLock<Box<dyn Hub>> = OnceLock::new();

/// Returns [`Hub::commits`], or nothing if the Hub has not been opened.
pub fn commits() -> Vec<(Repo, String)> {
    OPEN.get().map(|hub| hub.commits()).unwrap_or_default()
}

thread_local! {
    /// True while this thread must not open the Hub.
    static CLOSED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` without downloads: this thread cannot open the Hub meanwhile.
pub fn without<T>(work: impl FnOnce() -> T) -> T {
    crate::flag::during(&CLOSED, work)
}

/// Returns the Hub as the environment configures it, opened once per process.
pub fn hub() -> Result<&'static dyn Hub> {
    if CLOSED.get() {
        bail!("downloads are disabled while a rejected config is checked");
    }
    opened(|plugin| (plugin.open)())
}

/// Makes this process read repositories from a cache folder only, so that tests depend on neither network nor
/// environment.
///
/// # Errors
/// Fails if the Hub is already open with another cache, or if this program was built without access to it.
pub fn use_cache(folder: &Path) -> Result<()> {
    let hub = opened(|plugin| (plugin.open_cache)(folder))?;
    if hub.about().cache != folder {
        bail!("the Hub is already open, with the cache {}", hub.about().cache.display());
    }
    Ok(())
}

fn opened(open: impl FnOnce(&HubPlugin) -> Result<Box<dyn Hub>>) -> Result<&'static dyn Hub> {
    if let Some(hub) = OPEN.get() {
        return Ok(&**hub);
    }
    match inventory::iter::<HubPlugin>.into_iter().next() {
        Some(plugin) => {
            let hub = open(plugin)?;
            Ok(&**OPEN.get_or_init(|| hub))
        }
        None => bail!(
            InputError::new("this program was built without access to the Hugging Face Hub")
                .help("give a local path instead, or add the plugin `hub` to Cargo.toml")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commit_messages_are_split_after_the_first_line() {
        let message = |summary: &str, description: &str| CommitMessage {
            summary: summary.to_owned(),
            description: description.to_owned(),
        };
        assert_eq!(CommitMessage::of(" One line\n"), message("One line", ""));
        assert_eq!(CommitMessage::of("One line\n\nand more\n"), message("One line", "and more"));
    }

    #[test]
    fn repository_names_are_parsed_and_malformed_ones_rejected() {
        let parse = |name| Repo::parse(RepoKind::Model, name).map(|repo| (repo.id, repo.revision));
        let repo = |id: &str, revision: &str| Some((id.to_owned(), revision.to_owned()));
        assert_eq!(parse("EleutherAI/pythia-70m-deduped"), repo("EleutherAI/pythia-70m-deduped", "main"));
        assert_eq!(parse("gpt2@refs/pr/1"), repo("gpt2", "refs/pr/1"));
        for wrong in ["", "a/b/c", "../a", "a b", "/a", "a/", "a@", "./model"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
