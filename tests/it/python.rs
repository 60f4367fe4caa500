//! Parity with Python libraries.
//!
//! `tests/fixtures/formats` holds files and results of other projects' code. Tests that run the libraries themselves
//! need an interpreter: `DICTLEARN_TEST_PYTHON` with dictionary_learning, `DICTLEARN_TEST_PYTHON_SAE_LENS` with
//! sae_lens. Without the variable they are ignored (build.rs). To print the differences:
//! `cargo test -p dictlearn --test it python -- --nocapture`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;
use serde_json::{Value, json};
use tch::Kind;

use crate::common::{Desk, Run, fixture, folders, read_json};

/// Tolerance relative to the largest value; another order of summation differs by less.
const TOLERANCE: f64 = 1e-5;

/// The larger of the differences in features and in reconstructions, each relative to the largest value.
fn difference(found: &Path, wanted: &Path) -> f64 {
    let (found, wanted) = (TensorFile::open(found).unwrap(), TensorFile::open(wanted).unwrap());
    let of = |name: &str| {
        let (found, wanted) = (found.tensor(name).unwrap(), wanted.tensor(name).unwrap());
        assert_eq!(found.size(), wanted.size(), "{name}");
        let (found, wanted) = (found.to_kind(Kind::Double), wanted.to_kind(Kind::Double));
        ((found - &wanted).abs().max() / wanted.abs().max()).double_value(&[])
    };
    of("features").max(of("recon"))
}

/// Encodes with a saved SAE; returns the difference from the results in `io`.
fn encoded(desk: &Desk, sae: &Path, io: &Path) -> f64 {
    desk.ok(&["encode", sae.to_str().unwrap(), "--input", io.to_str().unwrap(), "--output", "y.safetensors"]);
    difference(&desk.path("y.safetensors"), io)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

fn class(sae: &Path) -> String {
    read_json(&sae.join("config.json"))["trainer"]["dict_class"].as_str().unwrap().to_owned()
}

/// Imports a fixture of `formats` and compares its results. Returns the config.json.
fn imported(desk: &Desk, format: &str, path: &str, io: &str) -> Value {
    let out = desk.path(&path.replace('/', "-"));
    desk.ok(&["import", format, fixture("formats").join(path).to_str().unwrap(), "--out", out.to_str().unwrap()]);
    let difference = encoded(desk, &out, &fixture("formats").join(io).join("io.safetensors"));
    println!("{format:12} {path:75} {:24} {difference:.1e}", class(&out));
    assert!(difference < TOLERANCE, "{path} differs by {difference:e}");
    read_json(&out.join("config.json"))
}

#[test]
fn openai_saes_match_their_code() {
    let desk = Desk::new();
    for (path, class, submodule) in [
        ("resid_post_mlp_v5_32k", "AutoEncoderTopK", "blocks.8.hook_resid_post"),
        ("mlp_post_act", "AutoEncoder", "blocks.8.mlp.hook_post"),
        ("resid_delta_mlp_v4", "AutoEncoder", "blocks.8.hook_mlp_out"),
    ] {
        let config = imported(&desk, "openai", &format!("openai/{path}/autoencoders/8.pt"), &format!("openai/{path}"));
        assert_eq!(config["trainer"]["dict_class"], class);
        assert_eq!(config["buffer"]["submodule"], submodule);
    }
}

#[test]
fn sparsify_saes_match_their_code() {
    let desk = Desk::new();
    for (path, class, io) in [
        ("sae/layers.3", "AutoEncoderTopK", "out"),
        ("sae/layers.3.mlp", "AutoEncoderTopK", "out"),
        ("transcoder/layers.3.mlp", "Transcoder", "in_to_out"),
        ("skip_transcoder/layers.3.mlp", "SkipTranscoder", "in_to_out"),
    ] {
        let path = format!("sparsify/{path}");
        let config = imported(&desk, "sparsify", &path, &path);
        assert_eq!(config["trainer"]["dict_class"], class);
        assert_eq!(config["buffer"]["model"], "HuggingFaceTB/SmolLM2-135M");
        assert_eq!(config["buffer"]["submodule"], path.rsplit('/').next().unwrap());
        assert_eq!(config["buffer"]["io"], io);
        assert_eq!(config["buffer"]["ctx_len"], 2049);
    }
    // All SAEs of a run at once.
    let run = fixture("formats/sparsify/skip_transcoder");
    desk.ok(&["import", "sparsify", run.to_str().unwrap(), "--out", "run"]);
    let all = folders(&desk.path("run"));
    assert_eq!(all.iter().map(|sae| name(sae)).collect::<Vec<_>>(), ["layers.3.mlp", "layers.4.mlp"]);
    for sae in all {
        assert!(encoded(&desk, &sae, &run.join(name(&sae)).join("io.safetensors")) < TOLERANCE);
    }
}

#[test]
fn llama_and_gemma_scope_match_sae_lens_loaders() {
    let desk = Desk::new();
    let llama = "llama_scope/Llama3_1-8B-Base-L3R-8x";
    assert_eq!(imported(&desk, "llama_scope", llama, llama)["buffer"]["submodule"], "blocks.3.hook_resid_post");
    for (path, class, model, submodule, target) in [
        (
            "2b-pt-res/embedding/width_80/average_l0_6",
            "JumpReluAutoEncoder",
            "google/gemma-2-2b",
            "hook_embed",
            json!(null),
        ),
        (
            "2b-pt-transcoders/layer_3/width_80/average_l0_7",
            "JumpReluAutoEncoder",
            "google/gemma-2-2b",
            "blocks.3.ln2.hook_normalized",
            json!("blocks.3.hook_mlp_out"),
        ),
        (
            "2-1b-pt/resid_post/layer_5_width_80_l0_medium",
            "JumpReluAutoEncoder",
            "google/gemma-3-1b-pt",
            "model.layers.5",
            json!(null),
        ),
        (
            "2-1b-pt/transcoder/layer_5_width_80_l0_medium_affine",
            "SkipTranscoder",
            "google/gemma-3-1b-pt",
            "model.layers.5.pre_feedforward_layernorm",
            json!("model.layers.5.post_feedforward_layernorm"),
        ),
        // One layer's file of a cross-layer transcoder, without config.json.
        (
            "2-1b-pt/clt/width_80_l0_medium_affine/params_layer_5.safetensors",
            "SkipTranscoder",
            "google/gemma-3-1b-pt",
            "model.layers.5.pre_feedforward_layernorm",
            json!("model.layers.5.post_feedforward_layernorm"),
        ),
    ] {
        let path = format!("gemma_scope/gemma-scope-{path}");
        let folder = path.trim_end_matches("/params_layer_5.safetensors");
        let config = imported(&desk, "gemma_scope", &path, folder);
        assert_eq!(config["trainer"]["dict_class"], class);
        assert_eq!(config["buffer"]["model"], model);
        assert_eq!(config["buffer"]["submodule"], submodule);
        assert_eq!(config["buffer"]["target"], target);
    }
}

/// The names of a user's own folders say nothing about the SAE.
#[test]
fn gemma_scope_ignores_the_names_of_parent_folders() {
    let desk = Desk::new();
    let sae = "layer_3/width_80/average_l0_7";
    let from = fixture("sae_lens/gemma_scope").join(sae);
    let here = desk.path("word-embeddings").join(sae);
    fs::create_dir_all(&here).unwrap();
    fs::copy(from.join("params.npz"), here.join("params.npz")).unwrap();
    desk.ok(&["import", "gemma_scope", here.to_str().unwrap(), "--out", "out"]);
    let difference = encoded(&desk, &desk.path("out"), &from.join("io.safetensors"));
    assert!(difference < TOLERANCE, "differs by {difference:e}");
}

#[test]
fn dictionary_learning_dictionaries_match_their_code() {
    let desk = Desk::new();
    let all = fixture("formats/dictionary_learning");
    for dictionary in folders(&all) {
        let path = format!("dictionary_learning/{}", name(&dictionary));
        let config = imported(&desk, "dictionary_learning", &path, &path);
        assert_eq!(config["trainer"]["dict_class"], name(&dictionary).split('.').next().unwrap());
        // Without import: ae.pt and config.json form a saved SAE too.
        let difference = encoded(&desk, &dictionary, &dictionary.join("io.safetensors"));
        assert!(difference < TOLERANCE, "{path}, not imported, differs by {difference:e}");
    }
    desk.ok(&["import", "dictionary_learning", all.to_str().unwrap(), "--out", "all"]);
    assert_eq!(folders(&desk.path("all")).len(), 8);
}

/// A backup's activations are divided by a factor, which only the end of training folds into biases and threshold.
#[test]
fn a_dictionary_learning_backup_matches_the_trained_dictionary() {
    let desk = Desk::new();
    imported(&desk, "dictionary_learning", "dictionary_learning_backup", "dictionary_learning_backup");
}

/// An installed Python library.
pub struct Library {
    /// Name of the library and of its format.
    name: &'static str,
    python: PathBuf,
}

impl Library {
    /// The library, with the interpreter that its environment variable names.
    pub fn installed(name: &'static str) -> Self {
        let variable = match name {
            "sae_lens" => "DICTLEARN_TEST_PYTHON_SAE_LENS",
            _ => "DICTLEARN_TEST_PYTHON",
        };
        let python = std::env::var_os(variable).filter(|python| !python.is_empty());
        let python = python.unwrap_or_else(|| panic!("{variable} names no Python interpreter with {name}"));
        Library { name, python: python.into() }
    }

    /// Runs a script of tests/python on a folder, once for all cases: importing the library takes seconds.
    pub fn run(&self, script: &str, folder: &Path, more: &[&str]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(script);
        let mut command = Command::new(&self.python);
        command.arg(&script).arg(self.name).arg(folder).args(more).env("PYTHONDONTWRITEBYTECODE", "1");
        let run = Run::of(command.output().unwrap_or_else(|error| panic!("{}: {error}", self.python.display())));
        assert_eq!(run.code, 0, "{} {}\n{}", self.python.display(), script.display(), run.stderr);
    }

    /// Prints a case's difference, and asserts that it is below the tolerance.
    fn judge(&self, what: &str, case: &str, class: &str, difference: f64, tolerance: f64) {
        println!("{what:40} {case:50} {class:24} {difference:.1e}");
        assert!(difference < tolerance, "{what}: {case} ({class}) differs by {difference:e}");
    }
}

/// Imports the files that the library writes today.
fn what_it_writes(library: &'static str, cases: usize, refused: &[(&str, &str)]) {
    let library = Library::installed(library);
    let desk = Desk::new();
    let theirs = desk.path("theirs");
    fs::create_dir_all(&theirs).unwrap();
    library.run("writes.py", &theirs, &[]);
    let what = format!("written by {}", library.name);
    let mut seen = 0;
    for case in folders(&theirs) {
        if name(&case) == "refused" {
            continue;
        }
        let out = desk.path("ours").join(name(&case));
        let run = desk.run(&["import", library.name, case.to_str().unwrap(), "--out", out.to_str().unwrap()]);
        if run.code != 0 {
            println!("{}", run.stderr);
            library.judge(&what, &name(&case), "refused", f64::INFINITY, TOLERANCE);
            seen += 1;
            continue;
        }
        // Half precision rounds at every operation, and our classes may order operations differently. A feature near
        // its threshold may then fire in one of the two only.
        let tolerance = match name(&case).rsplit('.').next() {
            Some("bfloat16") => 5e-2,
            Some("float16") => 2e-3,
            _ => TOLERANCE,
        };
        let difference = encoded(&desk, &out, &case.join("io.safetensors"));
        library.judge(&what, &name(&case), &class(&out), difference, tolerance);
        seen += 1;
    }
    assert_eq!(seen, cases);
    for (case, word) in refused {
        let case = theirs.join("refused").join(case);
        let message = desk.refused(&["import", library.name, case.to_str().unwrap(), "--out", "refused"]);
        assert!(message.contains(word), "{message}");
    }
}

#[test]
#[cfg_attr(not(has_sae_lens), ignore = "needs DICTLEARN_TEST_PYTHON_SAE_LENS, a Python with sae_lens")]
fn sae_lens_files_are_read() {
    what_it_writes(
        "sae_lens",
        87,
        &[
            ("abstopk", "`abstopk`"),
            ("covariance_whitening", "covariance_whitening"),
            ("skip_transcoder.layer_norm", "a skip connection with"),
            ("skip_transcoder.constant_norm_rescale", "a skip connection with"),
            ("jumprelu_skip_transcoder.layer_norm", "a skip connection with"),
            ("jumprelu_skip_transcoder.constant_norm_rescale", "a skip connection with"),
        ],
    );
}

#[test]
#[cfg_attr(not(has_dictionary_learning), ignore = "needs DICTLEARN_TEST_PYTHON, a Python with dictionary_learning")]
fn dictionary_learning_files_are_read() {
    what_it_writes("dictionary_learning", 8, &[]);
}

/// Saved SAEs of every exportable class: case, folder, and a file of activations.
fn ours(desk: &Desk) -> Vec<(String, PathBuf, PathBuf)> {
    let mut saes = Vec::new();
    // Results of the trainers.
    let batches = TensorFile::open(&fixture("trainers/batches.safetensors")).unwrap().tensor("activations").unwrap();
    let x = desk.path("x.safetensors");
    tensors::write(&x, &[("x", batches.narrow(0, 0, 20).contiguous())]).unwrap();
    for case in folders(&fixture("trainers")) {
        let sae = desk.golden_sae(&name(&case));
        if name(&case) == "standard_april_update" {
            // The reference's trainer writes AutoEncoder for every class.
            let config = fs::read_to_string(sae.join("config.json")).unwrap();
            fs::write(sae.join("config.json"), config.replace("\"AutoEncoder\"", "\"AutoEncoderNew\"")).unwrap();
        }
        saes.push((format!("trainers.{}", name(&case)), sae, x.clone()));
    }
    // Imported SAEs.
    let mut import = |case: String, format: &str, from: &Path, io: &Path| {
        let out = desk.path("imported").join(&case);
        desk.ok(&["import", format, from.to_str().unwrap(), "--out", out.to_str().unwrap()]);
        saes.push((case, out, io.join("io.safetensors")));
    };
    for case in folders(&fixture("sae_lens")) {
        if case.join("cfg.json").exists() {
            import(format!("sae_lens.{}", name(&case)), "sae_lens", &case, &case);
        }
    }
    for case in folders(&fixture("formats/dictionary_learning")) {
        import(format!("dictionary_learning.{}", name(&case)), "dictionary_learning", &case, &case);
    }
    for (case, format, path, file) in [
        ("openai.resid_post_mlp_v5_32k", "openai", "openai/resid_post_mlp_v5_32k", "autoencoders/8.pt"),
        ("openai.mlp_post_act", "openai", "openai/mlp_post_act", "autoencoders/8.pt"),
        ("sparsify.sae", "sparsify", "sparsify/sae/layers.3", ""),
        ("sparsify.transcoder", "sparsify", "sparsify/transcoder/layers.3.mlp", ""),
        ("sparsify.skip_transcoder", "sparsify", "sparsify/skip_transcoder/layers.3.mlp", ""),
        (
            "gemma_scope.skip_transcoder",
            "gemma_scope",
            "gemma_scope/gemma-scope-2-1b-pt/transcoder/layer_5_width_80_l0_medium_affine",
            "",
        ),
    ] {
        let folder = fixture("formats").join(path);
        let from = if file.is_empty() { folder.clone() } else { folder.join(file) };
        import(case.to_owned(), format, &from, &folder);
    }
    // A transcoder with equal widths, made of an SAE that normalises its input only.
    let (from, square) = (fixture("sae_lens/jumprelu_layer_norm"), desk.path("square_transcoder"));
    fs::create_dir_all(&square).unwrap();
    fs::copy(from.join("sae_weights.safetensors"), square.join("sae_weights.safetensors")).unwrap();
    let mut cfg = read_json(&from.join("cfg.json"));
    cfg["architecture"] = "jumprelu_transcoder".into();
    cfg["d_out"] = cfg["d_in"].clone();
    cfg["apply_b_dec_to_input"] = false.into();
    fs::write(square.join("cfg.json"), cfg.to_string()).unwrap();
    import("square_transcoder".to_owned(), "sae_lens", &square, &from);
    saes
}

/// Exports SAEs to the library and compares its results with ours.
fn what_it_loads(library: &'static str, refused: &[&str]) {
    let library = Library::installed(library);
    let desk = Desk::new();
    let cases = desk.path("cases");
    let mut exported = Vec::new();
    let mut not = Vec::new();
    for (case, sae, io) in ours(&desk) {
        let dir = cases.join(&case);
        let out = dir.join("exported");
        let run =
            desk.run(&["export", sae.to_str().unwrap(), "--format", library.name, "--out", out.to_str().unwrap()]);
        if run.code == 2 {
            not.push(case);
            fs::remove_dir_all(&dir).unwrap();
            continue;
        }
        assert_eq!(run.code, 0, "{case}: {}", run.stderr);
        let x = TensorFile::open(&io).unwrap().tensor("x").unwrap();
        tensors::write(&dir.join("x.safetensors"), &[("x", x)]).unwrap();
        let (x, y) = (dir.join("x.safetensors"), dir.join("ours.safetensors"));
        desk.ok(&["encode", sae.to_str().unwrap(), "--input", x.to_str().unwrap(), "--output", y.to_str().unwrap()]);
        exported.push((case, sae, dir));
    }
    assert_eq!(not, refused, "SAEs that {} cannot represent", library.name);
    library.run("reads.py", &cases, &[]);
    let what = format!("loaded by {}", library.name);
    for (case, sae, dir) in exported {
        let difference = difference(&dir.join("ours.safetensors"), &dir.join("theirs.safetensors"));
        // dictionary_learning computes in float32, also for SAEs published in bfloat16.
        let narrow = case.ends_with("bf16") && library.name == "dictionary_learning";
        library.judge(&what, &case, &class(&sae), difference, if narrow { 0.1 } else { TOLERANCE });
    }
}

#[test]
#[cfg_attr(not(has_sae_lens), ignore = "needs DICTLEARN_TEST_PYTHON_SAE_LENS, a Python with sae_lens")]
fn sae_lens_loads_exported_saes() {
    what_it_loads("sae_lens", &["sparsify.transcoder", "sparsify.skip_transcoder"]);
}

#[test]
#[cfg_attr(not(has_dictionary_learning), ignore = "needs DICTLEARN_TEST_PYTHON, a Python with dictionary_learning")]
fn dictionary_learning_loads_exported_saes() {
    what_it_loads(
        "dictionary_learning",
        &[
            "sae_lens.jumprelu_const_norm",
            "sae_lens.jumprelu_layer_norm",
            "sae_lens.jumprelu_transcoder",
            "sae_lens.skip_transcoder",
            "sae_lens.transcoder",
            "openai.resid_post_mlp_v5_32k",
            "sparsify.transcoder",
            "sparsify.skip_transcoder",
            "gemma_scope.skip_transcoder",
            "square_transcoder",
        ],
    );
}
