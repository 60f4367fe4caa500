//! Links in every plugin that Cargo.toml names, so that adding or removing one is one line there.
//!
//! A plugin registers itself when it is linked, but nothing calls it by name, and rustc leaves out a crate that is not
//! used. What is written here is one `use dictlearn_… as _;` for each dependency of that name.

use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=Cargo.toml");
    // Tests that ask a Python library are ignored by name where none is said.
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
    let (_, dependencies) = manifest.split_once("\n[dependencies]\n").expect("Cargo.toml has [dependencies]");
    let uses: String = dependencies
        .lines()
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split([' ', '.', '=']).next())
        .filter(|name| name.starts_with("dictlearn-") && !["dictlearn-core", "dictlearn-process"].contains(name))
        .map(|name| {
            let name = name.replace('-', "_");
            let short = name.trim_start_matches("dictlearn_");
            format!("pub use {name} as {short};\n")
        })
        .collect();
    fs::write(Path::new(&env::var_os("OUT_DIR").unwrap()).join("plugins.rs"), uses).unwrap();
}
