//! The registry: every component that a config can name.
//!
//! [`component`](macro@crate::component) submits one entry per component. `dictlearn list`, `describe` and `schema`,
//! the "did you mean" of errors and the contract test read only this entry.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// Kind of a component, which decides where a config can name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComponentKind {
    /// Encodes activations to features and decodes them again.
    Dictionary,
    /// Trains a dictionary: its loss, schedules and constraints.
    Trainer,
    /// Changes what a trainer does: a penalty, an edit of gradients, resampling.
    Modifier,
    /// Provides activations.
    Source,
    /// Provides text for a language model.
    Text,
    /// A family of language models, named by `model_type` in a model's config.json.
    Model,
    /// Measures a trained dictionary.
    Metric,
    /// Records the figures of a run.
    Logger,
    /// A file format to import from and export to.
    Format,
}

impl ComponentKind {
    /// Every kind, in the order in which `dictlearn list` shows them.
    pub const ALL: [ComponentKind; 9] = [
        ComponentKind::Dictionary,
        ComponentKind::Trainer,
        ComponentKind::Modifier,
        ComponentKind::Source,
        ComponentKind::Text,
        ComponentKind::Model,
        ComponentKind::Metric,
        ComponentKind::Logger,
        ComponentKind::Format,
    ];

    /// Returns the name used in commands (`dictlearn describe trainer top_k`) and messages.
    pub fn name(self) -> &'static str {
        match self {
            ComponentKind::Dictionary => "dictionary",
            ComponentKind::Trainer => "trainer",
            ComponentKind::Modifier => "modifier",
            ComponentKind::Source => "source",
            ComponentKind::Text => "text",
            ComponentKind::Model => "model",
            ComponentKind::Metric => "metric",
            ComponentKind::Logger => "logger",
            ComponentKind::Format => "format",
        }
    }

    /// Returns the plural (`dictlearn list trainers`).
    pub fn plural(self) -> &'static str {
        match self {
            ComponentKind::Dictionary => "dictionaries",
            ComponentKind::Trainer => "trainers",
            ComponentKind::Modifier => "modifiers",
            ComponentKind::Source => "sources",
            ComponentKind::Text => "texts",
            ComponentKind::Model => "models",
            ComponentKind::Metric => "metrics",
            ComponentKind::Logger => "loggers",
            ComponentKind::Format => "formats",
        }
    }

    /// Parses a name, singular or plural: `trainer` or `trainers`.
    pub fn parse(name: &str) -> Option<ComponentKind> {
        ComponentKind::ALL.into_iter().find(|kind| name == kind.name() || name == kind.plural())
    }
}

impl fmt::Display for ComponentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A registered component, declared with [`component`](macro@crate::component).
pub struct Component {
    /// Kind.
    pub kind: ComponentKind,
    /// Name in a config: the value of `type`.
    pub name: &'static str,
    /// One-line summary for `dictlearn list`.
    pub summary: &'static str,
    /// Authors, year and URL of the paper; empty if there is none.
    pub paper: &'static str,
    /// YAML of the component that runs unchanged, with the fields that a new user sets. For a format, a command. For a
    /// model, the fields of a small config.json that Llama's does not have (may be empty).
    pub example: &'static str,
    /// For a trainer: the dictionary that it trains by default.
    pub default_dictionary: Option<&'static str>,
    /// True for a default component: used where a config names none of its kind (loggers; metrics in `dictlearn eval`),
    /// or in the examples of other components (sources, trainers).
    pub default: bool,
    /// For a trainer: settings for a short run. Its defaults are the reference's, for long runs.
    pub short_run: Option<ShortRun>,
    /// Returns the JSON Schema of its config, without `type`.
    pub schema: fn() -> schemars::Schema,
}

inventory::collect!(Component);

/// Settings that give a sensible SAE in a short run: [`ShortRun::STEPS`] steps of [`ShortRun::BATCH`] activations of
/// the bundled model. configs/short-runs.yaml trains all of them.
#[derive(Debug, Clone, Copy)]
pub struct ShortRun {
    /// YAML of an SAE's `dictionary` and `trainer`.
    pub settings: &'static str,
    /// Result measured on held-out text.
    pub measured: &'static str,
}

impl ShortRun {
    /// Number of steps.
    pub const STEPS: u64 = 1500;
    /// Activations per batch.
    pub const BATCH: i64 = 1024;
}

/// Returns the components of a kind, sorted by name.
pub fn components(kind: ComponentKind) -> Vec<&'static Component> {
    let mut found: Vec<_> =
        inventory::iter::<Component>.into_iter().filter(|component| component.kind == kind).collect();
    found.sort_by_key(|component| component.name);
    found
}

/// Returns the component of this kind and name.
pub fn find(kind: ComponentKind, name: &str) -> Option<&'static Component> {
    inventory::iter::<Component>.into_iter().find(|component| component.kind == kind && component.name == name)
}

/// Returns the names of a kind's components, sorted.
pub fn names(kind: ComponentKind) -> Vec<&'static str> {
    components(kind).into_iter().map(|component| component.name).collect()
}

/// Returns the names of a kind's default components ([`Component::default`]).
pub fn defaults(kind: ComponentKind) -> impl Iterator<Item = &'static str> {
    components(kind).into_iter().filter(|component| component.default).map(|component| component.name)
}

/// Fails if two plugins register the same name: link order would decide which one a config means.
pub fn check() -> Result<()> {
    let mut seen = BTreeMap::new();
    for component in inventory::iter::<Component> {
        let count = seen.entry((component.kind, component.name)).or_insert(0);
        *count += 1;
        if *count > 1 {
            bail!(
                "two plugins register the {} `{}`: link only one of them, or rename one",
                component.kind,
                component.name
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn named(name: &'static str) -> Component {
        Component {
            kind: ComponentKind::Format,
            name,
            summary: "",
            paper: "",
            example: "",
            default_dictionary: None,
            default: false,
            short_run: None,
            schema: schemars::Schema::default,
        }
    }

    inventory::submit! { named("twice") }
    inventory::submit! { named("twice") }

    #[test]
    fn registering_a_name_twice_is_an_error() {
        let error = check().unwrap_err().to_string();
        assert!(error.contains("two plugins register the format `twice`"), "{error}");
    }
}
