//! The files of a dataset of the Hub.
//!
//! Which files are a split's is decided as Hugging Face's `datasets` does: by the `configs` in the head of the dataset's
//! README.md, or else by the names of files and folders. What has no files that can be read here (a loading script, CSV)
//! is taken from the conversion to parquet that the Hub keeps of most datasets. Lines are read as they arrive and not kept
//! on disk; a .parquet file is fetched into the cache when the stream comes to it.

use dictlearn_core::config::from_yaml;
use dictlearn_core::hub::{hub, Repo, RepoKind};
use dictlearn_core::prelude::*;
use dictlearn_core::registry::nearest;
use dictlearn_core::text::{Wanted, WrittenText};

use crate::column;
use crate::stream::{ending, Documents, Options, Place, TextFiles, ENDINGS};

const NAME: &str = "hub_dataset";
/// The branch with the Hub's own conversion.
const CONVERTED: &str = "refs/convert/parquet";

/// Text of a dataset of the Hub, as it arrives.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HubDatasetConfig {
    /// The dataset: `owner/name[@revision]`.
    pub repo: String,
    /// Which split of it.
    #[serde(default = "train")]
    pub split: String,
    /// Which subset of it (`name` of Hugging Face's `load_dataset`), where it has several.
    #[serde(default)]
    pub subset: Option<String>,
    /// The files to read, as a glob over the dataset's paths, instead of a split: `data/CC-MAIN-2024-*/*.parquet`.
    #[serde(default)]
    pub files: Option<String>,
    /// The field or column that holds the text or the messages of a chat.
    #[serde(default = "column")]
    pub column: String,
    /// What a document is in a .txt file.
    #[serde(default)]
    pub documents: Documents,
    /// End with an error at the first bad record instead of skipping it.
    #[serde(default)]
    pub strict: bool,
}

fn train() -> String {
    "train".to_owned()
}

register! {
    text HubDatasetConfig, NAME,
    summary: "Text of a dataset of the Hub, as it arrives: .txt, .jsonl (plain, .gz, .zst) and .parquet",
    paper: "",
    example: "{type: hub_dataset, repo: monology/pile-uncopyrighted, split: train, column: text}",
}

inventory::submit! {
    WrittenText {
        config: |wanted| match wanted {
            Wanted::Dataset(repo) => Some(serde_json::json!({"type": NAME, "repo": repo})),
            _ => None,
        },
    }
}

#[typetag::serde(name = NAME)]
impl TextConfig for HubDatasetConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        let Some(repo) = Repo::parse(RepoKind::Dataset, &self.repo) else {
            bail!(InputError::new(format!("`{}` is not the name of a dataset", self.repo))
                .field("repo")
                .help("give it as `owner/name` or `owner/name@revision`"));
        };
        let options = Options { column: self.column.clone(), documents: self.documents, strict: self.strict };
        Ok(Box::new(TextFiles::new(self.places(&repo)?, options)))
    }
}

impl HubDatasetConfig {
    fn places(&self, repo: &Repo) -> Result<Vec<Place>> {
        let hub = hub()?;
        let converted = Repo { revision: CONVERTED.to_owned(), ..repo.clone() };
        let files = match hub.list(repo) {
            Ok(files) => files,
            // The cache may have nothing of the dataset but its conversion.
            Err(error) => match hub.list(&converted) {
                Ok(_) => Vec::new(),
                Err(_) => return Err(error).under("repo"),
            },
        };
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        let places = |repo: &Repo, files: Vec<&str>| -> Vec<Place> {
            files.into_iter().map(|file| Place::Hub(repo.clone(), file.to_owned())).collect()
        };
        if let Some(glob) = &self.files {
            let found: Vec<&str> = matching(glob, &files).under("files")?;
            if found.is_empty() {
                bail!(InputError::new(format!("no file of `{repo}` that can be read is named `{glob}`"))
                    .field("files")
                    .help(format!("files are read that end in .{}; {}", ENDINGS.join(", ."), some_of(&files))));
            }
            return Ok(places(repo, found));
        }
        let head = match files.contains(&"README.md") {
            true => hub.file(repo, "README.md")?.and_then(|path| std::fs::read_to_string(path).ok()),
            false => None,
        };
        let head = head.map_or_else(Head::default, |readme| self::head(&readme));
        let own = match self.of_configs(&head, &files)? {
            None if head.configs.is_empty() => by_name(&files, &self.split, self.subset.as_deref()),
            found => found,
        };
        if let Some(own) = own.filter(|own| !own.is_empty()) {
            return Ok(places(repo, own));
        }
        // What the Hub converted, `<subset>/<split>/0000.parquet`.
        let listed = hub.list(&converted).unwrap_or_default();
        let mut found = Vec::new();
        let mut known = Vec::new();
        for file in listed.iter().filter(|file| ending(file).is_some()) {
            let Some((subset, rest)) = file.split_once('/') else { continue };
            let Some((split, _)) = rest.split_once('/') else { continue };
            known.push((subset, split));
            found.push((subset, split, file.as_str()));
        }
        known.dedup();
        let mut subsets: Vec<&str> = known.iter().map(|(subset, _)| *subset).collect();
        subsets.dedup();
        let subset = match self.subset.as_deref() {
            Some(subset) => subset,
            None if subsets.len() == 1 => subsets[0],
            None => "default",
        };
        let split_of = |name: &str| name == self.split || name.strip_prefix("partial-") == Some(&self.split);
        let chosen: Vec<&str> =
            found.iter().filter(|(s, split, _)| *s == subset && split_of(split)).map(|(_, _, file)| *file).collect();
        if !chosen.is_empty() {
            return Ok(places(&converted, chosen));
        }
        let mut subsets_of_head: Vec<&str> = head.configs.iter().map(|config| config.config_name.as_str()).collect();
        subsets_of_head.extend(subsets);
        if self.subset.is_some() || (subsets_of_head.len() > 1 && !subsets_of_head.contains(&"default")) {
            let wanted = self.subset.as_deref();
            if !wanted.is_some_and(|wanted| subsets_of_head.contains(&wanted)) {
                let found = match wanted {
                    Some(wanted) => format!("the dataset `{repo}` has no subset `{wanted}`"),
                    None => format!("the dataset `{repo}` has several subsets"),
                };
                bail!(InputError::new(found).field("subset").help(match subsets_of_head.is_empty() {
                    true => "it has none: leave `subset` out".to_owned(),
                    false => format!("its subsets: {}", subsets_of_head.join(", ")),
                }));
            }
        }
        let mut splits: Vec<&str> = head
            .configs
            .iter()
            .flat_map(|config| config.splits().into_iter().map(|(split, _)| split))
            .chain(known.iter().map(|(_, split)| *split))
            .chain(
                KEYWORDS
                    .iter()
                    .filter(|(_, words)| files.iter().any(|file| has_word(file, words)))
                    .map(|(split, _)| *split),
            )
            .collect();
        splits.sort_unstable();
        splits.dedup();
        let readable = files.iter().any(|file| ending(file).is_some());
        if splits.is_empty() && !readable {
            bail!(InputError::new(format!("the dataset `{repo}` has no files that can be read"))
                .field("repo")
                .help(format!("files are read that end in .{}; {}", ENDINGS.join(", ."), some_of(&files))));
        }
        let error = InputError::new(format!("the dataset `{repo}` has no split `{}`", self.split)).field("split");
        let near = nearest(&self.split, splits.iter().copied()).map(|near| format!("did you mean `{near}`? "));
        bail!(error.help(match splits.is_empty() {
            true => format!("name its files instead, with `files`: {}", some_of(&files)),
            false => format!("{}its splits: {}", near.unwrap_or_default(), splits.join(", ")),
        }))
    }

    /// The split's files as the head of the README names them.
    fn of_configs<'a>(&self, head: &Head, files: &[&'a str]) -> Result<Option<Vec<&'a str>>> {
        let config = match &self.subset {
            Some(subset) => head.configs.iter().find(|config| config.config_name == *subset),
            None => {
                let default = head.configs.iter().find(|config| config.default || config.config_name == "default");
                default.or(head.configs.first().filter(|_| head.configs.len() == 1))
            }
        };
        let Some(config) = config else { return Ok(None) };
        let mut found = Vec::new();
        for (_, globs) in config.splits().into_iter().filter(|(split, _)| *split == self.split) {
            for glob in globs {
                let glob = match &config.data_dir {
                    Some(dir) => format!("{}/{glob}", dir.trim_end_matches('/')),
                    None => glob,
                };
                found.extend(matching(&glob, files)?);
            }
        }
        Ok(Some(found))
    }
}

/// What a dataset's README.md says in its head.
#[derive(Debug, Default, Deserialize)]
struct Head {
    #[serde(default)]
    configs: Vec<Subset>,
}

#[derive(Debug, Deserialize)]
struct Subset {
    #[serde(default = "default_name")]
    config_name: String,
    #[serde(default)]
    default: bool,
    #[serde(default)]
    data_dir: Option<String>,
    #[serde(default)]
    data_files: Value,
}

fn default_name() -> String {
    "default".to_owned()
}

impl Subset {
    /// Globs of each split. They may be written as a glob, a list of globs, or a list of `{split, path}`.
    fn splits(&self) -> Vec<(&str, Vec<String>)> {
        let globs = |value: &Value| -> Vec<String> {
            match value {
                Value::String(glob) => vec![glob.clone()],
                Value::Array(globs) => globs.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
                _ => Vec::new(),
            }
        };
        match &self.data_files {
            Value::Array(parts) if parts.iter().all(Value::is_object) => parts
                .iter()
                .filter_map(|part| {
                    Some((
                        part.get("split").map_or("train", |split| split.as_str().unwrap_or("train")),
                        globs(part.get("path")?),
                    ))
                })
                .collect(),
            Value::Null => vec![("train", vec!["**".to_owned()])],
            one => vec![("train", globs(one))],
        }
    }
}

/// What stands between the first two lines of dashes.
fn head(readme: &str) -> Head {
    let yaml = readme.strip_prefix("---").and_then(|rest| rest.split_once("\n---")).map(|(yaml, _)| yaml);
    yaml.and_then(|yaml| from_yaml(yaml).ok()).unwrap_or_default()
}

/// The files that match a glob and can be read.
fn matching<'a>(glob: &str, files: &[&'a str]) -> Result<Vec<&'a str>> {
    let pattern = glob::Pattern::new(glob.trim_start_matches("./"))
        .map_err(|error| InputError::new(format!("`{glob}` is not a glob: {error}")))?;
    let options = glob::MatchOptions { require_literal_separator: true, ..Default::default() };
    Ok(files.iter().copied().filter(|file| ending(file).is_some() && pattern.matches_with(file, options)).collect())
}

/// Words in names of files and folders that say which split they are of.
const KEYWORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "val", "dev"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

fn has_word(path: &str, words: &[&str]) -> bool {
    path.to_lowercase().split(|c: char| !c.is_alphabetic()).any(|word| words.contains(&word))
}

/// The split's files by their names. Files that no name gives to a split are the training set.
fn by_name<'a>(files: &[&'a str], split: &str, subset: Option<&str>) -> Option<Vec<&'a str>> {
    let below =
        |file: &&str| subset.is_none_or(|subset| file.strip_prefix(subset).is_some_and(|rest| rest.starts_with('/')));
    let files: Vec<&str> = files.iter().copied().filter(|file| ending(file).is_some()).filter(below).collect();
    let of = |words: &[&str]| -> Vec<&'a str> { files.iter().copied().filter(|file| has_word(file, words)).collect() };
    let words = KEYWORDS.iter().find(|(name, words)| *name == split || words.contains(&split)).map(|(_, words)| *words);
    let found = of(words.unwrap_or(&[split]));
    if !found.is_empty() {
        return Some(found);
    }
    let named = KEYWORDS.iter().any(|(_, words)| !of(words).is_empty());
    (split == "train" && !named && !files.is_empty()).then_some(files)
}

/// Some of a dataset's files, for a message.
fn some_of(files: &[&str]) -> String {
    const SHOWN: usize = 8;
    let more = if files.len() > SHOWN { format!(" and {} more", files.len() - SHOWN) } else { String::new() };
    format!("it has {}{more}", files.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_by_the_names_of_files() {
        let files =
            ["README.md", "train/00.jsonl.zst", "train/01.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst", "a.py"];
        assert_eq!(by_name(&files, "train", None), Some(vec![files[1], files[2]]));
        assert_eq!(by_name(&files, "validation", None), Some(vec![files[3]]));
        assert_eq!(by_name(&files, "val", None), Some(vec![files[3]]));
        assert_eq!(by_name(&files, "other", None), None);
        let files = ["en/c4-train.0.json.gz", "en/c4-validation.0.json.gz", "de/c4-train.0.json.gz"];
        assert_eq!(by_name(&files, "train", Some("en")), Some(vec![files[0]]));
        // Nothing is said of splits: all of it is to train on. A word within a word says nothing.
        let files = ["latest.jsonl", "constrained.txt"];
        assert_eq!(by_name(&files, "train", None), Some(files.to_vec()));
        assert_eq!(by_name(&files, "test", None), None);
    }

    #[test]
    fn splits_by_the_head_of_the_readme() {
        let head = head(
            "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: \
             data/*/*.parquet\n- config_name: sample\n  default: false\n  data_dir: small\n  data_files: \
             [a.parquet, b.parquet]\n---\n# A dataset\n",
        );
        let files = ["data/x/0.parquet", "data/y/1.parquet", "data/2.parquet", "small/a.parquet"];
        let config = |subset: Option<&str>, split: &str| HubDatasetConfig {
            repo: "a/b".into(),
            split: split.into(),
            subset: subset.map(str::to_owned),
            files: None,
            column: column(),
            documents: Documents::default(),
            strict: false,
        };
        let found = |subset, split| config(subset, split).of_configs(&head, &files).unwrap();
        assert_eq!(found(None, "train"), Some(files[..2].to_vec()));
        assert_eq!(found(None, "test"), Some(vec![]));
        assert_eq!(found(Some("sample"), "train"), Some(vec![files[3]]));
        assert_eq!(found(Some("other"), "train"), None);
    }
}
