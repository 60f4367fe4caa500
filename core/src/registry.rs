//! The registry: every component that a config can name.
//!
//! A component is one crate, and in it one [`register!`](crate::register) beside the implementation. `dictlearn list`,
//! `describe` and `schema`, the "did you mean" of an error and the contract test all read this one entry.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// What a component is, and so which slot of a config names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
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

impl Kind {
    /// Every kind, in the order in which `dictlearn list` shows them.
    pub const ALL: [Kind; 9] = [
        Kind::Dictionary,
        Kind::Trainer,
        Kind::Modifier,
        Kind::Source,
        Kind::Text,
        Kind::Model,
        Kind::Metric,
        Kind::Logger,
        Kind::Format,
    ];

    /// The name in a command (`dictlearn describe trainer top_k`) and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Dictionary => "dictionary",
            Kind::Trainer => "trainer",
            Kind::Modifier => "modifier",
            Kind::Source => "source",
            Kind::Text => "text",
            Kind::Model => "model",
            Kind::Metric => "metric",
            Kind::Logger => "logger",
            Kind::Format => "format",
        }
    }

    /// The plural (`dictlearn list trainers`).
    pub fn plural(self) -> &'static str {
        match self {
            Kind::Dictionary => "dictionaries",
            Kind::Trainer => "trainers",
            Kind::Modifier => "modifiers",
            Kind::Source => "sources",
            Kind::Text => "texts",
            Kind::Model => "models",
            Kind::Metric => "metrics",
            Kind::Logger => "loggers",
            Kind::Format => "formats",
        }
    }

    /// The kind that a user means by `trainer` or `trainers`.
    pub fn parse(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| name == kind.name() || name == kind.plural())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One registered component. Made by [`register!`](crate::register).
pub struct Component {
    /// What it is.
    pub kind: Kind,
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
    pub usual_dictionary: Option<&'static str>,
    /// Whether a config that names no component of its kind gets this one, with its defaults (loggers; metrics, in
    /// `dictlearn eval`), and whether it stands in the examples of others (sources, trainers).
    pub usual: bool,
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
pub fn components(kind: Kind) -> Vec<&'static Component> {
    let mut found: Vec<_> =
        inventory::iter::<Component>.into_iter().filter(|component| component.kind == kind).collect();
    found.sort_by_key(|component| component.name);
    found
}

/// The component of that kind and name.
pub fn component(kind: Kind, name: &str) -> Option<&'static Component> {
    inventory::iter::<Component>.into_iter().find(|component| component.kind == kind && component.name == name)
}

/// The names of a kind, sorted.
pub fn names(kind: Kind) -> Vec<&'static str> {
    components(kind).into_iter().map(|component| component.name).collect()
}

/// The names of a kind that a config gets which names none.
pub fn usual(kind: Kind) -> impl Iterator<Item = &'static str> {
    components(kind).into_iter().filter(|component| component.usual).map(|component| component.name)
}

/// The known name that `found` is most likely a misspelling of, if any is near.
pub fn nearest<'a>(found: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |name: &str| name.to_lowercase().replace(['-', ' '], "_");
    let squeezed = |name: &str| plain(name).replace('_', "");
    known
        .into_iter()
        .map(|name| {
            let score =
                if squeezed(name) == squeezed(found) { 1.0 } else { strsim::jaro_winkler(&plain(found), &plain(name)) };
            (score, name)
        })
        .filter(|(score, _)| *score >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
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

/// Registers a component under its name.
///
/// The same name goes to `#[typetag::serde(name = NAME)]` on the `impl`, so write it once, as a constant.
///
/// ```ignore
/// const NAME: &str = "top_k";
/// register! {
///     trainer TopKTrainerConfig, NAME,
///     summary: "Keep the k largest features of each activation",
///     paper: "Gao et al. 2024, https://arxiv.org/abs/2406.04093",
///     example: "{type: top_k, warmup_steps: 100}",
///     usual_dictionary: "top_k",
/// }
/// ```
#[macro_export]
macro_rules! register {
    ($kind:ident $config:ty, $name:expr, summary: $summary:expr, paper: $paper:expr, example: $example:expr
     $(, usual_dictionary: $dictionary:expr)? $(, usual: $usual:expr)?
     $(, short_run: $settings:expr, measured: $measured:expr)? $(,)?) => {
        $crate::inventory::submit! {
            $crate::registry::Component {
                kind: $crate::register!(@kind $kind),
                name: $name,
                summary: $summary,
                paper: $paper,
                example: $example,
                usual_dictionary: $crate::register!(@dictionary $($dictionary)?),
                usual: $crate::register!(@usual $($usual)?),
                short_run: $crate::register!(@short_run $($settings, $measured)?),
                schema: || $crate::schemars::schema_for!($config),
            }
        }
    };
    (@kind dictionary) => { $crate::registry::Kind::Dictionary };
    (@kind trainer) => { $crate::registry::Kind::Trainer };
    (@kind modifier) => { $crate::registry::Kind::Modifier };
    (@kind source) => { $crate::registry::Kind::Source };
    (@kind text) => { $crate::registry::Kind::Text };
    (@kind model) => { $crate::registry::Kind::Model };
    (@kind metric) => { $crate::registry::Kind::Metric };
    (@kind logger) => { $crate::registry::Kind::Logger };
    (@kind format) => { $crate::registry::Kind::Format };
    (@dictionary) => { None };
    (@dictionary $dictionary:expr) => { Some($dictionary) };
    (@short_run) => { None };
    (@short_run $settings:expr, $measured:expr) => {
        Some($crate::registry::ShortRun { settings: $settings, measured: $measured })
    };
    (@usual) => { false };
    (@usual $usual:expr) => { $usual };
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn named(name: &'static str) -> Component {
        Component {
            kind: Kind::Format,
            name,
            summary: "",
            paper: "",
            example: "",
            usual_dictionary: None,
            usual: false,
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

    #[test]
    fn the_nearest_name_forgives_underscores_and_slips() {
        let known = ["top_k", "batch_top_k", "standard"];
        for (found, near) in
            [("topk", Some("top_k")), ("TopK", Some("top_k")), ("standart", Some("standard")), ("x", None)]
        {
            assert_eq!(nearest(found, known), near, "{found}");
        }
    }
}
