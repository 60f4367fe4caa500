//! dictlearn with every bundled plugin linked in.
//!
//! A binary of your own that adds a plugin needs this crate and yours:
//! `use {dictlearn as _, my_plugin as _};`, then [`dictlearn_core::cli::main`].

// The plugins are those of Cargo.toml: a line there is all that the program knows of each (see build.rs).
include!(concat!(env!("OUT_DIR"), "/plugins.rs"));
