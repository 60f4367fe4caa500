//! Text from .txt, .jsonl and .parquet files, on this machine or of a dataset of the Hub, read as a stream: memory does not
//! grow with the files. Text and JSON may be compressed (.gz, .zst) and in UTF-8, or in UTF-16 with a byte order mark.
//!
//! In a .txt file documents are paragraphs, lines or the whole file; in a .jsonl file each line is a JSON object with
//! the text in one field; in a .parquet file it is a column. A field may hold a chat instead of a text, a list of messages
//! `{role, content}` (or `{from, value}`), which the model's tokenizer turns into text, or a list of token ids, with an
//! `attention_mask` beside it where there is padding.
//!
//! A bad record is skipped and counted, or ends the run with `strict: true`; the message names file and line (or row). A file
//! that cannot be read ends the run, unless `strict: false` lets it go on without that file or its rest.

mod cell;
mod dataset;
mod files;
mod rows;
mod splits;
mod stream;

pub use dataset::HubDatasetConfig;
pub use files::TextFilesConfig;
pub use stream::Documents;

use dictlearn_core::data::text::{Wanted, WrittenText};
use dictlearn_core::inventory;
use serde_json::json;

inventory::submit! {
    WrittenText {
        config: |wanted| match wanted {
            Wanted::Dataset(repo) => Some(json!({"type": HubDatasetConfig::NAME, "repo": repo})),
            Wanted::Lines(path) => Some(json!({"type": TextFilesConfig::NAME, "path": path})),
            _ => None,
        },
    }
}
