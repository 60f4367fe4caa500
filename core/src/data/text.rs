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

crate::component::tagged! {
    /// A text's config, by `type`.
    TaggedText: TextConfig => Text {}
}

/// One item of a text stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A document, to be tokenised.
    Text(Document),
    /// A chat, to be put into the model's own form of chats and tokenised.
    Chat(Chat),
    /// A row of token ids with its attention mask: a context as it stands, if the stream is tokenized, and otherwise a
    /// document that needs no tokenizer.
    Tokens {
        /// Token ids, one a position.
        ids: Vec<i64>,
        /// Which positions are text (true) and which are padding.
        mask: Vec<bool>,
        /// Where it is from, for messages: `tokens.parquet:120`.
        origin: String,
    },
}

/// A document of a text stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// The text.
    pub text: String,
    /// Where it is from, for messages: `emma.txt:120`.
    pub origin: String,
}

/// A chat of a text stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chat {
    /// Its messages, objects with `role` and `content`.
    pub messages: Vec<Value>,
    /// Where it is from, for messages: `chats.jsonl:120`.
    pub origin: String,
}

/// A text that a plugin ships: `text: {type: embedded, name: NAME}`. Documents are separated by empty lines.
pub struct EmbeddedText {
    /// Its name.
    pub name: &'static str,
    /// Which part of it: `train` or `held_out`.
    pub split: &'static str,
    /// The text.
    pub text: &'static str,
}

inventory::collect!(EmbeddedText);

/// A text that is wanted where no user has written one into a config.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// A dataset, by its repository on the Hub.
    Dataset(&'a str),
    /// A file of lines of JSON with the documents under `text`.
    Lines(&'a Path),
    /// Whatever ships with the program.
    Bundled,
}

/// How such a text is written in a config. Submitted by the plugin that reads it.
pub struct WrittenText {
    /// The config under `text`; `None` for what this plugin does not read.
    pub config: fn(Wanted) -> Option<Value>,
}

inventory::collect!(WrittenText);

/// The config of a text that is wanted, if a plugin reads it.
pub fn written(wanted: Wanted) -> Option<Value> {
    inventory::iter::<WrittenText>.into_iter().find_map(|text| (text.config)(wanted))
}

/// A stream of documents, or of rows of tokens.
pub trait TextStream: Send {
    /// The next item, or `None` at the end.
    fn next_record(&mut self) -> Result<Option<Record>>;

    /// Whether the items are rows of tokens, which are contexts as they stand.
    fn is_tokenized(&self) -> bool {
        false
    }

    /// Positions of the longest row of tokens, where that is known beforehand.
    fn longest_row(&self) -> Option<i64> {
        None
    }

    /// The files of this machine that it reads, with the lengths that they had when it was built: by them a resumed run sees
    /// whether its text is as it was.
    fn files(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }

    /// How many items were delivered since the beginning.
    fn position(&self) -> u64;

    /// Goes to the beginning and skips `position` items.
    fn seek(&mut self, position: u64) -> Result<()>;

    /// A record that was delivered turns out to be bad, for this reason: it is counted as skipped, or ends the run.
    fn refuse(&mut self, origin: &str, why: &str) -> Result<()> {
        bail!(InputError::new(format!("{origin}: {why}")));
    }

    /// How many bad records were skipped, with the place and reason of the first.
    fn skipped(&self) -> (u64, Option<String>) {
        (0, None)
    }

    /// How many files were skipped, wholly or from where they break off, with the place and reason of the first.
    fn skipped_files(&self) -> (u64, Option<String>) {
        (0, None)
    }
}
