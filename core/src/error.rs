//! Errors that are the user's to mend: they end the program with status 2 and say what would do.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::suggest::nearest;

/// Something wrong with what the user gave: a config, an argument, a file's content.
///
/// One error may hold several mistakes ([`Mistakes`]). Anything else that fails is an ordinary [`anyhow::Error`] and ends the
/// program with status 1.
#[derive(Debug, Clone)]
pub struct InputError {
    kind: InputKind,
    message: String,
    /// The config's key that it concerns, from what is being built: `path`, and further out `source.path`.
    key: String,
    place: Option<Box<Place>>,
    help: Option<String>,
    /// Mistakes that were found beside this one.
    others: Vec<InputError>,
}

/// What kind of mistake an [`InputError`] is, for callers that treat kinds differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum InputKind {
    /// A value, a name or a file that is wrong by itself.
    #[default]
    Invalid,
    /// Components that are right by themselves and cannot be combined, such as a trainer with a dictionary that it cannot
    /// train.
    Incompatible,
}

/// How many mistakes an error shows.
const SHOWN: usize = 20;

/// Collects mistakes, so that the user sees all of them at once.
#[derive(Debug, Default)]
pub struct Mistakes(Vec<InputError>);

impl Mistakes {
    /// None yet.
    pub fn new() -> Self {
        Mistakes::default()
    }

    /// Adds a mistake, with those that it holds.
    pub fn add(&mut self, error: InputError) {
        for one in error.each() {
            // A sweep or an `eval_source` repeats what is written once.
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

    /// Each of them.
    pub fn each(self) -> Vec<InputError> {
        self.0
    }

    /// The value of a result, or `None` after adding its mistake. Returns any error that is not the user's to mend.
    pub fn keep<T>(&mut self, result: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                self.add(InputError::take(error)?);
                Ok(None)
            }
        }
    }

    /// The key of each mistake whose place is known, and `None` for the others.
    pub fn keys(&self) -> Vec<Option<String>> {
        self.0.iter().map(|one| one.place().map(|place| place.key.clone())).collect()
    }

    /// Number of mistakes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All mistakes as one error, in the order of their places; `Ok` if there are none.
    pub fn into_result(mut self) -> Result<(), InputError> {
        self.0.sort_by_key(|one| match one.place() {
            Some(Place { origin: Origin::File(file, at), .. }) => (0, file.clone(), *at),
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

/// Where in the input the error is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file, or what stands in for one: a variable, `--set`.
    pub origin: Origin,
    /// The key: `saes[1].trainer.type`.
    pub key: String,
}

/// What a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A file, with line and column counted from 1 where they are known.
    File(PathBuf, Option<(usize, usize)>),
    /// An environment variable, by name.
    Variable(String),
    /// `--set KEY=VALUE`, as it was typed.
    Set(String),
}

impl InputError {
    /// An error with its message: one line, lower case, no full stop.
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

    /// An error about components that cannot be combined, with its message as in [`InputError::new`].
    pub fn incompatible(message: impl Into<String>) -> Self {
        InputError { kind: InputKind::Incompatible, ..InputError::new(message) }
    }

    /// There is no such file; the help offers the one beside it that is named most like it.
    pub fn no_file(path: &Path) -> Self {
        if let Ok(target) = std::fs::read_link(path) {
            return InputError::new(format!("the link {} leads nowhere", path.display()))
                .help(format!("it points to {}: put that file there, or remove the link", target.display()));
        }
        let error = InputError::new(format!("there is no file {}", path.display()));
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Extensions are alike anyway, and would make everything alike.
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

    /// What would do instead.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// What would do, beside what is said already.
    #[must_use]
    pub fn and_help(mut self, help: &str) -> Self {
        self.help = Some(self.help.map_or_else(|| help.to_owned(), |before| format!("{before}; {help}")));
        self
    }

    /// Which field of the config it concerns, seen from the component that finds it: `batch_size`.
    #[must_use]
    pub fn field(mut self, key: impl Into<String>) -> Self {
        self.key = key.into();
        self
    }

    /// Where in the input it is.
    #[must_use]
    pub fn at(mut self, origin: Origin, key: impl Into<String>) -> Self {
        self.place = Some(Box::new(Place { origin, key: key.into() }));
        self
    }

    /// What kind of mistake it is; of several, the first.
    pub fn kind(&self) -> InputKind {
        self.kind
    }

    /// The message, without place and help.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What would do instead, if that is said.
    pub fn help_text(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// The input error that an error is at its root, with what was said around it on its way up as part of the message;
    /// or the error as it was.
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

    /// Each of its mistakes as an error of its own.
    pub fn each(mut self) -> Vec<InputError> {
        let others = std::mem::take(&mut self.others);
        std::iter::once(self).chain(others).collect()
    }

    /// Changes each of its mistakes.
    pub fn map(mut self, change: &dyn Fn(InputError) -> InputError) -> Self {
        let others = std::mem::take(&mut self.others);
        let others = others.into_iter().map(change).collect();
        InputError { others, ..change(self) }
    }

    /// The config's key that it concerns, as far as known.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Where it is, if known.
    pub fn place(&self) -> Option<&Place> {
        self.place.as_deref()
    }
}

/// A text for a terminal: control characters, which files may hold, as escapes.
pub fn printable(text: &str) -> String {
    let escaped = |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escaped).collect()
}

/// Says under which key of a config something was built, so that its errors can be found there.
pub trait Under<T> {
    /// The key that leads to what was built: `source`, `saes[1]`, `text`.
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
    /// The message, its place and its help on a line each. Further mistakes follow as errors of their own, twenty at most, then
    /// how many more there are.
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
