//! Where in a file a key is.

use saphyr::{LoadableYamlNode, MarkedYaml, YamlData};

use dictlearn_core::error::Origin;

/// One step of a key path.
pub(super) enum Step {
    Key(String),
    Index(usize),
}

/// The steps of `saes[1].trainer.lr`, and of `saes[1].sweep.[trainer.lr]`, whose last key has a dot in it.
pub(super) fn steps(path: &str) -> Vec<Step> {
    if let Some((before, key)) = path.strip_suffix(']').and_then(|path| path.split_once(".[")) {
        let mut steps = steps(before);
        steps.push(Step::Key(key.to_owned()));
        return steps;
    }
    let mut steps = Vec::new();
    for part in path.split('.').filter(|part| !part.is_empty()) {
        let (key, indices) = part.split_once('[').unwrap_or((part, ""));
        if !key.is_empty() {
            steps.push(Step::Key(key.to_owned()));
        }
        let indices = indices.split(['[', ']']).filter(|index| !index.is_empty());
        steps.extend(indices.filter_map(|index| index.parse().ok()).map(Step::Index));
    }
    steps
}

/// The origin with line and column of the value at a key path, or of the key itself; of the nearest map around it where
/// the file does not have it.
pub(super) fn locate(origin: &Origin, text: &str, path: &str, key: bool) -> Origin {
    let Origin::File(file, _) = origin else { return origin.clone() };
    Origin::File(file.clone(), position(text, path, key).map(|(position, _)| position))
}

/// True if a text has a word at a line, counted from 1, and a column, counted from 0.
fn starts_at(text: &str, line: usize, column: usize, word: &str) -> bool {
    let line = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    line.char_indices().nth(column).is_some_and(|(at, _)| line[at..].starts_with(word))
}

/// Line and column, counted from 1, and whether the whole path was found.
pub(super) fn position(text: &str, path: &str, key: bool) -> Option<((usize, usize), bool)> {
    let documents = MarkedYaml::load_from_str(text).ok()?;
    let mut node = documents.first()?;
    let mut found = None;
    for step in steps(path) {
        let next = match (&step, &node.data) {
            (Step::Key(name), YamlData::Mapping(entries)) => {
                entries.iter().find(|(entry, _)| match entry.data.as_str() {
                    Some(key) => key == name,
                    // A number, of which the digits count: `002`.
                    None => starts_at(text, entry.span.start.line(), entry.span.start.col(), name),
                })
            }
            (Step::Index(index), YamlData::Sequence(items)) => items.get(*index).map(|item| (item, item)),
            _ => None,
        };
        let Some((name, value)) = next else { return found.map(|at| (at, false)) };
        let marker = if key || matches!(value.data, YamlData::BadValue) { &name.span.start } else { &value.span.start };
        found = Some((marker.line(), marker.col() + 1));
        node = value;
    }
    found.map(|at| (at, true))
}
