//! The Hugging Face Hub, as far as core needs it: files of repositories, by name.
//!
//! Core does not speak the Hub's protocol. A plugin does, and registers itself as [`HubPlugin`]; models, tokenizers,
//! datasets and published dictionaries all come through it.

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

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RepoKind {
    /// A model, or dictionaries.
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
    /// What it holds.
    pub kind: RepoKind,
    /// `owner/name`, or a bare `name` (`gpt2`).
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl Repo {
    /// The repository that `owner/name[@revision]` names, or `None` where the text cannot be such a name.
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
    /// Its path in the repository: `layer_3/ae.safetensors`.
    pub path: String,
    /// What it holds.
    pub content: Content,
}

/// What a file to upload holds.
#[derive(Debug, Clone)]
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// The bytes of a file on this machine, which is read as it is sent.
    File(PathBuf),
}

/// What a commit says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitMessage {
    /// One line.
    pub summary: String,
    /// More, or nothing.
    pub description: String,
}

impl CommitMessage {
    /// The message that a text is: its first line, and what follows.
    pub fn of(text: &str) -> Self {
        let (summary, description) = text.trim().split_once('\n').unwrap_or((text.trim(), ""));
        CommitMessage { summary: summary.trim().to_owned(), description: description.trim().to_owned() }
    }
}

/// How the Hub is used here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct About {
    /// The folder of the cache.
    pub cache: PathBuf,
    /// The address that is asked.
    pub endpoint: String,
    /// Whether only the cache is read.
    pub offline: bool,
    /// Whether there is a token. Which one is nobody's business.
    pub token: bool,
}

/// Files of repositories: from the cache, or fetched into it; and to them.
pub trait Hub: Send + Sync {
    /// Its cache and address, for `dictlearn doctor`.
    fn about(&self) -> About;

    /// Where a file of a repository lies on this machine, by its path in the repository; fetched first if the cache
    /// does not have it. `None` where the repository has no such file.
    fn file(&self, repo: &Repo, path: &str) -> Result<Option<PathBuf>>;

    /// A file of a repository from its beginning to its end: from the cache if it is there, otherwise as it arrives,
    /// and not kept. `None` where the repository has no such file.
    fn stream(&self, repo: &Repo, path: &str) -> Result<Option<Box<dyn Read + Send>>>;

    /// The paths of a repository's files, sorted. Offline, of those that the cache has.
    fn list(&self, repo: &Repo) -> Result<Vec<String>>;

    /// The commit that the repository's revision stands for.
    fn commit(&self, repo: &Repo) -> Result<String>;

    /// Every repository that was read so far, at the revision that was asked for, with the commit that it stands for.
    fn commits(&self) -> Vec<(Repo, String)>;

    /// Lets the repository's revision stand for this commit from now on, whatever the Hub says.
    fn pin(&self, repo: &Repo, commit: &str);

    /// Files of that name at the root of a repository in the cache, whichever.
    fn cached(&self, name: &str) -> Vec<PathBuf>;

    /// The paths of the files of a repository that is to be uploaded to, as the Hub has them now. `None` where there is
    /// no such repository or branch yet; an error where nothing can be uploaded at all, without a token or offline.
    fn before_upload(&self, repo: &Repo) -> Result<Option<Vec<String>>>;

    /// Uploads files in one commit, of which all become visible at once or none does; the commit's URL. Repository and
    /// branch are made if need be, the repository `private` if that is asked; one that is there and public is then
    /// refused. Where the repository has all of it already, no commit is made and the URL is its last one's.
    fn upload(&self, repo: &Repo, files: &[Upload], message: &CommitMessage, private: bool) -> Result<String>;
}

/// The plugin that speaks the Hub's protocol.
pub struct HubPlugin {
    /// Opens the Hub as the environment says (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, ...).
    pub open: fn() -> Result<Box<dyn Hub>>,
    /// Opens a cache's folder alone, as with HF_HUB_OFFLINE.
    pub open_cache: fn(&Path) -> Result<Box<dyn Hub>>,
}

inventory::collect!(HubPlugin);

static OPEN: OnceLock<Box<dyn Hub>> = OnceLock::new();

/// What [`Hub::commits`] says, and nothing where the Hub has not been opened.
pub fn commits() -> Vec<(Repo, String)> {
    OPEN.get().map(|hub| hub.commits()).unwrap_or_default()
}

thread_local! {
    /// True while this thread must not read from the Hub.
    static CLOSED: Cell<bool> = const { Cell::new(false) };
}

/// Does work that must not wait for downloads: until it is done, this thread cannot open the Hub.
pub fn without<T>(work: impl FnOnce() -> T) -> T {
    crate::flag::during(&CLOSED, work)
}

/// The Hub, as the environment says; opened once.
pub fn hub() -> Result<&'static dyn Hub> {
    if CLOSED.get() {
        bail!("nothing is downloaded for a run that is refused");
    }
    opened(|plugin| (plugin.open)())
}

/// Makes this process read repositories from a cache's folder alone, whatever the environment says, so that tests depend
/// on neither.
///
/// # Errors
/// Where the Hub is open already, or this program was built without access to it.
pub fn use_cache(folder: &Path) -> Result<()> {
    let hub = opened(|plugin| (plugin.open_cache)(folder))?;
    if hub.about().cache != folder {
        bail!("the Hub is open already, with the cache {}", hub.about().cache.display());
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
    fn messages_of_commits() {
        let message = |summary: &str, description: &str| CommitMessage {
            summary: summary.to_owned(),
            description: description.to_owned(),
        };
        assert_eq!(CommitMessage::of(" One line\n"), message("One line", ""));
        assert_eq!(CommitMessage::of("One line\n\nand more\n"), message("One line", "and more"));
    }

    #[test]
    fn names_of_repositories() {
        let parse = |name| Repo::parse(RepoKind::Model, name).map(|repo| (repo.id, repo.revision));
        let repo = |id: &str, revision: &str| Some((id.to_owned(), revision.to_owned()));
        assert_eq!(parse("EleutherAI/pythia-70m-deduped"), repo("EleutherAI/pythia-70m-deduped", "main"));
        assert_eq!(parse("gpt2@refs/pr/1"), repo("gpt2", "refs/pr/1"));
        for wrong in ["", "a/b/c", "../a", "a b", "/a", "a/", "a@", "./model"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
