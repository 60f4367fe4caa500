//! Text streamed from .txt, .jsonl and .parquet files, local or on the Hub: memory does not grow with the files. Text
//! and JSON may be compressed (.gz, .zst). They are in UTF-8, or in UTF-16 with a byte order mark.
//!
//! In a .txt file, documents are paragraphs, lines or the whole file. In a .jsonl file, each line is a JSON object with
//! the text in one field. In a .parquet file, the text is a column. Instead of text, a field may hold a chat: a list of
//! messages `{role, content}` (or `{from, value}`), which the model's tokenizer turns into text. It may also hold a
//! list of token ids, with an `attention_mask` in the same record if there is padding.
//!
//! A bad record is skipped and counted, or stops the run with `strict: true`; the message names file and line (or row).
//! An unreadable file stops the run. With `strict: false` the run continues without that file or the rest of it.

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
