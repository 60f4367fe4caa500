//! `dictlearn train`.

use super::args::ConfigArgs;
use super::output::{print, program, say};
use super::signals;
use crate::config;
use crate::run;
use crate::run::Ending;
use crate::run::compare::{shell_quoted, short_path};
use crate::run::evaluate;
use anyhow::{Result, bail};
use dictlearn_core::formats;
use dictlearn_core::machine::device;
use dictlearn_core::sae::saved;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub(super) fn train(args: &ConfigArgs, output_dir: Option<PathBuf>, resume: bool, dry_run: bool) -> Result<ExitCode> {
    let mut config = args.load_to_train()?;
    if let Some(dir) = output_dir {
        config.output_dir = Some(std::path::absolute(dir)?.into());
    }
    let run_dir = match &config.output_dir {
        Some(dir) => dir.as_path().to_owned(),
        // Without `output_dir`, the run is named after the config.
        None => std::path::absolute(Path::new("runs").join(args.config.file_stem().unwrap_or_default()))?,
    };
    config.output_dir = Some(run_dir.clone().into());
    if dry_run {
        let plan = run::plan(&mut config).map_err(|error| config.written.locate(error))?;
        let yaml = config::to_yaml(&config)?;
        print(&plan.lines().fold(yaml, |all, line| all + "# " + line + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let interrupt = signals::listen()?;
    match run::train(&mut config, &run_dir, resume, &interrupt).map_err(|error| config.written.locate(error))? {
        Ending::Done { results, stopped, reads_text } => {
            let none = config.metrics.is_empty() || results.is_empty();
            let table = if none { String::new() } else { evaluate::table(&results) + "\n" };
            let next = what_next(&run_dir, &results, reads_text);
            print(&format!("{table}saved to {}\n{next}", run_dir.display()))?;
            if !stopped.is_empty() {
                bail!(run::stopped_error(stopped));
            }
            Ok(ExitCode::SUCCESS)
        }
        Ending::Diverged(stops) => bail!(run::stopped_error(stops)),
        Ending::Interrupted(step) => {
            say!("stopped after {step} steps; everything is saved, `--resume` continues");
            Ok(ExitCode::from(interrupt.status()))
        }
        Ending::NotBegun => {
            say!("stopped before the first step; there is nothing to resume");
            Ok(ExitCode::from(interrupt.status()))
        }
    }
}

/// Returns a list of a run's files, and next commands that work as printed from the current folder.
pub(super) fn what_next(run_dir: &Path, results: &[(String, Map<String, Value>)], reads_text: bool) -> String {
    let mut text = String::new();
    let saes = saved::folders(run_dir).unwrap_or_default();
    // In the config's order, as in the table.
    let named = results.iter().map(|(name, _)| run_dir.join(name)).filter(|dir| saes.contains(dir));
    let saes: Vec<PathBuf> = named
        .chain(saes.iter().filter(|dir| !results.iter().any(|(name, _)| run_dir.join(name) == **dir)).cloned())
        .collect();
    let list = |dir: &Path| {
        let files = ["ae.safetensors", "ae.pt", "config.json", "eval.json", "checkpoints"];
        files.into_iter().filter(|file| dir.join(file).exists()).collect::<Vec<_>>().join(", ")
    };
    let name = |dir: &Path| dir.file_name().unwrap_or_default().to_string_lossy().into_owned() + "/";
    const SHOWN: usize = 8;
    let mut rows: Vec<(String, String)> = saes.iter().take(SHOWN).map(|dir| (name(dir), list(dir))).collect();
    if saes.len() > SHOWN {
        rows.push((format!("{} more", saes.len() - SHOWN), "with the same files".to_owned()));
    }
    for (file, what) in [
        ("config.yaml", "the config with every default"),
        ("metrics.jsonl", "the metrics of each logged step"),
        ("checkpoints", "the state of training, for `--resume`"),
    ] {
        if run_dir.join(file).exists() {
            rows.push((file.to_owned() + if run_dir.join(file).is_dir() { "/" } else { "" }, what.to_owned()));
        }
    }
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).min(40);
    text.extend(rows.iter().map(|(name, what)| format!("  {name:width$}  {what}\n")));
    let Some(sae) = saes.first() else { return text };
    let (run, path) = (shell_quoted(&short_path(run_dir)), shell_quoted(&short_path(sae)));
    let mut next = Vec::new();
    if reads_text {
        next.push(format!("encode {path} --text 'The quick brown fox jumps over the lazy dog.'"));
    }
    next.extend(
        exports_to(sae).map(|(format, out)| format!("export {path} --format {format} --out {}", shell_quoted(&out))),
    );
    next.extend([format!("eval {run}"), format!("compare {run}"), format!("eval {path} --json")]);
    next.truncate(3);
    let program = program();
    text + "next:\n" + &next.iter().map(|command| format!("  {program} {command}\n")).collect::<String>()
}

/// Returns a format that can write the SAE, and an output folder that does not exist yet. Skips large SAEs.
pub(super) fn exports_to(sae: &Path) -> Option<(&'static str, String)> {
    const LARGE: u64 = 100_000_000;
    if std::fs::metadata(sae.join("ae.safetensors")).ok()?.len() > LARGE {
        return None;
    }
    let saved = saved::read(sae, tch::Device::Cpu, device::Precision::Float32).ok()?;
    let dir = tempfile::tempdir().ok()?;
    let fits = |format: &&str| formats::export(&saved, format, &dir.path().join(format)).is_ok();
    let format = formats::writers().into_iter().rev().find(fits)?;
    let name = format!("{}-{format}", saved.name());
    let free = (1..1000).map(|number| if number == 1 { name.clone() } else { format!("{name}-{number}") });
    let out = free.into_iter().find(|out| !Path::new(out).exists())?;
    // A leading `-` would be read as an option.
    Some((format, if out.starts_with('-') { format!("./{out}") } else { out }))
}
