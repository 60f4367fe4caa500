//! Streams records from files, one file after the other.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, ErrorKind, Read, Seek};
use std::path::PathBuf;

use dictlearn_core::files;
use dictlearn_core::hub::{Repo, hub};
use dictlearn_core::prelude::*;
use serde_json::json;

use crate::cell::{Cell, Unreadable};
use crate::rows;

/// Supported file endings.
pub const ENDINGS: [&str; 10] =
    ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst", "parquet"];

/// Maximum bytes of a document in a .txt file. Longer ones are split between two words, so that memory is bounded for
/// any file.
const LONGEST_DOCUMENT: usize = 1 << 20;

/// Maximum bytes of a line in a .jsonl file.
const LONGEST_RECORD: usize = 1 << 28;

/// Maximum window of a .zst file as a power of two: the window of `zstd --long=31`.
const LONGEST_WINDOW: u32 = 31;

/// Bytes at the start of a file that are inspected to detect its type.
const SNIFFED: u64 = 4096;

/// Bad records without a single good one after which the stream stops: the config must be wrong.
const HOPELESS: u64 = 100;

/// Unit of a document in a .txt file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Documents {
    /// Text between empty lines.
    #[default]
    Paragraph,
    /// A line.
    Line,
    /// The whole file.
    File,
}

/// Options for reading records.
#[derive(Debug)]
pub struct Options {
    /// Fields that may hold the text, the messages or the token ids; the first that exists is read.
    columns: Vec<String>,
    documents: Documents,
    /// `true`: bad records are errors. `None`: only unreadable files are errors. `false`: neither is.
    strict: Option<bool>,
}

impl Options {
    /// Makes the options from the fields of a config.
    pub fn new(column: Option<&str>, documents: Documents, strict: Option<bool>) -> Self {
        let columns = match column {
            Some(column) => vec![column.to_owned()],
            None => ["text", "input_ids", "tokens"].map(str::to_owned).to_vec(),
        };
        Options { columns, documents, strict }
    }
}

/// Where a file is.
#[derive(Debug)]
pub enum Place {
    /// On this machine.
    Local(PathBuf),
    /// In a repository of the Hub, at this path.
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
    /// Streams the file.
    fn stream(&self) -> Result<Box<dyn Read + Send>> {
        match self {
            Place::Local(_) => Ok(Box::new(self.file()?)),
            Place::Hub(repo, path) => match hub()?.stream(repo, path)? {
                Some(file) => Ok(file),
                None => bail!(InputError::new(format!("the file {self} no longer exists"))),
            },
        }
    }

    /// Opens the file locally, downloading it first if necessary.
    fn file(&self) -> Result<File> {
        let path = match self {
            Place::Local(path) => path.clone(),
            Place::Hub(repo, path) => match hub()?.file(repo, path)? {
                Some(path) => path,
                None => bail!(InputError::new(format!("the file {self} no longer exists"))),
            },
        };
        let unreadable = |error: InputError| {
            let help = error.help_text().map_or_else(String::new, |help| format!("; {help}"));
            Unreadable(format!("{}{help}", error.message()))
        };
        Ok(files::open(&path).map_err(unreadable)?)
    }
}

/// Returns the supported ending of a file's name, if any.
pub fn ending(path: &str) -> Option<&'static str> {
    ENDINGS.into_iter().find(|ending| path.strip_suffix(ending).is_some_and(|stem| stem.ends_with('.')))
}

/// A stream of the records of files.
pub struct TextFiles {
    options: Options,
    places: Vec<Place>,
    /// Lengths of the local files at the start.
    lengths: BTreeMap<String, u64>,
    /// Index of the next file to open.
    next: usize,
    open: Option<OpenFile>,
    position: u64,
    bad: Bad,
}

/// Counts skipped records and files, and keeps the place and reason of the first of each.
#[derive(Default)]
struct Bad {
    count: u64,
    first: Option<String>,
    /// How to fix the first record.
    help: &'static str,
    files: u64,
    first_file: Option<String>,
}

/// Why a line or row is not a record, and how to fix it.
struct Fault {
    why: String,
    help: &'static str,
}

impl Fault {
    /// The field is missing, or has an unsupported value.
    fn of_field(why: String) -> Self {
        Fault { why, help: "`column` names the field with the text, the messages of a chat or the token ids" }
    }

    /// The token ids or their mask are invalid.
    fn of_ids(why: String) -> Self {
        const HELP: &str = "write a row of token ids as a flat list of integers, with an `attention_mask` of the same \
                            length that has 0s only at its ends";
        Fault { why, help: HELP }
    }
}

struct OpenFile {
    name: String,
    content: Content,
    /// True for a local file, whose errors are never the network's.
    is_local: bool,
    /// Remainder of a line that was split.
    rest: Vec<u8>,
    /// Lines or rows read so far.
    line: u64,
    /// True at its end, or after an error.
    ended: bool,
}

enum Content {
    Text(Box<dyn BufRead + Send>),
    Json(Box<dyn BufRead + Send>),
    Rows(rows::Rows),
}

/// One line or row of a file, or why it is not a record.
enum Line {
    Text(String),
    /// The value of a row.
    Cell(Cell),
    Bad(Fault),
}

impl OpenFile {
    fn open(place: &Place, columns: &[String]) -> Result<Self> {
        let name = place.to_string();
        let is_local = matches!(place, Place::Local(_));
        let ending = ending(&name).unwrap_or_default();
        let lines = || -> Result<Box<dyn BufRead + Send>> {
            let file = BufReader::new(place.stream()?);
            let unpacked: Box<dyn Read + Send> = match ending.rsplit_once('.').map(|(_, packed)| packed) {
                Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(file)),
                Some("zst") => {
                    let decoder = zstd::Decoder::with_buffer(file).and_then(|mut decoder| {
                        decoder.window_log_max(LONGEST_WINDOW)?;
                        Ok(decoder)
                    });
                    Box::new(decoder.map_err(|error| Unreadable(format!("cannot read {name}: {error}")))?)
                }
                _ => Box::new(file),
            };
            decoded(unpacked, &name, is_local)
        };
        let content = match ending {
            "parquet" => {
                let mut file = place.file()?;
                let mut head = Vec::new();
                let read = (&file).take(SNIFFED).read_to_end(&mut head).and_then(|_| file.rewind());
                read.map_err(|error| failure(&error, &name, true))?;
                if let Some(why) = no_text(&head).filter(|_| !head.starts_with(b"PAR1")) {
                    bail!(Unreadable(format!("{name} {why}")));
                }
                Content::Rows(rows::Rows::open(&name, file, columns)?)
            }
            json if json.starts_with("json") => Content::Json(lines()?),
            _ => Content::Text(lines()?),
        };
        Ok(OpenFile { name, content, is_local, rest: Vec::new(), line: 0, ended: false })
    }

    fn line(&mut self) -> Result<Option<Line>> {
        let (reader, longest) = match &mut self.content {
            Content::Rows(rows) => {
                self.line += 1;
                let row = rows.next_row().inspect_err(|_| self.ended = true)?;
                self.ended = row.is_none();
                return Ok(row.map(|row| row.map_or_else(|why| Line::Bad(Fault::of_field(why)), Line::Cell)));
            }
            Content::Text(reader) => (reader, LONGEST_DOCUMENT),
            Content::Json(reader) => (reader, LONGEST_RECORD),
        };
        let mut bytes = std::mem::take(&mut self.rest);
        // The remainder of a split line does not count as a new line.
        self.line += u64::from(bytes.is_empty());
        match reader.by_ref().take((longest - bytes.len()) as u64).read_until(b'\n', &mut bytes) {
            Ok(0) if bytes.is_empty() => {
                self.ended = true;
                return Ok(None);
            }
            // The last line need not end in a line break.
            Ok(_) => self.ended = bytes.last() != Some(&b'\n') && bytes.len() < longest,
            // All records before the error have been read.
            Err(error) => {
                *reader = Box::new(std::io::empty());
                self.ended = true;
                return Err(failure(&error, &self.origin(self.line), self.is_local));
            }
        }
        if bytes.len() == longest && bytes.last() != Some(&b'\n') {
            if longest == LONGEST_RECORD {
                if let Err(error) = skip_line(reader) {
                    self.ended = true;
                    return Err(failure(&error, &self.origin(self.line), self.is_local));
                }
                let why = format!("the record is longer than {} MB", LONGEST_RECORD >> 20);
                return Ok(Some(Line::Bad(Fault { why, help: "write each record on its own line" })));
            }
            self.rest = bytes.split_off(between_words(&bytes));
        }
        while matches!(bytes.last(), Some(b'\n' | b'\r')) {
            bytes.pop();
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(Line::Text(text))),
            Err(error) => {
                *reader = Box::new(std::io::empty());
                self.rest.clear();
                self.ended = true;
                let byte = error.as_bytes()[error.utf8_error().valid_up_to()];
                Err(Unreadable(format!(
                    "{}: not UTF-8 (byte {byte:#04x}): if the file is Latin-1, convert it with \
                     `iconv -f LATIN1 -t UTF-8 FILE > NEW`",
                    self.origin(self.line)
                ))
                .into())
            }
        }
    }

    fn origin(&self, line: u64) -> String {
        format!("{}:{line}", self.name)
    }
}

/// Classifies a read error as the file's (`Unreadable`) or the network's.
fn failure(error: &std::io::Error, place: &str, is_local: bool) -> anyhow::Error {
    let of_file = matches!(
        error.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::Other
    );
    if error.to_string().contains("Allocation error") {
        return Unreadable(format!("{place}: not enough memory for the zstd window: {error}")).into();
    }
    match is_local || of_file {
        true => Unreadable(format!("{place}: the file is damaged or truncated: {error}")).into(),
        false => anyhow::anyhow!("cannot read {place}: {error}"),
    }
}

/// Returns a reader of a file's content as UTF-8, decoding UTF-16 with a byte order mark. Returns an error for content
/// that is not text.
fn decoded(mut content: Box<dyn Read + Send>, name: &str, is_local: bool) -> Result<Box<dyn BufRead + Send>> {
    let mut head = Vec::new();
    let read = content.by_ref().take(SNIFFED).read_to_end(&mut head);
    if let (Err(error), true) = (&read, head.is_empty()) {
        return Err(failure(error, name, is_local));
    }
    if let Some(why) = no_text(&head) {
        bail!(Unreadable(format!("{name} {why}")));
    }
    // An error after some text is repeated after that text is read.
    let rest: Box<dyn Read + Send> = match read {
        Ok(_) => content,
        Err(error) => Box::new(Failed(Some(error))),
    };
    let order = match head {
        _ if head.starts_with(b"\xff\xfe") => Some(u16::from_le_bytes as fn([u8; 2]) -> u16),
        _ if head.starts_with(b"\xfe\xff") => Some(u16::from_be_bytes as fn([u8; 2]) -> u16),
        _ => None,
    };
    let is_utf8 = std::str::from_utf8(&head).map_or_else(|error| error.error_len().is_none(), |_| true);
    if order.is_none() && !is_utf8 && head.contains(&0) {
        bail!(Unreadable(format!("{name} is not text: it has zero bytes, and bytes that are not UTF-8")));
    }
    let mark = match order {
        Some(_) => 2,
        None if head.starts_with(b"\xef\xbb\xbf") => 3,
        None => 0,
    };
    let whole = Cursor::new(head.split_off(mark)).chain(rest);
    Ok(match order {
        Some(unit) => Box::new(BufReader::new(Utf16 { bytes: whole, unit, rest: Vec::new(), text: Cursor::default() })),
        None => Box::new(BufReader::new(whole)),
    })
}

/// Decodes UTF-16 to UTF-8. Invalid UTF-16 is an error; a library's decoder would replace it with U+FFFD.
struct Utf16<R> {
    bytes: R,
    unit: fn([u8; 2]) -> u16,
    /// Bytes of an incomplete character.
    rest: Vec<u8>,
    text: Cursor<Vec<u8>>,
}

impl<R: Read> Read for Utf16<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let broken = || std::io::Error::new(ErrorKind::InvalidData, "not UTF-16 from here on");
        loop {
            let count = self.text.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            let mut more = [0; SNIFFED as usize];
            let count = match self.bytes.read(&mut more) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                count => count?,
            };
            if count == 0 {
                return if self.rest.is_empty() { Ok(0) } else { Err(broken()) };
            }
            self.rest.extend(&more[..count]);
            let units: Vec<u16> = self.rest.chunks_exact(2).map(|unit| (self.unit)([unit[0], unit[1]])).collect();
            let mut text = String::new();
            let mut used = 0;
            for character in char::decode_utf16(units.iter().copied()) {
                match character {
                    Ok(character) => {
                        text.push(character);
                        used += character.len_utf16();
                    }
                    // The second surrogate may not have been read yet.
                    Err(half) if used + 1 == units.len() && half.unpaired_surrogate() < 0xdc00 => break,
                    Err(_) if text.is_empty() => return Err(broken()),
                    // Return the text before the error first.
                    Err(_) => break,
                }
            }
            self.rest.drain(..2 * used);
            self.text = Cursor::new(text.into_bytes());
        }
    }
}

/// Returns why the first bytes of a file are not text; `None` if they may be.
fn no_text(head: &[u8]) -> Option<String> {
    const FOREIGN: [(&[u8], &str); 7] = [
        (b"\x1f\x8b", "is compressed: give it a name that ends in .gz"),
        (b"\x28\xb5\x2f\xfd", "is compressed: give it a name that ends in .zst"),
        (b"PAR1", "is a parquet file: give it a name that ends in .parquet"),
        (b"PK\x03\x04", "is a zip archive: unpack it"),
        (b"%PDF-", "is a PDF: extract its text"),
        (b"\xff\xfe\0\0", "is UTF-32: write it as UTF-8"),
        (b"\0\0\xfe\xff", "is UTF-32: write it as UTF-8"),
    ];
    // From a mirror of the Hub; `files::open` refuses local pointers.
    if files::is_pointer(head) {
        return Some("is a Git LFS pointer, not the file itself".to_owned());
    }
    if let Some((_, why)) = FOREIGN.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Some((*why).to_owned());
    }
    if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") {
        return None;
    }
    // In UTF-16, every other byte of Latin letters, digits and line breaks is zero.
    let zeros = |from: usize| head.iter().skip(from).step_by(2).filter(|byte| **byte == 0).count();
    let (order, count) = match (zeros(0), zeros(1)) {
        (0, count) => ("LE", count),
        (count, 0) => ("BE", count),
        _ => return None,
    };
    (count >= 4 && count * 16 >= head.len()).then(|| {
        format!(
            "looks like UTF-16 without a byte order mark: convert it with `iconv -f UTF-16{order} -t UTF-8 FILE > NEW`"
        )
    })
}

/// A reader that fails once.
struct Failed(Option<std::io::Error>);

impl Read for Failed {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        self.0.take().map_or(Ok(0), Err)
    }
}

/// Skips to the end of a line.
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

/// Returns where to split a text that is too long: before its last space, or without a space before its last character.
fn between_words(bytes: &[u8]) -> usize {
    let space = bytes.iter().rposition(|byte| *byte == b' ').filter(|at| *at > 0);
    // A byte of the form 10xxxxxx continues a character.
    let letter = || bytes.iter().rposition(|byte| byte & 0xc0 != 0x80).filter(|at| *at > 0);
    space.or_else(letter).unwrap_or(bytes.len())
}

/// Returns the first of `columns` that a JSON record has, or why it has none.
fn field(line: &str, columns: &[String]) -> std::result::Result<Cell, Fault> {
    let mut record: Value = serde_json::from_str(line).map_err(|error| Fault {
        why: format!("not JSON: {error}"),
        help: "write a JSON object on each line, such as `{\"text\": \"...\"}`",
    })?;
    let found = columns.iter().find_map(|column| Some((column, path(&record, column)?)));
    let Some((column, path)) = found else {
        let column = columns.first().map_or("", String::as_str);
        return Err(Fault::of_field(match names(&record) {
            names if names.is_empty() => format!("no field `{column}`, and no other fields"),
            names => format!("no field `{column}`, it has: {}", names.join(", ")),
        }));
    };
    let mut holder = &mut record;
    for name in &path[..path.len() - 1] {
        holder = &mut holder[*name];
    }
    let mut take = |name: &str| holder.get_mut(name).map(Value::take);
    let value = take(path[path.len() - 1]).unwrap_or_default();
    Ok(Cell { column: column.clone(), value, mask: take("attention_mask") })
}

/// Returns the path to a field as names, outermost first: `translation.en` may be the field `en` of `translation`.
fn path<'a>(record: &Value, column: &'a str) -> Option<Vec<&'a str>> {
    let fields = record.as_object()?;
    if fields.contains_key(column) {
        return Some(vec![column]);
    }
    column.match_indices('.').find_map(|(at, _)| {
        let mut below = path(fields.get(&column[..at])?, &column[at + 1..])?;
        below.insert(0, &column[..at]);
        Some(below)
    })
}

/// Returns the names of a record's fields, in the notation of `column`.
fn names(record: &Value) -> Vec<String> {
    let below = |(name, value): (&String, &Value)| match names(value) {
        below if below.is_empty() => vec![name.clone()],
        below => below.into_iter().map(|below| format!("{name}.{below}")).collect(),
    };
    record.as_object().into_iter().flatten().flat_map(below).collect()
}

/// Returns token ids without padding, or what is wrong with them.
fn token_ids(column: &str, ids: &[Value], mask: Option<&Value>) -> std::result::Result<Vec<i64>, String> {
    let mut found = Vec::with_capacity(ids.len());
    for (at, id) in ids.iter().enumerate() {
        found
            .push(id.as_i64().ok_or_else(|| format!("`{column}[{at}]` is {}, but token ids are integers", shown(id)))?);
    }
    let Some(mask) = mask.filter(|mask| !mask.is_null()) else { return Ok(found) };
    let is_text = |value: &Value| match value {
        Value::Bool(text) => Some(*text),
        value => value.as_i64().filter(|text| matches!(text, 0 | 1)).map(|text| text == 1),
    };
    let mask: Option<Vec<bool>> = mask.as_array().and_then(|mask| mask.iter().map(is_text).collect());
    let mask = mask.ok_or("`attention_mask` is not a list of 0s and 1s")?;
    if mask.len() != found.len() {
        return Err(format!("`attention_mask` has length {}, but `{column}` has length {}", mask.len(), found.len()));
    }
    let start = mask.iter().position(|text| *text).ok_or("`attention_mask` is 0 everywhere")?;
    let end = mask.iter().rposition(|text| *text).map_or(start, |last| last + 1);
    if let Some(hole) = mask[start..end].iter().position(|text| !text) {
        let hole = start + hole;
        return Err(format!("`attention_mask[{hole}]` is 0 between tokens, but only padding at an end can be removed"));
    }
    Ok(found[start..end].to_vec())
}

/// Returns why a field's value is not a record.
fn neither(column: &str, value: &Value) -> String {
    if value.as_array().is_some_and(Vec::is_empty) {
        return format!("field `{column}` is an empty list");
    }
    let what = format!("field `{column}` is neither a string, the messages of a chat nor token ids");
    match names(value).first() {
        Some(first) => format!("{what}; it has nested fields: choose one, such as `{column}.{first}`"),
        None => what,
    }
}

/// Describes a value in a message.
fn shown(value: &Value) -> String {
    match value {
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        other => other.to_string(),
    }
}

/// Returns the messages of a chat as `{role, content}`. The value is a list of messages, or an object of equally long
/// lists, as `datasets` stores them. Returns `None` if it is neither.
fn messages(value: &Value) -> Option<Vec<Value>> {
    let rows = match value {
        Value::Array(messages) => messages.clone(),
        Value::Object(lists) => {
            let length = lists.values().find_map(Value::as_array)?.len();
            if lists.values().any(|list| !list.is_null() && list.as_array().is_none_or(|list| list.len() != length)) {
                return None;
            }
            let row = |row: usize| {
                let fields = lists.iter().filter_map(|(name, list)| Some((name.clone(), list.get(row)?.clone())));
                Value::Object(fields.collect())
            };
            (0..length).map(row).collect()
        }
        _ => return None,
    };
    let message = |message: &Value| {
        // A message that calls tools may have no content.
        let says = message.get("content").is_some() || message.get("tool_calls").is_some_and(Value::is_array);
        if says && message.get("role").is_some_and(Value::is_string) {
            return Some(message.clone());
        }
        // ShareGPT's format.
        let role = match message.get("from")?.as_str()? {
            "human" | "user" => "user",
            "gpt" | "chatgpt" | "assistant" | "model" => "assistant",
            other => other,
        };
        Some(json!({"role": role, "content": message.get("value")?}))
    };
    rows.iter().map(message).collect()
}

impl TextFiles {
    /// Makes a stream of the records of these files, in this order.
    pub fn new(places: Vec<Place>, options: Options) -> Self {
        let length = |place: &Place| match place {
            Place::Local(path) => Some((place.to_string(), path.metadata().ok()?.len())),
            Place::Hub(..) => None,
        };
        let lengths = places.iter().filter_map(length).collect();
        TextFiles { options, places, lengths, next: 0, open: None, position: 0, bad: Bad::default() }
    }

    /// Returns the error for files without a single record.
    fn no_text(&self) -> InputError {
        let first = self.places.first().map(Place::to_string).unwrap_or_default();
        let more = match self.places.len() {
            0 | 1 => String::new(),
            count => format!(" and {} more files", count - 1),
        };
        let (bad, of_record) = (&self.bad, self.bad.first.is_some());
        let records = bad.first.iter().map(|first| match bad.count {
            1 => format!("1 bad record, {first}"),
            count => format!("{count} bad records, the first {first}"),
        });
        let files = bad.first_file.iter().map(|first| match bad.files {
            1 => format!("1 unreadable file, {first}"),
            count => format!("{count} unreadable files, the first {first}"),
        });
        let why: Vec<String> = records.chain(files).collect();
        let why = if why.is_empty() { String::new() } else { format!(": {}", why.join("; ")) };
        InputError::new(format!("there is no text in {first}{more}{why}")).help(match () {
            () if of_record => bad.help,
            () if bad.files > 0 => "repair the file, or download it again",
            () => "the file is empty or has only blanks: download it again, or choose another file",
        })
    }

    /// Returns the next record of the open file; `None` at its end.
    fn record(&mut self) -> Result<Option<Record>> {
        let Some(file) = &mut self.open else { return Ok(None) };
        let columns = &self.options.columns;
        let (mut text, mut start) = (String::new(), file.line + 1);
        loop {
            let line = match file.line().map_err(|error| error.downcast::<Unreadable>()) {
                Ok(line) => line,
                Err(Ok(why)) => {
                    check_length(&self.lengths, &file.name)?;
                    self.bad.skip_file(&self.options, why)?;
                    // The text before the error is a document.
                    continue;
                }
                Err(Err(error)) => return Err(error),
            };
            let ended = line.is_none();
            let value = match (line, &file.content) {
                (None, _) => Ok(None),
                (Some(Line::Bad(fault)), _) => Err(fault),
                (Some(Line::Cell(cell)), _) => Ok(Some(cell)),
                (Some(Line::Text(line)), Content::Json(_)) if line.trim().is_empty() => continue,
                (Some(Line::Text(line)), Content::Json(_)) if file.line == 1 && line.trim_start().starts_with('[') => {
                    bail!(
                        InputError::new(format!("{} is a JSON array, not a record on each line", file.name))
                            .help("write each element on its own line: `jq -c '.[]' FILE > FILE.jsonl`")
                    );
                }
                (Some(Line::Text(line)), Content::Json(_)) => field(&line, columns).map(Some),
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
                Err(fault) => {
                    self.bad.skip(&self.options, self.position, &place, fault)?;
                    continue;
                }
                Ok(None) => {}
                Ok(Some(Cell { value: Value::String(found), .. })) => (text, start) = (found, file.line),
                Ok(Some(Cell { column, value, mask })) => {
                    let list = value.as_array();
                    let fault = match list.filter(|list| !list.is_empty() && !list.iter().any(Value::is_object)) {
                        Some(ids) => match token_ids(&column, ids, mask.as_ref()) {
                            Ok(ids) => {
                                let mask = vec![true; ids.len()];
                                return Ok(Some(Record::Tokens { ids, mask, origin: place }));
                            }
                            Err(why) => Fault::of_ids(why),
                        },
                        None => match messages(&value) {
                            Some(messages) if !messages.is_empty() => {
                                return Ok(Some(Record::Chat(Chat { messages, origin: place })));
                            }
                            _ if list.is_some_and(Vec::is_empty) => Fault::of_ids(neither(&column, &value)),
                            _ => Fault::of_field(neither(&column, &value)),
                        },
                    };
                    self.bad.skip(&self.options, self.position, &place, fault)?;
                    continue;
                }
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

/// Returns an error if a file is shorter than at the start; otherwise its missing part would go unnoticed.
fn check_length(lengths: &BTreeMap<String, u64>, name: &str) -> Result<()> {
    let Some(before) = lengths.get(name) else { return Ok(()) };
    let now = std::fs::metadata(name).map_err(|error| InputError::new(format!("cannot read {name}: {error}")))?.len();
    if now < *before {
        bail!(
            InputError::new(format!("{name} was truncated while being read: it has {now} bytes, but had {before}"))
                .help("restore the original file; `--resume` continues from the last checkpoint")
        );
    }
    Ok(())
}

impl Bad {
    /// Counts a bad record, or returns it as an error. `delivered` is the number of good records so far.
    fn skip(&mut self, options: &Options, delivered: u64, place: &str, fault: Fault) -> Result<()> {
        let place = format!("{place}: {}", fault.why);
        if options.strict == Some(true) {
            bail!(InputError::new(place).help("repair the record, or remove `strict` to skip such records"));
        }
        self.count += 1;
        if self.first.is_none() {
            self.help = fault.help;
        }
        let first = self.first.get_or_insert(place);
        if delivered == 0 && self.count == HOPELESS {
            bail!(
                InputError::new(format!("none of the first {HOPELESS} records can be used; the first is {first}"))
                    .help(self.help)
            );
        }
        Ok(())
    }

    /// Counts an unreadable file, or returns it as an error.
    fn skip_file(&mut self, options: &Options, why: Unreadable) -> Result<()> {
        if options.strict != Some(false) {
            bail!(
                InputError::new(why.0)
                    .help("repair the file or download it again, or continue without it with `strict: false`")
            );
        }
        self.files += 1;
        self.first_file.get_or_insert(why.0);
        Ok(())
    }
}

impl TextStream for TextFiles {
    fn next_record(&mut self) -> Result<Option<Record>> {
        loop {
            let record = self.record()?;
            if let Some(file) = self.open.as_ref().filter(|file| file.ended) {
                check_length(&self.lengths, &file.name)?;
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
            self.open = None;
            match OpenFile::open(place, &self.options.columns).map_err(|error| error.downcast::<Unreadable>()) {
                Ok(file) => self.open = Some(file),
                Err(Ok(why)) => self.bad.skip_file(&self.options, why)?,
                Err(Err(error)) => return Err(error),
            }
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
        let help = "remove such chats from the text, or choose a model whose chat template accepts them";
        self.bad.skip(&self.options, self.position, origin, Fault { why: why.to_owned(), help })
    }

    fn skipped(&self) -> (u64, Option<String>) {
        (self.bad.count, self.bad.first.clone())
    }

    fn skipped_files(&self) -> (u64, Option<String>) {
        (self.bad.files, self.bad.first_file.clone())
    }
}
