//! Text from .txt and .jsonl files, read as a stream: memory does not grow with the files.
//!
//! In a .txt file documents are paragraphs, lines or the whole file; in a .jsonl file each line is a JSON object with
//! the text in one field. A bad record is skipped and counted, or ends the run with `strict: true`; either way the
//! message names file and line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use dictlearn_core::prelude::*;

const NAME: &str = "text_files";
const EXTENSIONS: [&str; 2] = ["txt", "jsonl"];

/// Text from .txt and .jsonl files.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextFilesConfig {
    /// A file, a folder, or a glob; several files are read in the order of their names.
    pub path: ConfigPath,
    /// The field of a .jsonl record that holds the text.
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
    summary: "Text from .txt and .jsonl files, folders and globs",
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

/// The text files that a path means, sorted.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let extension = |path: &Path| path.extension().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let supported = |path: &PathBuf| EXTENSIONS.contains(&extension(path).as_str());
    let help = "text is read from .txt and .jsonl files";
    if path.is_file() {
        let path = path.to_owned();
        if !supported(&path) {
            bail!(InputError::new(format!("{}: files of type `{}` are not read", path.display(), extension(&path)))
                .help(help));
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
    reader: BufReader<File>,
    line: u64,
}

/// A line of a file, or why it is none.
enum Line {
    Text(String),
    Bad(String),
}

impl OpenFile {
    fn line(&mut self) -> Result<Option<Line>> {
        let mut bytes = Vec::new();
        let read = self.reader.read_until(b'\n', &mut bytes);
        let read = read.map_err(|error| anyhow::anyhow!("cannot read {}: {error}", self.path.display()))?;
        if read == 0 {
            return Ok(None);
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

impl TextFiles {
    /// The next document of the open file; `None` at its end.
    fn document(&mut self) -> Result<Option<Document>> {
        let Some(file) = &mut self.open else { return Ok(None) };
        let json = file.path.extension().is_some_and(|extension| extension == "jsonl");
        let (mut text, mut start) = (String::new(), file.line + 1);
        loop {
            let line = file.line()?;
            let ended = line.is_none();
            let mut bad = None;
            match line {
                Some(Line::Bad(why)) => bad = Some(why),
                Some(Line::Text(line)) if json => {
                    start = file.line;
                    match serde_json::from_str::<Value>(&line) {
                        _ if line.trim().is_empty() => {}
                        Err(error) => bad = Some(format!("not JSON: {error}")),
                        Ok(record) => match record.get(&self.config.column).map(Value::as_str) {
                            Some(Some(found)) => text = found.to_owned(),
                            Some(None) => bad = Some(format!("field `{}` is not a string", self.config.column)),
                            None => {
                                let fields: Vec<&str> =
                                    record.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
                                bad = Some(format!("no field `{}`, it has: {}", self.config.column, fields.join(", ")));
                            }
                        },
                    }
                }
                Some(Line::Text(line)) => {
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
                None => {}
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
            let file = File::open(path)
                .map_err(|error| InputError::new(format!("cannot read {}: {error}", path.display())))?;
            self.open = Some(OpenFile { path: path.clone(), reader: BufReader::new(file), line: 0 });
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
