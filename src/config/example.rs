//! Example configs, one for each component, for `dictlearn describe`.

use std::path::Path;

use anyhow::Result;
use serde_yaml::{Mapping, Value};

use dictlearn_core::data::{SourceCx, TaggedSource};
use dictlearn_core::files::from_yaml_in;
use dictlearn_core::registry::{Component, ComponentKind, components, defaults, find};
use dictlearn_core::report::TaggedMetric;

/// Returns a complete config with the component's example and default components around it; its paths are relative to
/// `folder`. `None` for kinds that no config names, and for a metric that suits no source's example.
pub fn example(shown: &Component, folder: &Path) -> Option<String> {
    let parsed = |component: &Component| serde_yaml::from_str::<Value>(component.example).ok();
    // The shown component if it is of that kind, otherwise a default one.
    let of = |kind: ComponentKind| {
        let default = defaults(kind).next().and_then(|name| find(kind, name));
        let other = default.or_else(|| components(kind).into_iter().next());
        parsed(if shown.kind == kind { shown } else { other? })
    };
    // A dictionary is shown with a trainer that trains it by default.
    let trainer = match shown.kind {
        ComponentKind::Trainer => shown,
        _ => {
            let trainers = components(ComponentKind::Trainer);
            let own = trainers.iter().copied().find(|trainer| trainer.default_dictionary == Some(shown.name));
            own.or_else(|| trainers.into_iter().find(|trainer| trainer.default))?
        }
    };
    let dictionary = match shown.kind {
        ComponentKind::Dictionary => shown,
        _ => find(ComponentKind::Dictionary, trainer.default_dictionary?)?,
    };
    let mut source = match shown.kind {
        ComponentKind::Metric => suiting(shown, folder)?,
        _ => of(ComponentKind::Source)?,
    };
    let mut sae =
        Mapping::from_iter([("dictionary".into(), parsed(dictionary)?), ("trainer".into(), parsed(trainer)?)]);
    let mut config = Mapping::from_iter([("steps".into(), 100.into())]);
    let list = |component: &Component| Some(Value::Sequence(vec![parsed(component)?]));
    match shown.kind {
        ComponentKind::Text => {
            source.as_mapping_mut()?.insert("text".into(), parsed(shown)?);
        }
        ComponentKind::Modifier => {
            sae.insert("modifiers".into(), list(shown)?);
        }
        ComponentKind::Metric => {
            config.insert("metrics".into(), list(shown)?);
        }
        ComponentKind::Logger => {
            config.insert("loggers".into(), list(shown)?);
        }
        ComponentKind::Model | ComponentKind::Format => return None,
        ComponentKind::Dictionary | ComponentKind::Trainer | ComponentKind::Source => {}
    }
    config.insert("source".into(), source);
    config.insert("saes".into(), Value::Sequence(vec![sae.into()]));
    serde_yaml::to_string(&config).ok()
}

/// Returns the example of a source that a metric can be computed on, preferably a default one.
fn suiting(metric: &Component, folder: &Path) -> Option<Value> {
    let metric: Box<dyn TaggedMetric> = from_yaml_in(folder, metric.example).ok()?;
    let cx = SourceCx { seed: 0, ..SourceCx::default() };
    let mut sources = components(ComponentKind::Source);
    sources.sort_by_key(|source| !source.default);
    let suits = |source: &Component| -> Result<bool> {
        let config: Box<dyn TaggedSource> = from_yaml_in(folder, source.example)?;
        Ok(metric.build()?.refuses(&mut *config.build(&cx)?).is_none())
    };
    let source = sources.into_iter().find(|source| suits(source).unwrap_or(false))?;
    serde_yaml::from_str(source.example).ok()
}
