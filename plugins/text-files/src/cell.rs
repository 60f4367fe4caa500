//! One value of a text's column, and why a file cannot be read.

use std::fmt;

use serde_json::Value;

/// Why a file cannot be read, with its name.
#[derive(Debug)]
pub struct Unreadable(pub String);

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unreadable {}

/// What a record holds.
pub struct Cell {
    /// The field that was read.
    pub column: String,
    /// Its value.
    pub value: Value,
    /// The `attention_mask` beside it.
    pub mask: Option<Value>,
}
