//! The files of a dataset of the Hub.
//!
//! Which files are a split's is decided in `splits.rs`, as Hugging Face's `datasets` does. A split with files that cannot be
//! read here (a loading script, CSV) is taken from the conversion to parquet that the Hub keeps of most datasets. Lines are
//! read as they arrive and not kept on disk; a .parquet file is fetched into the cache when the stream comes to it.

use dictlearn_core::hub::{Repo, RepoKind, hub};
use dictlearn_core::prelude::*;

use crate::splits::{Card, Glob, Missing, find, some_of};
use crate::stream::{Documents, ENDINGS, Options, Place, TextFiles, ending};

/// The branch with the Hub's own conversion.
const CONVERTED: &str = "refs/convert/parquet";

/// Text of a dataset of the Hub, as it arrives.
#[component(text "hub_dataset",
    summary = "Text of a dataset of the Hub, as it arrives: .txt, .jsonl (plain, .gz, .zst) and .parquet",
    example = "{type: hub_dataset, repo: monology/pile-uncopyrighted, split: train, column: text}")]
pub struct HubDatasetConfig {
    /// The dataset: `owner/name[@revision]`.
    pub repo: String,
    /// Which split of it. Files belong to splits as Hugging Face's `load_dataset` has it: by the `configs` in README.md, by
    /// shards (`data/train-00000-of-00002.parquet`), by names of folders, or by names of files.
    #[default("train")]
    pub split: String,
    /// Which subset of it (`name` of `load_dataset`), where it has several. In a dataset without `configs`, a folder
    /// (`data_dir` of `load_dataset`).
    pub subset: Option<String>,
    /// The files to read, as a glob over the dataset's paths, instead of a split: `data/CC-MAIN-2024-*/*.parquet`.
    pub files: Option<String>,
    /// The field or column that holds the text, the messages of a chat, or token ids (a list of integers); `translation.en`
    /// for a field within a field. Default: `text`, or where there is none `input_ids` or `tokens`.
    pub column: Option<String>,
    /// What a document is in a .txt file.
    #[default]
    pub documents: Documents,
    /// `true`: end with an error at the first bad record. `false`: also skip a file that cannot be read, or the rest of it.
    /// Default: skip and count bad records, and end with an error at a file that cannot be read.
    pub strict: Option<bool>,
}

impl TextConfig for HubDatasetConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        let Some(repo) = Repo::parse(RepoKind::Dataset, &self.repo) else {
            bail!(
                InputError::new(format!("`{}` is not the name of a dataset", self.repo))
                    .field("repo")
                    .help("give it as `owner/name` or `owner/name@revision`")
            );
        };
        let options = Options::new(self.column.as_deref(), self.documents, self.strict);
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
        if let Some(text) = &self.files {
            let glob = Glob::new(text).map_err(|error| error.field("files"))?;
            let readable = files.iter().copied().filter(|file| ending(file).is_some());
            let found: Vec<&str> = readable.filter(|file| glob.matches(file)).collect();
            if found.is_empty() {
                bail!(
                    InputError::new(format!("no file of `{repo}` that can be read is named `{text}`"))
                        .field("files")
                        .help(format!("files are read that end in .{}; {}", ENDINGS.join(", ."), some_of(&files)))
                );
            }
            return Ok(places(repo, found));
        }
        let text = |name: &str| -> Result<Option<String>> {
            let path = if files.contains(&name) { hub.file(repo, name)? } else { None };
            Ok(path.and_then(|path| std::fs::read_to_string(path).ok()))
        };
        let card = Card::read(text("README.md")?.as_deref(), text(".huggingface.yaml")?.as_deref())
            .map_err(|error| error.field("repo").help("name its files instead, with `files`"))?;
        // A loading script may divide the files otherwise; what it gave is in the conversion.
        let script = format!("{}.py", repo.id.rsplit('/').next().unwrap_or_default());
        let own = match card.subsets.is_empty() && files.contains(&script.as_str()) {
            true => Err(Missing::Unreadable(vec![script])),
            false => find(&files, &card, &self.split, self.subset.as_deref()),
        };
        let missing = match own {
            Ok(found) => return Ok(places(repo, found)),
            Err(Missing::Card(error)) => bail!(error),
            Err(missing) => missing,
        };
        // What the Hub converted, `<subset>/<split>/0000.parquet`.
        let listed = hub.list(&converted).unwrap_or_default();
        let mut found = Vec::new();
        for file in listed.iter().filter(|file| ending(file).is_some()) {
            let Some((subset, rest)) = file.split_once('/') else { continue };
            let Some((split, _)) = rest.split_once('/') else { continue };
            found.push((subset, split.strip_prefix("partial-").unwrap_or(split), file.as_str()));
        }
        let mut subsets: Vec<&str> = found.iter().map(|(subset, ..)| *subset).collect();
        subsets.dedup();
        let subset = match self.subset.as_deref() {
            Some(subset) => subset,
            None if subsets.len() == 1 => subsets[0],
            None => "default",
        };
        found.retain(|(of, ..)| *of == subset);
        let chosen: Vec<&str> =
            found.iter().filter(|(_, split, _)| *split == self.split).map(|(.., file)| *file).collect();
        if !chosen.is_empty() {
            return Ok(places(&converted, chosen));
        }
        let splits = found.iter().map(|(_, split, _)| *split);
        let there = subsets.contains(&subset);
        let missing = match missing {
            Missing::Subset(known) if !there => Missing::Subset(joined(known, subsets)),
            Missing::Unreadable(_) if !there && !subsets.is_empty() && self.subset.is_none() => {
                Missing::Subset(joined(Vec::new(), subsets))
            }
            Missing::Split(known) if there => Missing::Split(joined(known, splits)),
            _ if there => Missing::Split(joined(Vec::new(), splits)),
            other => other,
        };
        let what = format!("the dataset `{repo}`");
        Err(missing.refused(&what, "repo", &self.split, self.subset.as_deref(), &files).into())
    }
}

/// Names, and those of others that are not among them.
fn joined<'a>(mut names: Vec<String>, others: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    for name in others {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}
