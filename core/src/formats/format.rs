//! Formats: dictionaries that others published, read; ours, written for others.
//!
//! A format is a component of its own: it says which files make an SAE, and turns them into one of the registered
//! classes, exactly, or refuses by name what it cannot. Where the files lie, a folder here or a repository of the Hub, is
//! no concern of it.

use std::fmt::Debug;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::Value;

use super::place::{Place, Request};
use super::published::Published;
use crate::error::InputError;
use crate::files::from_yaml;
use crate::registry::{self, ComponentKind};
use crate::sae::saved::Saved;
use crate::suggest::nearest;

/// A format of dictionaries on disk.
pub trait Format: Debug + Send + Sync {
    /// The SAEs that a request means, at least one; none of them is read yet.
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        Ok(vec![Place::parse(request.named()?)?])
    }

    /// Reads the SAE at a place.
    fn read(&self, place: &Place) -> Result<Published>;

    /// What can be had by name, for `--list`: names that [`Format::find`] takes, and a word on each.
    fn offers(&self, request: &Request) -> Result<Vec<(String, String)>> {
        let _ = request;
        bail!(
            InputError::new("this format has no table of what was published")
                .help("name the folder or the Hub repository that you know of")
        )
    }

    /// Writes an SAE into a folder, which is there and empty, as the format's own readers take it.
    fn write(&self, sae: &Saved, dir: &Path) -> Result<()> {
        let _ = (sae, dir);
        let able: Vec<&str> = writers();
        bail!(
            InputError::new("this format can be imported, and not exported")
                .help(format!("those that can be: {}", able.join(", ")))
        )
    }

    /// Whether [`Format::write`] can write anything.
    fn writes(&self) -> bool {
        false
    }

    /// Files that an SAE of this format has, any of them and no other format's: for a hint where another format was asked.
    fn marks(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether a folder here holds an SAE of this format, for the card of one that is uploaded.
    fn is_in(&self, dir: &Path) -> bool {
        let _ = dir;
        false
    }

    /// Python that loads the SAE in such a folder with the same features, where the format's library does; the variable
    /// `folder` is where it lies. `sae` is the SAE as we read it, if we do.
    fn python(&self, sae: Option<&Saved>) -> Option<Python> {
        let _ = sae;
        None
    }
}

crate::tagged::tagged! {
    /// A format, by `type`.
    TaggedFormat: Format => Format {}
}

/// Python that loads an SAE: [`Format::python`].
#[derive(Debug, Clone, Copy)]
pub struct Python {
    /// The library, as a link in Markdown.
    pub library: &'static str,
    /// What is imported of it: a line.
    pub import: &'static str,
    /// What loads the SAE in `folder`: a line.
    pub load: &'static str,
}

/// The names of the formats that can be exported to.
pub fn writers() -> Vec<&'static str> {
    registry::names(ComponentKind::Format)
        .into_iter()
        .filter(|name| named(name).is_ok_and(|format| format.writes()))
        .collect()
}

/// The format of that name.
pub fn named(name: &str) -> Result<Box<dyn TaggedFormat>> {
    let known = registry::names(ComponentKind::Format);
    if !known.contains(&name) {
        let near = nearest(name, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
        bail!(InputError::new(format!("unknown format `{name}`")).help(format!(
            "{}known: {}",
            near.unwrap_or_default(),
            known.join(", ")
        )));
    }
    Ok(from_yaml(&format!("{{type: {name}}}"))?)
}

/// Sees that nothing in a published config changes what the SAE computes without being honoured.
///
/// The keys `off` would, in ways that no dictionary here does: any value but null, false, 0, "none" or an empty one is
/// refused by name. `known` are the keys that the reader takes, and those that say only how the SAE was trained. The note
/// that it returns names the keys that are neither, which are ignored.
pub fn check_keys(config: &Value, file: &str, off: &[&str], known: &[&str]) -> Result<Option<String>> {
    let Some(config) = config.as_object() else {
        bail!(InputError::new(format!("{file} is not a JSON object")));
    };
    let is_off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        // Python's enums may not call a member None.
        Value::String(text) => text.is_empty() || text.trim_end_matches('_').eq_ignore_ascii_case("none"),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    };
    for key in off {
        if let Some(value) = config.get(*key).filter(|value| !is_off(value)) {
            bail!(
                InputError::new(format!("{file}: `{key}: {value}` is not supported"))
                    .help("it changes what the SAE computes, in a way that no dictionary here does")
            );
        }
    }
    let unknown: Vec<String> = config
        .keys()
        .filter(|key| !off.contains(&key.as_str()) && !known.contains(&key.as_str()))
        .map(|key| format!("`{key}`"))
        .collect();
    Ok((!unknown.is_empty()).then(|| format!("{file} has unknown keys, which are ignored: {}", unknown.join(", "))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_key_that_changes_what_is_computed_is_refused_and_an_unknown_one_is_named() {
        let check = |config: Value| check_keys(&config, "cfg.json", &["tied", "n_sources"], &["k"]);
        let fine = json!({"k": 3, "tied": false, "n_sources": 0});
        assert_eq!(check(fine).unwrap(), None);
        for off in [json!(null), json!("none"), json!("None_"), json!([]), json!({}), json!(0.0)] {
            assert_eq!(check(json!({ "tied": off })).unwrap(), None, "{off}");
        }
        for (on, word) in [(json!({"tied": true}), "`tied: true`"), (json!({"n_sources": 2}), "`n_sources: 2`")] {
            let error = InputError::take(check(on).unwrap_err()).unwrap();
            assert!(error.message().contains(word) && error.message().contains("cfg.json"), "{error}");
        }
        assert!(check(json!({"k": 1, "odd": true})).unwrap().unwrap().contains("`odd`"));
        assert!(check(json!([1])).is_err());
    }
}
