//! Loading a config: merge its layers, fill in derived values, check, deserialise.

use std::collections::BTreeSet;
use std::path::Path;

use figment::value::{Dict, Value};
use schemars::{Schema, schema_for};
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::check::{Check, follow};
use super::layers::{Merged, Sources};
use crate::config::unsourced::check_adapted;
use crate::config::{RunConfig, spans};
use dictlearn_core::data::SourceCx;
use dictlearn_core::data::TaggedSource;
use dictlearn_core::error::{InputError, Mistakes, Under};
use dictlearn_core::files::{Node, float, integer};
use dictlearn_core::hub;
use dictlearn_core::registry::{ComponentKind, defaults, find};
use dictlearn_core::suggest::nearest;
use dictlearn_core::train::SaeConfig;

/// Loads a config. The error lists every mistake in files, variables and arguments.
pub fn load(sources: &Sources) -> Result<RunConfig, InputError> {
    let mut mistakes = Mistakes::new();
    let Some(mut merged) = Merged::load(sources, &mut mistakes) else {
        mistakes.into_result()?;
        return Err(InputError::new(format!("cannot read {}", sources.file.display())));
    };
    let mut root = std::mem::replace(&mut merged.value, Value::from(Dict::new()));
    let mut written = Vec::new();
    if let Value::Dict(_, root) = &mut root {
        overlay_eval_source(root);
        root.entry("loggers".to_owned()).or_insert_with(default_loggers);
        written = expand_saes(root, &merged, &mut mistakes);
    }
    let schema = schema_for!(RunConfig);
    let (found, ignored) = Check::new(&merged, &schema, &written).run(&root, &schema);
    if let Err(error) = found.into_result() {
        mistakes.add(error);
    }
    check_names(&root, &Check::new(&merged, &schema, &written), &mut mistakes);
    if sources.builds_rest {
        build_rest(&root, &merged, &Check::new(&merged, &schema, &written), &mut mistakes);
    }
    mistakes.into_result()?;

    let mut notes: Vec<String> = merged.ignored.iter().map(|said| format!("warning: {said}")).collect();
    for (path, said) in ignored {
        remove(&mut root, &spans::steps(&path));
        notes.push(format!("warning: {said}"));
    }
    let acting = merged.environment_that_acts(&root, &sources.variables);
    if !acting.is_empty() {
        notes.insert(0, format!("from the environment: {}", acting.join(", ")));
    }
    let mut config: RunConfig = serde_path_to_error::deserialize(Node::new(&root, &merged)).map_err(|error| {
        let check = Check::new(&merged, &schema, &written);
        check.serde(&root, &error.path().to_string(), &error.inner().to_string())
    })?;
    config.written = Written(Some(Box::new(Loaded { merged, root, written, notes })));
    Ok(config)
}

/// Builds the valid parts of a config with mistakes, and adds theirs: the source, if it needs no download, and the
/// SAEs, as far as they need no source.
fn build_rest(root: &Value, merged: &Merged, check: &Check, mistakes: &mut Mistakes) {
    // A mistake without a key, such as an unknown profile, may affect everything.
    let Some(wrong) = mistakes.keys().into_iter().collect::<Option<Vec<String>>>() else { return };
    if wrong.is_empty() {
        return;
    }
    let is_right = |key: &str| {
        let concerns =
            |wrong: &String| wrong.strip_prefix(key).is_some_and(|rest| !rest.starts_with(char::is_alphanumeric));
        !wrong.iter().any(concerns)
    };
    fn read<T: DeserializeOwned>(value: Option<&Value>, merged: &Merged) -> Option<T> {
        T::deserialize(Node::new(value?, merged)).ok()
    }
    let seed: Option<u64> = read(root.find_ref("seed"), merged);
    let seed = seed.unwrap_or_default();
    let mut found = Mistakes::new();
    if let Some(source) = read::<Box<dyn TaggedSource>>(root.find_ref("source").filter(|_| is_right("source")), merged)
    {
        let cx = SourceCx { seed, ..SourceCx::default() };
        let built = hub::without(|| source.build(&cx).map(drop).under("source"));
        // Other errors may come from a missing download.
        built.err().and_then(|error| InputError::take(error).ok()).into_iter().for_each(|error| found.add(error));
    }
    // If an unknown key may be a misspelt `steps`, the number of steps is unknown.
    let is_steps = |key: &String| !key.contains(['.', '[']) && nearest(key, ["steps", "stop_after"]) == Some("steps");
    if !wrong.iter().any(is_steps) {
        let steps = match root.find_ref("steps") {
            None => Some(super::default_steps()),
            steps => read(steps, merged),
        };
        let saes = root.find_ref("saes").and_then(Value::as_array).unwrap_or_default();
        for (entry, sae) in saes.iter().enumerate() {
            let sae = Some(sae).filter(|_| is_right(&check.as_written(&format!("saes[{entry}]"))));
            let (Some(mut sae), Some(steps)) = (read::<SaeConfig>(sae, merged), steps) else { continue };
            let says = |path: &str| follow(root, path).is_some();
            let _ = hub::without(|| check_adapted(&mut sae, entry, (steps, seed), &says, &mut found));
        }
    }
    for one in found.each() {
        let key = one.key().to_owned();
        mistakes.add(if one.place().is_none() { check.locate(root, &key, one) } else { one });
    }
}

/// Removes the value at a path from a config.
fn remove(value: &mut Value, path: &[spans::Step]) {
    match (path, value) {
        ([spans::Step::Key(key)], Value::Dict(_, dict)) => {
            dict.remove(key);
        }
        ([spans::Step::Key(key), rest @ ..], Value::Dict(_, dict)) => {
            dict.get_mut(key).into_iter().for_each(|value| remove(value, rest));
        }
        ([spans::Step::Index(index), rest @ ..], Value::Array(_, items)) => {
            items.get_mut(*index).into_iter().for_each(|value| remove(value, rest));
        }
        _ => {}
    }
}

/// The layers and values of a loaded config.
struct Loaded {
    merged: Merged,
    root: Value,
    written: Vec<usize>,
    notes: Vec<String>,
}

/// The files, variables and arguments that a loaded config was merged from; empty for a config made in code.
#[derive(Default)]
pub struct Written(Option<Box<Loaded>>);

impl Written {
    /// Returns the error with the places of those mistakes that concern config keys (see [`InputError::field`]).
    pub fn locate(&self, error: anyhow::Error) -> anyhow::Error {
        let Some(Loaded { merged, root, written, .. }) = self.0.as_deref() else { return error };
        let input = match InputError::take(error) {
            Ok(input) => input,
            Err(other) => return other,
        };
        let empty = Schema::default();
        let mut mistakes = Mistakes::new();
        for one in input.each() {
            mistakes.add(if one.place().is_none() && !one.key().is_empty() {
                let key = one.key().to_owned();
                Check::new(merged, &empty, written).locate(root, &key, one)
            } else {
                one
            });
        }
        match mistakes.into_result() {
            Err(located) => located.into(),
            Ok(()) => anyhow::anyhow!("an error without a mistake"),
        }
    }

    /// Returns notes on loading for the user: variables that set keys, and ignored variables.
    pub fn notes(&self) -> &[String] {
        self.0.as_ref().map_or(&[], |loaded| &loaded.notes)
    }

    /// True if a file, a variable or an argument sets the key at a path, such as `saes[0].trainer.warmup_steps`. Always
    /// true for a config made in code.
    pub fn says(&self, path: &str) -> bool {
        self.0.as_ref().is_none_or(|loaded| follow(&loaded.root, path).is_some())
    }
}

impl std::fmt::Debug for Written {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Written")
    }
}

/// Fills in `eval_source`: `source` with some keys changed.
fn overlay_eval_source(root: &mut Dict) {
    let Some(Value::Dict(tag, overlay)) = root.get("eval_source").cloned() else { return };
    let Some(Value::Dict(_, source)) = root.get("source").cloned() else { return };
    let merged = overlaid(source, overlay);
    root.insert("eval_source".to_owned(), Value::Dict(tag, merged));
}

fn default_loggers() -> Value {
    let logger = |name| Value::from(Dict::from([("type".to_owned(), Value::from(name))]));
    Value::from(defaults(ComponentKind::Logger).map(logger).collect::<Vec<_>>())
}

fn overlaid(mut below: Dict, above: Dict) -> Dict {
    let name = |dict: &Dict| dict.get("type").and_then(Value::as_str).map(str::to_owned);
    if name(&above).is_some() && name(&above) != name(&below) {
        return above;
    }
    for (key, new) in above {
        let value = match (below.remove(&key), new) {
            (Some(Value::Dict(_, old)), Value::Dict(tag, new)) => Value::Dict(tag, overlaid(old, new)),
            (_, new) => new,
        };
        below.insert(key, value);
    }
    below
}

/// Expands sweeps and fills in names and dictionaries. Returns each SAE's index in the files.
fn expand_saes(root: &mut Dict, merged: &Merged, mistakes: &mut Mistakes) -> Vec<usize> {
    let Some(Value::Array(tag, saes)) = root.get("saes").cloned() else { return Vec::new() };
    let (mut expanded, mut written) = (Vec::new(), Vec::new());
    let mut room = MOST_SWEPT;
    for (index, sae) in saes.into_iter().enumerate() {
        let Value::Dict(tag, mut sae) = sae else {
            expanded.push(sae);
            written.push(index);
            continue;
        };
        let sweep = sae.remove("sweep");
        fill(&mut sae);
        let variants = match sweep {
            None | Some(Value::Empty(..)) => vec![sae],
            Some(sweep) => match sweep_variants(&sae, &sweep, (index, &mut room), merged) {
                Ok(variants) => variants,
                Err(error) => {
                    mistakes.add(error);
                    vec![sae]
                }
            },
        };
        for variant in variants {
            expanded.push(Value::Dict(tag, variant));
            written.push(index);
        }
    }
    root.insert("saes".to_owned(), Value::Array(tag, expanded));
    written
}

/// Fills in an SAE's name and dictionary from its trainer, unless given.
fn fill(sae: &mut Dict) {
    let Some(trainer) = sae.get("trainer").and_then(|trainer| trainer.find_ref("type")).cloned() else { return };
    let Some(name) = trainer.as_str().map(str::to_owned) else { return };
    let tag = trainer.tag();
    sae.entry("name".to_owned()).or_insert(trainer);
    let default = find(ComponentKind::Trainer, &name).and_then(|trainer| trainer.default_dictionary);
    // Missing fields of a dictionary that was not written are reported at the trainer.
    let dictionary = sae.entry("dictionary".to_owned()).or_insert_with(|| Value::Dict(tag, Dict::new()));
    if let (Value::Dict(own, dictionary), Some(default)) = (dictionary, default) {
        let tag = *own;
        dictionary.entry("type".to_owned()).or_insert_with(|| Value::String(tag, default.to_owned()));
    }
}

/// Limit on all sweeps together, in values times the square of the number of axes: each axis is looked up in the text
/// and compared with the others. A few short lists can make more SAEs than memory holds.
const MOST_SWEPT: usize = 1 << 22;
/// Maximum number of dots in a sweep's key.
const MOST_DOTS: usize = 100;

/// Returns the approximate size of a value, in values.
fn size(value: &Value) -> usize {
    1 + match value {
        Value::String(_, text) => text.len() / 64,
        Value::Array(_, items) => items.iter().map(size).sum(),
        Value::Dict(_, dict) => dict.iter().map(|(key, value)| key.len() / 64 + size(value)).sum(),
        _ => 0,
    }
}

/// Returns the Cartesian product of a sweep's axes, and subtracts its size from `room`.
fn sweep_variants(
    sae: &Dict,
    sweep: &Value,
    (index, room): (usize, &mut usize),
    merged: &Merged,
) -> Result<Vec<Dict>, InputError> {
    let path = format!("saes[{index}].sweep");
    let written: Vec<usize> = (0..=index).collect();
    let empty = Schema::default();
    let refused = |value: &Value, message: String| {
        let check = Check::new(merged, &empty, &written);
        let help = "a sweep lists values for each key: `sweep: {trainer.lr: [1e-4, 3e-4]}`";
        Err(check.error(value, &path, false, InputError::new(message).help(help)))
    };
    let Value::Dict(_, axes) = sweep else { return refused(sweep, format!("`{path}` is not a map")) };
    if let Some(key) = axes.keys().find(|key| key.matches('.').count() > MOST_DOTS) {
        let start: String = key.chars().take(40).collect();
        return refused(sweep, format!("`{path}`: the key `{start}…` has more than {MOST_DOTS} dots"));
    }
    let variants = axes.values().filter_map(Value::as_array).map(<[Value]>::len);
    let one = size(sweep) + sae.values().map(size).sum::<usize>();
    let swept = variants.chain([axes.len(), axes.len(), one]).try_fold(1_usize, |all, count| all.checked_mul(count));
    match swept.and_then(|swept| room.checked_sub(swept)) {
        Some(left) => *room = left,
        None => return refused(sweep, format!("`{path}` makes more SAEs than a run can hold")),
    }
    // Names follow the order in which the axes are written, which a map does not keep.
    let mut ordered: Vec<(&String, &Value)> = axes.iter().collect();
    ordered.sort_by_cached_key(|(key, values)| {
        let (_, text, inside) = merged.origin(values.tag())?;
        let path = format!("{path}.[{key}]");
        let path = inside.map_or_else(|| path.clone(), |inside| format!("{inside}.{path}"));
        super::spans::position(text, &path, true).map(|(at, _)| at)
    });
    let last = |key: &str| key.rsplit('.').next().unwrap_or(key).to_owned();
    let mut variants = vec![sae.clone()];
    for (key, values) in ordered {
        let Value::Array(_, values) = values else {
            return refused(values, format!("`{path}`: the values of `{key}` are not a list"));
        };
        if values.is_empty() {
            return refused(sweep, format!("`{path}`: `{key}` has no values"));
        }
        // Axes with the same last key are labelled by their whole keys.
        let alike = axes.keys().filter(|other| last(other) == last(key)).count() > 1;
        let label = if alike { key.clone() } else { last(key) };
        let mut next = Vec::new();
        for variant in &variants {
            for value in values {
                let mut variant = variant.clone();
                put(&mut variant, key, value.clone());
                let shown = match (value.as_str(), integer(value), float(value)) {
                    (Some(text), ..) => text.to_owned(),
                    (_, Some(number), _) => number.to_string(),
                    (_, _, Some(number)) => number.to_string(),
                    _ => match value.find_ref("type").and_then(Value::as_str) {
                        Some(name) => name.to_owned(),
                        None => serde_json::to_string(value).unwrap_or_default(),
                    },
                };
                if key != "name" {
                    let name = variant.get("name").and_then(Value::as_str).unwrap_or_default();
                    let name = format!("{name}-{label}={}", shown.replace(['/', '\\'], "_"));
                    variant.insert("name".to_owned(), Value::from(name));
                }
                next.push(variant);
            }
        }
        variants = next;
    }
    Ok(variants)
}

fn put(dict: &mut Dict, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            dict.insert(key.to_owned(), value);
        }
        Some((first, rest)) => {
            let inner = dict.entry(first.to_owned()).or_insert_with(|| Value::from(Dict::new()));
            if inner.as_dict().is_none() {
                *inner = Value::from(Dict::new());
            }
            if let Value::Dict(_, inner) = inner {
                put(inner, rest, value);
            }
        }
    }
}

/// Names of other files in a run's folder.
const TAKEN: [&str; 3] = ["checkpoints", "config.yaml", "metrics.jsonl"];

/// Refuses an SAE's name that cannot be a folder in the run's folder.
pub fn folder_name(name: &str) -> Result<(), InputError> {
    let folder = !name.is_empty() && !name.contains(['/', '\\', '\0']) && !name.starts_with('.');
    if folder && name.len() <= 200 && !TAKEN.contains(&name) {
        return Ok(());
    }
    Err(InputError::new(format!("an SAE cannot be named `{name}`")).help(format!(
        "the name is also a folder's: no slash, no leading dot, at most 200 bytes, none of {}",
        TAKEN.join(", ")
    )))
}

/// Checks that SAE names are unique, and valid names of folders.
fn check_names(root: &Value, check: &Check, mistakes: &mut Mistakes) {
    let mut seen = BTreeSet::new();
    let Some(Value::Array(_, saes)) = root.find_ref("saes") else { return };
    for (index, sae) in saes.iter().enumerate() {
        let Some(name) = sae.find_ref("name") else { continue };
        // The name defaults to the trainer's type; an unknown type is reported for the trainer.
        let trainer = sae.find_ref("trainer.type").and_then(Value::as_str);
        if trainer == name.as_str() && trainer.is_some_and(|trainer| find(ComponentKind::Trainer, trainer).is_none()) {
            continue;
        }
        let Ok(text) = <String as serde::Deserialize>::deserialize(Node::new(name, &Path::new(""))) else {
            continue;
        };
        let wrong = if !seen.insert(text.clone()) {
            Some(InputError::new(format!("two SAEs are named `{text}`")).help("give each a unique `name`"))
        } else {
            folder_name(&text).err()
        };
        if let Some(error) = wrong {
            mistakes.add(check.error(name, &format!("saes[{index}].name"), false, error));
        }
    }
}

/// Returns a config as YAML with every default.
pub fn to_yaml(config: &RunConfig) -> anyhow::Result<String> {
    Ok(serde_yaml::to_string(config)?)
}

/// Returns the JSON Schema of configs as users may write them.
pub fn json_schema() -> Json {
    let mut schema = schema_for!(RunConfig).to_value();
    let text_or_list = serde_json::json!({
        "description": "Configs that this one extends.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    });
    let profiles = serde_json::json!({
        "description": "Named overlays; `--profile NAME` applies one.",
        "type": "object",
        "additionalProperties": {"type": ["object", "null"]},
    });
    let sweep = serde_json::json!({
        "description": "Values for keys of this SAE; one SAE is trained for each combination.",
        "type": "object",
        "additionalProperties": {"type": "array"},
    });
    let properties = |schema: &mut Json, at: &str, added: &[(&str, &Json)]| {
        if let Some(properties) = schema.pointer_mut(at).and_then(Json::as_object_mut) {
            properties.extend(added.iter().map(|(name, value)| ((*name).to_owned(), (*value).clone())));
        }
    };
    properties(&mut schema, "/properties", &[("include", &text_or_list), ("profiles", &profiles)]);
    add_parts(&mut schema);
    let overlay = serde_json::json!({
        "description": "`source` with these keys changed, for the metrics.",
        "anyOf": [{"$ref": "#/$defs/source_part"}, {"type": "null"}],
    });
    properties(&mut schema, "/properties", &[("eval_source", &overlay)]);
    properties(&mut schema, "/$defs/SaeConfig/properties", &[("sweep", &sweep)]);
    if let Some(sae) = schema.pointer_mut("/$defs/SaeConfig").and_then(Json::as_object_mut) {
        sae.insert("required".to_owned(), serde_json::json!(["trainer"]));
    }
    // A dictionary without a type is the trainer's default one.
    if let Some(dictionary) = schema.pointer_mut("/$defs/SaeConfig/properties/dictionary") {
        let named = std::mem::take(dictionary);
        let description = named.get("description").cloned().unwrap_or_default();
        let unnamed = serde_json::json!({"type": "object", "not": {"required": ["type"]}});
        *dictionary = serde_json::json!({"description": description, "anyOf": [named, unnamed]});
    }
    // Includes and sweeps may provide required fields.
    forgive(&mut schema, "include");
    if let Some(sae) = schema.pointer_mut("/$defs/SaeConfig") {
        forgive(sae, "sweep");
    }
    say_defaults(&mut schema);
    allow_underscores(&mut schema);
    schema
}

/// Allows `10_000` and `1e4` wherever a number is expected: editors take the first for text.
fn allow_underscores(schema: &mut Json) {
    match schema {
        Json::Object(map) => {
            let types: Vec<&str> = match map.get("type") {
                Some(Json::String(one)) => vec![one],
                Some(Json::Array(several)) => several.iter().filter_map(Json::as_str).collect(),
                _ => Vec::new(),
            };
            if types.iter().any(|name| ["integer", "number"].contains(name)) && !types.contains(&"string") {
                let types: Vec<&str> = types.into_iter().chain(["string"]).collect();
                let types = serde_json::json!(types);
                map.insert("type".to_owned(), types);
                map.insert("pattern".to_owned(), r"^[+-]?[0-9][0-9_]*(\.[0-9_]*)?([eE][+-]?[0-9]+)?$".into());
            }
            map.values_mut().for_each(allow_underscores);
        }
        Json::Array(values) => values.iter_mut().for_each(allow_underscores),
        _ => {}
    }
}

/// Requires all fields only in objects without `field`; in others, components may lack fields, even their type.
fn forgive(schema: &mut Json, field: &str) {
    let required = schema.as_object_mut().and_then(|schema| schema.remove("required"));
    let (mut whole, mut parts) = (serde_json::Map::new(), serde_json::Map::new());
    let properties = schema.get_mut("properties").and_then(Json::as_object_mut).into_iter().flatten();
    for (name, property) in properties {
        if property.to_string().contains("#/$defs/") {
            let description = property.get("description").cloned().unwrap_or_default();
            parts.insert(name.clone(), in_parts(property));
            whole.insert(name.clone(), std::mem::replace(property, serde_json::json!({"description": description})));
        }
    }
    schema["if"] = serde_json::json!({"not": {"required": [field]}});
    schema["then"] = serde_json::json!({"required": required, "properties": whole});
    schema["else"] = serde_json::json!({"properties": parts});
}

/// Returns the schema with partial components in place of components.
fn in_parts(schema: &Json) -> Json {
    let mut text = schema.to_string();
    for kind in ComponentKind::ALL {
        text = text.replace(&format!("#/$defs/{}\"", kind.name()), &format!("#/$defs/{}_part\"", kind.name()));
    }
    text.parse().unwrap_or_default()
}

/// Adds a definition of partial components for each kind: fields of the named type, or any fields without a type.
fn add_parts(schema: &mut Json) {
    let Some(defs) = schema.get_mut("$defs").and_then(Json::as_object_mut) else { return };
    for kind in ComponentKind::ALL {
        let Some(whole) = defs.get(kind.name()) else { continue };
        let mut named = in_parts(whole);
        for variant in named.get_mut("oneOf").and_then(Json::as_array_mut).into_iter().flatten() {
            variant["required"] = serde_json::json!(["type"]);
        }
        let unnamed = serde_json::json!({"type": "object", "not": {"required": ["type"]}});
        defs.insert(format!("{}_part", kind.name()), serde_json::json!({"anyOf": [named, unnamed]}));
    }
}

/// Adds every default to the description of its field, which editors show.
fn say_defaults(schema: &mut Json) {
    match schema {
        Json::Object(map) => {
            if let (Some(default), Some(Json::String(doc))) = (map.get("default").cloned(), map.get_mut("description"))
            {
                *doc += &format!("\n\nDefault: {default}");
            }
            map.values_mut().for_each(say_defaults);
        }
        Json::Array(values) => values.iter_mut().for_each(say_defaults),
        _ => {}
    }
}

/// Returns a field's type in words, from its schema.
pub fn type_name(schema: &Json) -> String {
    let plain = |name: &str| match name {
        "integer" => "whole number".to_owned(),
        "boolean" => "true or false".to_owned(),
        "string" => "text".to_owned(),
        "array" => "list".to_owned(),
        "object" => "map".to_owned(),
        other => other.to_owned(),
    };
    let choices: Vec<&str> = ["oneOf", "enum"]
        .iter()
        .filter_map(|key| schema.get(*key).and_then(Json::as_array))
        .flatten()
        .filter_map(|choice| choice.as_str().or_else(|| choice.get("const").and_then(Json::as_str)))
        .collect();
    if !choices.is_empty() {
        return choices.join(" | ");
    }
    if let Some(name) = schema.get("$ref").and_then(Json::as_str) {
        return format!("a {}", name.rsplit('/').next().unwrap_or(name));
    }
    if let Some(options) = schema.get("anyOf").and_then(Json::as_array) {
        return options.iter().map(type_name).collect::<Vec<_>>().join(" or ");
    }
    match schema.get("type") {
        Some(Json::String(name)) => plain(name),
        Some(Json::Array(names)) => names.iter().filter_map(Json::as_str).map(plain).collect::<Vec<_>>().join(" or "),
        _ => "any".to_owned(),
    }
}
