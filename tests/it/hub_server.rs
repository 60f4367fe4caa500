//! A server on loopback that speaks as much of the Hub's protocol as reading needs, and fails on demand.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

/// The commit that `main` stands for in every repository.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong with the next request for a file's content.
pub enum Fault {
    /// This status, with a header.
    Status(u16, &'static str),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
}

#[derive(Default)]
struct Shared {
    /// Files by the repository's path in URLs (`owner/name`, `datasets/owner/name`), revision and name.
    files: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    gated: Vec<String>,
    faults: VecDeque<Fault>,
    /// Every request as `PATH range=... token=...`.
    log: Vec<String>,
}

/// The server; it ends with the test's process.
pub struct HubServer {
    pub endpoint: String,
    shared: Arc<Mutex<Shared>>,
}

impl HubServer {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (state, address) = (shared.clone(), endpoint.clone());
        thread::spawn(move || {
            for connection in listener.incoming() {
                let (state, address) = (state.clone(), address.clone());
                thread::spawn(move || {
                    let connection = connection.unwrap();
                    // A client that goes away early is no concern of the server's.
                    let _ = answer(&connection, &state, &address);
                    let _ = connection.shutdown(std::net::Shutdown::Write);
                });
            }
        });
        HubServer { endpoint, shared }
    }

    pub fn put(&self, repo: &str, file: &str, content: impl Into<Vec<u8>>) -> &Self {
        self.put_at(repo, "main", file, content)
    }

    pub fn put_at(&self, repo: &str, revision: &str, file: &str, content: impl Into<Vec<u8>>) -> &Self {
        let repo = format!("{repo}@{revision}");
        self.shared.lock().unwrap().files.entry(repo).or_default().insert(file.to_owned(), content.into());
        self
    }

    /// Every file of a folder.
    pub fn put_folder(&self, repo: &str, folder: &Path) -> &Self {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            self.put(repo, path.file_name().unwrap().to_str().unwrap(), std::fs::read(&path).unwrap());
        }
        self
    }

    /// Only the token `good` may read the repository's files from now on.
    pub fn gate(&self, repo: &str) -> &Self {
        self.shared.lock().unwrap().gated.push(repo.to_owned());
        self
    }

    pub fn fail(&self, faults: impl IntoIterator<Item = Fault>) -> &Self {
        self.shared.lock().unwrap().faults.extend(faults);
        self
    }

    /// Requests since the last call whose path contains this.
    pub fn log(&self, part: &str) -> Vec<String> {
        let log = std::mem::take(&mut self.shared.lock().unwrap().log);
        log.into_iter().filter(|line| line.contains(part)).collect()
    }
}

fn answer(connection: &TcpStream, shared: &Mutex<Shared>, endpoint: &str) -> std::io::Result<()> {
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(connection).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().replace("%2F", "/").replace("%20", " ");
    let (mut range, mut token) = (None, String::new());
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            None => break,
            Some((name, value)) if name.eq_ignore_ascii_case("range") => range = Some(value.to_owned()),
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                value.trim_start_matches("Bearer ").clone_into(&mut token);
            }
            _ => {}
        }
    }
    let mut shared = shared.lock().unwrap();
    shared.log.push(format!("{path} range={} token={token}", range.as_deref().unwrap_or("-")));
    let say = |status: u16, headers: &str, body: &[u8], length: usize| {
        let mut connection = connection;
        write!(connection, "HTTP/1.1 {status} -\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n")?;
        connection.write_all(body)
    };
    let refuse = |code: &str, message: &str| format!("X-Error-Code: {code}\r\nX-Error-Message: {message}\r\n");
    if token == "bad" {
        return say(401, "X-Error-Message: Invalid credentials in Authorization header\r\n", b"", 0);
    }
    // The content of large files comes from another place than the Hub, without the Hub's headers.
    let elsewhere = path.strip_prefix("/elsewhere");
    if let Some(path) = path.strip_prefix("/api") {
        let path = path.trim_start_matches("/models/").trim_start_matches('/');
        let (repo, revision) = path.split_once("/revision/").unwrap_or((path, "main"));
        if repo.ends_with("/private") && token != "good" {
            return say(401, &refuse("RepoNotFound", "Repository not found"), b"", 0);
        }
        let known = shared.files.keys().any(|known| known.split('@').next() == Some(repo));
        let revision = if revision == COMMIT { "main" } else { revision };
        let Some(files) = shared.files.get(&format!("{repo}@{revision}")) else {
            let code = if known { "RevisionNotFound" } else { "RepoNotFound" };
            return say(404, &refuse(code, "not found"), b"", 0);
        };
        let siblings: Vec<_> = files.keys().map(|file| json!({"rfilename": file})).collect();
        let gated = if shared.gated.iter().any(|gated| gated == repo) { json!("auto") } else { json!(false) };
        let sha = if revision == "main" { COMMIT.to_owned() } else { COMMIT.replace('0', "f") };
        let info = json!({"id": repo, "sha": sha, "siblings": siblings, "gated": gated}).to_string();
        return say(200, "Content-Type: application/json\r\n", info.as_bytes(), info.len());
    }
    let Some((repo, rest)) = elsewhere.unwrap_or(&path).trim_start_matches('/').split_once("/resolve/") else {
        return say(404, "", b"", 0);
    };
    if shared.gated.iter().any(|gated| gated == repo) && token != "good" && elsewhere.is_none() {
        return say(401, &refuse("GatedRepo", "Access to model is restricted"), b"", 0);
    }
    let found = shared.files.iter().find_map(|(at, files)| {
        let revision = at.strip_prefix(repo)?.strip_prefix('@')?;
        let commit = if revision == "main" { COMMIT.to_owned() } else { COMMIT.replace('0', "f") };
        let file = rest.strip_prefix(&commit).or_else(|| rest.strip_prefix(revision))?.strip_prefix('/')?;
        Some((commit, file.to_owned(), files.get(file)?.clone()))
    });
    let Some((commit, file, content)) = found else {
        return say(404, &refuse("EntryNotFound", "Entry not found"), b"", 0);
    };
    let (start, end) = range
        .as_deref()
        .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'))
        .map_or((0, content.len()), |(start, end)| {
            (start.parse().unwrap(), end.parse::<usize>().map_or(content.len(), |end| end + 1))
        });
    let etag = Sha256::digest(&content);
    let etag: String = etag.iter().map(|byte| format!("{byte:02x}")).collect();
    if file.ends_with(".safetensors") && elsewhere.is_none() {
        let to = format!(
            "Location: {endpoint}/elsewhere{path}\r\nX-Repo-Commit: {commit}\r\nX-Linked-Etag: \"{etag}\"\r\n\
             X-Linked-Size: {}\r\n",
            content.len()
        );
        return say(302, &to, b"", 0);
    }
    if range.is_some() && start >= content.len() {
        return say(416, "", b"", 0);
    }
    let mut headers = format!("ETag: \"{etag}\"\r\nX-Repo-Commit: {commit}\r\n");
    if range.is_some() {
        headers += &format!("Content-Range: bytes {start}-{}/{}\r\n", end - 1, content.len());
    }
    let status = if range.is_some() { 206 } else { 200 };
    let body = &content[start..end];
    // A request for the first byte asks for the headers.
    let fault = if range.as_deref() == Some("bytes=0-0") { None } else { shared.faults.pop_front() };
    match fault {
        Some(Fault::Status(status, header)) => say(status, &format!("{header}\r\n"), b"", 0),
        Some(Fault::Cut(at)) => say(status, &headers, &body[..at.min(body.len())], body.len()),
        None => say(status, &headers, body, body.len()),
    }
}
