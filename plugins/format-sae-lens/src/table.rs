//! The table of releases, `pretrained_saes.yaml`, which maps a release and an id to a repository and a path.
//!
//! It is read from the user's machine. Gemma Scope and Llama Scope name their folders by rule and need no table.

use std::path::{Path, PathBuf};
use std::process::Command;

use dictlearn_core::files;
use dictlearn_core::formats::{Place, Request, glob};
use dictlearn_core::hub::{Repo, RepoKind, hub};
use dictlearn_core::prelude::*;
use dictlearn_core::suggest::nearest;

const FILE: &str = "pretrained_saes.yaml";

/// sae_lens's converters, each with the format that reads the same files.
const CONVERSIONS: [(&str, &str); 8] = [
    ("gemma_2", "gemma_scope"),
    ("gemma_2_transcoder", "gemma_scope"),
    ("gemma_3", "gemma_scope"),
    ("llama_scope", "llama_scope"),
    ("llama_scope_r1_distill", "llama_scope"),
    ("dictionary_learning_1", "dictionary_learning"),
    ("sparsify", "sparsify"),
    ("sae_lens", "sae_lens"),
];

/// A table, by release.
struct Table(Map<String, Value>);

/// The table, if the user has one.
fn table(request: &Request) -> Result<Option<Table>> {
    let Some(path) = table_file(request)? else { return Ok(None) };
    let refused = |why: String| InputError::new(format!("cannot read the table of releases {}: {why}", path.display()));
    let value: Value =
        dictlearn_core::files::from_yaml(&files::read_text(&path)?).map_err(|error| refused(error.to_string()))?;
    match value {
        Value::Object(releases) => Ok(Some(Table(releases))),
        _ => Err(refused("it is not a mapping of releases".to_owned()).into()),
    }
}

/// Path of the table: given by the user, in the Python package, or in the Hub's cache.
fn table_file(request: &Request) -> Result<Option<PathBuf>> {
    if let Some(named) = &request.releases {
        let path = Path::new(named);
        if path.is_file() {
            return Ok(Some(path.to_owned()));
        }
        if named.split('/').count() < 3 || path.is_absolute() {
            bail!(InputError::no_file(path));
        }
        let place = Place::parse(named)?;
        return place.need("").map(Some);
    }
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    for environment in environments {
        for lib in std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten() {
            let file = lib.path().join("site-packages/sae_lens").join(FILE);
            if file.is_file() {
                return Ok(Some(file));
            }
        }
    }
    // `find_spec` locates the package without importing it.
    let asks =
        "import importlib.util as u; s = u.find_spec('sae_lens'); print(s.submodule_search_locations[0] if s else '')";
    for python in ["python3", "python"] {
        let Ok(answer) = Command::new(python).args(["-c", asks]).output() else { continue };
        let folder = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
        let file = Path::new(&folder).join(FILE);
        if answer.status.success() && !folder.is_empty() && file.is_file() {
            return Ok(Some(file));
        }
    }
    Ok(hub().ok().and_then(|hub| hub.cached(FILE).into_iter().next()))
}

impl Table {
    fn ids(&self, release: &str) -> Vec<String> {
        self.entries(release).filter_map(id).collect()
    }

    fn entries(&self, release: &str) -> impl Iterator<Item = &Value> + use<'_> {
        self.0.get(release).and_then(|release| release.get("saes")?.as_array()).into_iter().flatten()
    }

    /// The place of an SAE in the table.
    fn place(&self, release: &str, sae_id: &str) -> Result<Place> {
        let about = &self.0[release];
        let Some(entry) = self.entries(release).find(|entry| id(entry).as_deref() == Some(sae_id)) else {
            let ids = self.ids(release);
            let near = nearest(sae_id, ids.iter().map(String::as_str)).map(|near| format!("did you mean `{near}`? "));
            bail!(InputError::new(format!("the release `{release}` has no SAE `{sae_id}`")).help(format!(
                "{}it has {}: {}, ... (`--list '{release}:*'`)",
                near.unwrap_or_default(),
                ids.len(),
                ids.iter().take(4).cloned().collect::<Vec<_>>().join(", ")
            )));
        };
        let text = |value: &Value| value.as_str().map(str::to_owned).or_else(|| value.as_i64().map(|n| n.to_string()));
        let repo = about.get("repo_id").and_then(Value::as_str).and_then(|repo| Repo::parse(RepoKind::Model, repo));
        let (Some(repo), Some(path)) = (repo, entry.get("path").and_then(text)) else {
            bail!(InputError::new(format!("the table lacks the repository or path of `{release}:{sae_id}`")));
        };
        let conversion = about.get("conversion_func").and_then(Value::as_str);
        let format = match conversion {
            None => None,
            Some(name) => match CONVERSIONS.iter().find(|(known, _)| *known == name) {
                Some((_, format)) => Some((*format).to_owned()).filter(|format| format != crate::SaeLens::NAME),
                None => bail!(
                    InputError::new(format!("`{release}` uses sae_lens's format `{name}`, which is not supported"))
                        .help("save the SAE with sae_lens (`sae.save_model(dir)`) and import that folder")
                ),
            },
        };
        let mut place = Place::on_hub(repo, &path);
        place.name = format!("{release}/{sae_id}");
        place.format = format;
        place.table = entry.as_object().cloned().unwrap_or_default();
        for key in ["config_overrides", "model"] {
            if let Some(value) = about.get(key).filter(|value| !value.is_null()) {
                place.table.insert(key.to_owned(), value.clone());
            }
        }
        Ok(place)
    }
}

/// The id of an entry, which YAML may have parsed as a number.
fn id(entry: &Value) -> Option<String> {
    let id = entry.get("id")?;
    id.as_str().map(str::to_owned).or_else(|| id.as_i64().map(|n| n.to_string()))
}

/// The place of `release:sae_id`.
pub fn place(release: &str, sae_id: &str, request: &Request) -> Result<Place> {
    let table = table(request)?;
    if let Some(table) = table.as_ref().filter(|table| table.0.contains_key(release)) {
        return table.place(release, sae_id);
    }
    if let Some(place) = by_rule(release, sae_id)? {
        return Ok(place);
    }
    // A repository on the Hub can stand for a release.
    if release.contains('/') {
        return Place::parse(&format!("{release}/{sae_id}"));
    }
    let error = InputError::new(format!("unknown release `{release}`"));
    bail!(match &table {
        Some(table) => {
            let near = nearest(release, table.0.keys().map(String::as_str));
            let near = near.map(|near| format!("did you mean `{near}`? ")).unwrap_or_default();
            error.help(format!("{near}the table has {} releases (`--list`)", table.0.len()))
        }
        None => error.help(
            "no table of releases was found: give sae_lens's pretrained_saes.yaml with `--releases FILE`, or name the \
             repository, `owner/name/path`",
        ),
    })
}

/// The place of an SAE in Gemma Scope's or Llama Scope's releases.
fn by_rule(release: &str, sae_id: &str) -> Result<Option<Place>> {
    let place = |owner: &str, name: &str, path: &str, format: &str| {
        let repo = Repo::parse(RepoKind::Model, &format!("{owner}/{name}"))?;
        let mut place = Place::on_hub(repo, path);
        place.name = format!("{release}/{sae_id}");
        place.format = Some(format.to_owned());
        Some(place)
    };
    if release.starts_with("gemma-scope-2-") {
        // gemma-scope-2-4b-pt-res: the repository's name lacks the site, which is a folder in it.
        let Some((size, site)) = release
            .match_indices("-pt-")
            .chain(release.match_indices("-it-"))
            .next()
            .map(|(at, _)| (&release[..at + 3], &release[at + 4..]))
        else {
            return Ok(None);
        };
        let folder = match site {
            "res" => "resid_post",
            "att" => "attn_out",
            "mlp" => "mlp_out",
            "transcoders" => "transcoder",
            "res-all" => "resid_post_all",
            "att-all" => "attn_out_all",
            "mlp-all" => "mlp_out_all",
            "transcoders-all" => "transcoder_all",
            _ => return Ok(None),
        };
        return Ok(place("google", size, &format!("{folder}/{sae_id}"), "gemma_scope"));
    }
    if release.starts_with("gemma-scope-") {
        let repo = release.trim_end_matches("-canonical");
        let Some(found) = place("google", repo, sae_id.trim_end_matches("/canonical"), "gemma_scope") else {
            return Ok(None);
        };
        return Ok(Some(if sae_id.ends_with("/canonical") { canonical(&found)? } else { found }));
    }
    if let Some(kind) = release.strip_prefix("llama_scope_lx") {
        // llama_scope_lxr_8x, l3r_8x: fnlp/Llama3_1-8B-Base-LXR-8x, Llama3_1-8B-Base-L3R-8x.
        let Some((site, factor)) = kind.split_once('_') else { return Ok(None) };
        let sae = sae_id.to_uppercase().replace("_8X", "-8x").replace("_32X", "-32x");
        return Ok(place(
            "fnlp",
            &format!("Llama3_1-8B-Base-LX{}-{factor}", site.to_uppercase()),
            &format!("Llama3_1-8B-Base-{sae}"),
            "llama_scope",
        ));
    }
    Ok(None)
}

/// Gemma Scope's canonical SAE of a width is the one whose L0 is nearest to 100.
fn canonical(width: &Place) -> Result<Place> {
    let files = width.files()?;
    let l0 = |folder: &str| folder.strip_prefix("average_l0_")?.parse::<i64>().ok();
    let folders = files.iter().filter_map(|file| file.split('/').next());
    let best = folders.filter_map(|folder| Some((l0(folder)?, folder))).min_by_key(|(l0, _)| (l0 - 100).abs());
    match best {
        Some((_, folder)) => {
            let mut best = width.below(folder);
            best.name.clone_from(&width.name);
            Ok(best)
        }
        None => bail!(InputError::new(format!("{width} has no folders named average_l0_<L0>"))),
    }
}

/// Returns the places of all SAEs that match a glob of `release:id`.
pub fn find(names: &str, request: &Request) -> Result<Vec<Place>> {
    let Some(table) = table(request)? else {
        let Some((release, id)) = names.split_once(':') else {
            bail!(InputError::new(format!("`{names}` is not of the form `release:id`")));
        };
        return Ok(vec![place(release, id, request)?]);
    };
    let wanted = glob(names)?;
    let mut places = Vec::new();
    for release in table.0.keys() {
        for id in table.ids(release) {
            if wanted.matches(&format!("{release}:{id}")) {
                places.push(table.place(release, &id)?);
            }
        }
    }
    if places.is_empty() {
        bail!(
            InputError::new(format!("nothing in the table matches `{names}`"))
                .help("names are `release:id`; `dictlearn import sae_lens --list GLOB` shows them")
        );
    }
    Ok(places)
}

/// Every `release:id` of the table, with repository, path and metrics.
pub fn offers(request: &Request) -> Result<Vec<(String, String)>> {
    let Some(table) = table(request)? else {
        bail!(
            InputError::new("no table of releases was found")
                .help("give sae_lens's pretrained_saes.yaml with `--releases FILE`, or install the Python package")
        );
    };
    let mut offers = Vec::new();
    for (release, about) in &table.0 {
        let part = |key: &str| about.get(key).and_then(Value::as_str).unwrap_or_default();
        for entry in table.entries(release) {
            let Some(id) = id(entry) else { continue };
            let mut words = vec![format!("{} of {}", part("model"), part("repo_id"))];
            for (key, name) in [("l0", "L0"), ("variance_explained", "variance explained")] {
                if let Some(value) = entry.get(key).and_then(Value::as_f64) {
                    words.push(format!("{name} {value}"));
                }
            }
            offers.push((format!("{release}:{id}"), words.join(", ")));
        }
    }
    Ok(offers)
}
