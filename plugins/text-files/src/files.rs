//! Text from local files.

use std::path::{Path, PathBuf};

use dictlearn_core::prelude::*;
use glob::{MatchOptions, Pattern, glob_with};

use crate::splits::{self, Card, Glob, METADATA};
use crate::stream::{Documents, ENDINGS, Options, Place, TextFiles, ending};

/// Text from .txt, .jsonl and .parquet files.
#[component(text "text_files",
    summary = "Text from .txt, .jsonl, .json (plain, .gz, .zst) and .parquet files, folders and globs",
    example = "{type: text_files, path: corpus.txt}")]
pub struct TextFilesConfig {
    /// A file, a folder, or a glob. Several files are read in order of their names. Hidden files and metadata
    /// (README.md, config.json, sae_lens.json) of a folder are skipped.
    pub path: ConfigPath,
    /// Split to read from a folder that holds a dataset, as in Hugging Face's `load_dataset`. Default: all files, which
    /// must then belong to one split.
    pub split: Option<String>,
    /// Subset to read from such a folder, if its README.md lists several.
    pub subset: Option<String>,
    /// Field of a .jsonl record or column of a .parquet file with the text, the messages of a chat, or token ids (a
    /// list of integers). A nested field is written `translation.en`. Default: the first of `text`, `input_ids` and
    /// `tokens` that exists.
    pub column: Option<String>,
    /// Unit of a document in a .txt file.
    #[default]
    pub documents: Documents,
    /// `true`: stop with an error at the first bad record. `false`: skip bad records, unreadable files and the rest of
    /// damaged files. Default: skip and count bad records, but stop with an error at an unreadable file.
    pub strict: Option<bool>,
}

impl TextConfig for TextFilesConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        let places = self.files()?.into_iter().map(Place::Local).collect();
        let options = Options::new(self.column.as_deref(), self.documents, self.strict);
        Ok(Box::new(TextFiles::new(places, options)))
    }
}

impl TextFilesConfig {
    /// Returns the files to read, in order.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let path = self.path.as_path();
        if path.is_dir() {
            return self.of_folder(path);
        }
        for (key, given) in [("split", &self.split), ("subset", &self.subset)] {
            if given.is_some() {
                bail!(
                    InputError::new(format!("`{key}` is set, but {} is not a folder", path.display()))
                        .field(key)
                        .help(format!("remove `{key}`, or set `path` to the dataset's folder"))
                );
            }
        }
        let help = format!("supported endings: .{}", ENDINGS.join(", ."));
        let supported = |path: &Path| ending(&path.to_string_lossy()).is_some();
        if path.is_file() {
            if !supported(path) {
                bail!(
                    InputError::new(format!("{}: files of this type are not supported", path.display()))
                        .field("path")
                        .help(help)
                );
            }
            return Ok(vec![path.to_owned()]);
        }
        let pattern = path.to_string_lossy();
        let mut found = listed(&pattern).under("path")?;
        found.retain(|path| supported(path));
        if found.is_empty() {
            if !pattern.contains(['*', '?', '[']) {
                bail!(InputError::no_file(path).field("path"));
            }
            bail!(InputError::new(format!("{} matches no text files", path.display())).field("path").help(help));
        }
        Ok(found)
    }

    /// Returns the files to read from a folder.
    fn of_folder(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let found = listed(&format!("{}/**/*", Pattern::escape(&folder.to_string_lossy()))).under("path")?;
        let name = |path: &PathBuf| path.strip_prefix(folder).unwrap_or(path).to_string_lossy().into_owned();
        let names: Vec<String> = found.iter().map(name).collect();
        let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
        names.sort_unstable();
        let what = format!("the folder {}", folder.display());
        if let Some(written) = names.iter().find(|name| name.ends_with(".arrow"))
            && names.iter().any(|name| name.ends_with("state.json") || *name == "dataset_dict.json")
        {
            bail!(
                InputError::new(format!("{what} was written by `save_to_disk` of Hugging Face's datasets ({written})"))
                    .field("path")
                    .help(format!(
                        "write it as parquet: `datasets.load_from_disk({:?}).to_parquet(\"tokens.parquet\")`",
                        folder.display().to_string()
                    ))
            );
        }
        let head = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        let chosen = match &self.split {
            Some(split) => {
                let card = Card::read(head("README.md").as_deref(), head(".huggingface.yaml").as_deref());
                let card = card.map_err(|error| error.field("path").help("select files with a glob as `path`"))?;
                splits::find(&names, &card, split, self.subset.as_deref())
                    .map_err(|missing| missing.refused(&what, "path", split, self.subset.as_deref(), &names))?
            }
            None if self.subset.is_some() => {
                bail!(InputError::new("`subset` is set without `split`").field("subset").help("add `split: train`"));
            }
            None => {
                let all = all(&names)?;
                if all.is_empty() {
                    let help = format!("supported endings: .{}", ENDINGS.join(", ."));
                    bail!(InputError::new(format!("{} has no text files", folder.display())).field("path").help(help));
                }
                one_split(&all).map_err(|splits| {
                    let held = match &splits[..] {
                        [one] => format!("{what} has files of the split `{one}` and other files"),
                        several => format!("{what} has several splits: {}", several.join(", ")),
                    };
                    InputError::new(held).field("path").help(format!(
                        "choose one (`split: {}`), or select files with a glob: `path: {}/**/*` reads all of them",
                        splits[0],
                        folder.display()
                    ))
                })?;
                all
            }
        };
        Ok(chosen.into_iter().map(|name| folder.join(name)).collect())
    }
}

/// Returns the files that match a glob, sorted. Includes broken links, so that they cause an error instead of being
/// skipped.
fn listed(pattern: &str) -> Result<Vec<PathBuf>> {
    let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::new() };
    let found = glob_with(pattern, options)
        .map_err(|error| InputError::new(format!("`{pattern}` is neither a path nor a glob: {error}")))?;
    let mut files = Vec::new();
    for path in found {
        let path = path.map_err(|error| InputError::new(format!("cannot list {pattern}: {error}")))?;
        if path.is_file() || !path.exists() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Returns the supported files of a folder, without metadata.
fn all<'a>(names: &[&'a str]) -> Result<Vec<&'a str>, InputError> {
    const MORE_METADATA: [&str; 2] = ["sae_lens.json", "state.json"];
    let glob = Glob::new("**")?;
    let described = |name: &str| {
        let name = name.rsplit('/').next().unwrap_or(name);
        METADATA.contains(&name) || MORE_METADATA.contains(&name)
    };
    let kept = names.iter().copied().filter(|name| ending(name).is_some() && glob.matches(name) && !described(name));
    Ok(kept.collect())
}

/// Checks by their names that all files belong to one split; otherwise returns the names of the splits. This keeps test
/// files out of training when `path` is a folder.
fn one_split(files: &[&str]) -> Result<(), Vec<String>> {
    let splits = splits::splits(files, &splits::Subset::default()).unwrap_or_default();
    let splits: Vec<_> = splits.into_iter().filter(|split| !split.files.is_empty()).collect();
    match &splits[..] {
        [] => Ok(()),
        [one] if one.name == "train" || one.files.len() == files.len() => Ok(()),
        several => Err(several.iter().map(|split| split.name.clone()).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(
        file: &str,
        content: &[u8],
        documents: Documents,
        strict: Option<bool>,
    ) -> (tempfile::TempDir, Box<dyn TextStream>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file);
        std::fs::write(&path, content).unwrap();
        let stream = TextFilesConfig { documents, strict, ..config(&path) }.build().unwrap();
        (dir, stream)
    }

    fn config(path: &Path) -> TextFilesConfig {
        TextFilesConfig {
            path: path.to_owned().into(),
            split: None,
            subset: None,
            column: None,
            documents: Documents::default(),
            strict: None,
        }
    }

    /// Returns the text of an `InputError`, with its help.
    fn said(error: anyhow::Error) -> String {
        InputError::take(error).expect("an error of the input").to_string()
    }

    /// Reads records until one is an error, and returns its text.
    fn refused(stream: &mut dyn TextStream) -> String {
        loop {
            match stream.next_record() {
                Ok(Some(_)) => {}
                Ok(None) => panic!("nothing was refused"),
                Err(error) => {
                    break said(error);
                }
            }
        }
    }

    fn texts(stream: &mut dyn TextStream) -> Vec<String> {
        let mut texts = Vec::new();
        while let Some(record) = stream.next_record().unwrap() {
            let Record::Text(document) = record else { panic!("not a text") };
            texts.push(document.text);
        }
        texts
    }

    const TEXT: &[u8] = b"one\ntwo\r\n\n\nthree\n \nfour";

    #[test]
    fn documents_of_a_text_file() {
        for (documents, expected) in [
            (Documents::Paragraph, vec!["one\ntwo", "three", "four"]),
            (Documents::Line, vec!["one", "two", "three", "four"]),
            (Documents::File, vec!["one\ntwo\n\n\nthree\n \nfour"]),
        ] {
            let (_dir, mut stream) = stream("a.txt", TEXT, documents, None);
            assert_eq!(texts(&mut *stream), expected, "{documents:?}");
        }
    }

    #[test]
    fn bad_records_are_skipped_counted_and_named() {
        let content = b"{\"text\": \"a\"}\n{\"text\": 3}\nnonsense\n\n{\"other\": \"x\"}\n{\"text\": \"b\"}\n";
        let (_dir, mut lenient) = stream("a.jsonl", content, Documents::Paragraph, None);
        assert_eq!(texts(&mut *lenient), ["a", "b"]);
        let (skipped, first) = lenient.skipped();
        assert_eq!((skipped, lenient.skipped_files()), (3, (0, None)));
        let what = "a.jsonl:2: field `text` is neither a string, the messages of a chat nor token ids";
        assert!(first.unwrap().ends_with(what));
        let (_dir, mut strict) = stream("a.jsonl", content, Documents::Paragraph, Some(true));
        strict.next_record().unwrap();
        assert!(strict.next_record().unwrap_err().to_string().contains("a.jsonl:2"));
    }

    #[test]
    fn a_long_document_is_cut_between_words() {
        // Five million bytes without a line break, and then without an empty line.
        for text in ["word ".repeat(1_000_000), "word\n".repeat(1_000_000)] {
            for documents in [Documents::Paragraph, Documents::File] {
                let (_dir, mut stream) = stream("a.txt", text.as_bytes(), documents, None);
                let texts = texts(&mut *stream);
                assert!((4..10).contains(&texts.len()), "{}", texts.len());
                assert!(texts.iter().all(|text| text.len() < 1 << 21));
                assert_eq!(texts.iter().flat_map(|text| text.split_whitespace()).count(), 1_000_000);
                assert!(texts.iter().all(|text| text.split_whitespace().all(|word| word == "word")));
            }
        }
    }

    #[test]
    fn a_hopeless_file_is_an_error_after_its_first_records() {
        let refused = |name: &str, content: &[u8]| {
            let (_dir, mut stream) = stream(name, content, Documents::Paragraph, None);
            format!("{:#}", stream.next_record().unwrap_err())
        };
        let error = refused("a.jsonl", "{\"txt\": \"a\"}\n".repeat(1000).as_bytes());
        assert!(
            error.contains("none of the first 100 records can be used") && error.contains("it has: txt"),
            "{error}"
        );
        let error = refused("a.json", b"[{\"text\": \"a\"},\n {\"text\": \"b\"}]");
        assert!(error.contains("a.json is a JSON array"), "{error}");
    }

    #[test]
    fn a_byte_order_mark_is_not_part_of_the_text() {
        for (name, content) in [("a.txt", "\u{feff}a"), ("a.jsonl", "\u{feff}{\"text\": \"a\"}\n")] {
            let (_dir, mut stream) = stream(name, content.as_bytes(), Documents::Paragraph, Some(true));
            assert_eq!(texts(&mut *stream), ["a"]);
        }
    }

    #[test]
    fn chats_are_read_in_every_supported_format() {
        let content = br#"{"text": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
{"text": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
{"text": {"role": ["user", "assistant"], "content": ["a", "b"], "tool_calls": null}}
{"text": {"from": ["human", "gpt"], "value": ["a", "b"]}}
{"text": [{"role": "user"}]}
{"text": []}
{"text": {"role": ["user", "assistant"], "content": ["a"]}}
{"text": {"role": "user", "content": "a"}}
{"text": {}}
"#;
        let (_dir, mut stream) = stream("a.jsonl", content, Documents::Paragraph, None);
        for line in 1..=4 {
            let Some(Record::Chat(chat)) = stream.next_record().unwrap() else { panic!("not a chat") };
            assert!(chat.origin.ends_with(&format!("a.jsonl:{line}")));
            let said: Vec<_> = chat.messages.iter().map(|message| (&message["role"], &message["content"])).collect();
            assert_eq!(said, [(&"user".into(), &"a".into()), (&"assistant".into(), &"b".into())]);
        }
        assert_eq!(stream.next_record().unwrap(), None);
        assert_eq!(stream.skipped().0, 5);
        // Records that only the model rejects are counted too.
        stream.refuse("a.jsonl:1", "roles must alternate").unwrap();
        assert_eq!(stream.skipped().0, 6);
    }

    #[test]
    fn messages_that_call_tools_need_no_content() {
        let content =
            br#"{"text": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {}}]}]}
{"text": [{"role": "assistant", "tool_calls": null}]}
"#;
        let (_dir, mut stream) = stream("a.jsonl", content, Documents::Paragraph, None);
        let Some(Record::Chat(chat)) = stream.next_record().unwrap() else { panic!("not a chat") };
        assert_eq!(chat.messages[1].get("content"), None);
        assert_eq!(stream.next_record().unwrap(), None);
        assert_eq!(stream.skipped().0, 1);
    }

    fn packed(ending: &str, content: &[u8]) -> Vec<u8> {
        use std::io::Write;
        if ending.ends_with("gz") {
            let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            packer.write_all(content).unwrap();
            packer.finish().unwrap()
        } else {
            zstd::encode_all(content, 3).unwrap()
        }
    }

    #[test]
    fn compressed_files_give_the_same_text() {
        for ending in ["gz", "zst"] {
            let name = format!("a.txt.{ending}");
            let (_dir, mut text) = stream(&name, &packed(ending, TEXT), Documents::Line, Some(true));
            assert_eq!(texts(&mut *text), ["one", "two", "three", "four"], "{name}");
            let name = format!("a.jsonl.{ending}");
            // Two members, as in concatenated archives.
            let json = [packed(ending, b"{\"text\": \"a\"}\n"), packed(ending, b"{\"text\": \"b\"}\n")].concat();
            let (_dir, mut text) = stream(&name, &json, Documents::Paragraph, Some(true));
            assert_eq!(texts(&mut *text), ["a", "b"], "{name}");
        }
    }

    #[test]
    fn a_truncated_file_is_an_error_unless_strict_is_false() {
        let lines: String = (0..20_000).map(|line| format!("{{\"text\": \"{} {line}\"}}\n", line * 7919)).collect();
        for ending in ["gz", "zst"] {
            let whole = packed(ending, lines.as_bytes());
            let name = format!("a.jsonl.{ending}");
            let cut = &whole[..whole.len() / 2];
            for strict in [None, Some(true)] {
                let (_dir, mut ends) = stream(&name, cut, Documents::Paragraph, strict);
                let said = refused(&mut *ends);
                assert!(
                    said.contains(&format!("{name}:")) && said.contains("the file is damaged or truncated"),
                    "{said}"
                );
                assert!(said.contains("`strict: false`"), "{said}");
                assert!(ends.position() > 5_000, "{}", ends.position());
            }
            // Records before the truncation are used.
            let (dir, mut goes_on) = stream(&name, cut, Documents::Paragraph, Some(false));
            let found = texts(&mut *goes_on);
            assert!(found.len() > 5_000 && found.len() < 15_000, "{name}: {}", found.len());
            assert_eq!(goes_on.skipped(), (0, None), "an unreadable file is not counted as a record");
            let (skipped, first) = goes_on.skipped_files();
            assert_eq!(skipped, 1, "{name}: {first:?}");
            assert!(first.unwrap().contains(&format!("{name}:{}: the file is damaged or truncated", found.len() + 1)));
            // So are the files after it.
            std::fs::write(dir.path().join("b.jsonl"), "{\"text\": \"b\"}\n").unwrap();
            let mut both = TextFilesConfig { strict: Some(false), ..config(dir.path()) }.build().unwrap();
            assert_eq!(texts(&mut *both).last().unwrap(), "b");
            // Not one byte can be decompressed.
            for (bytes, what) in [(&b"plainly no archive"[..], "damaged"), (&whole[..5], "damaged")] {
                let (_dir, mut none) = stream(&name, bytes, Documents::Paragraph, None);
                let said = refused(&mut *none);
                assert!(said.contains(&name) && said.contains(what), "{said}");
            }
        }
        // With `documents: file`, the part before the truncation is a document.
        let whole = packed("zst", "a line of text\n".repeat(100_000).as_bytes());
        let (_dir, mut text) = stream("a.txt.zst", &whole[..whole.len() - 4], Documents::File, Some(false));
        assert!(!texts(&mut *text).is_empty());
    }

    #[test]
    fn a_zstd_file_with_a_long_window_is_read() {
        let mut packer = zstd::Encoder::new(Vec::new(), 1).unwrap();
        // By default, decoders accept at most 27.
        packer.window_log(28).unwrap();
        std::io::Write::write_all(&mut packer, b"{\"text\": \"a\"}\n").unwrap();
        let packed = packer.finish().unwrap();
        let (_dir, mut text) = stream("a.jsonl.zst", &packed, Documents::Paragraph, None);
        assert_eq!(texts(&mut *text), ["a"]);
    }

    fn utf16(text: &str, order: fn(u16) -> [u8; 2]) -> Vec<u8> {
        text.encode_utf16().flat_map(order).collect()
    }

    #[test]
    fn utf_16_is_decoded_with_a_byte_order_mark_and_refused_without() {
        let json = "{\"text\": \"Grüße, 世界 🌍\"}\n{\"text\": \"b\"}\r\n";
        for order in [u16::to_le_bytes, u16::to_be_bytes] {
            let marked = utf16(&format!("\u{feff}{json}"), order);
            for (name, content) in [("a.jsonl", marked.clone()), ("a.jsonl.gz", packed("gz", &marked))] {
                let (_dir, mut text) = stream(name, &content, Documents::Paragraph, Some(true));
                assert_eq!(texts(&mut *text), ["Grüße, 世界 🌍", "b"], "{name}");
            }
            let (_dir, mut text) = stream("a.txt", &utf16("\u{feff}one\r\ntwo", order), Documents::Line, Some(true));
            assert_eq!(texts(&mut *text), ["one", "two"]);
            let (_dir, mut unmarked) = stream("a.jsonl", &utf16(json, order), Documents::Paragraph, None);
            let said = refused(&mut *unmarked);
            assert!(said.contains("a.jsonl looks like UTF-16 without a byte order mark"), "{said}");
        }
    }

    #[test]
    fn files_that_are_not_text_are_errors_that_name_them() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n";
        for (name, content, why) in [
            ("a.jsonl", &pointer[..], "this is a Git LFS pointer, not the file that it stands for; run `git lfs pull`"),
            (
                "a.parquet",
                &pointer[..],
                "this is a Git LFS pointer, not the file that it stands for; run `git lfs pull`",
            ),
            ("a.jsonl", &packed("gz", b"{}\n"), "name that ends in .gz"),
            ("a.txt", &packed("zst", b"text"), "name that ends in .zst"),
            ("a.parquet", b"", "is not a valid parquet file"),
        ] {
            let (_dir, mut text) = stream(name, content, Documents::Paragraph, None);
            let said = refused(&mut *text);
            assert!(said.contains(name) && said.contains(why), "{said}");
        }
        // A broken link.
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.jsonl"), "{\"text\": \"a\"}\n").unwrap();
        std::os::unix::fs::symlink(dir.path().join("nowhere"), dir.path().join("b.jsonl")).unwrap();
        let said = refused(&mut *config(dir.path()).build().unwrap());
        assert!(said.contains("the link") && said.contains("b.jsonl leads nowhere"), "{said}");
        assert!(said.contains("nowhere: put that file there") && !said.contains("did you mean"), "{said}");
    }

    #[test]
    fn bytes_that_are_not_utf_8_make_the_file_unreadable() {
        // Latin-1, in the middle of a file.
        let text = b"one\n\ntwo\n\nna\xefve\n\nfour\n".to_vec();
        let json =
            b"{\"text\": \"one\"}\n{\"text\": \"two\"}\n{\"text\": \"na\xefve\"}\n{\"text\": \"four\"}\n".to_vec();
        for (name, content, line) in [
            ("a.txt", text.clone(), 5),
            ("a.jsonl", json.clone(), 3),
            ("a.txt.gz", packed("gz", &text), 5),
            ("a.jsonl.zst", packed("zst", &json), 3),
        ] {
            for strict in [None, Some(true)] {
                let (_dir, mut text) = stream(name, &content, Documents::Paragraph, strict);
                let said = refused(&mut *text);
                assert!(said.contains(&format!("{name}:{line}: not UTF-8 (byte 0xef)")), "{said}");
                assert!(
                    said.contains("`iconv -f LATIN1 -t UTF-8 FILE > NEW`") && said.contains("`strict: false`"),
                    "{said}"
                );
            }
            let (dir, mut text) = stream(name, &content, Documents::Paragraph, Some(false));
            assert_eq!(texts(&mut *text), ["one", "two"], "{name}");
            assert_eq!((text.skipped().0, text.skipped_files().0), (0, 1), "{name}");
            std::fs::write(dir.path().join("b.txt"), "b").unwrap();
            let mut both = TextFilesConfig { strict: Some(false), ..config(dir.path()) }.build().unwrap();
            assert_eq!(texts(&mut *both).last().unwrap(), "b", "the files after it are read");
        }
        // An image is not mistaken for Latin-1.
        let (_dir, mut picture) = stream("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", Documents::Line, None);
        let said = refused(&mut *picture);
        assert!(said.contains("a.txt is not text") && !said.contains("iconv"), "{said}");
        // Replacement characters and zero bytes are text.
        let (_dir, mut text) = stream("a.txt", "a \u{fffd} b\0c".as_bytes(), Documents::Line, Some(true));
        assert_eq!(texts(&mut *text), ["a \u{fffd} b\0c"]);
        // A character that crosses the end of the inspected bytes.
        let long = format!("{}é\0", "a".repeat(4095));
        let (_dir, mut text) = stream("a.txt", long.as_bytes(), Documents::Line, Some(true));
        assert_eq!(texts(&mut *text), [long]);
    }

    #[test]
    fn truncated_or_damaged_utf_16_makes_the_file_unreadable() {
        for order in [u16::to_le_bytes, u16::to_be_bytes] {
            // Longer than one decoded block, so that characters and surrogate pairs cross block boundaries.
            let whole: String = (0..5_000).map(|line| format!("{line} \u{fffd}🌍🌍\n")).collect();
            let bytes = utf16(&format!("\u{feff}{whole}"), order);
            let (_dir, mut text) = stream("a.txt", &bytes, Documents::Line, Some(true));
            assert!(texts(&mut *text).iter().map(|line| format!("{line}\n")).eq(whole.split_inclusive('\n')));
            let half = [&bytes[..bytes.len() - 4], &order(0xd83c)[..]].concat();
            let swapped = [&bytes[..], &order(0xdf0d), &order(0x61)].concat();
            for content in [&bytes[..bytes.len() - 1], &half[..], &swapped[..]] {
                let (_dir, mut text) = stream("a.txt", content, Documents::Line, None);
                let said = refused(&mut *text);
                assert!(said.contains("a.txt:") && said.contains("not UTF-16 from here on"), "{said}");
                assert!(text.position() > 4_900, "{}", text.position());
            }
        }
    }

    #[test]
    fn the_error_of_a_text_without_records_says_how_to_fix_it() {
        let said = |name: &str, content: &str| {
            let (_dir, mut text) = stream(name, content.as_bytes(), Documents::Paragraph, None);
            refused(&mut *text)
        };
        for (name, content) in [("a.txt", ""), ("a.jsonl", ""), ("a.txt", " \n\n")] {
            let said = said(name, content);
            assert!(said.contains("the file is empty or has only blanks") && !said.contains("column"), "{said}");
        }
        for line in [
            r#"{"input_ids": [1, 2], "attention_mask": [1]}"#,
            r#"{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}"#,
            r#"{"input_ids": [1.5]}"#,
            r#"{"input_ids": [[1, 2], [3]]}"#,
            r#"{"input_ids": []}"#,
        ] {
            let said = said("a.jsonl", line);
            assert!(said.contains("1 bad record, ") && said.contains("as a flat list of integers"), "{said}");
            assert!(!said.contains("`column`") && !said.contains("neither"), "{said}");
        }
        let nested = said("a.jsonl", r#"{"id": 1, "translation": {"en": "one", "de": "eins"}}"#);
        assert!(nested.contains("no field `text`, it has: id, translation."), "{nested}");
        assert!(nested.contains("translation.en") && nested.contains("`column` names the field"), "{nested}");
        let many = said("a.jsonl", &"text\n".repeat(200));
        assert!(many.contains("not JSON") && many.contains("write a JSON object on each line"), "{many}");
    }

    fn rows(stream: &mut dyn TextStream) -> Vec<Vec<i64>> {
        let mut rows = Vec::new();
        while let Some(record) = stream.next_record().unwrap() {
            let Record::Tokens { ids, mask, .. } = record else { panic!("not a row of tokens: {record:?}") };
            assert_eq!(mask, vec![true; ids.len()]);
            rows.push(ids);
        }
        rows
    }

    #[test]
    fn lists_of_integers_are_token_ids() {
        let content = br#"{"input_ids": [1, 2, 3]}
{"input_ids": [0, 0, 4, 5, 0], "attention_mask": [0, 0, 1, 1, 0]}
{"input_ids": [6, 7], "attention_mask": [true, false]}
{"tokens": [8]}
{"input_ids": [9, "x"]}
{"input_ids": [9, 1.5]}
{"input_ids": [9, null]}
{"input_ids": [9, 9], "attention_mask": [1]}
{"input_ids": [9, 9, 9], "attention_mask": [1, 0, 1]}
{"input_ids": [9, 9], "attention_mask": [0, 0]}
{"input_ids": [9, 9], "attention_mask": [1, 2]}
"#;
        let (_dir, mut text) = stream("a.jsonl", content, Documents::Paragraph, None);
        assert_eq!(rows(&mut *text), [vec![1, 2, 3], vec![4, 5], vec![6], vec![8]]);
        let (skipped, first) = text.skipped();
        assert_eq!(skipped, 7);
        assert!(first.unwrap().ends_with("a.jsonl:5: `input_ids[1]` is a string, but token ids are integers"));
        for (line, why) in [
            (6, "`input_ids[1]` is 1.5, but token ids are integers"),
            (7, "`input_ids[1]` is null"),
            (8, "`attention_mask` has length 1, but `input_ids` has length 2"),
            (9, "`attention_mask[1]` is 0 between tokens"),
            (10, "`attention_mask` is 0 everywhere"),
            (11, "`attention_mask` is not a list of 0s and 1s"),
        ] {
            let line = content.split_inclusive(|byte| *byte == b'\n').nth(line - 1).unwrap();
            let (_dir, mut text) = stream("a.jsonl", line, Documents::Paragraph, Some(true));
            let said = refused(&mut *text);
            assert!(said.contains("a.jsonl:1: ") && said.contains(why), "{said}");
        }
    }

    #[test]
    fn a_nested_field_is_named_with_a_dot() {
        let content = br#"{"translation": {"en": "one", "de": "eins"}, "a.b": {"c": "x"}}
{"translation.en": "two"}
{"translation": {"de": "drei"}}
"#;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, content).unwrap();
        let of = |column: &str| TextFilesConfig { column: Some(column.into()), ..config(&path) }.build().unwrap();
        assert_eq!(texts(&mut *of("translation.en")), ["one", "two"]);
        assert_eq!(texts(&mut *of("a.b.c")), ["x"]);
        let said = refused(&mut *of("translation"));
        assert!(said.contains("it has nested fields: choose one, such as `translation."), "{said}");
    }

    /// Makes a folder with these files; the text of each is its name.
    fn folder(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, format!("{{\"text\": \"{file}\"}}\n")).unwrap();
        }
        dir
    }

    #[test]
    fn a_folder_with_several_splits_requires_a_choice() {
        let said = |config: TextFilesConfig| said(config.build().err().unwrap());
        let dir = folder(&["train.jsonl", "test.jsonl", "x/validation.jsonl"]);
        let found = said(config(dir.path()));
        assert!(
            found.contains("has several splits: train, validation, test\nhelp: choose one (`split: train`)"),
            "{found}"
        );
        let of = |split: &str| TextFilesConfig { split: Some(split.into()), ..config(dir.path()) };
        assert_eq!(texts(&mut *of("train").build().unwrap()), ["train.jsonl"]);
        let found = said(of("tset"));
        assert!(
            found.contains("has no split `tset`\nhelp: did you mean `test`? its splits: train, validation, test"),
            "{found}"
        );
        let all = config(&dir.path().join("**/*"));
        assert_eq!(texts(&mut *all.build().unwrap()).len(), 3);
        let dir = folder(&["a.jsonl", "b.jsonl", "held-out-test.jsonl"]);
        let found = said(config(dir.path()));
        assert!(found.contains("has files of the split `test` and other files"), "{found}");
        let found = said(TextFilesConfig { split: Some("train".into()), ..config(&dir.path().join("a.jsonl")) });
        assert!(found.contains("`split` is set, but") && found.contains("a.jsonl is not a folder"), "{found}");
    }

    #[test]
    fn hidden_files_and_metadata_of_a_folder_are_skipped() {
        let dir = folder(&[
            "b.jsonl",
            "x/a.jsonl",
            ".hidden.jsonl",
            ".git/c.jsonl",
            "__pycache__/d.jsonl",
            "README.md",
            "config.json",
            "sae_lens.json",
            "dataset_info.json",
        ]);
        assert_eq!(texts(&mut *config(dir.path()).build().unwrap()), ["b.jsonl", "x/a.jsonl"]);
        // A folder's name is not a glob.
        let dir = folder(&["a[1]/b.jsonl"]);
        assert_eq!(texts(&mut *config(&dir.path().join("a[1]")).build().unwrap()), ["a[1]/b.jsonl"]);
        // The layout that sae_lens and `save_to_disk` write.
        let dir = folder(&["data-00000-of-00001.arrow", "dataset_info.json", "state.json", "sae_lens.json"]);
        let said = said(config(dir.path()).build().err().unwrap());
        assert!(said.contains("was written by `save_to_disk`") && said.contains("to_parquet"), "{said}");
    }

    #[test]
    fn the_readme_of_a_folder_defines_its_splits() {
        let dir = folder(&["x/one.jsonl", "x/two.jsonl", "three.jsonl"]);
        let readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: x/t*.jsonl}\n  - \
                      {split: test, path: x/o*.jsonl}\n---\n";
        std::fs::write(dir.path().join("README.md"), readme).unwrap();
        for (split, expected) in [("train", "x/two.jsonl"), ("test", "x/one.jsonl")] {
            let config = TextFilesConfig { split: Some(split.into()), ..config(dir.path()) };
            assert_eq!(texts(&mut *config.build().unwrap()), [expected]);
        }
    }

    #[test]
    fn truncation_during_read_is_an_error() {
        let lines: String = (0..200_000).map(|line| format!("{{\"text\": \"{} {line}\"}}\n", line * 7919)).collect();
        for ending in ["", ".gz", ".zst"] {
            let whole = if ending.is_empty() { lines.clone().into_bytes() } else { packed(ending, lines.as_bytes()) };
            let name = format!("a.jsonl{ending}");
            let (dir, mut text) = stream(&name, &whole, Documents::Paragraph, None);
            assert_eq!(text.files().values().copied().collect::<Vec<_>>(), [whole.len() as u64]);
            text.next_record().unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(dir.path().join(&name)).unwrap();
            file.set_len(whole.len() as u64 / 2).unwrap();
            let mut count = 1;
            let error = loop {
                match text.next_record() {
                    Ok(Some(_)) => count += 1,
                    Ok(None) => panic!("{name}: ended without an error after {count} records"),
                    Err(error) => break error.to_string(),
                }
            };
            assert!(error.contains(&format!("{name} was truncated while being read")), "{error}");
        }
    }

    #[test]
    fn seeking_continues_at_the_position() {
        let (_dir, mut stream) = stream("a.txt", TEXT, Documents::Line, None);
        stream.next_record().unwrap();
        let position = stream.position();
        let rest = texts(&mut *stream);
        stream.seek(position).unwrap();
        assert_eq!(texts(&mut *stream), rest);
    }
}
