//! `dictlearn eval` and `compare`.

use super::args::load_from;
use super::output::{print, program, say};
use crate::config;
use crate::config::{RunConfig, Sources};
use crate::evaluate::{measure, measured_alike};
use crate::run::compare::Comparison;
use crate::run::evaluate;
use anyhow::{Result, bail};
use dictlearn_core::error::InputError;
use dictlearn_core::sae::saved;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub(super) fn eval(
    places: &[PathBuf],
    config: Option<PathBuf>,
    set: &[String],
    json: bool,
    save: bool,
) -> Result<ExitCode> {
    // Report errors of SAEs before errors of configs.
    let mut dirs: Vec<PathBuf> = Vec::new();
    for place in places {
        for dir in saved::folders(place)? {
            if !dirs.contains(&dir) {
                dirs.push(dir);
            }
        }
    }
    // SAEs with the same evaluation settings share one pass over the source.
    let groups = measured_alike(&dirs, config.as_deref(), |file| load_to_measure(file, set))?;
    let mut results: Vec<Option<Map<String, Value>>> = vec![None; dirs.len()];
    // An error in one SAE does not stop the evaluation of the others.
    let mut failed = None;
    for (config, members) in &groups {
        let mut measured = |members: &[usize]| {
            let own: Vec<&Path> = members.iter().map(|index| dirs[*index].as_path()).collect();
            let found = measure(&own, config)?;
            members.iter().zip(found).for_each(|(index, result)| results[*index] = Some(result));
            anyhow::Ok(())
        };
        let Err(error) = measured(members) else { continue };
        dictlearn_core::interrupt::check()?;
        failed.get_or_insert(config.written.locate(error));
        if members.len() > 1 {
            // One of them may be the cause: evaluate each alone.
            for index in members {
                let _ = measured(&[*index]);
                dictlearn_core::interrupt::check()?;
            }
        }
    }
    let one = dirs == places && dirs.len() == 1;
    let names = saved::labels(&dirs);
    let all = dirs.into_iter().zip(names).zip(results);
    let found: Vec<((PathBuf, String), Map<String, Value>)> =
        all.filter_map(|(sae, result)| Some((sae, result?))).collect();
    if save {
        found.iter().try_for_each(|((dir, _), result)| evaluate::write(dir, result))?;
    }
    if !json {
        let rows: Vec<_> = found.into_iter().map(|((_, name), result)| (name, result)).collect();
        if !rows.is_empty() {
            print(&evaluate::table(&rows))?;
        }
    } else if one && failed.is_none() {
        print(&serde_json::to_string(&found[0].1)?)?;
    } else {
        let named = |((dir, _), result): ((PathBuf, String), Map<String, Value>)| {
            let name = ("sae".to_owned(), dir.display().to_string().into());
            std::iter::once(name).chain(result).collect::<Map<_, _>>()
        };
        let all: Vec<Map<String, Value>> = found.into_iter().map(named).collect();
        print(&serde_json::to_string(&all)?)?;
    }
    failed.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// The config keys that evaluation depends on.
const MEASURING: [&str; 7] = ["source", "eval_source", "metrics", "device", "precision", "seed", "on_nonfinite"];

/// Loads a config for evaluation. Overrides of `source` also apply to `eval_source`, which the metrics read if it
/// exists.
pub(super) fn load_to_measure(file: &Path, set: &[String]) -> Result<RunConfig> {
    let config = load_from(&Sources {
        file: file.to_owned(),
        profile: None,
        set: set.to_vec(),
        variables: config::variables(),
        eval_follows: true,
        ..Sources::default()
    })?;
    let first = |set: &str| set.split(['.', '[', '=']).next().unwrap_or_default().trim().to_owned();
    if let Some(other) = set.iter().find(|set| !MEASURING.contains(&first(set).as_str())) {
        bail!(
            InputError::new(format!("`--set {other}` does not affect evaluation"))
                .help(format!("an SAE is evaluated as it was saved; keys that can be set: {}", MEASURING.join(", ")))
        );
    }
    if let Some(none) = set.iter().rfind(|set| first(set) == "metrics").filter(|_| config.metrics.is_empty()) {
        bail!(
            InputError::new(format!("`--set {none}` leaves no metrics to compute"))
                .help("name metrics (`dictlearn list metrics`), or omit `metrics` to use the config's")
        );
    }
    Ok(config)
}

pub(super) fn compare(places: &[PathBuf], sort: Option<&str>, json: bool, csv: bool) -> Result<ExitCode> {
    let mut comparison = Comparison::of(places)?;
    if let Some(key) = sort {
        comparison.sort(key)?;
    }
    comparison.notes(&program()).iter().for_each(|note| say!("{note}"));
    print(&match (json, csv) {
        (true, _) => serde_json::to_string(&comparison.json())?,
        (_, true) => comparison.csv(),
        _ => comparison.table(),
    })?;
    Ok(ExitCode::SUCCESS)
}
