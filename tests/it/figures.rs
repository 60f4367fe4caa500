//! docs/figures.md lists exactly the figures that are logged, measured or printed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use dictlearn_core::files::tensors;
use dictlearn_core::registry::{ComponentKind, components};
use serde_json::Value;
use tch::{Device, Kind as Type, Tensor};

use crate::common::{Desk, fixture};

/// The first column of a section's table.
fn documented(section: &str) -> BTreeSet<String> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/figures.md")).unwrap();
    let body = page.split(&format!("\n## {section}\n")).nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = body.lines().filter(|line| line.starts_with("| ")).skip(2);
    rows.map(|row| row.split('|').nth(1).unwrap().trim().trim_matches('`').to_owned()).collect()
}

const MODIFIERS: &str = "- name: modified\n  trainer: {type: standard, lr: 1e-2, l1_penalty: 10, warmup_steps: 2, sparsity_warmup_steps: 4, \
                         resample_steps: null}\n  dictionary: {dict_size: 64}\n  modifiers: [{type: ghost_grads, \
                         threshold: 1}, {type: entropy_penalty, weight: 0.1}, {type: resample, every: 20}]\n";

/// Trains with every trainer and modifier on synthetic features, and crosscoders on two files. Returns the tables.
fn runs(desk: &Desk) -> Vec<String> {
    let mut single = MODIFIERS.to_owned();
    let mut joined = String::new();
    for trainer in components(ComponentKind::Trainer) {
        let crosses = trainer.name.contains("crosscoder");
        let saes = if crosses { &mut joined } else { &mut single };
        let dictionary = components(ComponentKind::Dictionary).into_iter();
        let dictionary = dictionary.into_iter().find(|other| Some(other.name) == trainer.default_dictionary).unwrap();
        *saes += &format!("- {{trainer: {}, dictionary: {}}}\n", trainer.example, dictionary.example);
    }
    let x = |n: i64| Tensor::randn([640, 16], (Type::Float, Device::Cpu)) * n;
    tensors::write(&desk.path("a.safetensors"), &[("activations", x(1))]).unwrap();
    tensors::write(&desk.path("b.safetensors"), &[("activations", x(2))]).unwrap();
    let file = |name: &str| format!("{{type: tensor_file, path: {name}.safetensors, batch_size: 64}}");
    let sources = [
        ("single", single, "{type: synthetic, activation_dim: 32, n_features: 64, batch_size: 64}".to_owned()),
        ("joined", joined, format!("{{type: joined, sources: {{a: {}, b: {}}}}}", file("a"), file("b"))),
    ];
    let mut tables = Vec::new();
    for (name, saes, source) in sources {
        let metrics = match name {
            "single" => "[{type: reconstruction}, {type: ground_truth_recovery}]",
            _ => "[{type: reconstruction}, {type: crosscoder}]",
        };
        let head =
            format!("steps: 50\nlog_every: 1\noutput_dir: {name}\nmetrics: {metrics}\nloggers: [{{type: jsonl}}]\n");
        desk.write(&format!("{name}.yaml"), &format!("{head}source: {source}\nsaes:\n{saes}"));
        tables.push(desk.ok(&["train", &format!("{name}.yaml")]));
    }
    tables
}

/// Collects the keys of an object; nested keys follow a dot. Names of parts are skipped.
fn keys(figures: &Value, found: &mut BTreeSet<String>) {
    for (key, value) in figures.as_object().unwrap() {
        found.insert(key.clone());
        match (key.as_str(), value) {
            ("parts", Value::Object(parts)) => {
                let inner = parts.values().flat_map(|part| part.as_object().unwrap().keys());
                found.extend(inner.map(|inner| format!("parts.{inner}")));
            }
            ("measured", Value::Object(measured)) => {
                found.extend(measured.keys().map(|inner| format!("measured.{inner}")));
            }
            _ => {}
        }
    }
}

#[test]
fn docs_list_exactly_the_reported_figures() {
    let desk = Desk::new();
    let mut tables = runs(&desk);
    let rows: Vec<Value> =
        ["single", "joined"].iter().flat_map(|run| desk.log(&format!("{run}/metrics.jsonl"))).collect();
    let logged: BTreeSet<String> = rows.iter().flat_map(|row| row.as_object().unwrap().keys().cloned()).collect();
    assert_eq!(logged, documented("The log"));

    desk.golden_sae("top_k");
    let model = fixture("models/gpt_neox");
    let source = format!(
        "source: {{type: language_model, model: {model:?}, submodule: gpt_neox.layers.1, out_batch_size: 8, shuffle: \
         false, text: {{type: token_file, path: {:?}}}}}\nmetrics: [{{type: reconstruction}}, {{type: loss_recovered}}]\n",
        model.join("io.safetensors")
    );
    desk.write("eval.yaml", &source);
    let args = ["eval", "top_k", "--config", "eval.yaml"];
    tables.push(desk.ok(&args));
    let mut measured = BTreeSet::new();
    keys(&serde_json::from_str(&desk.ok(&[&args[..], &["--json"]].concat())).unwrap(), &mut measured);
    for file in ["single/top_k/eval.json", "joined/crosscoder/eval.json"] {
        keys(&desk.json(file), &mut measured);
    }
    assert_eq!(measured, documented("eval.json"));

    let mut columns = BTreeSet::new();
    for table in &tables {
        let titles = table.lines().next().unwrap().split('|').map(str::trim).filter(|title| !title.is_empty());
        columns.extend(titles.skip(1).map(str::to_owned));
    }
    assert_eq!(columns, documented("The table"));
}

/// `l2_loss` is a norm in the model's units; the log has its square in training units under another name.
#[test]
fn names_shared_by_log_and_eval_json_mean_the_same() {
    let shared: BTreeSet<String> = documented("The log").intersection(&documented("eval.json")).cloned().collect();
    assert_eq!(shared.into_iter().collect::<Vec<_>>(), ["frac_variance_explained", "l0"]);
}
