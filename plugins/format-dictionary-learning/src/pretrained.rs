//! The reference's own set: a zip archive on the Hub with dictionaries for every submodule of Pythia-70m.
//!
//! Its README tabulates their metrics. They read MLP outputs, attention outputs and the residual stream (the embedding
//! and each layer's output) and were trained on 2B tokens of the Pile.

use std::fs::File;
use std::io::Read;

use dictlearn_core::files;
use dictlearn_core::hub::Repo;
use zip::ZipArchive;

use super::*;

const REPO: &str = "saprmarks/pythia-70m-deduped-saes";
const ARCHIVE: &str = "dictionaries_pythia-70m-deduped_10.zip";
/// Key of a place's table that names the folder in the archive.
pub const ENTRY: &str = "archive_folder";
/// Limit on the size of an archive entry: well above two 32768 × 512 matrices in float32.
const LARGEST: u64 = 1 << 30;

fn open() -> Result<ZipArchive<File>> {
    let path = hub_file(REPO, ARCHIVE)?;
    let refused = |why: String| InputError::new(format!("cannot read {}: {why}", path.display()));
    Ok(ZipArchive::new(files::open(&path)?).map_err(|error| refused(error.to_string()))?)
}

/// Names of the dictionaries in the archive, each with its folder.
fn names(archive: &ZipArchive<File>) -> Vec<(String, String)> {
    let folders = archive.file_names().flatten().filter_map(|name| name.strip_suffix("/ae.pt").map(str::to_owned));
    let name = |folder: &str| folder.strip_prefix("dictionaries/").unwrap_or(folder).to_owned();
    let folders = folders.filter(|folder| !folder.contains("__MACOSX") && !folder.split('/').any(|part| part == ".."));
    let mut names: Vec<_> = folders.map(|folder| (name(&folder), folder)).collect();
    names.sort();
    names
}

/// Returns the places that match a glob.
pub fn find(wanted: &str) -> Result<Vec<Place>> {
    let pattern = glob(wanted.trim_end_matches('/'))?;
    let all = names(&open()?);
    let Some(repo) = Repo::parse(RepoKind::Model, REPO) else { bail!("{REPO} is not a repository") };
    let place = |(name, folder): &(String, String)| {
        let mut place = Place::on_hub(repo.clone(), ARCHIVE);
        place.name.clone_from(name);
        place.table.insert(ENTRY.to_owned(), folder.as_str().into());
        place
    };
    let places: Vec<Place> = all.iter().filter(|(name, _)| pattern.matches(name)).map(place).collect();
    if places.is_empty() {
        let near = dictlearn_core::suggest::nearest(wanted, all.iter().map(|(name, _)| name.as_str()));
        let shown = format!("`dictlearn import {} --list` shows all names", crate::DictionaryLearning::NAME);
        bail!(InputError::new(format!("no pretrained dictionary matches `{wanted}`")).help(match near {
            Some(near) => format!("did you mean `{near}`? {shown}"),
            None => shown,
        }));
    }
    Ok(places)
}

/// Name and description of every dictionary in the set.
pub fn offers() -> Result<Vec<(String, String)>> {
    let about = |name: &str| site(name).map(|site| format!("{} of {}", site.submodule, site.model)).unwrap_or_default();
    Ok(names(&open()?).into_iter().map(|(name, _)| (name.clone(), about(&name))).collect())
}

/// Reads the dictionary in a folder of the archive.
pub fn read(place: &Place, folder: &str) -> Result<Published> {
    let mut archive = open()?;
    let mut entry = |name: &str| -> Result<Option<Vec<u8>>> {
        let path = format!("{folder}/{name}");
        let refused = |why: String| InputError::new(format!("cannot read {path} in {ARCHIVE}: {why}"));
        let entry = match archive.by_name(&path) {
            Ok(entry) => entry,
            Err(zip::result::ZipError::FileNotFound) => return Ok(None),
            Err(error) => bail!(refused(error.to_string())),
        };
        let mut bytes = Vec::new();
        entry.take(LARGEST).read_to_end(&mut bytes).map_err(|error| refused(error.to_string()))?;
        Ok(Some(bytes))
    };
    let name = format!("{place}/{folder}/ae.pt");
    let Some(weights) = entry("ae.pt")? else { bail!(InputError::new(format!("{ARCHIVE} has no {folder}/ae.pt"))) };
    let config = match entry("config.json")? {
        Some(text) => {
            serde_json::from_slice(&text).map_err(|error| InputError::new(format!("{folder}/config.json: {error}")))?
        }
        None => Value::Null,
    };
    let value = torch_file::read_bytes(&name, &weights)?;
    // Their configs predate this key.
    let mut config = if config.is_object() { config } else { serde_json::json!({}) };
    if config["trainer"]["dict_class"].is_null() && (config["trainer"].is_object() || config["trainer"].is_null()) {
        config["trainer"]["dict_class"] = "AutoEncoder".into();
    }
    let mut published = published(&value, &name, Some(config))?;
    published.site = site(&place.name).or(published.site);
    Ok(published)
}

/// The site of a dictionary, from its name: `pythia-70m-deduped/mlp_out_layer1/10_32768`.
fn site(name: &str) -> Option<ModelSite> {
    let mut parts = name.split('/');
    let model = format!("EleutherAI/{}", parts.next()?);
    let place = parts.next()?;
    let submodule = if place == "embed" {
        "gpt_neox.embed_in".to_owned()
    } else {
        let (kind, layer) = place.split_once("_layer")?;
        let layer: u64 = layer.parse().ok()?;
        match kind {
            "mlp_out" => format!("gpt_neox.layers.{layer}.mlp"),
            "attn_out" => format!("gpt_neox.layers.{layer}.attention"),
            "resid_out" => format!("gpt_neox.layers.{layer}"),
            _ => return None,
        }
    };
    Some(ModelSite {
        model,
        submodule,
        io: Some("out"),
        ctx_len: Some(128),
        dataset: Some("monology/pile-uncopyrighted".to_owned()),
        ..ModelSite::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_are_read_from_names() {
        let site = |name| site(name).map(|site| site.submodule);
        assert_eq!(site("pythia-70m-deduped/mlp_out_layer1/10_32768").unwrap(), "gpt_neox.layers.1.mlp");
        assert_eq!(site("pythia-70m-deduped/embed/10_32768").unwrap(), "gpt_neox.embed_in");
        assert_eq!(site("pythia-70m-deduped/resid_out_layer5/10_32768").unwrap(), "gpt_neox.layers.5");
        assert!(site("x").is_none());
    }
}
