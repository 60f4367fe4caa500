//! dictlearn with every bundled plugin linked in.
//!
//! A binary of your own that adds a plugin needs this crate and yours:
//! `use {dictlearn as _, my_plugin as _};`, then [`dictlearn_core::cli::main`].

// The plugins: a line here and one in Cargo.toml is all that the program knows of each.
use dictlearn_dictionary_identity as _;
use dictlearn_embedded_austen as _;
use dictlearn_logger_jsonl as _;
use dictlearn_method_standard as _;
use dictlearn_method_top_k as _;
use dictlearn_metric_loss_recovered as _;
use dictlearn_metric_reconstruction as _;
use dictlearn_model_gpt_neox as _;
use dictlearn_source_language_model as _;
use dictlearn_source_tensor_file as _;
use dictlearn_text_embedded as _;
use dictlearn_text_files as _;
use dictlearn_text_token_file as _;
