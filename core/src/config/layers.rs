//! The layers of a config and how they merge: `include:` files, the file, its profile, variables, `--set`.
//!
//! figment merges and remembers for each value which layer it came from. Two rules are ours: a map whose `type` a later
//! layer changes is replaced instead of inheriting fields that are not its own, and variables and `--set` reach into
//! lists by number.

use std::path::{Path, PathBuf};

use figment::value::{Dict, Empty, Map, Num, Tag, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::error::{InputError, Origin};
use crate::files;
use crate::registry::nearest;
use crate::yaml;

/// What a config is loaded from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The config file.
    pub file: PathBuf,
    /// The profile of the file to use.
    pub profile: Option<String>,
    /// `--set KEY=VALUE`, in order.
    pub set: Vec<String>,
    /// The `DICTLEARN_*` variables and their values.
    pub variables: Vec<(String, String)>,
}

const PREFIX: &str = "DICTLEARN_";
/// Files that a config may have, with all that they include: two that each include the next two would be without end.
const MOST_FILES: usize = 100;
/// Variables with the prefix that are not keys of a config.
const RESERVED: [&str; 1] = ["DICTLEARN_CACHE"];

/// The `DICTLEARN_*` variables of this process.
pub fn variables() -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> =
        std::env::vars().filter(|(name, _)| name.starts_with(PREFIX) && !RESERVED.contains(&name.as_str())).collect();
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
    pub(super) fn load(sources: &Sources) -> Result<Self, InputError> {
        let (mut base, mut profiles, mut known) = (Vec::new(), Vec::new(), Vec::new());
        read_file(&sources.file, sources.profile.as_deref(), &mut Vec::new(), &mut base, &mut profiles, &mut known)?;
        if let (Some(name), true) = (&sources.profile, profiles.is_empty()) {
            let near = nearest(name, known.iter().map(String::as_str)).map(|near| format!("did you mean `{near}`? "));
            let help = if known.is_empty() {
                "it has none; profiles stand under `profiles:`".to_owned()
            } else {
                format!("{}it has: {}", near.unwrap_or_default(), known.join(", "))
            };
            return Err(InputError::new(format!("{} has no profile `{name}`", sources.file.display())).help(help));
        }
        let mut layers: Vec<Layer> = base.into_iter().chain(profiles).collect();

        // What reaches into lists waits until the lists are merged.
        let mut overrides = Vec::new();
        for (name, text) in &sources.variables {
            let key = name.trim_start_matches(PREFIX).to_lowercase().replace("__", ".");
            overrides.push((Origin::Variable(name.clone()), key, text.clone()));
        }
        for set in &sources.set {
            let Some((key, text)) = set.split_once('=') else {
                return Err(InputError::new(format!("`--set {set}` does not say a value"))
                    .help("write --set KEY=VALUE, for example --set saes[0].trainer.lr=1e-4"));
            };
            overrides.push((Origin::Set(set.clone()), key.trim().to_owned(), text.to_owned()));
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
        for (origin, key, text) in overrides {
            // figment gives the value its tag; the place in the tree is found here, since figment does not know lists.
            let value = parse_override(&origin, &key, &text)?;
            figment = figment.merge(LayerProvider(layers.len(), &Dict::from([(OVERRIDE.to_owned(), value)])));
            let value = figment.find_value(OVERRIDE).unwrap_or_else(|_| Value::from(Dict::new()));
            set(&mut root, &origin, &key, value)?;
            layers.push(Layer { origin, text: String::new(), inside: None, data: Dict::new() });
        }
        let value = Value::from(root);
        let layers = layers.into_iter().map(|layer| (layer.origin, layer.text, layer.inside)).collect();
        Ok(Merged { value, figment, layers })
    }

    /// Where a value came from: its file with the file's text, and the profile's path if it is from a profile.
    pub(super) fn origin(&self, tag: Tag) -> Option<(&Origin, &str, Option<&str>)> {
        let index: usize = self.figment.get_metadata(tag)?.name.parse().ok()?;
        let (origin, text, inside) = self.layers.get(index)?;
        Some((origin, text, inside.as_deref()))
    }

    /// The file that was asked for.
    pub(super) fn main_file(&self) -> Option<(&Origin, &str)> {
        let asked = |origin: &Origin, inside: &Option<String>| matches!(origin, Origin::File(..)) && inside.is_none();
        let (origin, text, _) = self.layers.iter().rfind(|(origin, _, inside)| asked(origin, inside))?;
        Some((origin, text))
    }
}

fn merged(figment: &Figment) -> Dict {
    figment.find_value("").ok().and_then(Value::into_dict).unwrap_or_default()
}

/// Takes from `below` the maps whose `type` `above` changes.
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

/// The key under which figment meets an override.
const OVERRIDE: &str = "__override";

fn parse_override(origin: &Origin, key: &str, text: &str) -> Result<Value, InputError> {
    let refused = |message: String| InputError::new(message).help("give plain YAML").at(origin.clone(), key);
    let value =
        yaml::parse(text).map_err(|error| refused(format!("`{text}` is not YAML: {}", without_place(&error))))?;
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
    if ["include", "profiles"].contains(&steps[0]) {
        return Err(refused(format!("`{}` is read in a file only", steps[0]), "write it into the config".to_owned()));
    }
    // What is made on the way is the override's, so that errors about it name that.
    let tag = value.tag();
    let map = || Value::Dict(tag, Dict::new());
    if let (false, Some(index)) =
        (root.contains_key(steps[0]), steps.get(1).filter(|step| step.parse::<usize>().is_ok()))
    {
        return Err(refused(
            format!("`{}` has no item `{index}`", steps[0]),
            format!("the config has no `{0}`: give the whole list, `{0}=[...]`", steps[0]),
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
                        format!("it has {count}, counted from 0"),
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

/// Reads a file's layers: those it includes, then its own; and the profile, where it has it.
fn read_file(
    path: &Path,
    profile: Option<&str>,
    including: &mut Vec<PathBuf>,
    base: &mut Vec<Layer>,
    profiles: &mut Vec<Layer>,
    known: &mut Vec<String>,
) -> Result<(), InputError> {
    let origin = Origin::File(path.to_owned(), None);
    let text = read_text(path)?;
    let at = |location: Option<serde_yaml::Location>| {
        Origin::File(path.to_owned(), location.map(|location| (location.line(), location.column())))
    };
    let mut parsed: serde_yaml::Value = yaml::parse(&text).map_err(|error| {
        let place = match duplicate(&error, &text) {
            Some(line) => Origin::File(path.to_owned(), Some((line, 1))),
            None => at(error.location()),
        };
        InputError::new(format!("not YAML: {}", without_place(&error)))
            .help("check indentation, quotes and colons there")
            .at(place, "")
    })?;
    // `<<: *base` puts the keys of another map in.
    parsed.apply_merge().map_err(|error| InputError::new(format!("not YAML: {error}")).at(at(None), ""))?;
    let refused = |what| InputError::new(what).at(origin.clone(), "");
    let mut data = match from_yaml(parsed, &refused)? {
        Value::Dict(_, dict) => dict,
        Value::Empty(..) => {
            return Err(refused(format!("{} is empty", path.display())).help("a config needs a `source`"))
        }
        _ => return Err(refused("a config is a map of keys and values".to_owned()).help("start with `source:`")),
    };

    let includes = match data.remove("include") {
        None => Vec::new(),
        Some(Value::String(_, one)) => vec![one],
        Some(Value::Array(_, items)) if items.iter().all(|item| item.as_str().is_some()) => {
            items.into_iter().filter_map(Value::into_string).collect()
        }
        Some(_) => {
            return Err(InputError::new("`include` is neither a path nor a list of paths")
                .help("write `include: base.yaml` or `include: [a.yaml, b.yaml]`")
                .at(super::spans::locate(&origin, &text, "include", false), "include"))
        }
    };
    let own = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    including.push(own);
    for include in includes {
        let file = path.parent().unwrap_or(Path::new("")).join(&include);
        let place = super::spans::locate(&origin, &text, "include", false);
        let canonical = std::fs::canonicalize(&file).unwrap_or_else(|_| file.clone());
        if including.contains(&canonical) {
            return Err(InputError::new(format!("`{include}` includes itself")).at(place, "include"));
        }
        if !file.is_file() {
            return Err(InputError::no_file(&file).at(place, "include"));
        }
        if including.len() + base.len() >= MOST_FILES {
            let what = format!("a config includes more than {MOST_FILES} files");
            return Err(InputError::new(what).at(place, "include"));
        }
        read_file(&file, profile, including, base, profiles, known)?;
    }
    including.pop();

    if let Some(own_profiles) = data.remove("profiles") {
        let Some(own_profiles) = own_profiles.into_dict() else {
            return Err(InputError::new("`profiles` is not a map")
                .help("give each profile its name: `profiles: {quick: {steps: 100}}`")
                .at(super::spans::locate(&origin, &text, "profiles", false), "profiles"));
        };
        known.extend(own_profiles.keys().cloned());
        for (name, overlay) in own_profiles {
            if let (true, Some(data)) = (Some(name.as_str()) == profile, overlay.into_dict()) {
                let inside = Some(format!("profiles.{name}"));
                profiles.push(Layer { origin: origin.clone(), text: text.clone(), inside, data });
            }
        }
    }
    base.push(Layer { origin, text, inside: None, data });
    Ok(())
}

/// The line on which a key is said again, which serde_yaml reports at the beginning of the map.
fn duplicate(error: &serde_yaml::Error, text: &str) -> Option<usize> {
    let message = error.to_string();
    let key = message.split("duplicate entry with key \"").nth(1)?.split('"').next()?;
    let start = error.location()?.line();
    let says = |line: &str| line.trim_start_matches(['-', ' ']).split(':').next() == Some(key);
    text.lines().enumerate().skip(start - 1).filter(|(_, line)| says(line)).nth(1).map(|(index, _)| index + 1)
}

/// What is wrong with YAML; where it is, is said elsewhere.
fn without_place(error: &serde_yaml::Error) -> String {
    let message = error.to_string();
    message.split(" at line ").next().unwrap_or(&message).to_owned()
}

fn read_text(path: &Path) -> Result<String, InputError> {
    if path.is_dir() {
        return Err(InputError::new(format!("{} is a folder", path.display())).help("give the config file in it"));
    }
    files::read_text(path)
}

/// A YAML value as figment's.
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
        serde_yaml::Value::Tagged(tagged) => return Err(refused(format!("the YAML tag {} is not read", tagged.tag))),
    })
}
