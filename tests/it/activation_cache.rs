//! Activation caches: they are read back in order or shuffled, and damaged files are refused by name.

use std::fs;

use dictlearn as _;
use dictlearn_core::files::from_yaml;
use dictlearn_core::prelude::*;

use crate::common::{Desk, drain, fixture};

/// The bundled model's activations, in batches of 96.
const MODEL: &str = "{type: language_model, model: 'embedded:austen', submodule: [gpt_neox.layers.1, \
                     gpt_neox.layers.2.mlp], pack: true, ctx_len: 32, n_ctxs: 24, refresh_batch_size: 8, \
                     out_batch_size: 96, text: {type: embedded, name: austen}, shuffle: false}";

fn config(out: &str, source: &str) -> String {
    format!(
        "steps: 12\noutput_dir: {out}\nprecision: float32\nnormalize_activations: true\nlog_every: 1\nsource: {source}\n\
         saes: [{{name: a, trainer: {{type: top_k, warmup_steps: 2}}, dictionary: {{dict_size: 64, k: 4}}}}]\n\
         metrics: [{{type: reconstruction, n_batches: 2}}]\n"
    )
}

fn cache(path: &str, more: &str) -> String {
    format!("{{type: activation_cache, path: {path}, batch_size: 96{more}}}")
}

/// A desk whose folder `cache` holds activations of the bundled model.
fn desk(limit: &str, more: &[&str]) -> Desk {
    let desk = Desk::new();
    desk.write("model.yaml", &config("model", MODEL));
    desk.ok(&[&["activations", "model.yaml", "--out", "cache", "--limit", limit], more].concat());
    desk
}

fn open(desk: &Desk, more: &str) -> Result<Box<dyn ActivationSource>> {
    let path = desk.path("cache");
    let config: Box<dyn TaggedSource> = from_yaml(&cache(path.to_str().unwrap(), more)).unwrap();
    config.build(&SourceCx { seed: 1, ..SourceCx::default() })
}

#[test]
fn training_from_a_cache_matches_training_from_the_model() {
    let desk = desk("10000", &[]);
    desk.write("cache.yaml", &config("cached", &cache("cache", ", shuffle: false")));
    desk.ok(&["train", "model.yaml"]);
    desk.ok(&["train", "cache.yaml"]);
    for sae in ["a-gpt_neox.layers.1", "a-gpt_neox.layers.2.mlp"] {
        let read = |run: &str| fs::read(desk.path(&format!("{run}/{sae}/ae.safetensors"))).unwrap();
        assert!(read("model") == read("cached"), "{sae}");
        let saved = desk.json(&format!("cached/{sae}/config.json"));
        assert_eq!(saved["trainer"]["lm_name"], "embedded:austen");
        assert_eq!(
            saved["trainer"]["submodule_name"],
            desk.json(&format!("model/{sae}/config.json"))["trainer"]["submodule_name"]
        );
        let again: Value = serde_json::from_str(&desk.ok(&["eval", &format!("cached/{sae}"), "--json"])).unwrap();
        assert!(again["frac_variance_explained"].as_f64().unwrap() > 0.0, "{again}");
    }
    assert_eq!(desk.read("model/metrics.jsonl"), desk.read("cached/metrics.jsonl"));
    let manifest = desk.json("cache/meta.json");
    assert_eq!((&manifest["activations"], &manifest["dtype"]), (&10000.into(), &"float32".into()));
    assert_eq!(manifest["source"]["model"], "embedded:austen");
    assert_eq!(manifest["source"]["text"]["type"], "embedded");
    // A complete cache is not overwritten.
    let said = desk.refused(&["activations", "model.yaml", "--out", "cache"]);
    assert!(said.contains("cache"), "{said}");
    assert_eq!(desk.json("cache/meta.json"), manifest);
}

#[test]
fn a_shuffled_pass_serves_every_row_once_and_separates_neighbours() {
    let desk = desk("5000", &[]);
    let (sites, tokens) = drain(&mut *open(&desk, ", shuffle: false").unwrap());
    assert_eq!(tokens.size(), [5000, 3]);
    let mut source = open(&desk, ", buffer_size: 1024").unwrap();
    let mut orders = Vec::new();
    for _ in 0..2 {
        let (mixed, mixed_tokens) = drain(&mut *source);
        let row = mixed_tokens.select(1, 1) * 32 + mixed_tokens.select(1, 2);
        let (sorted, order) = row.sort(0, false);
        assert_eq!(sorted, tokens.select(1, 1) * 32 + tokens.select(1, 2));
        // Rows of all sites stay aligned.
        assert_eq!((mixed.len(), sites.len()), (2, 2));
        for (mixed, in_order) in mixed.iter().zip(&sites) {
            assert_eq!(mixed.index_select(0, &order), *in_order);
        }
        let apart = row.diff(1, 0, None::<Tensor>, None::<Tensor>).abs();
        let near = apart.le(16).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        assert!(near < 0.1, "{near} of the rows follow a neighbour");
        orders.push(order);
        source.rewind().unwrap();
    }
    assert_ne!(orders[0], orders[1]);
    // 1024 rows of two sites of width 192, and their tokens.
    let bytes: u64 = source.memory().iter().map(|need| need.bytes).sum();
    assert!(bytes > 1024 * 1500 && bytes < 1024 * 1600, "{bytes}");
}

#[test]
fn a_run_from_a_cache_resumes_bit_for_bit() {
    let desk = desk("700", &[]);
    // The run reaches the second pass, and the buffer holds less than a pass.
    desk.write("cache.yaml", &config("whole", &cache("cache", ", buffer_size: 300")));
    desk.ok(&["train", "cache.yaml"]);
    desk.ok(&["train", "cache.yaml", "--output-dir", "parts", "--set", "stop_after=9"]);
    desk.ok(&["train", "cache.yaml", "--output-dir", "parts", "--resume"]);
    let read = |run: &str| fs::read(desk.path(&format!("{run}/a-gpt_neox.layers.1/ae.safetensors"))).unwrap();
    assert!(read("whole") == read("parts"));
    assert_eq!(desk.read("whole/metrics.jsonl"), desk.read("parts/metrics.jsonl"));
}

#[test]
fn a_bfloat16_cache_stays_close_to_float32() {
    let desk = desk("500", &["--dtype", "bfloat16"]);
    let (half, _) = drain(&mut *open(&desk, ", shuffle: false").unwrap());
    desk.ok(&["activations", "model.yaml", "--out", "whole", "--limit", "500"]);
    let bytes = |dir: &str| fs::metadata(desk.path(&format!("{dir}/activations-00000.safetensors"))).unwrap().len();
    assert!(bytes("cache") < bytes("whole") * 6 / 10);
    let path = desk.path("whole");
    fs::remove_dir_all(desk.path("cache")).unwrap();
    fs::rename(path, desk.path("cache")).unwrap();
    let (whole, _) = drain(&mut *open(&desk, ", shuffle: false").unwrap());
    assert_eq!((half.len(), whole.len()), (2, 2));
    for (half, whole) in half.iter().zip(&whole) {
        assert_eq!(half.kind(), Kind::Float);
        assert!(half.allclose(whole, 8e-3, 1e-5, false) && half != whole);
    }
}

#[test]
fn a_damaged_cache_is_refused_with_the_file_name() {
    let desk = desk("500", &[]);
    let shard = desk.path("cache/activations-00000.safetensors");
    let good = fs::read(&shard).unwrap();
    let meta = desk.read("cache/meta.json");
    let said = |more: &str| {
        let opened = open(&desk, more);
        let error = match opened {
            Err(error) => error,
            Ok(mut source) => source.next_batch().unwrap_err(),
        };
        assert!(error.downcast_ref::<InputError>().is_some(), "{error:#}");
        format!("{error:#}")
    };
    let shard_said = |what: &str, more: &str| {
        let said = said(more);
        assert!(said.contains("activations-00000.safetensors") && said.contains(what), "{said}");
    };
    fs::write(&shard, &good[..good.len() - 100]).unwrap();
    shard_said(&format!("has {} bytes, but meta.json says {}", good.len() - 100, good.len()), "");
    let mut altered = good.clone();
    *altered.last_mut().unwrap() ^= 1;
    fs::write(&shard, &altered).unwrap();
    shard_said("has changed: its hash differs from meta.json", "");
    assert!(open(&desk, ", verify: false").unwrap().next_batch().unwrap().is_some());
    // The right length, but another tensor name.
    let foreign = String::from_utf8_lossy(&good[..200]).contains("gpt_neox.layers.1/activations");
    assert!(foreign);
    let mut renamed = good.clone();
    let at = good.windows(17).position(|bytes| bytes == b"gpt_neox.layers.1").unwrap();
    renamed[at + 16] = b'3';
    fs::write(&shard, &renamed).unwrap();
    shard_said("has no tensor `gpt_neox.layers.1/activations`", ", verify: false");
    fs::remove_file(&shard).unwrap();
    shard_said("the shard is missing", "");
    fs::write(&shard, &good).unwrap();
    fs::write(desk.path("cache/activations-00007.safetensors"), &good).unwrap();
    assert!(said("").contains("activations-00007.safetensors: the folder's meta.json does not list it"));
    fs::remove_file(desk.path("cache/activations-00007.safetensors")).unwrap();
    assert!(open(&desk, "").unwrap().next_batch().unwrap().is_some());
    // A manifest that was edited or truncated.
    for (from, to) in [("\"activations\": 500", "\"activations\": 501"), ("\"sha256\": \"", "\"sha256\": \"0")] {
        fs::write(desk.path("cache/meta.json"), meta.replacen(from, to, 1)).unwrap();
        assert!(said("").contains("meta.json"), "{from}");
    }
    fs::write(desk.path("cache/meta.json"), &meta[..meta.len() / 2]).unwrap();
    assert!(said("").contains("meta.json"));
    fs::remove_file(desk.path("cache/meta.json")).unwrap();
    assert!(said("").contains("holds no meta.json"));
    // As a process: exit status 2, the key's place, and no output folder.
    desk.write("cache.yaml", &config("cached", &cache("cache", "")));
    let said = desk.refused(&["train", "cache.yaml"]);
    assert!(said.contains("(source.path)") && !desk.path("cached").exists(), "{said}");
}

/// The fixture was written by `examples/write_activations.py` from the recorded model, at its text positions.
#[test]
fn a_cache_written_by_python_is_read() {
    let folder = fixture("activations");
    let source = format!("{{type: activation_cache, path: {folder:?}, shuffle: false}}");
    let config: Box<dyn TaggedSource> = from_yaml(&source).unwrap();
    let cx = SourceCx { seed: 1, ..SourceCx::default() };
    let (python, tokens) = drain(&mut *config.build(&cx).unwrap());
    let model = fixture("models/gpt_neox");
    let source = format!(
        "{{type: language_model, model: {model:?}, submodule: [gpt_neox.layers.1, gpt_neox.layers.2.mlp], \
         text: {{type: token_file, path: {:?}}}, shuffle: false}}",
        model.join("io.safetensors")
    );
    let config: Box<dyn TaggedSource> = from_yaml(&source).unwrap();
    let (ours, our_tokens) = drain(&mut *config.build(&cx).unwrap());
    assert_eq!(tokens, our_tokens);
    assert_eq!((python.len(), ours.len()), (2, 2));
    for (python, ours) in python.iter().zip(&ours) {
        let apart = (python - ours).norm() / ours.norm();
        assert!(apart.double_value(&[]) < 1e-5, "{apart:?}");
    }
    // Our own writer makes the same manifest.
    let desk = Desk::with_config(&format!("precision: float32\nsource: {source}\n"));
    desk.ok(&["activations", "config.yaml", "--out", "out"]);
    let written = desk.json("out/meta.json");
    let by_python: Value = serde_json::from_str(&fs::read_to_string(folder.join("meta.json")).unwrap()).unwrap();
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&written), keys(&by_python));
    assert_eq!(written["activations"], by_python["activations"]);
}
