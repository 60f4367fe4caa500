//! Errors in the user's input: they end the program with status 2 and say how to fix it.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::suggest::nearest;

/// A mistake in the user's input: a config, an argument, a file's content.
///
/// One error may hold several mistakes ([`Mistakes`]). Any other failure is an ordinary [`anyhow::Error`] and ends the
/// program with status 1.
#[derive(Debug, Clone)]
pub struct InputError {
    kind: InputKind,
    message: String,
    /// Config key at fault, relative to the component being built: `path`, then `source.path` further out.
    key: String,
    place: Option<Box<Location>>,
    help: Option<String>,
    /// Further mistakes.
    others: Vec<InputError>,
}

/// What kind of mistake an [`InputError`] is, for callers that treat kinds differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum InputKind {
    /// An invalid value, name or file.
    #[default]
    Invalid,
    /// Valid components that cannot be combined, such as a trainer and a dictionary that it cannot train.
    Incompatible,
}

/// Maximum number of mistakes that an error shows.
const SHOWN: usize = 20;

/// Collects mistakes, so that the user sees all of them at once.
#[derive(Debug, Default)]
pub struct Mistakes(Vec<InputError>);

impl Mistakes {
    /// Creates an empty collection.
    pub fn new() -> Self {
        Mistakes::default()
    }

    /// Adds every mistake of an error, without repetitions.
    pub fn add(&mut self, error: InputError) {
        for one in error.each() {
            // A sweep or an `eval_source` finds one mistake of the file several times.
            let again = |other: &InputError| match (&one.place, &other.place) {
                (Some(place), Some(known)) => place == known && one.help == other.help,
                (None, None) => one.message == other.message && one.key == other.key,
                _ => false,
            };
            if !self.0.iter().any(again) {
                self.0.push(one);
            }
        }
    }

    /// Returns the mistakes.
    pub fn each(self) -> Vec<InputError> {
        self.0
    }

    /// Returns the value of a result, or `None` after adding its mistake.
    ///
    /// # Errors
    /// Returns any error that is not an [`InputError`].
    pub fn keep<T>(&mut self, result: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                self.add(InputError::take(error)?);
                Ok(None)
            }
        }
    }

    /// Returns the key of each mistake; `None` where the place is unknown.
    pub fn keys(&self) -> Vec<Option<String>> {
        self.0.iter().map(|one| one.place().map(|place| place.key.clone())).collect()
    }

    /// Returns the number of mistakes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if there are no mistakes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns all mistakes as one error, ordered by place; `Ok` if there are none.
    pub fn into_result(mut self) -> Result<(), InputError> {
        self.0.sort_by_key(|one| match one.place() {
            Some(Location { origin: Origin::File(file, at), .. }) => (0, file.clone(), *at),
            Some(_) => (1, PathBuf::new(), None),
            None => (2, PathBuf::new(), None),
        });
        let mut all = self.0.into_iter();
        match all.next() {
            None => Ok(()),
            Some(first) => Err(InputError { others: all.collect(), ..first }),
        }
    }
}

/// Location of an error in the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// A file, a variable or `--set`.
    pub origin: Origin,
    /// Config key: `saes[1].trainer.type`.
    pub key: String,
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A file, with line and column (from 1) if known.
    File(PathBuf, Option<(usize, usize)>),
    /// An environment variable, by name.
    Variable(String),
    /// `--set KEY=VALUE`, as typed.
    Set(String),
}

impl InputError {
    /// Creates an error. The message is one line, in lower case, without a full stop.
    pub fn new(message: impl Into<String>) -> Self {
        InputError {
            kind: InputKind::default(),
            message: message.into(),
            key: String::new(),
            place: None,
            help: None,
            others: Vec::new(),
        }
    }

    /// Creates an error about components that cannot be combined; the message is as in [`InputError::new`].
    pub fn incompatible(message: impl Into<String>) -> Self {
        InputError { kind: InputKind::Incompatible, ..InputError::new(message) }
    }

    /// Creates the error for a missing file. The help suggests the file of the same folder with the nearest name.
    pub fn no_file(path: &Path) -> Self {
        if let Ok(target) = std::fs::read_link(path) {
            return InputError::new(format!("the link {} leads nowhere", path.display()))
                .help(format!("it points to {}: put that file there, or remove the link", target.display()));
        }
        let error = InputError::new(format!("there is no file {}", path.display()));
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Compare stems only: a shared extension would make every name look near.
        let parts = |path: &Path| {
            let part = |part: Option<&OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
            (part(path.file_stem()), part(path.extension()))
        };
        let (wanted, extension) = parts(path);
        let beside: Vec<String> = std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(parts(&entry.ok()?.path())))
            .filter(|(_, other)| *other == extension)
            .map(|(stem, _)| stem)
            .collect();
        match nearest(&wanted, beside.iter().map(String::as_str)) {
            Some(near) => {
                let near = Path::new(near).with_extension(&extension);
                error.help(format!("did you mean `{}`?", path.with_file_name(near).display()))
            }
            None => error,
        }
    }

    /// Sets the help: how to fix the mistake.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Appends to the help.
    #[must_use]
    pub fn and_help(mut self, help: &str) -> Self {
        self.help = Some(self.help.map_or_else(|| help.to_owned(), |before| format!("{before}; {help}")));
        self
    }

    /// Sets the config field at fault, relative to the component that reports it: `batch_size`.
    #[must_use]
    pub fn field(mut self, key: impl Into<String>) -> Self {
        self.key = key.into();
        self
    }

    /// Sets the location.
    #[must_use]
    pub fn at(mut self, origin: Origin, key: impl Into<String>) -> Self {
        self.place = Some(Box::new(Location { origin, key: key.into() }));
        self
    }

    /// Returns the kind of the (first) mistake.
    pub fn kind(&self) -> InputKind {
        self.kind
    }

    /// Returns the message without place and help.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns the help, if there is one.
    pub fn help_text(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// Extracts the [`InputError`] at the root of an error and prefixes its message with the contexts around it.
    /// Returns any other error unchanged.
    pub fn take(error: anyhow::Error) -> Result<Self, anyhow::Error> {
        let around: Vec<String> = error
            .chain()
            .take_while(|cause| cause.downcast_ref::<InputError>().is_none())
            .map(|cause| format!("{cause}: "))
            .collect();
        let input = error.downcast::<InputError>()?;
        let around = around.concat();
        Ok(input.map(&|one| InputError { message: format!("{around}{}", one.message), ..one }))
    }

    /// Splits the error into one error per mistake.
    pub fn each(mut self) -> Vec<InputError> {
        let others = std::mem::take(&mut self.others);
        std::iter::once(self).chain(others).collect()
    }

    /// Applies a function to each mistake.
    pub fn map(mut self, change: &dyn Fn(InputError) -> InputError) -> Self {
        let others = std::mem::take(&mut self.others);
        let others = others.into_iter().map(change).collect();
        InputError { others, ..change(self) }
    }

    /// Returns the config key at fault, as far as known.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns the location, if known.
    pub fn place(&self) -> Option<&Location> {
        self.place.as_deref()
    }
}

/// Escapes control characters, so that text from files is safe to print on a terminal.
pub fn printable(text: &str) -> String {
    let escaped = |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escaped).collect()
}

/// Prefixes the keys of errors with the config key of the component that was built.
pub trait Under<T> {
    /// Prefixes with the component's key: `source`, `saes[1]`, `text`.
    fn under(self, key: impl fmt::Display) -> anyhow::Result<T>;
}

impl<T> Under<T> for anyhow::Result<T> {
    fn under(self, outer: impl fmt::Display) -> anyhow::Result<T> {
        self.map_err(|error| {
            let input = match InputError::take(error) {
                Ok(input) => input,
                Err(other) => return other.context(outer.to_string()),
            };
            let under = |one: InputError| {
                let joint = if one.key.is_empty() || one.key.starts_with('[') { "" } else { "." };
                let key = format!("{outer}{joint}{}", one.key);
                one.field(key)
            };
            input.map(&under).into()
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path, Some((line, column))) => {
                write!(f, "{}:{line}:{column}", path.display())
            }
            Origin::File(path, None) => write!(f, "{}", path.display()),
            Origin::Variable(name) => write!(f, "variable {name}"),
            Origin::Set(text) => write!(f, "--set {text}"),
        }
    }
}

impl fmt::Display for InputError {
    /// Writes message, place and help on a line each. Further mistakes follow as separate errors, twenty in all, then
    /// the number of those left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(place) = &self.place {
            write!(f, "\n --> {}", place.origin)?;
            if !place.key.is_empty() {
                write!(f, " ({})", place.key)?;
            }
        }
        if let Some(help) = &self.help {
            write!(f, "\nhelp: {help}")?;
        }
        for other in self.others.iter().take(SHOWN - 1) {
            write!(f, "\n\nerror: {other}")?;
        }
        match self.others.len().saturating_sub(SHOWN - 1) {
            0 => Ok(()),
            1 => write!(f, "\n\nerror: there is 1 more mistake"),
            more => write!(f, "\n\nerror: there are {more} more mistakes"),
        }
    }
}

impl std::error::Error for InputError {}
