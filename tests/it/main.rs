//! Tests that cross crates: the program as a process, parity with the reference, and the contract of every plugin.

use dictlearn_process as _;

mod common;

mod activation_cache;
mod cli;
mod config;
mod contract;
mod docs;
mod encode;
mod experts;
mod families;
mod figures;
mod formats;
mod fuzz;
mod golden;
mod held_out;
mod hub;
mod hub_server;
mod language_model;
mod library;
mod push;
mod python;
mod resume;
mod sites;
mod soak;
mod special_tokens;
mod start;
mod streams;
mod text;
mod transcoders;
mod wrappers;
