//! Finds the place of a key in a file.

use saphyr::{LoadableYamlNode, MarkedYaml, YamlData};

use dictlearn_core::error::Origin;

/// One step of a key path.
pub(super) enum Step {
    Key(String),
    Index(usize),
}

/// Splits a path into keys and indices: `saes[1].trainer.lr`, or `saes[1].sweep.[trainer.lr]`, whose last key contains
/// a dot.
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

/// Returns the origin with line and column of the value at a key path, or of the key itself. Falls back to the nearest
/// map around it in the file.
pub(super) fn locate(origin: &Origin, text: &str, path: &str, key: bool) -> Origin {
    let Origin::File(file, _) = origin else { return origin.clone() };
    Origin::File(file.clone(), position(text, path, key).map(|(position, _)| position))
}

/// True if a text has `word` at this line, counted from 1, and column, counted from 0.
fn starts_at(text: &str, line: usize, column: usize, word: &str) -> bool {
    let line = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    line.char_indices().nth(column).is_some_and(|(at, _)| line[at..].starts_with(word))
}

/// Returns line and column, counted from 1, and whether the whole path was found.
pub(super) fn position(text: &str, path: &str, key: bool) -> Option<((usize, usize), bool)> {
    let documents = MarkedYaml::load_from_str(text).ok()?;
    let mut node = documents.first()?;
    let mut found = None;
    for step in steps(path) {
        let next = match (&step, &node.data) {
            (Step::Key(name), YamlData::Mapping(entries)) => {
                entries.iter().find(|(entry, _)| match entry.data.as_str() {
                    Some(key) => key == name,
                    // A number: compare its digits as written, `002`.
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
