//! Import and export of published SAEs, compared with recorded results of other libraries.

use std::fs;
use std::path::{Path, PathBuf};

use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::common::{Desk, fixture};

/// The largest difference, relative to the largest value.
fn difference(found: &Tensor, wanted: &Tensor) -> f64 {
    assert_eq!(found.size(), wanted.size());
    let (found, wanted) = (found.to_kind(Kind::Double), wanted.to_kind(Kind::Double));
    ((found - &wanted).abs().max() / wanted.abs().max()).double_value(&[])
}

/// Encodes the fixture's activations with an SAE and compares with its own library's results.
fn matches(desk: &Desk, sae: &Path, io: &Path, tolerance: f64) {
    desk.ok(&["encode", sae.to_str().unwrap(), "--input", io.to_str().unwrap(), "--output", "y.safetensors"]);
    let (found, wanted) = (TensorFile::open(&desk.path("y.safetensors")).unwrap(), TensorFile::open(io).unwrap());
    for name in ["features", "recon"] {
        let difference = difference(&found.tensor(name).unwrap(), &wanted.tensor(name).unwrap());
        assert!(difference < tolerance, "{}: {name} differ by {difference:e}", sae.display());
    }
}

/// The sae_lens fixtures.
fn cases() -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> =
        fs::read_dir(fixture("sae_lens")).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|case| case.join("cfg.json").exists());
    cases.sort();
    assert_eq!(cases.len(), 16);
    cases
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

#[test]
fn sae_lens_saes_match_sae_lens() {
    let desk = Desk::new();
    for case in cases() {
        let printed = desk.ok(&["import", "sae_lens", case.to_str().unwrap(), "--out", name(&case)]);
        assert_eq!(printed.trim(), name(&case));
        let tolerance = if name(&case).ends_with("bf16") { 1e-2 } else { 1e-5 };
        matches(&desk, &desk.path(name(&case)), &case.join("io.safetensors"), tolerance);
    }
}

#[test]
fn export_to_sae_lens_round_trips() {
    let desk = Desk::new();
    for case in cases() {
        let (first, out, again) = ("first", "out", "again");
        desk.ok(&["import", "sae_lens", case.to_str().unwrap(), "--out", first]);
        desk.ok(&["export", first, "--format", "sae_lens", "--out", out]);
        desk.ok(&["import", "sae_lens", out, "--out", again]);
        let tolerance = if name(&case).ends_with("bf16") { 1e-2 } else { 1e-5 };
        matches(&desk, &desk.path(again), &case.join("io.safetensors"), tolerance);
        // A saved SAE can be imported too.
        desk.ok(&["import", "dictionary_learning", first, "--out", "own"]);
        matches(&desk, &desk.path("own"), &case.join("io.safetensors"), tolerance);
        fs::remove_dir_all(desk.path("own")).unwrap();
        let (cfg, old): (Value, Value) = (
            desk.json("out/cfg.json"),
            serde_json::from_str(&fs::read_to_string(case.join("cfg.json")).unwrap()).unwrap(),
        );
        let about = if old["metadata"].is_object() { &old["metadata"] } else { &old };
        assert_eq!(cfg["metadata"]["context_size"], about["context_size"], "{}", case.display());
        assert_eq!(cfg["metadata"]["dataset_path"], about["dataset_path"], "{}", case.display());
        for dir in [first, out, again] {
            fs::remove_dir_all(desk.path(dir)).unwrap();
        }
    }
}

#[test]
fn gemma_scope_is_read_from_a_folder_and_from_the_hub_cache() {
    let desk = Desk::new();
    let folder = fixture("sae_lens/gemma_scope");
    let sae = "layer_3/width_80/average_l0_7";
    let case = folder.join(sae);
    desk.ok(&["import", "gemma_scope", case.to_str().unwrap(), "--out", "here"]);
    matches(&desk, &desk.path("here"), &case.join("io.safetensors"), 1e-5);
    assert!(!desk.path("here/config.yaml").exists(), "the folder does not name a model");

    // Offline, by its published name and by its release's.
    let repo = desk.path("hf/hub/models--google--gemma-scope-2b-pt-res");
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), "c0").unwrap();
    let cached = repo.join("snapshots/c0").join(sae);
    fs::create_dir_all(&cached).unwrap();
    fs::copy(case.join("params.npz"), cached.join("params.npz")).unwrap();
    for (format, place) in [
        ("gemma_scope", format!("google/gemma-scope-2b-pt-res/{sae}")),
        ("sae_lens", format!("gemma-scope-2b-pt-res:{sae}")),
        ("sae_lens", "gemma-scope-2b-pt-res-canonical:layer_3/width_80/canonical".to_owned()),
    ] {
        desk.ok(&["import", format, &place, "--out", "cached"]);
        matches(&desk, &desk.path("cached"), &case.join("io.safetensors"), 1e-5);
        let config = desk.read("cached/config.yaml");
        for line in
            ["model: google/gemma-2-2b", "submodule: blocks.3.hook_resid_post", "prepend_bos: true", "ctx_len: 1024"]
        {
            assert!(config.contains(line), "{config}");
        }
        fs::remove_dir_all(desk.path("cached")).unwrap();
    }
    let refused = desk.refused(&["import", "gemma_scope", "google/gemma-scope-2b-pt-res/layer_3/width_80"]);
    assert!(refused.contains("average_l0_7"), "{refused}");
}

/// A copy of an sae_lens fixture with a changed config and added or replaced tensors.
fn changed(desk: &Desk, case: &str, change: impl FnOnce(&mut Value), tensors: &[(&str, Tensor)]) -> PathBuf {
    let (from, dir) = (fixture("sae_lens").join(case), desk.path("changed"));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    let mut cfg: Value = serde_json::from_str(&fs::read_to_string(from.join("cfg.json")).unwrap()).unwrap();
    change(&mut cfg);
    fs::write(dir.join("cfg.json"), cfg.to_string()).unwrap();
    let mut all = TensorFile::open(&from.join("sae_weights.safetensors")).unwrap().tensors().unwrap();
    all.extend(tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.shallow_clone())));
    let all: Vec<(String, Tensor)> = all.into_iter().collect();
    tensors::write(&dir.join("sae_weights.safetensors"), &all).unwrap();
    dir
}

#[test]
fn unsupported_sae_lens_saes_are_refused_by_name() {
    let desk = Desk::new();
    let ones = |n: i64| Tensor::ones([n], tch::kind::FLOAT_CPU);
    let twos = || ("scaling_factor", ones(80) * 2.0);
    /// Case, change of cfg.json, tensors added to the weights, and a word of the message.
    type Case = (&'static str, fn(&mut Value), Vec<(&'static str, Tensor)>, &'static str);
    let cases: [Case; 10] = [
        ("standard", |cfg| cfg["architecture"] = "temporal".into(), vec![], "`temporal`"),
        ("standard", |cfg| cfg["architecture"] = "standart".into(), vec![], "`standart`"),
        (
            "standard",
            |cfg| cfg["normalize_activations"] = "covariance_whitening".into(),
            vec![],
            "covariance_whitening",
        ),
        ("legacy_v2_standard", |cfg| cfg["activation_fn_str"] = "tanh-relu".into(), vec![], "`tanh-relu`"),
        ("standard", |cfg| cfg["d_sae"] = 81.into(), vec![], "`d_sae` is 81"),
        ("standard", |cfg| cfg["d_in"] = "many".into(), vec![], "`d_in` is \"many\""),
        ("topk", |cfg| cfg["k"] = 81.into(), vec![], "`k` is 81"),
        ("standard", |_| (), vec![twos()], "scaling_factor"),
        ("standard", |_| (), vec![("odd", ones(3))], "odd"),
        ("transcoder", |cfg| cfg["apply_b_dec_to_input"] = true.into(), vec![], "apply_b_dec_to_input"),
    ];
    for (case, change, tensors, word) in cases {
        let dir = changed(&desk, case, change, &tensors);
        let message = desk.refused(&["import", "sae_lens", dir.to_str().unwrap(), "--out", "out"]);
        assert!(message.contains(word), "{message}");
        assert!(!desk.path("out").exists(), "{case}: partial output was left behind");
    }
}

#[test]
fn scaling_factors_are_folded_into_the_weights() {
    let desk = Desk::new();
    let case = fixture("sae_lens/standard");
    let io = TensorFile::open(&case.join("io.safetensors")).unwrap();
    let encoded = |dir: &Path, more: &[&str]| {
        let _ = fs::remove_dir_all(desk.path("out"));
        let args = [&["import", "sae_lens", dir.to_str().unwrap(), "--out", "out"], more].concat();
        desk.ok(&args);
        let x = (io.tensor("x").unwrap() / 3.0).contiguous();
        tensors::write(&desk.path("x.safetensors"), &[("x", x)]).unwrap();
        desk.ok(&["encode", "out", "--input", "x.safetensors", "--output", "y.safetensors"]);
        let y = TensorFile::open(&desk.path("y.safetensors")).unwrap();
        (y.tensor("features").unwrap(), y.tensor("recon").unwrap())
    };
    // The SAE was trained on activations three times as large.
    let dir = changed(
        &desk,
        "standard",
        |cfg| {
            cfg["normalize_activations"] = "expected_average_only_in".into();
            cfg["norm_scaling_factor"] = 3.0.into();
        },
        &[],
    );
    let (features, recon) = encoded(&dir, &[]);
    assert!(difference(&features, &io.tensor("features").unwrap()) < 1e-5);
    assert!(difference(&(recon * 3.0), &io.tensor("recon").unwrap()) < 1e-5);
    // Without the factor the weights are imported unchanged, with a warning.
    let dir = changed(&desk, "standard", |cfg| cfg["normalize_activations"] = "expected_average_only_in".into(), &[]);
    let run = desk.run(&["import", "sae_lens", dir.to_str().unwrap(), "--out", "unscaled"]);
    assert!(run.code == 0 && run.stderr.contains("expected_average_only_in"), "{}", run.stderr);
    matches(&desk, &desk.path("unscaled"), &case.join("io.safetensors"), 1e-5);
    // Finetuning factors leave the features unchanged; decoding doubles them.
    let twos = Tensor::ones([80], tch::kind::FLOAT_CPU) * 2.0;
    let dir = changed(
        &desk,
        "legacy_v2_standard",
        |cfg| cfg["finetuning_scaling_factor"] = true.into(),
        &[("scaling_factor", twos)],
    );
    desk.ok(&["import", "sae_lens", dir.to_str().unwrap(), "--out", "tuned"]);
    let own = fixture("sae_lens/legacy_v2_standard/io.safetensors");
    desk.ok(&["encode", "tuned", "--input", own.to_str().unwrap(), "--output", "y.safetensors"]);
    let (found, wanted) = (TensorFile::open(&desk.path("y.safetensors")).unwrap(), TensorFile::open(&own).unwrap());
    assert!(difference(&found.tensor("features").unwrap(), &wanted.tensor("features").unwrap()) < 1e-5);
    let b_dec = TensorFile::open(&fixture("sae_lens/legacy_v2_standard/sae_weights.safetensors"))
        .unwrap()
        .tensor("b_dec")
        .unwrap();
    let twice = wanted.tensor("recon").unwrap() * 2.0 - b_dec;
    assert!(difference(&found.tensor("recon").unwrap(), &twice) < 1e-5);
}

#[test]
fn a_release_table_resolves_names() {
    let desk = Desk::new();
    let case = fixture("sae_lens/jumprelu");
    let repo = desk.path("hf/hub/models--someone--saes");
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), "c0").unwrap();
    let cached = repo.join("snapshots/c0/deep/blocks.5");
    fs::create_dir_all(&cached).unwrap();
    for file in ["cfg.json", "sae_weights.safetensors"] {
        fs::copy(case.join(file), cached.join(file)).unwrap();
    }
    let table = json!({"some-release": {
        "repo_id": "someone/saes", "model": "gpt2-small", "conversion_func": null,
        "config_overrides": {"dataset_path": "some/dataset", "model_from_pretrained_kwargs": {"center_writing_weights": true}},
        "saes": [
            {"id": "five", "path": "deep/blocks.5", "l0": 12.5, "variance_explained": 0.9},
            {"id": "six", "path": "deep/blocks.6"},
        ],
    }, "other-release": {
        "repo_id": "someone/others", "model": "gpt2-small", "conversion_func": "spatial", "saes": [{"id": "one", "path": "one"}],
    }});
    let file = desk.write("pretrained_saes.yaml", &serde_yaml::to_string(&table).unwrap());
    let releases = ["--releases", file.to_str().unwrap()];
    let with = |args: &[&str]| -> Vec<String> { args.iter().chain(&releases).map(|arg| (*arg).to_owned()).collect() };
    let run = |args: &[&str]| desk.run(&with(args).iter().map(String::as_str).collect::<Vec<_>>());

    let listed = run(&["import", "sae_lens", "--list", "some-*"]);
    assert_eq!(listed.code, 0, "{}", listed.stderr);
    assert_eq!(listed.stdout.lines().count(), 2);
    assert!(
        listed.stdout.contains(
            "some-release:five  gpt2-small of someone/saes, L0 12.5, variance explained 0.9, import: yes, model: yes (gpt2)"
        ),
        "{}",
        listed.stdout
    );

    let imported = run(&["import", "sae_lens", "some-release:five"]);
    assert_eq!(imported.stdout.trim(), "saes/some-release/five", "{}", imported.stderr);
    matches(&desk, &desk.path("saes/some-release/five"), &case.join("io.safetensors"), 1e-5);
    let config = desk.read("saes/some-release/five/config.yaml");
    for line in ["model: gpt2\n", "submodule: blocks.5.hook_resid_pre", "center: true", "repo: some/dataset"] {
        assert!(config.contains(line), "{config}");
    }
    for (name, word) in [
        ("some-release:fife", "did you mean `five`?"),
        ("some-releese:five", "did you mean `some-release`?"),
        ("other-release:one", "`spatial`"),
    ] {
        let refused = run(&["import", "sae_lens", name, "--out", "out"]);
        assert!(refused.code == 2 && refused.stderr.contains(word), "{}", refused.stderr);
    }
    let listed = run(&["import", "sae_lens", "--list", "other-*"]);
    assert!(listed.stdout.contains("import: no (format spatial), model: yes (gpt2)"), "{}", listed.stdout);
    // A glob imports what it matches.
    let several = run(&["import", "sae_lens", "--pretrained", "some-release:f*", "--out", "several"]);
    assert_eq!(several.stdout.trim(), "several", "{}", several.stderr);
}

#[test]
fn every_name_of_the_bundled_table_resolves() {
    let desk = Desk::new();
    // No Python: the table is the program's own.
    let run = desk.program().env_clear().args(["import", "sae_lens", "--list", "*"]).output().unwrap();
    let listed = String::from_utf8(run.stdout).unwrap();
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!(lines.len(), 13_857);
    for line in &lines {
        assert!(line.contains(", import: yes, model: ") && !line.ends_with("unknown"), "{line}");
    }
    // The reference has the same counts.
    let runnable = lines.iter().filter(|line| line.contains(", model: yes ")).count();
    let page = desk.ok(&["describe", "formats", "sae_lens"]);
    let count = page.split("The models of ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    assert_eq!(count.replace(',', ""), runnable.to_string(), "{page}");
    let counts = "names 13,857 SAEs in 170 releases. 13,857 of them can be imported.";
    assert!(page.contains(counts), "{page}");
    let (format, request) = ("sae_lens", "qwen-scope-3-1.7b-base-w32k-l50:layer3");
    let refused = desk.refused(&["import", format, request, "--out", "out"]);
    assert!(refused.contains("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"), "{refused}");
}

#[test]
fn an_imported_sae_can_be_trained_further() {
    let desk = Desk::new();
    for (case, dictionary, trainer) in [
        (
            "jumprelu_layer_norm",
            "jump_relu",
            "{type: jump_relu, lr: 1e-12, warmup_steps: 0, sparsity_warmup_steps: null}",
        ),
        ("topk", "top_k", "{type: top_k, lr: 1e-12, warmup_steps: 0}"),
        ("jumprelu_bdec", "jump_relu", "{type: jump_relu, lr: 1e-12, warmup_steps: 0, sparsity_warmup_steps: null}"),
        ("transcoder", "transcoder", "{type: standard, lr: 1e-12, warmup_steps: 0, sparsity_warmup_steps: null}"),
    ] {
        let from = fixture("sae_lens").join(case);
        desk.ok(&["import", "sae_lens", from.to_str().unwrap(), "--out", case]);
        let io = TensorFile::open(&from.join("io.safetensors")).unwrap();
        let tensors = ["x", "recon"].map(|name| (name, io.tensor(name).unwrap().repeat([4, 1])));
        tensors::write(&desk.path("pairs.safetensors"), &tensors).unwrap();
        let target = if case == "transcoder" { "target_tensor: recon, " } else { "" };
        let k = if dictionary == "top_k" { ", k: 7" } else { "" };
        desk.write(
            "config.yaml",
            &format!(
                "steps: 4\noutput_dir: run-{case}\nprecision: float32\n\
                 source: {{type: tensor_file, path: pairs.safetensors, tensor: x, {target}batch_size: 40}}\n\
                 saes:\n- name: tuned\n  init_from: {case}\n  dictionary: {{type: {dictionary}, dict_size: 80{k}}}\n  \
                 trainer: {trainer}\nmetrics: []\n"
            ),
        );
        desk.ok(&["train", "config.yaml"]);
        // At almost no learning rate the SAE must stay the same. Decoder norms, which these trainers keep at 1, move
        // into the encoder. For TopK that would change the selection, so its features are compared instead.
        let tuned = desk.path(&format!("run-{case}/tuned"));
        let input = from.join("io.safetensors");
        desk.ok(&["encode", tuned.to_str().unwrap(), "--input", input.to_str().unwrap(), "--output", "y.safetensors"]);
        let what = if case == "topk" { "features" } else { "recon" };
        let found = TensorFile::open(&desk.path("y.safetensors")).unwrap().tensor(what).unwrap();
        let far = difference(&found, &io.tensor(what).unwrap());
        assert!(far < 1e-4, "{case}: {far:e}");
        let config = desk.json(&format!("run-{case}/tuned/config.json"));
        assert_eq!(config["trainer"]["normalization"].is_null(), case != "jumprelu_layer_norm");
    }
}

#[test]
fn an_imported_sae_can_be_evaluated_without_a_config() {
    let desk = Desk::with_config(
        "steps: 30\noutput_dir: run\nprecision: float32\n\
         source: {type: language_model, model: \"embedded:austen\", submodule: gpt_neox.layers.2, ctx_len: 64, n_ctxs: 64,\n  \
         out_batch_size: 256, text: {type: embedded, name: austen}}\n\
         saes:\n- name: sae\n  trainer: {type: batch_top_k, warmup_steps: 0}\n  dictionary: {k: 16}\nmetrics: []\n",
    );
    desk.ok(&["train", "config.yaml"]);
    desk.ok(&["export", "run/sae", "--format", "sae_lens", "--out", "out"]);
    let metadata = &desk.json("out/cfg.json")["metadata"];
    assert_eq!(metadata["model_name"], "embedded:austen");
    assert_eq!(metadata["hook_name"], "blocks.2.hook_resid_post");
    assert_eq!(metadata["hf_hook_name"], "gpt_neox.layers.2.output");
    assert_eq!(metadata["context_size"], 64);
    desk.ok(&["import", "sae_lens", "out", "--out", "again"]);

    let figures: Value = serde_json::from_str(&desk.ok(&["eval", "again", "--json"])).unwrap();
    assert!(figures["frac_variance_explained"].is_f64() && figures["frac_recovered"].is_f64(), "{figures}");

    let text = "It is a truth universally acknowledged, that a single man";
    let tokens = |sae: &str| -> Value {
        // An imported SAE has no precision setting, and `auto` depends on the machine.
        let args = ["encode", sae, "--text", text, "--top", "3", "--json", "--set", "precision=float32"];
        serde_json::from_str(&desk.ok(&args)).unwrap()
    };
    let (first, again) = (tokens("run/sae"), tokens("again"));
    let words: String =
        again["tokens"].as_array().unwrap().iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(words, text);
    let list = |of: &Value, key: &str| of[key].as_array().unwrap().clone();
    let (first, again) = (list(&first, "tokens"), list(&again, "tokens"));
    assert_eq!(first.len(), again.len());
    for (one, two) in first.iter().zip(&again) {
        assert_eq!(one["l0"], two["l0"]);
        let (one, two) = (list(one, "features"), list(two, "features"));
        assert!(one.len() == two.len() && !one.is_empty(), "{one:?} {two:?}");
        for (one, two) in one.iter().zip(&two) {
            assert_eq!(one["index"], two["index"]);
            let [one, two] = [one, two].map(|feature| feature["activation"].as_f64().unwrap());
            assert!((one - two).abs() < 1e-4 * one.abs(), "{one} {two}");
        }
    }
    let table = desk.ok(&["encode", "again", "--text", text, "--output", "tokens.safetensors"]);
    assert!(table.contains("\" truth\""), "{table}");
    let written = TensorFile::open(&desk.path("tokens.safetensors")).unwrap();
    assert_eq!(written.shape("x").unwrap()[0], written.shape("tokens").unwrap()[0]);
    let refused = desk.refused(&["encode", "again"]);
    assert!(refused.contains("--input") && refused.contains("--text"), "{refused}");
}

#[test]
fn pretrained_dictionaries_of_the_reference_are_read_from_their_archive() {
    let desk = Desk::new();
    let repo = desk.path("hf/hub/models--saprmarks--pythia-70m-deduped-saes");
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), "c0").unwrap();
    let archive = repo.join("snapshots/c0/dictionaries_pythia-70m-deduped_10.zip");
    fs::create_dir_all(archive.parent().unwrap()).unwrap();
    let mut zip = zip::ZipWriter::new(fs::File::create(archive).unwrap());
    let weights = fs::read(fixture("trainers/standard/ae.pt")).unwrap();
    for place in ["mlp_out_layer0", "mlp_out_layer1", "attn_out_layer3", "resid_out_layer5", "embed"] {
        let folder = format!("dictionaries/pythia-70m-deduped/{place}/10_32768");
        for (file, bytes) in [("ae.pt", &weights[..]), ("config.json", b"{\"dict_size\": 96, \"entropy\": false}")] {
            zip.start_file(format!("{folder}/{file}"), zip::write::SimpleFileOptions::default()).unwrap();
            std::io::Write::write_all(&mut zip, bytes).unwrap();
        }
    }
    zip.finish().unwrap();

    let listed = desk.ok(&["import", "dictionary_learning", "--list"]);
    assert!(
        listed.contains(
            "pythia-70m-deduped/resid_out_layer5/10_32768  gpt_neox.layers.5 of EleutherAI/pythia-70m-deduped"
        ),
        "{listed}"
    );
    let one =
        ["import", "dictionary_learning", "--pretrained", "pythia-70m-deduped/mlp_out_layer1/10_32768", "--out", "one"];
    assert_eq!(desk.ok(&one).trim(), "one");
    let config = desk.read("one/config.yaml");
    for line in [
        "model: EleutherAI/pythia-70m-deduped",
        "submodule: gpt_neox.layers.1.mlp",
        "io: out",
        "repo: monology/pile-uncopyrighted",
    ] {
        assert!(config.contains(line), "{config}");
    }
    assert_eq!(desk.json("one/config.json")["trainer"]["dict_class"], "AutoEncoder");
    // The archive has the golden run's weights, so its features are those of the saved SAE.
    let x = Tensor::randn([7, 32], tch::kind::FLOAT_CPU);
    tensors::write(&desk.path("x.safetensors"), &[("x", x)]).unwrap();
    let golden = desk.golden_sae("standard");
    let features = |sae: &str| {
        desk.ok(&["encode", sae, "--input", "x.safetensors", "--output", "y.safetensors"]);
        TensorFile::open(&desk.path("y.safetensors")).unwrap().tensor("features").unwrap()
    };
    assert!(difference(&features("one"), &features(golden.to_str().unwrap())) < 1e-5);
    let several =
        desk.ok(&["import", "dictionary_learning", "--pretrained", "*/mlp_out_layer*/10_32768", "--out", "several"]);
    assert_eq!(several.lines().count(), 2, "{several}");
    assert!(desk.path("several/pythia-70m-deduped/mlp_out_layer0/10_32768/ae.safetensors").exists());
    let refused =
        desk.refused(&["import", "dictionary_learning", "--pretrained", "pythia-70m-deduped/mlp_out_layer9/10_32768"]);
    assert!(refused.contains("mlp_out_layer"), "{refused}");
}

#[test]
fn llama_scope_matches_the_authors_code() {
    let desk = Desk::new();
    let cases = crate::common::folders(&fixture("formats/llama_scope_authors"));
    assert_eq!(cases.len(), 6);
    for case in cases {
        let about = crate::common::read_json(&case.join("case.json"));
        let (path, out) = (about["path"].as_str().unwrap(), name(&case));
        if out.contains("r1_distill") {
            // Its factor is in sae_lens's release table.
            let repo = desk.path("hf/hub/models--fnlp--Llama-Scope-R1-Distill");
            let snapshot = repo.join("snapshots/c0").join(path);
            fs::create_dir_all(&snapshot).unwrap();
            fs::create_dir_all(repo.join("refs")).unwrap();
            fs::write(repo.join("refs/main"), "c0").unwrap();
            for file in ["config.json", "sae_weights.safetensors"] {
                fs::copy(case.join(path).join(file), snapshot.join(file)).unwrap();
            }
            let table = json!({"r1": {
                "repo_id": "fnlp/Llama-Scope-R1-Distill", "conversion_func": "llama_scope_r1_distill",
                "saes": [{"id": "L3R", "path": path, "norm_scaling_factor": about["norm_scaling_factor"]}],
            }});
            desk.write("releases.yaml", &serde_yaml::to_string(&table).unwrap());
            desk.ok(&["import", "sae_lens", "r1:L3R", "--releases", "releases.yaml", "--out", out]);
            // By the folder itself: with the table, and with the published factor of a folder of this name.
            let dir = case.join(path);
            let direct = ["import", "llama_scope_r1_distill", dir.to_str().unwrap(), "--out", "direct"];
            desk.ok(&[&direct[..], &["--releases", "releases.yaml"]].concat());
            matches(&desk, &desk.path("direct"), &case.join("io.safetensors"), 1e-5);
            fs::remove_dir_all(desk.path("direct")).unwrap();
            desk.ok(&direct);
            let [w_enc, raw] = [&desk.path("direct/ae.safetensors"), &dir.join("sae_weights.safetensors")]
                .map(|file| TensorFile::open(file).unwrap())
                .map(|file| file.tensor(if file.has("W_enc") { "W_enc" } else { "encoder.weight" }).unwrap());
            assert!(difference(&w_enc, &(raw.tr() * 20.258785842428143)) < 1e-6);
            fs::remove_dir_all(desk.path("direct")).unwrap();
        } else {
            let run = desk.run(&["import", "llama_scope", case.join(path).to_str().unwrap(), "--out", out]);
            assert!(run.code == 0 && run.stderr.is_empty(), "{}", run.stderr);
        }
        matches(&desk, &desk.path(out), &case.join("io.safetensors"), 1e-5);
        // The same features must fire, not only with similar strength.
        let found = TensorFile::open(&desk.path("y.safetensors")).unwrap().tensor("features").unwrap();
        let wanted = TensorFile::open(&case.join("io.safetensors")).unwrap().tensor("features").unwrap();
        assert_eq!(found.not_equal(0.0), wanted.not_equal(0.0), "{out}");
        let transcodes = out == "llama_scope_norm_in_out";
        let config = desk.read(&format!("{out}/config.yaml"));
        assert_eq!(config.contains("target: blocks.6.hook_mlp_out"), transcodes, "{config}");
        // The export to sae_lens gives the same results.
        let exported = format!("{out}-sae_lens");
        desk.ok(&["export", out, "--format", "sae_lens", "--out", &exported]);
        let architecture = if transcodes { "jumprelu_transcoder" } else { "jumprelu" };
        assert_eq!(desk.json(&format!("{exported}/cfg.json"))["architecture"], architecture);
        desk.ok(&["import", "sae_lens", &exported, "--out", &format!("{out}-again")]);
        matches(&desk, &desk.path(&format!("{out}-again")), &case.join("io.safetensors"), 1e-5);
    }
}

/// The cases of `formats/sae_lens_loaders`: name, format, and the places of its SAEs.
fn loaders() -> Vec<(String, String, Vec<PathBuf>)> {
    let mut found = Vec::new();
    for case in crate::common::folders(&fixture("formats/sae_lens_loaders")) {
        let name = name(&case).to_owned();
        let about = case.join("case.json");
        let about = if about.exists() { crate::common::read_json(&about) } else { json!({}) };
        let (format, places) = match about["loader"].as_str() {
            Some(loader) => {
                let path = about["path"].as_str().map_or_else(|| about["path"].to_string(), str::to_owned);
                (loader, vec![case.join(about["repo_id"].as_str().unwrap()).join(path)])
            }
            None if case.join("final").exists() => ("sae_lens", vec![case.join("final"), case.join("checkpoint")]),
            None => ("sae_lens", vec![case.clone()]),
        };
        found.push((name, format.to_owned(), places));
    }
    assert_eq!(found.len(), 18);
    found
}

/// Which features fire must agree, not only their values.
fn same_support(desk: &Desk, io: &Path, case: &str) {
    let [found, wanted] = [&desk.path("y.safetensors"), io]
        .map(|file| TensorFile::open(file).unwrap().tensor("features").unwrap().not_equal(0.0));
    assert_eq!(found, wanted, "{case}");
}

#[test]
fn saes_of_every_loader_match_sae_lens() {
    let desk = Desk::new();
    for (case, format, places) in loaders() {
        let io = fixture("formats/sae_lens_loaders").join(&case).join("io.safetensors");
        for (index, place) in places.iter().enumerate() {
            let out = format!("{case}-{index}");
            desk.ok(&["import", &format, place.to_str().unwrap(), "--out", &out]);
            matches(&desk, &desk.path(&out), &io, 1e-5);
            same_support(&desk, &io, &case);
            let exported = format!("{out}-sae_lens");
            let export = ["export", &out, "--format", "sae_lens", "--out", &exported];
            if case.starts_with("temporal") {
                assert!(desk.refused(&export).contains("TemporalSAE"));
                continue;
            }
            desk.ok(&export);
            desk.ok(&["import", "sae_lens", &exported, "--out", &format!("{out}-again")]);
            matches(&desk, &desk.path(&format!("{out}-again")), &io, 1e-5);
            same_support(&desk, &io, &case);
        }
    }
}

#[test]
fn names_and_side_files_give_the_site() {
    let desk = Desk::new();
    let sites = [
        ("qwen_scope", "Qwen/Qwen3-1.7B-Base", "blocks.3.hook_resid_post", None),
        ("mwhanna_transcoder", "Qwen/Qwen3-4B", "model.layers.5.mlp", None),
        ("mwhanna_transcoder_no_config", "Qwen/Qwen3-14B", "model.layers.5.mlp", None),
        ("mntss_clt_layer_transcoder", "google/gemma-2-2b", "blocks.2.hook_resid_mid", Some("blocks.2.hook_mlp_out")),
        ("connor_rob_hook_z", "gpt2", "blocks.5.attn.hook_z", None),
        ("goodfire", "meta-llama/Llama-3.1-8B-Instruct", "blocks.19.hook_resid_post", None),
        ("deepseek_r1", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "blocks.19.hook_resid_post", None),
        ("temporal", "google/gemma-2-2b", "blocks.12.hook_resid_post", None),
    ];
    for (case, model, submodule, target) in sites {
        let (_, format, places) = loaders().into_iter().find(|(name, ..)| name == case).unwrap();
        desk.ok(&["import", &format, places[0].to_str().unwrap(), "--out", case]);
        let config = desk.json(&format!("{case}/config.json"));
        assert_eq!(config["buffer"]["model"], model, "{case}");
        assert_eq!(config["buffer"]["submodule"], submodule, "{case}");
        assert_eq!(config["buffer"]["target"].as_str(), target, "{case}");
        if case.starts_with("mwhanna") {
            assert_eq!((&config["buffer"]["io"], &config["buffer"]["ctx_len"]), (&json!("in_to_out"), &json!(4096)));
        }
    }
}

/// A copy of a case's folder.
fn copied(desk: &Desk, case: &str) -> PathBuf {
    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let from = entry.unwrap().path();
            let to = to.join(name(&from));
            if from.is_dir() { copy(&from, &to) } else { fs::copy(&from, &to).map(drop).unwrap() }
        }
    }
    let to = desk.path("copied");
    let _ = fs::remove_dir_all(&to);
    copy(&fixture("formats/sae_lens_loaders").join(case), &to);
    to
}

/// Replaces a text that a file holds.
fn replace(file: &Path, old: &str, new: &str) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(old), "{} does not hold `{old}`", file.display());
    fs::write(file, text.replace(old, new)).unwrap();
}

#[test]
fn contradictions_of_names_and_side_files_are_refused() {
    let desk = Desk::new();
    let temporal = "canrager/temporalSAEs/gemma-2-2B/layer_12/temporal";
    let hook_z = "ckkissane/attn-saes-gpt2-small-all-layers";
    let stem = "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.80e+00_ds80_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9";
    /// Case, file, text and its replacement, and a word of the message.
    type Case<'a> = (&'a str, String, &'a str, &'a str, &'a str);
    let cases: [Case; 15] = [
        ("temporal", format!("{temporal}/conf.yaml"), "dimin: 24", "dimin: 25", "`llm.dimin` is 25"),
        ("temporal", format!("{temporal}/conf.yaml"), "exp_factor: 4.0", "exp_factor: 8.0", "`sae.exp_factor` is 192"),
        ("temporal", format!("{temporal}/conf.yaml"), "n_heads: 2", "n_heads: 3", "`n_heads` is 3"),
        (
            "temporal",
            format!("{temporal}/conf.yaml"),
            "n_attn_layers: 1",
            "n_attn_layers: 2",
            "`sae.n_attn_layers` is 2",
        ),
        (
            "temporal",
            format!("{temporal}/conf.yaml"),
            "bottleneck_factor: 12",
            "bottleneck_factor: 6",
            "bottleneck_factor` is 16",
        ),
        ("temporal", format!("{temporal}/conf.yaml"), "kval_topk: 8", "kval_topk: 97", "`kval_topk` is 97"),
        (
            "temporal",
            format!("{temporal}/conf.yaml"),
            "sae_diff_type: topk",
            "sae_diff_type: tanh",
            "must be relu or topk",
        ),
        ("temporal", format!("{temporal}/conf.yaml"), "tied_weights: true", "tied_weights: false", "have no `E`"),
        (
            "temporal",
            format!("{temporal}/conf.yaml"),
            "scaling_factor: 0.2",
            "scaling_factor: 0",
            "`sae.scaling_factor` is 0",
        ),
        (
            "mwhanna_transcoder",
            "mwhanna/qwen3-4b-transcoders/wandb-config.yaml".into(),
            "value: 80",
            "value: 81",
            "`d_feature` is 81",
        ),
        (
            "mwhanna_transcoder",
            "mwhanna/qwen3-4b-transcoders/wandb-config.yaml".into(),
            "value: 24",
            "value: x",
            "`d_model.value` is \"x\"",
        ),
        (
            "connor_rob_hook_z",
            format!("{hook_z}/{stem}_cfg.json"),
            "\"act_size\": 24",
            "\"act_size\": 23",
            "`act_size` is 23",
        ),
        (
            "sae_lens_matching_pursuit",
            "cfg.json".into(),
            "\"max_iterations\": null",
            "\"max_iterations\": 2000000000",
            "`max_iterations` is 2000000000",
        ),
        (
            "sae_lens_matching_pursuit",
            "cfg.json".into(),
            "\"none\", \"reshape",
            "\"covariance_whitening\", \"reshape",
            "covariance_whitening",
        ),
        ("sae_lens_abstopk", "cfg.json".into(), "\"k\": 7", "\"k\": 81", "`k` is 81"),
    ];
    for (case, file, old, new, word) in cases {
        let (_, format, places) = loaders().into_iter().find(|(name, ..)| name == case).unwrap();
        let dir = copied(&desk, case);
        replace(&dir.join(file), old, new);
        let inner = places[0].strip_prefix(fixture("formats/sae_lens_loaders").join(case)).unwrap();
        let place = dir.join(inner);
        let message = desk.refused(&["import", &format, place.to_str().unwrap(), "--out", "out"]);
        assert!(message.contains(word), "{case}: {message}");
        assert!(!desk.path("out").exists(), "{case}: partial output was left behind");
    }
    // Qwen Scope's k and width are in the repository's name.
    let dir = copied(&desk, "qwen_scope").join("Qwen");
    for (name, word) in
        [("SAE-Res-Qwen3-1.7B-Base-W2K-L0_7", "is 2048"), ("saes", "no folder"), ("SAE-Res-Q-W1K-L0_0", "`k` is 0")]
    {
        let from = fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path();
        fs::rename(from, dir.join(name)).unwrap();
        let message = desk.refused(&["import", "qwen_scope", dir.join(name).to_str().unwrap(), "--out", "out"]);
        assert!(message.contains(word), "{name}: {message}");
    }
    // A whitening that is not for this SAE.
    let dir = copied(&desk, "sae_lens_whitening_topk").join("checkpoint");
    let eye = Tensor::eye(24, (Kind::Double, tch::Device::Cpu));
    for (matrix, inverse, mean, word) in [
        (&eye * 2.0, &eye * 2.0, 24, "off the identity"),
        (&eye * 2.0, &eye / 2.0, 23, "`matrix` has shape"),
        (
            Tensor::eye(23, (Kind::Double, tch::Device::Cpu)),
            Tensor::eye(23, (Kind::Double, tch::Device::Cpu)),
            23,
            "width 23",
        ),
    ] {
        let mean = Tensor::zeros([mean], (Kind::Double, tch::Device::Cpu));
        let tensors = [("mean", mean), ("matrix", matrix), ("inverse_matrix", inverse)];
        tensors::write(&dir.join("activation_whitening.safetensors"), &tensors).unwrap();
        let message = desk.refused(&["import", "sae_lens", dir.to_str().unwrap(), "--out", "out"]);
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn a_folder_of_layers_is_imported_whole() {
    let desk = Desk::new();
    for (case, layer) in [
        ("qwen_scope", "layer3.sae.pt"),
        ("mwhanna_transcoder", "layer_5.safetensors"),
        ("mntss_clt_layer_transcoder", "2"),
        ("goodfire", "Llama-3.1-8B-Instruct-SAE-l19.pth"),
    ] {
        let (_, format, places) = loaders().into_iter().find(|(name, ..)| name == case).unwrap();
        let folder = places[0].parent().unwrap();
        assert_eq!(desk.ok(&["import", &format, folder.to_str().unwrap()]).trim(), format!("saes/{layer}"));
    }
}

#[test]
fn a_temporal_sae_reads_whole_contexts() {
    let desk = Desk::new();
    let (_, _, places) = loaders().into_iter().find(|(name, ..)| name == "temporal").unwrap();
    desk.ok(&["import", "temporal", places[0].to_str().unwrap(), "--out", "temporal"]);
    // The order of positions matters, so rows alone are refused.
    let x =
        TensorFile::open(&fixture("formats/sae_lens_loaders/temporal/io.safetensors")).unwrap().tensor("x").unwrap();
    tensors::write(&desk.path("rows.safetensors"), &[("x", x.flatten(0, 1))]).unwrap();
    let encode = |input: &str| ["encode", "temporal", "--input", input, "--output", "y.safetensors"].map(str::to_owned);
    let args = encode("rows.safetensors");
    let refused = desk.refused(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(refused.contains("[27, 24]") && refused.contains("whole contexts [B, L, 24]"), "{refused}");
    // A position's features depend on earlier positions, and not on later ones or on other contexts.
    let features = |x: &Tensor| {
        tensors::write(&desk.path("x.safetensors"), &[("x", x.contiguous())]).unwrap();
        let args = encode("x.safetensors");
        desk.ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
        TensorFile::open(&desk.path("y.safetensors")).unwrap().tensor("features").unwrap()
    };
    let whole = features(&x);
    let first = features(&x.narrow(0, 1, 1).narrow(1, 0, 5));
    assert!(difference(&first, &whole.narrow(0, 1, 1).narrow(1, 0, 5)) < 1e-5);
    assert!(difference(&features(&x.narrow(1, 1, 8)), &whole.narrow(1, 1, 8)) > 1e-4);
    // Metrics on single activations, and training, are refused by name.
    desk.write(
        "config.yaml",
        "source: {type: tensor_file, path: rows.safetensors, tensor: x, batch_size: 9}\nmetrics: [{type: reconstruction}]\n",
    );
    let refused = desk.refused(&["eval", "temporal", "--config", "config.yaml"]);
    assert!(refused.contains("`reconstruction` cannot measure a TemporalSAE"), "{refused}");
    desk.write(
        "train.yaml",
        "steps: 1\noutput_dir: run\nsource: {type: tensor_file, path: rows.safetensors, tensor: x, batch_size: 9}\n\
         saes: [{name: a, dictionary: {type: temporal}, trainer: {type: standard}}]\n",
    );
    let refused = desk.refused(&["train", "train.yaml"]);
    assert!(refused.contains("unknown dictionary `temporal`"), "{refused}");
}

#[test]
fn a_temporal_sae_is_evaluated_and_encodes_text_by_context() {
    let desk = Desk::new();
    let (d, features, bottleneck) = (192, 384, 32);
    let random = |size: &[i64]| Tensor::randn(size, tch::kind::FLOAT_CPU) / (size[size.len() - 1] as f64).sqrt();
    let mut weights = vec![("D".to_owned(), random(&[features, d])), ("b".to_owned(), random(&[d]))];
    for (name, out) in [("q_target", bottleneck), ("k_ctx", bottleneck), ("v_ctx", features), ("c_proj", features)] {
        weights.push((format!("attn_layers.0.{name}.weight"), random(&[out, features])));
        weights.push((format!("attn_layers.0.{name}.bias"), random(&[out])));
    }
    desk.write(
        "sae/conf.yaml",
        "sae: {n_heads: 4, sae_diff_type: topk, kval_topk: 16, scaling_factor: 0.5, tied_weights: true}\n",
    );
    tensors::write(&desk.path("sae/latest_ckpt.safetensors"), &weights).unwrap();
    desk.ok(&["import", "temporal", "sae", "--out", "temporal"]);
    // Batches of eight activations end within contexts, which must not matter.
    desk.write(
        "config.yaml",
        "precision: float32\nsource: {type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.2, \
         ctx_len: 32, out_batch_size: 8, text: {type: embedded, name: austen}}\n",
    );
    let figures: Value =
        serde_json::from_str(&desk.ok(&["eval", "temporal", "--config", "config.yaml", "--json"])).unwrap();
    assert!(figures["frac_recovered"].is_f64() && figures.get("l0").is_none(), "{figures}");

    let text = "It is a truth universally acknowledged, that a single man in possession of a good fortune";
    let run = [
        "encode",
        "temporal",
        "--config",
        "config.yaml",
        "--text",
        text,
        "--text",
        "must be in want",
        "--output",
        "t.safetensors",
    ];
    desk.ok(&run);
    let shown = TensorFile::open(&desk.path("t.safetensors")).unwrap();
    let [x, features] = ["x", "features"].map(|name| shown.tensor(name).unwrap());
    let length = x.size()[0];
    assert!(length > 16, "{length}");
    // The first text alone, as one context.
    desk.ok(&["encode", "temporal", "--config", "config.yaml", "--text", text, "--output", "one.safetensors"]);
    let first = TensorFile::open(&desk.path("one.safetensors")).unwrap().tensor("x").unwrap().size()[0];
    assert!(first > 8 && first < length, "{first} of {length}");
    for (start, count) in [(0, first), (first, length - first)] {
        let context = x.narrow(0, start, count).unsqueeze(0);
        tensors::write(&desk.path("x.safetensors"), &[("x", context.contiguous())]).unwrap();
        desk.ok(&["encode", "temporal", "--input", "x.safetensors", "--output", "y.safetensors"]);
        let alone = TensorFile::open(&desk.path("y.safetensors")).unwrap().tensor("features").unwrap();
        assert!(difference(&alone.squeeze_dim(0), &features.narrow(0, start, count)) < 1e-5);
    }
}

#[test]
fn saes_of_every_loader_are_found_on_the_hub_by_their_names_in_the_table() {
    let server = crate::hub_server::HubServer::start();
    let desk = Desk::with_hub(&server.endpoint);
    let mut table = serde_json::Map::new();
    let cases: Vec<&str> = vec![
        "connor_rob_hook_z",
        "deepseek_r1",
        "goodfire",
        "mntss_clt_layer_transcoder",
        "mwhanna_transcoder",
        "mwhanna_transcoder_no_config",
        "qwen_scope",
        "temporal",
    ];
    for case in &cases {
        let dir = fixture("formats/sae_lens_loaders").join(case);
        let about = crate::common::read_json(&dir.join("case.json"));
        let repo = about["repo_id"].as_str().unwrap();
        let mut files = fs::read_dir(dir.join(repo)).unwrap().map(|entry| entry.unwrap().path());
        if files.all(|file| file.is_file()) {
            server.put_folder(repo, &dir.join(repo));
        } else {
            let path = about["path"].as_str().unwrap();
            for file in ["conf.yaml", "latest_ckpt.safetensors"] {
                let name = format!("{path}/{file}");
                server.put(repo, &name, fs::read(dir.join(repo).join(&name)).unwrap());
            }
        }
        let entry = json!({"id": "one", "path": about["path"]});
        let release =
            json!({"repo_id": repo, "model": "gpt2-small", "conversion_func": about["loader"], "saes": [entry]});
        table.insert((*case).to_owned(), release);
    }
    desk.write("table.yaml", &serde_yaml::to_string(&table).unwrap());
    for case in cases {
        let name = format!("{case}:one");
        desk.ok(&["import", "sae_lens", &name, "--releases", "table.yaml", "--out", case]);
        let io = fixture("formats/sae_lens_loaders").join(case).join("io.safetensors");
        matches(&desk, &desk.path(case), &io, 1e-5);
    }
    let missing = desk.refused(&["import", "qwen_scope", "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_7/layer4.sae.pt"]);
    assert!(missing.contains("there is no file Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_7/layer4.sae.pt"), "{missing}");
    // By repository: a layer's number names no file there.
    for place in ["mntss/clt-gemma-2-2b-2.5M/2", "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_7/layer3.sae.pt"] {
        let format = if place.starts_with("mntss") { "mntss_clt_layer_transcoder" } else { "qwen_scope" };
        assert_eq!(desk.ok(&["import", format, place]).trim(), format!("saes/{place}"));
    }
}

/// A copy of a published SAE of `tests/fixtures/formats` with a changed config and, if given, one more tensor.
fn published(desk: &Desk, place: &str, files: [&str; 2], change: &Value, tensor: Option<&str>) -> PathBuf {
    let (from, to) = (fixture("formats").join(place), desk.path("published").join(place));
    let _ = fs::remove_dir_all(desk.path("published"));
    let [config, weights] = files;
    fs::create_dir_all(to.join(weights).parent().unwrap()).unwrap();
    let mut said = crate::common::read_json(&from.join(config));
    said.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    fs::write(to.join(config), said.to_string()).unwrap();
    let mut all: Vec<(String, Tensor)> =
        TensorFile::open(&from.join(weights)).unwrap().tensors().unwrap().into_iter().collect();
    all.extend(tensor.map(|name| (name.to_owned(), Tensor::ones([3], tch::kind::FLOAT_CPU))));
    tensors::write(&to.join(weights), &all).unwrap();
    to
}

#[test]
fn unsupported_keys_that_change_the_result_are_refused_by_name() {
    let desk = Desk::new();
    let llama =
        ("llama_scope", "llama_scope/Llama3_1-8B-Base-L3R-8x", ["hyperparams.json", "checkpoints/final.safetensors"]);
    let sparsify = ("sparsify", "sparsify/sae/layers.3", ["cfg.json", "sae.safetensors"]);
    let gemma = (
        "gemma_scope",
        "gemma_scope/gemma-scope-2-1b-pt/transcoder/layer_5_width_80_l0_medium_affine",
        ["config.json", "params.safetensors"],
    );
    for ((format, place, files), change, tensor, word) in [
        (llama, json!({"use_glu_encoder": true}), None, "`use_glu_encoder: true`"),
        (llama, json!({"apply_decoder_bias_to_pre_encoder": true}), None, "`apply_decoder_bias_to_pre_encoder: true`"),
        (llama, json!({"norm_activation": "token-wise"}), None, "`norm_activation: token-wise`"),
        (llama, json!({"sae_type": "crosscoder"}), None, "`sae_type: crosscoder`"),
        (llama, json!({"act_fn": "tanh"}), None, "`act_fn: tanh`"),
        (llama, json!({"act_fn": "topk", "jump_relu_threshold": 0.0}), None, "`act_fn: topk`"),
        (llama, json!({"sparsity_include_decoder_norm": "yes"}), None, "`sparsity_include_decoder_norm`"),
        (llama, json!({}), Some("encoder_glu.weight"), "encoder_glu.weight"),
        (llama, json!({"use_decoder_bias": false}), None, "decoder.bias"),
        (sparsify, json!({"signed": true}), None, "`signed: true`"),
        (sparsify, json!({"activation": "groupmax"}), None, "`groupmax`"),
        (sparsify, json!({"normalize_io": true}), None, "`normalize_io: true`"),
        (sparsify, json!({"n_targets": 3}), None, "`n_targets: 3`"),
        (sparsify, json!({"matching_pursuit": true}), None, "`matching_pursuit: true`"),
        (sparsify, json!({"coalesce_topk": "concat"}), None, "`coalesce_topk: \"concat\"`"),
        (sparsify, json!({"num_latents": 81}), None, "`num_latents` is 81"),
        (gemma, json!({"type": "crosscoder"}), None, "`type: crosscoder`"),
        (gemma, json!({"width": 81}), None, "`width` is 81"),
        (gemma, json!({"affine_connection": false}), None, "`affine_connection`"),
        (gemma, json!({"apply_b_dec_to_input": true}), None, "`apply_b_dec_to_input: true`"),
    ] {
        let dir = published(&desk, place, files, &change, tensor);
        let message = desk.refused(&["import", format, dir.to_str().unwrap(), "--out", "out"]);
        assert!(message.contains(word), "{change}: {message}");
        assert!(!desk.path("out").exists(), "{change}: partial output was left behind");
    }
    // Keys without effect are accepted; unknown ones are reported.
    for (format, place, files) in [llama, sparsify, gemma] {
        let io = fixture("formats").join(place).join("io.safetensors");
        let off = json!({"use_glu_encoder": null, "normalize_io": false, "trained_by": "someone"});
        let dir = published(&desk, place, files, &off, None);
        let run = desk.run(&["import", format, dir.to_str().unwrap(), "--out", format]);
        assert!(run.code == 0 && run.stderr.contains("`trained_by`"), "{format}: {}", run.stderr);
        matches(&desk, &desk.path(format), &io, 1e-5);
    }
}

#[test]
fn an_sae_of_another_format_is_recognised() {
    let desk = Desk::new();
    let place = |path: &str| fixture(path).to_str().unwrap().to_owned();
    for (asked, path, other) in [
        ("sae_lens", "formats/gemma_scope/gemma-scope-2b-pt-transcoders/layer_3/width_80/average_l0_7", "gemma_scope"),
        ("sae_lens", "formats/llama_scope/Llama3_1-8B-Base-L3R-8x", "llama_scope"),
        ("gemma_scope", "sae_lens/standard", "sae_lens"),
        ("sparsify", "formats/dictionary_learning/AutoEncoder", "dictionary_learning"),
    ] {
        let message = desk.refused(&["import", asked, &place(path), "--out", "out"]);
        assert!(message.contains(&format!("`dictlearn import {other} ")), "{asked}: {message}");
    }
    // Files of the requested format get no hint at another format.
    let cfg = |cfg: &mut Value| cfg["architecture"] = "standart".into();
    let dir = changed(&desk, "standard", cfg, &[]);
    assert!(!desk.refused(&["import", "sae_lens", dir.to_str().unwrap(), "--out", "out"]).contains("dictlearn import"));
}

#[test]
fn weights_of_mixed_dtypes_are_read() {
    // Sparsify cannot load such checkpoints itself: it assumes the first tensor's dtype for all.
    let desk = Desk::new();
    let (place, files) = ("sparsify/sae/layers.3", ["cfg.json", "sae.safetensors"]);
    let dir = published(&desk, place, files, &json!({}), None);
    let tensors = TensorFile::open(&dir.join(files[1])).unwrap().tensors().unwrap().into_iter();
    let narrow = |(name, tensor): (String, Tensor)| {
        let kind = if name == "W_dec" { Kind::BFloat16 } else { Kind::Float };
        (name, tensor.to_kind(kind))
    };
    tensors::write(&dir.join(files[1]), &tensors.map(narrow).collect::<Vec<_>>()).unwrap();
    desk.ok(&["import", "sparsify", dir.to_str().unwrap(), "--out", "mixed"]);
    matches(&desk, &desk.path("mixed"), &fixture("formats").join(place).join("io.safetensors"), 1e-2);
}

#[test]
fn an_unknown_entry_of_an_openai_sae_is_refused_by_name() {
    let desk = Desk::new();
    let ones = |size: &[i64]| Tensor::ones(size, tch::kind::FLOAT_CPU);
    let mut tensors = vec![
        ("pre_bias", ones(&[6])),
        ("encoder.weight", ones(&[10, 6])),
        ("latent_bias", ones(&[10])),
        ("decoder.weight", ones(&[6, 10])),
        ("stats_last_nonzero", ones(&[10])),
    ];
    let file = desk.path("8.pt");
    dictlearn_core::files::torch_file::write(&file, &tensors).unwrap();
    desk.ok(&["import", "openai", "8.pt", "--out", "fine"]);
    tensors.push(("decoder.bias", ones(&[6])));
    dictlearn_core::files::torch_file::write(&file, &tensors).unwrap();
    let message = desk.refused(&["import", "openai", "8.pt", "--out", "out"]);
    assert!(message.contains("decoder.bias") && !message.contains("stats_last_nonzero"), "{message}");
}

#[test]
fn unsupported_activation_fn_kwargs_are_refused() {
    let desk = Desk::new();
    let kwargs = |cfg: &mut Value| cfg["activation_fn_kwargs"] = json!({"k": 7, "postact_fn": "Identity"});
    let dir = changed(&desk, "legacy_v5_topk", kwargs, &[]);
    let message = desk.refused(&["import", "sae_lens", dir.to_str().unwrap(), "--out", "out"]);
    assert!(message.contains("`postact_fn: \"Identity\"`"), "{message}");
    // A key that sae_lens 6 does not know either.
    let dir = changed(&desk, "standard", |cfg| cfg["trained_by"] = "someone".into(), &[]);
    let run = desk.run(&["import", "sae_lens", dir.to_str().unwrap(), "--out", "out"]);
    assert!(run.code == 0 && run.stderr.contains("`trained_by`"), "{}", run.stderr);
    matches(&desk, &desk.path("out"), &fixture("sae_lens/standard/io.safetensors"), 1e-5);
}
