//! Opens local files in one place, so that a Git LFS pointer is recognised whatever the expected format.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use memmap2::Mmap;
use serde_json::Value;

use crate::error::InputError;

/// Maximum size of a Git LFS pointer, in bytes.
const LONGEST_POINTER: u64 = 1024;

/// Opens a file for reading.
///
/// # Errors
///
/// Fails if the file does not exist, cannot be read, or is a Git LFS pointer.
pub fn open(path: &Path) -> Result<File, InputError> {
    let refused = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => InputError::no_file(path),
        _ => InputError::new(format!("cannot read {}: {error}", path.display())),
    };
    let mut file = File::open(path).map_err(refused)?;
    // Reading ahead would consume a pipe.
    if file.metadata().is_ok_and(|file| file.is_file() && file.len() <= LONGEST_POINTER) {
        let mut start = Vec::new();
        file.by_ref().take(LONGEST_POINTER).read_to_end(&mut start).map_err(refused)?;
        if is_pointer(&start) {
            return Err(InputError::new(format!(
                "{}: this is a Git LFS pointer, not the file that it stands for",
                path.display()
            ))
            .help("run `git lfs pull` in its repository, or download the file"));
        }
        file.rewind().map_err(refused)?;
    }
    Ok(file)
}

/// Returns a file's bytes. Fails as [`open`] does.
pub fn read(path: &Path) -> Result<Vec<u8>, InputError> {
    let mut bytes = Vec::new();
    let read = open(path)?.read_to_end(&mut bytes);
    read.map_err(|error| InputError::new(format!("cannot read {}: {error}", path.display())))?;
    Ok(bytes)
}

/// Returns a file's text. Fails as [`open`] does, or if the file is not UTF-8.
pub fn read_text(path: &Path) -> Result<String, InputError> {
    String::from_utf8(read(path)?).map_err(|_| InputError::new(format!("{} is not UTF-8 text", path.display())))
}

/// Parses JSON as Python writes it: `NaN`, `Infinity` and `-Infinity`, which JSON lacks, become null.
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
            // An escaped quote does not end the string.
            (b'\\', [escaped, after @ ..]) => {
                plain.push(*escaped);
                rest = after;
            }
            _ => {}
        }
    }
    // If this fails too, report the first error: its position refers to the original file.
    serde_json::from_slice(&plain).or(strict)
}

/// Maps a file into memory. Fails as [`open`] does.
pub fn map(path: &Path) -> Result<Mmap, InputError> {
    let file = open(path)?;
    // SAFETY: the map is read-only. If another process truncates the file, reads raise SIGBUS, as for any reader of
    // mapped weights.
    let map = unsafe { Mmap::map(&file) };
    map.map_err(|error| InputError::new(format!("cannot read {}: {error}", path.display())))
}

/// Lets the OS reclaim the pages of part of a map. Reading that part again reads the file again.
pub(crate) fn forget(map: &Mmap, part: Range<usize>) {
    // This drops whole pages. Those at the ends may hold parts of other tensors, which is harmless.
    #[cfg(unix)]
    // SAFETY: the map is file-backed and read-only, so dropped pages are read back unchanged.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, part.start, part.len()) };
    #[cfg(not(unix))]
    let _ = (map, part);
}

/// True if these bytes are a Git LFS pointer (<https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>), also one of
/// its first releases, which name another site.
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
    fn non_finite_json_numbers_become_null() {
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
        // Text about pointers is not a pointer.
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
