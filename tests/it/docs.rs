//! README, guides, reference pages and configs agree with the program.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::Desk;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every config in `configs/`.
pub fn configs() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(root().join("configs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(found.iter().all(|path| path.extension().is_some_and(|extension| extension == "yaml")));
    assert!(found.len() > 5, "{found:?}");
    found.sort();
    found
}

/// The fenced blocks of a language in the pages that people read, with the page of each.
fn blocks(language: &str) -> Vec<(String, String)> {
    let mut pages = vec!["README.md".to_owned(), "CONTRIBUTING.md".to_owned(), "ARCHITECTURE.md".to_owned()];
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        // `cargo xtask ci` follows the guide of plugins.
        if name.ends_with(".md") && name != "writing-plugins.md" {
            pages.push(format!("docs/{name}"));
        }
    }
    let mut found = Vec::new();
    for page in pages {
        let text = fs::read_to_string(root().join(&page)).unwrap();
        // Every other part stands between fences, its first line says what it is.
        for block in format!("\n{text}").split("\n```").skip(1).step_by(2) {
            let (what, text) = block.split_once('\n').unwrap();
            if what == language {
                found.push((page.clone(), format!("{text}\n")));
            }
        }
    }
    assert!(!found.is_empty(), "no page has a block of {language}");
    found
}

/// A block with `saes`, `source` and `steps` is a config; others change the quickstart.
#[test]
fn every_config_of_the_pages_is_sound() {
    let desk = Desk::new();
    std::os::unix::fs::symlink(root().join("configs"), desk.path("configs")).unwrap();
    desk.write("mine.txt", "It is a truth universally acknowledged.\n");
    for (page, yaml) in blocks("yaml") {
        let whole = ["saes:", "source:", "steps:"]
            .iter()
            .all(|key| yaml.lines().any(|line| line == *key || line.starts_with(&format!("{key} "))));
        let base = if whole || yaml.starts_with("include:") { "" } else { "include: configs/quickstart.yaml\n" };
        desk.write("config.yaml", &format!("{base}{yaml}"));
        let args = ["train", "config.yaml", "--dry-run", "--output-dir", "out"];
        if yaml.contains("HuggingFaceTB/") {
            // Only what the Hub would have is missing.
            let said = desk.refused(&args);
            let places: Vec<&str> = said.lines().filter(|line| line.trim_start().starts_with("--> ")).collect();
            let of_the_hub = |place: &str| place.contains("(source.model)") || place.contains("(source.text.repo)");
            assert!(matches!(places[..], [place] if of_the_hub(place)), "{page}: {said}\n{yaml}");
        } else {
            let run = desk.run(&args);
            assert!(run.stdout.contains("saes:"), "{page}: {}\n{yaml}", run.stderr);
        }
    }
}

/// The whole config that a page shows is the file that it names.
#[test]
fn the_config_page_shows_the_quickstart() {
    let quickstart = fs::read_to_string(root().join("configs/quickstart.yaml")).unwrap();
    assert!(blocks("yaml").iter().any(|(page, yaml)| page == "docs/configs.md" && *yaml == quickstart));
}

/// With `--help`, the program reads a command's words and runs nothing.
#[test]
fn every_command_of_the_pages_exists() {
    let desk = Desk::new();
    let program = desk.program().get_program().to_owned();
    std::os::unix::fs::symlink(program, desk.path("dictlearn")).unwrap();
    let mut found = 0;
    for (page, text) in blocks("sh") {
        for line in text.lines().filter(|line| line.starts_with("dictlearn ")) {
            let command = line.split(" #").next().unwrap().split(" > ").next().unwrap();
            let mut shell = std::process::Command::new("sh");
            let output =
                shell.current_dir(desk.dir.path()).args(["-c", &format!("./{command} --help")]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{page}: {line}\n{said}");
            found += 1;
        }
    }
    assert!(found > 30, "{found}");
}

#[test]
fn python_of_the_pages_compiles() {
    for (page, code) in blocks("python") {
        let compile = format!("compile({code:?}, 'page', 'exec')");
        let status = std::process::Command::new("python3").args(["-c", &compile]).status().unwrap();
        assert!(status.success(), "{page}:\n{code}");
    }
}

/// Configs that need files outside the repository, and the key that names them.
const WANTING: [(&str, &str); 3] = [
    ("activation-cache.yaml", "source.path"),
    ("mix.yaml", "source.text.streams[0].text.repo"),
    ("smollm2.yaml", "source.model"),
];

#[test]
fn every_config_passes_a_dry_run() {
    let desk = Desk::new();
    for path in configs() {
        let name = path.file_name().unwrap().to_str().unwrap();
        if let Some((_, key)) = WANTING.iter().find(|(wanting, _)| *wanting == name) {
            // Missing files are found last, so this error shows that the rest is valid.
            let set = format!("{key}=\"{}\"", desk.path("absent").display());
            let said = desk.refused(&["train", path.to_str().unwrap(), "--dry-run", "--set", &set]);
            assert!(said.contains(&format!("({key})")), "{said}");
            continue;
        }
        let said = desk.ok(&["train", path.to_str().unwrap(), "--dry-run", "--output-dir", "out"]);
        assert!(said.contains("saes:"), "{}", path.display());
    }
    let sweep = root().join("configs/sweep.yaml");
    let said = desk.ok(&["train", sweep.to_str().unwrap(), "--dry-run", "--profile", "quick"]);
    assert!(said.contains("stop_after: 200") && said.contains("name: top_k-"), "{said}");
    assert!(desk.files().is_empty());
}

/// `cargo xtask ci` assembles the guide's files and runs its commands; this test compares them with the example.
#[test]
fn the_plugin_guide_matches_the_example() {
    let guide = fs::read_to_string(root().join("docs/writing-plugins.md")).unwrap();
    for file in ["src/lib.rs", "config.yaml"] {
        let blocks = guide.split("\n```").skip(1).step_by(2);
        let pieces = blocks.filter_map(|block| {
            let (what, text) = block.split_once('\n')?;
            (what.split_once(' ')?.1 == file).then_some(text)
        });
        let written = pieces.collect::<Vec<_>>().join("\n\n") + "\n";
        let example = fs::read_to_string(root().join("examples/out-of-tree-plugin").join(file)).unwrap();
        assert!(written == example, "{file} differs between guide and example");
    }
}

#[test]
fn the_reference_pages_are_up_to_date() {
    let desk = Desk::new();
    let (written, out) = (root().join("docs/reference"), desk.path("reference"));
    // The examples depend on the files in the working directory.
    let status = desk.program().current_dir(root()).args(["docs", "--out", out.to_str().unwrap()]).status().unwrap();
    assert!(status.success());
    let files = |dir: &Path| {
        let mut found = Vec::new();
        let mut folders = vec![dir.to_owned()];
        while let Some(folder) = folders.pop() {
            for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path.strip_prefix(dir).unwrap().to_owned();
                    found.push((name, fs::read_to_string(&path).unwrap()));
                }
            }
        }
        found.sort();
        found
    };
    let (written, made) = (files(&written), files(&out));
    let names = |files: &[(PathBuf, String)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&written), names(&made), "run `cargo xtask docs`");
    for ((name, written), (_, made)) in written.iter().zip(&made) {
        assert!(written == made, "docs/reference/{} is stale: run `cargo xtask docs`", name.display());
    }
}

#[test]
fn the_readme_lists_every_trainer() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let table = readme.split("## Methods").nth(1).unwrap().split("\n## ").next().unwrap();
    let listed = Desk::new().ok(&["list", "trainers"]);
    let mut found = 0;
    for line in listed.lines() {
        let name = line.split_whitespace().next().unwrap();
        assert!(table.contains(&format!("`{name}`")), "the README's table lacks `{name}`");
        found += 1;
    }
    assert!(found > 8, "{listed}");
}
