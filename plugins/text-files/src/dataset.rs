//! The files of a dataset on the Hub.
//!
//! `splits.rs` decides which files belong to a split, as Hugging Face's `datasets` does. If a split has unsupported
//! files (a loading script, CSV), the stream reads the parquet conversion that the Hub keeps of most datasets. Lines
//! are streamed and not kept on disk; a .parquet file is downloaded into the cache when the stream reaches it.

use dictlearn_core::hub::{Repo, RepoKind, hub};
use dictlearn_core::prelude::*;

use crate::splits::{Card, Glob, Missing, find, some_of};
use crate::stream::{Documents, ENDINGS, Options, Place, TextFiles, ending};

/// The branch with the Hub's own conversion.
const CONVERTED: &str = "refs/convert/parquet";

/// Text streamed from a dataset on the Hub.
#[component(text "hub_dataset",
    summary = "Text streamed from a dataset on the Hub: .txt, .jsonl (plain, .gz, .zst) and .parquet",
    example = "{type: hub_dataset, repo: monology/pile-uncopyrighted, split: train, column: text}")]
pub struct HubDatasetConfig {
    /// The dataset, as `owner/name[@revision]`.
    pub repo: String,
    /// Split to read. Files are assigned to splits as in Hugging Face's `load_dataset`: by the `configs` in README.md,
    /// shards (`data/train-00000-of-00002.parquet`), folder names, or file names.
    #[default("train")]
    pub split: String,
    /// Subset to read, if the dataset has several (`name` of `load_dataset`). In a dataset without `configs`: a folder
    /// (`data_dir` of `load_dataset`).
    pub subset: Option<String>,
    /// Glob over the dataset's paths, to read these files instead of a split: `data/CC-MAIN-2024-*/*.parquet`.
    pub files: Option<String>,
    /// Field or column with the text, the messages of a chat, or token ids (a list of integers). A nested field is
    /// written `translation.en`. Default: the first of `text`, `input_ids` and `tokens` that exists.
    pub column: Option<String>,
    /// Unit of a document in a .txt file.
    #[default]
    pub documents: Documents,
    /// `true`: stop with an error at the first bad record. `false`: skip bad records, unreadable files and the rest of
    /// damaged files. Default: skip and count bad records, but stop with an error at an unreadable file.
    pub strict: Option<bool>,
}

impl TextConfig for HubDatasetConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        let Some(repo) = Repo::parse(RepoKind::Dataset, &self.repo) else {
            bail!(
                InputError::new(format!("`{}` is not a valid name of a dataset", self.repo))
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
            // The cache may hold only the conversion.
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
                    InputError::new(format!("`{repo}` has no supported file that matches `{text}`"))
                        .field("files")
                        .help(format!("supported endings: .{}; {}", ENDINGS.join(", ."), some_of(&files)))
                );
            }
            return Ok(places(repo, found));
        }
        let text = |name: &str| -> Result<Option<String>> {
            let path = if files.contains(&name) { hub.file(repo, name)? } else { None };
            Ok(path.and_then(|path| std::fs::read_to_string(path).ok()))
        };
        let card = Card::read(text("README.md")?.as_deref(), text(".huggingface.yaml")?.as_deref())
            .map_err(|error| error.field("repo").help("select files with `files` instead"))?;
        // A loading script may divide the files differently; the conversion has its result.
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
        // Converted files are named `<subset>/<split>/0000.parquet`.
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

/// Returns `names`, followed by those of `others` that are not among them.
fn joined<'a>(mut names: Vec<String>, others: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    for name in others {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names
}
