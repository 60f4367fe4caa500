//! The merged config against its JSON Schema, for errors that say where, what was found and what would do.
//!
//! Only what schemars writes for our types is understood; serde has the last word on everything.

use figment::value::{Dict, Value};
use schemars::Schema;
use serde_json::Value as Json;

use super::error::InputError;
use super::layers::Merged;
use super::node::{float, integer};
use super::spans;
use crate::registry::{component, names, nearest, Component, Kind};

/// Where the check stands: the schema's definitions and the config with its layers.
pub(super) struct Check<'a> {
    merged: &'a Merged,
    defs: Json,
    /// For each SAE, the number that it has in the files: a sweep makes several of one.
    written: &'a [usize],
}

/// The thing whose fields are checked, for messages.
#[derive(Clone, Copy)]
enum Owner<'a> {
    Run,
    Sae,
    Component(&'a Component),
}

impl Owner<'_> {
    fn of(self) -> String {
        match self {
            Owner::Run => String::new(),
            Owner::Sae => " of an SAE".to_owned(),
            Owner::Component(component) => format!(" of {} `{}`", component.kind, component.name),
        }
    }
}

impl<'a> Check<'a> {
    pub(super) fn new(merged: &'a Merged, schema: &Schema, written: &'a [usize]) -> Self {
        let defs = schema.get("$defs").cloned().unwrap_or(Json::Null);
        Check { merged, defs, written }
    }

    pub(super) fn run(&self, value: &Value, schema: &Schema) -> Result<(), InputError> {
        self.fields(value, schema.as_value(), "", Owner::Run)
    }

    /// An error with its place.
    pub(super) fn error(&self, value: &Value, path: &str, key: bool, error: InputError) -> InputError {
        let Some((origin, text, inside)) = self.merged.origin(value.tag()) else {
            // A value that nobody wrote, such as a field that is missing: the place is what it is missing from.
            let Some((origin, text)) = self.merged.main_file() else { return error };
            return error.at(spans::locate(origin, text, &self.as_written(path), key), path);
        };
        let path_in_file = |path: &str| match inside {
            Some(inside) => format!("{inside}.{path}"),
            None => path.to_owned(),
        };
        // What the loader moved stands elsewhere in the file: sweeps, and what `eval_source` takes from `source`.
        let written = self.as_written(path);
        let swept = written.split_once("].").map(|(sae, key)| format!("{sae}].sweep.[{key}]"));
        let candidates = [
            (swept, path),
            (Some(written.clone()), path),
            (written.strip_prefix("eval_").map(str::to_owned), path.strip_prefix("eval_").unwrap_or(path)),
        ];
        for (candidate, path) in candidates {
            let Some(candidate) = candidate else { continue };
            if let Some((at, true)) = spans::position(text, &path_in_file(&candidate), key) {
                if let super::Origin::File(file, _) = origin {
                    return error.at(super::Origin::File(file.clone(), Some(at)), path);
                }
            }
        }
        error.at(spans::locate(origin, text, &path_in_file(&written), key), path)
    }

    /// The path with the numbers that SAEs have in the file.
    fn as_written(&self, path: &str) -> String {
        let Some((index, rest)) = path.strip_prefix("saes[").and_then(|rest| rest.split_once(']')) else {
            return path.to_owned();
        };
        let index = index.parse::<usize>().ok().and_then(|index| self.written.get(index));
        index.map_or_else(|| path.to_owned(), |index| format!("saes[{index}]{rest}"))
    }

    fn value(&self, value: &Value, schema: &Json, path: &str) -> Result<(), InputError> {
        if let Some(name) = schema.get("$ref").and_then(Json::as_str).and_then(|name| name.strip_prefix("#/$defs/")) {
            if let Some(kind) = Kind::parse(name) {
                return self.component(value, kind, path);
            }
            let definition = self.defs.get(name).cloned().unwrap_or(Json::Null);
            let owner = if name == "SaeConfig" { Owner::Sae } else { Owner::Run };
            if definition.get("properties").is_some() {
                return self.fields(value, &definition, path, owner);
            }
            return self.value(value, &definition, path);
        }
        // `Option<T>` of a definition is one of it and null.
        if let Some(options) = schema.get("anyOf").and_then(Json::as_array) {
            let some = options.iter().find(|option| option.get("type").and_then(Json::as_str) != Some("null"));
            return match (value, some) {
                (Value::Empty(..), _) | (_, None) => Ok(()),
                (_, Some(option)) => self.value(value, option, path),
            };
        }
        let types: Vec<&str> = match schema.get("type") {
            Some(Json::String(one)) => vec![one],
            Some(Json::Array(several)) => several.iter().filter_map(Json::as_str).collect(),
            _ => Vec::new(),
        };
        let choices = choices(schema);
        if !choices.is_empty() {
            return match value.as_str() {
                Some(found) if choices.iter().any(|choice| choice == found) => Ok(()),
                _ if matches!(value, Value::Empty(..)) && types.contains(&"null") => Ok(()),
                found => {
                    let near = found.and_then(|found| nearest(found, choices.iter().map(String::as_str)));
                    let near = near.map(|near| format!("did you mean `{near}`? "));
                    let error = InputError::new(format!("`{path}` is {}", show(value))).help(format!(
                        "{}it can be {}",
                        near.unwrap_or_default(),
                        choices.join(", ")
                    ));
                    Err(self.error(value, path, false, error))
                }
            };
        }
        let fits = types.is_empty()
            || types.iter().any(|name| match *name {
                "null" => matches!(value, Value::Empty(..)),
                "integer" => integer(value).is_some(),
                "number" => float(value).is_some(),
                "boolean" => matches!(value, Value::Bool(..)),
                "string" => matches!(value, Value::String(..) | Value::Num(..)),
                "array" => matches!(value, Value::Array(..)),
                "object" => matches!(value, Value::Dict(..)),
                _ => true,
            });
        if !fits {
            let wanted = types.iter().map(|name| wanted(name, schema)).collect::<Vec<_>>().join(" or ");
            let error = InputError::new(format!("`{path}` is {}", show(value))).help(format!("it must be {wanted}"));
            return Err(self.error(value, path, false, error));
        }
        if let (Some(pattern), Some(text)) = (schema.get("pattern").and_then(Json::as_str), value.as_str()) {
            // The one pattern that our types have is that of a device.
            let device = |text: &str| {
                matches!(text, "auto" | "cpu" | "cuda")
                    || text.starts_with("cuda:") && text[5..].parse::<usize>().is_ok()
            };
            if pattern.contains("cuda") && !device(text) {
                let error = InputError::new(format!("`{path}` is {}", show(value)))
                    .help("it can be auto, cpu, cuda, or cuda:N for the GPU of that number");
                return Err(self.error(value, path, false, error));
            }
        }
        if let Some(number) = float(value).filter(|_| types.iter().any(|name| matches!(*name, "integer" | "number"))) {
            let least = schema.get("minimum").and_then(Json::as_f64);
            let most = schema.get("maximum").and_then(Json::as_f64).filter(|most| *most < 1e9);
            let out = !number.is_finite()
                || least.is_some_and(|least| number < least)
                || most.is_some_and(|most| number > most);
            if out {
                let range = match (least, most) {
                    (Some(least), Some(most)) => Some(format!("between {least} and {most}")),
                    (Some(least), None) => Some(format!("at least {least}")),
                    (None, Some(most)) => Some(format!("at most {most}")),
                    (None, None) => None,
                };
                let finite = (!number.is_finite()).then(|| "finite".to_owned());
                let wanted = finite.into_iter().chain(range).collect::<Vec<_>>().join(" and ");
                let error = InputError::new(format!("`{path}` is {}, which is out of its range", show(value)))
                    .help(format!("it must be {wanted}"));
                return Err(self.error(value, path, false, error));
            }
        }
        // A map from names to values of one kind.
        if let (Value::Dict(_, map), Some(schema)) =
            (value, schema.get("additionalProperties").filter(|it| it.is_object()))
        {
            map.iter().try_for_each(|(name, value)| self.value(value, schema, &format!("{path}.{name}")))?;
        }
        if let (Value::Array(_, items), Some(schema)) = (value, schema.get("items")) {
            for (index, item) in items.iter().enumerate() {
                self.value(item, schema, &format!("{path}[{index}]"))?;
            }
        }
        if value.as_dict().is_some() && schema.get("properties").is_some() {
            return self.fields(value, schema, path, Owner::Run);
        }
        Ok(())
    }

    fn component(&self, value: &Value, kind: Kind, path: &str) -> Result<(), InputError> {
        let known = names(kind);
        let listed = match known.is_empty() {
            true => format!("no {} are linked in", kind.plural()),
            false => format!("known: {} (`dictlearn list {}`)", known.join(", "), kind.plural()),
        };
        let Value::Dict(_, dict) = value else {
            let example = known.first().map_or(String::new(), |name| format!(", for example `{{type: {name}}}`"));
            let error = InputError::new(format!("`{path}` is {}", show(value)))
                .help(format!("it must be a map with a `type`{example}; {listed}"));
            return Err(self.error(value, path, false, error));
        };
        let Some(name) = dict.get("type") else {
            let error = InputError::new(format!("`{path}` does not say its `type`")).help(listed);
            return Err(self.error(value, path, true, error));
        };
        let found = name.as_str().and_then(|name| component(kind, name));
        let Some(found) = found else {
            let text = name.as_str().map_or_else(|| show(name), str::to_owned);
            let near = nearest(&text, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
            let error = InputError::new(format!("unknown {kind} `{text}`"))
                .help(format!("{}{listed}", near.unwrap_or_default()));
            return Err(self.error(name, &format!("{path}.type"), false, error));
        };
        self.fields(value, (found.schema)().as_value(), path, Owner::Component(found))
    }

    fn fields(&self, value: &Value, schema: &Json, path: &str, owner: Owner) -> Result<(), InputError> {
        let Value::Dict(_, dict) = value else {
            let error = InputError::new(format!("`{path}` is {}", show(value))).help("it must be a map of fields");
            return Err(self.error(value, path, false, error));
        };
        let none = serde_json::Map::new();
        let properties = schema.get("properties").and_then(Json::as_object).unwrap_or(&none);
        let under = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        // An SAE's dictionary follows from its trainer, so what is wrong with the trainer comes first.
        let first = |key: &str| key == "trainer" && matches!(owner, Owner::Sae);
        let fields = dict.iter().filter(|(key, _)| first(key)).chain(dict.iter().filter(|(key, _)| !first(key)));
        for (key, field) in fields {
            let tag = key == "type" && matches!(owner, Owner::Component(_));
            match properties.get(key) {
                _ if tag => {}
                Some(schema) => self.value(field, schema, &under(key))?,
                None => return Err(self.unknown_field(dict, key, field, properties, &under(key), owner)),
            }
        }
        let required = schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str);
        let mut required: Vec<&str> = required.filter(|key| *key != "type").collect();
        required.sort_by_key(|key| !first(key));
        for key in required {
            if !dict.contains_key(key) {
                let doc = properties.get(key).and_then(|schema| schema.get("description")).and_then(Json::as_str);
                let error = InputError::new(format!("`{key}`{} is missing", owner.of()));
                let error = match doc {
                    Some(doc) => error.help(format!("{key}: {}", doc.split('\n').next().unwrap_or_default())),
                    None => error,
                };
                return Err(self.error(dict.get("type").unwrap_or(value), path, true, error));
            }
        }
        Ok(())
    }

    fn unknown_field(
        &self,
        dict: &Dict,
        key: &str,
        field: &Value,
        properties: &serde_json::Map<String, Json>,
        path: &str,
        owner: Owner,
    ) -> InputError {
        let has = |component: &Component| {
            (component.schema)().get("properties").is_some_and(|fields| fields.get(key).is_some())
        };
        let elsewhere = |kind: Kind| names(kind).into_iter().filter_map(|name| component(kind, name)).any(has);
        let error = InputError::new(format!("unknown field `{key}`{}", owner.of()));
        let kind = if let Owner::Component(component) = owner { Some(component.kind) } else { None };
        let hint = match kind {
            _ if key == "dict_class" => Some("it follows from the dictionary's `type`;".to_owned()),
            Some(Kind::Trainer) if elsewhere(Kind::Dictionary) => Some(format!("`{key}` belongs to `dictionary`;")),
            Some(Kind::Dictionary) if elsewhere(Kind::Trainer) => Some(format!("`{key}` belongs to `trainer`;")),
            None if matches!(owner, Owner::Sae) && elsewhere(Kind::Trainer) => {
                Some(format!("`{key}` belongs to `trainer`;"))
            }
            None if matches!(owner, Owner::Sae) && elsewhere(Kind::Dictionary) => {
                Some(format!("`{key}` belongs to `dictionary`;"))
            }
            _ => None,
        };
        // Rather one that is not there yet than one that is.
        let unused = properties.keys().map(String::as_str).filter(|known| !dict.contains_key(*known));
        let near = nearest(key, unused).or_else(|| nearest(key, properties.keys().map(String::as_str)));
        let near = near.map(|near| format!("did you mean `{near}`?"));
        let known: Vec<&str> = properties.keys().map(String::as_str).filter(|known| *known != "type").collect();
        let known =
            if known.is_empty() { "it has no fields".to_owned() } else { format!("known: {}", known.join(", ")) };
        let help: Vec<String> = [hint.or(near), Some(known)].into_iter().flatten().collect();
        self.error(field, path, true, error.help(help.join(" ")))
    }

    /// An error that serde found.
    pub(super) fn serde(&self, root: &Value, path: &str, message: &str) -> InputError {
        self.locate(root, path, InputError::new(format!("`{path}`: {message}")))
    }

    /// An error about the value at a path, or where there is none, about what it is missing from.
    pub(super) fn locate(&self, root: &Value, path: &str, error: InputError) -> InputError {
        let mut value = root;
        let mut found = true;
        for step in spans::steps(path) {
            let next = match (&step, value) {
                (spans::Step::Key(key), Value::Dict(_, dict)) => dict.get(key),
                (spans::Step::Index(index), Value::Array(_, items)) => items.get(*index),
                _ => None,
            };
            let Some(next) = next else {
                found = false;
                break;
            };
            value = next;
        }
        let leaf = path.rsplit('.').next().unwrap_or(path);
        let error = if !found && error.message().starts_with(&format!("`{leaf}` is ")) {
            let note = format!("`{leaf}` is not in the config: that is its default");
            error.and_help(&note)
        } else {
            error
        };
        self.error(value, path, false, error)
    }
}

/// The strings that an enum's schema allows.
fn choices(schema: &Json) -> Vec<String> {
    let consts = schema.get("oneOf").and_then(Json::as_array).into_iter().flatten().filter_map(|one| {
        one.get("const").cloned().map(|one| vec![one]).or_else(|| one.get("enum").and_then(Json::as_array).cloned())
    });
    let listed = schema.get("enum").and_then(Json::as_array).cloned();
    let all = consts.flatten().chain(listed.into_iter().flatten());
    all.filter_map(|choice| choice.as_str().map(str::to_owned)).collect()
}

fn wanted(name: &str, schema: &Json) -> &'static str {
    match name {
        "integer" if schema.get("minimum").and_then(Json::as_f64).is_some_and(|least| least >= 0.0) => {
            "a whole number, not negative"
        }
        "integer" => "a whole number",
        "number" => "a number",
        "boolean" => "true or false",
        "string" => "text",
        "array" => "a list",
        "object" => "a map",
        _ => "null",
    }
}

/// A value as a message shows it, with what it is.
fn show(value: &Value) -> String {
    match value {
        Value::String(_, text) => format!("\"{text}\", which is text"),
        Value::Char(_, c) => format!("\"{c}\", which is text"),
        Value::Bool(_, flag) => format!("{flag}, which is a boolean"),
        Value::Num(..) => match (integer(value), float(value)) {
            (Some(number), _) => number.to_string(),
            (_, Some(number)) => number.to_string(),
            _ => "a number".to_owned(),
        },
        Value::Empty(..) => "null".to_owned(),
        Value::Dict(..) => "a map".to_owned(),
        Value::Array(..) => "a list".to_owned(),
    }
}
