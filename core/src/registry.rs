//! The registry: every component that a config can name.
//!
//! [`component`](macro@crate::component) submits an entry for each. `dictlearn list`, `describe` and `schema`, the "did you
//! mean" of an error and the contract test read this entry and nothing else.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// What a component is, and so which slot of a config names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComponentKind {
    /// Encodes activations to features and decodes them again.
    Dictionary,
    /// Trains a dictionary: its loss, schedules and constraints.
    Trainer,
    /// Changes what any trainer does: penalties, edits of gradients, resampling.
    Modifier,
    /// Where activations come from.
    Source,
    /// Where a language model's text comes from.
    Text,
    /// A family of language models, named by `model_type` in a model's config.json.
    Model,
    /// Measures a trained dictionary.
    Metric,
    /// Where the figures of a run go.
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

    /// The name in a command (`dictlearn describe trainer top_k`) and in messages.
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

    /// The plural (`dictlearn list trainers`).
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

    /// The kind that a user means by `trainer` or `trainers`.
    pub fn parse(name: &str) -> Option<ComponentKind> {
        ComponentKind::ALL.into_iter().find(|kind| name == kind.name() || name == kind.plural())
    }
}

impl fmt::Display for ComponentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One registered component, as [`component`](macro@crate::component) declares it.
pub struct Component {
    /// What it is.
    pub kind: ComponentKind,
    /// Its name in a config: the value of `type`.
    pub name: &'static str,
    /// One line for `dictlearn list`.
    pub summary: &'static str,
    /// Where it is from: authors, year and address of the paper; empty where there is none.
    pub paper: &'static str,
    /// YAML of the component alone, with the fields that a first user sets, that runs as it stands; of a format, a command;
    /// of a model, the fields of a small config.json that Llama's does not have (empty where there are none).
    pub example: &'static str,
    /// For a trainer: the name of the dictionary that it trains unless told otherwise.
    pub default_dictionary: Option<&'static str>,
    /// Whether a config that names no component of its kind gets this one, with its defaults (loggers; metrics, in
    /// `dictlearn eval`), and whether it stands in the examples of others (sources, trainers).
    pub default: bool,
    /// For a trainer: settings for a short run; its defaults are the reference's, for long ones.
    pub short_run: Option<ShortRun>,
    /// JSON Schema of its config, without `type`.
    pub schema: fn() -> schemars::Schema,
}

inventory::collect!(Component);

/// Settings with which a method gives a sensible SAE in a short run: [`ShortRun::STEPS`] steps of
/// [`ShortRun::BATCH`] activations of the bundled model. configs/short-runs.yaml trains all of them.
#[derive(Debug, Clone, Copy)]
pub struct ShortRun {
    /// YAML of an SAE's `dictionary` and `trainer`.
    pub settings: &'static str,
    /// What they gave on text that was not trained on.
    pub measured: &'static str,
}

impl ShortRun {
    /// Steps of a short run.
    pub const STEPS: u64 = 1500;
    /// Activations in a batch of a short run.
    pub const BATCH: i64 = 1024;
}

/// The components of one kind, sorted by name.
pub fn components(kind: ComponentKind) -> Vec<&'static Component> {
    let mut found: Vec<_> =
        inventory::iter::<Component>.into_iter().filter(|component| component.kind == kind).collect();
    found.sort_by_key(|component| component.name);
    found
}

/// The component of that kind and name.
pub fn find(kind: ComponentKind, name: &str) -> Option<&'static Component> {
    inventory::iter::<Component>.into_iter().find(|component| component.kind == kind && component.name == name)
}

/// The names of a kind, sorted.
pub fn names(kind: ComponentKind) -> Vec<&'static str> {
    components(kind).into_iter().map(|component| component.name).collect()
}

/// The names of a kind that a config gets which names none.
pub fn defaults(kind: ComponentKind) -> impl Iterator<Item = &'static str> {
    components(kind).into_iter().filter(|component| component.default).map(|component| component.name)
}

/// Refuses to start when two plugins registered the same name: which one a config means would depend on link order.
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
    fn a_name_that_two_plugins_register_is_refused_at_the_start() {
        let error = check().unwrap_err().to_string();
        assert!(error.contains("two plugins register the format `twice`"), "{error}");
    }
}
