//! The Hugging Face Hub, as far as core needs it: files of repositories, by name.
//!
//! Core does not speak the Hub's protocol. A plugin does, and registers itself as [`HubPlugin`]; models, tokenizers,
//! datasets and published dictionaries all come through it.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::{bail, Result};

use crate::config::InputError;

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
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

/// Files of repositories: from the cache, or fetched into it.
pub trait Hub: Send + Sync {
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

    /// Files of that name at the root of a repository in the cache, whichever.
    fn cached(&self, name: &str) -> Vec<PathBuf>;
}

/// The plugin that speaks the Hub's protocol.
pub struct HubPlugin {
    /// Opens the Hub as the environment says (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, ...).
    pub open: fn() -> Result<Box<dyn Hub>>,
}

inventory::collect!(HubPlugin);

/// The Hub, as the environment says; opened once.
pub fn hub() -> Result<&'static dyn Hub> {
    static OPEN: OnceLock<Box<dyn Hub>> = OnceLock::new();
    if let Some(hub) = OPEN.get() {
        return Ok(&**hub);
    }
    match inventory::iter::<HubPlugin>.into_iter().next() {
        Some(plugin) => {
            let hub = (plugin.open)()?;
            Ok(&**OPEN.get_or_init(|| hub))
        }
        None => bail!(InputError::new("this program was built without access to the Hugging Face Hub")
            .help("give a local path instead, or add the plugin `hub` to Cargo.toml")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
