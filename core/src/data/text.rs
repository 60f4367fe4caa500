//! Text streams: the documents that a language model reads.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::InputError;

/// The config of a text stream.
pub trait TextConfig: Debug + Send + Sync {
    /// Opens the stream.
    fn build(&self) -> Result<Box<dyn TextStream>>;
}

crate::tagged::tagged! {
    /// A text's config, by `type`.
    TaggedText: TextConfig => Text {}
}

/// One item of a text stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A document, to be tokenised.
    Text(Document),
    /// A chat, to be formatted by the model's chat template and tokenised.
    Chat(Chat),
    /// A row of token ids with its attention mask. If the stream is tokenized it is a whole context, otherwise a
    /// document that needs no tokenizer.
    Tokens {
        /// Token ids, one per position.
        ids: Vec<i64>,
        /// True for text positions, false for padding.
        mask: Vec<bool>,
        /// Origin, for messages: `tokens.parquet:120`.
        origin: String,
    },
}

/// A document of a text stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// The text.
    pub text: String,
    /// Origin, for messages: `emma.txt:120`.
    pub origin: String,
}

/// A chat of a text stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chat {
    /// Messages, objects with `role` and `content`.
    pub messages: Vec<Value>,
    /// Origin, for messages: `chats.jsonl:120`.
    pub origin: String,
}

/// A text that a plugin ships: `text: {type: embedded, name: NAME}`. Documents are separated by empty lines.
pub struct EmbeddedText {
    /// Name.
    pub name: &'static str,
    /// Split: `train` or `held_out`.
    pub split: &'static str,
    /// The text.
    pub text: &'static str,
}

inventory::collect!(EmbeddedText);

/// A text for which the user has written no config.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// A dataset, by its repository on the Hub.
    Dataset(&'a str),
    /// A JSON Lines file with the documents under `text`.
    Lines(&'a Path),
    /// The text that ships with the program.
    Bundled,
}

/// Writes such a text into a config. Submitted by the plugin that reads it.
pub struct WrittenText {
    /// Returns the config under `text`, or `None` if this plugin does not read the text.
    pub config: fn(Wanted) -> Option<Value>,
}

inventory::collect!(WrittenText);

/// Returns the config of a wanted text, if a plugin reads it.
pub fn written(wanted: Wanted) -> Option<Value> {
    inventory::iter::<WrittenText>.into_iter().find_map(|text| (text.config)(wanted))
}

/// A stream of documents, or of rows of tokens.
pub trait TextStream: Send {
    /// Returns the next item, or `None` at the end.
    fn next_record(&mut self) -> Result<Option<Record>>;

    /// True if the items are rows of tokens, each a whole context.
    fn is_tokenized(&self) -> bool {
        false
    }

    /// Returns the length of the longest row of tokens, if known in advance.
    fn longest_row(&self) -> Option<i64> {
        None
    }

    /// Returns the local files that it reads, with their lengths when it was built. A resumed run uses them to detect
    /// whether its text has changed.
    fn files(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }

    /// Returns the number of items delivered since the beginning.
    fn position(&self) -> u64;

    /// Returns to the beginning and skips `position` items.
    fn seek(&mut self, position: u64) -> Result<()>;

    /// Reports that a delivered record is bad, and why. The stream counts it as skipped or returns an error, which ends
    /// the run.
    fn refuse(&mut self, origin: &str, why: &str) -> Result<()> {
        bail!(InputError::new(format!("{origin}: {why}")));
    }

    /// Returns the number of bad records skipped, with the origin and reason of the first.
    fn skipped(&self) -> (u64, Option<String>) {
        (0, None)
    }

    /// Returns the number of files skipped, wholly or from where they break off, with place and reason of the first.
    fn skipped_files(&self) -> (u64, Option<String>) {
        (0, None)
    }
}
