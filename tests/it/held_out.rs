//! Held-out rows of a source: never trained on, and the only rows that are measured.

use dictlearn_core::data::{HeldOut, Purpose};
use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::common::{Desk, fixture};

const ROWS: u64 = 1280;

/// A desk with activations in x.safetensors; poisoned.safetensors has NaN in the rows of one purpose.
fn desk(poisoned: Purpose) -> Desk {
    let desk = Desk::new();
    let all = TensorFile::open(&fixture("trainers/batches.safetensors")).unwrap().tensor("activations").unwrap();
    let x = all.narrow(0, 0, ROWS as i64).contiguous();
    tensors::write(&desk.path("x.safetensors"), &[("activations", x.shallow_clone())]).unwrap();
    let rows = HeldOut::new(0.1, 0).unwrap().wanted(0..ROWS, poisoned).into_iter().flatten();
    let rows = Tensor::from_slice(&rows.map(|row| row as i64).collect::<Vec<_>>());
    let x = x.index_fill(0, &rows, f64::NAN);
    tensors::write(&desk.path("poisoned.safetensors"), &[("activations", x)]).unwrap();
    desk
}

/// 60 steps with batches of 64: three passes over the rows.
fn config(source: &str, more: &str) -> String {
    format!(
        "steps: 60\noutput_dir: run\nprecision: float32\nsource: {{type: tensor_file, batch_size: 64, {source}}}\n\
         saes: [{{name: a, trainer: {{type: top_k, warmup_steps: 0}}, dictionary: {{dict_size: 64, k: 4}}}}]\n{more}\n"
    )
}

const METRICS: &str = "metrics: [{type: reconstruction, n_batches: 100}]";

#[test]
fn held_out_rows_are_measured_and_never_trained_on() {
    for shuffle in [true, false] {
        // Training never reads the held-out rows, which hold NaN; the metrics do.
        let held = desk(Purpose::Evaluation);
        let source = format!("path: poisoned.safetensors, shuffle: {shuffle}, held_out: 0.1");
        held.write("config.yaml", &config(&source, "metrics: []\nnormalize_activations: true"));
        held.ok(&["train", "config.yaml"]);
        let said = held.refused(&["eval", "run/a", "--set", "metrics=[{type: reconstruction}]"]);
        assert!(said.contains("not finite"), "{said}");
        // The metrics never read the training rows.
        let trained = desk(Purpose::Training);
        trained.write("config.yaml", &config(&source.replace("poisoned", "x"), METRICS));
        let run = trained.run(&["train", "config.yaml"]);
        assert!(run.code == 0 && !run.stderr.contains("trained on"), "{}", run.stderr);
        let path = trained.path("poisoned.safetensors");
        let set = format!("source.path={}", path.display());
        let again: Value = serde_json::from_str(&trained.ok(&["eval", "run/a", "--json", "--set", &set])).unwrap();
        let first = trained.json("run/a/eval.json");
        for key in ["l2_loss", "l0", "frac_variance_explained", "frac_alive"] {
            let [first, again] = [&first, &again].map(|figures| figures[key].as_f64().unwrap());
            assert!((first - again).abs() < 1e-4 * first.abs(), "{key}: {first} {again}");
        }
    }
}

/// Compares the saved `l2_loss` of `run/a` with that of the rows of `x.safetensors` that `held_out: 0.1` holds out.
/// Returns it.
fn measured_on_held_out_rows(desk: &Desk) -> f64 {
    let rows = HeldOut::new(0.1, 0).unwrap().wanted(0..ROWS, Purpose::Evaluation).into_iter().flatten();
    let rows = Tensor::from_slice(&rows.map(|row| row as i64).collect::<Vec<_>>());
    let x = TensorFile::open(&desk.path("x.safetensors")).unwrap().tensor("activations").unwrap();
    let x = x.index_select(0, &rows);
    tensors::write(&desk.path("held.safetensors"), &[("x", x.shallow_clone())]).unwrap();
    desk.ok(&["encode", "run/a", "--input", "held.safetensors", "--output", "y.safetensors"]);
    let recon = TensorFile::open(&desk.path("y.safetensors")).unwrap().tensor("recon").unwrap();
    let l2 = (x - recon).norm_scalaropt_dim(2.0, [1], false).mean(Kind::Double).double_value(&[]);
    let found = desk.json("run/a/eval.json")["l2_loss"].as_f64().unwrap();
    assert!((found - l2).abs() < 1e-4 * l2, "{found} {l2}");
    found
}

#[test]
fn an_eval_source_over_the_same_file_measures_the_held_out_rows() {
    let desk = desk(Purpose::Training);
    let eval_source = format!("eval_source: {{shuffle: false}}\n{METRICS}");
    desk.write("config.yaml", &config("path: x.safetensors, held_out: 0.1", &eval_source));
    let run = desk.run(&["train", "config.yaml"]);
    assert!(run.code == 0 && !run.stderr.contains("trained on"), "{}", run.stderr);
    let found = measured_on_held_out_rows(&desk);
    // Measuring all rows gives another figure and a warning.
    let run = desk.run(&["eval", "run/a", "--json", "--set", "eval_source.held_out=0"]);
    assert!(run.code == 0 && run.stderr.contains("warning") && run.stderr.contains("held_out"), "{}", run.stderr);
    let all: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_ne!(all["l2_loss"].as_f64().unwrap(), found);
}

#[test]
fn measuring_training_data_gives_a_warning() {
    let desk = desk(Purpose::Training);
    // Three passes over the file leave no row unread.
    desk.write("config.yaml", &config("path: x.safetensors", METRICS));
    let run = desk.run(&["train", "config.yaml"]);
    let warned =
        |stderr: &str| stderr.contains("trained on") && stderr.contains("x.safetensors") && stderr.contains("held_out");
    assert!(run.code == 0 && warned(&run.stderr), "{}", run.stderr);
    let run = desk.run(&["eval", "run/a"]);
    assert!(run.code == 0 && warned(&run.stderr), "{}", run.stderr);
    // A short run leaves unread rows for the metrics.
    let run = desk.run(&[
        "train",
        "config.yaml",
        "--output-dir",
        "short",
        "--set",
        "steps=5",
        "--set",
        "metrics[0].n_batches=3",
    ]);
    assert!(run.code == 0 && !run.stderr.contains("trained on"), "{}", run.stderr);
    // One file under two names.
    std::os::unix::fs::symlink(desk.path("x.safetensors"), desk.path("other.safetensors")).unwrap();
    desk.write(
        "same.yaml",
        &config("path: x.safetensors", &format!("eval_source: {{path: other.safetensors}}\n{METRICS}")),
    );
    let run = desk.run(&["train", "same.yaml", "--output-dir", "same"]);
    assert!(run.code == 0 && warned(&run.stderr), "{}", run.stderr);
    // A copy is another file.
    std::fs::copy(desk.path("x.safetensors"), desk.path("copy.safetensors")).unwrap();
    let run =
        desk.run(&["eval", "run/a", "--set", &format!("source.path={}", desk.path("copy.safetensors").display())]);
    assert!(run.code == 0 && run.stderr.is_empty(), "{}", run.stderr);
}

#[test]
fn an_invalid_held_out_is_refused_with_its_place() {
    let desk = desk(Purpose::Training);
    for (source, words) in [
        ("held_out: 1", &["config.yaml", "held_out", "nothing is left"][..]),
        ("held_out: 1.5", &["config.yaml", "held_out"]),
        ("held_out: -0.1", &["config.yaml", "held_out"]),
        ("held_out: 0.0001", &["config.yaml", "held_out", "1280 rows"]),
        ("held_out: 0.99", &["to train on", "batch_size"]),
        ("held_outt: 0.1", &["did you mean `held_out`"]),
    ] {
        desk.write("config.yaml", &config(&format!("path: x.safetensors, {source}"), METRICS));
        let said = desk.refused(&["train", "config.yaml"]);
        assert!(words.iter().all(|word| said.contains(word)), "{source}: {said}");
        assert!(!desk.path("run").exists(), "{source}");
    }
}

#[test]
fn an_activation_cache_holds_out_the_same_rows() {
    let desk = desk(Purpose::Training);
    desk.write("write.yaml", &config("path: x.safetensors", ""));
    desk.ok(&["activations", "write.yaml", "--out", "cache"]);
    let cached = config("path: x.safetensors", METRICS).replace(
        "{type: tensor_file, batch_size: 64, path: x.safetensors}",
        "{type: activation_cache, path: cache, batch_size: 64, buffer_size: 256, held_out: 0.1}",
    );
    desk.write("config.yaml", &cached);
    let run = desk.run(&["train", "config.yaml"]);
    assert!(run.code == 0 && !run.stderr.contains("trained on"), "{}", run.stderr);
    // The same rows as those of the file that it was written from.
    let l2 = measured_on_held_out_rows(&desk);
    let again: Value = serde_json::from_str(&desk.ok(&["eval", "run/a", "--json"])).unwrap();
    assert!((again["l2_loss"].as_f64().unwrap() - l2).abs() < 1e-4 * l2);
    let run = desk.run(&["eval", "run/a", "--set", "source.held_out_seed=1"]);
    assert!(run.code == 0 && run.stderr.contains("trained on"), "{}", run.stderr);
    desk.write("bad.yaml", &cached.replace("held_out: 0.1", "held_out: 1"));
    let said = desk.refused(&["train", "bad.yaml", "--output-dir", "bad"]);
    assert!(said.contains("held_out") && said.contains("bad.yaml"), "{said}");
}

#[test]
fn texts_that_share_a_file_give_a_warning() {
    let desk = Desk::new();
    for name in ["a", "b"] {
        desk.write(
            &format!("txt/{name}.txt"),
            &format!("{} in {name}.\n\n", "It is a truth universally acknowledged").repeat(40),
        );
    }
    std::os::unix::fs::symlink(desk.path("txt/b.txt"), desk.path("link.txt")).unwrap();
    let austen = "{type: embedded, name: austen, split: held_out}";
    let mix = format!(
        "{{type: mix, streams: [{{weight: 1, text: {{type: text_files, path: txt/a.txt}}}}, {{weight: 1, text: {austen}}}]}}"
    );
    let warned = |text: &str, measured: &str| {
        desk.write(
            "config.yaml",
            &format!(
                "steps: 2\nsource: {{type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.1, ctx_len: 16, \
                 n_ctxs: 16, out_batch_size: 16, text: {text}}}\neval_source: {{text: {measured}}}\n\
                 saes: [{{trainer: {{type: top_k}}, dictionary: {{dict_size: 64, k: 4}}}}]\nmetrics: [{{type: reconstruction, n_batches: 1}}]\n"
            ),
        );
        let run = desk.run(&["train", "config.yaml", "--output-dir", &format!("run{}", fastrand::u64(..))]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        run.stderr.matches("computed on data that the SAEs were trained on").count()
    };
    let files = |path: &str| format!("{{type: text_files, path: '{path}'}}");
    assert_eq!(warned(&files("txt/*.txt"), &files("txt/b.txt")), 1);
    assert_eq!(warned(&files("txt"), &files("link.txt")), 1);
    assert_eq!(warned(&mix, austen), 1);
    assert_eq!(warned(&files("txt/a.txt"), &files("txt/b.txt")), 0);
}

#[test]
fn an_overlap_is_reported_once_for_all_metrics() {
    let desk = Desk::new();
    desk.write("a.txt", &"It is a truth universally acknowledged.\n\n".repeat(40));
    desk.write(
        "config.yaml",
        "steps: 60\noutput_dir: run\nsource: {type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.1, ctx_len: 16, \
         n_ctxs: 16, out_batch_size: 16, text: {type: text_files, path: a.txt}}\n\
         saes: [{trainer: {type: top_k}, dictionary: {dict_size: 64, k: 4}}]\n",
    );
    let run = desk.run(&["train", "config.yaml"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(run.stderr.matches("computed on data that the SAEs were trained on").count(), 1, "{}", run.stderr);
}

#[test]
fn documents_of_a_text_are_held_out() {
    let desk = Desk::new();
    let text: String = (0..200).map(|n| format!("It is a truth universally acknowledged, number {n}.\n\n")).collect();
    desk.write("a.txt", &text);
    let config = |more: &str| {
        format!(
            "steps: 60\noutput_dir: run\nsource: {{type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.1, ctx_len: 16, \
             n_ctxs: 64, out_batch_size: 64, text: {{type: text_files, path: a.txt}}{more}}}\n\
             saes: [{{trainer: {{type: top_k}}, dictionary: {{dict_size: 64, k: 4}}}}]\nmetrics: [{{type: reconstruction, n_batches: 100}}]\n"
        )
    };
    let measured = |more: &str| {
        desk.write("config.yaml", &config(more));
        let run = desk.run(&["train", "config.yaml", "--output-dir", &format!("run{}", more.len())]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        let figures = desk.json(&format!("run{}/top_k/eval.json", more.len()));
        (figures["measured"]["tokens"].as_u64().unwrap(), run.stderr)
    };
    let (all, said) = measured("");
    assert!(said.contains("computed on data that the SAEs were trained on"), "{said}");
    let (part, said) = measured(", held_out: 0.25");
    assert!(!said.contains("computed on data that the SAEs were trained on"), "{said}");
    assert!(part > all / 8 && part < all / 2, "{part} of {all}");
    // `eval` measures the same documents.
    let said = desk.run(&["eval", "run16/top_k", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(found["measured"]["tokens"], part);
    assert!(!said.stderr.contains("trained on"), "{}", said.stderr);
    let run = desk.run(&["eval", "run16/top_k", "--json", "--set", "source.held_out_seed=1"]);
    assert!(run.stderr.contains("computed on data that the SAEs were trained on"), "{}", run.stderr);
    desk.write("config.yaml", &config(", held_out: 1"));
    let said = desk.refused(&["train", "config.yaml"]);
    assert!(said.contains("no documents are left to train on") && said.contains("(source.held_out)"), "{said}");
}
