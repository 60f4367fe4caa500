//! Links every plugin that Cargo.toml names, so that adding or removing one takes one line there.
//!
//! A plugin registers itself when it is linked, but rustc drops crates that nothing uses. This script writes one
//! `pub use dictlearn_… as …;` for each plugin among the dependencies.

use std::path::Path;
use std::{env, fs};

/// Dependencies named `dictlearn-…` that are not plugins.
const OTHERS: [&str; 2] = ["dictlearn-core", "dictlearn-process"];

fn main() {
    println!("cargo::rerun-if-changed=Cargo.toml");
    // Tests that need a Python library are ignored if its variable is unset.
    for (cfg, variable) in
        [("has_dictionary_learning", "DICTLEARN_TEST_PYTHON"), ("has_sae_lens", "DICTLEARN_TEST_PYTHON_SAE_LENS")]
    {
        println!("cargo::rerun-if-env-changed={variable}");
        println!("cargo::rustc-check-cfg=cfg({cfg})");
        if env::var_os(variable).is_some_and(|python| !python.is_empty()) {
            println!("cargo::rustc-cfg={cfg}");
        }
    }
    let manifest = Path::new(&env::var_os("CARGO_MANIFEST_DIR").unwrap()).join("Cargo.toml");
    let manifest = fs::read_to_string(manifest).unwrap();
    let mut uses = String::new();
    let mut section = "";
    for line in manifest.lines() {
        // A line of `[dependencies]`, or a `[dependencies.NAME]` table as `cargo package` writes it.
        let name = match line.strip_prefix('[') {
            Some(table) => {
                section = table.trim_end_matches(']');
                section.strip_prefix("dependencies.").unwrap_or_default()
            }
            None if section == "dependencies" => line.split([' ', '.', '=']).next().unwrap_or_default(),
            None => continue,
        };
        if name.starts_with("dictlearn-") && !OTHERS.contains(&name) {
            let name = name.replace('-', "_");
            uses += &format!("pub use {name} as {};\n", name.trim_start_matches("dictlearn_"));
        }
    }
    fs::write(Path::new(&env::var_os("OUT_DIR").unwrap()).join("plugins.rs"), uses).unwrap();
}
