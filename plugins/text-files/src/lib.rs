//! Text from .txt, .jsonl and .parquet files, read as a stream: memory does not grow with the files. Text and JSON may be
//! compressed (.gz, .zst).
//!
//! In a .txt file documents are paragraphs, lines or the whole file; in a .jsonl file each line is a JSON object with
//! the text in one field; in a .parquet file it is a column of strings. A bad record is skipped and counted, or ends the
//! run with `strict: true`; either way the message names file and line (or row). Where a compressed file breaks off, what
//! stands before is used, and the break is a bad record.

mod rows;

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use dictlearn_core::prelude::*;

const NAME: &str = "text_files";
/// What a file's name may end with.
const ENDINGS: [&str; 7] = ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"];

/// Text from .txt, .jsonl and .parquet files.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextFilesConfig {
    /// A file, a folder, or a glob; several files are read in the order of their names.
    pub path: ConfigPath,
    /// The field of a .jsonl record, or the column of a .parquet file, that holds the text.
    #[serde(default = "column")]
    pub column: String,
    /// What a document is in a .txt file.
    #[serde(default)]
    pub documents: Documents,
    /// End with an error at the first bad record instead of skipping it.
    #[serde(default)]
    pub strict: bool,
}

fn column() -> String {
    "text".to_owned()
}

/// What a document is in a .txt file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Documents {
    /// What stands between empty lines.
    #[default]
    Paragraph,
    /// A line.
    Line,
    /// The whole file.
    File,
}

register! {
    text TextFilesConfig, NAME,
    summary: "Text from .txt, .jsonl (plain, .gz, .zst) and .parquet files, folders and globs",
    paper: "",
    example: "{type: text_files, path: corpus.txt}",
}

#[typetag::serde(name = NAME)]
impl TextConfig for TextFilesConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        let files = files(self.path.as_path()).under("path")?;
        Ok(Box::new(TextFiles {
            config: self.clone(),
            files,
            next: 0,
            open: None,
            position: 0,
            skipped: 0,
            first: None,
        }))
    }
}

/// Which of the endings a file's name has.
fn ending(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_str()?;
    ENDINGS.into_iter().find(|ending| name.strip_suffix(ending).is_some_and(|stem| stem.ends_with('.')))
}

/// The text files that a path means, sorted.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let supported = |path: &PathBuf| ending(path).is_some();
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

struct TextFiles {
    config: TextFilesConfig,
    files: Vec<PathBuf>,
    /// The number of the file to open next.
    next: usize,
    open: Option<OpenFile>,
    position: u64,
    skipped: u64,
    first: Option<String>,
}

struct OpenFile {
    path: PathBuf,
    content: Content,
    /// Lines or rows read so far.
    line: u64,
}

enum Content {
    Text(Box<dyn BufRead + Send>),
    Json(Box<dyn BufRead + Send>),
    Rows(rows::Rows),
}

/// One line or row of a file, or why it is none.
enum Line {
    Text(String),
    Bad(String),
}

impl OpenFile {
    fn open(path: &Path, column: &str) -> Result<Self> {
        let refused = |error: std::io::Error| InputError::new(format!("cannot read {}: {error}", path.display()));
        let file = File::open(path).map_err(refused)?;
        let ending = ending(path).unwrap_or_default();
        let lines = |file: File| -> Result<Box<dyn BufRead + Send>> {
            Ok(match ending.rsplit_once('.').map(|(_, packed)| packed) {
                Some("gz") => Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(BufReader::new(file)))),
                Some("zst") => Box::new(BufReader::new(zstd::Decoder::new(file).map_err(refused)?)),
                _ => Box::new(BufReader::new(file)),
            })
        };
        let content = match ending {
            "parquet" => Content::Rows(rows::Rows::open(path, file, column)?),
            json if json.starts_with("jsonl") => Content::Json(lines(file)?),
            _ => Content::Text(lines(file)?),
        };
        Ok(OpenFile { path: path.to_owned(), content, line: 0 })
    }

    fn line(&mut self) -> Result<Option<Line>> {
        let reader = match &mut self.content {
            Content::Rows(rows) => {
                self.line += 1;
                return Ok(rows.next().map(|row| row.map_or_else(Line::Bad, Line::Text)));
            }
            Content::Text(reader) | Content::Json(reader) => reader,
        };
        let mut bytes = Vec::new();
        match reader.read_until(b'\n', &mut bytes) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            // The file was cut off, or is damaged from here on; what a record before it said has been read.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::UnexpectedEof | ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::Other
                ) =>
            {
                self.line += 1;
                *reader = Box::new(std::io::empty());
                return Ok(Some(Line::Bad(format!("the file is damaged or breaks off: {error}"))));
            }
            Err(error) => return Err(anyhow::anyhow!("cannot read {}: {error}", self.path.display())),
        }
        self.line += 1;
        while matches!(bytes.last(), Some(b'\n' | b'\r')) {
            bytes.pop();
        }
        Ok(Some(match String::from_utf8(bytes) {
            Ok(text) => Line::Text(text),
            Err(_) => Line::Bad("not UTF-8".to_owned()),
        }))
    }

    fn origin(&self, line: u64) -> String {
        format!("{}:{line}", self.path.display())
    }
}

/// The text of a JSON record, or why there is none.
fn field(line: &str, column: &str) -> std::result::Result<String, String> {
    let record: Value = serde_json::from_str(line).map_err(|error| format!("not JSON: {error}"))?;
    match record.get(column) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("field `{column}` is not a string")),
        None => {
            let fields: Vec<&str> = record.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
            Err(format!("no field `{column}`, it has: {}", fields.join(", ")))
        }
    }
}

impl TextFiles {
    /// The next document of the open file; `None` at its end.
    fn document(&mut self) -> Result<Option<Document>> {
        let Some(file) = &mut self.open else { return Ok(None) };
        let (mut text, mut start) = (String::new(), file.line + 1);
        loop {
            let line = file.line()?;
            let ended = line.is_none();
            let mut bad = None;
            match (line, &file.content) {
                (None, _) => {}
                (Some(Line::Bad(why)), _) => bad = Some(why),
                (Some(Line::Text(row)), Content::Rows(_)) => (text, start) = (row, file.line),
                (Some(Line::Text(line)), Content::Json(_)) => {
                    start = file.line;
                    if !line.trim().is_empty() {
                        match field(&line, &self.config.column) {
                            Ok(found) => text = found,
                            Err(why) => bad = Some(why),
                        }
                    }
                }
                (Some(Line::Text(line)), Content::Text(_)) => {
                    let whole = self.config.documents == Documents::File;
                    if !line.trim().is_empty() || whole {
                        if !text.is_empty() {
                            text.push('\n');
                        }
                        text += &line;
                        if self.config.documents != Documents::Line {
                            continue;
                        }
                    }
                }
            }
            if let Some(why) = bad {
                let place = format!("{}: {why}", file.origin(file.line));
                if self.config.strict {
                    bail!(InputError::new(place).help("mend the record, or skip such with `strict: false`"));
                }
                self.skipped += 1;
                self.first.get_or_insert(place);
                continue;
            }
            if !text.trim().is_empty() {
                return Ok(Some(Document { text, origin: file.origin(start) }));
            }
            if ended {
                return Ok(None);
            }
            text.clear();
            start = file.line + 1;
        }
    }
}

impl TextStream for TextFiles {
    fn next_record(&mut self) -> Result<Option<Record>> {
        loop {
            if let Some(document) = self.document()? {
                self.position += 1;
                return Ok(Some(Record::Text(document)));
            }
            let Some(path) = self.files.get(self.next) else { return Ok(None) };
            self.open = Some(OpenFile::open(path, &self.config.column)?);
            self.next += 1;
        }
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn seek(&mut self, position: u64) -> Result<()> {
        (self.next, self.open, self.position, self.skipped, self.first) = (0, None, 0, 0, None);
        while self.position < position && self.next_record()?.is_some() {}
        Ok(())
    }

    fn skipped(&self) -> (u64, Option<String>) {
        (self.skipped, self.first.clone())
    }
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
        assert!(first.unwrap().ends_with("a.jsonl:2: field `text` is not a string"));
        let (_dir, mut strict) = stream("a.jsonl", content, Documents::Paragraph, true);
        strict.next_record().unwrap();
        assert!(strict.next_record().unwrap_err().to_string().contains("a.jsonl:2"));
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
    fn seeking_continues_where_it_was() {
        let (_dir, mut stream) = stream("a.txt", TEXT, Documents::Line, false);
        stream.next_record().unwrap();
        let position = stream.position();
        let rest = texts(&mut *stream);
        stream.seek(position).unwrap();
        assert_eq!(texts(&mut *stream), rest);
    }
}
