//! Files of this machine, opened in one place, so that a Git LFS pointer is recognised whatever was expected instead.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use memmap2::Mmap;
use serde_json::Value;

use crate::error::InputError;

/// Git LFS writes no longer pointers.
const LONGEST_POINTER: u64 = 1024;

/// Opens a file for reading.
///
/// # Errors
///
/// There is no such file, it cannot be read, or it is a Git LFS pointer.
pub fn open(path: &Path) -> Result<File, InputError> {
    let refused = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => InputError::no_file(path),
        _ => InputError::new(format!("cannot read {}: {error}", path.display())),
    };
    let mut file = File::open(path).map_err(refused)?;
    // A pipe must not be read ahead.
    if file.metadata().is_ok_and(|file| file.is_file() && file.len() <= LONGEST_POINTER) {
        let mut start = Vec::new();
        file.by_ref().take(LONGEST_POINTER).read_to_end(&mut start).map_err(refused)?;
        if is_pointer(&start) {
            return Err(InputError::new(format!(
                "{}: this is a Git LFS pointer, not the file that it stands for",
                path.display()
            ))
            .help("run `git lfs pull` in its repository, or download the file itself"));
        }
        file.rewind().map_err(refused)?;
    }
    Ok(file)
}

/// A file's bytes. Fails as [`open`] does.
pub fn read(path: &Path) -> Result<Vec<u8>, InputError> {
    let mut bytes = Vec::new();
    let read = open(path)?.read_to_end(&mut bytes);
    read.map_err(|error| InputError::new(format!("cannot read {}: {error}", path.display())))?;
    Ok(bytes)
}

/// A file's text. Fails as [`open`] does, and where it is not UTF-8.
pub fn read_text(path: &Path) -> Result<String, InputError> {
    String::from_utf8(read(path)?).map_err(|_| InputError::new(format!("{} is not text in UTF-8", path.display())))
}

/// JSON as Python's library writes it: `NaN`, `Infinity` and `-Infinity`, which JSON does not have, are read as null.
pub fn parse_json(bytes: &[u8]) -> serde_json::Result<Value> {
    let strict = serde_json::from_slice(bytes);
    if strict.is_ok() {
        return strict;
    }
    let (mut plain, mut rest, mut in_text) = (Vec::with_capacity(bytes.len()), bytes, false);
    while let [first, after @ ..] = rest {
        let word = [&b"NaN"[..], b"Infinity", b"-Infinity"].into_iter().find(|word| !in_text && rest.starts_with(word));
        if let Some(word) = word {
            plain.extend(b"null");
            rest = &rest[word.len()..];
            continue;
        }
        plain.push(*first);
        rest = after;
        match (first, rest) {
            (b'"', _) => in_text = !in_text,
            // What is escaped ends no text.
            (b'\\', [escaped, after @ ..]) => {
                plain.push(*escaped);
                rest = after;
            }
            _ => {}
        }
    }
    // Where that is no JSON either, the first error is the one whose place is in the file.
    serde_json::from_slice(&plain).or(strict)
}

/// A file, mapped into memory. Fails as [`open`] does.
pub fn map(path: &Path) -> Result<Mmap, InputError> {
    let file = open(path)?;
    // SAFETY: the map is read-only; a file that another process shortens meanwhile would raise SIGBUS, which any reader
    // of mapped weights accepts.
    let map = unsafe { Mmap::map(&file) };
    map.map_err(|error| InputError::new(format!("cannot read {}: {error}", path.display())))
}

/// Lets the system take back the memory that reading part of a map brought in. Reading it again reads the file again.
pub(crate) fn forget(map: &Mmap, part: Range<usize>) {
    // Whole pages only: those at the ends may hold parts of other tensors, which is harmless.
    #[cfg(unix)]
    // SAFETY: the map is of a file and read-only, so pages that are dropped come back as they were.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, part.start, part.len()) };
    #[cfg(not(unix))]
    let _ = (map, part);
}

/// Whether these bytes are what Git LFS leaves in a file's place
/// (<https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>); its first releases named another site.
pub fn is_pointer(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let mut lines = text.lines();
    let version = lines.next().unwrap_or_default();
    let sites = ["version https://git-lfs.github.com/spec/", "version https://hawser.github.com/spec/"];
    sites.iter().any(|site| version.starts_with(site)) && lines.any(|line| line.starts_with("oid sha256:"))
}

/// Reads a JSON file.
pub fn read_json(path: &Path) -> Result<Value> {
    let refused = |why: String| InputError::new(format!("cannot read {}: {why}", path.display()));
    Ok(parse_json(&read(path)?).map_err(|error| refused(format!("not JSON: {error}")))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_that_json_does_not_have_are_null() {
        let python = r#"{"limit": [0.0, Infinity, -Infinity], "NaN": NaN, "text": "NaN \" Infinity \\"}"#;
        let expected = json!({"limit": [0.0, null, null], "NaN": null, "text": "NaN \" Infinity \\"});
        assert_eq!(parse_json(python.as_bytes()).unwrap(), expected);
        assert_eq!(parse_json(expected.to_string().as_bytes()).unwrap(), expected);
        let error = parse_json(b"{\"a\": NaN,\n \"b\" 1}").unwrap_err();
        assert_eq!(error.line(), 1, "{error}");
        for broken in ["", "{", "\"a", "\"\\", "Infinit", "{\"a\": -NaN}"] {
            assert!(parse_json(broken.as_bytes()).is_err(), "{broken}");
        }
    }

    const POINTER: &str = "version https://git-lfs.github.com/spec/v1\n\
                           oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n";

    #[test]
    fn pointers_are_refused_and_other_files_are_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights.bin");
        let older = POINTER.replace("git-lfs.github", "hawser.github");
        let windows = POINTER.replace('\n', "\r\n");
        for pointer in [POINTER, &older, &windows] {
            std::fs::write(&path, pointer).unwrap();
            for refused in [read(&path).map(drop), read_text(&path).map(drop), map(&path).map(drop)] {
                let said = refused.unwrap_err().to_string();
                assert!(said.contains("Git LFS pointer") && said.contains("git lfs pull"), "{said}");
                assert!(said.contains("weights.bin"), "{said}");
            }
        }
        // A text about pointers is none.
        let about = "version https://git-lfs.github.com/spec/v1 is how a pointer begins";
        let long = POINTER.to_owned() + &"x".repeat(1024);
        for text in ["", "short", about, &long] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read_text(&path).unwrap(), text);
            assert_eq!(&map(&path).unwrap()[..], text.as_bytes());
        }
        assert!(read(&dir.path().join("weight.bin")).unwrap_err().to_string().contains("did you mean"));
    }
}
