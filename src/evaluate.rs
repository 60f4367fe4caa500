//! Evaluating trained SAEs.

use std::path::{Path, PathBuf};

use anyhow::bail;
use dictlearn_core::data::{Site, SourceCx};
use dictlearn_core::error::{InputError, Under};
use dictlearn_core::machine::device::Precision;
use dictlearn_core::report::Subject;
use dictlearn_core::sae::saved::{self, Saved};
use serde_json::{Map, Value, json};

use crate::config::{self, RunConfig, Sources};
use crate::run::evaluate::{self as measuring, Measured};

/// Evaluates trained SAEs, each a folder that dictlearn wrote, as `dictlearn eval` does. Uses the metrics and held-out
/// activations of `config`, or by default of each SAE's own run. Returns one object of results for each SAE, in order.
///
/// # Errors
///
/// [`Error::Input`](crate::Error::Input) if a folder is not an SAE, its model is unknown, or the config is invalid.
pub fn evaluate(saes: &[impl AsRef<Path>], config: Option<&Path>) -> crate::Result<Vec<Map<String, Value>>> {
    let dirs: Vec<PathBuf> = saes.iter().map(|sae| sae.as_ref().to_owned()).collect();
    let load =
        |file: &Path| Ok(config::load(&Sources { file: file.to_owned(), eval_follows: true, ..Sources::default() })?);
    let mut results = vec![Map::new(); dirs.len()];
    for (config, members) in measured_alike(&dirs, config, load)? {
        let own: Vec<&Path> = members.iter().map(|index| dirs[*index].as_path()).collect();
        let found = measure(&own, &config).map_err(|error| config.written.locate(error))?;
        members.into_iter().zip(found).for_each(|(index, figures)| results[index] = figures);
    }
    Ok(results)
}

/// Groups SAEs, by index, that are measured in the same way: one pass over the source serves a group.
pub(crate) fn measured_alike(
    dirs: &[PathBuf],
    named: Option<&Path>,
    load: impl Fn(&Path) -> anyhow::Result<RunConfig>,
) -> anyhow::Result<Vec<(RunConfig, Vec<usize>)>> {
    let mut groups: Vec<(PathBuf, Value, RunConfig, Vec<usize>)> = Vec::new();
    for (index, dir) in dirs.iter().enumerate() {
        let file = own_config(dir, named.map(Path::to_owned))?;
        if let Some((.., members)) = groups.iter_mut().find(|(other, ..)| *other == file) {
            members.push(index);
            continue;
        }
        let config = load(&file)?;
        let alike = json!([
            config.seed,
            config.device,
            config.precision,
            config.on_nonfinite,
            config.eval_source.as_ref().unwrap_or(&config.source),
            config.metrics,
        ]);
        match groups.iter_mut().find(|(_, other, ..)| *other == alike) {
            Some((.., members)) => members.push(index),
            None => groups.push((file, alike, config, vec![index])),
        }
    }
    Ok(groups.into_iter().map(|(_, _, config, members)| (config, members)).collect())
}

/// Returns the config with an SAE's source: the one that the user names, an imported SAE's own, or its run's.
pub(crate) fn own_config(sae_dir: &Path, named: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let dir = std::path::absolute(sae_dir)?;
    let own = [Some(&*dir), dir.parent()].into_iter().flatten().map(|dir| dir.join("config.yaml"));
    let Some(file) = named.or_else(|| own.into_iter().find(|file| file.exists())) else {
        bail!(InputError::new(format!("no config says which model and hook point {} is for", sae_dir.display())).help(
            "give a config that names them with `--config CONFIG.yaml`: `source: {type: language_model, model: ..., \
                     submodule: ..., text: ...}`"
        ));
    };
    Ok(file)
}

/// Evaluates SAEs by a config's metrics, in one pass over its source.
pub(crate) fn measure(sae_dirs: &[&Path], config: &RunConfig) -> anyhow::Result<Vec<Map<String, Value>>> {
    let measured = Measured::of(config);
    let key = measured.key;
    let cx = source_cx(config)?;
    let read = |dir: &&Path| saved::read(dir, cx.device, Precision::Float32);
    let all: Vec<Saved> = sae_dirs.iter().map(read).collect::<anyhow::Result<_>>()?;
    let mut source = measured.build(&cx)?;
    let sites = source.sites();
    let mut subjects = Vec::new();
    for saved in &all {
        let site = own_site(saved, &sites).under(key)?;
        let dims = saved.dictionary.dims();
        if (dims.input, dims.output) != sites[site].widths() {
            bail!(
                InputError::new(format!(
                    "{} takes activations of width {}, but the source's have width {}",
                    saved.dir.display(),
                    dims.input,
                    sites[site].activation_dim
                ))
                .field(key)
                .help("evaluate it on the model and submodule that it was trained on")
            );
        }
        subjects.push(Subject { dictionary: &*saved.dictionary, site });
    }
    let mut default;
    let metrics = if config.metrics.is_empty() {
        default = measuring::default_metrics(&mut *source)?;
        if subjects.iter().any(|subject| subject.dictionary.reads_contexts()) {
            default.retain(|metric| metric.build().is_ok_and(|metric| metric.gives_contexts()));
        }
        &default
    } else {
        &config.metrics
    };
    // An overlap with the training data is known only for SAEs trained here.
    let own = all.iter().filter(|saved| saved.config["imported"].is_null());
    if let Some(shared) = own.filter_map(|saved| source.overlap(&saved.config["buffer"])).next() {
        measuring::warn_of_overlap(&shared);
    }
    let measuring = measuring::Measuring {
        key,
        origin: measuring::origin(measured.source)?,
        from_the_beginning: true,
        overlap_is_known: false,
    };
    measuring::evaluate(metrics, &subjects, &mut *source, &measuring)
}

/// Returns the index of the site that an SAE was trained at, according to its config.json.
pub(crate) fn own_site(saved: &Saved, sites: &[Site]) -> anyhow::Result<usize> {
    let buffer = &saved.config["buffer"];
    let name = buffer["site"].as_str().or(buffer["submodule"].as_str());
    let Some(site) = Site::find(sites, name.unwrap_or_default()) else {
        let names: Vec<&str> = sites.iter().map(|site| site.name.as_str()).collect();
        bail!(
            InputError::new(match name {
                Some(name) =>
                    format!("{} was trained at {name}, which is not a site of the source", saved.dir.display()),
                None => format!("{} does not name the site that it was trained at", saved.dir.display()),
            })
            .help(format!("the source's sites: {}", names.join(", ")))
        );
    };
    // Parts in another order would be mistaken for each other.
    let trained: Vec<&str> = buffer["parts"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let parts: Vec<&str> = sites[site].parts.iter().map(|part| part.name.as_str()).collect();
    if !trained.is_empty() && trained != parts {
        bail!(
            InputError::new(format!(
                "{} was trained on the parts {}, but the source has {}",
                saved.dir.display(),
                trained.join(", "),
                if parts.is_empty() { "none".to_owned() } else { parts.join(", ") }
            ))
            .help("join the same sources under the same names")
        );
    }
    Ok(site)
}

pub(crate) fn source_cx(config: &RunConfig) -> anyhow::Result<SourceCx> {
    let device = config.device.device().map_err(anyhow::Error::from).under("device")?;
    Ok(config.source_cx(device))
}
