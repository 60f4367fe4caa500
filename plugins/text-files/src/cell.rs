//! A value of a text column, and the error of an unreadable file.

use std::fmt;

use serde_json::Value;

/// Why a file cannot be read; the message names the file.
#[derive(Debug)]
pub struct Unreadable(pub String);

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unreadable {}

/// The value of a record's text field.
pub struct Cell {
    /// Name of the field.
    pub column: String,
    /// Value.
    pub value: Value,
    /// The record's `attention_mask`.
    pub mask: Option<Value>,
}
