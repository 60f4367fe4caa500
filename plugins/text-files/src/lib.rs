//! Text from .txt, .jsonl and .parquet files, on this machine or of a dataset of the Hub, read as a stream: memory does not
//! grow with the files. Text and JSON may be compressed (.gz, .zst).
//!
//! In a .txt file documents are paragraphs, lines or the whole file; in a .jsonl file each line is a JSON object with
//! the text in one field; in a .parquet file it is a column. A field may hold a chat instead of a text, a list of messages
//! `{role, content}` (or `{from, value}`), which the model's tokenizer turns into text. A bad record is skipped and
//! counted, or ends the run with `strict: true`; either way the message names file and line (or row). Where a compressed
//! file breaks off, what stands before is used, and the break is a bad record.

mod dataset;
mod files;
mod rows;
mod stream;

pub use dataset::HubDatasetConfig;
pub use files::TextFilesConfig;
pub use stream::Documents;

/// The field of a record that holds the text, unless told otherwise.
fn column() -> String {
    "text".to_owned()
}
