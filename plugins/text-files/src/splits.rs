//! Assigns the files of a dataset to splits, as Hugging Face's `datasets` 5.0 does.
//!
//! The `configs` in the YAML header of README.md (or .huggingface.yaml) come first. Without them, the first of these
//! rules that finds data applies: shards (`data/train_sft-00000-of-00002.parquet`, any split), `.eval` logs, folders
//! named after splits, files named after splits. Otherwise every file is in `train`. Hidden files, `__folders__` and
//! metadata files are not data unless a pattern names them. Of several formats, only the most common one is read.
//!
//! Three differences, all where `datasets` fails or repeats data: files that are not data (`train.py`) do not count
//! when a rule is chosen, splits may have different formats, and a file that two patterns of a split match is read
//! once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::LazyLock;

use dictlearn_core::files::from_yaml;
use dictlearn_core::prelude::*;
use dictlearn_core::suggest::nearest;
use glob::{MatchOptions, Pattern};

use crate::stream::{ENDINGS, ending};

/// The splits, each with the words that mark it in file and folder names.
const KEYWORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Characters that separate such a word from the rest of the name.
const SEPARATORS: &str = "[-._ 0-9]";

/// Files that are not data, unless a pattern names them.
pub const METADATA: [&str; 6] =
    ["README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dummy_data.zip", "dataset_dict.json"];

/// Files that describe media; they have the lowest priority in choosing the format.
const MEDIA_METADATA: [&str; 4] = ["latest_version_hint.json", "metadata.csv", "metadata.jsonl", "metadata.parquet"];

/// Formats of `datasets`, each with its file endings.
const FORMATS: [(&str, &str); 14] = [
    ("csv", "csv tsv"),
    ("json", "json jsonl ndjson"),
    ("parquet", "parquet geoparquet gpq"),
    ("arrow", "arrow"),
    ("text", "txt"),
    ("conll", "conll conllu"),
    ("webdataset", "tar"),
    ("xml", "xml"),
    ("hdf5", "hdf5 h5"),
    ("eval", "eval"),
    ("lance", "lance"),
    ("tsfile", "tsfile"),
    ("zip", "zip"),
    // Images, sound, video, meshes, documents: none of them is text, so they share one name.
    (
        "media",
        "blp bmp dib bufr cur pcx dcx dds ps eps fit fits fli flc ftc ftu gbr gif grib png apng jp2 j2k jpc jpf jpx j2c \
         icns ico im iim tif tiff jfif jpe jpg jpeg msp pcd pxr pbm pgm ppm pnm psd bw rgb rgba sgi ras tga icb vda vst \
         webp wmf emf xbm xpm mpg aiff au avr caf flac htk svx mat4 mat5 mpc2k ogg paf pvf raw rf64 sd2 sds ircam voc \
         w64 wav nist wavex wve xi mp3 opus 3gp 3g2 asf flv m4v webm f4v wmv wma ogm mxf nut mpeg avi mp4 mov mkv glb \
         ply stl pdf nii",
    ),
];

/// Maps a file ending to its format.
static FORMAT_OF: LazyLock<HashMap<&str, &str>> = LazyLock::new(|| {
    let each = FORMATS.iter().flat_map(|(format, endings)| endings.split_whitespace().map(|ending| (ending, *format)));
    each.collect()
});

/// The parts of a dataset's README.md header that describe its files.
#[derive(Debug, Default)]
pub struct Card {
    /// `configs`; may be empty.
    pub subsets: Vec<Subset>,
}

/// One of the `configs`, or the whole dataset if it has none.
#[derive(Debug, Default)]
pub struct Subset {
    /// `config_name`.
    pub name: String,
    default: bool,
    /// The folder that its patterns are relative to.
    folder: String,
    /// The patterns of each split; `None` derives them from the file names.
    patterns: Option<Vec<(String, Vec<String>)>>,
}

/// A split with its files.
#[derive(Debug)]
pub struct Split<'a> {
    /// Name of the split.
    pub name: String,
    /// Files, in reading order.
    pub files: Vec<&'a str>,
    /// Files that the README names but that do not exist.
    missing: Vec<String>,
}

/// Why a split was not found.
#[derive(Debug)]
pub enum Missing {
    /// The subset does not exist, or the config does not choose one; holds the known subsets.
    Subset(Vec<String>),
    /// The split does not exist; holds the known splits.
    Split(Vec<String>),
    /// The split has these unsupported files.
    Unreadable(Vec<String>),
    /// The README's header is invalid.
    Card(InputError),
}

impl Missing {
    /// Returns the error for `what`, a dataset or folder with these files, which the config names with `key`.
    pub fn refused(self, what: &str, key: &str, split: &str, subset: Option<&str>, files: &[&str]) -> InputError {
        let readable = format!("supported endings: .{}", ENDINGS.join(", ."));
        let nothing = !files.iter().any(|file| ending(file).is_some());
        match self {
            Missing::Card(error) => error,
            Missing::Subset(known) => {
                let found = match subset {
                    Some(subset) => format!("{what} has no subset `{subset}`"),
                    None => format!("{what} has several subsets"),
                };
                InputError::new(found).field("subset").help(match known.is_empty() {
                    true => "it has no subsets: remove `subset`".to_owned(),
                    false => format!("its subsets: {}", known.join(", ")),
                })
            }
            Missing::Split(known) if !known.is_empty() || !nothing => {
                let error = InputError::new(format!("{what} has no split `{split}`")).field("split");
                let near = nearest(split, known.iter().map(String::as_str));
                let near = near.map(|near| format!("did you mean `{near}`? ")).unwrap_or_default();
                let slice = match split.contains(['[', '+']) {
                    true => "slices and sums of splits are not supported; ",
                    false => "",
                };
                error.help(match known.is_empty() {
                    true => some_of(files),
                    false => format!("{slice}{near}its splits: {}", known.join(", ")),
                })
            }
            Missing::Unreadable(unreadable) if !nothing && !unreadable.is_empty() => {
                let unreadable: Vec<&str> = unreadable.iter().map(String::as_str).collect();
                InputError::new(format!("the split `{split}` of {what} has unsupported files"))
                    .field("split")
                    .help(format!("{}; {readable}", some_of(&unreadable)))
            }
            Missing::Split(_) | Missing::Unreadable(_) => InputError::new(format!("{what} has no supported files"))
                .field(key)
                .help(format!("{readable}; {}", some_of(files))),
        }
    }
}

/// Lists the first files of a dataset, for a message.
pub fn some_of(files: &[&str]) -> String {
    const SHOWN: usize = 8;
    let more = if files.len() > SHOWN { format!(" and {} more", files.len() - SHOWN) } else { String::new() };
    format!("it has {}{more}", files.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", "))
}

impl Card {
    /// Reads the header of README.md, and .huggingface.yaml, whose `configs` take precedence.
    pub fn read(readme: Option<&str>, own: Option<&str>) -> Result<Card, InputError> {
        let heads = [(".huggingface.yaml", own), ("README.md", readme.and_then(head))];
        for (file, yaml) in heads {
            let Some(yaml) = yaml else { continue };
            let refused = |what: String| InputError::new(format!("the dataset's {file} {what}"));
            let head: Value = match from_yaml(yaml) {
                Ok(head) => head,
                // A header without `configs` is irrelevant, even if it is invalid.
                Err(_) if !yaml.lines().any(|line| line.starts_with("configs:")) => continue,
                Err(error) => return Err(refused(format!("has an invalid YAML header: {}", error.message()))),
            };
            match head.get("configs") {
                None | Some(Value::Null) => continue,
                Some(Value::Array(configs)) => {
                    let subset = |(index, config)| subset(config, index).map_err(refused);
                    return Ok(Card { subsets: configs.iter().enumerate().map(subset).collect::<Result<_, _>>()? });
                }
                Some(other) => return Err(refused(format!("has `configs: {other}`, which is not a list"))),
            }
        }
        Ok(Card::default())
    }

    /// Returns the subset to read if the config names none.
    fn default_subset(&self) -> Result<Option<&Subset>, InputError> {
        if let [one] = &self.subsets[..] {
            return Ok(Some(one));
        }
        let mut defaults = self.subsets.iter().filter(|subset| subset.default || subset.name == "default");
        match (defaults.next(), defaults.next()) {
            (Some(one), Some(other)) => Err(InputError::new(format!(
                "the dataset's README.md has two default subsets, `{}` and `{}`",
                one.name, other.name
            ))
            .field("subset")
            .help("set `subset` to one of them")),
            (default, _) => Ok(default),
        }
    }
}

/// Returns the YAML header: the text between the first two lines of dashes.
fn head(readme: &str) -> Option<&str> {
    let text = readme.trim_start_matches('\u{feff}').trim_start().strip_prefix("---")?;
    let text = text.strip_prefix("\r\n").or_else(|| text.strip_prefix('\n'))?;
    let mut end = 0;
    for line in text.split_inclusive('\n') {
        if line.trim_end() == "---" {
            return Some(&text[..end]);
        }
        end += line.len();
    }
    None
}

/// Reads one of the `configs`. The error says what is wrong with it.
fn subset(config: &Value, index: usize) -> Result<Subset, String> {
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    let name = match config.get("config_name") {
        None => "default".to_owned(),
        Some(name) => {
            text(name).ok_or_else(|| format!("has `configs[{index}].config_name: {name}`, which is not a name"))?
        }
    };
    let folder = match config.get("data_dir") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(folder)) => folder.clone(),
        Some(other) => return Err(format!("has `configs[{index}].data_dir: {other}`, which is not a folder")),
    };
    let folder = folder.trim_start_matches("./").trim_matches('/');
    let patterns = match config.get("data_files") {
        None | Some(Value::Null) => None,
        Some(files) => Some(patterns(files).ok_or_else(|| {
            format!(
                "has `configs[{index}].data_files: {files}`, which is neither a pattern, nor a list of patterns, nor a list \
                 of `{{split, path}}` with each split once"
            )
        })?),
    };
    Ok(Subset {
        name,
        default: config.get("default").and_then(Value::as_bool).unwrap_or_default(),
        folder: if folder == "." { String::new() } else { folder.to_owned() },
        patterns,
    })
}

/// Returns the patterns of each split from any form of `data_files`; `None` if it is invalid.
fn patterns(files: &Value) -> Option<Vec<(String, Vec<String>)>> {
    let paths = |value: &Value| match value {
        Value::String(path) => Some(vec![path.clone()]),
        Value::Array(paths) => paths.iter().map(|path| path.as_str().map(str::to_owned)).collect(),
        _ => None,
    };
    let splits: Vec<(String, Vec<String>)> = match files {
        Value::Object(splits) => splits.iter().map(|(split, path)| Some((split.clone(), paths(path)?))).collect(),
        Value::Array(parts) if parts.iter().any(Value::is_object) => parts
            .iter()
            .map(|part| {
                let part = part.as_object().filter(|part| part.len() == 2)?;
                Some((part.get("split")?.as_str()?.to_owned(), paths(part.get("path")?)?))
            })
            .collect(),
        one => paths(one).map(|paths| vec![("train".to_owned(), paths)]),
    }?;
    let names: HashSet<&String> = splits.iter().map(|(split, _)| split).collect();
    (names.len() == splits.len()).then_some(splits)
}

/// Returns the files of a split, out of all files of a dataset. All of the returned files are supported.
pub fn find<'a>(files: &[&'a str], card: &Card, split: &str, subset: Option<&str>) -> Result<Vec<&'a str>, Missing> {
    let names = || card.subsets.iter().map(|subset| subset.name.clone()).collect();
    let whole;
    let subset = match subset {
        Some(name) if card.subsets.is_empty() => {
            whole = Subset { folder: name.trim_matches('/').to_owned(), ..Subset::default() };
            &whole
        }
        None if card.subsets.is_empty() => {
            whole = Subset::default();
            &whole
        }
        Some(name) => card.subsets.iter().find(|subset| subset.name == name).ok_or_else(|| Missing::Subset(names()))?,
        None => card.default_subset().map_err(Missing::Card)?.ok_or_else(|| Missing::Subset(names()))?,
    };
    if card.subsets.is_empty() && !files.iter().any(|file| below(file, &subset.folder).is_some()) {
        return Err(Missing::Subset(Vec::new()));
    }
    let splits = splits(files, subset).map_err(Missing::Card)?;
    let named = |name: &str| splits.iter().find(|split| split.name == name);
    let meant = KEYWORDS.iter().find(|(_, words)| words.contains(&split)).map(|(name, _)| *name);
    let Some(found) = named(split).or_else(|| named(meant?)) else {
        let known = splits.iter().filter(|split| !split.files.is_empty()).map(|split| split.name.clone());
        return Err(Missing::Split(known.collect()));
    };
    if let Some(missing) = found.missing.first() {
        let what =
            format!("the dataset's README.md names `{missing}` for `{}`, but that file does not exist", found.name);
        return Err(Missing::Card(InputError::new(what)));
    }
    let unreadable: Vec<String> =
        found.files.iter().filter(|file| ending(file).is_none()).map(|file| (*file).to_owned()).collect();
    if !unreadable.is_empty() || found.files.is_empty() {
        return Err(Missing::Unreadable(unreadable));
    }
    Ok(found.files.clone())
}

/// Returns a file's path relative to a folder, or `None` if it is elsewhere.
fn below<'a>(file: &'a str, folder: &str) -> Option<&'a str> {
    if folder.is_empty() {
        return Some(file);
    }
    file.strip_prefix(folder)?.strip_prefix('/')
}

/// Returns all splits of a subset; a split may have no files.
pub fn splits<'a>(files: &[&'a str], subset: &Subset) -> Result<Vec<Split<'a>>, InputError> {
    // Pairs of a file's path relative to the folder and its path in the dataset.
    let mut inside: Vec<(&'a str, &'a str)> =
        files.iter().filter_map(|file| Some((below(file, &subset.folder)?, *file))).collect();
    inside.sort_unstable();
    inside.retain(|(file, _)| is_data(file));
    let default;
    let patterns = match &subset.patterns {
        Some(patterns) => patterns,
        None => {
            default = default_patterns(&inside)?;
            &default
        }
    };
    let mut splits = Vec::new();
    for (name, patterns) in patterns {
        let mut split = Split { name: name.clone(), files: Vec::new(), missing: Vec::new() };
        let mut seen = HashSet::new();
        for pattern in patterns {
            let glob = Glob::new(pattern)?;
            let found: Vec<&str> =
                inside.iter().filter(|(file, _)| glob.matches(file)).map(|(_, file)| *file).collect();
            if found.is_empty() && glob.pattern.is_none() {
                split.missing.push(pattern.clone());
            }
            split.files.extend(found.into_iter().filter(|file| seen.insert(*file)));
        }
        if subset.patterns.is_none() {
            keep_one_format(&mut split.files);
        }
        splits.push(split);
    }
    Ok(splits)
}

/// True if a file name has an ending of a data format, possibly followed by a compression's. Media endings may be in
/// capitals, as cameras write them.
fn is_data(path: &str) -> bool {
    endings(path).any(|ending| {
        let capitals = || ending == ending.to_uppercase() && format_of(ending) == Some("media");
        FORMAT_OF.contains_key(ending) || capitals()
    })
}

/// Returns the format of an ending, ignoring case.
fn format_of(ending: &str) -> Option<&'static str> {
    FORMAT_OF.get(ending.to_lowercase().as_str()).copied()
}

fn endings(path: &str) -> impl Iterator<Item = &str> {
    name(path).split('.').skip(1)
}

fn name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

/// Returns the patterns of each split if the README has none: those of the first rule that finds data.
fn default_patterns(inside: &[(&str, &str)]) -> Result<Vec<(String, Vec<String>)>, InputError> {
    let mut sharded: Vec<&str> = inside.iter().filter_map(|(file, _)| split_of_shard(file)).collect();
    if !sharded.is_empty() {
        sharded.sort_unstable();
        sharded.dedup();
        let rank = |split: &str| KEYWORDS.iter().position(|(name, _)| *name == split).unwrap_or(KEYWORDS.len());
        sharded.sort_by_key(|split| rank(split));
        let number = "[0-9]".repeat(5);
        let pattern = |split| format!("data/{}-{number}-of-{number}*.*", Pattern::escape(split));
        return Ok(sharded.into_iter().map(|split| (split.to_owned(), vec![pattern(split)])).collect());
    }
    let folders = |word: &&str| {
        let sep = SEPARATORS;
        [
            format!("**/{word}/**"),
            format!("**/{word}{sep}*/**"),
            format!("**/*{sep}{word}/**"),
            format!("**/*{sep}{word}{sep}*/**"),
        ]
    };
    let names = |word: &&str| [format!("**/{word}{SEPARATORS}*"), format!("**/*{SEPARATORS}{word}{SEPARATORS}*")];
    let by = |of: &dyn Fn(&&str) -> Vec<String>| -> Vec<(String, Vec<String>)> {
        KEYWORDS.iter().map(|(split, words)| ((*split).to_owned(), words.iter().flat_map(of).collect())).collect()
    };
    let rules = [
        vec![("logs".to_owned(), vec!["**/*.eval".to_owned()])],
        by(&|word| folders(word).to_vec()),
        by(&|word| names(word).to_vec()),
    ];
    for mut rule in rules {
        let mut found = Vec::new();
        for (split, patterns) in rule.drain(..) {
            let globs = patterns.iter().map(|pattern| Glob::new(pattern)).collect::<Result<Vec<_>, _>>()?;
            if globs.iter().any(|glob| inside.iter().any(|(file, _)| glob.matches(file))) {
                found.push((split, patterns));
            }
        }
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(vec![("train".to_owned(), vec!["**".to_owned()])])
}

/// Returns the split that a shard's name starts with: `train_sft` in `data/train_sft-00000-of-00002.parquet`.
fn split_of_shard(file: &str) -> Option<&str> {
    const SHAPE: &[u8] = b"-00000-of-00000";
    let name = file.strip_prefix("data/").filter(|name| !name.contains('/') && !name.starts_with('.'))?;
    let bytes = name.as_bytes();
    let is_shape = |bytes: &[u8]| {
        bytes.len() == SHAPE.len()
            && bytes.iter().zip(SHAPE).all(|(byte, shape)| match shape {
                b'0' => byte.is_ascii_digit(),
                shape => byte == shape,
            })
    };
    let at = (1..bytes.len()).rev().find(|at| bytes.get(*at..at + SHAPE.len()).is_some_and(is_shape))?;
    bytes[at + SHAPE.len()..].contains(&b'.').then(|| &name[..at])
}

/// Keeps only the files of the most common format. Ties go to parquet, then to the others in the order of `datasets`.
fn keep_one_format(files: &mut Vec<&str>) {
    let mut counts: BTreeMap<(String, bool), usize> = BTreeMap::new();
    for file in files.iter() {
        let describes = MEDIA_METADATA.contains(&name(file));
        for ending in endings(file) {
            *counts.entry((ending.to_lowercase(), describes)).or_default() += 1;
        }
    }
    const PREFERRED: [&str; 6] = ["parquet", "lance", "arrow", "jsonl", "json", "csv"];
    let known = counts.into_iter().filter(|((ending, _), _)| format_of(ending).is_some());
    let first = known.max_by_key(|((ending, describes), count)| {
        let preferred = PREFERRED.iter().rev().position(|preferred| preferred == ending).map(|rank| rank + 1);
        (!describes, *count, preferred, ending.clone())
    });
    let Some(format) = first.and_then(|((ending, _), _)| format_of(&ending)) else { return };
    files.retain(|file| {
        let belongs = |ending: &str| format_of(ending).is_some_and(|of| of == format || of == "zip");
        endings(file).any(belongs) || (format == "media" && MEDIA_METADATA.contains(&name(file)))
    });
}

/// A pattern of `data_files` or `files`. `*` and `?` match within a name, `**` matches any folders. Hidden files, files
/// in a `__folder__` and metadata files only match patterns that name them explicitly.
pub struct Glob {
    /// `None` if the text is a plain path.
    pattern: Option<Pattern>,
    text: String,
}

impl Glob {
    /// Parses a pattern.
    pub fn new(text: &str) -> Result<Glob, InputError> {
        let text = text.trim_start_matches("./").to_owned();
        let magic = text.contains(['*', '?', '[']);
        let pattern = magic.then(|| Pattern::new(&text)).transpose();
        let pattern = pattern.map_err(|error| InputError::new(format!("`{text}` is not a glob: {error}")))?;
        Ok(Glob { pattern, text })
    }

    /// True if the pattern matches a path.
    pub fn matches(&self, path: &str) -> bool {
        let options = MatchOptions { require_literal_separator: true, ..MatchOptions::new() };
        let matched = match &self.pattern {
            Some(pattern) => pattern.matches_with(path, options),
            None => self.text == path,
        };
        matched
            && hidden(path) == hidden(&self.text)
            && special(path) == special(&self.text)
            && (!METADATA.contains(&name(path)) || name(path) == name(&self.text))
    }
}

/// Returns the number of hidden parts of a path.
fn hidden(path: &str) -> usize {
    path.split('/').filter(|part| part.starts_with('.') && part.chars().any(|c| c != '.')).count()
}

/// Returns the number of `__special__` folders of a path.
fn special(path: &str) -> usize {
    path.rsplit_once('/').map_or(0, |(folders, _)| folders.split('/').filter(|part| part.starts_with("__")).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Value {
        serde_json::from_str(include_str!("../../../tests/fixtures/datasets/layouts.json")).unwrap()
    }

    fn strings(value: &Value) -> Vec<&str> {
        value.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
    }

    /// Returns every split of a layout by name, as this crate resolves it, or its error.
    fn resolved(layout: &Value) -> Result<BTreeMap<String, Vec<String>>, String> {
        let own = layout["text"].get(".huggingface.yaml").and_then(Value::as_str);
        let card = Card::read(layout["readme"].as_str(), own).map_err(|error| error.message().to_owned())?;
        let files = strings(&layout["files"]);
        let whole;
        let subset = match (layout["subset"].as_str(), layout["data_dir"].as_str()) {
            (None, Some(folder)) => {
                whole = Subset { folder: folder.to_owned(), ..Subset::default() };
                Some(&whole)
            }
            (Some(name), _) => card.subsets.iter().find(|subset| subset.name == name),
            (None, None) if card.subsets.is_empty() => {
                whole = Subset::default();
                Some(&whole)
            }
            (None, None) => card.default_subset().map_err(|error| error.message().to_owned())?,
        };
        let subset = subset.ok_or("no subset")?;
        let splits = splits(&files, subset).map_err(|error| error.message().to_owned())?;
        if let Some(missing) = splits.iter().flat_map(|split| &split.missing).next() {
            return Err(format!("`{missing}` is missing"));
        }
        let splits = splits.into_iter().filter(|split| !split.files.is_empty());
        let splits: BTreeMap<_, _> =
            splits.map(|split| (split.name, split.files.into_iter().map(str::to_owned).collect())).collect();
        if splits.is_empty() { Err("no data".to_owned()) } else { Ok(splits) }
    }

    #[test]
    fn splits_equal_those_of_hugging_face_datasets() {
        let table = table();
        let mut compared = 0;
        for layout in table["layouts"].as_array().unwrap().iter().filter(|layout| layout.get("splits").is_some()) {
            let expected: BTreeMap<String, Vec<String>> = layout["splits"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(split, files)| {
                    let mut seen = HashSet::new();
                    let once = strings(files).into_iter().filter(|file| seen.insert(*file)).map(str::to_owned);
                    (split.clone(), once.collect())
                })
                .collect();
            assert_eq!(resolved(layout), Ok(expected), "{}", layout["name"]);
            compared += 1;
        }
        assert!(compared >= 60, "{compared}");
    }

    #[test]
    fn layouts_that_hugging_face_datasets_refuses_are_refused_or_unambiguous() {
        let table = table();
        let mut said = Vec::new();
        for layout in table["layouts"].as_array().unwrap().iter().filter(|layout| layout.get("error").is_some()) {
            let name = layout["name"].as_str().unwrap();
            said.push(match resolved(layout) {
                Ok(splits) => format!("{name}: {}", serde_json::json!(splits)),
                Err(error) => format!("{name}: {error}"),
            });
        }
        let no_data_files =
            "neither a pattern, nor a list of patterns, nor a list of `{split, path}` with each split once";
        let expected = [
            // Split names that `datasets` does not accept.
            r#"shards of a split with a dash: {"my-split":["data/my-split-00000-of-00001.parquet"]}"#,
            r#"shards of two numbers: {"a-00000-of-00001":["data/a-00000-of-00001-00000-of-00002.parquet"]}"#,
            // Files that are not data.
            r#"folders, one without data: {"train":["train/a.jsonl"]}"#,
            r#"other files: {"train":["a.jsonl"]}"#,
            "nothing: no data",
            r#"formats of different splits: {"test":["test.jsonl"],"train":["train.parquet"]}"#,
            r#"head: a dict: {"test":["b.jsonl"],"train":["a.jsonl"]}"#,
            r#"head: a bad split name: {"my-split":["a.jsonl"]}"#,
            &format!("head: a split twice: {no_data_files}"),
            &format!("head: a key too many: {no_data_files}"),
            "head: two subsets, none asked for: no subset",
            "head: two defaults: the dataset's README.md has two default subsets, `a` and `b`",
            "head: an unknown subset: no subset",
            "head: stars within a name: recursive wildcards must form a single path component",
            "head: a file that is not there: `b.jsonl` is missing",
            r#"head: a pattern without files: {"train":["a.jsonl"]}"#,
            "head: a name of a folder: `x` is missing",
            "a subset that is nowhere: no subset",
        ];
        assert_eq!(said.len(), expected.len(), "{said:?}");
        for (said, expected) in said.iter().zip(expected) {
            let (name, what) = expected.rsplit_once(": ").unwrap();
            assert!(said.starts_with(name) && said.ends_with(what), "{said}, expected {expected}");
        }
    }

    #[test]
    fn formats_equal_those_of_hugging_face_datasets() {
        let table = table();
        for (module, endings) in table["extensions"].as_object().unwrap() {
            for ending in strings(endings) {
                let format = format_of(ending);
                let media = module.ends_with("folder").then_some("media");
                assert_eq!(format, Some(media.unwrap_or(module)), "{ending}");
                assert!(is_data(&format!("x.{ending}")), "{ending}");
            }
        }
        assert_eq!(table["metadata"], serde_json::json!(MEDIA_METADATA));
        assert!(!is_data("a.py") && !is_data("a") && !is_data("a.JSONL") && !is_data("x.jsonl/a"));
    }

    #[test]
    fn the_error_of_an_unknown_split_or_subset_lists_the_known_ones() {
        let files = ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"];
        let found = |split, subset| find(&files, &Card::default(), split, subset);
        assert_eq!(found("train_sft", None).unwrap(), files[..1]);
        let Err(Missing::Split(known)) = found("train", None) else { panic!("train was found") };
        assert_eq!(known, ["test_sft", "train_sft"]);
        assert!(matches!(found("train", Some("en")), Err(Missing::Subset(known)) if known.is_empty()));
        // A synonym of the split's name.
        let files = ["val.jsonl", "train.jsonl"];
        assert_eq!(find(&files, &Card::default(), "dev", None).unwrap(), ["val.jsonl"]);
    }

    #[test]
    fn missing_or_unsupported_files_of_a_split_are_errors() {
        let files = ["train-0.jsonl", "train-1.jsonl.bz2", "train-2.zip"];
        let Err(Missing::Unreadable(files)) = find(&files, &Card::default(), "train", None) else { panic!("found") };
        assert_eq!(files, ["train-1.jsonl.bz2", "train-2.zip"]);
        let readme = "---\nconfigs:\n- {config_name: a, data_files: [a.jsonl, b.jsonl]}\n---\n";
        let card = Card::read(Some(readme), None).unwrap();
        let Err(Missing::Card(error)) = find(&["a.jsonl"], &card, "train", None) else { panic!("found") };
        assert!(error.message().contains("names `b.jsonl`"), "{}", error.message());
    }

    #[test]
    fn an_invalid_header_is_an_error_only_if_it_has_configs() {
        let bad = |yaml: &str| Card::read(Some(&format!("---\n{yaml}\n---\n")), None);
        assert!(bad("license: [mit").unwrap().subsets.is_empty());
        for yaml in
            ["configs: [", "configs: 3", "configs:\n- {config_name: [1]}", "configs:\n- {data_files: {split: 3}}"]
        {
            let error = bad(yaml).unwrap_err();
            assert!(error.message().starts_with("the dataset's README.md has"), "{}", error.message());
        }
    }
}
