//! Formats: read dictionaries that others published, and write ours for other libraries.
//!
//! A format is a component. It knows which files make up an SAE and converts them exactly to a registered class, or
//! names what it cannot convert. It does not know whether the files lie in a local folder or on the Hub.

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
    /// Returns the places of the SAEs that a request names, at least one, without reading them.
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        Ok(vec![Place::parse(request.named()?)?])
    }

    /// Reads the SAE at a place.
    fn read(&self, place: &Place) -> Result<Published>;

    /// Returns the names that [`Format::find`] takes, each with a short description, for `--list`.
    fn offers(&self, request: &Request) -> Result<Vec<(String, String)>> {
        let _ = request;
        bail!(InputError::new("this format has no list of published SAEs").help("name a folder or a Hub repository"))
    }

    /// Returns a paragraph for the reference on which published SAEs this program can use.
    fn coverage(&self) -> Option<String> {
        None
    }

    /// Writes an SAE into an existing, empty folder, in the form that the format's own readers expect.
    fn write(&self, sae: &Saved, dir: &Path) -> Result<()> {
        let _ = (sae, dir);
        let able: Vec<&str> = writers();
        bail!(
            InputError::new("this format can be imported but not exported")
                .help(format!("formats that can be exported: {}", able.join(", ")))
        )
    }

    /// True if the format can be exported ([`Format::write`]).
    fn writes(&self) -> bool {
        false
    }

    /// Returns files that occur only in SAEs of this format, for a hint when the user requested another format.
    fn marks(&self) -> &'static [&'static str] {
        &[]
    }

    /// True if a local folder holds an SAE of this format, for the card of an upload.
    fn is_in(&self, dir: &Path) -> bool {
        let _ = dir;
        false
    }

    /// Returns Python that loads an SAE of this format from the variable `folder`, if the format's library computes the
    /// same features. `sae` is the SAE if dictlearn can read it.
    fn python(&self, sae: Option<&Saved>) -> Option<Python> {
        let _ = sae;
        None
    }
}

crate::tagged::tagged! {
    /// A format, by `type`.
    TaggedFormat: Format => Format {}
}

/// Python that loads an SAE (see [`Format::python`]).
#[derive(Debug, Clone, Copy)]
pub struct Python {
    /// The library, as a link in Markdown.
    pub library: &'static str,
    /// The line that imports it.
    pub import: &'static str,
    /// The line that loads the SAE in `folder`.
    pub load: &'static str,
}

/// Returns the names of the formats that can be exported.
pub fn writers() -> Vec<&'static str> {
    registry::names(ComponentKind::Format)
        .into_iter()
        .filter(|name| named(name).is_ok_and(|format| format.writes()))
        .collect()
}

/// Returns the format with this name.
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

/// Refuses a published config that changes what the SAE computes in a way that no dictionary supports.
///
/// The keys in `off` do so unless their value is null, false, 0, "none" or empty. `known` are the keys that the reader
/// handles, and those that only describe the training. Other keys are ignored; the returned note names them.
pub fn check_keys(config: &Value, file: &str, off: &[&str], known: &[&str]) -> Result<Option<String>> {
    let Some(config) = config.as_object() else {
        bail!(InputError::new(format!("{file} is not a JSON object")));
    };
    let is_off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        // Python enums cannot name a member `None`, so some have `None_`.
        Value::String(text) => text.is_empty() || text.trim_end_matches('_').eq_ignore_ascii_case("none"),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    };
    for key in off {
        if let Some(value) = config.get(*key).filter(|value| !is_off(value)) {
            bail!(
                InputError::new(format!("{file}: `{key}: {value}` is not supported"))
                    .help("it changes what the SAE computes in a way that no dictionary supports")
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
    fn unsupported_keys_are_refused_and_unknown_keys_are_named() {
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
