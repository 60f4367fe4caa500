//! Evaluation: metrics over dictionaries, and the table of what they found.

use std::path::Path;

use anyhow::{bail, Result};
use comfy_table::{presets, CellAlignment, Table};
use serde_json::{Map, Value};

use crate::config::{from_yaml, InputError, RunConfig, Under};
use crate::memory::Need;
use crate::metric::{MetricConfig, Subject};
use crate::registry::{self, Kind};
use crate::source::{ActivationSource, Purpose, SourceConfig, SourceCx};
use crate::tensors::write_file;

/// What metrics are measured on, and the key of the config that says it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured<'a> {
    /// `eval_source` or `source`.
    pub key: &'static str,
    /// The source, to be opened for this.
    pub source: &'a dyn SourceConfig,
}

impl<'a> Measured<'a> {
    /// A source of their own: `eval_source`, or the rows that `source` holds out. Without, a run measures on what is left
    /// of the stream that it trains on.
    pub fn own(config: &'a RunConfig) -> Option<Self> {
        match &config.eval_source {
            Some(source) => Some(Measured { key: "eval_source", source: &**source }),
            None => config.source.held_out().map(|_| Measured { key: "source", source: &*config.source }),
        }
    }

    /// The same; without, `source`, of which all is measured.
    pub fn of(config: &'a RunConfig) -> Self {
        Measured::own(config).unwrap_or(Measured { key: "source", source: &*config.source })
    }

    /// Opens it.
    pub fn build(self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        self.source.build(&SourceCx { purpose: Purpose::Evaluation, ..*cx }).under(self.key)
    }
}

/// Where training left nothing unread of a source that cannot say more.
pub(crate) const ALL_READ: &str = "of which it left nothing unread: an `eval_source` or more data keeps the two apart";

/// Tells the user that SAEs are measured on what they were trained on.
pub(crate) fn warn_of_overlap(shared: &str) {
    eprintln!("warning: the metrics are measured on what the SAEs were trained on, {shared}");
}

/// Refuses metrics that cannot be computed on a source, before anything is trained for them.
pub fn check(metrics: &[Box<dyn MetricConfig>], source: &mut dyn ActivationSource) -> Result<()> {
    for (index, metric) in metrics.iter().enumerate() {
        if let Some(why) = metric.build().under(format_args!("metrics[{index}]"))?.refuses(source) {
            bail!(InputError::new(format!("the metric `{}` cannot be computed here: {why}", metric.typetag_name()))
                .field(format!("metrics[{index}]"))
                .help("leave it out of `metrics`, or give a source that has what it needs"));
        }
    }
    Ok(())
}

/// What measuring dictionaries of at most so many features takes memory for, beside so many bytes that a source of its own
/// takes.
pub(crate) fn memory(
    metrics: &[Box<dyn MetricConfig>],
    source: &mut dyn ActivationSource,
    features: i64,
    own: u64,
) -> Result<Option<Need>> {
    if metrics.is_empty() {
        return Ok(None);
    }
    // As measured: a batch's features and what is made of them.
    let encoded = 6 * 4 * source.batch_size().unwrap_or(0) as u64 * features as u64;
    let mut most = encoded;
    for metric in metrics {
        most = most.max(metric.build()?.memory(source));
    }
    Ok(Some(Need::passing("the metrics", own + most, "the batch sizes, or leave metrics out")))
}

/// The usual metrics that can be computed on a source, with their defaults: for configs that name none.
pub fn usual(source: &mut dyn ActivationSource) -> Result<Vec<Box<dyn MetricConfig>>> {
    let mut metrics = Vec::new();
    for name in registry::usual(Kind::Metric) {
        let metric: Box<dyn MetricConfig> = from_yaml(&format!("{{type: {name}}}"))?;
        if metric.build()?.refuses(source).is_none() {
            metrics.push(metric);
        }
    }
    Ok(metrics)
}

/// Measures dictionaries, each on its site and all on the same data. One object of figures for each, in their order.
///
/// Each metric goes on where the one before it left the source, or starts again `from_the_beginning`.
pub fn evaluate(
    metrics: &[Box<dyn MetricConfig>],
    subjects: &[Subject],
    source: &mut dyn ActivationSource,
    from_the_beginning: bool,
) -> Result<Vec<Map<String, Value>>> {
    let mut results = vec![Map::new(); subjects.len()];
    check(metrics, source)?;
    for (index, metric) in metrics.iter().enumerate() {
        if from_the_beginning && index > 0 {
            source.rewind()?;
        }
        let measure = |source: &mut dyn ActivationSource| tch::no_grad(|| metric.build()?.evaluate(subjects, source));
        let mut found = measure(source)?;
        if found.is_none() {
            source.rewind()?;
            if !from_the_beginning && !source.is_endless() {
                warn_of_overlap(&source.overlap(&source.describe()).unwrap_or(ALL_READ.to_owned()));
            }
            found = measure(source)?;
        }
        let Some(found) = found else {
            let notes = source.notes().join("; ");
            let notes = if notes.is_empty() { notes } else { format!(" ({notes})") };
            bail!(InputError::new(format!("the source has no data to measure `{}` on{notes}", metric.typetag_name()))
                .help("its data is shorter than one batch: add data, or make the batches smaller"));
        };
        for (result, figures) in results.iter_mut().zip(found) {
            result.extend(figures);
        }
    }
    Ok(results)
}

/// Writes an SAE's eval.json.
pub fn write(dir: &Path, result: &Map<String, Value>) -> Result<()> {
    write_file(&dir.join("eval.json"), serde_json::to_string_pretty(result)?.as_bytes())
}

/// The reference's table, one row for each SAE: of its columns and our own those that a metric has filled.
pub fn table(rows: &[(String, Map<String, Value>)]) -> String {
    type Column = (&'static str, fn(&dyn Fn(&str) -> Option<f64>) -> Option<String>);
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
    let cell = |result: &Map<String, Value>, (_, cell): &Column| cell(&|key| result.get(key).and_then(Value::as_f64));
    let filled = |column: &&Column| rows.iter().any(|(_, result)| cell(result, column).is_some());
    let columns: Vec<&Column> = COLUMNS.iter().filter(filled).collect();
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(std::iter::once("SAE").chain(columns.iter().map(|(title, _)| *title)));
    for (name, result) in rows {
        let cells = columns.iter().map(|column| cell(result, column).unwrap_or_else(|| "–".to_owned()));
        table.add_row(std::iter::once(name.clone()).chain(cells));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// A table of tokens and their strongest features, as `encode --text` has them.
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
        // Spaces at its ends are part of a token, and line ends must not break the table.
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
