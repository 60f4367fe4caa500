//! The place of a published SAE's files: a local folder or a Hub repository.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::{Map, Value};

use crate::error::InputError;
use crate::files;
use crate::hub::{Repo, RepoKind, hub};

/// A user's request to a format.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// A folder, a file, `owner/name/path` on the Hub, or a name that the format knows.
    pub place: Option<String>,
    /// A name, or a glob of names, in the format's own set of published SAEs.
    pub pretrained: Option<String>,
    /// Path of sae_lens's table of releases.
    pub releases: Option<String>,
}

impl Request {
    /// Returns the place, which most formats need.
    pub fn named(&self) -> Result<&str> {
        match (&self.place, &self.pretrained) {
            (Some(place), None) => Ok(place),
            (_, Some(_)) => bail!(
                InputError::new("this format has no set of published SAEs for `--pretrained`")
                    .help("name a folder or a Hub repository")
            ),
            (None, None) => bail!(
                InputError::new("there is nothing to import").help("give a folder, or `owner/name/path` on the Hub")
            ),
        }
    }
}

/// The place of an SAE's files: a path in a local folder or in a Hub repository.
#[derive(Debug, Clone)]
pub struct Place {
    /// Name of the SAE: its path, or the name in the request.
    pub name: String,
    root: Root,
    /// Path below the root, its parts joined by `/`; empty for the root itself.
    path: String,
    /// Further entries for it in a table of releases.
    pub table: Map<String, Value>,
    /// Format of the files, if a table names another than the requested one.
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
    /// Parses the path of an existing folder or file, or `owner/name[@revision][/path]` on the Hub.
    pub fn parse(text: &str) -> Result<Self> {
        let local = Path::new(text);
        if local.exists() {
            return Place::local(local);
        }
        let parts: Vec<&str> = text.split('/').collect();
        // A text that starts with an existing folder means a local path.
        if parts.len() > 1 && !parts[0].is_empty() && Path::new(parts[0]).is_dir() || text.starts_with('/') {
            bail!(InputError::new(format!("{text} does not exist")).help("check the path"));
        }
        if !local.is_absolute()
            && parts.len() >= 2
            && !parts.iter().any(|part| ["", ".", ".."].contains(part))
            && let Some(repo) = Repo::parse(RepoKind::Model, &parts[..2].join("/"))
        {
            return Ok(Place::on_hub(repo, &parts[2..].join("/")));
        }
        bail!(
            InputError::new(format!("`{text}` is not a local folder and cannot be a Hub repository"))
                .help("give a folder, or `owner/name[@revision]/path` on the Hub")
        )
    }

    /// Returns the place of a local folder or file.
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

    /// Returns the place at a path in a Hub repository. An empty path is the repository itself.
    pub fn on_hub(repo: Repo, path: &str) -> Self {
        let name = if path.is_empty() { repo.id.clone() } else { format!("{}/{path}", repo.id) };
        Place { name, root: Root::Hub(repo), path: path.to_owned(), table: Map::new(), format: None }
    }

    /// Returns the place at a path below this one.
    pub fn below(&self, path: &str) -> Self {
        let path = if self.path.is_empty() { path.to_owned() } else { format!("{}/{path}", self.path) };
        let name = match &self.root {
            Root::Hub(repo) => format!("{}/{path}", repo.id),
            Root::Folder(_) => path.clone(),
        };
        Place { name, root: self.root.clone(), path, ..self.clone() }
    }

    /// Returns the place that contains this one, or `None` for a whole repository.
    pub fn above(&self) -> Option<Self> {
        if self.path.is_empty() {
            let Root::Folder(folder) = &self.root else { return None };
            return folder.parent().and_then(|folder| Place::local(folder).ok());
        }
        let path = self.path.rsplit_once('/').map_or("", |(above, _)| above).to_owned();
        Some(Place { path, ..self.clone() })
    }

    /// Returns the repository, if the place is on the Hub.
    pub fn repo(&self) -> Option<&Repo> {
        match &self.root {
            Root::Hub(repo) => Some(repo),
            Root::Folder(_) => None,
        }
    }

    /// Returns the full path, from the repository's name or the file system's root. Formats read layers and widths from
    /// it.
    pub fn words(&self) -> String {
        match &self.root {
            Root::Hub(repo) => format!("{}/{}", repo.id, self.path),
            Root::Folder(folder) => format!("{}/{}", folder.display(), self.path),
        }
    }

    /// Returns a file below the place (the place itself if `name` is empty), downloaded if necessary. `None` if there
    /// is no such file.
    pub fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        let path = [self.path.as_str(), name].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
        match &self.root {
            // A place that is one of an SAE's files stands for its folder.
            Root::Folder(folder) if !name.is_empty() && folder.join(&self.path).is_file() => {
                let beside = folder.join(&self.path).with_file_name(name);
                Ok(Some(beside).filter(|path| path.is_file()))
            }
            Root::Folder(folder) => Ok(Some(folder.join(path)).filter(|path| path.is_file())),
            Root::Hub(repo) => hub()?.file(repo, &path),
        }
    }

    /// Returns a file below the place, or an error that suggests where it is.
    pub fn need(&self, name: &str) -> Result<PathBuf> {
        if let Some(file) = self.file(name)? {
            return Ok(file);
        }
        let files = self.files().unwrap_or_default();
        let mut folders: Vec<&str> = files.iter().filter_map(|file| file.strip_suffix(&format!("/{name}"))).collect();
        folders.sort_by_key(|folder| folder.len());
        let error = InputError::new(match name {
            "" => format!("there is no file {self}"),
            _ => format!("{self} has no {name}"),
        });
        bail!(if folders.is_empty() {
            let shown: Vec<&str> = files.iter().take(8).map(String::as_str).collect();
            error.help(match shown.is_empty() {
                true => "it has no files; check the name".to_owned(),
                false => format!("it has: {}{}", shown.join(", "), if files.len() > 8 { ", ..." } else { "" }),
            })
        } else {
            let more = if folders.len() > 12 { ", ..." } else { "" };
            folders.truncate(12);
            error.help(format!("name one of its folders that has one: {}{more}", folders.join(", ")))
        })
    }

    /// Reads a JSON file below the place. Fails as [`Place::need`] does.
    pub fn json(&self, name: &str) -> Result<Value> {
        files::read_json(&self.need(name)?)
    }

    /// Returns the sorted paths of all files below the place, relative to it.
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

/// Collects the files of a folder and its subfolders.
fn collect(folder: &Path, prefix: &str, depth: usize, found: &mut Vec<String>) {
    /// Published sets nest layer, width and sparsity at most. A limit keeps a home folder from being searched.
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

/// Parses a glob of names in which `*` also matches `/`.
pub fn glob(text: &str) -> Result<glob::Pattern> {
    glob::Pattern::new(text).map_err(|error| InputError::new(format!("`{text}` is not a valid glob: {error}")).into())
}
