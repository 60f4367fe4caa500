//! Merges the layers of a config: `include:` files, the file, its profile, variables, `--set`.
//!
//! figment merges them and records which layer each value came from. Two rules are ours: a layer that changes a map's
//! `type` replaces the map, and variables and `--set` address list items by index.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use figment::value::{Dict, Empty, Map, Num, Tag, Value};
use figment::{Figment, Metadata, Profile, Provider};

use saphyr::{LoadableYamlNode, MarkedYaml};

use super::RunConfig;
use dictlearn_core::error::{InputError, Mistakes, Origin};
use dictlearn_core::files;
use dictlearn_core::files::{Origins, yaml};
use dictlearn_core::registry::{ComponentKind, defaults};
use dictlearn_core::suggest::nearest;

/// The inputs of a config.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The config file.
    pub file: PathBuf,
    /// The profile to apply.
    pub profile: Option<String>,
    /// `--set KEY=VALUE`, in order.
    pub set: Vec<String>,
    /// The `DICTLEARN_*` variables and their values.
    pub variables: Vec<(String, String)>,
    /// Build the valid parts even if some keys are wrong, to report their mistakes too.
    pub builds_rest: bool,
    /// Apply overrides of `source` to `eval_source` too, if the files have one.
    pub eval_follows: bool,
}

const PREFIX: &str = "DICTLEARN_";
/// Maximum number of files of a config, included ones among them: branching includes grow exponentially.
const MOST_FILES: usize = 100;
/// Name prefixes of variables that belong to tools and tests.
const TOOLS: [&str; 5] = ["CACHE", "BENCH_", "FUZZ_", "SOAK_", "TEST_"];

/// Returns the `DICTLEARN_*` variables of this process that may set config keys.
pub fn variables() -> Vec<(String, String)> {
    let tools = |name: &str| TOOLS.iter().any(|tool| name.starts_with(tool));
    let own = |name: &str| name.strip_prefix(PREFIX).is_some_and(|name| !tools(name));
    let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    let mut found: Vec<(String, String)> = std::env::vars_os().filter_map(text).filter(|(name, _)| own(name)).collect();
    found.sort();
    found
}

/// One layer.
struct Layer {
    origin: Origin,
    /// The text of a file, to find positions in.
    text: String,
    /// For a profile: the path of its keys within the file.
    inside: Option<String>,
    data: Dict,
}

/// The merged config and where each value came from.
pub(super) struct Merged {
    pub(super) value: Value,
    figment: Figment,
    layers: Vec<(Origin, String, Option<String>)>,
    /// Warnings about variables that match no config key.
    pub(super) ignored: Vec<String>,
}

struct LayerProvider<'a>(usize, &'a Dict);

impl Provider for LayerProvider<'_> {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.0.to_string())
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        Ok(Map::from([(Profile::Default, self.1.clone())]))
    }
}

impl Merged {
    /// No layers, for values that come from code.
    pub(super) fn of_code() -> Self {
        Merged { value: Value::from(Dict::new()), figment: Figment::new(), layers: Vec::new(), ignored: Vec::new() }
    }

    /// Merges the layers. Returns `None` if a file cannot be read.
    pub(super) fn load(sources: &Sources, mistakes: &mut Mistakes) -> Option<Self> {
        let mut files = Files { profile: sources.profile.as_deref(), ..Files::default() };
        files.read(&sources.file, mistakes);
        let whole = mistakes.is_empty();
        if let (Some(name), true, true) = (&sources.profile, files.profiles.is_empty(), whole) {
            let near = nearest(name, files.known.iter().map(String::as_str));
            let near = near.map(|near| format!("did you mean `{near}`? "));
            let help = if files.known.is_empty() {
                "it has none; define profiles under `profiles:`".to_owned()
            } else {
                format!("{}it has: {}", near.unwrap_or_default(), files.known.join(", "))
            };
            mistakes.add(InputError::new(format!("{} has no profile `{name}`", sources.file.display())).help(help));
        }
        let mut layers: Vec<Layer> = files.base.into_iter().chain(files.profiles).collect();

        // Overrides reach into lists, so they wait until the lists are merged.
        let (mut overrides, mut ignored) = (Vec::new(), Vec::new());
        let mut parsed = |origin: Origin, key: String, text: &str| match parse_override(&origin, &key, text) {
            Ok(value) => overrides.push((origin, key, value)),
            Err(error) => mistakes.add(error),
        };
        let known = if sources.variables.is_empty() { Vec::new() } else { known_keys() };
        for (name, text) in &sources.variables {
            let key = name.trim_start_matches(PREFIX).to_lowercase().replace("__", ".");
            let first = key.split('.').next().unwrap_or_default();
            if key.split('.').any(str::is_empty) || !known.iter().any(|known| known == first) {
                ignored.push(unknown_variable(name, 0, known.iter().map(String::as_str)));
                continue;
            }
            parsed(Origin::Variable(name.clone()), key, text);
        }
        let mut without_value = Vec::new();
        for set in &sources.set {
            match set.split_once('=') {
                Some((key, text)) => parsed(Origin::Set(set.clone()), key.trim().to_owned(), text),
                None => without_value.push(set),
            }
        }
        for set in without_value {
            mistakes.add(
                InputError::new(format!("`--set {set}` has no value"))
                    .help("write --set KEY=VALUE, for example --set saes[0].trainer.lr=1e-4"),
            );
        }
        if !whole {
            return None;
        }

        for upper in 1..layers.len() {
            let (below, above) = layers.split_at_mut(upper);
            below.iter_mut().for_each(|layer| drop_other_types(&mut layer.data, &above[0].data));
        }
        let mut figment = Figment::new();
        for (index, layer) in layers.iter().enumerate() {
            figment = figment.merge(LayerProvider(index, &layer.data));
        }
        let mut root = merged(&figment);
        if sources.eval_follows && root.contains_key("eval_source") {
            overrides = followed(overrides);
        }
        for (origin, key, value) in overrides {
            // figment gives the value its tag; we find its place in the tree, since figment cannot index lists.
            // The temporary key is unique: figment would merge a map into an existing one.
            let own = format!("{OVERRIDE}{}", layers.len());
            figment = figment.merge(LayerProvider(layers.len(), &Dict::from([(own.clone(), value)])));
            let value = figment.find_value(&own).unwrap_or_else(|_| Value::from(Dict::new()));
            if let Err(error) = set(&mut root, &origin, &key, value) {
                mistakes.add(error);
            }
            layers.push(Layer { origin, text: String::new(), inside: None, data: Dict::new() });
        }
        let value = Value::from(root);
        let layers = layers.into_iter().map(|layer| (layer.origin, layer.text, layer.inside)).collect();
        Some(Merged { value, figment, layers, ignored })
    }

    /// Returns the variables that set a value of this config, as `DICTLEARN_SEED=7`.
    pub(super) fn environment_that_acts(&self, root: &Value, variables: &[(String, String)]) -> Vec<String> {
        let mut acting = BTreeSet::new();
        self.acting(root, &mut acting);
        let acts = |name: &String| acting.contains(name.as_str());
        variables.iter().filter(|(name, _)| acts(name)).map(|(name, text)| format!("{name}={text}")).collect()
    }

    /// Collects the names of the variables that values come from.
    fn acting<'a>(&'a self, value: &Value, names: &mut BTreeSet<&'a str>) {
        if let Some((Origin::Variable(name), ..)) = self.origin(value.tag()) {
            names.insert(name);
        }
        match value {
            Value::Array(_, items) => items.iter().for_each(|item| self.acting(item, names)),
            Value::Dict(_, dict) => dict.values().for_each(|value| self.acting(value, names)),
            _ => {}
        }
    }

    /// Returns a value's origin, the text of its file, and the profile's path if it comes from a profile.
    pub(super) fn origin(&self, tag: Tag) -> Option<(&Origin, &str, Option<&str>)> {
        let index: usize = self.figment.get_metadata(tag)?.name.parse().ok()?;
        let (origin, text, inside) = self.layers.get(index)?;
        Some((origin, text, inside.as_deref()))
    }

    /// Returns the main config file and its text.
    pub(super) fn main_file(&self) -> Option<(&Origin, &str)> {
        let asked = |origin: &Origin, inside: &Option<String>| matches!(origin, Origin::File(..)) && inside.is_none();
        let (origin, text, _) = self.layers.iter().rfind(|(origin, _, inside)| asked(origin, inside))?;
        Some((origin, text))
    }
}

impl Origins for Merged {
    fn folder(&self, tag: Tag) -> PathBuf {
        match self.origin(tag) {
            Some((Origin::File(file, _), ..)) => file.parent().map(Path::to_owned).unwrap_or_default(),
            _ => PathBuf::new(),
        }
    }
}

type Override = (Origin, String, Value);

/// Copies overrides of `source` to `eval_source`. Those of `eval_source` itself come later and win.
fn followed(overrides: Vec<Override>) -> Vec<Override> {
    let of_source = |key: &str| {
        let rest = key.trim().strip_prefix("source").map(str::trim_start);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    let (variables, set): (Vec<_>, Vec<_>) =
        overrides.into_iter().partition(|(origin, ..)| matches!(origin, Origin::Variable(_)));
    let with_copies = |own: Vec<Override>| {
        let copies: Vec<Override> = own
            .iter()
            .filter(|(_, key, _)| of_source(key))
            .map(|(origin, key, value)| (origin.clone(), format!("eval_{}", key.trim()), value.clone()))
            .collect();
        copies.into_iter().chain(own)
    };
    with_copies(variables).chain(with_copies(set)).collect()
}

/// Keys that only a file may have.
const FILE_ONLY: [&str; 2] = ["include", "profiles"];

/// Returns the config keys that variables can set.
fn known_keys() -> Vec<String> {
    let schema = schemars::schema_for!(RunConfig);
    let properties = schema.get("properties").and_then(|properties| properties.as_object());
    properties.into_iter().flatten().map(|(key, _)| key.clone()).collect()
}

/// Returns the warning about a variable that matches no config key, because its part at index `part` is not in `known`.
pub(super) fn unknown_variable<'a>(name: &str, part: usize, known: impl IntoIterator<Item = &'a str>) -> String {
    let mut parts: Vec<String> = name.trim_start_matches(PREFIX).split("__").map(str::to_owned).collect();
    let near = parts.get(part).and_then(|part| nearest(part, known)).map(str::to_uppercase);
    let near = near.map(|near| {
        parts[part] = near;
        format!("; did you mean {PREFIX}{}?", parts.join("__"))
    });
    format!("{name} matches no config key and is ignored{}", near.unwrap_or_default())
}

fn merged(figment: &Figment) -> Dict {
    figment.find_value("").ok().and_then(Value::into_dict).unwrap_or_default()
}

/// Removes from `below` the maps whose `type` changes in `above`.
fn drop_other_types(below: &mut Dict, above: &Dict) {
    for (key, new) in above {
        let Some(new) = new.as_dict() else { continue };
        let Some(old) = below.get_mut(key) else { continue };
        let Value::Dict(_, old) = old else { continue };
        let name = |dict: &Dict| dict.get("type").and_then(Value::as_str).map(str::to_owned);
        match (name(old), name(new)) {
            (Some(before), Some(now)) if before != now => {
                below.remove(key);
            }
            _ => drop_other_types(old, new),
        }
    }
}

/// Prefix of the temporary key under which figment merges an override.
const OVERRIDE: &str = "__override";

fn parse_override(origin: &Origin, key: &str, text: &str) -> Result<Value, InputError> {
    let value = yaml::parse(text).map_err(|error| {
        if let Some(wrong) = out_of_range(&error, key) {
            let key = wrong.key().to_owned();
            return wrong.at(origin.clone(), key);
        }
        let (what, help, _) = not_yaml(&error, text);
        InputError::new(format!("`{text}` is not YAML: {what}")).help(help).at(origin.clone(), key)
    })?;
    let refused = |message: String| InputError::new(message).help("use plain YAML").at(origin.clone(), key);
    from_yaml(value, &refused)
}

/// Sets one key, given as `saes[1].trainer.lr`, `saes.1.trainer.lr` or `saes.NAME.trainer.lr`.
fn set(root: &mut Dict, origin: &Origin, key: &str, value: Value) -> Result<(), InputError> {
    let refused = |message: String, help: String| InputError::new(message).help(help).at(origin.clone(), key);
    let steps = key.replace('[', ".").replace(']', "");
    let steps: Vec<&str> = steps.split('.').collect();
    if steps.iter().any(|step| step.is_empty()) {
        return Err(refused(
            format!("`{key}` is not a key"),
            "keys look like `steps`, `source.ctx_len` or `saes[0].trainer.lr`".to_owned(),
        ));
    }
    if FILE_ONLY.contains(&steps[0]) {
        return Err(refused(
            format!("`{}` can only be set in a file", steps[0]),
            "write it in the config file".to_owned(),
        ));
    }
    // Maps created on the way get the override's tag, so that errors about them point to it.
    let tag = value.tag();
    let map = || Value::Dict(tag, Dict::new());
    if let (false, Some(index)) =
        (root.contains_key(steps[0]), steps.get(1).filter(|step| step.parse::<usize>().is_ok()))
    {
        let item = match steps[0] {
            "metrics" => example(ComponentKind::Metric),
            "loggers" => example(ComponentKind::Logger),
            _ => "...".to_owned(),
        };
        return Err(refused(
            format!("`{}` has no item `{index}`", steps[0]),
            format!("the config has no `{0}`: give the whole list, `{0}=[{item}]`", steps[0]),
        ));
    }
    let mut here = root.entry(steps[0].to_owned()).or_insert_with(map);
    for (at, step) in steps.iter().enumerate().skip(1) {
        here = match here {
            Value::Array(_, items) => {
                let named = |item: &Value| item.find_ref("name").and_then(Value::as_str) == Some(*step);
                let index = step.parse().ok().or_else(|| items.iter().position(named));
                let count = items.len();
                let Some(item) = index.and_then(|index: usize| items.get_mut(index)) else {
                    let list = steps[..at].join(".");
                    return Err(refused(
                        format!("`{list}` has no item `{step}`"),
                        format!("it has {count} items, counted from 0"),
                    ));
                };
                item
            }
            Value::Dict(_, dict) => {
                let last = at + 1 == steps.len();
                if last && *step == "type" && dict.get("type").and_then(Value::as_str) != value.as_str() {
                    dict.clear();
                }
                dict.entry((*step).to_owned()).or_insert_with(map)
            }
            other => {
                *other = map();
                let Value::Dict(_, dict) = other else { unreachable!("just made") };
                dict.entry((*step).to_owned()).or_insert_with(map)
            }
        };
    }
    *here = value;
    Ok(())
}

/// Returns a default component of a kind as a config names it.
pub(super) fn example(kind: ComponentKind) -> String {
    defaults(kind).next().map_or_else(|| "...".to_owned(), |name| format!("{{type: {name}}}"))
}

/// The files of a config and their layers.
#[derive(Default)]
struct Files<'a> {
    /// The requested profile.
    profile: Option<&'a str>,
    /// The chain of includes down to the file being read.
    including: Vec<PathBuf>,
    base: Vec<Layer>,
    profiles: Vec<Layer>,
    /// The names of all profiles.
    known: Vec<String>,
}

impl Files<'_> {
    /// Reads a file's layers: included files, then its own, and the requested profile if it has it.
    fn read(&mut self, path: &Path, mistakes: &mut Mistakes) {
        let (origin, text, mut data) = match read_map(path) {
            Ok(read) => read,
            Err(error) => return mistakes.add(error),
        };
        let includes = match data.remove("include") {
            None => Vec::new(),
            Some(Value::String(_, one)) => vec![one],
            Some(Value::Array(_, items)) if items.iter().all(|item| item.as_str().is_some()) => {
                items.into_iter().filter_map(Value::into_string).collect()
            }
            Some(_) => {
                mistakes.add(
                    InputError::new("`include` is neither a path nor a list of paths")
                        .help("write `include: base.yaml` or `include: [a.yaml, b.yaml]`")
                        .at(super::spans::locate(&origin, &text, "include", false), "include"),
                );
                Vec::new()
            }
        };
        let own = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        self.including.push(own);
        for include in includes {
            let file = path.parent().unwrap_or(Path::new("")).join(&include);
            let place = super::spans::locate(&origin, &text, "include", false);
            let canonical = std::fs::canonicalize(&file).unwrap_or_else(|_| file.clone());
            let wrong = if self.including.contains(&canonical) {
                InputError::new(format!("`{include}` includes itself"))
            } else if !file.is_file() {
                InputError::no_file(&file)
            } else if self.including.len() + self.base.len() >= MOST_FILES {
                // Stop here: each further file might include as many.
                mistakes.add(
                    InputError::new(format!("the config includes more than {MOST_FILES} files")).at(place, "include"),
                );
                break;
            } else {
                self.read(&file, mistakes);
                continue;
            };
            mistakes.add(wrong.at(place, "include"));
        }
        self.including.pop();

        match data.remove("profiles") {
            None => {}
            Some(Value::Dict(_, own)) => {
                self.known.extend(own.keys().cloned());
                for (name, overlay) in own {
                    if let (true, Some(data)) = (Some(name.as_str()) == self.profile, overlay.into_dict()) {
                        let inside = Some(format!("profiles.{name}"));
                        self.profiles.push(Layer { origin: origin.clone(), text: text.clone(), inside, data });
                    }
                }
            }
            Some(_) => mistakes.add(
                InputError::new("`profiles` is not a map")
                    .help("map each profile's name to its keys: `profiles: {quick: {steps: 100}}`")
                    .at(super::spans::locate(&origin, &text, "profiles", false), "profiles"),
            ),
        }
        self.base.push(Layer { origin, text, inside: None, data });
    }
}

/// Returns a file's origin, text and keys.
fn read_map(path: &Path) -> Result<(Origin, String, Dict), InputError> {
    let origin = Origin::File(path.to_owned(), None);
    let text = read_text(path)?;
    let at = |location: Option<serde_yaml::Location>| location.map(|location| (location.line(), location.column()));
    let mut parsed: serde_yaml::Value = yaml::parse(&text).map_err(|error| {
        if let Some(wrong) = out_of_range(&error, "") {
            let key = wrong.key().to_owned();
            let written = super::spans::locate(&origin, &text, &key, false);
            return wrong.at(written, key);
        }
        let (what, help, place) = not_yaml(&error, &text);
        let place = place.or(at(error.location()));
        InputError::new(format!("not YAML: {what}")).help(help).at(Origin::File(path.to_owned(), place), "")
    })?;
    // `<<: *base` inserts the keys of another map.
    parsed.apply_merge().map_err(|error| InputError::new(format!("not YAML: {error}")).at(origin.clone(), ""))?;
    let refused = |what| InputError::new(what).at(origin.clone(), "");
    match from_yaml(parsed, &refused)? {
        Value::Dict(_, dict) => Ok((origin, text, dict)),
        Value::Empty(..) => Err(refused(format!("{} is empty", path.display())).help("a config needs a `source`")),
        _ => Err(refused("the config is not a map of keys and values".to_owned()).help("start with `source:`")),
    }
}

/// Returns the error about a whole number that fits neither 64-bit type, in the YAML of the key `outer`.
fn out_of_range(error: &serde_yaml::Error, outer: &str) -> Option<InputError> {
    let message = error.to_string();
    let (before, after) = message.split_once("invalid type: integer `")?;
    let (number, _) = after.split_once("` as ").filter(|(_, after)| after.starts_with(['u', 'i']))?;
    let inner = before.trim_end_matches([':', ' ']);
    let joint = if outer.is_empty() || inner.is_empty() || inner.starts_with('[') { "" } else { "." };
    let key = format!("{outer}{joint}{inner}");
    let help = format!("whole numbers must be between {} and {}; quote it if it is text", i64::MIN, u64::MAX);
    Some(InputError::new(format!("`{key}` is {number}, which is out of range")).field(key).help(help))
}

/// Returns what is wrong with invalid YAML, how to fix it, and its place if the parser reports another.
fn not_yaml(error: &serde_yaml::Error, text: &str) -> (String, &'static str, Option<(usize, usize)>) {
    let message = error.to_string();
    let plain = message.split(" at line ").next().unwrap_or(&message).to_owned();
    if let Some(key) = plain.split("duplicate entry with key ").nth(1) {
        // serde_yaml reports where the map begins, saphyr where the key is repeated.
        let marker = MarkedYaml::load_from_str(text).err().map(|error| *error.marker());
        let place = marker.map(|marker| (marker.line(), marker.col() + 1));
        return (format!("`{}` is given twice", key.trim_matches('"')), "keep one of the two", place);
    }
    let Some(location) = error.location() else { return (plain, "check indentation, quotes and colons", None) };
    if plain.contains("tab character") || plain.contains("cannot start any token") {
        // The parser reports the tab, the start of its line, or the end of the block before it.
        let tab = |line: usize| {
            let line = text.lines().nth(line)?;
            line[..line.len() - line.trim_start().len()].find('\t')
        };
        let here = location.line().saturating_sub(1);
        let lines = if plain.contains("tab character") { here..text.lines().count() } else { here..here + 1 };
        if let Some((line, tab)) = lines.into_iter().find_map(|line| Some((line, tab(line)?))) {
            let place = Some((line + 1, tab + 1));
            return ("a tab in the indentation".to_owned(), "indent with spaces: YAML allows no tabs there", place);
        }
    }
    let line = text.lines().nth(location.line().saturating_sub(1)).unwrap_or_default();
    let found = line.chars().nth(location.column().saturating_sub(1));
    let help = if plain.contains("mapping values are not allowed") {
        "quote a value that has a colon followed by a space, and check the indentation"
    } else if plain.contains("alphabetic or numeric character") || plain.contains("unknown anchor") {
        "quote a value that starts with `*` or `&`: \"*.jsonl\""
    } else if plain.contains("cannot start any token") && matches!(found, Some('@' | '`' | '%')) {
        "quote a value that starts with `@`, `%` or a backtick"
    } else {
        "check indentation, quotes and colons there"
    };
    (plain, help, None)
}

fn read_text(path: &Path) -> Result<String, InputError> {
    if path.is_dir() {
        return Err(InputError::new(format!("{} is a folder", path.display())).help("give the config file in it"));
    }
    let text = files::read_text(path)?;
    // Windows editors may start a file with a byte order mark.
    Ok(text.strip_prefix('\u{feff}').map_or(text.clone(), str::to_owned))
}

/// Converts a YAML value to figment's.
fn from_yaml(value: serde_yaml::Value, refused: &dyn Fn(String) -> InputError) -> Result<Value, InputError> {
    let tag = Tag::Default;
    Ok(match value {
        serde_yaml::Value::Null => Value::Empty(tag, Empty::None),
        serde_yaml::Value::Bool(flag) => Value::Bool(tag, flag),
        serde_yaml::Value::String(text) => Value::String(tag, text),
        serde_yaml::Value::Number(number) => Value::Num(
            tag,
            match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => Num::U64(number),
                (_, Some(number)) => Num::I64(number),
                _ => Num::F64(number.as_f64().unwrap_or(f64::NAN)),
            },
        ),
        serde_yaml::Value::Sequence(items) => {
            Value::Array(tag, items.into_iter().map(|item| from_yaml(item, refused)).collect::<Result<_, _>>()?)
        }
        serde_yaml::Value::Mapping(entries) => {
            let mut dict = Dict::new();
            for (key, value) in entries {
                let key = match key {
                    serde_yaml::Value::String(key) => key,
                    serde_yaml::Value::Number(number) => number.to_string(),
                    other => return Err(refused(format!("a key must be a name, not {other:?}"))),
                };
                dict.insert(key, from_yaml(value, refused)?);
            }
            Value::Dict(tag, dict)
        }
        serde_yaml::Value::Tagged(tagged) => {
            return Err(refused(format!("the YAML tag {} is not supported", tagged.tag)));
        }
    })
}
