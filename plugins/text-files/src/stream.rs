//! Records out of files, one file after the other.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::PathBuf;

use dictlearn_core::files;
use dictlearn_core::hub::{hub, Repo};
use dictlearn_core::prelude::*;
use serde_json::json;

use crate::rows;

/// What a file's name may end with.
pub const ENDINGS: [&str; 10] =
    ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst", "parquet"];

/// Bytes of a .txt file's longest document. What is longer is cut between two words, so that memory has a bound whatever
/// a file holds.
const LONGEST_DOCUMENT: usize = 1 << 20;

/// Bytes of the longest line of a .jsonl file.
const LONGEST_RECORD: usize = 1 << 28;

/// Bad records at the beginning after which it is the config that is wrong.
const HOPELESS: u64 = 100;

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
        Ok(files::open(&path)?)
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
    /// The lengths that the files of this machine had at the beginning.
    lengths: BTreeMap<String, u64>,
    /// The number of the file to open next.
    next: usize,
    open: Option<OpenFile>,
    position: u64,
    bad: Bad,
}

/// Bad records: how many, and the place and reason of the first.
#[derive(Default)]
struct Bad {
    count: u64,
    first: Option<String>,
}

struct OpenFile {
    name: String,
    content: Content,
    /// The beginning of the next line, where a line was cut.
    rest: Vec<u8>,
    /// Lines or rows read so far.
    line: u64,
    /// Whether its end was reached, or where it breaks off.
    ended: bool,
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
        Ok(OpenFile { name, content, rest: Vec::new(), line: 0, ended: false })
    }

    fn line(&mut self) -> Result<Option<Line>> {
        let (reader, longest) = match &mut self.content {
            Content::Rows(rows) => {
                self.line += 1;
                let row = rows.next();
                self.ended = !matches!(row, Some(Ok(_)));
                return Ok(row.map(|row| row.map_or_else(Line::Bad, Line::Value)));
            }
            Content::Text(reader) => (reader, LONGEST_DOCUMENT),
            Content::Json(reader) => (reader, LONGEST_RECORD),
        };
        let mut bytes = std::mem::take(&mut self.rest);
        // What is left of a line that was cut is no line of its own.
        self.line += u64::from(bytes.is_empty());
        match reader.by_ref().take((longest - bytes.len()) as u64).read_until(b'\n', &mut bytes) {
            Ok(0) if bytes.is_empty() => {
                self.ended = true;
                return Ok(None);
            }
            // The last line need not have an end.
            Ok(_) => self.ended = bytes.last() != Some(&b'\n') && bytes.len() < longest,
            // The file was cut off, or is damaged from here on; what a record before it said has been read.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::UnexpectedEof | ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::Other
                ) =>
            {
                *reader = Box::new(std::io::empty());
                self.ended = true;
                return Ok(Some(Line::Bad(format!("the file is damaged or breaks off: {error}"))));
            }
            Err(error) => return Err(anyhow::anyhow!("cannot read {}: {error}", self.name)),
        }
        if bytes.len() == longest && bytes.last() != Some(&b'\n') {
            if longest == LONGEST_RECORD {
                skip_line(reader).with_context(|| format!("cannot read {}", self.name))?;
                return Ok(Some(Line::Bad(format!("a record of more than {} MB", LONGEST_RECORD >> 20))));
            }
            self.rest = bytes.split_off(between_words(&bytes));
        }
        while matches!(bytes.last(), Some(b'\n' | b'\r')) {
            bytes.pop();
        }
        if self.line == 1 && bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.drain(..BYTE_ORDER_MARK.len());
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

/// What some editors begin a file with.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Reads to the end of a line and keeps nothing of it.
fn skip_line(reader: &mut dyn BufRead) -> std::io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let read = end.map_or(buffer.len(), |end| end + 1);
        reader.consume(read);
        if end.is_some() || read == 0 {
            return Ok(());
        }
    }
}

/// Where to cut a text that is too long: before its last space, or where there is none, before its last letter.
fn between_words(bytes: &[u8]) -> usize {
    let space = bytes.iter().rposition(|byte| *byte == b' ').filter(|at| *at > 0);
    // A byte of the form 10xxxxxx continues a letter.
    let letter = || bytes.iter().rposition(|byte| byte & 0xc0 != 0x80).filter(|at| *at > 0);
    space.or_else(letter).unwrap_or(bytes.len())
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
        let length = |place: &Place| match place {
            Place::Local(path) => Some((place.to_string(), path.metadata().ok()?.len())),
            Place::Hub(..) => None,
        };
        let lengths = places.iter().filter_map(length).collect();
        TextFiles { options, places, lengths, next: 0, open: None, position: 0, bad: Bad::default() }
    }

    /// What is said of files that hold no record.
    fn no_text(&self) -> InputError {
        let first = self.places.first().map(Place::to_string).unwrap_or_default();
        let more = match self.places.len() {
            0 | 1 => String::new(),
            count => format!(" and {} more files", count - 1),
        };
        let bad = self.bad.first.as_ref().map(|bad| format!(": {} bad records, the first {bad}", self.bad.count));
        InputError::new(format!("there is no text in {first}{more}{}", bad.unwrap_or_default()))
            .help("a document has letters in it; `column` names the field of a record that holds it")
    }

    /// Refuses a file that is shorter than it was: what is missing would be missed in silence.
    fn check_length(&self, name: &str) -> Result<()> {
        let Some(before) = self.lengths.get(name) else { return Ok(()) };
        let now =
            std::fs::metadata(name).map_err(|error| InputError::new(format!("cannot read {name}: {error}")))?.len();
        if now < *before {
            bail!(InputError::new(format!("{name} was cut while it was read: it has {now} bytes, and had {before}"))
                .help("put the file back as it was; `--resume` goes on from the last checkpoint"));
        }
        Ok(())
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
                (Some(Line::Text(line)), Content::Json(_)) if file.line == 1 && line.trim_start().starts_with('[') => {
                    bail!(InputError::new(format!("{} is a JSON array, not a record on each line", file.name))
                        .help("write each element on a line of its own: `jq -c '.[]' FILE > FILE.jsonl`"));
                }
                (Some(Line::Text(line)), Content::Json(_)) => field(&line, column).map(Some),
                (Some(Line::Text(line)), _) => {
                    let whole = self.options.documents == Documents::File;
                    if !line.trim().is_empty() || whole {
                        if !text.is_empty() {
                            text.push('\n');
                        }
                        text += &line;
                        let full = text.len() >= LONGEST_DOCUMENT || !file.rest.is_empty();
                        if self.options.documents != Documents::Line && !full {
                            continue;
                        }
                    }
                    Ok(None)
                }
            };
            let place = file.origin(file.line);
            match value {
                Err(why) => {
                    self.bad.skip(&self.options, self.position, &place, &why)?;
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
                        self.bad.skip(&self.options, self.position, &place, &why)?;
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

impl Bad {
    /// Counts a bad record, or ends with it. `delivered` is how many good ones there were.
    fn skip(&mut self, options: &Options, delivered: u64, place: &str, why: &str) -> Result<()> {
        let place = format!("{place}: {why}");
        if options.strict {
            bail!(InputError::new(place).help("mend the record, or skip such with `strict: false`"));
        }
        self.count += 1;
        let first = self.first.get_or_insert(place);
        if delivered == 0 && self.count == HOPELESS {
            bail!(InputError::new(format!("none of the first {HOPELESS} records can be used; the first is {first}"))
                .help("`column` names the field that holds the text or the messages of a chat"));
        }
        Ok(())
    }
}

impl TextStream for TextFiles {
    fn next_record(&mut self) -> Result<Option<Record>> {
        loop {
            let record = self.record()?;
            if let Some(file) = self.open.as_ref().filter(|file| file.ended) {
                self.check_length(&file.name)?;
            }
            if let Some(record) = record {
                self.position += 1;
                return Ok(Some(record));
            }
            let Some(place) = self.places.get(self.next) else {
                if self.position == 0 {
                    bail!(self.no_text());
                }
                return Ok(None);
            };
            self.open = Some(OpenFile::open(place, &self.options.column)?);
            self.next += 1;
        }
    }

    fn files(&self) -> BTreeMap<String, u64> {
        self.lengths.clone()
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn seek(&mut self, position: u64) -> Result<()> {
        (self.next, self.open, self.position, self.bad) = (0, None, 0, Bad::default());
        while self.position < position && self.next_record()?.is_some() {}
        Ok(())
    }

    fn refuse(&mut self, origin: &str, why: &str) -> Result<()> {
        self.bad.skip(&self.options, self.position, origin, why)
    }

    fn skipped(&self) -> (u64, Option<String>) {
        (self.bad.count, self.bad.first.clone())
    }
}
