//! Python's semantics in templates: printing, `tojson`, and the methods of strings, lists and dictionaries.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};
use minijinja_contrib::pycompat;

/// Maximum nesting depth of lists and dictionaries in output.
const DEEPEST: usize = 500;

fn refused(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, why.into())
}

/// Charges fuel for a result of this many bytes.
fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(bytes as u64 / 64)
}

// ---- Printing

/// Makes an environment print, filter and test values, and call their methods, as Jinja2 does in Python.
pub fn extend(environment: &mut Environment) {
    minijinja_contrib::add_to_environment(environment);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, state, value| print(out, state, value));
    environment.add_filter("string", |state: &State, value: &Value| {
        let mut text = String::new();
        print(&mut text, state, value).map(|()| text)
    });
    environment.add_filter("tojson", tojson);
    // For a value that is not a number, Jinja2 returns 0, minijinja an error.
    environment.add_filter("int", |state: &State, value: &Value, default: Option<Value>, named: Kwargs| {
        let default = default.or_else(|| (!named.has("default")).then(|| 0.into()));
        filters::int(state, value, default, None, named)
    });
    environment.add_filter("float", |state: &State, value: &Value, default: Option<Value>, named: Kwargs| {
        let default = default.or_else(|| (!named.has("default")).then(|| 0.0.into()));
        filters::float(state, value, default, named)
    });
    for name in ["e", "escape"] {
        environment.add_filter(name, |value: String| {
            let pairs = [("&", "&amp;"), (">", "&gt;"), ("<", "&lt;"), ("'", "&#39;"), ("\"", "&#34;")];
            Value::from_safe_string(pairs.iter().fold(value, |text, (from, to)| text.replace(from, to)))
        });
    }
    let has_items = |value: &Value| matches!(value.kind(), ValueKind::String | ValueKind::Map | ValueKind::Seq);
    environment.add_test("sequence", move |value: &Value| has_items(value) || value.is_undefined());
    environment.add_test("iterable", move |value: &Value| {
        has_items(value) || value.is_undefined() || value.kind() == ValueKind::Iterable
    });
}

/// Prints a value as Python's `str` does.
fn print(out: &mut impl Write, state: &State, value: &Value) -> Result<(), Error> {
    let mut text = String::new();
    let number = value.is_number() && !value.is_integer();
    match value.kind() {
        ValueKind::Map | ValueKind::Seq | ValueKind::Iterable => repr(state, value, &mut text, 0)?,
        ValueKind::Number if number => text = float(value),
        _ => return write!(out, "{value}").map_err(Error::from),
    }
    out.write_str(&text).map_err(Error::from)
}

/// Formats a float as Python's `repr` does: the shortest digits that round-trip, with an exponent for large and small
/// values.
fn float(value: &Value) -> String {
    let value = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        -4..16 => format!("{value:?}"),
        exponent => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
    }
}

/// Writes a value as Python's `repr` does.
fn repr(state: &State, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    if depth > DEEPEST {
        return Err(refused("a list or dictionary is nested too deeply to print"));
    }
    let before = out.len();
    match value.kind() {
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.checked().enumerate() {
                let key = key?;
                out.push_str(if index == 0 { "" } else { ", " });
                repr(state, &key, out, depth + 1)?;
                out.push_str(": ");
                repr(state, &value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.downcast_object_ref::<Tuple>().is_some();
            out.push(if tuple { '(' } else { '[' });
            let mut count = 0;
            for item in value.try_iter()?.checked() {
                out.push_str(if count == 0 { "" } else { ", " });
                repr(state, &item?, out, depth + 1)?;
                count += 1;
            }
            out.push_str(match (tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                _ => "]",
            });
        }
        ValueKind::Number if !value.is_integer() => out.push_str(&float(value)),
        ValueKind::Undefined => out.push_str("Undefined"),
        _ => write!(out, "{value}")?,
    }
    charge(state, out.len() - before)
}

/// Writes a string in the quotes that Python chooses, with escapes for characters that Python considers unprintable.
fn quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            '\'' | '"' => out.push(c),
            // Rust escapes the same characters, except a combining mark at the start, hence the `a`.
            c if format!("a{c}").escape_debug().count() == 2 => out.push(c),
            c => out.push_str(&match u32::from(c) {
                code @ ..=0xff => format!("\\x{code:02x}"),
                code @ ..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
}

// ---- JSON

/// Writes JSON in the layout of `json.dumps`.
struct Json<'a> {
    state: &'a State<'a, 'a>,
    ensure_ascii: bool,
    /// Indent of a level; `None` writes one line.
    indent: Option<String>,
    /// Separators between items, and between a key and its value.
    separators: [String; 2],
    sort_keys: bool,
    out: String,
}

/// The filter `tojson` as transformers defines it: `json.dumps`, without HTML escapes.
fn tojson(state: &State, value: &Value, options: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    type Given = Option<Value>;
    let (ensure_ascii, indent, separators, sort_keys): (Given, Given, Given, Given) = from_args(&options)?;
    let option = |given: Given, name: &str| -> Result<Given, Error> {
        let value = match given {
            Some(value) => Some(value),
            None => named.get(name)?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let is_true = |value: Given| value.is_some_and(|value| value.is_true());
    let ensure_ascii = is_true(option(ensure_ascii, "ensure_ascii")?);
    let indent = match option(indent, "indent")? {
        None => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => {
                // Python's `True` is 1.
                let count = bool::try_from(value.clone()).map(i64::from).or_else(|_| i64::try_from(value))?;
                charge(state, count.max(0) as usize)?;
                " ".repeat(count.max(0) as usize)
            }
        }),
    };
    let separators = match option(separators, "separators")? {
        None if indent.is_some() => [",".to_owned(), ": ".to_owned()],
        None => [", ".to_owned(), ": ".to_owned()],
        Some(pair) => {
            let texts = pair.try_iter()?.checked().map(|text| Ok(text?.as_str().unwrap_or_default().to_owned()));
            let texts: Vec<String> = texts.collect::<Result<_, Error>>()?;
            texts.try_into().map_err(|_| refused("`separators` of tojson must be two strings: (',', ':')"))?
        }
    };
    let sort_keys = is_true(option(sort_keys, "sort_keys")?);
    named.assert_all_used()?;
    let mut json = Json { state, ensure_ascii, indent, separators, sort_keys, out: String::new() };
    json.value(value, 0)?;
    Ok(Value::from_safe_string(json.out))
}

impl Json<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(refused("a list or dictionary is nested too deeply for tojson"));
        }
        let before = self.out.len();
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => write!(self.out, "{value}")?,
            ValueKind::Number => self.out.push_str(&match float(value).as_str() {
                "nan" => "NaN".to_owned(),
                "inf" => "Infinity".to_owned(),
                "-inf" => "-Infinity".to_owned(),
                finite => finite.to_owned(),
            }),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.checked().collect::<Result<_, _>>()?;
                if self.sort_keys {
                    keys.sort();
                }
                let items = keys.into_iter().map(|key| Ok((Some(key.clone()), value.get_item(&key)?)));
                let items = items.collect::<Result<Vec<_>, Error>>()?;
                self.items('{', items, '}', depth)?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.checked().map(|item| Ok((None, item?)));
                let items = items.collect::<Result<Vec<_>, Error>>()?;
                self.items('[', items, ']', depth)?;
            }
            other => return Err(refused(format!("tojson does not support values of type `{other}`"))),
        }
        charge(self.state, self.out.len() - before)
    }

    fn items(
        &mut self,
        open: char,
        items: Vec<(Option<Value>, Value)>,
        close: char,
        depth: usize,
    ) -> Result<(), Error> {
        self.out.push(open);
        let empty = items.is_empty();
        for (index, (key, value)) in items.into_iter().enumerate() {
            if index > 0 {
                self.out.push_str(&self.separators[0]);
            }
            self.line(depth + 1)?;
            if let Some(key) = key {
                match key.kind() {
                    ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                    ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                        self.out.push('"');
                        self.value(&key, depth + 1)?;
                        self.out.push('"');
                    }
                    other => return Err(refused(format!("tojson does not support keys of type `{other}`"))),
                }
                self.out.push_str(&self.separators[1]);
            }
            self.value(&value, depth + 1)?;
        }
        if !empty {
            self.line(depth)?;
        }
        self.out.push(close);
        Ok(())
    }

    /// Starts a new line, if there is an indent.
    fn line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        charge(self.state, depth * indent.len())?;
        self.out.push('\n');
        for _ in 0..depth {
            self.out.push_str(indent);
        }
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                ' '..='~' => self.out.push(c),
                c if c >= ' ' && !self.ensure_ascii => self.out.push(c),
                c => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
            }
        }
        self.out.push('"');
    }
}

// ---- Methods

/// Calls a method of a Python value that minijinja lacks or implements differently.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let result = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => of_string(state, text, name, args)?,
        (ValueKind::Seq, _) => of_list(value, name, args)?,
        (ValueKind::Map, _) if name == "copy" => Some(value.clone()),
        _ => None,
    };
    match result {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn of_list(value: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(match name {
        "copy" => Some(value.clone()),
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            for (index, item) in value.try_iter()?.checked().enumerate() {
                if item? == *wanted {
                    return Ok(Some(index.into()));
                }
            }
            return Err(refused(format!("{wanted} is not in the list")));
        }
        // transformers' sandbox forbids these too.
        "append" | "clear" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort" => {
            return Err(refused(format!("templates may not change a list (`{name}`)")));
        }
        _ => None,
    })
}

/// True for characters that Python considers white space.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Returns the part of a text that `find(..., start, end)` and similar methods search, with the index of its first
/// character.
fn bounded(text: &str, start: Option<i64>, end: Option<i64>) -> (&str, usize) {
    if start.is_none() && end.is_none() {
        return (text, 0);
    }
    let length = text.chars().count() as i64;
    let at = |index: i64| if index < 0 { (index + length).max(0) } else { index.min(length) };
    let (start, end) = (at(start.unwrap_or(0)), at(end.unwrap_or(length)));
    let byte = |index: i64| text.char_indices().nth(index as usize).map_or(text.len(), |(byte, _)| byte);
    (&text[byte(start)..byte(end.max(start))], start as usize)
}

fn of_string(state: &State, text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (letters,): (Option<&str>,) = from_args(args)?;
            let strips = |c: char| letters.map_or_else(|| is_space(c), |letters| letters.contains(c));
            let text = if name == "rstrip" { text } else { text.trim_start_matches(strips) };
            Value::from(if name == "lstrip" { text } else { text.trim_end_matches(strips) })
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "split" | "rsplit" => {
            let (separator, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = match separator {
                Some(separator) => separator,
                None => named.get::<Option<Value>>("sep")?.unwrap_or_default(),
            };
            let most = match most {
                Some(most) => Some(most),
                None => named.get("maxsplit")?,
            };
            named.assert_all_used()?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            let parts = match separator.as_str() {
                Some("") => return Err(refused("empty separator")),
                Some(separator) if name == "split" => text.splitn(most.saturating_add(1), separator).collect(),
                Some(separator) => {
                    let mut parts: Vec<&str> = text.rsplitn(most.saturating_add(1), separator).collect();
                    parts.reverse();
                    parts
                }
                None => words(text, most, name == "rsplit"),
            };
            parts.into_iter().map(Value::from).collect()
        }
        "splitlines" => {
            let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = match keep {
                Some(keep) => keep,
                None => named.get::<Option<bool>>("keepends")?.unwrap_or(false),
            };
            named.assert_all_used()?;
            lines(text, keep).into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(refused("empty separator"));
            }
            let first = name == "partition";
            let found = if first { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match found {
                Some((before, after)) => [before, separator, after],
                None if first => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let (part, first) = bounded(text, start, end);
            if name == "count" {
                return Ok(Some(part.matches(wanted).count().into()));
            }
            match if name.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) } {
                Some(byte) => Value::from(first + part[..byte].chars().count()),
                None if name.ends_with("find") => Value::from(-1),
                None => return Err(refused("substring not found")),
            }
        }
        "startswith" | "endswith" if args.len() > 1 => {
            let (affix, start, end): (Value, Option<i64>, Option<i64>) = from_args(args)?;
            let part = Value::from(bounded(text, start, end).0);
            return method(&mut state.env().empty_state(), &part, name, &[affix]).map(Some);
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            charge(state, width)?;
            let missing = width.saturating_sub(text.chars().count());
            let fill = |count: usize| {
                let fill = if name == "zfill" { '0' } else { fill.unwrap_or(' ') };
                std::iter::repeat_n(fill, count).collect::<String>()
            };
            let (sign, rest) = match text.split_at_checked(1) {
                Some((sign @ ("+" | "-"), rest)) if name == "zfill" => (sign, rest),
                _ => ("", text),
            };
            let before = match name {
                "ljust" => 0,
                "center" => missing / 2 + (missing & width & 1),
                _ => missing,
            };
            Value::from(format!("{sign}{}{rest}{}", fill(before), fill(missing - before)))
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swapped = text.chars().map(|c| match c.is_uppercase() {
                true => c.to_lowercase().collect::<String>(),
                false => c.to_uppercase().collect(),
            });
            Value::from(swapped.collect::<String>())
        }
        "title" => {
            let () = from_args(args)?;
            let (mut title, mut inside) = (String::new(), false);
            for c in text.chars() {
                match inside {
                    true => title.extend(c.to_lowercase()),
                    false => title.extend(c.to_uppercase()),
                }
                inside = c.is_alphabetic();
            }
            Value::from(title)
        }
        "casefold" => {
            let () = from_args(args)?;
            Value::from(text.replace(['ß', 'ẞ'], "ss").to_lowercase())
        }
        _ => return Ok(None),
    }))
}

/// Splits a text at white space, at most `most` times; the last part keeps the rest.
fn words(text: &str, most: usize, from_the_end: bool) -> Vec<&str> {
    let mut words = Vec::new();
    let trim = |text| match from_the_end {
        true => str::trim_end_matches(text, is_space),
        false => str::trim_start_matches(text, is_space),
    };
    let mut rest = trim(text);
    while !rest.is_empty() {
        let end = if from_the_end { rest.rfind(is_space) } else { rest.find(is_space) };
        match end.filter(|_| words.len() < most) {
            Some(at) if from_the_end => {
                let after = at + rest[at..].chars().next().map_or(1, char::len_utf8);
                words.push(&rest[after..]);
                rest = trim(&rest[..at]);
            }
            Some(at) => {
                words.push(&rest[..at]);
                rest = trim(&rest[at..]);
            }
            None => {
                words.push(rest);
                break;
            }
        }
    }
    if from_the_end {
        words.reverse();
    }
    words
}

/// Returns the lines of a text, with all line breaks that Python recognises.
fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    const ENDS: [char; 10] = ['\n', '\r', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\u{85}', '\u{2028}', '\u{2029}'];
    let (mut lines, mut rest) = (Vec::new(), text);
    while let Some(end) = rest.find(ENDS) {
        let length = match rest[end..].starts_with("\r\n") {
            true => 2,
            false => rest[end..].chars().next().map_or(1, char::len_utf8),
        };
        lines.push(&rest[..if keep_ends { end + length } else { end }]);
        rest = &rest[end + length..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}
