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

#[test]
fn every_config_in_the_readme_is_in_configs() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let mut blocks = 0;
    for block in readme.split("```yaml\n").skip(1) {
        let yaml = block.split("```").next().unwrap();
        assert!(configs().iter().any(|path| fs::read_to_string(path).unwrap() == yaml), "not in configs/:\n{yaml}");
        blocks += 1;
    }
    assert!(blocks > 0);
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
fn the_readme_lists_every_component() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let table = readme.split("## What is supported").nth(1).unwrap().split("\n## ").next().unwrap();
    let listed = Desk::new().ok(&["list"]);
    let mut found = 0;
    for line in listed.lines().filter(|line| line.starts_with("  ")) {
        let name = line.split_whitespace().next().unwrap();
        assert!(table.contains(&format!("`{name}`")), "the README's table lacks `{name}`");
        found += 1;
    }
    assert!(found > 40, "{listed}");
}
