//! A config that shows one component at work, for `dictlearn describe`.

use anyhow::Result;
use serde_yaml::{Mapping, Value};

use dictlearn_core::data::SourceCx;
use dictlearn_core::data::TaggedSource;
use dictlearn_core::files::from_yaml;
use dictlearn_core::registry::{Component, Kind, component, components, usual};
use dictlearn_core::report::TaggedMetric;

/// A whole config with the component's example in its slot and usual ones around it; `None` for what no config names.
pub fn example(shown: &Component) -> Option<String> {
    let parsed = |component: &Component| serde_yaml::from_str::<Value>(component.example).ok();
    // The one shown where it is of that kind, otherwise a usual one.
    let of = |kind: Kind| {
        let usual = usual(kind).next().and_then(|name| component(kind, name));
        let other = usual.or_else(|| components(kind).into_iter().next());
        parsed(if shown.kind == kind { shown } else { other? })
    };
    // A dictionary is shown with the trainer that usually trains it.
    let trainer = match shown.kind {
        Kind::Trainer => shown,
        _ => {
            let trainers = components(Kind::Trainer);
            let own = trainers.iter().copied().find(|trainer| trainer.usual_dictionary == Some(shown.name));
            own.or_else(|| trainers.into_iter().find(|trainer| trainer.usual))?
        }
    };
    let dictionary = match shown.kind {
        Kind::Dictionary => shown,
        _ => component(Kind::Dictionary, trainer.usual_dictionary?)?,
    };
    let mut source = match shown.kind {
        Kind::Metric => suiting(shown)?,
        _ => of(Kind::Source)?,
    };
    let mut sae =
        Mapping::from_iter([("dictionary".into(), parsed(dictionary)?), ("trainer".into(), parsed(trainer)?)]);
    let mut config = Mapping::from_iter([("steps".into(), 100.into())]);
    let list = |component: &Component| Some(Value::Sequence(vec![parsed(component)?]));
    match shown.kind {
        Kind::Text => {
            source.as_mapping_mut()?.insert("text".into(), parsed(shown)?);
        }
        Kind::Modifier => {
            sae.insert("modifiers".into(), list(shown)?);
        }
        Kind::Metric => {
            config.insert("metrics".into(), list(shown)?);
        }
        Kind::Logger => {
            config.insert("loggers".into(), list(shown)?);
        }
        Kind::Model | Kind::Format => return None,
        Kind::Dictionary | Kind::Trainer | Kind::Source => {}
    }
    config.insert("source".into(), source);
    config.insert("saes".into(), Value::Sequence(vec![sae.into()]));
    serde_yaml::to_string(&config).ok()
}

/// The example of a source that a metric can be computed on, a usual one if possible.
fn suiting(metric: &Component) -> Option<Value> {
    let metric: Box<dyn TaggedMetric> = from_yaml(metric.example).ok()?;
    let cx = SourceCx { seed: 0, ..SourceCx::default() };
    let mut sources = components(Kind::Source);
    sources.sort_by_key(|source| !source.usual);
    let suits = |source: &Component| -> Result<bool> {
        let config: Box<dyn TaggedSource> = from_yaml(source.example)?;
        Ok(metric.build()?.refuses(&mut *config.build(&cx)?).is_none())
    };
    let source = sources.into_iter().find(|source| suits(source).unwrap_or(false))?;
    serde_yaml::from_str(source.example).ok()
}
