//! The Hugging Face Hub. Downloads files of models, datasets and published dictionaries into the cache that all Hugging
//! Face libraries share, or streams them. Uploads dictionaries.
//!
//! A run resolves each revision to a commit once, so that files used together come from one state of the repository.
//! Without the Hub, or with `HF_HUB_OFFLINE`, only the cache is used. A broken connection resumes at the byte where it
//! broke; requests to a busy Hub are retried after a pause.
//!
//! The environment variables are those of Hugging Face's own library: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN,
//! HF_TOKEN_PATH, HF_HUB_OFFLINE; SSL_CERT_FILE, SSL_CERT_DIR or REQUESTS_CA_BUNDLE for certificates to trust instead
//! of the system's; HTTPS_PROXY and NO_PROXY.

mod net;
mod reader;
mod trouble;
mod upload;

use std::collections::HashMap;
use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dictlearn_core::error::InputError;
use dictlearn_core::hub::{About, CommitMessage, Hub, HubError, HubPlugin, Repo, RepoKind, Upload};
use dictlearn_core::progress::Progress;
use dictlearn_core::tracing;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use ureq::http::Response;
use ureq::{Agent, Body};

use net::{expanded, variable};
use reader::Remote;
use trouble::{Failure, PATIENT, patiently};

inventory::submit! {
    HubPlugin {
        open: || Ok(Box::new(Client::from_environment()?)),
        open_cache: |cache| Ok(Box::new(Client::of_cache(cache.to_owned()))),
    }
}

/// The Hub's own address, which its answers use even through a mirror.
const PUBLIC: &str = "https://huggingface.co";
/// Timeout for connecting.
const CONNECT: Duration = Duration::from_secs(20);
/// Timeout for a silent connection.
const SILENCE: Duration = Duration::from_secs(60);
/// Timeout for the Hub to assemble a large file or make a commit.
const LONG: Duration = Duration::from_secs(600);
/// Characters to percent-encode in a segment of a file's URL.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A client of the Hub or, offline, of its cache.
#[derive(Clone)]
struct Client {
    agent: Agent,
    /// Folder of the cache.
    cache: PathBuf,
    endpoint: String,
    token: Option<String>,
    offline: bool,
    /// Repositories resolved in this run.
    snapshots: Arc<Mutex<HashMap<Repo, Arc<Snapshot>>>>,
    /// Commits that revisions must resolve to.
    pins: Arc<Mutex<HashMap<Repo, String>>>,
}

/// A repository at a commit.
struct Snapshot {
    commit: String,
    /// Paths of its files, sorted.
    files: Vec<String>,
    /// True if `files` come from the cache, not from the Hub.
    cached: bool,
}

/// Returns the path in the first of these environment variables that is set.
fn path_variable(names: &[&str]) -> Option<PathBuf> {
    variable(names).map(|(_, path)| expanded(&path))
}

/// Returns Hugging Face's folder, which holds the cache and the token.
fn home() -> Option<PathBuf> {
    let cache = || path_variable(&["XDG_CACHE_HOME"]).or_else(|| Some(env::home_dir()?.join(".cache")));
    path_variable(&["HF_HOME"]).or_else(|| Some(cache()?.join("huggingface")))
}

impl Client {
    fn from_environment() -> Result<Self> {
        let home = home().context("cannot find a folder for the Hub's cache: set HF_HOME")?;
        let cache = path_variable(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).unwrap_or_else(|| home.join("hub"));
        let value = |names: &[&str]| variable(names).map(|(_, value)| value);
        let endpoint = value(&["HF_ENDPOINT"]).unwrap_or_else(|| PUBLIC.to_owned());
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            bail!(
                InputError::new(format!("HF_ENDPOINT is `{endpoint}`, which is not an address"))
                    .help("set it to http://... or https://..., or unset it")
            );
        }
        let file = path_variable(&["HF_TOKEN_PATH"]).unwrap_or_else(|| home.join("token"));
        let token = value(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]).or_else(|| fs::read_to_string(file).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let offline = value(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
            .is_some_and(|value| ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str()));
        let agent = if offline { Agent::new_with_defaults() } else { net::agent()? };
        Ok(Client { agent, endpoint, token, offline, ..Client::of_cache(cache) })
    }

    /// Makes an offline client of a cache.
    fn of_cache(cache: PathBuf) -> Self {
        Client {
            agent: Agent::new_with_defaults(),
            cache,
            endpoint: PUBLIC.to_owned(),
            token: None,
            offline: true,
            snapshots: Arc::default(),
            pins: Arc::default(),
        }
    }

    /// Returns the repository's folder in the cache.
    fn folder(&self, repo: &Repo) -> PathBuf {
        let kind = if repo.kind == RepoKind::Dataset { "datasets" } else { "models" };
        self.cache.join(format!("{kind}--{}", repo.id.replace('/', "--")))
    }

    /// Returns the cache's path of a file at a commit, or of the commit's folder if `path` is empty.
    fn pointer(&self, repo: &Repo, commit: &str, path: &str) -> PathBuf {
        let files = self.folder(repo).join("snapshots").join(commit);
        if path.is_empty() { files } else { files.join(path) }
    }

    /// Returns the cache's file that maps the repository's revision to a commit.
    fn reference(&self, repo: &Repo) -> PathBuf {
        self.folder(repo).join("refs").join(&repo.revision)
    }

    /// Returns the URL of the repository's page.
    fn page(&self, repo: &Repo) -> String {
        let kind = if repo.kind == RepoKind::Dataset { "datasets/" } else { "" };
        format!("{}/{kind}{}", self.endpoint, repo.id)
    }

    /// Returns the URL of an API method for the repository's revision.
    fn api(&self, repo: &Repo, what: &str) -> String {
        let kind = if repo.kind == RepoKind::Dataset { "datasets" } else { "models" };
        format!("{}/api/{kind}/{}/{what}/{}", self.endpoint, repo.id, segment(&repo.revision))
    }

    /// Fetches the Hub's information about the repository at its revision.
    fn info(&self, repo: &Repo) -> Result<Value, Failure> {
        Ok(self.get(&self.api(repo, "revision"), 0)?.body_mut().read_json::<Value>()?)
    }

    /// Returns the repository with its revision replaced by the pinned commit, if any.
    fn pinned(&self, repo: &Repo) -> Repo {
        let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        let revision = pins.get(repo).unwrap_or(&repo.revision);
        Repo { revision: revision.clone(), ..repo.clone() }
    }

    /// Returns the snapshot of a repository and the cache's path of a file; `None` if the repository lacks the file.
    fn located(&self, repo: &Repo, path: &str) -> Result<Option<(Arc<Snapshot>, PathBuf)>> {
        let snapshot = self.snapshot(repo)?;
        if !snapshot.files.iter().any(|file| file == path) {
            return Ok(None);
        }
        let pointer = self.pointer(repo, &snapshot.commit, path);
        Ok(Some((snapshot, pointer)))
    }

    /// Returns the repository's files and commit, from the Hub or, if it does not answer, from the cache.
    fn snapshot(&self, repo: &Repo) -> Result<Arc<Snapshot>> {
        let mut known = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(snapshot) = known.get(repo) {
            return Ok(snapshot.clone());
        }
        let snapshot = Arc::new(self.look_up(repo)?);
        known.insert(repo.clone(), snapshot.clone());
        Ok(snapshot)
    }

    fn look_up(&self, repo: &Repo) -> Result<Snapshot> {
        let kind = repo.kind;
        let cached = self.cached(repo);
        if self.offline {
            return cached.ok_or_else(|| {
                InputError::new(format!("the {kind} `{repo}` is not in the Hub's cache, {}", self.cache.display()))
                    .help("unset HF_HUB_OFFLINE to download it")
                    .into()
            });
        }
        // With a cached copy, do not wait long for the Hub.
        let patience = if cached.is_some() { &PATIENT[..1] } else { &PATIENT };
        let info = patiently(patience, &format!("the {kind} `{repo}`"), || self.info(repo));
        let info = match (info, cached) {
            (Ok(info), _) => info,
            (Err(failure), Some(cached)) if failure.is_silence() => {
                tracing::warn!(
                    "the Hub does not answer for the {kind} `{repo}` ({failure}); using the cached commit {}",
                    cached.commit
                );
                return Ok(cached);
            }
            (Err(failure), _) => return Err(self.explain(repo, failure)),
        };
        let commit = info.get("sha").and_then(Value::as_str);
        let commit = commit.with_context(|| format!("the Hub returned no commit of the {kind} `{repo}`"))?;
        ensure!(commit.chars().all(|c| c.is_ascii_alphanumeric()), "the Hub returned an invalid commit, `{commit}`");
        let files = info.get("siblings").and_then(Value::as_array).into_iter().flatten();
        let mut files: Vec<String> = files
            .filter_map(|file| file.get("rfilename")?.as_str())
            .filter(|path| is_plain(path))
            .map(str::to_owned)
            .collect();
        files.sort();
        Ok(Snapshot { commit: commit.to_owned(), files, cached: false })
    }

    /// Returns the cached part of a repository; `None` if the cache has nothing of it.
    fn cached(&self, repo: &Repo) -> Option<Snapshot> {
        let commit = fs::read_to_string(self.reference(repo));
        let commit = commit.map_or_else(|_| repo.revision.clone(), |commit| commit.trim().to_owned());
        let root = self.pointer(repo, &commit, "");
        if !is_plain(&commit) || !root.is_dir() {
            return None;
        }
        let mut files = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for path in fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())) {
                if path.is_dir() {
                    folders.push(path);
                } else if let (true, Some(path)) = (path.exists(), path.strip_prefix(&root).ok().and_then(Path::to_str))
                {
                    files.push(path.to_owned());
                }
            }
        }
        files.sort();
        Some(Snapshot { commit, files, cached: true })
    }

    /// Returns the error for a repository that cannot be read.
    fn explain(&self, repo: &Repo, failure: Failure) -> anyhow::Error {
        let kind = repo.kind;
        let login = match self.token.is_some() {
            true => "with the account of your token",
            false => "then set HF_TOKEN to a token of that account (or run `hf auth login`)",
        };
        let error = match (failure.status(), failure.code()) {
            (Some(401 | 403), "GatedRepo") => {
                InputError::new(format!("the {kind} `{repo}` is gated: you must accept its terms to read it"))
                    .help(format!("accept them at {}, {login}", self.page(repo)))
            }
            (Some(404), "RevisionNotFound") => {
                InputError::new(format!("the {kind} `{}` has no revision `{}`", repo.id, repo.revision))
                    .help(format!("its revisions are listed at {}/tree/main", self.page(repo)))
            }
            // The Hub does not reveal private repositories.
            (Some(404), _) | (Some(401), "RepoNotFound") => {
                let token = match self.token.is_some() {
                    true => "and whether your token may read it",
                    false => "or set HF_TOKEN to read a private one",
                };
                // A model's name is first tried as a folder.
                let folder = if kind == RepoKind::Model { "; there is no folder of that name" } else { "" };
                InputError::new(format!("the Hub has no {kind} `{}`, or it is private", repo.id))
                    .help(format!("check the name, {token}{folder}"))
            }
            (Some(401), _) if self.token.is_some() => {
                InputError::new(format!("the Hub does not accept your token: {failure}"))
                    .help("create a new token on the Hub, and set HF_TOKEN or run `hf auth login`")
            }
            (Some(401 | 403), _) => InputError::new(format!("you have no access to the {kind} `{repo}`: {failure}"))
                .help(format!("request access at {}, {login}", self.page(repo))),
            (Some(429), _) => {
                let help = if self.token.is_some() { "" } else { ", or set HF_TOKEN: a token raises the limit" };
                let message = format!("the Hub's rate limit is exceeded ({failure}): wait a few minutes{help}");
                return HubError(message).into();
            }
            (None, trouble::CERTIFICATE) => {
                InputError::new(format!("the certificate of {} is not trusted: {failure}", self.endpoint))
                    .help(net::certificate_help())
            }
            _ => {
                let folder = if kind == RepoKind::Model { ", and there is no folder of that name" } else { "" };
                return HubError(format!(
                    "cannot read the {kind} `{repo}` from the Hub at {}: {failure}; it is not in the cache, {}{folder}",
                    self.endpoint,
                    self.cache.display()
                ))
                .into();
            }
        };
        error.into()
    }

    /// Streams a file from byte `from` on. Also returns its version (etag).
    fn remote(&self, repo: &Repo, commit: &str, path: &str, from: u64) -> Result<(Remote, String)> {
        let segments: Vec<String> = path.split('/').map(segment).collect();
        let url = format!("{}/resolve/{}/{}", self.page(repo), segment(commit), segments.join("/"));
        let what = format!("{path} of `{repo}`");
        let about = patiently(&PATIENT, &what, || self.about(&url));
        let (size, etag) = about.map_err(|failure| self.explain_file(repo, failure))?;
        let client = self.clone();
        let open = move |from: u64| {
            let response = client.get(&url, from)?;
            let skip = if response.status() == 206 { 0 } else { from };
            let mut body = response.into_body().into_reader();
            // A server that ignores the range sends the whole file: skip its beginning.
            std::io::copy(&mut body.by_ref().take(skip), &mut std::io::sink())?;
            Ok(Box::new(body) as Box<dyn Read + Send>)
        };
        Ok((Remote::new(what, size, from, open), etag))
    }

    /// Returns the size and version (etag) of a file.
    fn about(&self, url: &str) -> Result<(u64, String), Failure> {
        // For a large file they are in the Hub's redirection; for others, in the final response.
        let is_linked = |response: &Response<Body>| response.headers().contains_key("x-linked-etag");
        let mut response = self.follow(url, Some("bytes=0-0"), is_linked)?;
        // An empty file has no first byte.
        if response.status() == 416 {
            response = self.follow(url, None, is_linked)?;
        }
        if !response.status().is_redirection() {
            response = Failure::check(response)?;
        }
        let header = |name: &str| response.headers().get(name)?.to_str().ok();
        let range = || header("content-range")?.rsplit_once('/').map(|(_, size)| size);
        let whole = || header("content-length").filter(|_| response.status() == 200);
        let size = header("x-linked-size").or_else(range).or_else(whole).and_then(|size| size.parse().ok());
        let etag = header("x-linked-etag").or_else(|| header("etag"));
        match (size, etag) {
            (Some(size), Some(etag)) => Ok((size, etag.trim_start_matches("W/").replace('"', ""))),
            _ => Err(Failure::lasting(format!("the response from {url} lacks the file's size or version"))),
        }
    }

    /// Returns the error for a file that cannot be read. Refusals of files give no reason, so this asks for the
    /// repository.
    fn explain_file(&self, repo: &Repo, failure: Failure) -> anyhow::Error {
        if !matches!(failure.status(), Some(401 | 403)) {
            return self.explain(repo, failure);
        }
        // The information about a gated repository is public.
        let gated = Failure::refused(failure.status(), "GatedRepo");
        match self.info(repo) {
            Ok(info) if info.get("gated").is_none_or(|gated| *gated == Value::Bool(false)) => {
                self.explain(repo, failure)
            }
            Ok(_) => self.explain(repo, gated),
            Err(refused) => self.explain(repo, refused),
        }
    }

    /// Downloads a file into the cache, resuming a partial download.
    fn fetch(&self, repo: &Repo, commit: &str, path: &str) -> Result<PathBuf> {
        let (mut remote, etag) = self.remote(repo, commit, path, 0)?;
        ensure!(is_plain(&etag), "the Hub returned an invalid version of {path}, `{etag}`");
        let (blob, pointer) = (self.folder(repo).join("blobs").join(&etag), self.pointer(repo, commit, path));
        let made =
            |at: &Path, done: std::io::Result<()>| done.with_context(|| format!("cannot write {}", at.display()));
        for file in [&blob, &pointer] {
            let folder = file.parent().context("a file of the cache lies in a folder")?;
            made(folder, fs::create_dir_all(folder))?;
        }
        // The lock lets concurrent programs download the file only once. It is released when the file is closed.
        let lock = blob.with_extension("lock");
        let lock = File::create(&lock).with_context(|| format!("cannot write {}", lock.display()))?;
        if lock.try_lock().is_err() {
            tracing::info!("waiting for another program that is downloading {path} of `{repo}`");
            lock.lock().context("cannot wait for the other program")?;
        }
        if !blob.exists() {
            let part = blob.with_extension("incomplete");
            made(&part, self.fetch_to(&part, path, &mut remote))?;
            made(&blob, fs::rename(&part, &blob))?;
        }
        let _ = fs::remove_file(blob.with_extension("lock"));
        // Remove a dangling pointer, whose blob was deleted.
        if !pointer.exists() {
            let _ = fs::remove_file(&pointer);
            made(&pointer, point(&pointer, &blob, Path::new(path)))?;
        }
        if repo.revision != commit {
            let reference = self.reference(repo);
            let folder = reference.parent().context("a file of the cache lies in a folder")?;
            made(&reference, fs::create_dir_all(folder).and_then(|()| fs::write(&reference, commit)))?;
        }
        Ok(pointer)
    }

    /// Appends the missing bytes to a partial download.
    fn fetch_to(&self, part: &Path, path: &str, remote: &mut Remote) -> std::io::Result<()> {
        let mut file = OpenOptions::new().append(true).create(true).open(part)?;
        let mut there = file.metadata()?.len();
        if there > remote.size() {
            file.set_len(0)?;
            there = 0;
        }
        remote.skip_to(there);
        let mut progress = Progress::of_bytes(path, there, remote.size());
        let mut bytes = vec![0; 1 << 16];
        loop {
            match remote.read(&mut bytes)? {
                0 => break,
                count => file.write_all(&bytes[..count])?,
            }
            progress.step(remote.position(), 0);
        }
        progress.finish();
        file.sync_all()
    }
}

/// Links a snapshot's file to its blob, as Hugging Face's own library does. `path` is the file's path in the snapshot.
fn point(pointer: &Path, blob: &Path, path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        // Up through the file's folders, the commit and `snapshots`.
        let up: PathBuf = std::iter::repeat_n("..", path.components().count() + 1).collect();
        let blob = blob.strip_prefix(blob.parent().and_then(Path::parent).unwrap_or(blob)).unwrap_or(blob);
        std::os::unix::fs::symlink(up.join(blob), pointer)
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        fs::copy(blob, pointer).map(|_| ())
    }
}

/// Percent-encodes a segment of a URL's path.
fn segment(text: &str) -> String {
    utf8_percent_encode(text, SEGMENT).to_string()
}

/// True if a path is relative and has no `.` or `..`, so that it stays below any folder it is joined to.
fn is_plain(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

impl Hub for Client {
    fn about(&self) -> About {
        About {
            cache: self.cache.clone(),
            endpoint: self.endpoint.clone(),
            offline: self.offline,
            token: self.token.is_some(),
        }
    }

    fn file(&self, repo: &Repo, path: &str) -> Result<Option<PathBuf>> {
        let repo = &self.pinned(repo);
        let Some((snapshot, pointer)) = self.located(repo, path)? else { return Ok(None) };
        if pointer.exists() {
            return Ok(Some(pointer));
        }
        ensure!(!snapshot.cached, "{} was deleted from the Hub's cache", pointer.display());
        self.fetch(repo, &snapshot.commit, path).map(Some)
    }

    fn stream(&self, repo: &Repo, path: &str) -> Result<Option<Box<dyn Read + Send>>> {
        let repo = &self.pinned(repo);
        let Some((snapshot, pointer)) = self.located(repo, path)? else { return Ok(None) };
        if pointer.exists() {
            let file = File::open(&pointer).with_context(|| format!("cannot read {}", pointer.display()))?;
            return Ok(Some(Box::new(file)));
        }
        Ok(Some(Box::new(self.remote(repo, &snapshot.commit, path, 0)?.0)))
    }

    fn list(&self, repo: &Repo) -> Result<Vec<String>> {
        Ok(self.snapshot(&self.pinned(repo))?.files.clone())
    }

    fn commit(&self, repo: &Repo) -> Result<String> {
        Ok(self.snapshot(&self.pinned(repo))?.commit.clone())
    }

    fn commits(&self) -> Vec<(Repo, String)> {
        let known = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        let read = known.iter().map(|(repo, snapshot)| (repo.clone(), snapshot.commit.clone()));
        let pinned = pins.iter().map(|(repo, commit)| (repo.clone(), commit.clone()));
        let mut all: Vec<_> = read.filter(|(repo, commit)| repo.revision != *commit).chain(pinned).collect();
        all.sort_by(|(one, _), (other, _)| one.cmp(other));
        all
    }

    fn pin(&self, repo: &Repo, commit: &str) {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner).insert(repo.clone(), commit.to_owned());
    }

    fn cached(&self, name: &str) -> Vec<PathBuf> {
        let inside = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let snapshots = inside(self.cache.clone()).flat_map(|repo| inside(repo.join("snapshots")));
        snapshots.map(|snapshot| snapshot.join(name)).filter(|file| file.is_file()).collect()
    }

    fn before_upload(&self, repo: &Repo) -> Result<Option<Vec<String>>> {
        self.paths_now(repo)
    }

    fn upload(&self, repo: &Repo, files: &[Upload], message: &CommitMessage, private: bool) -> Result<String> {
        self.send(repo, files, message, private)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_leave_their_folder_are_not_plain() {
        for path in ["", "..", "../a", "a/../../b", "/a", "."] {
            assert!(!is_plain(path), "{path}");
        }
        assert!(is_plain("data/train-0.parquet"));
    }

    #[test]
    fn an_unreachable_hub_is_a_hub_error() {
        let dir = tempfile::tempdir().unwrap();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let endpoint = format!("http://{closed}");
        let client = Client { endpoint, offline: false, ..Client::of_cache(dir.path().to_owned()) };
        let repo = Repo::parse(RepoKind::Model, "owner/name").unwrap();
        let error = client.file(&repo, "config.json").unwrap_err();
        assert!(error.chain().any(|cause| cause.is::<HubError>()), "{error:#}");
    }
}
