//! Records out of files, one file after the other.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::PathBuf;

use dictlearn_core::hub::{hub, Repo};
use dictlearn_core::prelude::*;
use serde_json::json;

use crate::rows;

/// What a file's name may end with.
pub const ENDINGS: [&str; 10] =
    ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst", "parquet"];

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

/// How records are read.
#[derive(Debug)]
pub struct Options {
    /// The field that holds the text or the messages.
    pub column: String,
    /// What a document is in a .txt file.
    pub documents: Documents,
    /// Whether a bad record ends the run.
    pub strict: bool,
}

/// Where a file is.
#[derive(Debug)]
pub enum Place {
    /// On this machine.
    Local(PathBuf),
    /// In a repository of the Hub, by its path there.
    Hub(Repo, String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Local(path) => write!(f, "{}", path.display()),
            Place::Hub(repo, path) => write!(f, "{repo}/{path}"),
        }
    }
}

impl Place {
    /// The file as it arrives.
    fn stream(&self) -> Result<Box<dyn Read + Send>> {
        match self {
            Place::Local(_) => Ok(Box::new(self.file()?)),
            Place::Hub(repo, path) => match hub()?.stream(repo, path)? {
                Some(file) => Ok(file),
                None => bail!(InputError::new(format!("there is no file {self} (any more)"))),
            },
        }
    }

    /// The file on this machine, wherever it is from.
    fn file(&self) -> Result<File> {
        let path = match self {
            Place::Local(path) => path.clone(),
            Place::Hub(repo, path) => match hub()?.file(repo, path)? {
                Some(path) => path,
                None => bail!(InputError::new(format!("there is no file {self} (any more)"))),
            },
        };
        Ok(File::open(path).map_err(|error| InputError::new(format!("cannot read {self}: {error}")))?)
    }
}

/// Which of the endings a file's name has.
pub fn ending(path: &str) -> Option<&'static str> {
    ENDINGS.into_iter().find(|ending| path.strip_suffix(ending).is_some_and(|stem| stem.ends_with('.')))
}

/// A stream of the records of files.
pub struct TextFiles {
    options: Options,
    places: Vec<Place>,
    /// The number of the file to open next.
    next: usize,
    open: Option<OpenFile>,
    position: u64,
    skipped: u64,
    first: Option<String>,
}

struct OpenFile {
    name: String,
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
    /// The value of a row's column.
    Value(Value),
    Bad(String),
}

impl OpenFile {
    fn open(place: &Place, column: &str) -> Result<Self> {
        let name = place.to_string();
        let ending = ending(&name).unwrap_or_default();
        let lines = || -> Result<Box<dyn BufRead + Send>> {
            let file = place.stream()?;
            Ok(match ending.rsplit_once('.').map(|(_, packed)| packed) {
                Some("gz") => Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(BufReader::new(file)))),
                Some("zst") => {
                    let decoder = zstd::Decoder::new(file);
                    let refused = |error| InputError::new(format!("cannot read {name}: {error}"));
                    Box::new(BufReader::new(decoder.map_err(refused)?))
                }
                _ => Box::new(BufReader::new(file)),
            })
        };
        let content = match ending {
            "parquet" => Content::Rows(rows::Rows::open(&name, place.file()?, column)?),
            json if json.starts_with("json") => Content::Json(lines()?),
            _ => Content::Text(lines()?),
        };
        Ok(OpenFile { name, content, line: 0 })
    }

    fn line(&mut self) -> Result<Option<Line>> {
        let reader = match &mut self.content {
            Content::Rows(rows) => {
                self.line += 1;
                return Ok(rows.next().map(|row| row.map_or_else(Line::Bad, Line::Value)));
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
            Err(error) => return Err(anyhow::anyhow!("cannot read {}: {error}", self.name)),
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
        format!("{}:{line}", self.name)
    }
}

/// The value of a JSON record's field, or why there is none.
fn field(line: &str, column: &str) -> std::result::Result<Value, String> {
    let mut record: Value = serde_json::from_str(line).map_err(|error| format!("not JSON: {error}"))?;
    match record.get_mut(column) {
        Some(value) => Ok(value.take()),
        None => {
            let fields: Vec<&str> = record.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
            Err(format!("no field `{column}`, it has: {}", fields.join(", ")))
        }
    }
}

/// The messages of a chat as `{role, content}`, however they were written.
fn messages(value: &[Value]) -> Option<Vec<Value>> {
    let message = |message: &Value| {
        if message.get("role").is_some_and(Value::is_string) && message.get("content").is_some() {
            return Some(message.clone());
        }
        // As ShareGPT writes them.
        let role = match message.get("from")?.as_str()? {
            "human" | "user" => "user",
            "gpt" | "chatgpt" | "assistant" | "model" => "assistant",
            other => other,
        };
        Some(json!({"role": role, "content": message.get("value")?}))
    };
    value.iter().map(message).collect()
}

impl TextFiles {
    /// The records of these files, in this order.
    pub fn new(places: Vec<Place>, options: Options) -> Self {
        TextFiles { options, places, next: 0, open: None, position: 0, skipped: 0, first: None }
    }

    /// The next record of the open file; `None` at its end.
    fn record(&mut self) -> Result<Option<Record>> {
        let Some(file) = &mut self.open else { return Ok(None) };
        let column = &self.options.column;
        let (mut text, mut start) = (String::new(), file.line + 1);
        loop {
            let line = file.line()?;
            let ended = line.is_none();
            let value = match (line, &file.content) {
                (None, _) => Ok(None),
                (Some(Line::Bad(why)), _) => Err(why),
                (Some(Line::Value(value)), _) => Ok(Some(value)),
                (Some(Line::Text(line)), Content::Json(_)) if line.trim().is_empty() => continue,
                (Some(Line::Text(line)), Content::Json(_)) => field(&line, column).map(Some),
                (Some(Line::Text(line)), _) => {
                    let whole = self.options.documents == Documents::File;
                    if !line.trim().is_empty() || whole {
                        if !text.is_empty() {
                            text.push('\n');
                        }
                        text += &line;
                        if self.options.documents != Documents::Line {
                            continue;
                        }
                    }
                    Ok(None)
                }
            };
            let place = file.origin(file.line);
            match value {
                Err(why) => {
                    skip(&self.options, &mut self.skipped, &mut self.first, &place, &why)?;
                    continue;
                }
                Ok(None) => {}
                Ok(Some(Value::String(found))) => (text, start) = (found, file.line),
                Ok(Some(value)) => match value.as_array().and_then(|value| messages(value)) {
                    Some(messages) if !messages.is_empty() => {
                        return Ok(Some(Record::Chat(Chat { messages, origin: place })))
                    }
                    _ => {
                        let why = format!("field `{column}` is neither a string nor the messages of a chat");
                        skip(&self.options, &mut self.skipped, &mut self.first, &place, &why)?;
                        continue;
                    }
                },
            }
            if !text.trim().is_empty() {
                return Ok(Some(Record::Text(Document { text, origin: file.origin(start) })));
            }
            if ended {
                return Ok(None);
            }
            text.clear();
            start = file.line + 1;
        }
    }
}

/// Counts a bad record, or ends with it.
fn skip(options: &Options, skipped: &mut u64, first: &mut Option<String>, place: &str, why: &str) -> Result<()> {
    let place = format!("{place}: {why}");
    if options.strict {
        bail!(InputError::new(place).help("mend the record, or skip such with `strict: false`"));
    }
    *skipped += 1;
    first.get_or_insert(place);
    Ok(())
}

impl TextStream for TextFiles {
    fn next_record(&mut self) -> Result<Option<Record>> {
        loop {
            if let Some(record) = self.record()? {
                self.position += 1;
                return Ok(Some(record));
            }
            let Some(place) = self.places.get(self.next) else { return Ok(None) };
            self.open = Some(OpenFile::open(place, &self.options.column)?);
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

    fn refuse(&mut self, origin: &str, why: &str) -> Result<()> {
        skip(&self.options, &mut self.skipped, &mut self.first, origin, why)
    }

    fn skipped(&self) -> (u64, Option<String>) {
        (self.skipped, self.first.clone())
    }
}
