//! Links in every plugin that Cargo.toml names, so that adding or removing one is one line there.
//!
//! A plugin registers itself when it is linked, but nothing calls it by name, and rustc leaves out a crate that is not
//! used. This writes one `pub use dictlearn_… as …;` for each dependency of that name.

use std::path::Path;
use std::{env, fs};

/// Dependencies of that name that are not plugins.
const OTHERS: [&str; 2] = ["dictlearn-core", "dictlearn-process"];

fn main() {
    println!("cargo::rerun-if-changed=Cargo.toml");
    // Tests that need a Python library are ignored by name where no variable names one.
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
        // A line of `[dependencies]`, or a table of its own, as `cargo package` writes it.
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
