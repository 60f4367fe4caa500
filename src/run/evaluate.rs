//! Evaluation: metrics of dictionaries, and their table.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Result, bail};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::config::RunConfig;
use dictlearn_core::data::TaggedSource;
use dictlearn_core::data::{ActivationSource, Activations, ModelSource, Part, Purpose, Site, SourceCx};
use dictlearn_core::error::{InputError, Mistakes, Under};
use dictlearn_core::files::from_yaml;
use dictlearn_core::files::state::State;
use dictlearn_core::files::tensors::write_file;
use dictlearn_core::lm::{LanguageModel, Tokens};
use dictlearn_core::machine::memory::MemoryNeed;
use dictlearn_core::registry;
use dictlearn_core::registry::find;
use dictlearn_core::report::Subject;
use dictlearn_core::report::TaggedMetric;

/// The source of an evaluation, and its config key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured<'a> {
    /// `eval_source` or `source`.
    pub key: &'static str,
    /// Config of the source.
    pub source: &'a dyn TaggedSource,
}

impl<'a> Measured<'a> {
    /// Returns a separate source: `eval_source`, or the rows that `source` holds out. Without one, a run evaluates on
    /// the rest of its training stream.
    pub fn own(config: &'a RunConfig) -> Option<Self> {
        match &config.eval_source {
            Some(source) => Some(Measured { key: "eval_source", source: &**source }),
            None => config.source.held_out().map(|_| Measured { key: "source", source: &*config.source }),
        }
    }

    /// Returns the separate source, or otherwise the whole of `source`.
    pub fn of(config: &'a RunConfig) -> Self {
        Measured::own(config).unwrap_or(Measured { key: "source", source: &*config.source })
    }

    /// Builds the source for evaluation.
    pub fn build(self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        self.source.build(&SourceCx { purpose: Purpose::Evaluation, ..*cx }).under(self.key)
    }
}

/// Returns the index in `eval_source` of a site that an SAE trains at.
pub(crate) fn eval_site(source: &dyn ActivationSource, site: &Site) -> Result<usize> {
    let sites = source.sites();
    let Some(found) = Site::find(&sites, &site.name) else {
        let names: Vec<&str> = sites.iter().map(|site| site.name.as_str()).collect();
        bail!(
            InputError::new(format!("`eval_source` has no site `{}`, at which an SAE trains", site.name))
                .field("eval_source")
                .help(format!("its sites: {}", names.join(", ")))
        );
    };
    if sites[found].widths() != site.widths() {
        bail!(
            InputError::new(format!(
                "the activations of `eval_source` have width {}, but those of `source` have width {}",
                sites[found].activation_dim, site.activation_dim
            ))
            .field("eval_source")
            .help("name the same model and site in both, or set `eval_source: null`")
        );
    }
    Ok(found)
}

/// Overlap of a source that training read to the end, if the source reports no details.
pub(crate) const ALL_READ: &str =
    "because training read all of it: add an `eval_source` or more data to keep them apart";

/// Warns that SAEs are evaluated on their training data.
pub(crate) fn warn_of_overlap(shared: &str) {
    tracing::warn!("the metrics are computed on data that the SAEs were trained on, {shared}");
}

/// Refuses metrics that cannot be computed on a source, before training.
pub fn check(metrics: &[Box<dyn TaggedMetric>], source: &mut dyn ActivationSource) -> Result<()> {
    let mut mistakes = Mistakes::new();
    for (index, metric) in metrics.iter().enumerate() {
        let Some(built) = mistakes.keep(metric.build().under(format_args!("metrics[{index}]")))? else { continue };
        if let Some(why) = built.refuses(source) {
            mistakes.add(
                InputError::new(format!("the metric `{}` cannot be computed here: {why}", metric.typetag_name()))
                    .field(format!("metrics[{index}]"))
                    .help("remove it from `metrics`, or use a source that has what it needs"),
            );
        }
    }
    Ok(mistakes.into_result()?)
}

/// Returns the memory for evaluating dictionaries of at most `features` features, besides `own` bytes of a separate
/// source.
pub(crate) fn memory(
    metrics: &[Box<dyn TaggedMetric>],
    source: &mut dyn ActivationSource,
    features: i64,
    own: u64,
) -> Result<Option<MemoryNeed>> {
    if metrics.is_empty() {
        return Ok(None);
    }
    // Measured: a batch's features, and tensors computed from them.
    let encoded = 6 * 4 * source.batch_size().unwrap_or(0) as u64 * features as u64;
    let mut most = encoded;
    for metric in metrics {
        most = most.max(metric.build()?.memory(source));
    }
    Ok(Some(MemoryNeed::passing("the metrics", own + most, "the batch sizes, or remove metrics")))
}

/// Refuses metrics that give single activations to a dictionary that reads whole contexts.
fn check_contexts(metrics: &[Box<dyn TaggedMetric>], subjects: &[Subject]) -> Result<()> {
    let Some(subject) = subjects.iter().find(|subject| subject.dictionary.reads_contexts()) else { return Ok(()) };
    for (index, metric) in metrics.iter().enumerate() {
        if !metric.build()?.gives_contexts() {
            bail!(
                InputError::new(format!(
                    "the metric `{}` cannot measure a {}, whose features depend on earlier positions",
                    metric.typetag_name(),
                    subject.dictionary.class()
                ))
                .field(format!("metrics[{index}]"))
                .help("use metrics that run the language model on whole contexts, such as `loss_recovered`")
            );
        }
    }
    Ok(())
}

/// Returns the default metrics that can be computed on a source, for configs that name none.
pub fn default_metrics(source: &mut dyn ActivationSource) -> Result<Vec<Box<dyn TaggedMetric>>> {
    let mut metrics = Vec::new();
    for name in registry::defaults(registry::ComponentKind::Metric) {
        let metric: Box<dyn TaggedMetric> = from_yaml(&format!("{{type: {name}}}"))?;
        if metric.build()?.refuses(source).is_none() {
            metrics.push(metric);
        }
    }
    Ok(metrics)
}

/// Settings of an evaluation, besides the metrics.
pub struct Measuring {
    /// Config key of the source: `source` or `eval_source`.
    pub key: &'static str,
    /// The source's [`origin`].
    pub origin: Map<String, Value>,
    /// Whether each metric starts at the beginning of the data, instead of where the metric before it stopped.
    pub from_the_beginning: bool,
    /// Whether the user was warned already that the dictionaries are evaluated on their training data.
    pub overlap_is_known: bool,
}

/// Evaluates dictionaries, each at its site and all on the same data. Returns one object of metrics for each, in order,
/// with a description of the data under [`MEASURED`].
pub fn evaluate(
    metrics: &[Box<dyn TaggedMetric>],
    subjects: &[Subject],
    source: &mut dyn ActivationSource,
    measuring: &Measuring,
) -> Result<Vec<Map<String, Value>>> {
    let Measuring { key, origin, from_the_beginning, overlap_is_known } = measuring;
    let mut overlap_is_known = *overlap_is_known;
    let mut results = vec![Map::new(); subjects.len()];
    let mut counts: Vec<(&str, Count)> = Vec::new();
    check(metrics, source)?;
    check_contexts(metrics, subjects)?;
    for (index, metric) in metrics.iter().enumerate() {
        if *from_the_beginning && index > 0 {
            source.rewind()?;
        }
        let measure = |source: &mut dyn ActivationSource| {
            let mut counted = Counted::new(source);
            let found = tch::no_grad(|| metric.build()?.evaluate(subjects, &mut counted)).under(key)?;
            Ok::<_, anyhow::Error>(found.map(|found| (found, counted.count())))
        };
        let mut found = measure(source)?;
        if found.is_none() {
            source.rewind()?;
            if !from_the_beginning && !source.is_endless() && !overlap_is_known {
                overlap_is_known = true;
                warn_of_overlap(&source.overlap(&source.describe()).unwrap_or(ALL_READ.to_owned()));
            }
            found = measure(source)?;
        }
        let Some((found, count)) = found else {
            let notes = source.notes().join("; ");
            let notes = if notes.is_empty() { notes } else { format!(" ({notes})") };
            bail!(
                InputError::new(format!("the source has no data to measure `{}` on{notes}", metric.typetag_name()))
                    .help("its data is shorter than one batch: add data, or make the batches smaller")
            );
        };
        for (result, figures) in results.iter_mut().zip(found) {
            result.extend(figures);
        }
        if count.tokens > 0 {
            counts.push((metric.typetag_name(), count));
        }
    }
    warn(&counts, &results, subjects);
    if let Some(most) = counts.iter().map(|(_, count)| *count).max_by_key(|count| count.tokens) {
        let mut measured = origin.clone();
        measured.extend(most.json());
        let by_metric: Map<_, _> =
            counts.iter().map(|(name, count)| ((*name).to_owned(), count.json().into())).collect();
        measured.insert("by_metric".to_owned(), by_metric.into());
        let sites = source.sites();
        for (result, subject) in results.iter_mut().zip(subjects) {
            measured.insert("site".to_owned(), sites[subject.site].name.as_str().into());
            result.insert(MEASURED.to_owned(), measured.clone().into());
        }
    }
    Ok(results)
}

/// Key of the description of the data in an SAE's metrics.
pub const MEASURED: &str = "measured";

/// With fewer tokens than this, metrics are mostly noise.
const FEW_TOKENS: u64 = 1000;

/// Warns of metrics computed on too little data.
fn warn(counts: &[(&str, Count)], results: &[Map<String, Value>], subjects: &[Subject]) {
    let few = counts.iter().filter(|(_, count)| count.tokens < FEW_TOKENS);
    let few: Vec<String> = few.map(|(name, count)| format!("{} tokens ({name})", count.tokens)).collect();
    if !few.is_empty() {
        tracing::warn!(
            "the metrics are computed on {}: below {FEW_TOKENS} tokens they are mostly noise; give more data, or raise \
             the metric's `n_batches`",
            few.join(" and ")
        );
        return;
    }
    // A feature counts as alive once it fires. With few tokens for each feature, many live features do not fire.
    let figure = |result: &Map<String, Value>, name: &str| result.get(name).and_then(Value::as_f64);
    let tokens = counts.iter().map(|(_, count)| count.tokens).min().unwrap_or(0);
    let short = |(result, subject): (&Map<String, Value>, &Subject)| {
        let (l0, alive) = figure(result, "l0").zip(figure(result, "frac_alive"))?;
        let needed = (10.0 * subject.dictionary.dims().features as f64 / l0.max(1e-3)).ceil();
        (alive < 1.0 && (tokens as f64) < needed).then_some(needed)
    };
    if let Some(needed) = results.iter().zip(subjects).filter_map(short).max_by(f64::total_cmp) {
        tracing::warn!(
            "frac_alive is too low: in {tokens} tokens many live features do not fire; evaluate {needed:.0} tokens or \
             more (the metric's `n_batches`)"
        );
    }
}

/// Amount of data that a metric read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    tokens: u64,
    /// If the source knows them.
    contexts: Option<u64>,
}

impl Count {
    fn json(self) -> Map<String, Value> {
        let mut json = Map::from_iter([("tokens".to_owned(), self.tokens.into())]);
        if let Some(contexts) = self.contexts {
            json.insert("contexts".to_owned(), contexts.into());
        }
        json
    }
}

/// A source that counts the data read from it.
struct Counted<'a> {
    source: &'a mut dyn ActivationSource,
    tokens: u64,
    /// Contexts whose activations were read, by number.
    contexts: HashSet<i64>,
    /// Number of contexts read as tokens.
    rows: u64,
}

impl<'a> Counted<'a> {
    fn new(source: &'a mut dyn ActivationSource) -> Self {
        Counted { source, tokens: 0, contexts: HashSet::new(), rows: 0 }
    }

    fn count(&self) -> Count {
        let contexts = self.contexts.len() as u64 + self.rows;
        Count { tokens: self.tokens, contexts: (contexts > 0).then_some(contexts) }
    }

    fn model_source(&self) -> &dyn ModelSource {
        self.source.model_source().expect("`language_model` checked that it exists")
    }
}

impl ActivationSource for Counted<'_> {
    fn sites(&self) -> Vec<Site> {
        self.source.sites()
    }

    fn next_batch(&mut self) -> Result<Option<Activations>> {
        let batch = self.source.next_batch()?;
        if let Some(activations) = &batch {
            self.tokens += activations.len() as u64;
            if let Some(tokens) = &activations.tokens {
                let contexts: Vec<i64> = tokens.select(1, 1).to_device(Device::Cpu).try_into()?;
                self.contexts.extend(contexts);
            }
        }
        Ok(batch)
    }

    fn rewind(&mut self) -> Result<()> {
        self.source.rewind()
    }

    fn passes(&self) -> Option<u64> {
        self.source.passes()
    }

    fn is_endless(&self) -> bool {
        self.source.is_endless()
    }

    fn mean_squared_norms(&mut self) -> Result<Vec<f64>> {
        self.source.mean_squared_norms()
    }

    fn language_model(&mut self) -> Option<&mut dyn ModelSource> {
        if self.source.model_source().is_none() {
            return self.source.language_model();
        }
        Some(self)
    }

    fn model_source(&self) -> Option<&dyn ModelSource> {
        self.source.model_source()
    }

    fn true_features(&self) -> Option<Tensor> {
        self.source.true_features()
    }

    fn memory(&self) -> Vec<MemoryNeed> {
        self.source.memory()
    }

    fn batch_size(&self) -> Option<i64> {
        self.source.batch_size()
    }

    fn describe(&self) -> Value {
        self.source.describe()
    }

    fn origin(&self, row: i64) -> Option<String> {
        self.source.origin(row)
    }

    fn state(&self) -> Result<State> {
        self.source.state()
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.source.restore(state)
    }

    fn notes(&self) -> Vec<String> {
        self.source.notes()
    }
}

impl ModelSource for Counted<'_> {
    fn model(&self) -> &dyn LanguageModel {
        self.model_source().model()
    }

    fn reads(&self, site: usize) -> &Part {
        self.model_source().reads(site)
    }

    fn writes(&self, site: usize) -> &Part {
        self.model_source().writes(site)
    }

    fn context_length(&self) -> i64 {
        self.model_source().context_length()
    }

    fn next_tokens(&mut self, rows: i64) -> Result<Option<Tokens>> {
        let Some(source) = self.source.language_model() else { return Ok(None) };
        let tokens = source.next_tokens(rows)?;
        if let Some(tokens) = &tokens {
            self.rows += tokens.size().0 as u64;
            self.tokens += tokens.mask.sum(Kind::Int64).int64_value(&[]) as u64;
        }
        Ok(tokens)
    }

    fn token_texts(&self, ids: &[i64]) -> Result<Vec<String>> {
        self.model_source().token_texts(ids)
    }
}

/// Returns a source's type and model, and its text or file, from its config; for joined sources, those of each.
pub fn origin(source: &dyn TaggedSource) -> Result<Map<String, Value>> {
    Ok(origin_of(&serde_json::to_value(source)?))
}

fn origin_of(config: &Value) -> Map<String, Value> {
    fn collect(config: &Value, key: &str, found: &mut Vec<Value>) {
        match config {
            Value::Object(fields) => match fields.get(key).filter(|value| !value.is_null()) {
                Some(value) if found.contains(value) => {}
                Some(value) => found.push(value.clone()),
                None => fields.values().for_each(|value| collect(value, key, found)),
            },
            Value::Array(items) => items.iter().for_each(|item| collect(item, key, found)),
            _ => {}
        }
    }
    let mut origin = Map::from_iter([("source".to_owned(), config["type"].clone())]);
    for key in ["model", "text", "path"] {
        let mut found = Vec::new();
        collect(config, key, &mut found);
        // A text contains its own path.
        if key == "path" && origin.contains_key("text") {
            continue;
        }
        match found.len() {
            0 => {}
            1 => drop(origin.insert(key.to_owned(), found.remove(0))),
            _ => drop(origin.insert(key.to_owned(), found.into())),
        }
    }
    origin
}

/// Describes the data of an evaluation in one line.
fn measured_line(measured: &Value) -> String {
    let each = |value: &Value| value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
    let text = |text: &Value| -> String {
        let name = text["type"].as_str().unwrap_or_default();
        let schema =
            find(registry::ComponentKind::Text, name).map(|text| (text.schema)().to_value()).unwrap_or_default();
        // Show what the user chose: string fields that differ from their defaults.
        let chosen = text.as_object().into_iter().flatten().filter(|(key, value)| {
            *key != "type" && value.is_string() && schema["properties"][*key]["default"] != **value
        });
        let words = chosen.filter_map(|(_, value)| value.as_str());
        std::iter::once(name).chain(words).collect::<Vec<_>>().join(" ")
    };
    let what: Vec<String> = match (measured.get("text"), measured.get("path")) {
        (Some(texts), _) => each(texts).iter().map(text).collect(),
        (None, Some(paths)) => each(paths).iter().filter_map(|path| Some(path.as_str()?.to_owned())).collect(),
        (None, None) => vec![format!("the source {}", measured["source"].as_str().unwrap_or_default())],
    };
    let some = |count: u64, of: &str| format!("{count} {of}{}", if count == 1 { "" } else { "s" });
    let count = |count: &Value| {
        let contexts = count["contexts"]
            .as_u64()
            .map_or_else(String::new, |contexts| format!(" in {}", some(contexts, "context")));
        some(count["tokens"].as_u64().unwrap_or_default(), "token") + &contexts
    };
    let by_metric: Vec<_> = measured["by_metric"].as_object().into_iter().flatten().collect();
    let counts = match by_metric.first() {
        Some((_, first)) if by_metric.iter().all(|(_, other)| other == first) => count(first),
        _ => by_metric.iter().map(|(name, own)| format!("{} ({name})", count(own))).collect::<Vec<_>>().join(", "),
    };
    format!("measured on {}: {counts}", what.join(" and "))
}

/// Describes the data of several evaluations: one line, or a line with names for each different data set.
pub fn measured_lines(rows: &[(String, Map<String, Value>)]) -> Vec<String> {
    let mut lines: Vec<(String, Vec<&str>)> = Vec::new();
    for (name, result) in rows {
        let Some(measured) = result.get(MEASURED) else { continue };
        let line = measured_line(measured);
        match lines.iter_mut().find(|(other, _)| *other == line) {
            Some((_, names)) => names.push(name),
            None => lines.push((line, vec![name])),
        }
    }
    if let [(line, _)] = &lines[..] {
        return vec![line.clone()];
    }
    lines.into_iter().map(|(line, names)| format!("{}: {line}", names.join(", "))).collect()
}

/// Writes an SAE's eval.json.
pub fn write(dir: &Path, result: &Map<String, Value>) -> Result<()> {
    write_file(&dir.join("eval.json"), serde_json::to_string_pretty(result)?.as_bytes())
}

type Column = (&'static str, fn(&dyn Fn(&str) -> Option<f64>) -> Option<String>);

/// The columns of the table: the reference's, and our own.
const COLUMNS: [Column; 8] = [
    ("Variance explained", |figure| Some(percent(figure("frac_variance_explained")?))),
    ("L1", |figure| Some(format!("{:.2}", figure("l1_loss")?))),
    ("L0", |figure| Some(format!("{:.2}", figure("l0")?))),
    ("% Alive", |figure| Some(percent(figure("frac_alive")?))),
    ("CE diff", |figure| Some(format!("{:.4}", figure("loss_reconstructed")? - figure("loss_original")?))),
    ("% CE recovered", |figure| Some(percent(figure("frac_recovered")?))),
    ("Max cosine", |figure| Some(format!("{:.3}", figure("mean_max_cosine_similarity")?))),
    ("% True features", |figure| Some(percent(figure("frac_features_recovered")?))),
];

/// Returns the table of metrics: a row for each SAE, the columns that a metric filled, and the data below.
pub fn table(rows: &[(String, Map<String, Value>)]) -> String {
    let table = table_with(&[], rows.iter().map(|(name, result)| (name.clone(), Vec::new(), result)));
    std::iter::once(table).chain(measured_lines(rows)).collect::<Vec<_>>().join("\n")
}

/// Returns the table with extra columns after the name. Each row has a name, cells of these columns, and metrics.
pub(crate) fn table_with<'a>(
    own: &[String],
    rows: impl IntoIterator<Item = (String, Vec<String>, &'a Map<String, Value>)>,
) -> String {
    let rows: Vec<_> = rows.into_iter().collect();
    let cell = |result: &Map<String, Value>, (_, cell): &Column| cell(&|key| result.get(key).and_then(Value::as_f64));
    let filled = |column: &&Column| rows.iter().any(|(_, _, result)| cell(result, column).is_some());
    let columns: Vec<&Column> = COLUMNS.iter().filter(filled).collect();
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let titles = columns.iter().map(|(title, _)| *title);
    table.set_header(std::iter::once("SAE").chain(own.iter().map(String::as_str)).chain(titles));
    for (name, own, result) in &rows {
        let cells = columns.iter().map(|column| cell(result, column).unwrap_or_else(|| "–".to_owned()));
        table.add_row(std::iter::once(name.clone()).chain(own.iter().cloned()).chain(cells));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// Returns the table of tokens and their strongest features for `encode --text`.
pub fn token_table(tokens: &[Value]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["", "Token", "L0", "Strongest features"]);
    let several = tokens.iter().any(|token| token["text"] != tokens[0]["text"]);
    for token in tokens {
        let place =
            if several { format!("{}:{}", token["text"], token["position"]) } else { token["position"].to_string() };
        let features = token["features"].as_array().into_iter().flatten();
        let feature =
            |feature: &Value| format!("{} {:.3}", feature["index"], feature["activation"].as_f64().unwrap_or_default());
        let features: Vec<String> = features.map(feature).collect();
        // Debug format shows spaces at the ends of a token, and escapes line breaks.
        let text = format!("{:?}", token["token"].as_str().unwrap_or_default());
        table.add_row([place, text.replace('|', "\\|"), token["l0"].to_string(), features.join(", ")]);
    }
    for column in [0, 2] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

fn percent(fraction: f64) -> String {
    format!("{:.1}", 100.0 * fraction)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn joined_sources_list_each_text_and_file_once() {
        let model =
            |text: &str| json!({"type": "language_model", "model": "m", "text": {"type": "files", "path": text}});
        let joined = |a: Value, b: Value| json!({"type": "joined", "sources": {"a": a, "b": b}});
        let origin = origin_of(&joined(model("x"), model("x")));
        assert_eq!(
            Value::from(origin),
            json!({"source": "joined", "model": "m", "text": {"type": "files", "path": "x"}})
        );
        let file = |path: &str| json!({"type": "tensor_file", "path": path});
        let origin = origin_of(&joined(file("x"), file("y")));
        assert_eq!(Value::from(origin), json!({"source": "joined", "path": ["x", "y"]}));
    }

    #[test]
    fn evaluation_data_is_described_in_one_line() {
        let measured = json!({"source": "s", "path": ["x", "y"], "by_metric": {"a": {"tokens": 1, "contexts": 1}}});
        assert_eq!(measured_line(&measured), "measured on x and y: 1 token in 1 context");
        let measured = json!({"source": "s", "by_metric": {"a": {"tokens": 8}, "b": {"tokens": 16, "contexts": 2}}});
        assert_eq!(measured_line(&measured), "measured on the source s: 8 tokens (a), 16 tokens in 2 contexts (b)");
    }
}
