//! A loopback server with the part of the Hub's protocol that reading and uploading need, and failures on demand.
//! Uploads need the token `good`; uploaded files can be read.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The commit of `main` in every repository until the first upload.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A failure of the next file download, or of an upload request.
#[derive(Clone)]
pub enum Fault {
    /// Responds with this status and header.
    Status(u16, &'static str),
    /// Closes the connection after this many bytes of the body.
    Cut(usize),
    /// Does what the request wants, and closes the connection without a response.
    Lost,
}

#[derive(Default)]
struct Shared {
    /// Files by `repo@revision` and name; `repo` is the path in URLs (`owner/name`, `datasets/owner/name`).
    files: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    gated: Vec<String>,
    faults: VecDeque<Fault>,
    /// Faults of requests with a body, by a part of their path.
    upload_faults: Vec<(String, Fault)>,
    /// Every request as `METHOD PATH range=... key=... token=...`.
    log: Vec<String>,
    /// Large files by SHA-256; their parts by SHA-256 and number.
    store: BTreeMap<String, Vec<u8>>,
    parts: BTreeMap<(String, usize), Vec<u8>>,
    /// Larger objects are uploaded in parts of this size.
    part_size: Option<usize>,
    private: BTreeSet<String>,
    /// The last commit of each `repo@branch` with uploads.
    heads: BTreeMap<String, String>,
    /// Commit messages, in order.
    commits: Vec<String>,
}

impl Shared {
    /// The commit of `repo@branch`.
    fn head(&self, at: &str) -> String {
        let main = at.ends_with("@main");
        let usual = || if main { COMMIT.to_owned() } else { COMMIT.replace('0', "f") };
        self.heads.get(at).cloned().unwrap_or_else(usual)
    }

    /// The `repo@branch` that a revision names.
    fn at(&self, repo: &str, revision: &str) -> Option<String> {
        let is = |at: &&String| {
            let branch = at.strip_prefix(repo).and_then(|rest| rest.strip_prefix('@'));
            branch.is_some_and(|branch| branch == revision || self.head(at) == revision)
        };
        self.files.keys().find(is).cloned()
    }

    fn knows(&self, repo: &str) -> bool {
        self.files.keys().any(|known| known.split('@').next() == Some(repo))
    }
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
                    // Clients may disconnect early.
                    let _ = answer(&connection, &state, &address);
                    let _ = connection.shutdown(std::net::Shutdown::Write);
                });
            }
        });
        HubServer { endpoint, shared }
    }

    /// A mirror that redirects every request to a path of its own, given without the host, and from there to this
    /// server.
    pub fn mirror(&self) -> Mirror {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mirror = Mirror { endpoint: format!("http://{}", listener.local_addr().unwrap()), log: Arc::default() };
        let (target, log) = (self.endpoint.clone(), mirror.log.clone());
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let mut lines = BufReader::new(&connection).lines().map_while(Result::ok);
                let first = lines.next().unwrap_or_default();
                let token = lines.take_while(|line| !line.is_empty()).find_map(|line| {
                    let (name, value) = line.split_once(": ")?;
                    name.eq_ignore_ascii_case("authorization").then(|| value.to_owned())
                });
                let path = first.split(' ').nth(1).unwrap_or_default();
                log.lock().unwrap().push(format!("{path} token={}", token.unwrap_or_default()));
                let to = match path.strip_prefix("/moved") {
                    Some(path) => format!("{target}{path}"),
                    None => format!("/moved{path}"),
                };
                let head = "HTTP/1.1 308 -\r\nConnection: close\r\nContent-Length: 0\r\n";
                let _ = write!(&connection, "{head}Location: {to}\r\n\r\n");
            }
        });
        mirror
    }

    /// A TLS address of the server, with the certificate of `tests/fixtures/tls`.
    pub fn tls(&self) -> String {
        use rustls::pki_types::pem::PemObject;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};
        let file = |name: &str| crate::common::fixture("tls").join(name);
        let chain = vec![CertificateDer::from_pem_file(file("server.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(file("server.key")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = Arc::new(config.with_no_client_auth().with_single_cert(chain, key).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, target) = (listener.local_addr().unwrap(), self.endpoint.replace("http://", ""));
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (config, target) = (config.clone(), target.clone());
                thread::spawn(move || {
                    // Clients that do not trust the certificate disconnect.
                    let _ = pass_on(
                        rustls::StreamOwned::new(rustls::ServerConnection::new(config).unwrap(), connection),
                        &target,
                    );
                });
            }
        });
        format!("https://{address}")
    }

    pub fn put(&self, repo: &str, file: &str, content: impl Into<Vec<u8>>) -> &Self {
        self.put_at(repo, "main", file, content)
    }

    pub fn put_at(&self, repo: &str, revision: &str, file: &str, content: impl Into<Vec<u8>>) -> &Self {
        let repo = format!("{repo}@{revision}");
        self.shared.lock().unwrap().files.entry(repo).or_default().insert(file.to_owned(), content.into());
        self
    }

    /// Commits a new version of a file; the old one stays at [`COMMIT`].
    pub fn replace(&self, repo: &str, file: &str, content: impl Into<Vec<u8>>) -> &Self {
        {
            let mut shared = self.shared.lock().unwrap();
            let before = shared.files[&format!("{repo}@main")].clone();
            shared.files.insert(format!("{repo}@before"), before);
            shared.heads.insert(format!("{repo}@before"), COMMIT.to_owned());
            shared.heads.insert(format!("{repo}@main"), COMMIT.replace('0', "e"));
        }
        self.put(repo, file, content)
    }

    /// Adds every file of a folder.
    pub fn put_folder(&self, repo: &str, folder: &Path) -> &Self {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            self.put(repo, path.file_name().unwrap().to_str().unwrap(), std::fs::read(&path).unwrap());
        }
        self
    }

    /// From now on, only the token `good` may read the repository's files.
    pub fn gate(&self, repo: &str) -> &Self {
        self.shared.lock().unwrap().gated.push(repo.to_owned());
        self
    }

    pub fn fail(&self, faults: impl IntoIterator<Item = Fault>) -> &Self {
        self.shared.lock().unwrap().faults.extend(faults);
        self
    }

    /// Fails the next request with a body whose path contains `part`. Faults of the same path apply in order.
    pub fn fail_upload(&self, part: &str, fault: Fault) -> &Self {
        self.shared.lock().unwrap().upload_faults.push((part.to_owned(), fault));
        self
    }

    /// From now on, large files above this size are uploaded in parts.
    pub fn split(&self, part_size: usize) -> &Self {
        self.shared.lock().unwrap().part_size = Some(part_size);
        self
    }

    /// Files of a repository at a branch, or `None` if it does not exist.
    pub fn files(&self, repo: &str, branch: &str) -> Option<BTreeMap<String, Vec<u8>>> {
        self.shared.lock().unwrap().files.get(&format!("{repo}@{branch}")).cloned()
    }

    /// Whether the repository is private.
    pub fn is_private(&self, repo: &str) -> bool {
        self.shared.lock().unwrap().private.contains(repo)
    }

    /// Commit messages so far.
    pub fn commits(&self) -> Vec<String> {
        self.shared.lock().unwrap().commits.clone()
    }

    /// Requests since the last call that contain `part`, as in [`Shared::log`].
    pub fn log(&self, part: &str) -> Vec<String> {
        let log = std::mem::take(&mut self.shared.lock().unwrap().log);
        log.into_iter().filter(|line| line.contains(part)).collect()
    }
}

/// A server that redirects every request.
pub struct Mirror {
    pub endpoint: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl Mirror {
    /// Every request as `PATH token=...`.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

/// Forwards a request without a body to the plain server, and its response back.
fn pass_on(mut client: rustls::StreamOwned<rustls::ServerConnection, TcpStream>, target: &str) -> std::io::Result<()> {
    let (mut request, mut byte) = (Vec::new(), [0]);
    while !request.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    let mut server = TcpStream::connect(target)?;
    server.write_all(&request)?;
    std::io::copy(&mut server, &mut client)?;
    client.conn.send_close_notify();
    client.flush()
}

fn answer(connection: &TcpStream, shared: &Mutex<Shared>, endpoint: &str) -> std::io::Result<()> {
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(connection);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let method = first.split(' ').next().unwrap_or_default();
    let path = first.split(' ').nth(1).unwrap_or_default().replace("%2F", "/").replace("%20", " ").replace("%2B", "+");
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            None => break,
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_owned()),
        };
    }
    let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
    let range = headers.get("range").cloned();
    let token = header("authorization").trim_start_matches("Bearer ").to_owned();
    let mut shared = shared.lock().unwrap();
    let (asked, key) = (range.as_deref().unwrap_or("-"), header("x-store-key"));
    shared.log.push(format!("{method} {path} range={asked} key={key} token={token}"));
    let say = |status: u16, headers: &str, body: &[u8], length: usize| {
        let mut connection = connection;
        write!(connection, "HTTP/1.1 {status} -\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n")?;
        connection.write_all(if method == "HEAD" { b"" } else { body })
    };
    let refuse = |code: &str, message: &str| format!("X-Error-Code: {code}\r\nX-Error-Message: {message}\r\n");
    if token == "bad" {
        return say(401, "X-Error-Message: Invalid credentials in Authorization header\r\n", b"", 0);
    }
    if !["GET", "HEAD"].contains(&method) {
        let fault = shared.upload_faults.iter().position(|(part, _)| path.contains(part));
        let fault = fault.map(|index| shared.upload_faults.remove(index).1);
        let length: usize = header("content-length").parse().expect("a body has a content-length");
        let mut body = vec![0; if let Some(Fault::Cut(at)) = fault { at.min(length) } else { length }];
        reader.read_exact(&mut body)?;
        match fault {
            Some(Fault::Cut(_)) => return connection.shutdown(std::net::Shutdown::Both),
            Some(Fault::Status(status, header)) => return say(status, header, b"", 0),
            Some(Fault::Lost) => {
                take(&mut shared, method, &path, &token, &headers, &body, endpoint);
                return connection.shutdown(std::net::Shutdown::Both);
            }
            None => {}
        }
        let (status, headers, body) = take(&mut shared, method, &path, &token, &headers, &body, endpoint);
        let body = body.to_string();
        return say(status, &format!("Content-Type: application/json\r\n{headers}"), body.as_bytes(), body.len());
    }
    // Large files come from another host, without the Hub's headers.
    let elsewhere = path.strip_prefix("/elsewhere");
    if let Some(path) = path.strip_prefix("/api") {
        let path = path.trim_start_matches("/models/").trim_start_matches('/');
        let (repo, revision) = path.split_once("/revision/").unwrap_or((path, "main"));
        if (repo.ends_with("/private") || shared.private.contains(repo)) && token != "good" {
            return say(401, &refuse("RepoNotFound", "Repository not found"), b"", 0);
        }
        let Some(at) = shared.at(repo, revision) else {
            let code = if shared.knows(repo) { "RevisionNotFound" } else { "RepoNotFound" };
            return say(404, &refuse(code, "not found"), b"", 0);
        };
        let files = &shared.files[&at];
        let siblings: Vec<_> = files.keys().map(|file| json!({"rfilename": file})).collect();
        let gated = if shared.gated.iter().any(|gated| gated == repo) { json!("auto") } else { json!(false) };
        let private = shared.private.contains(repo);
        let info =
            json!({"id": repo, "sha": shared.head(&at), "siblings": siblings, "gated": gated, "private": private});
        let info = info.to_string();
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
        let commit = shared.head(at);
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
    let etag = sha256(&content);
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
    // A request for the first byte only asks for headers.
    let fault = if range.as_deref() == Some("bytes=0-0") { None } else { shared.faults.pop_front() };
    match fault {
        Some(Fault::Status(status, header)) => say(status, &format!("{header}\r\n"), b"", 0),
        Some(Fault::Cut(at)) => say(status, &headers, &body[..at.min(body.len())], body.len()),
        None | Some(Fault::Lost) => say(status, &headers, body, body.len()),
    }
}

fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Git's object id of a file's content: SHA-1 of `blob LENGTH\0` and the content.
fn git_oid(content: &[u8]) -> String {
    let mut data = [format!("blob {}\0", content.len()).as_bytes(), content].concat();
    let bits = 8 * data.len() as u64;
    data.push(0x80);
    while data.len() % 64 != 56 {
        data.push(0);
    }
    data.extend_from_slice(&bits.to_be_bytes());
    let mut hash: [u32; 5] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    for chunk in data.chunks(64) {
        let mut w: Vec<u32> = chunk.chunks(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect();
        for i in 16..80 {
            w.push((w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16]).rotate_left(1));
        }
        let [mut a, mut b, mut c, mut d, mut e] = hash;
        for (i, word) in w.iter().enumerate() {
            let (f, k) = match i / 20 {
                0 => ((b & c) | (!b & d), 0x5a82_7999),
                1 => (b ^ c ^ d, 0x6ed9_eba1),
                2 => ((b & c) | (b & d) | (c & d), 0x8f1b_bcdc),
                _ => (b ^ c ^ d, 0xca62_c1d6_u32),
            };
            let next = a.rotate_left(5).wrapping_add(f).wrapping_add(e).wrapping_add(k).wrapping_add(*word);
            (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
        }
        for (sum, part) in hash.iter_mut().zip([a, b, c, d, e]) {
            *sum = sum.wrapping_add(part);
        }
    }
    hash.iter().map(|word| format!("{word:08x}")).collect()
}

fn base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let six = |c: u8| ALPHABET.iter().position(|a| *a == c).unwrap() as u32;
    let mut bytes = Vec::new();
    for group in text.trim_end_matches('=').as_bytes().chunks(4) {
        let bits = group.iter().fold(0, |bits, c| bits << 6 | six(*c)) << (6 * (4 - group.len()));
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    bytes
}

/// Whether a new repository's .gitattributes sends a file to the store.
fn is_large(path: &str) -> bool {
    [".safetensors", ".pt", ".bin"].iter().any(|end| path.ends_with(end))
}

type Answer = (u16, String, Value);

/// Handles a request with a body.
fn take(
    shared: &mut Shared,
    method: &str,
    path: &str,
    token: &str,
    headers: &BTreeMap<String, String>,
    body: &[u8],
    endpoint: &str,
) -> Answer {
    let refuse = |status: u16, code: &str, message: &str| {
        let code = if code.is_empty() { String::new() } else { format!("X-Error-Code: {code}\r\n") };
        (status, code, json!({"error": message}))
    };
    let fine = |answer: Value| (200, String::new(), answer);
    if let (Some(object), "PUT") = (path.strip_prefix("/store/"), method) {
        assert_eq!(token, "", "the store got the Hub's token");
        if let Some((oid, number)) = object.split_once('/') {
            shared.parts.insert((oid.to_owned(), number.parse().unwrap()), body.to_vec());
            return (200, format!("ETag: \"{}\"\r\n", sha256(body)), Value::Null);
        }
        if sha256(body) != object {
            return refuse(400, "", "the content has another SHA-256");
        }
        shared.store.insert(object.to_owned(), body.to_vec());
        return fine(Value::Null);
    }
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
    if let Some(oid) = path.strip_prefix("/api/complete/") {
        let parts = json["parts"].as_array().unwrap();
        let mut whole = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let there = &shared.parts[&(oid.to_owned(), index + 1)];
            assert_eq!(part["partNumber"], index + 1);
            assert_eq!(part["etag"], format!("\"{}\"", sha256(there)));
            whole.extend_from_slice(there);
        }
        if text("oid") != oid || sha256(&whole) != oid {
            return refuse(400, "", "the content has another SHA-256");
        }
        shared.store.insert(oid.to_owned(), whole);
        return fine(json!({"success": true}));
    }
    if token != "good" {
        return match token {
            "" => refuse(401, "", "Invalid username or password."),
            _ => refuse(403, "", "Forbidden: you must use a write token to upload to a repository."),
        };
    }
    if path == "/api/validate-yaml" {
        let content = text("content");
        let head = content.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---")).map(|(head, _)| head);
        return match head.map(serde_yaml::from_str::<serde_yaml::Mapping>) {
            Some(Err(error)) => {
                (400, String::new(), json!({"errors": [{"message": error.to_string()}], "warnings": []}))
            }
            _ => fine(json!({"errors": [], "warnings": []})),
        };
    }
    if path == "/api/repos/create" {
        let (owner, name) = (text("organization"), text("name"));
        if owner == "others" {
            return refuse(403, "", "You don't have the rights to create a model under the namespace \"others\"");
        }
        let repo = format!("{owner}/{name}");
        let url = format!("{endpoint}/{repo}");
        if shared.knows(&repo) {
            return (409, String::new(), json!({"error": "You already created this model repo", "url": url}));
        }
        if text("visibility") == "private" || json["private"] == true {
            shared.private.insert(repo.clone());
        }
        let attributes = (".gitattributes".to_owned(), b"*.safetensors filter=lfs\n".to_vec());
        shared.files.insert(format!("{repo}@main"), BTreeMap::from([attributes]));
        return fine(json!({"url": url, "name": repo, "id": repo}));
    }
    if let Some((repo, what)) = path.trim_start_matches('/').split_once(".git/info/lfs/objects/") {
        if !shared.knows(repo) {
            return refuse(404, "RepoNotFound", "Repository not found");
        }
        if what == "verify" {
            let there = shared.store.get(&text("oid")).is_some_and(|object| json["size"] == object.len());
            return if there { fine(Value::Null) } else { refuse(404, "", "no such object") };
        }
        assert_eq!(headers["content-type"], "application/vnd.git-lfs+json");
        assert_eq!(headers["accept"], "application/vnd.git-lfs+json");
        let transfers = json["transfers"].as_array().unwrap();
        assert!(
            json["operation"] == "upload" && json["hash_algo"] == "sha256" && transfers.contains(&json!("multipart"))
        );
        assert!(shared.at(repo, json["ref"]["name"].as_str().unwrap()).is_some());
        let objects: Vec<Value> = json["objects"]
            .as_array()
            .unwrap()
            .iter()
            .map(|object| {
                let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap() as usize);
                if shared.store.contains_key(oid) {
                    return object.clone();
                }
                // URLs of the Hub itself name huggingface.co, whatever the endpoint is.
                let verify = json!({"href": format!("https://huggingface.co/{repo}.git/info/lfs/objects/verify")});
                let upload = match shared.part_size.filter(|part| *part < size) {
                    None => json!({"href": format!("{endpoint}/store/{oid}"), "header": {"X-Store-Key": "basic"}}),
                    Some(part) => {
                        let mut header = json!({"chunk_size": part.to_string()});
                        for number in 1..=size.div_ceil(part) {
                            header[format!("{number:05}")] = format!("{endpoint}/store/{oid}/{number}").into();
                        }
                        json!({"href": format!("https://huggingface.co/api/complete/{oid}"), "header": header})
                    }
                };
                json!({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
            })
            .collect();
        return fine(json!({"transfer": "basic", "objects": objects}));
    }
    let Some((repo, what, revision)) = ["branch", "preupload", "commit"].into_iter().find_map(|what| {
        let (repo, revision) = path.strip_prefix("/api/models/")?.split_once(&format!("/{what}/"))?;
        Some((repo, what, revision))
    }) else {
        return refuse(404, "", "no such page");
    };
    let revision = revision.split('?').next().unwrap_or_default();
    if !shared.knows(repo) {
        return refuse(404, "RepoNotFound", "Repository not found");
    }
    let at = shared.at(repo, revision);
    if what == "branch" {
        if at.is_some() {
            return refuse(409, "", "Reference already exists");
        }
        let main = shared.files[&format!("{repo}@main")].clone();
        shared.files.insert(format!("{repo}@{revision}"), main);
        return fine(Value::Null);
    }
    let Some(at) = at else {
        return refuse(404, "RevisionNotFound", &format!("Invalid rev id: {revision}"));
    };
    if what == "preupload" {
        let there = &shared.files[&at];
        let files: Vec<Value> = json["files"]
            .as_array()
            .unwrap()
            .iter()
            .map(|file| {
                let path = file["path"].as_str().unwrap();
                let sample = base64(file["sample"].as_str().unwrap());
                assert_eq!(sample.len() as u64, file["size"].as_u64().unwrap().min(512));
                let large = is_large(path);
                let oid = there.get(path).map(|content| if large { sha256(content) } else { git_oid(content) });
                let mode = if large { "lfs" } else { "regular" };
                json!({"path": path, "uploadMode": mode, "shouldIgnore": false, "oid": oid})
            })
            .collect();
        return fine(json!({"files": files, "commitOid": shared.head(&at)}));
    }
    assert_eq!(headers["content-type"], "application/x-ndjson");
    let mut files = shared.files[&at].clone();
    let mut summary = String::new();
    for line in body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let line: Value = serde_json::from_slice(line).unwrap();
        let value = |key: &str| line["value"][key].as_str().unwrap_or_default().to_owned();
        match line["key"].as_str().unwrap() {
            "header" => summary = value("summary"),
            "file" => {
                assert_eq!(value("encoding"), "base64");
                files.insert(value("path"), base64(&value("content")));
            }
            "lfsFile" => {
                assert_eq!(value("algo"), "sha256");
                match shared.store.get(&value("oid")).filter(|object| line["value"]["size"] == object.len()) {
                    Some(object) => files.insert(value("path"), object.clone()),
                    None => return refuse(422, "", &format!("{} is not in the store", value("path"))),
                };
            }
            other => panic!("unknown commit line `{other}`"),
        }
    }
    if summary.is_empty() {
        return refuse(400, "", "a commit needs a summary");
    }
    shared.files.insert(at.clone(), files);
    shared.commits.push(summary);
    let oid = sha256(format!("{at} {}", shared.commits.len()).as_bytes())[..40].to_owned();
    shared.heads.insert(at, oid.clone());
    let url = format!("{endpoint}/{repo}/commit/{oid}");
    fine(json!({"success": true, "commitOid": oid, "commitUrl": url, "hookOutput": ""}))
}
