//! Reading a tokenizer.json, and tokenising. The tokenizers crate takes a file at its word: it takes memory for a table as
//! long as the file says, replaces a letter with a megabyte where it is told to, and panics where parts do not fit together.

use std::panic::{AssertUnwindSafe, catch_unwind};

use base64::prelude::{BASE64_STANDARD, Engine};
use dictlearn_core::prelude::*;
use tokenizers::Tokenizer;

/// How many times longer a text may become before it is cut into tokens. The normalizers of published models make a letter 34
/// bytes at most and then replace spaces, and their pre-tokenizers write bytes as letters or spaces as signs.
const GROWTH: usize = 1024;

/// How many special tokens a template may put around a text.
const SPECIAL: usize = 1 << 12;

/// The tokenizer of a file's bytes, or what is wrong with it.
pub fn read(bytes: &[u8]) -> std::result::Result<Tokenizer, String> {
    #[derive(Deserialize)]
    struct Growing {
        #[serde(default)]
        normalizer: Value,
        #[serde(default)]
        pre_tokenizer: Value,
        #[serde(default)]
        post_processor: Value,
    }
    let Growing { normalizer, pre_tokenizer, post_processor } =
        serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if growth(&normalizer)?.saturating_mul(growth(&pre_tokenizer)?) > GROWTH {
        return Err(format!("it may make a text more than {GROWTH} times longer"));
    }
    if specials(&post_processor) > SPECIAL {
        return Err(format!("it puts more than {SPECIAL} special tokens around a text"));
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

/// How many times longer a normalizer or a pre-tokenizer may make a text, one or a sequence of them.
fn growth(normalizer: &Value) -> std::result::Result<usize, String> {
    match normalizer.get("type").and_then(Value::as_str) {
        // A byte becomes a letter of two.
        Some("ByteLevel") => return Ok(2),
        // A space becomes a sign of three, and one stands before each piece.
        Some("Metaspace") => return Ok(4),
        _ => {}
    }
    let length = |key: &str| normalizer.get(key).and_then(Value::as_str).map_or(0, str::len);
    let mut growth = (1 + length("content")).saturating_mul(1 + length("prepend"));
    if let Some(charsmap) = normalizer.get("precompiled_charsmap").and_then(Value::as_str) {
        growth = growth.saturating_mul(longest_replacement(charsmap).ok_or("its precompiled_charsmap is cut short")?);
    }
    let inner = ["normalizers", "pretokenizers"].into_iter().filter_map(|key| normalizer.get(key)?.as_array());
    for inner in inner.flatten() {
        growth = growth.saturating_mul(self::growth(inner)?);
    }
    Ok(growth)
}

/// How many special tokens a post-processor, one or a sequence of them, puts around a text by its templates.
fn specials(processor: &Value) -> usize {
    let ids = |piece: &Value| -> Option<usize> {
        let name = piece.get("SpecialToken")?.get("id")?.as_str()?;
        Some(processor.get("special_tokens")?.get(name)?.get("ids")?.as_array()?.len())
    };
    let pieces = ["single", "pair"].into_iter().filter_map(|key| processor.get(key)?.as_array()).flatten();
    let own: usize = pieces.filter_map(ids).fold(0, usize::saturating_add);
    let inner = processor.get("processors").and_then(Value::as_array).into_iter().flatten();
    inner.map(specials).fold(own, usize::saturating_add)
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
        let byte_level = r#"{"type": "ByteLevel", "add_prefix_space": true}"#;
        assert_eq!(of(&format!(r#"{{"type": "Sequence", "pretokenizers": [{byte_level}, {byte_level}]}}"#)), Ok(4));
        let template = |ids: &str| {
            let pieces = r#"[{"SpecialToken": {"id": "s", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]"#;
            let template = format!(r#"{{"single": {pieces}, "special_tokens": {{"s": {{"ids": [{ids}]}}}}}}"#);
            specials(&serde_json::from_str(&format!(r#"{{"processors": [{template}, {template}]}}"#)).unwrap())
        };
        assert_eq!((template("1"), template("1, 2, 3")), (2, 6));
    }
}
