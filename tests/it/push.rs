//! `dictlearn push`: uploads, retries and refusals.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Desk, Run, tensor_file_config};
use crate::hub_server::{Fault, HubServer};

const REPO: &str = "someone/saes";

/// A desk with a trained SAE in `run/top_k`.
fn trained() -> Desk {
    let desk = Desk::new();
    let saes = "saes:\n- trainer: {type: top_k, warmup_steps: 1}\n  dictionary: {k: 4, dict_size: 64}\n\
                metrics: [{type: reconstruction, n_batches: 1}]\n";
    desk.write("config.yaml", &tensor_file_config(2, saes));
    desk.ok(&["train", "config.yaml"]);
    desk
}

/// `push` to the server; an empty token stands for none.
fn command(server: &HubServer, desk: &Desk, token: &str, args: &[&str]) -> Command {
    let mut command = desk.program();
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", &server.endpoint).arg("push").args(args);
    if !token.is_empty() {
        command.env("HF_TOKEN", token);
    }
    command
}

/// Pushes the desk's SAE, which must succeed.
fn pushed(server: &HubServer, desk: &Desk, args: &[&str]) -> Run {
    let args = [&["run/top_k", REPO], args].concat();
    let run = Run::of(command(server, desk, "good", &args).output().unwrap());
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(!run.stderr.contains("good") && !run.stdout.contains("good"), "the token is printed: {}", run.stderr);
    run
}

fn refused(server: &HubServer, desk: &Desk, token: &str, args: &[&str]) -> String {
    let run = Run::of(command(server, desk, token, args).output().unwrap());
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert_eq!(run.stdout, "");
    run.stderr
}

/// The SAE's files that are uploaded unchanged.
fn local(desk: &Desk) -> BTreeMap<String, Vec<u8>> {
    let names = ["ae.pt", "ae.safetensors", "config.json", "eval.json"];
    names.map(|name| (name.to_owned(), fs::read(desk.path("run/top_k").join(name)).unwrap())).into()
}

fn text(files: &BTreeMap<String, Vec<u8>>, name: &str) -> String {
    String::from_utf8(files[name].clone()).unwrap()
}

#[test]
fn a_pushed_sae_matches_the_local_files() {
    let (server, desk) = (HubServer::start(), trained());
    let run = pushed(&server, &desk, &[]);
    assert!(run.stdout.starts_with(&format!("{}/{REPO}/commit/", server.endpoint)), "{}", run.stdout);
    assert!(run.stderr.contains("created the model `someone/saes`"), "{}", run.stderr);
    assert!(!server.is_private(REPO));
    assert_eq!(server.commits(), ["Upload top_k with dictlearn"]);
    let files = server.files(REPO, "main").unwrap();
    for (name, content) in local(&desk) {
        assert_eq!(files[&name], content, "{name}");
    }
    assert_eq!(files.len(), 4 + 3, "{:?}", files.keys());

    // The run's config without its output folder; its local paths give a warning.
    let config = text(&files, "config.yaml");
    assert!(config.contains("type: top_k") && !config.contains("output_dir"), "{config}");
    assert!(desk.read("run/config.yaml").contains("output_dir"));
    let warned = "warning: config.yaml is uploaded with absolute paths of this machine: source.path";
    assert!(run.stderr.contains(warned), "{}", run.stderr);

    let card = text(&files, "README.md");
    let head = card.strip_prefix("---\n").unwrap().split("\n---\n").next().unwrap();
    let head: serde_yaml::Value = serde_yaml::from_str(head).unwrap();
    assert_eq!(head["library_name"], "dictlearn");
    assert_eq!(head["tags"][0], "sparse-autoencoder");
    assert!(head.get("base_model").is_none() && head.get("datasets").is_none(), "{head:?}");
    for part in [
        "# top_k\n",
        "| class | `AutoEncoderTopK` |",
        "| features | 64 |",
        "| k | 4 |",
        "| Variance explained | ",
        "load_dictionary(folder, device=\"cpu\")",
        "snapshot_download(\"someone/saes\")\n",
        "dictlearn import dictionary_learning someone/saes --out top_k",
        "```yaml\nseed: 42\n",
    ] {
        assert!(card.contains(part), "`{part}` is not in\n{card}");
    }
    assert!(!card.contains("sae_lens"), "{card}");

    // Large files went to the store, with its headers and without the Hub's token.
    let log = server.log("");
    let stored: Vec<_> = log.iter().filter(|line| line.starts_with("PUT /store/")).collect();
    assert_eq!(stored.len(), 2, "{log:#?}");
    assert!(stored.iter().all(|line| line.ends_with("key=basic token=")), "{log:#?}");
    assert_eq!(log.iter().filter(|line| line.contains("/lfs/objects/verify")).count(), 2, "{log:#?}");

    // Unchanged files are not uploaded again, and without a change there is no commit.
    let again = pushed(&server, &desk, &[]);
    assert_eq!(again.stdout, run.stdout);
    assert!(again.stderr.contains("`someone/saes` already has all files"), "{}", again.stderr);
    desk.write("run/top_k/eval.json", "{\"l0\": 4.0}");
    let changed = pushed(&server, &desk, &["--message", "Measured again\n\non other text"]);
    assert!(
        changed.stdout != run.stdout && changed.stderr.contains("4 of 6 files are already uploaded"),
        "{}",
        changed.stderr
    );
    assert_eq!(server.commits()[1..], ["Measured again"]);
    assert_eq!(text(&server.files(REPO, "main").unwrap(), "eval.json"), "{\"l0\": 4.0}");
    assert!(!server.log("").iter().any(|line| line.contains("/store/")));
}

#[test]
fn files_in_the_store_are_not_uploaded_again() {
    let (server, desk) = (HubServer::start(), trained());
    pushed(&server, &desk, &[]);
    server.log("");
    let args = ["run/top_k", "someone/else", "--private"];
    let run = Run::of(command(&server, &desk, "good", &args).output().unwrap());
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("ae.pt is already in the store"), "{}", run.stderr);
    assert!(server.log("/store/").is_empty());
    assert!(server.is_private("someone/else"));
    assert_eq!(server.files("someone/else", "main").unwrap()["ae.pt"], local(&desk)["ae.pt"]);
    // `--private` refuses a public repository.
    let said = refused(&server, &desk, "good", &["run/top_k", REPO, "--private"]);
    assert!(said.contains("the model `someone/saes` already exists and is public"), "{said}");
}

#[test]
fn large_files_are_uploaded_in_parts() {
    let (server, desk) = (HubServer::start(), trained());
    server.split(5000).fail_upload("/3", Fault::Cut(700)).fail_upload("/api/complete/", Fault::Status(503, ""));
    pushed(&server, &desk, &[]);
    let files = server.files(REPO, "main").unwrap();
    assert!(files["ae.safetensors"].len() > 15_000);
    for (name, content) in local(&desk) {
        assert_eq!(files[&name], content, "{name}");
    }
    let log = server.log("");
    assert!(log.iter().filter(|line| line.starts_with("PUT")).all(|line| line.ends_with("key= token=")), "{log:#?}");
    assert_eq!(log.iter().filter(|line| line.starts_with("PUT") && line.contains("/3 ")).count(), 3, "{log:#?}");
}

#[test]
fn transient_failures_are_retried() {
    let (server, desk) = (HubServer::start(), trained());
    server.fail_upload("/api/repos/create", Fault::Lost);
    server.fail_upload("/preupload/", Fault::Status(500, ""));
    server.fail_upload("/objects/batch", Fault::Status(429, "Retry-After: 1\r\n"));
    server.fail_upload("/store/", Fault::Cut(1000)).fail_upload("/store/", Fault::Status(500, ""));
    server.fail_upload("/objects/verify", Fault::Cut(0));
    // The commit is made but the response is lost: it must not be made twice.
    server.fail_upload("/commit/", Fault::Lost);
    let run = pushed(&server, &desk, &[]);
    assert!(run.stderr.contains("status 429; retrying in 1 s"), "{}", run.stderr);
    assert_eq!(server.commits().len(), 1);
    assert!(run.stdout.contains("/commit/"), "{}", run.stdout);
    for (name, content) in local(&desk) {
        assert_eq!(server.files(REPO, "main").unwrap()[&name], content, "{name}");
    }

    // A permanent failure stops the push without a commit.
    let server = HubServer::start();
    server.fail_upload("/store/", Fault::Status(403, ""));
    let run = Run::of(command(&server, &desk, "good", &["run/top_k", REPO]).output().unwrap());
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.contains("cannot upload ae.") && run.stderr.contains("nothing was committed"), "{}", run.stderr);
    assert!(server.commits().is_empty());
}

#[test]
fn an_sae_can_be_pushed_to_a_folder_and_a_branch() {
    let (server, desk) = (HubServer::start(), trained());
    let lens = |name: &str| desk.path("run/top_k").join(name);
    fs::write(lens("cfg.json"), "{\"d_in\": 32}").unwrap();
    fs::copy(lens("ae.safetensors"), lens("sae_weights.safetensors")).unwrap();
    pushed(&server, &desk, &["--path", "layer_3/top_k/"]);
    let files = server.files(REPO, "main").unwrap();
    assert_eq!(files["layer_3/top_k/ae.safetensors"], local(&desk)["ae.safetensors"]);
    assert!(files.contains_key("layer_3/top_k/config.yaml") && !files.contains_key("layer_3/top_k/README.md"));
    let card = text(&files, "README.md");
    for part in [
        "SAE.load_from_disk(folder)",
        "snapshot_download(\"someone/saes\", allow_patterns=\"layer_3/top_k/*\") + \"/layer_3/top_k\"",
        "dictlearn import dictionary_learning someone/saes/layer_3/top_k --out top_k",
    ] {
        assert!(card.contains(part), "`{part}` is not in\n{card}");
    }
    // A second push renews the card in place; another SAE's card goes beside its files.
    desk.write("run/top_k/eval.json", "{}");
    pushed(&server, &desk, &["--path", "layer_3/top_k"]);
    let renewed = server.files(REPO, "main").unwrap();
    assert!(text(&renewed, "README.md") != card && renewed.len() == files.len());
    pushed(&server, &desk, &["--path", "other"]);
    let files = server.files(REPO, "main").unwrap();
    assert_eq!(files["README.md"], renewed["README.md"]);
    assert!(text(&files, "other/README.md").contains("+ \"/other\""));
    // An existing README.md stays unless the SAE's folder has its own.
    let run = pushed(&server, &desk, &[]);
    assert!(run.stderr.contains("the repository keeps its own README.md"), "{}", run.stderr);
    assert_eq!(server.files(REPO, "main").unwrap()["README.md"], renewed["README.md"]);
    desk.write("run/top_k/README.md", "---\nlicense: mit\n---\nMine.\n");
    pushed(&server, &desk, &[]);
    assert_eq!(text(&server.files(REPO, "main").unwrap(), "README.md"), "---\nlicense: mit\n---\nMine.\n");

    let args = ["run/top_k", "someone/saes@next/one", "--path", "new"];
    let run = Run::of(command(&server, &desk, "good", &args).output().unwrap());
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("created in `someone/saes` the branch next/one"), "{}", run.stderr);
    assert!(server.files(REPO, "next/one").unwrap().contains_key("new/ae.pt"));
    assert!(!server.files(REPO, "main").unwrap().contains_key("new/ae.pt"));
}

#[test]
fn the_card_names_the_base_model_and_dataset() {
    let desk = Desk::new();
    let sae = desk.golden_sae("top_k");
    let mut config = desk.json("top_k/config.json");
    config["trainer"]["lm_name"] = "EleutherAI/pythia-70m-deduped@main".into();
    config["buffer"] = serde_json::json!({
        "model": "EleutherAI/pythia-70m-deduped@main", "ctx_len": 128,
        "text": {"type": "hub_dataset", "repo": "monology/pile-uncopyrighted"},
    });
    fs::write(sae.join("config.json"), config.to_string()).unwrap();
    let said = desk.ok(&["push", "top_k", REPO, "--dry-run"]);
    for part in [
        "base_model:\n- EleutherAI/pythia-70m-deduped\n",
        "datasets:\n- monology/pile-uncopyrighted\n",
        "activations of [EleutherAI/pythia-70m-deduped](https://huggingface.co/EleutherAI/pythia-70m-deduped)",
    ] {
        assert!(said.contains(part), "`{part}` is not in\n{said}");
    }
    // Without ae.pt the reference cannot load it.
    assert!(!said.contains("load_dictionary") && !said.contains("<details>"), "{said}");
}

#[test]
fn a_dry_run_uploads_nothing() {
    let (server, desk) = (HubServer::start(), trained());
    let before = desk.files();
    let args = ["run/top_k", REPO, "--dry-run"];
    for mut command in [command(&server, &desk, "", &args), desk.program()] {
        if command.get_args().next().is_none() {
            command.arg("push").args(args);
        }
        let run = Run::of(command.output().unwrap());
        assert_eq!(run.code, 0, "{}", run.stderr);
        let size = fs::metadata(desk.path("run/top_k/ae.pt")).unwrap().len();
        assert!(run.stdout.contains("  ae.pt           ") && size > 0, "{}", run.stdout);
        assert!(run.stdout.contains("library_name: dictlearn"), "{}", run.stdout);
    }
    assert!(server.log("").is_empty());
    assert_eq!(desk.files(), before);
}

#[test]
fn invalid_uploads_are_refused() {
    let (server, desk) = (HubServer::start(), trained());
    server.put("others/theirs", "README.md", "");
    let mut said = String::new();
    let mut refuse = |token: &str, args: &[&str]| {
        let why = refused(&server, &desk, token, args).replace(&server.endpoint, "HUB");
        let why: String =
            why.lines().filter(|line| !line.starts_with("warning")).map(|line| line.to_owned() + "\n").collect();
        said += &format!("push {}, token `{token}`\n{why}\n", args.join(" "));
    };
    for args in [
        &["run", REPO][..],
        &["run/none", REPO],
        &["run/top_k", "saes"],
        &["run/top_k", "some one/saes"],
        &["run/top_k", "someone/saes@0123456789abcdef0123456789abcdef01234567"],
        &["run/top_k", REPO, "--path", "../a"],
        &["run/top_k", REPO, "--message", ""],
        &["run/top_k", "others/ours"],
    ] {
        refuse("good", args);
    }
    for token in ["", "bad", "reader"] {
        refuse(token, &["run/top_k", REPO]);
    }
    refuse("reader", &["run/top_k", "others/theirs"]);
    desk.write("run/top_k/README.md", "---\nlicense: [mit\n---\n");
    refuse("good", &["run/top_k", REPO]);
    let mut offline = desk.program();
    let run = Run::of(offline.args(["push", "run/top_k", REPO]).env("HF_TOKEN", "good").output().unwrap());
    assert_eq!(run.code, 2);
    said += "offline\n";
    said += run.stderr.lines().filter(|line| !line.starts_with("warning")).collect::<Vec<_>>().join("\n").as_str();
    let settings = vec![(r"/\S*/\.tmp\w+", "DESK")];
    insta::with_settings!({filters => settings}, { insta::assert_snapshot!(said) });
    assert!(server.commits().is_empty());
    assert!(server.log("/store/").is_empty());
}

#[test]
fn an_sae_lens_folder_can_be_pushed() {
    let (server, desk) = (HubServer::start(), trained());
    let lens: PathBuf = desk.path("lens");
    fs::create_dir(&lens).unwrap();
    fs::copy(desk.path("run/top_k/ae.safetensors"), lens.join("sae_weights.safetensors")).unwrap();
    desk.write(
        "lens/cfg.json",
        "{\"architecture\": \"topk\", \"d_in\": 32, \"d_sae\": 64, \"k\": 4, \"metadata\": {\"model_name\": \
         \"gpt2-small\", \"hook_name\": \"blocks.5.hook_resid_pre\", \"dataset_path\": \"Skylion007/openwebtext\"}}",
    );
    let run = Run::of(command(&server, &desk, "good", &["lens", REPO]).output().unwrap());
    assert_eq!(run.code, 0, "{}", run.stderr);
    let files = server.files(REPO, "main").unwrap();
    assert_eq!(files["sae_weights.safetensors"], fs::read(lens.join("sae_weights.safetensors")).unwrap());
    // The config in the parent folder is not the SAE's.
    assert!(desk.path("config.yaml").exists() && !files.contains_key("config.yaml"));
    let card = text(&files, "README.md");
    for part in [
        "| class | `topk` |",
        "| submodule | `blocks.5.hook_resid_pre` |",
        "datasets:\n- Skylion007/openwebtext\n",
        "SAE.load_from_disk(folder)",
        "dictlearn import sae_lens someone/saes --out lens",
    ] {
        assert!(card.contains(part), "`{part}` is not in\n{card}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_push_commits_nothing() {
    let (server, desk) = (HubServer::start(), trained());
    // The push waits for the store when the signal arrives.
    server.fail_upload("/store/", Fault::Status(503, "Retry-After: 60\r\n"));
    let mut push = command(&server, &desk, "good", &["run/top_k", REPO]).stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    let mut seen = false;
    while !seen && Instant::now() < until {
        seen = !server.log("PUT /store/").is_empty();
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(seen);
    std::thread::sleep(Duration::from_millis(200));
    let pid = push.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    assert_eq!(push.wait().unwrap().code(), Some(130));
    assert!(server.commits().is_empty());
}
