//! Checks the merged config against its JSON Schema. Reports all mistakes at once, each with its place and a fix.
//!
//! Understands only the schemas that schemars generates for our types; serde has the last word.

use std::cell::{Cell, RefCell};

use figment::value::{Dict, Value};
use schemars::{Schema, schema_for};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::layers::{Merged, unknown_variable};
use super::{RunConfig, spans};
use dictlearn_core::data::TaggedSource;
use dictlearn_core::data::text::TaggedText;
use dictlearn_core::error::{InputError, Mistakes, Origin};
use dictlearn_core::files::{Node, float, integer};
use dictlearn_core::registry::{Component, ComponentKind, defaults, find, names};
use dictlearn_core::report::TaggedLogger;
use dictlearn_core::report::TaggedMetric;
use dictlearn_core::sae::TaggedDictionary;
use dictlearn_core::suggest::nearest;
use dictlearn_core::train::TaggedModifier;
use dictlearn_core::train::TaggedTrainer;

/// State of a check: the schema's definitions, the config with its layers, and the mistakes found.
pub(super) struct Check<'a> {
    merged: &'a Merged,
    defs: Json,
    /// For each SAE, its index in the files: a sweep expands one entry to several SAEs.
    written: &'a [usize],
    mistakes: RefCell<Mistakes>,
    /// Number of mistakes added, duplicates included.
    added: Cell<usize>,
    /// Unknown keys set by variables, each with its warning.
    ignored: RefCell<Vec<(String, String)>>,
}

/// Checks a config struct that was built in code against its component's schema. `path` is its name in messages.
pub(crate) fn check_component(kind: ComponentKind, config: &impl Serialize, path: &str) -> anyhow::Result<()> {
    let merged = Merged::of_code();
    let schema = schema_for!(RunConfig);
    let check = Check::new(&merged, &schema, &[]);
    check.component(&Value::serialize(config)?, kind, path);
    Ok(check.mistakes.into_inner().into_result()?)
}

/// The owner of the fields being checked, for messages.
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
        Check { merged, defs, written, mistakes: RefCell::default(), added: Cell::new(0), ignored: RefCell::default() }
    }

    /// Checks a config against its schema. Returns its mistakes, and the keys to ignore, each with its warning.
    pub(super) fn run(self, value: &Value, schema: &Schema) -> (Mistakes, Vec<(String, String)>) {
        self.fields(value, schema.as_value(), "", Owner::Run);
        (self.mistakes.into_inner(), self.ignored.into_inner())
    }

    /// Adds a mistake about the value at a path.
    fn wrong(&self, value: &Value, path: &str, error: InputError) {
        self.add(self.error(value, path, false, error));
    }

    fn add(&self, error: InputError) {
        self.added.set(self.added.get() + 1);
        self.mistakes.borrow_mut().add(error);
    }

    /// Number of problems found so far.
    fn found(&self) -> usize {
        self.added.get() + self.ignored.borrow().len()
    }

    /// Returns the error with its place.
    pub(super) fn error(&self, value: &Value, path: &str, key: bool, error: InputError) -> InputError {
        let Some((origin, text, inside)) = self.merged.origin(value.tag()) else {
            // No layer has the value, such as a missing field: point to the map that lacks it.
            let Some((origin, text)) = self.merged.main_file() else { return error };
            let written = self.as_written(path);
            return error.at(spans::locate(origin, text, &written, key), written);
        };
        let path_in_file = |path: &str| match inside {
            Some(inside) => format!("{inside}.{path}"),
            None => path.to_owned(),
        };
        // The loader moves values of sweeps, and those that `eval_source` takes from `source`.
        let written = self.as_written(path);
        let swept = written.split_once("].").map(|(sae, key)| format!("{sae}].sweep.[{key}]"));
        let candidates = [
            (swept, &*written),
            (Some(written.clone()), &*written),
            (written.strip_prefix("eval_").map(str::to_owned), written.strip_prefix("eval_").unwrap_or(&written)),
        ];
        for (candidate, path) in candidates {
            let Some(candidate) = candidate else { continue };
            if let Some((at, true)) = spans::position(text, &path_in_file(&candidate), key)
                && let Origin::File(file, _) = origin
            {
                return error.at(Origin::File(file.clone(), Some(at)), path);
            }
        }
        // A value that `eval_source` takes from `source` was typed for `source`.
        let typed = match origin {
            Origin::Set(text) => text.trim_start().starts_with("source"),
            Origin::Variable(name) => name.starts_with("DICTLEARN_SOURCE"),
            Origin::File(..) => false,
        };
        let path = written.strip_prefix("eval_").filter(|_| typed).unwrap_or(&written);
        error.at(spans::locate(origin, text, &path_in_file(path), key), path)
    }

    /// Returns the path with the indices that SAEs have in the file.
    pub(super) fn as_written(&self, path: &str) -> String {
        let Some((index, rest)) = path.strip_prefix("saes[").and_then(|rest| rest.split_once(']')) else {
            return path.to_owned();
        };
        let index = index.parse::<usize>().ok().and_then(|index| self.written.get(index));
        index.map_or_else(|| path.to_owned(), |index| format!("saes[{index}]{rest}"))
    }

    fn value(&self, value: &Value, schema: &Json, path: &str) {
        if let Some(name) = schema.get("$ref").and_then(Json::as_str).and_then(|name| name.strip_prefix("#/$defs/")) {
            if let Some(kind) = ComponentKind::parse(name) {
                return self.component(value, kind, path);
            }
            let definition = self.defs.get(name).cloned().unwrap_or(Json::Null);
            let owner = if name == "SaeConfig" { Owner::Sae } else { Owner::Run };
            if definition.get("properties").is_some() {
                return self.fields(value, &definition, path, owner);
            }
            return self.value(value, &definition, path);
        }
        let shown = self.as_written(path);
        let is = || format!("`{shown}` is {}", show(value));
        if schema.get("anyOf").is_some() {
            let options = alternatives(schema);
            let (none, some): (Vec<&Json>, Vec<&Json>) =
                options.into_iter().partition(|option| types(option) == ["null"]);
            return match some[..] {
                _ if matches!(value, Value::Empty(..)) && !none.is_empty() => {}
                [] => {}
                [one] => self.value(value, one, path),
                _ => match some.iter().find(|option| fits(value, &types(option))) {
                    Some(option) => self.value(value, option, path),
                    None => {
                        let wanted: Vec<&str> = some
                            .iter()
                            .flat_map(|option| types(option).into_iter().map(|name| wanted(name, option)))
                            .collect();
                        self.wrong(
                            value,
                            path,
                            InputError::new(is()).help(format!("it must be {}", wanted.join(" or "))),
                        );
                    }
                },
            };
        }
        let types = types(schema);
        let choices = choices(schema);
        if !choices.is_empty() {
            return match value.as_str() {
                Some(found) if choices.iter().any(|choice| choice == found) => {}
                _ if matches!(value, Value::Empty(..)) && types.contains(&"null") => {}
                found => {
                    let near = found.and_then(|found| nearest(found, choices.iter().map(String::as_str)));
                    let near = near.map(|near| format!("did you mean `{near}`? ")).unwrap_or_default();
                    let error = InputError::new(is()).help(format!("{near}it must be one of {}", choices.join(", ")));
                    self.wrong(value, path, error);
                }
            };
        }
        if !fits(value, &types) {
            let wanted = types.iter().map(|name| wanted(name, schema)).collect::<Vec<_>>().join(" or ");
            let whole = !types.contains(&"number");
            let number = types.iter().any(|name| ["integer", "number"].contains(name));
            let meant = value.as_str().filter(|_| number).and_then(|text| meant_number(text, whole));
            let meant = meant.map(|number| format!("did you mean {number}? ")).unwrap_or_default();
            return self.wrong(value, path, InputError::new(is()).help(format!("{meant}it must be {wanted}")));
        }
        if let (Some(pattern), Some(text)) = (schema.get("pattern").and_then(Json::as_str), value.as_str()) {
            // Devices are our only type with a pattern.
            let device = |text: &str| {
                matches!(text, "auto" | "cpu" | "cuda")
                    || text.starts_with("cuda:") && text[5..].parse::<usize>().is_ok()
            };
            if pattern.contains("cuda") && !device(text) {
                let error = InputError::new(is()).help("it must be auto, cpu, cuda, or cuda:N for GPU number N");
                return self.wrong(value, path, error);
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
                let error =
                    InputError::new(format!("{}, which is out of range", is())).help(format!("it must be {wanted}"));
                return self.wrong(value, path, error);
            }
        }
        // A map from names to values of one type.
        if let (Value::Dict(_, map), Some(schema)) =
            (value, schema.get("additionalProperties").filter(|it| it.is_object()))
        {
            map.iter().for_each(|(name, value)| self.value(value, schema, &format!("{path}.{name}")));
        }
        if let (Value::Array(_, items), Some(schema)) = (value, schema.get("items")) {
            for (index, item) in items.iter().enumerate() {
                self.value(item, schema, &format!("{path}[{index}]"));
            }
        }
        if value.as_dict().is_some() && schema.get("properties").is_some() {
            self.fields(value, schema, path, Owner::Run);
        }
    }

    fn component(&self, value: &Value, kind: ComponentKind, path: &str) {
        let known = names(kind);
        let listed = match known.is_empty() {
            true => format!("no {} are linked in", kind.plural()),
            false => format!("known: {} (`dictlearn list {}`)", known.join(", "), kind.plural()),
        };
        let shown = self.as_written(path);
        let Value::Dict(_, dict) = value else {
            let meant = value.as_str().and_then(|text| nearest(text, known.iter().copied()));
            let help = match (meant, defaults(kind).next().or(known.first().copied())) {
                (Some(name), _) => format!("write `{{type: {name}}}`; {listed}"),
                (None, Some(name)) => {
                    format!("it must be a map with a `type`, for example `{{type: {name}}}`; {listed}")
                }
                (None, None) => listed,
            };
            return self.wrong(value, path, InputError::new(format!("`{shown}` is {}", show(value))).help(help));
        };
        let Some(name) = dict.get("type") else {
            let error = InputError::new(format!("`{shown}` has no `type`")).help(listed);
            return self.add(self.error(value, path, true, error));
        };
        let found = name.as_str().and_then(|name| find(kind, name));
        let Some(found) = found else {
            let text = name.as_str().map_or_else(|| show(name), str::to_owned);
            let near = nearest(&text, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
            let error = InputError::new(format!("unknown {kind} `{text}`"))
                .help(format!("{}{listed}", near.unwrap_or_default()));
            return self.wrong(name, &format!("{path}.type"), error);
        };
        let before = self.found();
        self.fields(value, (found.schema)().as_value(), path, Owner::Component(found));
        if self.found() == before {
            self.deserialises(value, kind, path);
        }
    }

    /// Adds serde's errors about a component that its schema allows.
    fn deserialises(&self, value: &Value, kind: ComponentKind, path: &str) {
        fn tried<T: DeserializeOwned>(node: Node) -> Option<(String, String)> {
            let error = serde_path_to_error::deserialize::<_, T>(node).err()?;
            Some((error.path().to_string(), error.inner().to_string()))
        }
        let node = Node::new(value, self.merged);
        let found = match kind {
            ComponentKind::Dictionary => tried::<Box<dyn TaggedDictionary>>(node),
            ComponentKind::Trainer => tried::<Box<dyn TaggedTrainer>>(node),
            ComponentKind::Modifier => tried::<Box<dyn TaggedModifier>>(node),
            ComponentKind::Source => tried::<Box<dyn TaggedSource>>(node),
            ComponentKind::Text => tried::<Box<dyn TaggedText>>(node),
            ComponentKind::Metric => tried::<Box<dyn TaggedMetric>>(node),
            ComponentKind::Logger => tried::<Box<dyn TaggedLogger>>(node),
            // Named by files, not by configs.
            ComponentKind::Model | ComponentKind::Format => None,
        };
        let Some((inner, message)) = found else { return };
        let inner = if inner == "." { String::new() } else { inner };
        let joint = if inner.is_empty() || inner.starts_with('[') { "" } else { "." };
        let whole = format!("{path}{joint}{inner}");
        let message = format!("`{}`: {message}", self.as_written(&whole));
        let error = match follow(value, &inner) {
            Some(leaf) => self.error(leaf, &whole, false, InputError::new(message)),
            None => self.error(value, path, false, InputError::new(message)),
        };
        self.add(error);
    }

    fn fields(&self, value: &Value, schema: &Json, path: &str, owner: Owner) {
        let Value::Dict(_, dict) = value else {
            let error = InputError::new(format!("`{}` is {}", self.as_written(path), show(value)))
                .help("it must be a map of fields");
            return self.wrong(value, path, error);
        };
        let none = serde_json::Map::new();
        let properties = schema.get("properties").and_then(Json::as_object).unwrap_or(&none);
        let under = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        // An SAE's name and dictionary follow from its trainer: if that is wrong, they may be missing because of it.
        let is_trainer = |key: &str| key == "trainer" && matches!(owner, Owner::Sae);
        let before = self.found();
        let mut trainer_is_wrong = matches!(owner, Owner::Sae) && !dict.contains_key("trainer");
        let (first, others): (Vec<_>, Vec<_>) = dict.iter().partition(|(key, _)| is_trainer(key));
        // Last, so that mistakes inherited from `source` are reported for `source`.
        let follows = |key: &str| key == "eval_source" && matches!(owner, Owner::Run);
        let (last, others): (Vec<_>, Vec<_>) = others.into_iter().partition(|(key, _)| follows(key));
        for (key, field) in first.into_iter().chain(others).chain(last) {
            let tag = key == "type" && matches!(owner, Owner::Component(_));
            let follows = trainer_is_wrong && key == "dictionary" && field.find_ref("type").is_none();
            match properties.get(key) {
                _ if tag || follows => {}
                Some(schema) => self.value(field, schema, &under(key)),
                None => self.unknown_field(dict, key, field, properties, &under(key), owner),
            }
            trainer_is_wrong |= is_trainer(key) && self.found() > before;
        }
        let required = schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str);
        for key in required.filter(|key| *key != "type" && !dict.contains_key(*key)) {
            if trainer_is_wrong && key != "trainer" {
                continue;
            }
            let doc = properties.get(key).and_then(|schema| schema.get("description")).and_then(Json::as_str);
            let error = InputError::new(format!("`{key}`{} is missing", owner.of()));
            let error = match doc {
                Some(doc) => error.help(format!("{key}: {}", doc.split('\n').next().unwrap_or_default())),
                None => error,
            };
            let at = self.error(dict.get("type").unwrap_or(value), path, true, error);
            self.add(at);
        }
    }

    fn unknown_field(
        &self,
        dict: &Dict,
        key: &str,
        field: &Value,
        properties: &serde_json::Map<String, Json>,
        path: &str,
        owner: Owner,
    ) {
        if let Some((Origin::Variable(name), ..)) = self.merged.origin(field.tag()) {
            let part = spans::steps(path).len() - 1;
            let said = unknown_variable(name, part, properties.keys().map(String::as_str));
            return self.ignored.borrow_mut().push((path.to_owned(), said));
        }
        let has = |component: &Component| {
            (component.schema)().get("properties").is_some_and(|fields| fields.get(key).is_some())
        };
        let elsewhere = |kind: ComponentKind| names(kind).into_iter().filter_map(|name| find(kind, name)).any(has);
        let error = InputError::new(format!("unknown field `{key}`{}", owner.of()));
        let kind = if let Owner::Component(component) = owner { Some(component.kind) } else { None };
        let comma = self.decimal_comma(key, field, properties, path);
        let hint = match kind {
            _ if comma.is_some() => comma,
            _ if key == "dict_class" => Some("it follows from the dictionary's `type`;".to_owned()),
            Some(ComponentKind::Trainer) if elsewhere(ComponentKind::Dictionary) => {
                Some(format!("`{key}` belongs to `dictionary`;"))
            }
            Some(ComponentKind::Dictionary) if elsewhere(ComponentKind::Trainer) => {
                Some(format!("`{key}` belongs to `trainer`;"))
            }
            None if matches!(owner, Owner::Sae) && elsewhere(ComponentKind::Trainer) => {
                Some(format!("`{key}` belongs to `trainer`;"))
            }
            None if matches!(owner, Owner::Sae) && elsewhere(ComponentKind::Dictionary) => {
                Some(format!("`{key}` belongs to `dictionary`;"))
            }
            _ => None,
        };
        // Prefer fields that are not set yet.
        let unused = properties.keys().map(String::as_str).filter(|known| !dict.contains_key(*known));
        let near = nearest(key, unused).or_else(|| nearest(key, properties.keys().map(String::as_str)));
        let near = near.map(|near| format!("did you mean `{near}`?"));
        let known: Vec<&str> = properties.keys().map(String::as_str).filter(|known| *known != "type").collect();
        let known =
            if known.is_empty() { "it has no fields".to_owned() } else { format!("known: {}", known.join(", ")) };
        let help: Vec<String> = [hint.or(near), Some(known)].into_iter().flatten().collect();
        self.add(self.error(field, path, true, error.help(help.join(" "))));
    }

    /// Suggests the number meant by `{lr: 0,002}`, which YAML reads as `lr: 0` and a key `002` without a value.
    fn decimal_comma(
        &self,
        key: &str,
        field: &Value,
        properties: &serde_json::Map<String, Json>,
        path: &str,
    ) -> Option<String> {
        if !matches!(field, Value::Empty(..)) || !key.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        let (origin, text, inside) = self.merged.origin(field.tag())?;
        let before = match origin {
            Origin::Set(text) | Origin::Variable(text) => text.rsplit_once(key)?.0.to_owned(),
            Origin::File(..) => {
                let written = self.as_written(path);
                let path = inside.map_or_else(|| written.clone(), |inside| format!("{inside}.{written}"));
                let ((line, column), _) = spans::position(text, &path, true)?;
                text.lines().nth(line - 1)?.chars().take(column - 1).collect()
            }
        };
        let (name, start) = before.trim_end().strip_suffix(',')?.rsplit(['{', ',']).next()?.split_once(':')?;
        let whole = properties.get(name.trim()).is_some_and(|schema| !types(schema).contains(&"number"));
        let number = meant_number(&format!("{},{key}", start.trim()), whole)?;
        Some(format!("did you mean `{}: {number}`? A comma ends a value;", name.trim()))
    }

    /// Returns the error that serde found, with its place.
    pub(super) fn serde(&self, root: &Value, path: &str, message: &str) -> InputError {
        self.locate(root, path, InputError::new(format!("`{}`: {message}", self.as_written(path))))
    }

    /// Returns the error with the place of the value at a path, or of the map that lacks it.
    pub(super) fn locate(&self, root: &Value, path: &str, error: InputError) -> InputError {
        let mut value = root;
        let mut found = true;
        for step in spans::steps(path) {
            let Some(next) = step_into(value, &step) else {
                found = false;
                break;
            };
            value = next;
        }
        let leaf = path.rsplit('.').next().unwrap_or(path);
        let error = if !found && error.message().starts_with(&format!("`{leaf}` is ")) {
            let note = format!("`{leaf}` is not in the config: this is its default");
            error.and_help(&note)
        } else {
            error
        };
        self.error(value, path, false, error)
    }
}

fn step_into<'v>(value: &'v Value, step: &spans::Step) -> Option<&'v Value> {
    match (step, value) {
        (spans::Step::Key(key), Value::Dict(_, dict)) => dict.get(key),
        (spans::Step::Index(index), Value::Array(_, items)) => items.get(*index),
        _ => None,
    }
}

/// Returns the value at a path.
pub(super) fn follow<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    spans::steps(path).iter().try_fold(value, step_into)
}

/// Returns the JSON types that a schema allows; empty if it does not restrict them.
fn types(schema: &Json) -> Vec<&str> {
    match schema.get("type") {
        Some(Json::String(one)) => vec![one],
        Some(Json::Array(several)) => several.iter().filter_map(Json::as_str).collect(),
        _ => Vec::new(),
    }
}

/// True if a value has one of the types.
fn fits(value: &Value, types: &[&str]) -> bool {
    types.is_empty()
        || types.iter().any(|name| match *name {
            "null" => matches!(value, Value::Empty(..)),
            "integer" => integer(value).is_some(),
            "number" => float(value).is_some(),
            "boolean" => matches!(value, Value::Bool(..)),
            "string" => matches!(value, Value::String(..) | Value::Num(..)),
            "array" => matches!(value, Value::Array(..)),
            "object" => matches!(value, Value::Dict(..)),
            _ => true,
        })
}

/// Returns the alternatives of a schema: a value must match one.
fn alternatives(schema: &Json) -> Vec<&Json> {
    match schema.get("anyOf").and_then(Json::as_array) {
        Some(options) => options.iter().flat_map(alternatives).collect(),
        None => vec![schema],
    }
}

/// Returns the number that a text was meant for: `0,002`, `10,000`, `10k`, `2M`.
fn meant_number(text: &str, whole: bool) -> Option<String> {
    let parses = |text: String| text.parse::<f64>().is_ok().then_some(text);
    if let Some((start, rest)) = text.split_once(',') {
        let thousands = rest.split(',').all(|group| group.len() == 3);
        return match (whole, rest.contains(',')) {
            (true, _) if thousands => parses(format!("{start}{}", rest.replace(',', ""))),
            (false, false) => parses(format!("{start}.{rest}")),
            _ => None,
        };
    }
    let number = |digits: &str, zeros: &str| parses(format!("{}{zeros}", digits.trim_end()));
    match text.strip_suffix(['k', 'K']) {
        Some(digits) => number(digits, "e3"),
        None => text.strip_suffix('M').and_then(|digits| number(digits, "e6")),
    }
}

/// Returns the strings that an enum's schema allows.
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
            "a non-negative whole number"
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

/// Shows a value in a message, with its type.
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
