//! Files on this machine.

use std::path::{Path, PathBuf};

use dictlearn_core::prelude::*;
use dictlearn_core::text::{Wanted, WrittenText};

use crate::column;
use crate::stream::{ending, Documents, Options, Place, TextFiles, ENDINGS};

const NAME: &str = "text_files";

/// Text from .txt, .jsonl and .parquet files.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextFilesConfig {
    /// A file, a folder, or a glob; several files are read in the order of their names.
    pub path: ConfigPath,
    /// The field of a .jsonl record, or the column of a .parquet file, that holds the text or the messages of a chat.
    #[serde(default = "column")]
    pub column: String,
    /// What a document is in a .txt file.
    #[serde(default)]
    pub documents: Documents,
    /// End with an error at the first bad record instead of skipping it.
    #[serde(default)]
    pub strict: bool,
}

register! {
    text TextFilesConfig, NAME,
    summary: "Text from .txt, .jsonl, .json (plain, .gz, .zst) and .parquet, folders and globs",
    paper: "",
    example: "{type: text_files, path: corpus.txt}",
}

inventory::submit! {
    WrittenText {
        config: |wanted| match wanted {
            Wanted::Lines(path) => Some(serde_json::json!({"type": NAME, "path": path})),
            _ => None,
        },
    }
}

#[typetag::serde(name = NAME)]
impl TextConfig for TextFilesConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        let places = files(self.path.as_path()).under("path")?.into_iter().map(Place::Local).collect();
        let options = Options { column: self.column.clone(), documents: self.documents, strict: self.strict };
        Ok(Box::new(TextFiles::new(places, options)))
    }
}

/// The text files that a path means, sorted.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let supported = |path: &PathBuf| ending(&path.to_string_lossy()).is_some();
    let help = format!("text is read from files that end in .{}", ENDINGS.join(", ."));
    if path.is_file() {
        let path = path.to_owned();
        if !supported(&path) {
            bail!(InputError::new(format!("{}: files of this kind are not read", path.display())).help(help));
        }
        return Ok(vec![path]);
    }
    let pattern = path.to_string_lossy();
    let pattern = if path.is_dir() { format!("{pattern}/**/*") } else { pattern.into_owned() };
    let found = glob::glob(&pattern)
        .map_err(|error| InputError::new(format!("`{pattern}` is not a path and not a glob: {error}")))?;
    let mut found: Vec<PathBuf> =
        found.filter_map(Result::ok).filter(|path| path.is_file()).filter(supported).collect();
    found.sort();
    if found.is_empty() {
        if !path.exists() && !pattern.contains(['*', '?', '[']) {
            bail!(InputError::no_file(path));
        }
        bail!(InputError::new(format!("there is no text at {}", path.display())).help(help));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(
        file: &str,
        content: &[u8],
        documents: Documents,
        strict: bool,
    ) -> (tempfile::TempDir, Box<dyn TextStream>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file);
        std::fs::write(&path, content).unwrap();
        let config = TextFilesConfig { path: path.into(), column: column(), documents, strict };
        let stream = config.build().unwrap();
        (dir, stream)
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
            let (_dir, mut stream) = stream("a.txt", TEXT, documents, false);
            assert_eq!(texts(&mut *stream), expected, "{documents:?}");
        }
    }

    #[test]
    fn bad_records_are_skipped_counted_and_named() {
        let content = b"{\"text\": \"a\"}\n{\"text\": 3}\nnonsense\n\n{\"other\": \"x\"}\n\xff\n{\"text\": \"b\"}\n";
        let (_dir, mut lenient) = stream("a.jsonl", content, Documents::Paragraph, false);
        assert_eq!(texts(&mut *lenient), ["a", "b"]);
        let (skipped, first) = lenient.skipped();
        assert_eq!(skipped, 4);
        assert!(first.unwrap().ends_with("a.jsonl:2: field `text` is neither a string nor the messages of a chat"));
        let (_dir, mut strict) = stream("a.jsonl", content, Documents::Paragraph, true);
        strict.next_record().unwrap();
        assert!(strict.next_record().unwrap_err().to_string().contains("a.jsonl:2"));
    }

    #[test]
    fn a_long_document_is_cut_between_words() {
        // Five million bytes without a line's end, and as many lines without an empty one.
        for text in ["word ".repeat(1_000_000), "word\n".repeat(1_000_000)] {
            for documents in [Documents::Paragraph, Documents::File] {
                let (_dir, mut stream) = stream("a.txt", text.as_bytes(), documents, false);
                let texts = texts(&mut *stream);
                assert!((4..10).contains(&texts.len()), "{}", texts.len());
                assert!(texts.iter().all(|text| text.len() < 1 << 21));
                assert_eq!(texts.iter().flat_map(|text| text.split_whitespace()).count(), 1_000_000);
                assert!(texts.iter().all(|text| text.split_whitespace().all(|word| word == "word")));
            }
        }
    }

    #[test]
    fn what_can_only_be_wrong_is_refused_at_once() {
        let refused = |name: &str, content: &[u8]| {
            let (_dir, mut stream) = stream(name, content, Documents::Paragraph, false);
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
    fn a_byte_order_mark_is_no_text() {
        for (name, content) in [("a.txt", "\u{feff}a"), ("a.jsonl", "\u{feff}{\"text\": \"a\"}\n")] {
            let (_dir, mut stream) = stream(name, content.as_bytes(), Documents::Paragraph, true);
            assert_eq!(texts(&mut *stream), ["a"]);
        }
    }

    #[test]
    fn chats_in_every_spelling() {
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
        let (_dir, mut stream) = stream("a.jsonl", content, Documents::Paragraph, false);
        for line in 1..=4 {
            let Some(Record::Chat(chat)) = stream.next_record().unwrap() else { panic!("not a chat") };
            assert!(chat.origin.ends_with(&format!("a.jsonl:{line}")));
            let said: Vec<_> = chat.messages.iter().map(|message| (&message["role"], &message["content"])).collect();
            assert_eq!(said, [(&"user".into(), &"a".into()), (&"assistant".into(), &"b".into())]);
        }
        assert_eq!(stream.next_record().unwrap(), None);
        assert_eq!(stream.skipped().0, 5);
        // What only the model finds wrong with a record counts as well.
        stream.refuse("a.jsonl:1", "roles must alternate").unwrap();
        assert_eq!(stream.skipped().0, 6);
    }

    #[test]
    fn messages_that_call_tools_need_no_content() {
        let content =
            br#"{"text": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {}}]}]}
{"text": [{"role": "assistant", "tool_calls": null}]}
"#;
        let (_dir, mut stream) = stream("a.jsonl", content, Documents::Paragraph, false);
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
    fn compressed_files_are_the_same_text() {
        for ending in ["gz", "zst"] {
            let name = format!("a.txt.{ending}");
            let (_dir, mut text) = stream(&name, &packed(ending, TEXT), Documents::Line, true);
            assert_eq!(texts(&mut *text), ["one", "two", "three", "four"], "{name}");
            let name = format!("a.jsonl.{ending}");
            // Two members, as files have that were joined.
            let json = [packed(ending, b"{\"text\": \"a\"}\n"), packed(ending, b"{\"text\": \"b\"}\n")].concat();
            let (_dir, mut text) = stream(&name, &json, Documents::Paragraph, true);
            assert_eq!(texts(&mut *text), ["a", "b"], "{name}");
        }
    }

    #[test]
    fn what_stands_before_a_break_is_used() {
        let lines: String = (0..20_000).map(|line| format!("{{\"text\": \"{} {line}\"}}\n", line * 7919)).collect();
        for ending in ["gz", "zst"] {
            let whole = packed(ending, lines.as_bytes());
            let name = format!("a.jsonl.{ending}");
            let (_dir, mut cut) = stream(&name, &whole[..whole.len() / 2], Documents::Paragraph, false);
            let found = texts(&mut *cut);
            assert!(found.len() > 5_000 && found.len() < 15_000, "{name}: {}", found.len());
            let (skipped, first) = cut.skipped();
            assert_eq!(skipped, 1, "{name}: {first:?}");
            assert!(first.unwrap().contains(&format!("{name}:{}: the file is damaged or breaks off", found.len() + 1)));
            let (_dir, mut strict) = stream(&name, &whole[..whole.len() / 2], Documents::Paragraph, true);
            let error = loop {
                if let Err(error) = strict.next_record() {
                    break error.to_string();
                }
            };
            assert!(error.contains("breaks off"), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_cut_while_it_is_read_is_no_shorter_text() {
        let lines: String = (0..200_000).map(|line| format!("{{\"text\": \"{} {line}\"}}\n", line * 7919)).collect();
        for ending in ["", ".gz", ".zst"] {
            let whole = if ending.is_empty() { lines.clone().into_bytes() } else { packed(ending, lines.as_bytes()) };
            let name = format!("a.jsonl{ending}");
            let (dir, mut text) = stream(&name, &whole, Documents::Paragraph, false);
            assert_eq!(text.files().values().copied().collect::<Vec<_>>(), [whole.len() as u64]);
            text.next_record().unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(dir.path().join(&name)).unwrap();
            file.set_len(whole.len() as u64 / 2).unwrap();
            let mut count = 1;
            let error = loop {
                match text.next_record() {
                    Ok(Some(_)) => count += 1,
                    Ok(None) => panic!("{name}: it just ended, after {count} records"),
                    Err(error) => break error.to_string(),
                }
            };
            assert!(error.contains(&format!("{name} was cut while it was read")), "{error}");
        }
    }

    #[test]
    fn seeking_continues_where_it_was() {
        let (_dir, mut stream) = stream("a.txt", TEXT, Documents::Line, false);
        stream.next_record().unwrap();
        let position = stream.position();
        let rest = texts(&mut *stream);
        stream.seek(position).unwrap();
        assert_eq!(texts(&mut *stream), rest);
    }
}
