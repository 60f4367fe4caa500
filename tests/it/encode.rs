//! `dictlearn encode`: input formats and negative features.

use std::fs;

use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::common::{Desk, fixture, tensor_file_config};

/// An .npy file of float32 rows.
fn npy(rows: &Tensor) -> Vec<u8> {
    let size = rows.size();
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {}), }}", size[0], size[1]);
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.into_bytes());
    let values: Vec<f32> = rows.reshape([-1]).try_into().unwrap();
    bytes.extend(values.into_iter().flat_map(f32::to_le_bytes));
    bytes
}

#[test]
fn numpy_files_and_named_tensors_encode_like_safetensors() {
    let desk = Desk::new();
    desk.golden_sae("top_k");
    let all = TensorFile::open(&fixture("trainers/batches.safetensors")).unwrap().tensor("activations").unwrap();
    let x = all.narrow(0, 0, 50).contiguous();
    tensors::write(&desk.path("x.safetensors"), &[("x", x.shallow_clone()), ("acts", x.shallow_clone())]).unwrap();
    fs::write(desk.path("x.npy"), npy(&x)).unwrap();
    let mut zip = zip::ZipWriter::new(fs::File::create(desk.path("x.npz")).unwrap());
    for name in ["x.npy", "acts.npy"] {
        zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        std::io::Write::write_all(&mut zip, &npy(&x)).unwrap();
    }
    zip.finish().unwrap();
    let encoded = |input: &str, more: &[&str]| {
        desk.ok(&[&["encode", "top_k", "--input", input, "--output", "y.safetensors"], more].concat());
        TensorFile::open(&desk.path("y.safetensors")).unwrap().tensor("features").unwrap()
    };
    let expected = encoded("x.safetensors", &[]);
    assert_eq!(expected.size(), [50, 96]);
    for (input, more) in
        [("x.npy", &[][..]), ("x.npz", &[]), ("x.safetensors", &["--tensor", "acts"]), ("x.npz", &["--tensor", "acts"])]
    {
        assert_eq!(encoded(input, more), expected, "{input} {more:?}");
    }
}

#[test]
fn unreadable_input_names_the_accepted_formats() {
    let desk = Desk::new();
    desk.golden_sae("top_k");
    let x = Tensor::zeros([4, 32], (Kind::Float, tch::Device::Cpu));
    tensors::write(&desk.path("x.safetensors"), &[("activations", x.shallow_clone())]).unwrap();
    let said = desk.refused(&["encode", "top_k", "--input", ".", "--output", "y.safetensors"]);
    assert!(said.contains("--input is a folder") && said.contains("activation_cache"), "{said}");
    let said = desk.refused(&["encode", "top_k", "--input", "x.safetensors", "--output", "nowhere/y.safetensors"]);
    assert!(
        said.contains("the folder of --output does not exist: nowhere") && said.contains("mkdir -p nowhere"),
        "{said}"
    );
    fs::write(desk.path("x.npy"), npy(&x)).unwrap();
    fs::write(desk.path("cut.npy"), &npy(&x)[..40]).unwrap();
    fs::write(desk.path("x.csv"), "0,0,0").unwrap();
    fs::write(desk.path("x.npz"), "no archive").unwrap();
    for (input, more, words) in [
        ("x.safetensors", &[][..], &["has no tensor `x`", "`--tensor activations`"][..]),
        ("x.safetensors", &["--tensor", "activation"], &["has no tensor `activation`", "`--tensor activations`"]),
        ("x.npy", &["--tensor", "x"], &["without a name"]),
        ("cut.npy", &[], &["cut.npy"]),
        ("x.csv", &[], &["x.csv", ".safetensors, .npy and .npz"]),
        ("x.npz", &[], &["x.npz"]),
        ("nowhere.npy", &[], &["nowhere.npy"]),
    ] {
        let said = desk.refused(&[&["encode", "top_k", "--input", input, "--output", "y.safetensors"], more].concat());
        assert!(words.iter().all(|word| said.contains(word)), "{input} {more:?}: {said}");
    }
    let said = desk.refused(&["encode", "top_k", "--text", "a text", "--tensor", "x"]);
    assert!(said.contains("--input"), "{said}");
    assert!(!desk.path("y.safetensors").exists());
}

#[test]
fn negative_features_are_counted_and_ranked_by_magnitude() {
    let desk = Desk::with_config(
        "steps: 1\noutput_dir: run\nprecision: float32\n\
         source: {type: language_model, model: \"embedded:austen\", submodule: gpt_neox.layers.2, ctx_len: 32, n_ctxs: 8,\n  \
         refresh_batch_size: 4, out_batch_size: 64, text: {type: embedded, name: austen}}\n\
         saes: [{name: same, dictionary: {type: identity}, trainer: {type: standard, warmup_steps: 0, \
         sparsity_warmup_steps: null}}]\nmetrics: []\n",
    );
    desk.ok(&["train", "config.yaml"]);
    let args = ["encode", "run/same", "--text", "It was a truth", "--top", "7", "--json", "--output", "y.safetensors"];
    let tokens: Value = serde_json::from_str(&desk.ok(&args)).unwrap();
    let features = TensorFile::open(&desk.path("y.safetensors")).unwrap().tensor("features").unwrap();
    let mut negative = 0;
    for (row, token) in tokens["tokens"].as_array().unwrap().iter().enumerate() {
        let codes = Vec::<f32>::try_from(features.select(0, row as i64)).unwrap();
        let nonzero = codes.iter().filter(|code| **code != 0.0).count();
        assert_eq!(token["l0"], nonzero);
        let shown: Vec<f32> = token["features"]
            .as_array()
            .unwrap()
            .iter()
            .map(|feature| {
                let value = feature["activation"].as_f64().unwrap() as f32;
                assert_eq!(value, codes[feature["index"].as_u64().unwrap() as usize]);
                value
            })
            .collect();
        let mut largest: Vec<f32> = codes.iter().map(|code| code.abs()).collect();
        largest.sort_by(|a, b| b.total_cmp(a));
        assert_eq!(shown.iter().map(|value| value.abs()).collect::<Vec<_>>(), largest[..7]);
        negative += shown.iter().filter(|value| **value < 0.0).count();
    }
    assert!(negative > 0, "{tokens}");
    let table = desk.ok(&["encode", "run/same", "--text", "It was a truth"]);
    assert!(table.contains(" -"), "{table}");
}

#[test]
fn encoding_text_without_a_model_is_refused() {
    let saes =
        "saes: [{name: a, trainer: {type: top_k, warmup_steps: 0}, dictionary: {dict_size: 64, k: 4}}]\nmetrics: []\n";
    let desk = Desk::with_config(&tensor_file_config(2, saes));
    desk.ok(&["train", "config.yaml"]);
    let said = desk.refused(&["encode", "run/a", "--text", "a text"]);
    assert!(said.contains("language model") && said.contains("`tensor_file`"), "{said}");
    assert!(said.contains("--config") && said.contains("--input") && !said.contains("pack"), "{said}");
    // A wrong setting is still reported as such.
    let said = desk.refused(&["encode", "run/a", "--text", "a text", "--set", "source.batch_sizee=3"]);
    assert!(said.contains("batch_sizee"), "{said}");
}
