//! Texts and rows of token ids from files, to contexts and activations.

use std::fs;

use dictlearn as _;
use dictlearn_core::data::SourceCx;
use dictlearn_core::files::from_yaml;
use dictlearn_core::files::tensors;
use dictlearn_core::prelude::*;
use serde_json::json;

use crate::common::{Desk, fixture, read_json};

/// A model without a tokenizer, of 128 token ids.
const MODEL: &str = "models/gpt_neox";

/// A config that harvests it, reading this text.
fn harvest(text: &str, more: &str) -> Desk {
    let desk = Desk::new();
    let model = fixture(MODEL);
    desk.write(
        "config.yaml",
        &format!(
            "precision: float32\nsource: {{type: language_model, model: {model:?}, submodule: gpt_neox.layers.1, epochs: 1, \
             out_batch_size: 1, shuffle: false, ctx_len: 16{more}, text: {text}}}\n"
        ),
    );
    desk
}

fn activations(desk: &Desk) -> (Vec<u8>, String) {
    let run = desk.run(&["activations", "config.yaml", "--out", "out"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    (fs::read(desk.path("out/activations-00000.safetensors")).unwrap(), run.stderr)
}

/// The contexts of a text, row by row.
fn contexts(text: &str, more: &str) -> (Vec<Vec<i64>>, Vec<String>) {
    let yaml = format!(
        "{{type: language_model, model: {:?}, submodule: gpt_neox.layers.0{more}, text: {text}}}",
        fixture(MODEL)
    );
    let config: Box<dyn TaggedSource> = from_yaml(&yaml).unwrap();
    let mut source = config.build(&SourceCx { seed: 1, ..SourceCx::default() }).unwrap();
    let mut found = Vec::new();
    while let Some(tokens) = source.language_model().unwrap().next_tokens(1).unwrap() {
        found.push(tokens.ids.reshape([-1]).try_into().unwrap());
    }
    (found, source.notes())
}

fn recorded(name: &str) -> Vec<Vec<i64>> {
    serde_json::from_value(read_json(&fixture("text/rows.json"))[name].clone()).unwrap()
}

fn parquet(name: &str) -> String {
    format!("{{type: text_files, path: {:?}, column: input_ids}}", fixture("text").join(format!("{name}.parquet")))
}

#[test]
fn token_ids_of_a_table_or_of_lines_are_contexts_without_a_tokenizer() {
    let rows = recorded("pretokenized");
    let ids = Tensor::from_slice2(&rows);
    let desk = harvest("{type: token_file, path: tokens.safetensors}", "");
    tensors::write(&desk.path("tokens.safetensors"), &[("input_ids", ids)]).unwrap();
    let (expected, _) = activations(&desk);
    assert_eq!(activations(&harvest(&parquet("pretokenized"), "")).0, expected);
    // The column is found as sae_lens finds it.
    let desk = harvest("{type: text_files, path: tokens.jsonl}", "");
    for column in ["tokens", "input_ids"] {
        let lines: String = rows.iter().map(|row| format!("{}\n", json!({ column: row }))).collect();
        desk.write("tokens.jsonl", &lines);
        fs::remove_dir_all(desk.path("out")).ok();
        assert_eq!(activations(&desk).0, expected, "{column}");
    }
}

#[test]
fn rows_of_token_ids_are_cut_or_packed_and_padding_is_left_out() {
    let (found, notes) = contexts(&parquet("padded"), ", ctx_len: 16");
    assert_eq!((found, notes.len()), (recorded("padded"), 0));
    // Longer than a context, with a warning; packed, nothing is lost and nothing added.
    let rows = recorded("pretokenized");
    let (cut, notes) = contexts(&parquet("pretokenized"), ", ctx_len: 8");
    assert_eq!(cut, rows.iter().map(|row| row[..8].to_vec()).collect::<Vec<_>>());
    let said = notes.concat();
    assert!(said.contains("longer than `ctx_len` 8") && said.contains("pretokenized.parquet:1)"), "{said}");
    let (packed, notes) = contexts(&parquet("pretokenized"), ", ctx_len: 8, pack: true");
    assert_eq!((packed.concat(), notes.len()), (rows.concat(), 0));
    assert!(packed.iter().all(|row| row.len() == 8));
}

#[test]
fn token_ids_that_the_model_does_not_have_are_named_by_file_and_row() {
    for id in [128_i64, -100] {
        let desk = harvest("{type: text_files, path: tokens.jsonl, column: input_ids}", "");
        desk.write("tokens.jsonl", &format!("{{\"input_ids\": [1, 2]}}\n{{\"input_ids\": [3, {id}]}}\n"));
        let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
        assert!(said.contains(&format!("tokens.jsonl:2: token id {id}")) && said.contains("0 to 127"), "{said}");
        assert!(!desk.path("out").exists());
    }
}

#[test]
fn bad_token_ids_end_a_run_that_is_left_without_any() {
    for (lines, why) in [
        (r#"{"input_ids": ["a", "b"]}"#, "`input_ids[0]` is a string, but token ids are integers"),
        (
            r#"{"input_ids": [1, 2], "attention_mask": [1]}"#,
            "`attention_mask` has length 1, but `input_ids` has length 2",
        ),
        ("", "there is no text in"),
    ] {
        let desk = harvest("{type: text_files, path: tokens.jsonl, column: input_ids}", "");
        desk.write("tokens.jsonl", lines);
        let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
        assert!(said.contains(why) && said.contains("tokens.jsonl"), "{said}");
    }
    // A table of no rows.
    let desk = harvest("{type: text_files, path: empty.parquet}", "");
    fs::copy(fixture("text/empty.parquet"), desk.path("empty.parquet")).unwrap();
    let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
    assert!(said.contains("there is no text in") && said.contains("empty.parquet"), "{said}");
    // A text, for a model that has no tokenizer.
    let desk = harvest("{type: text_files, path: a.txt}", "");
    desk.write("a.txt", "text");
    let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
    assert!(said.contains("has no tokenizer.json"), "{said}");
}

#[test]
fn a_damaged_file_ends_the_run_unless_the_config_allows_it() {
    let rows = recorded("pretokenized");
    let lines =
        |rows: &[Vec<i64>]| -> String { rows.iter().map(|row| format!("{}\n", json!({"input_ids": row}))).collect() };
    let desk = harvest("{type: text_files, path: tokens, strict: STRICT}", "");
    desk.write("tokens/a.jsonl", &lines(&rows[..2]));
    desk.write("tokens/b.jsonl.gz", "no archive");
    desk.write("tokens/c.jsonl", &lines(&rows[2..]));
    let config = fs::read_to_string(desk.path("config.yaml")).unwrap();
    for strict in ["null", "true"] {
        desk.write("config.yaml", &config.replace("STRICT", strict));
        let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
        assert!(said.contains("b.jsonl.gz") && said.contains("the file is damaged or truncated"), "{said}");
        assert!(said.contains("`strict: false`") && !desk.path("out").exists(), "{said}");
    }
    desk.write("config.yaml", &config.replace("STRICT", "false"));
    let (found, said) = activations(&desk);
    assert!(
        said.contains("1 unreadable file was skipped, at least in part: ") && said.contains("b.jsonl.gz"),
        "{said}"
    );
    assert!(!said.contains("bad record"), "{said}");
    assert_eq!(found, activations(&harvest(&parquet("pretokenized"), "")).0);
}

#[test]
fn a_run_that_a_damaged_file_ended_goes_on_without_it() {
    let rows = recorded("pretokenized");
    let lines: String = (0..4).flat_map(|_| &rows).map(|row| format!("{}\n", json!({ "input_ids": row }))).collect();
    let desk = Desk::new();
    desk.write("tokens/a.jsonl", &lines);
    desk.write("tokens/b.jsonl.gz", "no archive");
    desk.write("tokens/c.jsonl", &lines);
    let config = |strict: &str| {
        format!(
            "steps: 30\ncheckpoint_every: 2\nlog_every: 10\nmetrics: []\nsource: {{type: language_model, model: {:?}, submodule: \
             gpt_neox.layers.0, ctx_len: 16, n_ctxs: 4, refresh_batch_size: 2, out_batch_size: 16, text: {{type: text_files, \
             path: tokens{strict}}}}}\nsaes: [{{name: a, dictionary: {{type: auto_encoder, dict_size: 8}}, trainer: {{type: \
             standard, warmup_steps: 0, sparsity_warmup_steps: 0, resample_steps: null}}}}]\n",
            fixture(MODEL)
        )
    };
    desk.write("config.yaml", &config(""));
    let said = desk.refused(&["train", "config.yaml", "--output-dir", "run"]);
    assert!(said.contains("b.jsonl.gz") && said.contains("`strict: false`"), "{said}");
    desk.write("config.yaml", &config(", strict: false"));
    let run = desk.run(&["train", "config.yaml", "--output-dir", "run", "--resume"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("b.jsonl.gz"), "{}", run.stderr);
    // It is the run that skips the file from the beginning.
    desk.ok(&["train", "config.yaml", "--output-dir", "whole"]);
    let weights = |run: &str| fs::read(desk.path(run).join("a/ae.safetensors")).unwrap();
    assert_eq!(weights("run"), weights("whole"));
}
