//! Describes components on the terminal and as pages of the reference, from their registry entries alone.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::config;
use dictlearn_core::formats;
use dictlearn_core::registry::{Component, ComponentKind, ShortRun, components};
use dictlearn_core::train::Requirement;
use dictlearn_core::train::TaggedModifier;

/// A field of a component's config.
struct Field {
    name: String,
    /// Type in words.
    type_name: String,
    /// Default, as JSON, if it has one.
    default: Option<String>,
    required: bool,
    doc: String,
}

/// Returns the description in a schema; empty if it has none.
fn doc(schema: &Value) -> &str {
    schema.get("description").and_then(Value::as_str).unwrap_or_default()
}

fn fields(schema: &Value) -> Vec<Field> {
    let none = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
    let required = schema.get("required").and_then(Value::as_array);
    let required = |name: &str| required.is_some_and(|required| required.iter().any(|other| other == name));
    let field = |(name, schema): (&String, &Value)| Field {
        name: name.clone(),
        type_name: config::type_name(schema),
        default: schema.get("default").map(Value::to_string),
        required: required(name),
        doc: doc(schema).to_owned(),
    };
    properties.iter().map(field).collect()
}

/// Returns a component's description, requirements and coverage; no paragraph is empty.
fn paragraphs(component: &Component, schema: &Value) -> Vec<String> {
    let needs = Some(needs(component)).filter(|needs| !needs.is_empty()).map(|needs| format!("Needs {needs}."));
    let general = Some(doc(schema).to_owned()).filter(|general| !general.is_empty());
    let coverage = match component.kind {
        ComponentKind::Format => formats::named(component.name).ok().and_then(|format| format.coverage()),
        _ => None,
    };
    general.into_iter().chain(needs).chain(coverage).collect()
}

/// Returns a modifier's requirements in words; empty if it has none, and for other components.
fn needs(component: &Component) -> String {
    if component.kind != ComponentKind::Modifier {
        return String::new();
    }
    let config: Option<Box<dyn TaggedModifier>> = dictlearn_core::files::from_yaml(component.example).ok();
    let needs = config.map(|config| config.needs()).unwrap_or_default();
    needs.into_iter().map(Requirement::words).collect::<Vec<_>>().join(", ")
}

/// Returns the output of `dictlearn describe KIND NAME`. Paths in the example are relative to `folder`.
pub fn text(component: &Component, folder: &Path) -> String {
    let Component { kind, name, summary, paper, default_dictionary, schema, .. } = component;
    let mut text = format!("{kind} {name}\n{summary}\n\n");
    if !paper.is_empty() {
        text += &format!("Paper: {paper}\n\n");
    }
    if let Some(default) = default_dictionary {
        text += &format!("Trains the dictionary `{default}` by default.\n\n");
    }
    let schema = schema().to_value();
    for paragraph in paragraphs(component, &schema) {
        text += &format!("{paragraph}\n\n");
    }
    let fields = fields(&schema);
    if !fields.is_empty() {
        text += "Fields:\n";
    }
    for field in fields {
        let default = match field.default {
            Some(default) => format!("default {default}"),
            None if field.required => "required".to_owned(),
            None => "optional".to_owned(),
        };
        text += &format!("  {} ({}, {default})\n", field.name, field.type_name);
        for line in field.doc.lines() {
            text += &format!("      {line}\n");
        }
    }
    if let Some(short) = short_run(component) {
        text += &format!("\n{}\n\n{}\n{}\n", short.intro, short.settings, short.measured);
    }
    if let Some(example) = config::example(component, folder) {
        text += &format!("\nExample config, ready to train:\n\n{example}");
    }
    for command in commands(component) {
        text += &format!("  {command}\n");
    }
    text
}

/// A trainer's settings for a short run and their results, in words.
struct Short {
    intro: String,
    settings: String,
    measured: String,
}

fn short_run(component: &Component) -> Option<Short> {
    let ShortRun { settings, measured } = component.short_run?;
    let settings: serde_yaml::Value = serde_yaml::from_str(settings).ok()?;
    let (steps, batch) = (ShortRun::STEPS, ShortRun::BATCH);
    Some(Short {
        intro: format!(
            "The defaults follow the reference, for runs of 10,000 steps or more. For a short run ({steps} steps of \
             {batch} activations), set:"
        ),
        settings: serde_yaml::to_string(&settings).ok()?,
        measured: format!(
            "Measured on layer 2 of the bundled model, on held-out text: {measured}. configs/short-runs.yaml has these \
             settings for every method."
        ),
    })
}

/// Returns the commands that take a format; none for other components.
fn commands(component: &Component) -> Vec<String> {
    if component.kind != ComponentKind::Format {
        return Vec::new();
    }
    let mut commands = vec![component.example.to_owned()];
    if formats::named(component.name).is_ok_and(|format| format.writes()) {
        commands.push(format!("dictlearn export SAE_DIR --format {} --out DIR", component.name));
    }
    commands
}

/// Returns the reference: Markdown pages by path, one for each linked component (`trainers/top_k.md`), and `README.md`,
/// the index.
pub fn pages() -> Vec<(PathBuf, String)> {
    let mut index =
        "# Reference\n\nEvery component that a config can name, generated from the registry by `cargo xtask docs`.\n"
            .to_owned();
    let mut pages = Vec::new();
    for kind in ComponentKind::ALL {
        let components = components(kind);
        if components.is_empty() {
            continue;
        }
        index += &format!("\n## {}\n\n| name | summary |\n| --- | --- |\n", capital(kind.plural()));
        for component in components {
            let path = format!("{}/{}.md", kind.plural(), component.name);
            index += &format!("| [`{}`]({path}) | {} |\n", component.name, component.summary);
            pages.push((path.into(), page(component)));
        }
    }
    pages.insert(0, ("README.md".into(), index));
    pages
}

/// Returns the reference page of a component.
fn page(component: &Component) -> String {
    let Component { kind, name, summary, paper, default_dictionary, schema, .. } = component;
    let mut page = format!("# `{name}`\n\n{} · {summary}.\n", capital(kind.name()));
    if let Some((what, address)) = paper.rsplit_once(", http") {
        page += &format!("\nFrom [{what}](http{address}).\n");
    }
    if let Some(default) = default_dictionary {
        page += &format!("\nTrains [`{default}`](../dictionaries/{default}.md) by default.\n");
    }
    let schema = schema().to_value();
    for paragraph in paragraphs(component, &schema) {
        page += &format!("\n{paragraph}\n");
    }
    let fields = fields(&schema);
    if !fields.is_empty() {
        page += "\n| field | type | default | |\n| --- | --- | --- | --- |\n";
    }
    // A table row must be one line, and a bar would end the cell.
    let cell = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    for field in fields {
        let default = match field.default {
            Some(default) => format!("`{default}`"),
            None if field.required => "required".to_owned(),
            None => String::new(),
        };
        page +=
            &format!("| `{}` | {} | {} | {} |\n", field.name, cell(&field.type_name), cell(&default), cell(&field.doc));
    }
    if let Some(short) = short_run(component) {
        page += &format!("\n{}\n\n```yaml\n{}```\n\n{}\n", short.intro, short.settings, short.measured);
    }
    if let Some(example) = config::example(component, Path::new("")) {
        page += &format!("\nA config that is ready to train:\n\n```yaml\n{example}```\n");
    }
    let commands = commands(component);
    if !commands.is_empty() {
        page += &format!("\n```sh\n{}\n```\n", commands.join("\n"));
    }
    page
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
