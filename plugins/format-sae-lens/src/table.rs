//! The table of releases, `pretrained_saes.yaml`, which maps a release and an id to a repository and a path.
//!
//! A table on the user's machine comes first; else the one of sae_lens [`VERSION`], which is part of this crate. Gemma
//! Scope and Llama Scope name their folders by rule, so that their SAEs are also found where the table lacks them.

use std::path::{Path, PathBuf};
use std::process::Command;

use dictlearn_core::files;
use dictlearn_core::formats::{Place, Request, glob};
use dictlearn_core::hub::{Repo, RepoKind, hub};
use dictlearn_core::prelude::*;
use dictlearn_core::registry::{ComponentKind, find as find_component};
use dictlearn_core::suggest::nearest;

use crate::models;

const FILE: &str = "pretrained_saes.yaml";

/// The table of this version of sae_lens (MIT), `zstd -19` of its file `pretrained_saes.yaml`.
const BUNDLED: &[u8] = include_bytes!("../releases/pretrained_saes.yaml.zst");

/// sae_lens's version of the bundled table.
const VERSION: &str = "6.54.12";

/// sae_lens's converters whose files a format of another name reads. For the others, the names are the same.
const CONVERSIONS: [(&str, &str); 4] = [
    ("gemma_2", "gemma_scope"),
    ("gemma_2_transcoder", "gemma_scope"),
    ("gemma_3", "gemma_scope"),
    ("dictionary_learning_1", "dictionary_learning"),
];

/// The format that reads the files of a converter. The error has the name of a format that is not linked.
fn format_of(conversion: Option<&str>) -> Result<&str, &str> {
    let Some(name) = conversion else { return Ok(crate::SaeLens::NAME) };
    let format = CONVERSIONS.iter().find(|(known, _)| *known == name).map_or(name, |(_, format)| format);
    find_component(ComponentKind::Format, format).map(|found| found.name).ok_or(format)
}

/// A table, by release.
struct Table(Map<String, Value>);

/// The user's table, or else the bundled one.
fn table(request: &Request) -> Result<Table> {
    let Some(path) = table_file(request)? else { return bundled() };
    let refused = |why: String| InputError::new(format!("cannot read the table of releases {}: {why}", path.display()));
    let value: Value =
        dictlearn_core::files::from_yaml(&files::read_text(&path)?).map_err(|error| refused(error.to_string()))?;
    match value {
        Value::Object(releases) => Ok(Table(releases)),
        _ => Err(refused("it is not a mapping of releases".to_owned()).into()),
    }
}

fn bundled() -> Result<Table> {
    let text = String::from_utf8(zstd::decode_all(BUNDLED)?)?;
    Ok(Table(dictlearn_core::files::from_yaml(&text)?))
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
        let format = format_of(about.get("conversion_func").and_then(Value::as_str)).map_err(|name| {
            InputError::new(format!("`{release}` uses sae_lens's format `{name}`, which is not supported"))
                .help("save the SAE with sae_lens (`sae.save_model(dir)`) and import that folder")
        })?;
        let format = Some(format.to_owned()).filter(|format| format != crate::SaeLens::NAME);
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
    if table.entries(release).any(|entry| id(entry).as_deref() == Some(sae_id)) {
        return table.place(release, sae_id);
    }
    if let Some(place) = by_rule(release, sae_id)? {
        return Ok(place);
    }
    if table.0.contains_key(release) {
        return table.place(release, sae_id);
    }
    // A repository on the Hub can stand for a release.
    if release.contains('/') {
        return Place::parse(&format!("{release}/{sae_id}"));
    }
    let near = nearest(release, table.0.keys().map(String::as_str));
    let near = near.map(|near| format!("did you mean `{near}`? ")).unwrap_or_default();
    bail!(
        InputError::new(format!("unknown release `{release}`")).help(format!(
            "{near}the table has {} releases (`--list`); `--releases FILE` names another",
            table.0.len()
        ))
    );
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
    let table = table(request)?;
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

/// Every `release:id` of the table: model, repository, metrics, and whether it can be imported and its model run.
pub fn offers(request: &Request) -> Result<Vec<(String, String)>> {
    let table = table(request)?;
    let mut offers = Vec::new();
    for (release, about) in &table.0 {
        let part = |key: &str| about.get(key).and_then(Value::as_str).unwrap_or_default();
        let import = match format_of(about.get("conversion_func").and_then(Value::as_str)) {
            Ok(_) => "import: yes".to_owned(),
            Err(format) => format!("import: no (format {format})"),
        };
        let model = match models::family(part("model")) {
            Some(family) if runs(family) => format!("model: yes ({family})"),
            Some(family) => format!("model: no ({family})"),
            None => "model: unknown".to_owned(),
        };
        for entry in table.entries(release) {
            let Some(id) = id(entry) else { continue };
            let mut words = vec![format!("{} of {}", part("model"), part("repo_id"))];
            for (key, name) in [("l0", "L0"), ("variance_explained", "variance explained")] {
                if let Some(value) = entry.get(key).and_then(Value::as_f64) {
                    words.push(format!("{name} {value}"));
                }
            }
            words.extend([import.clone(), model.clone()]);
            offers.push((format!("{release}:{id}"), words.join(", ")));
        }
    }
    Ok(offers)
}

/// Whether a family of language models is linked.
fn runs(family: &str) -> bool {
    find_component(ComponentKind::Model, family).is_some()
}

/// A paragraph that says how many SAEs of the bundled table can be imported, and of how many the model can be run.
pub fn coverage() -> Result<String> {
    let table = bundled()?;
    let (mut all, mut imported, mut run) = (0, 0, 0);
    let mut lacking = std::collections::BTreeMap::<String, usize>::new();
    for (release, about) in &table.0 {
        let count = table.entries(release).count();
        all += count;
        match format_of(about.get("conversion_func").and_then(Value::as_str)) {
            Ok(_) => imported += count,
            Err(format) => *lacking.entry(format!("the format `{format}`")).or_default() += count,
        }
        let model = about.get("model").and_then(Value::as_str).unwrap_or_default();
        match models::family(model) {
            Some(family) if runs(family) => run += count,
            Some(family) => *lacking.entry(format!("the family `{family}`")).or_default() += count,
            None => *lacking.entry(format!("the model `{model}`")).or_default() += count,
        }
    }
    let mut text = format!(
        "The table of sae_lens {VERSION} names {} SAEs in {} releases. {} of them can be imported. The models of {} can be \
         run.",
        grouped(all),
        table.0.len(),
        grouped(imported),
        grouped(run)
    );
    if !lacking.is_empty() {
        let lacking: Vec<String> =
            lacking.iter().map(|(what, count)| format!("{what} ({})", grouped(*count))).collect();
        text += &format!(" Not supported: {}.", lacking.join(", "));
    }
    Ok(text)
}

/// A number with a comma before every three digits.
fn grouped(number: usize) -> String {
    match number / 1000 {
        0 => number.to_string(),
        thousands => format!("{},{:03}", grouped(thousands), number % 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!([7, 999, 1000, 13_057, 2_000_001].map(grouped), ["7", "999", "1,000", "13,057", "2,000,001"]);
    }

    #[test]
    fn every_name_of_the_table_resolves() {
        let table = bundled().unwrap();
        let mut found = 0;
        for (release, about) in &table.0 {
            assert!(models::family(about["model"].as_str().unwrap()).is_some(), "{}", about["model"]);
            for id in table.ids(release) {
                // The formats are linked where the program is built.
                match table.place(release, &id) {
                    Ok(place) => assert_eq!(place.name, format!("{release}/{id}")),
                    Err(error) => assert!(InputError::take(error).unwrap().message().contains("sae_lens's format")),
                }
                found += 1;
            }
        }
        assert_eq!((found, table.0.len()), (13_857, 170));
    }
}
