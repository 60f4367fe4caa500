//! Reading a tokenizer.json, and tokenising. The tokenizers crate takes a file at its word: it takes memory for a table as
//! long as the file says, replaces a letter with a megabyte where it is told to, and panics where parts do not fit together.

use std::panic::{catch_unwind, AssertUnwindSafe};

use base64::prelude::{Engine, BASE64_STANDARD};
use dictlearn_core::prelude::*;
use tokenizers::Tokenizer;

/// How many times longer a normalizer may make a text. Those of published models make a letter 34 bytes at most, and then
/// replace spaces.
const GROWTH: usize = 256;

/// The tokenizer of a file's bytes, or what is wrong with it.
pub fn read(bytes: &[u8]) -> std::result::Result<Tokenizer, String> {
    #[derive(Deserialize)]
    struct Normalized {
        #[serde(default)]
        normalizer: Value,
    }
    let Normalized { normalizer } = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if growth(&normalizer)? > GROWTH {
        return Err(format!("its normalizer may make a text more than {GROWTH} times longer"));
    }
    let mut tokenizer = caught(|| Tokenizer::from_bytes(bytes))?;
    // Length and padding are ours to decide, whatever the file was saved with.
    tokenizer.with_padding(None);
    let _ = tokenizer.with_truncation(None);
    Ok(tokenizer)
}

/// A text as token ids, or what is wrong with the tokenizer.
pub fn ids(tokenizer: &Tokenizer, text: &str, add_special_tokens: bool) -> std::result::Result<Vec<i64>, String> {
    // Without the places of tokens in the text, which nobody asks for.
    let encoding = caught(|| tokenizer.encode_fast(text, add_special_tokens))?;
    Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
}

/// The text of a token, if the tokenizer knows it.
pub fn text(tokenizer: &Tokenizer, id: u32) -> Option<String> {
    caught(|| tokenizer.decode(&[id], false)).ok()
}

fn caught<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("its parts do not fit together".to_owned()),
    }
}

/// How many times longer a normalizer may make a text, one or a sequence of them.
fn growth(normalizer: &Value) -> std::result::Result<usize, String> {
    let length = |key: &str| normalizer.get(key).and_then(Value::as_str).map_or(0, str::len);
    let mut growth = (1 + length("content")).saturating_mul(1 + length("prepend"));
    if let Some(charsmap) = normalizer.get("precompiled_charsmap").and_then(Value::as_str) {
        growth = growth.saturating_mul(longest_replacement(charsmap).ok_or("its precompiled_charsmap is cut short")?);
    }
    for inner in normalizer.get("normalizers").and_then(Value::as_array).into_iter().flatten() {
        growth = growth.saturating_mul(self::growth(inner)?);
    }
    Ok(growth)
}

/// The longest text that SentencePiece's table of replacements has, if the table is as long as it says: its length, a trie
/// of that many bytes, and texts that end with 0.
fn longest_replacement(charsmap: &str) -> Option<usize> {
    let bytes = BASE64_STANDARD.decode(charsmap).ok()?;
    let (length, rest) = bytes.split_first_chunk()?;
    let texts = rest.get(usize::try_from(u32::from_le_bytes(*length)).ok()?..)?;
    Some(texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_of_normalizers() {
        let of = |json: &str| growth(&serde_json::from_str(json).unwrap());
        assert_eq!(of("null"), Ok(1));
        assert_eq!(of(r#"{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}"#), Ok(4));
        let charsmap = |bytes: &[u8]| {
            let inner = BASE64_STANDARD.encode(bytes);
            of(&format!(r#"{{"normalizers": [{{"precompiled_charsmap": "{inner}"}}, {{"content": "ab"}}]}}"#))
        };
        assert_eq!(charsmap(b"\x04\0\0\0triea\0bcd\0"), Ok(3 * 3));
        assert!(charsmap(b"\xff\xff\xff\xfftrie").is_err());
        assert!(charsmap(b"").is_err());
    }
}
