//! Uploads files to the Hub: first large files into its store, then one commit of all files.
//!
//! The Hub decides which files are large. It identifies them by SHA-256, and files already in the store are not sent
//! again. Uploaded files are invisible until the commit. An upload that fails before it leaves at most a new empty
//! repository or branch.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::sync::PoisonError;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dictlearn_core::error::InputError;
use dictlearn_core::hub::{CommitMessage, Content, HubError, Repo, Upload};
use dictlearn_core::interrupt::{self, Interrupted};
use dictlearn_core::progress::Progress;
use dictlearn_core::tracing;
use serde_json::{Map, Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::Response;
use ureq::{Body, SendBody};

use crate::trouble::{self, Failure, PATIENT, patiently};
use crate::{Client, PUBLIC};

/// Bytes of a file's beginning that the Hub inspects to decide whether it is large.
const SAMPLE: u64 = 512;
/// Maximum number of files in one request.
const AT_ONCE: usize = 256;
/// Content type of requests to the store of large files.
const LFS: &str = "application/vnd.git-lfs+json";

/// A file to upload.
struct Pending<'a> {
    file: &'a Upload,
    size: u64,
    /// True if it goes into the store of large files.
    large: bool,
    /// SHA-256 of a large file, git's blob hash of any other.
    oid: String,
    /// True if the branch already has the file with this content.
    unchanged: bool,
}

/// The Hub's answer about a file before it is sent.
struct Mode {
    large: bool,
    ignored: bool,
    /// Hash of the file on the branch.
    oid: Option<String>,
}

/// Reader of a range of a file's bytes that are being sent.
struct Sending<'a> {
    from: Box<dyn Read>,
    left: u64,
    /// Bytes sent of the whole file.
    done: u64,
    progress: &'a mut Progress,
    /// Why sending stopped early, if the cause is local.
    broken: Option<Failure>,
}

impl Read for Sending<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let wanted = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if wanted == 0 {
            return Ok(0);
        }
        let read = match interrupt::asked() {
            true => Err(Failure::interrupted()),
            false => match self.from.read(&mut bytes[..wanted]) {
                Ok(0) => Err(Failure::lasting("the file was truncated during the upload")),
                Ok(count) => Ok(count),
                Err(error) => Err(Failure::lasting(error.to_string())),
            },
        };
        match read {
            Ok(count) => {
                self.left -= count as u64;
                self.done += count as u64;
                self.progress.step(self.done, 0);
                Ok(count)
            }
            Err(failure) => {
                let error = io::Error::other(failure.to_string());
                self.broken = Some(failure);
                Err(error)
            }
        }
    }
}

/// Opens a file at byte `from`.
fn open(content: &Content, from: u64) -> io::Result<Box<dyn Read>> {
    Ok(match content {
        Content::Bytes(bytes) => {
            let mut bytes = Cursor::new(bytes.clone());
            bytes.set_position(from);
            Box::new(bytes)
        }
        Content::File(path) => {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(from))?;
            Box::new(file)
        }
    })
}

fn size(content: &Content) -> io::Result<u64> {
    Ok(match content {
        Content::Bytes(bytes) => bytes.len() as u64,
        Content::File(path) => path.metadata()?.len(),
    })
}

/// Returns where a file is, for messages.
fn place(file: &Upload) -> String {
    match &file.content {
        Content::Bytes(_) => file.path.clone(),
        Content::File(path) => path.display().to_string(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the hash of `head` followed by the file's bytes, in hex.
fn hash<D: Digest>(content: &Content, head: &str) -> Result<String> {
    let mut from = open(content, 0)?;
    let mut hash = D::new_with_prefix(head);
    let mut bytes = vec![0; 1 << 16];
    loop {
        interrupt::check()?;
        match from.read(&mut bytes)? {
            0 => break,
            count => hash.update(&bytes[..count]),
        }
    }
    Ok(hex(&hash.finalize()))
}

fn json_of(mut response: Response<Body>) -> Result<Value, Failure> {
    Ok(response.body_mut().read_json::<Value>()?)
}

/// Retries transient failures, unless the user interrupts.
fn persist<T>(what: &str, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    patiently(&PATIENT, what, || match interrupt::asked() {
        true => Err(Failure::interrupted()),
        false => attempt(),
    })
}

impl Client {
    /// See [`dictlearn_core::hub::Hub::before_upload`].
    pub(crate) fn paths_now(&self, repo: &Repo) -> Result<Option<Vec<String>>> {
        self.may_upload()?;
        let Some(info) = self.info_now(repo, &repo.revision)? else { return Ok(None) };
        let files = info.get("siblings").and_then(Value::as_array).into_iter().flatten();
        Ok(Some(files.filter_map(|file| Some(file.get("rfilename")?.as_str()?.to_owned())).collect()))
    }

    /// See [`dictlearn_core::hub::Hub::upload`].
    pub(crate) fn send(&self, repo: &Repo, files: &[Upload], message: &CommitMessage, private: bool) -> Result<String> {
        self.may_upload()?;
        let mut pending = Vec::new();
        for file in files {
            let size = size(&file.content).with_context(|| format!("cannot read {}", place(file)))?;
            pending.push(Pending { file, size, large: false, oid: String::new(), unchanged: false });
        }
        let asked = repo;
        let repo = &self.ready(repo, private)?;
        self.check_card(repo, files)?;
        let refused = |failure| self.explain_upload(repo, failure);
        let modes = self.modes(repo, &pending).map_err(refused)?;
        pending.retain(|one| {
            let ignored = modes.get(&one.file.path).is_some_and(|mode| mode.ignored);
            if ignored {
                tracing::warn!("skipping {}: the repository's .gitignore excludes it", one.file.path);
            }
            !ignored
        });
        for one in &mut pending {
            let mode = modes.get(&one.file.path).with_context(|| strange(&format!("nothing of {}", one.file.path)))?;
            // The store does not accept empty files.
            one.large = mode.large && one.size > 0;
            let content = &one.file.content;
            let oid = match one.large {
                true => hash::<Sha256>(content, ""),
                false => hash::<Sha1>(content, &format!("blob {}\0", one.size)),
            };
            one.oid = oid.with_context(|| format!("cannot read {}", place(one.file)))?;
            one.unchanged = mode.oid.as_ref() == Some(&one.oid);
        }
        let unchanged = pending.iter().filter(|one| one.unchanged).count();
        if unchanged == pending.len() {
            tracing::info!("`{repo}` already has all files");
            return self.last_commit(repo).map_err(refused);
        }
        if unchanged > 0 {
            tracing::info!("{unchanged} of {} files are already uploaded", pending.len());
        }
        let large: Vec<&Pending> = pending.iter().filter(|one| one.large && !one.unchanged).collect();
        for some in large.chunks(AT_ONCE) {
            self.store(repo, some)?;
        }
        interrupt::check()?;
        let url = self.commit_to(repo, &pending, message).map_err(refused)?;
        // Snapshots resolved earlier are of the previous commit.
        let mut known = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|known, _| known.id != repo.id && known.id != asked.id);
        Ok(url)
    }

    /// Returns an error if an upload cannot succeed, before any request.
    fn may_upload(&self) -> Result<()> {
        if self.offline {
            bail!(InputError::new("cannot upload while HF_HUB_OFFLINE is set").help("unset it"));
        }
        if self.token.is_none() {
            bail!(InputError::new("uploads to the Hub need a token, but none is set").help(format!(
                "create one with the role `write` at {}/settings/tokens, and set HF_TOKEN or run `hf auth login`",
                self.endpoint
            )));
        }
        Ok(())
    }

    /// Sends a POST request, and returns any response. The token is sent only to the endpoint.
    fn ask(&self, url: &str, content_type: &str, body: &[u8]) -> Result<Response<Body>, Failure> {
        let mut request = self.agent.post(url).header("Content-Type", content_type);
        if content_type == LFS {
            request = request.header("Accept", LFS);
        }
        let own = url.strip_prefix(&self.endpoint).is_some_and(|rest| rest.starts_with('/'));
        if let (true, Some(token)) = (own, &self.token) {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let response = request.send(body)?;
        trouble::reached();
        Ok(response)
    }

    fn post(&self, url: &str, content_type: &str, body: &[u8]) -> Result<Response<Body>, Failure> {
        Failure::check(self.ask(url, content_type, body)?)
    }

    fn post_json(&self, url: &str, body: &Value) -> Result<Response<Body>, Failure> {
        self.post(url, "application/json", body.to_string().as_bytes())
    }

    /// Fetches the Hub's information about a repository at a revision; `None` if it does not exist.
    fn info_now(&self, repo: &Repo, revision: &str) -> Result<Option<Value>> {
        let at = Repo { revision: revision.to_owned(), ..repo.clone() };
        let info = persist(&format!("the {} `{repo}`", repo.kind), || self.info(&at));
        match info {
            Ok(info) => Ok(Some(info)),
            Err(failure) => match (failure.status(), failure.code()) {
                (Some(404), _) | (Some(401), "RepoNotFound") => Ok(None),
                _ => Err(self.explain_upload(repo, failure)),
            },
        }
    }

    /// Creates the repository and its branch if necessary. Returns the repository with its current name.
    fn ready(&self, repo: &Repo, private: bool) -> Result<Repo> {
        let main = "main";
        let (info, made) = match self.info_now(repo, main)? {
            Some(info) => (Some(info), false),
            None => {
                self.create(repo, private)?;
                (self.info_now(repo, main)?, true)
            }
        };
        let kind = repo.kind;
        let info = info.with_context(|| format!("the Hub does not list the {kind} `{}` that it created", repo.id))?;
        if private && info.get("private") != Some(&Value::Bool(true)) {
            ensure!(!made, "the Hub created the {kind} `{}` as public; nothing was uploaded", repo.id);
            bail!(
                InputError::new(format!("the {kind} `{}` already exists and is public", repo.id))
                    .help(format!("make it private at {}/settings, or remove `--private`", self.page(repo)))
            );
        }
        let mut repo = repo.clone();
        // A renamed repository can be read by its old name, but not written.
        let now = info.get("id").and_then(Value::as_str).filter(|now| Repo::parse(kind, now).is_some());
        if let Some(now) = now.filter(|now| *now != repo.id) {
            tracing::info!("`{}` was renamed to `{now}`", repo.id);
            now.clone_into(&mut repo.id);
        }
        if repo.revision != main && self.info_now(&repo, &repo.revision)?.is_none() {
            let made = persist(&format!("the branch of `{repo}`"), || {
                match self.post_json(&self.api(&repo, "branch"), &json!({})) {
                    Err(failure) if failure.status() == Some(409) => Ok(()),
                    other => other.map(drop),
                }
            });
            made.map_err(|failure| self.explain_upload(&repo, failure))?;
            tracing::info!("created in `{}` the branch {}", repo.id, repo.revision);
        }
        Ok(repo)
    }

    fn create(&self, repo: &Repo, private: bool) -> Result<()> {
        let (owner, name) = match repo.id.split_once('/') {
            Some((owner, name)) => (Some(owner), name),
            None => (None, repo.id.as_str()),
        };
        let mut body = json!({"name": name, "organization": owner, "type": repo.kind.to_string()});
        if private {
            body["visibility"] = "private".into();
        }
        let made = persist(&format!("the {} `{}`", repo.kind, repo.id), || {
            match self.post_json(&format!("{}/api/repos/create", self.endpoint), &body) {
                // The Hub creates only one of a user's repositories at a time.
                Err(failure) if failure.to_string().contains("conflicting operation is in progress") => {
                    Err(failure.passing())
                }
                Err(failure) if failure.status() == Some(409) => Ok(false),
                other => other.map(|_| true),
            }
        });
        match made {
            Ok(true) => {
                tracing::info!("created the {} `{}`", repo.kind, repo.id);
                Ok(())
            }
            Ok(false) => Ok(()),
            Err(failure) => Err(self.explain_upload(repo, failure)),
        }
    }

    /// Asks the Hub to validate a model card's YAML header before anything is sent. An invalid one would fail the
    /// commit.
    fn check_card(&self, repo: &Repo, files: &[Upload]) -> Result<()> {
        let Some(card) = files.iter().find(|file| file.path == "README.md") else { return Ok(()) };
        let mut text = String::new();
        let read = open(&card.content, 0).and_then(|mut from| from.read_to_string(&mut text));
        if let Err(error) = read {
            bail!(InputError::new(format!("cannot read {}: {error}", place(card))));
        }
        let body = json!({"content": text, "repoType": repo.kind.to_string()}).to_string();
        let answer = persist("README.md", || {
            let response =
                self.ask(&format!("{}/api/validate-yaml", self.endpoint), "application/json", body.as_bytes())?;
            match response.status().as_u16() {
                400 => json_of(response),
                _ => Failure::check(response).map(|_| Value::Null),
            }
        });
        let answer = match answer {
            Ok(answer) => answer,
            // A mirror of the Hub may lack this method, and the commit checks the card again.
            Err(failure) if failure.status() == Some(404) => return Ok(()),
            Err(failure) => return Err(self.explain_upload(repo, failure)),
        };
        let errors = answer.get("errors").and_then(Value::as_array).into_iter().flatten();
        let errors: Vec<&str> = errors.filter_map(|error| error.get("message")?.as_str()).collect();
        if !answer.is_null() {
            bail!(
                InputError::new(format!("the Hub rejects the header of {}: {}", place(card), errors.join("; ")))
                    .help("correct the YAML between its `---` lines")
            );
        }
        Ok(())
    }

    /// Asks the Hub for the mode of each file, by path.
    fn modes(&self, repo: &Repo, pending: &[Pending]) -> Result<BTreeMap<String, Mode>, Failure> {
        let mut modes = BTreeMap::new();
        for some in pending.chunks(AT_ONCE) {
            let mut files = Vec::new();
            for one in some {
                let mut sample = Vec::new();
                let read = open(&one.file.content, 0).and_then(|from| from.take(SAMPLE).read_to_end(&mut sample));
                read.map_err(|error| Failure::lasting(format!("cannot read {}: {error}", place(one.file))))?;
                files.push(json!({"path": one.file.path, "sample": STANDARD.encode(&sample), "size": one.size}));
            }
            let body = json!({"files": files});
            let answer =
                persist(&format!("`{repo}`"), || json_of(self.post_json(&self.api(repo, "preupload"), &body)?))?;
            for file in answer.get("files").and_then(Value::as_array).into_iter().flatten() {
                let text = |key: &str| file.get(key).and_then(Value::as_str);
                let (Some(path), Some(mode)) = (text("path"), text("uploadMode")) else { continue };
                if !["lfs", "regular"].contains(&mode) {
                    return Err(Failure::lasting(strange(&format!("the mode `{mode}` of {path}"))));
                }
                let ignored = file.get("shouldIgnore") == Some(&Value::Bool(true));
                let mode = Mode { large: mode == "lfs", ignored, oid: text("oid").map(str::to_owned) };
                modes.insert(path.to_owned(), mode);
            }
        }
        Ok(modes)
    }

    /// Sends to the store the large files that it lacks.
    fn store(&self, repo: &Repo, large: &[&Pending]) -> Result<()> {
        // Files with the same content are one object.
        let objects: BTreeMap<&str, &Pending> = large.iter().map(|one| (one.oid.as_str(), *one)).collect();
        let body = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": objects.iter().map(|(oid, one)| json!({"oid": oid, "size": one.size})).collect::<Vec<_>>(),
            "hash_algo": "sha256",
            "ref": {"name": repo.revision},
        });
        let url = format!("{}.git/info/lfs/objects/batch", self.page(repo));
        let answer = persist(&format!("the store of `{repo}`"), || {
            json_of(self.post(&url, LFS, body.to_string().as_bytes())?)
        });
        let answer = answer.map_err(|failure| self.explain_upload(repo, failure))?;
        let answers = answer.get("objects").and_then(Value::as_array).with_context(|| strange("no objects"))?;
        for answer in answers {
            let oid = answer.get("oid").and_then(Value::as_str).unwrap_or_default();
            let one = objects.get(oid).with_context(|| strange(&format!("the object `{oid}`")))?;
            let path = &one.file.path;
            if let Some(error) = answer.get("error") {
                let why = error.get("message").and_then(Value::as_str).unwrap_or("no reason given");
                bail!(HubError(format!("the Hub's store rejects {path}: {why}")));
            }
            let Some(upload) = answer.pointer("/actions/upload") else {
                tracing::info!("{path} is already in the store");
                continue;
            };
            let sent = self.send_object(one, upload).and_then(|()| match answer.pointer("/actions/verify") {
                Some(verify) => self.verify(one, verify),
                None => Ok(()),
            });
            sent.map_err(|failure| match interrupt::asked() {
                true => anyhow::Error::new(Interrupted),
                false => HubError(format!("cannot upload {path}: {failure}; nothing was committed")).into(),
            })?;
        }
        Ok(())
    }

    /// Returns the URL of an action at the endpoint in use, because a mirror returns the Hub's own URL.
    fn address(&self, action: &Value) -> Result<String, Failure> {
        let href = action.get("href").and_then(Value::as_str);
        let href = href.ok_or_else(|| Failure::lasting(strange("an action without an address")))?;
        Ok(match href.strip_prefix(PUBLIC) {
            Some(rest) if rest.starts_with('/') => format!("{}{rest}", self.endpoint),
            _ => href.to_owned(),
        })
    }

    fn send_object(&self, one: &Pending, upload: &Value) -> Result<(), Failure> {
        let none = Map::new();
        let header = upload.get("header").and_then(Value::as_object).unwrap_or(&none);
        let address = self.address(upload)?;
        let mut progress = Progress::of_bytes(&one.file.path, 0, one.size);
        let Some(part) = header.get("chunk_size") else {
            self.put(one, &address, header, 0..one.size, &mut progress)?;
            progress.finish();
            return Ok(());
        };
        let part = part.as_u64().or_else(|| part.as_str()?.parse().ok()).filter(|part| *part > 0);
        let part = part.ok_or_else(|| Failure::lasting(strange("parts of no size")))?;
        let numbered = header.iter().filter_map(|(name, url)| Some((name.parse::<u64>().ok()?, url.as_str()?)));
        let addresses: BTreeMap<u64, &str> = numbered.collect();
        if addresses.len() as u64 != one.size.div_ceil(part) {
            return Err(Failure::lasting(strange(&format!("{} parts", addresses.len()))));
        }
        let mut parts = Vec::new();
        for (index, address) in addresses.into_values().enumerate() {
            let start = index as u64 * part;
            let response = self.put(one, address, &none, start..(start + part).min(one.size), &mut progress)?;
            let etag =
                response.headers().get("etag").and_then(|etag| etag.to_str().ok()).filter(|etag| !etag.is_empty());
            let etag = etag.ok_or_else(|| Failure::lasting(strange("a part without an etag")))?;
            parts.push(json!({"partNumber": index + 1, "etag": etag}));
        }
        progress.finish();
        let body = json!({"oid": one.oid, "parts": parts}).to_string();
        persist(&one.file.path, || self.post(&address, LFS, body.as_bytes()).map(drop))
    }

    /// Sends a range of a file's bytes in a PUT request, restarting the range on a transient failure.
    fn put(
        &self,
        one: &Pending,
        address: &str,
        header: &Map<String, Value>,
        range: std::ops::Range<u64>,
        progress: &mut Progress,
    ) -> Result<Response<Body>, Failure> {
        persist(&one.file.path, || {
            let from = open(&one.file.content, range.start);
            let from = from.map_err(|error| Failure::lasting(format!("cannot read {}: {error}", place(one.file))))?;
            let (left, done) = (range.end - range.start, range.start);
            let mut sending = Sending { from, left, done, progress, broken: None };
            let mut request = self.agent.put(address);
            for (name, value) in header.iter().filter_map(|(name, value)| Some((name, value.as_str()?))) {
                if !name.eq_ignore_ascii_case("content-length") && !name.eq_ignore_ascii_case("transfer-encoding") {
                    request = request.header(name, value);
                }
            }
            // Without a length, the body would be sent chunked, which the store does not accept.
            let request = request.header("Content-Length", left.to_string());
            let response = request.send(SendBody::from_reader(&mut sending));
            match (response, sending.broken) {
                (_, Some(broken)) => Err(broken),
                (response, None) => Failure::check(response?),
            }
        })
    }

    /// Asks the Hub to verify that the store has the file.
    fn verify(&self, one: &Pending, verify: &Value) -> Result<(), Failure> {
        let (address, body) = (self.address(verify)?, json!({"oid": one.oid, "size": one.size}));
        persist(&one.file.path, || self.post_json(&address, &body).map(drop))
    }

    /// Makes the commit. Returns its URL.
    fn commit_to(&self, repo: &Repo, pending: &[Pending], message: &CommitMessage) -> Result<String, Failure> {
        let head = json!({"summary": message.summary, "description": message.description});
        let mut body = json!({"key": "header", "value": head}).to_string() + "\n";
        for one in pending.iter().filter(|one| !one.unchanged) {
            let path = &one.file.path;
            let line = if one.large {
                let value = json!({"path": path, "algo": "sha256", "oid": one.oid, "size": one.size});
                json!({"key": "lfsFile", "value": value})
            } else {
                let mut content = Vec::new();
                let read = open(&one.file.content, 0).and_then(|mut from| from.read_to_end(&mut content));
                read.map_err(|error| Failure::lasting(format!("cannot read {}: {error}", place(one.file))))?;
                let value = json!({"content": STANDARD.encode(&content), "path": path, "encoding": "base64"});
                json!({"key": "file", "value": value})
            };
            body += &(line.to_string() + "\n");
        }
        let mut tried = false;
        persist(&format!("the commit to `{repo}`"), || {
            // The commit may have succeeded even if its response was lost.
            if std::mem::replace(&mut tried, true) {
                let modes = self.modes(repo, pending)?;
                let there =
                    |one: &Pending| modes.get(&one.file.path).is_some_and(|mode| mode.oid.as_ref() == Some(&one.oid));
                if pending.iter().all(there) {
                    return self.last_commit(repo);
                }
            }
            let answer = json_of(self.post(&self.api(repo, "commit"), "application/x-ndjson", body.as_bytes())?)?;
            let url = answer.get("commitUrl").and_then(Value::as_str);
            url.map(str::to_owned).ok_or_else(|| Failure::lasting(strange("no URL of the commit")))
        })
    }

    /// Returns the URL of a branch's last commit.
    fn last_commit(&self, repo: &Repo) -> Result<String, Failure> {
        let info = persist(&format!("`{repo}`"), || self.info(repo))?;
        let commit = info.get("sha").and_then(Value::as_str);
        let commit = commit.ok_or_else(|| Failure::lasting(strange("no commit")))?;
        Ok(format!("{}/commit/{commit}", self.page(repo)))
    }

    /// Returns the error for a failed upload.
    fn explain_upload(&self, repo: &Repo, failure: Failure) -> anyhow::Error {
        let kind = repo.kind;
        if interrupt::asked() {
            return Interrupted.into();
        }
        let error = match failure.status() {
            Some(401 | 403) if failure.status() == Some(403) || !failure.code().is_empty() => {
                InputError::new(format!("your token may not write to the {kind} `{}`: {failure}", repo.id)).help(
                    format!(
                        "check the name, or create a token with write access at {}/settings/tokens and set HF_TOKEN \
                     or run `hf auth login`",
                        self.endpoint
                    ),
                )
            }
            Some(404) => {
                InputError::new(format!("the Hub has no {kind} `{repo}` that your token may write to: {failure}"))
                    .help("check the name, the owner, and that your token has the role `write`")
            }
            Some(400 | 402 | 409 | 412 | 413 | 422) => {
                InputError::new(format!("the Hub rejects this upload to the {kind} `{repo}`: {failure}"))
                    .help("correct the problem and push again; nothing was committed")
            }
            Some(401 | 429) => return self.explain(repo, failure),
            _ => {
                let message = format!("cannot upload to the {kind} `{repo}` at {}: {failure}", self.endpoint);
                return HubError(message).into();
            }
        };
        error.into()
    }
}

/// Returns the message for an unexpected response.
fn strange(what: &str) -> String {
    format!("unexpected response from the Hub: {what}")
}
