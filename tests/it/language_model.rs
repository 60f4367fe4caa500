//! From text to activations: the source, the buffer, the bundled model, and damaged models.

use std::fs;
use std::path::Path;

use dictlearn as _;
use dictlearn_core::data::SourceCx;
use dictlearn_core::files::from_yaml;
use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::lm::cross_entropy;
use dictlearn_core::lm::open_model;
use dictlearn_core::prelude::*;
use serde_json::json;

use crate::common::{Desk, fixture};

const MODELS: [&str; 2] = ["gpt_neox", "gpt_neox_sequential"];

fn io(model: &str) -> TensorFile {
    TensorFile::open(&fixture("models").join(model).join("io.safetensors")).unwrap()
}

fn source(yaml: &str) -> Box<dyn ActivationSource> {
    let config: Box<dyn TaggedSource> = from_yaml(yaml).unwrap();
    config.build(&SourceCx { seed: 1, ..SourceCx::default() }).unwrap()
}

fn drain(source: &mut dyn ActivationSource) -> Tensor {
    let mut all = Vec::new();
    while let Some(mut activations) = source.next_batch().unwrap() {
        all.push(activations.sites.remove(0).x);
    }
    Tensor::cat(&all, 0)
}

/// A source over a file of tokens; `more` are further keys.
fn tokens(model: &Path, tokens: &Path, more: &str) -> String {
    format!(
        "{{type: language_model, model: {model:?}, submodule: gpt_neox.layers.1, out_batch_size: 5, \
         text: {{type: token_file, path: {tokens:?}}}, refresh_batch_size: 2, shuffle: false{more}}}"
    )
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

/// The recorded values `[rows, positions, d]` at text positions, as `[N, d]`: the expected output of a source.
fn recorded(io: &TensorFile, name: &str) -> Tensor {
    let values = io.tensor(name).unwrap();
    let mask = io.tensor("attention_mask").unwrap().not_equal(0).reshape([-1]).nonzero().reshape([-1]);
    values.reshape([-1, values.size()[2]]).index_select(0, &mask)
}

#[test]
fn written_activations_match_the_model_in_order() {
    for model in MODELS {
        let desk = Desk::new();
        let folder = fixture("models").join(model);
        let io = io(model);
        let cases = [
            ("gpt_neox.layers.1", "out", "gpt_neox.layers.1.out"),
            ("gpt_neox.layers.1", "in", "gpt_neox.layers.0.out"),
            ("gpt_neox.layers.2.mlp", "out", "gpt_neox.layers.2.mlp.out"),
            ("gpt_neox.layers.0.attention", "in", "gpt_neox.layers.0.attention.in"),
            ("blocks.1.hook_resid_post", "out", "gpt_neox.layers.1.out"),
            ("blocks.2.hook_mlp_out", "out", "gpt_neox.layers.2.mlp.out"),
            ("blocks.2.hook_resid_pre", "out", "gpt_neox.layers.1.out"),
        ];
        for (index, (submodule, which, expected)) in cases.into_iter().enumerate() {
            let config = tokens(&folder, &folder.join("io.safetensors"), &format!(", io: {which}"))
                .replace("gpt_neox.layers.1,", &format!("{submodule},"));
            desk.write("config.yaml", &format!("precision: float32\nsource: {config}\n"));
            desk.ok(&["activations", "config.yaml", "--out", &index.to_string()]);
            let shard = TensorFile::open(&desk.path(&format!("{index}/activations-00000.safetensors"))).unwrap();
            let apart = difference(&shard.tensor("activations").unwrap(), &recorded(&io, expected));
            assert!(apart < 1e-4, "{model}: {submodule} {which}: {apart}");
        }
        let config = tokens(&folder, &folder.join("io.safetensors"), ", io: in_to_out")
            .replace("gpt_neox.layers.1,", "gpt_neox.layers.1.mlp,");
        desk.write("config.yaml", &format!("precision: float32\nsource: {config}\n"));
        desk.ok(&["activations", "config.yaml", "--out", "pairs"]);
        let shard = TensorFile::open(&desk.path("pairs/activations-00000.safetensors")).unwrap();
        for (tensor, name) in [("in", "gpt_neox.layers.1.mlp.in"), ("out", "gpt_neox.layers.1.mlp.out")] {
            assert!(difference(&shard.tensor(tensor).unwrap(), &recorded(&io, name)) < 1e-4);
        }
    }
}

/// Writes the same rows with their padding moved to the left.
fn padded_left(io: &TensorFile, path: &Path) {
    let (ids, mask) = (io.tensor("input_ids").unwrap(), io.tensor("attention_mask").unwrap());
    let left = |tensor: &Tensor| {
        let rows: Vec<Tensor> = (0..tensor.size()[0])
            .map(|row| {
                let text = mask.get(row).sum(Kind::Int64).int64_value(&[]);
                tensor.get(row).roll([tensor.size()[1] - text], [0])
            })
            .collect();
        Tensor::stack(&rows, 0)
    };
    tensors::write(path, &[("input_ids", left(&ids)), ("attention_mask", left(&mask))]).unwrap();
}

#[test]
fn the_padding_side_changes_nothing() {
    for model in MODELS {
        let desk = Desk::new();
        let (folder, left) = (fixture("models").join(model), desk.path("left.safetensors"));
        let right = folder.join("io.safetensors");
        padded_left(&io(model), &left);
        for more in ["", ", remove_bos: true"] {
            let [a, b] = [&right, &left].map(|path| drain(&mut *source(&tokens(&folder, path, more))));
            assert!(difference(&a, &b) < 1e-4, "{model}{more}");
        }
        let loss = |path: &Path| {
            let mut source = source(&tokens(&folder, path, ""));
            let source = source.language_model().unwrap();
            let tokens = source.next_tokens(3).unwrap().unwrap();
            let logits = tch::no_grad(|| source.model().forward(&tokens, &mut Hooks::none())).ok().unwrap();
            cross_entropy(&logits, &tokens)
        };
        let (a, b) = (loss(&right), loss(&left));
        assert!((a.0 - b.0).abs() < 1e-5 && a.1 == b.1, "{model}: {a:?} {b:?}");
    }
}

#[test]
fn remove_bos_skips_the_first_token_whatever_its_id() {
    let desk = Desk::new();
    let folder = fixture("models/gpt_neox");
    let all = source(&tokens(&folder, &folder.join("io.safetensors"), "")).next_batch().unwrap().unwrap();
    let without = source(&tokens(&folder, &folder.join("io.safetensors"), ", remove_bos: true"));
    let mut without = without;
    let all_rows = drain(&mut *source(&tokens(&folder, &folder.join("io.safetensors"), "")));
    let kept = drain(&mut *without);
    // The rows have 12, 10 and 8 text positions; each loses its first.
    let expected: Vec<i64> = (0..30).filter(|row| ![0, 12, 22].contains(row)).collect();
    assert_eq!(kept, all_rows.index_select(0, &Tensor::from_slice(&expected)));
    assert_eq!(all.sites[0].x, all_rows.narrow(0, 0, 5));

    // The BOS has id 0, which is also the padding's and occurs within a row.
    let ids = Tensor::from_slice2(&[[0_i64, 5, 0, 6], [0, 7, 8, 0]]);
    let mask = Tensor::from_slice2(&[[1_i64, 1, 1, 1], [1, 1, 1, 0]]);
    let path = desk.path("tokens.safetensors");
    tensors::write(&path, &[("input_ids", ids), ("attention_mask", mask)]).unwrap();
    let all = drain(&mut *source(&tokens(&folder, &path, "")));
    let kept = drain(&mut *source(&tokens(&folder, &path, ", remove_bos: true")));
    assert_eq!(kept, all.index_select(0, &Tensor::from_slice(&[1_i64, 2, 3, 5, 6])));
}

#[test]
fn activations_of_large_norm_are_skipped() {
    let folder = fixture("models/gpt_neox");
    let file = folder.join("io.safetensors");
    // All rows in one pass, so that the median is known.
    let all =
        drain(&mut *source(&tokens(&folder, &file, "").replace("refresh_batch_size: 2", "refresh_batch_size: 3")));
    let norms = all.norm_scalaropt_dim(2.0, [-1], false);
    let multiple = 1.02;
    let kept = norms.le_tensor(&(norms.median() * multiple)).nonzero().reshape([-1]);
    assert!(kept.size()[0] < 30);
    let yaml = tokens(&folder, &file, &format!(", max_activation_norm_multiple: {multiple}"));
    let found = drain(&mut *source(&yaml.replace("refresh_batch_size: 2", "refresh_batch_size: 3")));
    assert_eq!(found, all.index_select(0, &kept));
}

#[test]
fn a_shuffled_pass_serves_every_activation_once() {
    let folder = fixture("models/gpt_neox");
    let desk = Desk::new();
    let path = desk.path("tokens.safetensors");
    tch::manual_seed(4);
    tensors::write(&path, &[("input_ids", Tensor::randint(128, [20, 10], (Kind::Int64, Device::Cpu)))]).unwrap();
    let in_order = drain(&mut *source(&tokens(&folder, &path, "")));
    // The buffer holds a third of the rows, so it is filled several times.
    let yaml = tokens(&folder, &path, ", n_ctxs: 6, ctx_len: 10").replace("shuffle: false", "shuffle: true");
    let mut shuffled = source(&yaml);
    let served = drain(&mut *shuffled);
    assert_eq!(in_order.size(), [200, 32]);
    assert_ne!(served, in_order);
    let sorted = |x: &Tensor| x.select(1, 0).sort(0, false).0;
    assert!(difference(&sorted(&served), &sorted(&in_order)) < 1e-6);
    // Another pass draws another order.
    shuffled.rewind().unwrap();
    assert_ne!(drain(&mut *shuffled), served);
}

#[test]
fn a_short_text_is_repeated_as_the_run_needs() {
    let folder = fixture("models/gpt_neox");
    let desk = Desk::new();
    let run = |more: &str, out: &str| {
        let source = tokens(&folder, &folder.join("io.safetensors"), more);
        let trainer = "{type: standard, warmup_steps: 1, sparsity_warmup_steps: null}";
        desk.write(
            "config.yaml",
            &format!("steps: 20\nlog_every: 1\nsource: {source}\nsaes: [{{trainer: {trainer}}}]\n"),
        );
        let run = desk.run(&["train", "config.yaml", "--output-dir", out]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        (run.stderr, desk.log(&format!("{out}/metrics.jsonl")).len())
    };
    // 30 activations in batches of 5.
    let (said, steps) = run("", "all");
    assert!(said.contains("the data was read 4 times") && steps == 20, "{said}");
    let (said, steps) = run(", epochs: 1", "once");
    assert!(said.contains("the data ended after 6 of 20 steps") && steps == 6, "{said}");
}

#[test]
fn text_is_cut_or_packed_into_contexts() {
    let desk = Desk::new();
    let long = "It is a truth universally acknowledged, that a single man must be in want of a wife. ".repeat(6);
    let records =
        [serde_json::json!({"body": "Short."}), serde_json::json!({"body": long}), serde_json::json!({"x": 1})];
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    let path = desk.write("corpus.jsonl", &lines);
    let rows = |more: &str| {
        let mut source = source(&format!(
            "{{type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.0, ctx_len: 16, \
             text: {{type: text_files, path: {path:?}, column: body}}{more}}}"
        ));
        let mut found: Vec<Vec<i64>> = Vec::new();
        while let Some(tokens) = source.language_model().unwrap().next_tokens(1).unwrap() {
            found.push(tokens.ids.reshape([-1]).try_into().unwrap());
        }
        (found, source.notes())
    };
    // One document per context, truncated.
    let (truncated, notes) = rows("");
    assert_eq!(truncated.len(), 2);
    assert!(truncated[0].len() < 16 && truncated[1].len() == 16);
    assert!(notes[0].contains("1 bad record") && notes[0].contains("corpus.jsonl:3"), "{notes:?}");
    // Packed: every context but the last is full, and no text is lost.
    let (packed, _) = rows(", pack: true");
    assert!(packed.len() > 5 && packed[..packed.len() - 1].iter().all(|row| row.len() == 16));
    let joined: Vec<i64> = packed.concat();
    let end_of_text = joined[0];
    assert_eq!(joined.iter().filter(|id| **id == end_of_text).count(), 2);
    assert_eq!(joined[1..=truncated[0].len()], truncated[0]);
}

#[test]
fn the_bundled_model_beats_a_unigram_model() {
    let mut source = source(
        "{type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.2, pack: true, ctx_len: 256, \
         text: {type: embedded, name: austen, split: held_out}}",
    );
    let source = source.language_model().unwrap();
    let (mut sum, mut count, mut all) = (0.0, 0, Vec::new());
    while let (true, Some(tokens)) = (count < 50_000, source.next_tokens(16).unwrap()) {
        let logits = tch::no_grad(|| source.model().forward(&tokens, &mut Hooks::none())).ok().unwrap();
        let (loss, predicted) = cross_entropy(&logits, &tokens);
        sum += loss * predicted as f64;
        count += predicted;
        all.extend(Vec::<i64>::try_from(tokens.ids.masked_select(&tokens.mask)).unwrap());
    }
    // The entropy of the token frequencies bounds the loss of any unigram model from below.
    let mut counts = std::collections::HashMap::new();
    for id in &all {
        *counts.entry(id).or_insert(0.0) += 1.0;
    }
    let unigram: f64 = counts.values().map(|n: &f64| -n / all.len() as f64 * (n / all.len() as f64).ln()).sum();
    let loss = sum / count as f64;
    assert!(loss < unigram - 2.0, "{loss} nats, the unigram model {unigram}");
}

#[test]
fn a_model_in_the_hub_cache_is_found_by_name() {
    let desk = Desk::new();
    let snapshot = "hub/models--tiny--neox/snapshots/0123abcd";
    for name in ["config.json", "model.safetensors"] {
        let bytes = fs::read(fixture("models/gpt_neox").join(name)).unwrap();
        fs::create_dir_all(desk.path(snapshot)).unwrap();
        fs::write(desk.path(snapshot).join(name), bytes).unwrap();
    }
    desk.write("hub/models--tiny--neox/refs/main", "0123abcd");
    let file = fixture("models/gpt_neox/io.safetensors");
    for name in ["tiny/neox", "tiny/neox@main", "tiny/neox@0123abcd"] {
        let config = tokens(Path::new(name), &file, "");
        desk.write("config.yaml", &format!("source: {config}\n"));
        let out = name.replace(['/', '@'], "-");
        let run =
            desk.program().args(["activations", "config.yaml", "--out", &out]).env("HF_HOME", desk.dir.path()).output();
        assert!(run.unwrap().status.success(), "{name}");
    }
}

#[test]
fn damaged_models_are_refused() {
    let desk = Desk::new();
    let from = fixture("models/gpt_neox");
    let whole = fs::read(from.join("model.safetensors")).unwrap();
    let config = fs::read_to_string(from.join("config.json")).unwrap();
    let with = |config: &str, weights: &[u8]| {
        desk.write("model/config.json", config);
        fs::write(desk.path("model/model.safetensors"), weights).unwrap();
        let source = tokens(Path::new("model/"), &from.join("io.safetensors"), "");
        desk.write("config.yaml", &format!("source: {source}\nsaes: [{{trainer: {{type: standard}}}}]\n"));
        let said = desk.refused(&["train", "config.yaml"]);
        assert!(said.contains("config.yaml:1:") && said.contains("source.model"), "{said}");
        said
    };
    assert!(with(&config, &whole[..whole.len() - 100]).contains("not a complete safetensors file"));
    assert!(with(&config, b"").contains("model.safetensors"));
    assert!(with("{", &whole).contains("is not JSON"));
    assert!(with(&config.replace("\"hidden_size\": 32", "\"hidden_size\": 64"), &whole).contains("has shape"));
    let layers = with(&config.replace("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4"), &whole);
    assert!(layers.contains("has no tensor `gpt_neox.layers.3."), "{layers}");
    assert!(with(&config.replace("\"hidden_size\"", "\"hidden_sizes\""), &whole).contains("hidden_size"));
    let scaling = "\"rope_scaling\": {\"factor\": 2}";
    assert!(with(&config.replace("\"rope_scaling\": null", scaling), &whole).contains("rope_scaling"));
    assert!(with(&config.replace("\"gelu\"", "\"glue\""), &whole).contains("glue"));
    fs::remove_file(desk.path("model/model.safetensors")).unwrap();
    fs::write(desk.path("model/model.safetensors.index.json"), "{\"weight_map\": {\"a\": \"part-1.safetensors\"}}")
        .unwrap();
    let source = tokens(Path::new("model/"), &from.join("io.safetensors"), "");
    desk.write("config.yaml", &format!("source: {source}\nsaes: [{{trainer: {{type: standard}}}}]\n"));
    assert!(desk.refused(&["train", "config.yaml"]).contains("part-1.safetensors"));
}

#[test]
fn token_ids_outside_the_vocabulary_are_refused() {
    let desk = Desk::new();
    let ids = Tensor::from_slice2(&[[1_i64, 2, 3], [4, 500, 6]]);
    tensors::write(&desk.path("tokens.safetensors"), &[("input_ids", ids)]).unwrap();
    let source = tokens(&fixture("models/gpt_neox"), &desk.path("tokens.safetensors"), "");
    desk.write("config.yaml", &format!("source: {source}\n"));
    let said = desk.refused(&["activations", "config.yaml", "--out", "out"]);
    assert!(said.contains("row 1") && said.contains("500") && said.contains("0 to 127"), "{said}");
    assert!(!desk.path("out").exists());
}

/// Writes a model with a word tokenizer into `model/`: `t17` has id 17. The first id beyond the model's vocabulary is
/// an image placeholder, as in Gemma 3.
fn model_of_words(desk: &Desk) {
    let words: serde_json::Map<String, Value> = (0..128).map(|id| (format!("t{id}"), id.into())).collect();
    let place = json!({
        "id": 128, "content": "<image_soft_token>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [place], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"}
    });
    desk.write("model/tokenizer.json", &tokenizer.to_string());
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixture("models/gpt_neox").join(name), desk.path("model").join(name)).unwrap();
    }
}

#[test]
fn tokenizer_ids_beyond_the_vocabulary_are_refused_only_when_used() {
    let desk = Desk::new();
    model_of_words(&desk);
    let config = |more: &str| {
        desk.write(
            "config.yaml",
            &format!(
                "source: {{type: language_model, model: model/, submodule: gpt_neox.layers.1, ctx_len: 4, \
                 text: {{type: text_files, path: corpus.txt, documents: line}}{more}}}\n"
            ),
        );
    };
    config("");
    desk.write("corpus.txt", "t1 t2 t3\nt4 t5\n");
    desk.ok(&["activations", "config.yaml", "--out", "out"]);
    desk.write("corpus.txt", "t1 t2 t3\nt4 <image_soft_token> t5\n");
    let said = desk.refused(&["activations", "config.yaml", "--out", "other"]);
    assert!(said.contains("corpus.txt:2: token id 128 (`<image_soft_token>`)") && said.contains("0 to 127"), "{said}");
    assert!(!desk.path("other").exists());
    // It cannot be the separator of documents either.
    desk.write("corpus.txt", "t1 t2 t3\nt4 t5\n");
    desk.write("model/tokenizer_config.json", "{\"eos_token\": \"<image_soft_token>\"}");
    desk.ok(&["activations", "config.yaml", "--out", "unpacked"]);
    config(", pack: true");
    let said = desk.refused(&["activations", "config.yaml", "--out", "other"]);
    assert!(said.contains("EOS is token 128") && said.contains("0 to 127"), "{said}");
}

#[test]
fn an_untied_head_overrides_the_config_with_a_warning() {
    let desk = Desk::new();
    let from = fixture("models/gpt_neox");
    fs::create_dir(desk.path("model")).unwrap();
    fs::copy(from.join("model.safetensors"), desk.path("model/model.safetensors")).unwrap();
    let config = fs::read_to_string(from.join("config.json")).unwrap();
    let untied = "\"tie_word_embeddings\": false";
    assert!(config.contains(untied));
    let source = tokens(Path::new("model/"), &from.join("io.safetensors"), "");
    desk.write("config.yaml", &format!("source: {source}\n"));
    for (tied, warned) in [(untied, 0), ("\"tie_word_embeddings\": true", 1)] {
        desk.write("model/config.json", &config.replace(untied, tied));
        let run = desk.run(&["activations", "config.yaml", "--out", &format!("out-{warned}")]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        let warnings =
            run.stderr.lines().filter(|line| line.starts_with("warning: ") && line.contains("embed_out.weight"));
        assert_eq!(warnings.count(), warned, "{}", run.stderr);
    }
}

#[test]
fn git_lfs_pointers_are_recognised_in_every_input() {
    const POINTER: &str = "version https://git-lfs.github.com/spec/v1\n\
                           oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n";
    let desk = Desk::new();
    let refused = |args: &[&str], file: &str| {
        let said = desk.refused(args);
        assert!(said.contains("this is a Git LFS pointer") && said.contains("run `git lfs pull`"), "{file}: {said}");
        assert!(said.contains(file), "{file}: {said}");
        said
    };
    let activations = ["activations", "config.yaml", "--out", "out"];
    // The model's files.
    let text = |path: &str| {
        desk.write(
            "config.yaml",
            &format!(
                "source: {{type: language_model, model: model/, submodule: gpt_neox.layers.1, ctx_len: 4, \
                 text: {{type: text_files, path: {path}}}}}\n"
            ),
        );
    };
    desk.write("corpus.txt", "t1 t2 t3\n");
    text("corpus.txt");
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        model_of_words(&desk);
        desk.write(&format!("model/{file}"), POINTER);
        refused(&activations, file);
        fs::remove_file(desk.path("model").join(file)).unwrap();
    }
    // Without safetensors, pytorch_model.bin is read.
    desk.write("model/config.json", &fs::read_to_string(fixture("models/gpt_neox/config.json")).unwrap());
    desk.write("model/pytorch_model.bin", POINTER);
    refused(&activations, "pytorch_model.bin");
    // Texts: the pointer would otherwise be trained on.
    model_of_words(&desk);
    for file in ["corpus.txt", "corpus.jsonl", "corpus.txt.gz", "corpus.jsonl.zst", "corpus.parquet"] {
        desk.write(file, POINTER);
        text(file);
        refused(&activations, file);
    }
    // Activations and tokens.
    for file in ["x.safetensors", "x.npy", "x.npz"] {
        desk.write(file, POINTER);
        desk.write("config.yaml", &format!("source: {{type: tensor_file, path: {file}, batch_size: 2}}\n"));
        refused(&activations, file);
    }
    desk.write("config.yaml", &format!("source: {}\n", tokens(Path::new("model/"), Path::new("x.safetensors"), "")));
    refused(&activations, "x.safetensors");
    // Saved and published SAEs.
    desk.golden_sae("top_k");
    for (file, gone) in [("ae.safetensors", None), ("ae.pt", Some("ae.safetensors")), ("config.json", None)] {
        gone.iter().for_each(|gone| fs::remove_file(desk.path("top_k").join(gone)).unwrap());
        desk.write(&format!("top_k/{file}"), POINTER);
        refused(&["encode", "top_k", "--input", "x.safetensors", "--output", "y.safetensors"], file);
    }
    desk.write("scope/params.npz", POINTER);
    refused(&["import", "gemma_scope", "scope", "--out", "imported"], "params.npz");
    // The config itself.
    desk.write("config.yaml", POINTER);
    refused(&["train", "config.yaml"], "config.yaml");
    let left = desk.files();
    let new = ["out/", "imported/", "y.safetensors", "runs/"];
    assert!(!left.iter().any(|file| new.iter().any(|start| file.starts_with(start))), "{left:?}");
}

#[test]
fn position_embeddings_give_one_activation_per_token() {
    let dir = fixture("models/gpt2");
    let at = |submodule: &str| {
        let yaml = tokens(&dir, &dir.join("io.safetensors"), "").replace("gpt_neox.layers.1", submodule);
        drain(&mut *source(&yaml))
    };
    let (positions, layer) = (at("transformer.wpe"), at("transformer.h.0"));
    assert_eq!(positions.size(), layer.size());
    // The first position of each row is the same.
    let width = positions.size()[1];
    let first = positions.get(0).view([1, width]);
    let same = (&positions - first).abs().sum_dim_intlist(-1, false, Kind::Float).eq(0.0).sum(Kind::Int64);
    assert!(same.int64_value(&[]) > 1);
}

#[test]
fn the_bundled_model_opens_by_name() {
    let (model, files) = open_model("embedded:austen", Device::Cpu, Precision::Float32).unwrap();
    assert_eq!(model.n_layers(), 4);
    assert!(files.read("tokenizer.json").unwrap().is_some());
}

#[test]
fn nonfinite_activations_are_traced_to_their_text_or_skipped() {
    let desk = Desk::new();
    let from = fixture("models/gpt_neox");
    let mut weights: Vec<_> =
        TensorFile::open(&from.join("model.safetensors")).unwrap().tensors().unwrap().into_iter().collect();
    let (_, embedding) = weights.iter_mut().find(|(name, _)| name.ends_with("embed_in.weight")).unwrap();
    let _ = embedding.get(7).fill_(f64::INFINITY);
    fs::create_dir(desk.path("model")).unwrap();
    fs::copy(from.join("config.json"), desk.path("model/config.json")).unwrap();
    tensors::write(&desk.path("model/model.safetensors"), &weights).unwrap();
    // One token of the second row is infinite. Attention multiplies it by 0 for its neighbours, which gives NaN.
    let ids = Tensor::from_slice2(&[[1_i64, 2, 3, 4, 5], [1, 2, 7, 4, 5], [5, 4, 3, 2, 1]]);
    tensors::write(&desk.path("tokens.safetensors"), &[("input_ids", ids)]).unwrap();
    let yaml = tokens(&desk.path("model"), &desk.path("tokens.safetensors"), "");
    let error = source(&yaml).next_batch().unwrap_err().to_string();
    assert!(error.contains("is not finite for row 1, token "), "{error}");
    assert!(error.contains("gpt_neox.layers.1"), "{error}");

    let config: Box<dyn TaggedSource> = from_yaml(&yaml).unwrap();
    let cx = SourceCx { seed: 1, on_nonfinite: OnNonfinite::SkipBatch, ..SourceCx::default() };
    let mut source = config.build(&cx).unwrap();
    let mut found = Vec::new();
    while let Some(activations) = source.next_batch().unwrap() {
        assert!(bool::try_from(activations.sites[0].x.isfinite().all()).unwrap());
        found.push(activations.tokens.unwrap());
    }
    let found = Tensor::cat(&found, 0);
    // The other rows are complete.
    assert_eq!(found.select(1, 1).not_equal(1).sum(Kind::Int64).int64_value(&[]), 10);
    let left_out = 15 - found.size()[0];
    assert!(left_out > 0);
    let notes = source.notes().join("; ");
    assert!(notes.contains(&format!("{left_out} activations were skipped, the first: ")), "{notes}");
    assert!(notes.contains("for row 1, token "), "{notes}");
}
