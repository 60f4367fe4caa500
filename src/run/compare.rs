//! `dictlearn compare`: compares SAEs of several runs by the differences of their configs, and their metrics.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use crate::run::evaluate;
use dictlearn_core::error::InputError;
use dictlearn_core::files;
use dictlearn_core::sae::saved;
use dictlearn_core::suggest::nearest;

/// A comparison of SAEs.
pub struct Comparison {
    /// Keys of config.json whose values differ, in order of appearance.
    keys: Vec<String>,
    saes: Vec<Compared>,
}

struct Compared {
    dir: PathBuf,
    name: String,
    /// Every key of its config.json with a plain value.
    config: Map<String, Value>,
    /// eval.json; empty if it has none.
    figures: Map<String, Value>,
}

impl Comparison {
    /// Reads the SAEs of SAE folders, run folders, or folders of runs.
    pub fn of(places: &[PathBuf]) -> Result<Self> {
        let mut dirs: Vec<PathBuf> = Vec::new();
        for place in places {
            for dir in saved::folders(place)? {
                if !dirs.contains(&dir) {
                    dirs.push(dir);
                }
            }
        }
        let read = |(dir, name): (PathBuf, String)| {
            let config = flat(&files::read_json(&dir.join("config.json"))?);
            let figures = dir.join("eval.json");
            let again = |error| match InputError::take(error) {
                Ok(error) => {
                    error.help("remove it, or evaluate the SAE again (`dictlearn eval SAE_DIR --save`)").into()
                }
                Err(error) => error,
            };
            let figures = match figures.exists().then(|| files::read_json(&figures).map_err(again)).transpose()? {
                None => Map::new(),
                Some(Value::Object(figures)) => figures,
                Some(_) => bail!(
                    InputError::new(format!("{} is not an object of metrics", figures.display()))
                        .help("remove it, or evaluate the SAE again (`dictlearn eval`)")
                ),
            };
            Ok(Compared { dir, name, config, figures })
        };
        let names = saved::labels(&dirs);
        let saes: Vec<Compared> = dirs.into_iter().zip(names).map(read).collect::<Result<_>>()?;
        Ok(Comparison { keys: differing(&saes), saes })
    }

    /// Sorts by a config key or a metric, ascending, or descending with a leading `-`. Missing values come last.
    pub fn sort(&mut self, key: &str) -> Result<()> {
        let (key, down) = key.strip_prefix('-').map_or((key, false), |key| (key, true));
        let known: BTreeSet<&String> =
            self.saes.iter().flat_map(|sae| sae.config.keys().chain(sae.figures.keys())).collect();
        if !known.contains(&key.to_owned()) && key != "sae" {
            let mut plain = self.keys.clone();
            let figures = self.saes.iter().flat_map(|sae| sae.figures.iter());
            plain.extend(figures.filter(|(_, value)| value.is_number()).map(|(name, _)| name.clone()));
            let mut seen = BTreeSet::new();
            plain.retain(|name| seen.insert(name.clone()));
            let near =
                nearest(key, known.iter().map(|key| key.as_str())).map(|near| format!("did you mean `{near}`? "));
            bail!(InputError::new(format!("no config key or metric is named `{key}`")).help(format!(
                "{}sort by one of: {}",
                near.unwrap_or_default(),
                plain.join(", ")
            )));
        }
        let order = |a: &Compared, b: &Compared| {
            if key == "sae" {
                return a.name.cmp(&b.name);
            }
            let order = match (a.get(key), b.get(key)) {
                (Some(a), Some(b)) => between(a, b),
                // Missing values come last in either order.
                (None, Some(_)) => return Ordering::Greater,
                (Some(_), None) => return Ordering::Less,
                (None, None) => Ordering::Equal,
            };
            if down { order.reverse() } else { order }
        };
        self.saes.sort_by(order);
        Ok(())
    }

    /// Returns notes to show with the table.
    pub fn notes(&self, program: &str) -> Vec<String> {
        let mut notes = Vec::new();
        let missing: Vec<&Compared> = self.saes.iter().filter(|sae| sae.figures.is_empty()).collect();
        if let Some(first) = missing.first() {
            let dir = shell_quoted(&first.dir.display().to_string());
            notes.push(format!(
                "{} of {} SAEs have no eval.json; to create one: {program} eval {dir} --save",
                missing.len(),
                self.saes.len()
            ));
        }
        let rows = self.rows();
        if evaluate::measured_lines(&rows).len() > 1 {
            notes.push(
                "warning: these SAEs were evaluated on different data, so their metrics are not comparable; evaluate \
                 them together with `dictlearn eval SAE... --config CONFIG.yaml`"
                    .to_owned(),
            );
        }
        notes
    }

    fn rows(&self) -> Vec<(String, Map<String, Value>)> {
        self.saes.iter().map(|sae| (sae.name.clone(), sae.figures.clone())).collect()
    }

    /// Returns the table.
    pub fn table(&self) -> String {
        let cells =
            |sae: &Compared| self.keys.iter().map(|key| sae.config.get(key).map_or("–".to_owned(), short)).collect();
        let table =
            evaluate::table_with(&self.keys, self.saes.iter().map(|sae| (sae.name.clone(), cells(sae), &sae.figures)));
        std::iter::once(table).chain(evaluate::measured_lines(&self.rows())).collect::<Vec<_>>().join("\n")
    }

    /// Returns one object for each SAE: its path, the config values that differ, and its metrics.
    pub fn json(&self) -> Value {
        let one = |sae: &Compared| {
            let config: Map<String, Value> =
                self.keys.iter().map(|key| (key.clone(), sae.config.get(key).cloned().unwrap_or_default())).collect();
            json!({"sae": sae.dir.display().to_string(), "name": sae.name, "config": config, "figures": sae.figures})
        };
        self.saes.iter().map(one).collect()
    }

    /// Returns comma-separated values: the path, the config values that differ, and every numeric metric.
    pub fn csv(&self) -> String {
        let mut figures: Vec<&String> = Vec::new();
        for (name, value) in self.saes.iter().flat_map(|sae| &sae.figures) {
            if value.is_number() && !figures.contains(&name) {
                figures.push(name);
            }
        }
        let titles = std::iter::once("sae".to_owned()).chain(self.keys.iter().cloned());
        let mut text = line(titles.chain(figures.iter().map(|name| (*name).clone())));
        for sae in &self.saes {
            let config = self.keys.iter().map(|key| sae.config.get(key).map_or_else(String::new, plain));
            let measured = figures.iter().map(|name| sae.figures.get(*name).map_or_else(String::new, plain));
            text += &line(std::iter::once(sae.dir.display().to_string()).chain(config).chain(measured));
        }
        text
    }
}

impl Compared {
    fn get(&self, key: &str) -> Option<&Value> {
        self.config.get(key).or_else(|| self.figures.get(key)).filter(|value| !value.is_null())
    }
}

/// Returns a line of comma-separated values.
fn line(cells: impl Iterator<Item = String>) -> String {
    let cell = |cell: String| match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell,
    };
    cells.map(cell).collect::<Vec<_>>().join(",") + "\n"
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// Formats a value for the table: long floats with four significant digits.
fn short(value: &Value) -> String {
    let text = plain(value);
    match value.as_f64().filter(|_| value.is_f64()) {
        Some(number) if text.len() > 9 => format!("{number:.3e}"),
        _ => text,
    }
}

/// Compares numbers by value, everything else as text.
fn between(a: &Value, b: &Value) -> Ordering {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        _ => plain(a).cmp(&plain(b)),
    }
}

/// Keys that repeat another key, or only say where the run was.
const LEFT_OUT: [&str; 5] = ["wandb_name", "submodule_name", "lm_name", "layer", "buffer.device"];

/// Returns the plain values of a config.json: the trainer's by name, others by path.
fn flat(config: &Value) -> Map<String, Value> {
    fn walk(value: &Value, path: &str, found: &mut Map<String, Value>) {
        match value {
            Value::Object(fields) => {
                for (key, value) in fields {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(value, &path, found);
                }
            }
            // Modifiers are named by type: their position in the list does not matter.
            Value::Array(items) if items.iter().any(Value::is_object) => {
                for item in items {
                    let name = item["type"].as_str().unwrap_or_default();
                    walk(item, &format!("{path}.{name}"), found);
                }
            }
            other => {
                let key = path.strip_prefix("trainer.").unwrap_or(path);
                if !LEFT_OUT.contains(&key) {
                    found.insert(key.to_owned(), other.clone());
                }
            }
        }
    }
    let mut found = Map::new();
    walk(config, "", &mut found);
    found
}

/// Returns the keys in which SAEs differ. A key that some lack, because their classes have no such field, counts only
/// if the others differ in it, or if it tells two SAEs of one class apart.
fn differing(saes: &[Compared]) -> Vec<String> {
    let mut keys: Vec<&String> = Vec::new();
    for key in saes.iter().flat_map(|sae| sae.config.keys()) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let class = |sae: &Compared| (sae.config.get("dict_class").cloned(), sae.config.get("trainer_class").cloned());
    let differs = |key: &&String| {
        let values: Vec<Option<&Value>> =
            saes.iter().map(|sae| sae.config.get(*key).filter(|value| !value.is_null())).collect();
        let mut there = values.iter().flatten();
        let first = there.next();
        let others = there.any(|value| Some(value) != first);
        let lacking = saes.iter().zip(&values).any(|(sae, value)| {
            let alike = |(other, theirs): (&Compared, &Option<&Value>)| class(other) == class(sae) && theirs.is_none();
            value.is_some() && saes.iter().zip(&values).any(alike)
        });
        others || lacking
    };
    keys.into_iter().filter(differs).cloned().collect()
}

/// Quotes a word for a shell if it needs quotes.
pub fn shell_quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:@%,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Returns a path for a command: relative if it lies below the current folder, otherwise unchanged.
pub fn short_path(path: &Path) -> String {
    let here = std::env::current_dir().ok();
    let below = here.and_then(|here| path.strip_prefix(here).ok()).filter(|path| !path.as_os_str().is_empty());
    let path = below.unwrap_or(path).display().to_string();
    // A leading `-` would be read as an option.
    if path.starts_with('-') { format!("./{path}") } else { path }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(name: &str, config: &Value, figures: &Value) -> Compared {
        let figures = figures.as_object().cloned().unwrap_or_default();
        Compared { dir: PathBuf::from(name), name: name.to_owned(), config: flat(config), figures }
    }

    fn comparison() -> Comparison {
        let sae = |k: u64, lr: f64| {
            json!({"trainer": {"dict_class": "A", "k": k, "lr": lr, "seed": 1, "wandb_name": k.to_string()},
                   "buffer": {"text": {"path": "x"}}})
        };
        let saes = vec![
            compared("a", &sae(8, 1e-3), &json!({"l0": 8.5, "parts": {}})),
            compared("b", &sae(16, 1e-3), &json!({})),
            compared("c, d", &sae(4, 1e-3), &json!({"l0": 10.0, "frac_alive": null})),
            compared(
                "e",
                &json!({"trainer": {"dict_class": "B", "lr": 1e-3, "l1_penalty": 2, "seed": 1}}),
                &json!({"l0": 9}),
            ),
        ];
        Comparison { keys: differing(&saes), saes }
    }

    #[test]
    fn only_differing_keys_are_shown() {
        assert_eq!(comparison().keys, ["dict_class", "k"]);
    }

    #[test]
    fn sorting_is_numeric_with_missing_values_last() {
        let mut comparison = comparison();
        let mut sorted = |key: &str| {
            comparison.sort(key).unwrap();
            comparison.saes.iter().map(|sae| sae.name.as_str()).collect::<String>()
        };
        assert_eq!(sorted("l0"), "aec, db");
        assert_eq!(sorted("-l0"), "c, deab");
        assert_eq!(sorted("k"), "c, dabe");
        let error = comparison.sort("fraq_alive").unwrap_err().to_string();
        assert!(error.contains("did you mean `frac_alive`?"), "{error}");
    }

    #[test]
    fn csv_values_with_commas_are_quoted() {
        let csv = comparison().csv();
        assert_eq!(csv, "sae,dict_class,k,l0\na,A,8,8.5\nb,A,16,\n\"c, d\",A,4,10.0\ne,B,,9\n");
    }

    #[test]
    fn shell_words_are_quoted_if_needed() {
        assert_eq!(shell_quoted("runs/a-k=8_2"), "runs/a-k=8_2");
        assert_eq!(shell_quoted("it's here"), r"'it'\''s here'");
        assert_eq!(shell_quoted(""), "''");
    }
}
