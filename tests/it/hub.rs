//! Models and datasets from the Hub: downloads, cache, interruptions and refusals.

use std::fs;
use std::path::Path;
use std::process::Command;

use dictlearn_core::files::tensors::TensorFile;

use crate::common::{Desk, Run, fixture};
use crate::hub_server::{COMMIT, Fault, HubServer};

const MODEL: &str = "someone/tiny";

/// A server with a model, and a desk with a config that harvests it.
fn desk() -> (HubServer, Desk) {
    let server = HubServer::start();
    server.put_folder(MODEL, &fixture("models/gpt_neox"));
    (server, config_for(MODEL))
}

fn config_for(model: &str) -> Desk {
    let desk = Desk::new();
    let tokens = fixture("models/gpt_neox/io.safetensors");
    desk.write(
        "config.yaml",
        &format!(
            "precision: float32\nsource: {{type: language_model, model: {model:?}, submodule: gpt_neox.layers.1, \
             shuffle: false, text: {{type: token_file, path: {tokens:?}}}}}\n"
        ),
    );
    desk
}

fn online(server: &HubServer, desk: &Desk) -> Command {
    let mut command = desk.program();
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", &server.endpoint);
    command
}

fn harvest(command: &mut Command, out: &str) -> Run {
    Run::of(command.args(["activations", "config.yaml", "--out", out]).output().unwrap())
}

/// Harvests online, which must succeed; returns standard error.
fn harvested(server: &HubServer, desk: &Desk, out: &str) -> String {
    let run = harvest(&mut online(server, desk), out);
    assert_eq!(run.code, 0, "{}", run.stderr);
    run.stderr
}

fn shard(desk: &Desk, out: &str) -> Vec<u8> {
    fs::read(desk.path(out).join("activations-00000.safetensors")).unwrap()
}

#[test]
fn a_model_is_downloaded_once_and_then_used_offline() {
    let (server, desk) = desk();
    let said = harvested(&server, &desk, "first");
    // Files that are not needed are not downloaded.
    assert!(server.log("io.safetensors").is_empty());
    let cache = desk.path("hf/hub/models--someone--tiny");
    assert_eq!(fs::read_to_string(cache.join("refs/main")).unwrap(), COMMIT);
    let pointer = cache.join("snapshots").join(COMMIT).join("model.safetensors");
    let target = fs::read_link(&pointer).unwrap();
    assert!(target.starts_with("../../blobs"), "{}", target.display());
    assert_eq!(fs::read(&pointer).unwrap(), fs::read(fixture("models/gpt_neox/model.safetensors")).unwrap());
    assert!(!desk.files().iter().any(|file| file.ends_with(".lock") || file.ends_with(".incomplete")), "{said}");
    assert_eq!(desk.json("first/meta.json")["source"]["commit"], COMMIT);

    // A second run requests only the repository's state.
    harvested(&server, &desk, "second");
    assert!(server.log("/resolve/").is_empty());

    for (index, set) in [["HF_HUB_OFFLINE", "1"], ["HF_ENDPOINT", "http://127.0.0.1:9"]].into_iter().enumerate() {
        let out = format!("offline{index}");
        let mut command = desk.program();
        let run = harvest(command.env_remove("HF_HUB_OFFLINE").env(set[0], set[1]), &out);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert_eq!(shard(&desk, &out), shard(&desk, "first"));
        let warned = run.stderr.contains(&format!("using the cached commit {COMMIT}"));
        assert_eq!(warned, index == 1, "{}", run.stderr);
    }

    let folder = config_for(fixture("models/gpt_neox").to_str().unwrap());
    folder.ok(&["activations", "config.yaml", "--out", "first"]);
    assert_eq!(shard(&folder, "first"), shard(&desk, "first"));
}

#[test]
fn hf_hub_cache_and_a_pinned_commit_are_honoured() {
    let (server, _) = desk();
    let desk = config_for(&format!("{MODEL}@{COMMIT}"));
    let mut command = online(&server, &desk);
    let run = harvest(command.env("HF_HUB_CACHE", desk.path("elsewhere")), "first");
    assert_eq!(run.code, 0, "{}", run.stderr);
    let snapshot = desk.path("elsewhere/models--someone--tiny/snapshots").join(COMMIT);
    assert!(snapshot.join("config.json").exists());
    // A commit names its snapshot, so no ref is written.
    assert!(!desk.path("elsewhere/models--someone--tiny/refs").exists());
    let run = harvest(desk.program().env("HF_HUB_CACHE", desk.path("elsewhere")), "second");
    assert_eq!(run.code, 0, "{}", run.stderr);
}

#[test]
fn an_interrupted_download_resumes_where_it_stopped() {
    let (server, desk) = desk();
    let whole = fs::read(fixture("models/gpt_neox/model.safetensors")).unwrap();
    // An earlier process was killed in the middle of the weights.
    let etag: String = {
        use sha2::{Digest, Sha256};
        Sha256::digest(&whole).iter().map(|byte| format!("{byte:02x}")).collect()
    };
    desk.write(&format!("hf/hub/models--someone--tiny/blobs/{etag}.incomplete"), "");
    let part = desk.path("hf/hub/models--someone--tiny/blobs").join(format!("{etag}.incomplete"));
    fs::write(&part, &whole[..1000]).unwrap();
    // The first two faults meet config.json, which then arrives; the other three interrupt the weights.
    server.fail([Fault::Cut(3), Fault::Cut(usize::MAX), Fault::Cut(500), Fault::Cut(0), Fault::Cut(1)]);
    harvested(&server, &desk, "first");
    let log = server.log("/elsewhere/someone/tiny/resolve");
    let ranges: Vec<_> = log.iter().filter(|line| !line.contains("bytes=0-0")).collect();
    let expected = ["bytes=1000-", "bytes=1500-", "bytes=1500-", "bytes=1501-"];
    assert_eq!(ranges.len(), expected.len(), "{log:#?}");
    for (line, from) in ranges.iter().zip(expected) {
        assert!(line.contains(from), "{log:#?}");
    }
    assert!(log.iter().all(|line| line.ends_with("token=")), "only the Hub may get the token: {log:#?}");
    let pointer = desk.path("hf/hub/models--someone--tiny/snapshots").join(COMMIT).join("model.safetensors");
    assert_eq!(fs::read(pointer).unwrap(), whole);
}

#[test]
fn requests_to_a_busy_hub_are_retried() {
    let (server, desk) = desk();
    server.fail([Fault::Status(429, "Retry-After: 1\r\n"), Fault::Status(503, ""), Fault::Status(502, "")]);
    let said = harvested(&server, &desk, "first");
    assert!(said.contains("config.json of `someone/tiny`: status 429; retrying in 1 s"), "{said}");
}

fn refused(server: &HubServer, desk: &Desk, token: Option<&str>) -> String {
    let mut command = online(server, desk);
    if let Some(token) = token {
        command.env("HF_TOKEN", token);
    }
    let run = harvest(&mut command, "out");
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(!desk.path("out").exists());
    run.stderr
        .replace(&server.endpoint, "HUB")
        .lines()
        .filter(|line| !line.starts_with(" ") || line.starts_with(" --> "))
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn refused_models_name_the_fix() {
    let (server, desk) = desk();
    server.put_folder("someone/private", &fixture("models/gpt_neox"));
    server.put_folder("someone/gated", &fixture("models/gpt_neox")).gate("someone/gated");
    let mut said = String::new();
    for (model, token) in [
        ("someone/gated", None),
        ("someone/gated", Some("other")),
        ("someone/private", None),
        ("someone/tinny", None),
        ("someone/tiny@v2", None),
        ("someone/tiny", Some("bad")),
    ] {
        let desk = config_for(model);
        said += &format!("{model}, token {token:?}\n{}\n\n", refused(&server, &desk, token));
    }
    insta::with_settings!({filters => vec![(r"/\S*/\.tmp\w+", "DESK")]}, { insta::assert_snapshot!(said) });
    // An account with access can read it; the token may come from the login's token file.
    let gated = config_for("someone/gated");
    gated.write("hf/token", "good\n");
    harvested(&server, &gated, "out");
    drop(desk);
}

#[test]
fn an_uncached_model_is_refused_offline() {
    let desk = config_for("someone/elsewhere");
    let run = harvest(&mut desk.program(), "out");
    assert_eq!(run.code, 2);
    assert!(run.stderr.contains("the model `someone/elsewhere` is not in the Hub's cache"), "{}", run.stderr);
    assert!(run.stderr.contains("unset HF_HUB_OFFLINE"), "{}", run.stderr);
    let mut command = desk.program();
    let run = harvest(command.env("HF_HUB_OFFLINE", "").env("HF_ENDPOINT", "huggingface"), "out");
    assert_eq!(run.code, 2);
    assert!(run.stderr.contains("HF_ENDPOINT is `huggingface`, which is not an address"), "{}", run.stderr);
    assert!(!Path::new(&desk.path("out")).exists());
}

/// A desk whose config harvests the bundled model on a text.
fn reading(text: &str) -> Desk {
    Desk::with_config(&reading_config("embedded:austen", text))
}

fn reading_config(model: &str, text: &str) -> String {
    format!(
        "precision: float32\nsource: {{type: language_model, model: {model:?}, submodule: gpt_neox.layers.0, epochs: 1, \
         shuffle: false, ctx_len: 32, text: {text}}}\n"
    )
}

fn lines(name: &str, count: usize) -> String {
    (0..count).map(|n| format!("{{\"content\": \"It was number {n} of {name}, and a fine morning.\"}}\n")).collect()
}

#[test]
fn a_dataset_is_streamed() {
    let server = HubServer::start();
    let dataset = "datasets/someone/texts";
    let head = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: 'parts/*.jsonl'}\n---\n";
    server.put(dataset, "README.md", head);
    let local = reading("{type: text_files, path: parts, column: content}");
    for part in ["a 1.jsonl", "b.jsonl"] {
        server.put(dataset, &format!("parts/{part}"), lines(part, 400));
        local.write(&format!("parts/{part}"), &lines(part, 400));
    }
    server.put(dataset, "parts/notes.md", "not data").put(dataset, "parts/a empty.jsonl", "");
    local.ok(&["activations", "config.yaml", "--out", "out"]);
    let desk = reading("{type: hub_dataset, repo: someone/texts, column: content}");
    // README.md arrives whole; the other faults cut in the middle of lines.
    server.fail([Fault::Cut(usize::MAX), Fault::Cut(10_000), Fault::Status(503, ""), Fault::Cut(77)]);
    harvested(&server, &desk, "out");
    assert_eq!(shard(&desk, "out"), shard(&local, "out"));
    let log = server.log("b.jsonl");
    assert!(
        !log.is_empty() && log.iter().all(|line| !line.contains("range=bytes=1")),
        "every request must start at byte 0: {log:?}"
    );
    let kept: Vec<_> = desk.files().into_iter().filter(|file| file.contains(".jsonl")).collect();
    assert!(kept.is_empty(), "{kept:?}");
    // A lasting network failure stops the run; missing data are not bad records.
    server.fail((0..6).map(|_| Fault::Cut(0)));
    let run = harvest(&mut online(&server, &desk), "gone");
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.contains("cannot read parts/a 1.jsonl of `someone/texts`"), "{}", run.stderr);
    assert!(!desk.path("gone/meta.json").exists());
}

#[test]
fn an_unreadable_dataset_is_read_from_its_parquet_conversion() {
    let server = HubServer::start();
    let parquet = fs::read(fixture("text/chats.parquet")).unwrap();
    let dataset = "datasets/someone/table";
    server.put(dataset, "table.csv", "id,text\n").put(dataset, "table.py", "");
    server.put_at(dataset, "refs/convert/parquet", "default/train/0000.parquet", parquet);
    let desk = reading("{type: hub_dataset, repo: someone/table}");
    harvested(&server, &desk, "out");
    let local = reading(&format!("{{type: text_files, path: {:?}}}", fixture("text/chats.parquet")));
    local.ok(&["activations", "config.yaml", "--out", "out"]);
    assert_eq!(shard(&desk, "out"), shard(&local, "out"));
    // A table is downloaded whole, so it can be read offline.
    desk.ok(&["activations", "config.yaml", "--out", "offline"]);
    assert_eq!(shard(&desk, "offline"), shard(&local, "out"));
}

/// Asserts that a split of a dataset has the lines of these names, in order.
fn same_as(server: &HubServer, text: &str, names: &[&str]) {
    let desk = reading(text);
    harvested(server, &desk, "out");
    let local = reading("{type: text_files, path: all, column: content}");
    for (at, name) in names.iter().enumerate() {
        local.write(&format!("all/{at}.jsonl"), &lines(name, 5));
    }
    local.ok(&["activations", "config.yaml", "--out", "out"]);
    assert_eq!(shard(&desk, "out"), shard(&local, "out"), "{text}");
}

#[test]
fn a_split_excludes_files_of_other_splits() {
    let server = HubServer::start();
    let folder = "datasets/someone/folder";
    server.put(folder, "README.md", "---\nconfigs:\n- config_name: en\n  data_dir: en\n---\n");
    server.put(folder, "en/train.jsonl", lines("train", 5)).put(folder, "en/test.jsonl", lines("test", 5));
    let text = |more: &str| format!("{{type: hub_dataset, repo: someone/{more}, column: content}}");
    same_as(&server, &text("folder"), &["train"]);
    same_as(&server, &text("folder, split: test"), &["test"]);
    let shards = "datasets/someone/shards";
    for split in ["train_sft", "train_gen", "test_sft"] {
        server.put(shards, &format!("data/{split}-00000-of-00002.jsonl"), lines(split, 5));
        server.put(shards, &format!("data/{split}-00001-of-00002.jsonl"), lines("more", 5));
    }
    same_as(&server, &text("shards, split: train_sft"), &["train_sft", "more"]);
    let said = refused(&server, &reading(&text("shards")), None);
    assert!(
        said.contains("has no split `train`") && said.contains("its splits: test_sft, train_gen, train_sft"),
        "{said}"
    );
    // A split with unreadable files is refused, not read in part.
    let mixed = "datasets/someone/mixed";
    server.put(mixed, "train-0.jsonl", lines("train", 5)).put(mixed, "train-1.jsonl.bz2", "");
    let said = refused(&server, &reading(&text("mixed")), None);
    assert!(said.contains("has unsupported files") && said.contains("it has train-1.jsonl.bz2"), "{said}");
    server.put(mixed, "README.md", "---\nconfigs:\n- {config_name: a, data_files: [{split: train}]}\n---\n");
    let said = refused(&server, &reading(&text("mixed")), None);
    assert!(said.contains("the dataset's README.md has `configs[0].data_files"), "{said}");
}

#[test]
fn token_ids_are_read_from_a_dataset() {
    let server = HubServer::start();
    let table = fs::read(fixture("text/pretokenized.parquet")).unwrap();
    let dataset = "datasets/someone/pretokenized";
    server.put(dataset, "data/train-00000-of-00001.parquet", table).put(dataset, "sae_lens.json", "{}");
    let read = |text: &str| Desk::with_config(&reading_config(fixture("models/gpt_neox").to_str().unwrap(), text));
    let desk = read("{type: hub_dataset, repo: someone/pretokenized}");
    harvested(&server, &desk, "out");
    let local = read(&format!("{{type: text_files, path: {:?}}}", fixture("text/pretokenized.parquet")));
    local.ok(&["activations", "config.yaml", "--out", "out"]);
    assert_eq!(shard(&desk, "out"), shard(&local, "out"));
}

#[test]
fn missing_datasets_are_refused() {
    let server = HubServer::start();
    let dataset = "datasets/someone/texts";
    server.put(dataset, "train.jsonl", lines("train", 3)).put(dataset, "validation.jsonl", lines("validation", 3));
    server.put("datasets/someone/pictures", "cat.png", "");
    let head = "---\nconfigs:\n- {config_name: en, data_files: en/*.jsonl}\n- {config_name: de, data_files: de/*.jsonl}\n---\n";
    server.put("datasets/someone/languages", "README.md", head);
    server.put("datasets/someone/languages", "en/0.jsonl", lines("en", 3));
    let mut said = String::new();
    for text in [
        "{type: hub_dataset, repo: texts of someone}",
        "{type: hub_dataset, repo: someone/text}",
        "{type: hub_dataset, repo: someone/texts, split: valdation}",
        "{type: hub_dataset, repo: someone/texts, files: '*.parquet'}",
        "{type: hub_dataset, repo: someone/pictures}",
        "{type: hub_dataset, repo: someone/languages}",
        "{type: hub_dataset, repo: someone/languages, subset: fr}",
        "{type: hub_dataset, repo: someone/texts}",
    ] {
        said += &format!("{text}\n{}\n\n", refused(&server, &reading(text), None));
    }
    insta::assert_snapshot!(said);
    let english = reading("{type: hub_dataset, repo: someone/languages, subset: en, column: content}");
    harvested(&server, &english, "out");
}

#[test]
fn a_chat_is_rendered_with_the_models_template() {
    use dictlearn_core::lm::EmbeddedModel;
    let model = Desk::new();
    let bundled = dictlearn_core::inventory::iter::<EmbeddedModel>.into_iter().next().unwrap();
    for (name, bytes) in bundled.files {
        fs::write(model.path(name), bytes).unwrap();
    }
    let model_path = model.dir.path().to_str().unwrap();
    let chats = format!("{{type: text_files, path: {:?}, column: messages}}", fixture("text/chats.parquet"));
    let desk = Desk::with_config(&reading_config(model_path, &chats));
    let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
    assert!(said.contains("chats.parquet:1 is a chat, but the tokenizer of"), "{said}");
    assert!(said.contains("has no chat template"), "{said}");

    let template = "{% for m in messages %}\n{% if '3' in m.content %}\n{{ raise_exception('not three') }}\n{% endif %}\n\
                    {{ m.role.upper() + ': ' + m.content }}\n{% endfor %}";
    model.write("chat_template.jinja", template);
    let run = desk.run(&["activations", "config.yaml", "--out", "out"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("1 bad record was skipped: ") && run.stderr.contains("not three"), "{}", run.stderr);
    let written: String = (0..6)
        .filter(|n| *n != 3)
        .map(|n| format!("USER: Who is person {n}?\nASSISTANT: Nobody of note, number {n}.\n\n"))
        .collect();
    desk.write("written.txt", &written);
    desk.write("config.yaml", &reading_config(model_path, "{type: text_files, path: written.txt}"));
    desk.ok(&["activations", "config.yaml", "--out", "written"]);
    let ids = |out: &str| {
        let shard = TensorFile::open(&desk.path(out).join("activations-00000.safetensors")).unwrap();
        let token_ids = Vec::<i64>::try_from(shard.tensor("token_ids").unwrap()).unwrap();
        token_ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(ids("out"), ids("written"));
}

#[test]
fn mirror_redirects_are_followed_without_leaking_the_token() {
    let (server, desk) = desk();
    let mirror = server.mirror();
    let mut command = desk.program();
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", format!("{}/", mirror.endpoint)).env("HF_TOKEN", "secret");
    let run = harvest(&mut command, "first");
    assert_eq!(run.code, 0, "{}", run.stderr);
    let log = mirror.log();
    assert!(!log.is_empty() && log.iter().all(|line| line.ends_with("token=Bearer secret")), "{log:#?}");
    let log = server.log("");
    assert!(!log.is_empty() && log.iter().all(|line| line.ends_with("token=")), "{log:#?}");
    let folder = config_for(fixture("models/gpt_neox").to_str().unwrap());
    folder.ok(&["activations", "config.yaml", "--out", "first"]);
    assert_eq!(shard(&folder, "first"), shard(&desk, "first"));
}

#[test]
fn tilde_and_home_are_expanded_in_cache_variables() {
    for (name, value, cache) in [
        ("HF_HOME", "~/hugging", "home/hugging/hub"),
        ("HF_HUB_CACHE", "~/models", "home/models"),
        ("HF_HUB_CACHE", "$HOME/models", "home/models"),
    ] {
        let (server, desk) = desk();
        let mut command = online(&server, &desk);
        let run = harvest(command.env("HOME", desk.path("home")).env(name, value), "first");
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(desk.path(cache).join("models--someone--tiny/refs/main").exists(), "{:#?}", desk.files());
        assert!(!desk.files().iter().any(|file| file.contains(['~', '$'])));
    }
}

#[test]
fn a_custom_certificate_authority_is_trusted_when_configured() {
    let (server, desk) = desk();
    let endpoint = server.tls();
    let authority = fixture("tls/authority.pem");
    let run = |out: &str, set: &[(&str, &Path)]| {
        let mut command = desk.program();
        for name in ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
            command.env_remove(name);
        }
        command.envs(set.iter().copied());
        harvest(command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", &endpoint), out)
    };
    // With an empty cache.
    let refused = run("none", &[]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("is not trusted: invalid peer certificate: UnknownIssuer"), "{}", refused.stderr);
    assert!(refused.stderr.contains("set SSL_CERT_FILE"), "{}", refused.stderr);
    assert!(!refused.stderr.contains("retrying"), "{}", refused.stderr);
    for (index, name) in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"].into_iter().enumerate() {
        let trusted = run(&format!("trusted{index}"), &[(name, &authority)]);
        assert_eq!(trusted.code, 0, "{}", trusted.stderr);
    }
    for (file, why) in [(fixture("tls/server.key"), "no certificate"), (desk.path("none.pem"), "No such file")] {
        let refused = run("none", &[("SSL_CERT_FILE", &file)]);
        assert_eq!(refused.code, 2, "{}", refused.stderr);
        assert!(refused.stderr.contains(&format!("SSL_CERT_FILE is `{}`", file.display())), "{}", refused.stderr);
        assert!(refused.stderr.contains(why), "{}", refused.stderr);
    }
    // A certificate of another authority.
    let other = run("other", &[("SSL_CERT_FILE", &fixture("tls/server.pem"))]);
    assert!(
        other.stderr.contains("set by SSL_CERT_FILE") || other.stderr.contains("using the cached commit"),
        "{}",
        other.stderr
    );
}

#[test]
fn a_refused_connection_is_not_retried() {
    let desk = config_for("someone/elsewhere");
    let mut command = desk.program();
    let run = harvest(command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", "http://127.0.0.1:9"), "out");
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.contains("Connection refused"), "{}", run.stderr);
    assert!(!run.stderr.contains("retrying"), "{}", run.stderr);
}
