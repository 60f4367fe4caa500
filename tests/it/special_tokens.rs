//! Special tokens: separators, BOS and chat templates, and how to exclude them.

use std::fs;

use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::lm::EmbeddedModel;
use serde_json::{Value, json};

use crate::common::Desk;

/// The bundled model's separator.
const END_OF_TEXT: &str = "<|endoftext|>";

/// A desk with the bundled model in the folder `model`, some documents, and a config that harvests them.
fn desk() -> Desk {
    let desk = Desk::new();
    fs::create_dir(desk.path("model")).unwrap();
    let bundled = dictlearn_core::inventory::iter::<EmbeddedModel>.into_iter().next().unwrap();
    for (name, bytes) in bundled.files {
        fs::write(desk.path("model").join(name), bytes).unwrap();
    }
    let lines: String = (0..40).map(|n| format!("{{\"text\": \"Miss number {n} was walking.\"}}\n")).collect();
    desk.write("text.jsonl", &lines);
    config(&desk, "pack: true");
    desk
}

fn config(desk: &Desk, source: &str) {
    desk.write(
        "config.yaml",
        &format!(
            "precision: float32\nsource: {{type: language_model, model: model, submodule: gpt_neox.layers.0, epochs: 1, \
             shuffle: false, ctx_len: 32, text: {{type: text_files, path: text.jsonl}}, {source}}}\n"
        ),
    );
}

fn edit(desk: &Desk, file: &str, edit: impl FnOnce(&mut Value)) {
    let mut value = desk.json(file);
    edit(&mut value);
    desk.write(file, &value.to_string());
}

/// The harvested token ids, and standard error.
fn harvested(desk: &Desk, out: &str) -> (Vec<i64>, String) {
    let run = desk.run(&["activations", "config.yaml", "--out", out]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let shard = TensorFile::open(&desk.path(out).join("activations-00000.safetensors")).unwrap();
    (Vec::<i64>::try_from(shard.tensor("token_ids").unwrap()).unwrap(), run.stderr)
}

/// The id of the bundled model's separator.
fn end_of_text(desk: &Desk) -> i64 {
    let tokenizer = desk.json("model/tokenizer.json");
    let added = tokenizer["added_tokens"].as_array().unwrap();
    added.iter().find(|token| token["content"] == END_OF_TEXT).unwrap()["id"].as_i64().unwrap()
}

#[test]
fn special_tokens_can_be_excluded() {
    let desk = desk();
    let end = end_of_text(&desk);
    let (all, _) = harvested(&desk, "all");
    assert_eq!(all.iter().filter(|id| **id == end).count(), 40);
    let without = |ids: &[i64]| all.iter().copied().filter(|id| !ids.contains(id)).collect::<Vec<i64>>();
    config(&desk, "pack: true, exclude_special_tokens: true");
    assert_eq!(harvested(&desk, "special").0, without(&[end]));
    let some = all[3];
    config(&desk, &format!("pack: true, exclude_special_tokens: [{end}, {some}]"));
    assert_eq!(harvested(&desk, "listed").0, without(&[end, some]));
    config(&desk, "pack: true, exclude_special_tokens: false");
    assert_eq!(harvested(&desk, "none").0, all);
}

#[test]
fn unknown_special_tokens_are_named() {
    let desk = desk();
    edit(&desk, "model/tokenizer_config.json", |config| config["eos_token"] = json!("</nope>"));
    let (_, said) = harvested(&desk, "unknown");
    assert!(said.contains("has `eos_token: </nope>`, which its tokenizer.json does not have"), "{said}");
    edit(&desk, "model/config.json", |config| config["eos_token_id"] = json!("abc"));
    let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
    assert!(said.contains("has `eos_token_id: \"abc\"`, but token ids are integers"), "{said}");
}

#[test]
fn excluding_every_token_names_the_option() {
    let desk = desk();
    let every: Vec<i64> = (0..desk.json("model/config.json")["vocab_size"].as_i64().unwrap()).collect();
    config(&desk, &format!("exclude_special_tokens: {every:?}"));
    let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
    assert!(said.contains("`exclude_special_tokens` excludes every token of the text"), "{said}");
    assert!(!said.contains("add data"), "{said}");
}

#[test]
fn truncated_documents_are_counted() {
    let desk = desk();
    let long = "Miss Bates was walking with her mother. ".repeat(400);
    let lines: String = ["Emma.", &long, &long].iter().map(|text| format!("{}\n", json!({"text": text}))).collect();
    desk.write("text.jsonl", &lines);
    let most = desk.json("model/config.json")["max_position_embeddings"].as_i64().unwrap();
    for (ctx_len, help) in [(8, "raise `ctx_len`, or set `pack: true`"), (most, "text.jsonl:2); set `pack: true`")] {
        config(&desk, "pack: false");
        desk.write("config.yaml", &desk.read("config.yaml").replace("ctx_len: 32", &format!("ctx_len: {ctx_len}")));
        let (_, said) = harvested(&desk, &format!("cut{ctx_len}"));
        let count = format!("warning: 2 of 3 documents are longer than `ctx_len` {ctx_len}");
        assert!(said.contains(&count) && said.contains(help), "{said}");
    }
    config(&desk, "pack: true");
    assert!(!harvested(&desk, "packed").1.contains("longer than"));
}

#[test]
fn excluded_tokens_must_be_in_the_vocabulary() {
    let desk = desk();
    for (written, found) in [("[0, 999999]", "token id 999999"), ("[-1]", "token id -1")] {
        config(&desk, &format!("exclude_special_tokens: {written}"));
        let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
        assert!(said.contains(found) && said.contains("(source.exclude_special_tokens["), "{said}");
    }
    config(&desk, "exclude_special_tokens: sometimes");
    let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
    assert!(said.contains("exclude_special_tokens"), "{said}");
}

#[test]
fn the_first_configured_separator_is_used() {
    let desk = desk();
    let (all, said) = harvested(&desk, "all");
    assert!(!said.contains("warning"), "{said}");
    let end = end_of_text(&desk);
    edit(&desk, "model/tokenizer_config.json", |config| *config = json!({}));
    edit(&desk, "model/config.json", |config| config["eos_token_id"] = json!([end, 5]));
    assert_eq!(harvested(&desk, "list").0, all);
    edit(&desk, "model/config.json", |config| config["eos_token_id"] = json!(5));
    desk.write("model/special_tokens_map.json", &json!({"eos_token": {"content": END_OF_TEXT}}).to_string());
    assert_eq!(harvested(&desk, "map").0, all);
    fs::remove_file(desk.path("model/special_tokens_map.json")).unwrap();
    edit(&desk, "model/config.json", |config| {
        let config = config.as_object_mut().unwrap();
        config.remove("eos_token_id");
        config.remove("bos_token_id");
    });
    let (glued, said) = harvested(&desk, "glued");
    assert!(!glued.contains(&end));
    assert!(said.contains("warning: packing documents without a separator"), "{said}");
    edit(&desk, "model/config.json", |config| config["eos_token_id"] = json!([999_999]));
    let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
    assert!(said.contains("EOS is token 999999") && said.contains("eos_token_id"), "{said}");
}

#[test]
fn tokenizer_files_that_disagree_on_bos_give_a_warning() {
    let desk = desk();
    config(&desk, "remove_bos: false");
    let (plain, _) = harvested(&desk, "plain");
    edit(&desk, "model/tokenizer_config.json", |config| config["add_bos_token"] = json!(true));
    let (still, said) = harvested(&desk, "still");
    // transformers 5 ignores it too.
    assert_eq!(still, plain);
    assert!(said.contains("`add_bos_token: true`, but its tokenizer.json adds no BOS"), "{said}");
    // A tokenizer that starts texts with a token other than BOS gives one warning, not two contradictory ones.
    let tokenizer = desk.read("model/tokenizer.json");
    let end = end_of_text(&desk);
    edit(&desk, "model/tokenizer.json", |tokenizer| {
        tokenizer["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [end], "tokens": [END_OF_TEXT]}},
        });
    });
    edit(&desk, "model/tokenizer_config.json", |config| config["bos_token"] = json!("the"));
    let (_, said) = harvested(&desk, "other");
    assert!(said.contains("starts a text with `<|endoftext|>`") && !said.contains("adds no BOS"), "{said}");
    edit(&desk, "model/tokenizer_config.json", |config| {
        (config["bos_token"], config["add_bos_token"]) = (json!(END_OF_TEXT), json!(false));
    });
    let (_, said) = harvested(&desk, "added");
    assert!(said.contains("`add_bos_token: false`, but its tokenizer.json adds a BOS"), "{said}");
    edit(&desk, "model/tokenizer_config.json", |config| config["add_bos_token"] = json!("yes"));
    let (_, said) = harvested(&desk, "word");
    assert!(said.contains("`add_bos_token: \"yes\"`, which is neither true nor false"), "{said}");
    desk.write("model/tokenizer.json", &tokenizer);
    config(&desk, "prepend_bos: true");
    let (_, said) = harvested(&desk, "chosen");
    assert!(!said.contains("add_bos_token"), "{said}");
}

#[test]
fn chat_templates_receive_the_configured_date() {
    let desk = desk();
    desk.write("model/chat_template.jinja", "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}");
    desk.write("text.jsonl", "{\"text\": {\"role\": [\"user\"], \"content\": [\"Hello.\"]}}\n");
    config(&desk, "chat_date: 2024-07-26");
    let (chat, said) = harvested(&desk, "chat");
    assert!(!said.contains("chat_date"), "{said}");
    let (_, said) = {
        config(&desk, "chat_date: null");
        harvested(&desk, "today")
    };
    assert!(said.contains("the chat template writes today's date"), "{said}");
    config(&desk, "chat_date: yesterday");
    let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
    assert!(said.contains("`yesterday` is not a date") && said.contains("source.chat_date"), "{said}");
    desk.write("text.jsonl", "{\"text\": \"26 Jul 2024: Hello.\"}\n");
    config(&desk, "pack: false");
    assert_eq!(harvested(&desk, "written").0, chat);
}
