//! Reads tokenizer.json, and tokenises. The tokenizers crate trusts the file: it allocates tables of any stated length,
//! replaces a character with a megabyte if told to, and panics on inconsistent parts. This module guards against that.

use std::panic::{AssertUnwindSafe, catch_unwind};

use base64::prelude::{BASE64_STANDARD, Engine};
use dictlearn_core::prelude::*;
use tokenizers::Tokenizer;

/// Maximum factor by which normalizers and pre-tokenizers may lengthen a text. Published normalizers turn a character
/// into at most 34 bytes and then replace spaces; published pre-tokenizers turn bytes into characters or spaces into
/// symbols.
const GROWTH: usize = 1024;

/// Maximum number of special tokens that a template may add to a text.
const SPECIAL: usize = 1 << 12;

/// Reads a tokenizer from a file's bytes, or returns what is wrong with it.
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
        return Err(format!("it adds more than {SPECIAL} special tokens to a text"));
    }
    let mut tokenizer = caught(|| Tokenizer::from_bytes(bytes))?;
    // Ignore the file's padding and truncation: contexts are made here.
    tokenizer.with_padding(None);
    let _ = tokenizer.with_truncation(None);
    Ok(tokenizer)
}

/// Returns the token ids of a text, or what is wrong with the tokenizer.
pub fn ids(tokenizer: &Tokenizer, text: &str, add_special_tokens: bool) -> std::result::Result<Vec<i64>, String> {
    // `encode_fast` skips the offsets of tokens, which are not needed.
    let encoding = caught(|| tokenizer.encode_fast(text, add_special_tokens))?;
    Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
}

/// Returns the text of a token; `None` if the tokenizer cannot decode it.
pub fn text(tokenizer: &Tokenizer, id: u32) -> Option<String> {
    caught(|| tokenizer.decode(&[id], false)).ok()
}

/// Returns the bytes of a byte-level token that is part of a character, as `<0xC3>`; `None` for other names. The names are
/// those of GPT-2's `bytes_to_unicode`: bytes that do not print are the characters from U+0100 on.
pub fn bytes_of(name: &str) -> Option<String> {
    let prints = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let unprinted: Vec<u8> = (0..=255).filter(|byte| !prints(*byte)).collect();
    let byte = |c: char| match u32::from(c) {
        code @ 0..=255 => u8::try_from(code).ok().filter(|byte| prints(*byte)),
        code => unprinted.get(code as usize - 256).copied(),
    };
    let bytes = name.chars().map(byte).collect::<Option<Vec<u8>>>()?;
    let text = bytes.iter().map(|byte| format!("<0x{byte:02X}>")).collect();
    (!bytes.is_ascii()).then_some(text)
}

fn caught<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("its parts are inconsistent".to_owned()),
    }
}

/// Returns the maximum factor by which a normalizer, a pre-tokenizer or a sequence of them may lengthen a text.
fn growth(normalizer: &Value) -> std::result::Result<usize, String> {
    match normalizer.get("type").and_then(Value::as_str) {
        // A byte becomes a character of two bytes.
        Some("ByteLevel") => return Ok(2),
        // A space becomes a symbol of three bytes, and one is added before each piece.
        Some("Metaspace") => return Ok(4),
        _ => {}
    }
    let length = |key: &str| normalizer.get(key).and_then(Value::as_str).map_or(0, str::len);
    let mut growth = (1 + length("content")).saturating_mul(1 + length("prepend"));
    if let Some(charsmap) = normalizer.get("precompiled_charsmap").and_then(Value::as_str) {
        growth = growth.saturating_mul(longest_replacement(charsmap).ok_or("its precompiled_charsmap is truncated")?);
    }
    let inner = ["normalizers", "pretokenizers"].into_iter().filter_map(|key| normalizer.get(key)?.as_array());
    for inner in inner.flatten() {
        growth = growth.saturating_mul(self::growth(inner)?);
    }
    Ok(growth)
}

/// Returns how many special tokens the templates of a post-processor, or of a sequence of them, add to a text.
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

/// Returns the length of the longest text in SentencePiece's table of replacements; `None` if the table is truncated.
/// The table is a length, a trie of that many bytes, and texts that end with 0.
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
    fn parts_of_characters_are_shown_as_bytes() {
        assert_eq!(bytes_of("Ã").as_deref(), Some("<0xC3>"));
        assert_eq!(bytes_of("Ģ").as_deref(), Some("<0x80>"));
        assert_eq!(bytes_of("âĢ").as_deref(), Some("<0xE2><0x80>"));
        assert_eq!(bytes_of("<0xC3>"), None);
        assert_eq!(bytes_of("語"), None);
    }

    #[test]
    fn growth_and_special_tokens_are_bounded() {
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
