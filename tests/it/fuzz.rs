//! Fuzzing: readers of published formats on damaged copies of valid files, and fuzz targets on their corpus and damaged
//! copies of it. Damaged files are refused or read; no reader panics, exhausts memory or writes files.
//!
//! `cargo test` gives each reader one second. A long run:
//! `DICTLEARN_FUZZ_SECONDS=600 cargo test --release --test it fuzz -- --nocapture`. `DICTLEARN_FUZZ_READER=sae_lens`
//! selects one reader. Each reader runs in its own process, with little more memory than libtorch needs.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dictlearn_core::files::{tensors, torch_file};
use dictlearn_core::formats;
use dictlearn_core::formats::Request;
use dictlearn_core::machine::device::Precision;
use dictlearn_core::sae::saved;
use serde_json::json;
use tch::{Device, Tensor, kind::FLOAT_CPU};
use tempfile::TempDir;

use crate::common::fixture;

/// The fuzz targets, which cargo-fuzz drives on a nightly toolchain and this test on any.
#[path = "../../fuzz/src/lib.rs"]
mod targets;

use targets::{TARGETS, limit_memory};

/// Readers of published formats; each has its valid files in a folder of its own.
const READERS: [&str; 18] = [
    "sae_lens",
    "gemma_scope",
    "gemma_scope_2",
    "llama_scope",
    "llama_scope_r1_distill",
    "qwen_scope",
    "connor_rob_hook_z",
    "goodfire",
    "deepseek_r1",
    "mwhanna_transcoder",
    "mntss_clt_layer_transcoder",
    "temporal",
    "sparsify",
    "openai",
    "dictionary_learning",
    "pretrained",
    "releases",
    "saved",
];

#[test]
fn damaged_files_are_refused_or_read() {
    let only = std::env::var("DICTLEARN_FUZZ_READER").ok();
    let targets = TARGETS.iter().map(|(name, _)| name);
    for reader in READERS.iter().chain(targets).filter(|reader| only.as_deref().is_none_or(|only| only == **reader)) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "fuzz::run_of_one_reader", "--ignored", "--nocapture"])
            .env("DICTLEARN_FUZZ_READER", reader)
            .env("RUST_BACKTRACE", "0")
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        let summary = said.lines().find(|line| line.starts_with("fuzz: "));
        assert!(output.status.success() && summary.is_some(), "{reader}: {}\n{said}\n{errors}", output.status);
        println!("{}", summary.unwrap());
    }
}

#[test]
#[ignore = "started by damaged_files_are_refused_or_read"]
fn run_of_one_reader() {
    let reader = std::env::var("DICTLEARN_FUZZ_READER").expect("DICTLEARN_FUZZ_READER names a reader");
    let seconds = std::env::var("DICTLEARN_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let dir = TempDir::new().unwrap();
    dictlearn_core::hub::use_cache(&dir.path().join("hf/hub")).unwrap();
    let seeds = seeds(&reader, dir.path());
    let before = inventory_of(dir.path());
    limit_memory();
    std::panic::set_hook(Box::new(|_| {}));
    let until = Instant::now() + Duration::from_secs(seconds);
    let (mut tried, mut read) = (0_u64, 0_u64);
    let mut damage = Damage::new(&seeds);
    // Even a slow reader reads each undamaged file once.
    while tried < seeds.len() as u64 || Instant::now() < until {
        let (file, bytes) = damage.next();
        // Written beside it and renamed: a reader may still map the previous file.
        let beside = file.with_extension("next");
        fs::write(&beside, &bytes).unwrap();
        fs::rename(&beside, &file).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| open(&reader, &file, dir.path())));
        tried += 1;
        match result {
            Ok(Ok(())) => read += 1,
            Ok(Err(_)) => {}
            Err(panic) => {
                let kept = std::env::temp_dir().join(format!("dictlearn-fuzz-{reader}"));
                fs::write(&kept, &bytes).unwrap();
                let message = panic.downcast_ref::<String>().map(String::as_str);
                let message = message.or(panic.downcast_ref::<&str>().copied()).unwrap_or_default();
                let name = file.strip_prefix(dir.path()).unwrap().display();
                println!("{name} of {reader}, kept as {}: {message}", kept.display());
                std::process::exit(1);
            }
        }
        damage.mend();
    }
    assert_eq!(before, inventory_of(dir.path()), "files were left behind");
    println!("fuzz: {reader}: {tried} files, {read} of them read, in {seconds} s");
}

/// Reads the SAE that a damaged file belongs to and uses it, or passes the file to a fuzz target.
fn open(reader: &str, file: &Path, root: &Path) -> anyhow::Result<()> {
    if let Some((_, target)) = TARGETS.iter().find(|(name, _)| *name == reader) {
        anyhow::ensure!(target(&fs::read(file)?));
        return Ok(());
    }
    let folder = |file: &Path| {
        // The SAE's folder is two levels below the root.
        let inner = file.strip_prefix(root).unwrap();
        root.join(inner.components().take(2).collect::<PathBuf>())
    };
    if reader == "saved" {
        let saved = saved::read(&folder(file), Device::Cpu, Precision::Float32)?;
        return use_it(&*saved.dictionary);
    }
    if reader == "releases" {
        let releases = Some(file.display().to_string());
        let request = Request { place: Some("some-release:five".to_owned()), releases, ..Request::default() };
        let format = formats::named("sae_lens")?;
        format.offers(&request)?;
        format.find(&request)?;
        return Ok(());
    }
    let format = formats::named(match reader {
        "gemma_scope_2" => "gemma_scope",
        "pretrained" => "dictionary_learning",
        other => other,
    })?;
    let request = match reader {
        "pretrained" => Request { pretrained: Some("*".to_owned()), ..Request::default() },
        "openai" => Request { place: Some(file.display().to_string()), ..Request::default() },
        _ => Request { place: Some(folder(file).display().to_string()), ..Request::default() },
    };
    for place in format.find(&request)? {
        let published = format.read(&place)?;
        let (dictionary, _) = formats::dictionary(&published, "damaged")?;
        use_it(&*dictionary)?;
    }
    Ok(())
}

fn use_it(dictionary: &dyn dictlearn_core::sae::Dictionary) -> anyhow::Result<()> {
    let x = Tensor::ones([2, dictionary.dims().input], FLOAT_CPU);
    let (recon, features) = tch::no_grad(|| dictionary.reconstruct(&x));
    anyhow::ensure!(recon.size() == [2, dictionary.dims().output]);
    anyhow::ensure!(features.size() == [2, dictionary.dims().features]);
    Ok(())
}

/// Puts a reader's valid files into `root/<reader>/<case>/...`, or a fuzz target's corpus. Returns their paths.
fn seeds(reader: &str, root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut copy = |from: PathBuf, to: &str| {
        let to = root.join(reader).join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(&from, &to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        files.push(to);
    };
    match reader {
        "sae_lens" => {
            for case in
                ["jumprelu", "gated", "topk_rescaled", "legacy_v5_topk", "skip_transcoder", "jumprelu_layer_norm"]
            {
                for file in ["cfg.json", "sae_weights.safetensors"] {
                    copy(fixture(&format!("sae_lens/{case}/{file}")), &format!("{case}/{file}"));
                }
            }
            for case in ["sae_lens_abstopk", "sae_lens_matching_pursuit", "sae_lens_whitening_topk/checkpoint"] {
                let dir = fixture("formats/sae_lens_loaders").join(case);
                for file in inventory_of(&dir).into_keys() {
                    let name = file.file_name().unwrap().to_str().unwrap().to_owned();
                    if name != "io.safetensors" {
                        copy(file, &format!("{}/{name}", case.replace('/', "-")));
                    }
                }
            }
        }
        // Laid out as on the Hub; the reader gets the folder with the files.
        "qwen_scope"
        | "connor_rob_hook_z"
        | "goodfire"
        | "deepseek_r1"
        | "mwhanna_transcoder"
        | "mntss_clt_layer_transcoder"
        | "temporal" => {
            for case in [reader, "temporal_untied_relu"].into_iter().filter(|case| case.starts_with(reader)) {
                let dir = fixture("formats/sae_lens_loaders").join(case);
                for file in inventory_of(&dir).into_keys().filter(|file| file.parent() != Some(&dir)) {
                    let folder = file.parent().unwrap().file_name().unwrap().to_str().unwrap();
                    let folder = if reader == "temporal" { case } else { folder };
                    let name = file.file_name().unwrap().to_str().unwrap().to_owned();
                    copy(file.clone(), &format!("{folder}/{name}"));
                }
            }
        }
        "gemma_scope" => {
            copy(
                fixture("sae_lens/gemma_scope/layer_3/width_80/average_l0_7/params.npz"),
                "layer_3-width_80/params.npz",
            );
        }
        "dictionary_learning" | "saved" => {
            for case in ["standard", "gated", "top_k", "batch_top_k", "jump_relu", "matryoshka_batch_top_k"] {
                copy(fixture(&format!("trainers/{case}/ae.pt")), &format!("{case}/ae.pt"));
                copy(fixture(&format!("trainers/{case}/config.json")), &format!("{case}/config.json"));
            }
            if reader == "saved" {
                for case in ["standard", "matryoshka_batch_top_k"] {
                    let name = format!("{case}-safe");
                    copy(fixture(&format!("trainers/{case}/final.safetensors")), &format!("{name}/ae.safetensors"));
                    copy(fixture(&format!("trainers/{case}/config.json")), &format!("{name}/config.json"));
                }
            }
        }
        _ if TARGETS.iter().any(|(name, _)| *name == reader) => {
            let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(reader);
            for path in inventory_of(&corpus).into_keys() {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                copy(path, &name);
            }
        }
        _ => {}
    }
    let mut write = |name: &str, bytes: &[u8]| {
        let path = root.join(reader).join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        files.push(path);
    };
    let random = |size: &[i64]| Tensor::randn(size, FLOAT_CPU);
    let (d, f) = (6, 10);
    match reader {
        "gemma_scope_2" => {
            let tensors = [
                ("w_enc", random(&[d, f])),
                ("w_dec", random(&[f, d])),
                ("b_enc", random(&[f])),
                ("b_dec", random(&[d])),
                ("threshold", random(&[f])),
                ("affine_skip_connection", random(&[d, d])),
            ];
            write("transcoder-layer_3/params.safetensors", &tensors::serialize(&tensors, &[]).unwrap());
            let config = json!({"architecture": "jump_relu", "model_name": "gemma-v3-270m", "hf_hook_point_in": "model.layers.3.output"});
            write("transcoder-layer_3/config.json", config.to_string().as_bytes());
        }
        "llama_scope" => {
            let tensors = [
                ("encoder.weight", random(&[f, d])),
                ("decoder.weight", random(&[d, f])),
                ("encoder.bias", random(&[f])),
                ("decoder.bias", random(&[d])),
            ];
            write("l3/checkpoints/final.safetensors", &tensors::serialize(&tensors, &[]).unwrap());
            let config = json!({"d_model": d, "d_sae": f, "jump_relu_threshold": 0.5, "hook_point_in": "blocks.3.hook_resid_post",
                                "dataset_average_activation_norm": {"in": 1.5, "out": 1.5}, "act_fn": "jumprelu"});
            write("l3/hyperparams.json", config.to_string().as_bytes());
        }
        "llama_scope_r1_distill" => {
            let tensors = [
                ("encoder.weight", random(&[f, d])),
                ("decoder.weight", random(&[d, f])),
                ("encoder.bias", random(&[f])),
                ("decoder.bias", random(&[d])),
                ("log_jumprelu_threshold", random(&[f])),
            ];
            write("L3R/sae_weights.safetensors", &tensors::serialize(&tensors, &[]).unwrap());
            let config = json!({"d_model": d, "expansion_factor": 2, "hook_point_in": "blocks.3.hook_resid_post",
                                "norm_scaling_factor": 2.5, "sparsity_include_decoder_norm": true});
            write("L3R/config.json", config.to_string().as_bytes());
        }
        "sparsify" => {
            let tensors = [
                ("encoder.weight", random(&[f, d])),
                ("encoder.bias", random(&[f])),
                ("W_dec", random(&[f, d])),
                ("b_dec", random(&[d])),
                ("W_skip", random(&[d, d])),
            ];
            write("run/layers.3.mlp/sae.safetensors", &tensors::serialize(&tensors, &[]).unwrap());
            let cfg = json!({"k": 3, "d_in": d, "transcode": true, "skip_connection": true, "activation": "topk"});
            write("run/layers.3.mlp/cfg.json", cfg.to_string().as_bytes());
            write("run/config.json", json!({"model": "gpt2", "ctx_len": 64}).to_string().as_bytes());
        }
        "openai" | "pretrained" => {
            let path = root.join("weights.pt");
            let openai = [
                ("pre_bias", random(&[d])),
                ("encoder.weight", random(&[f, d])),
                ("latent_bias", random(&[f])),
                ("decoder.weight", random(&[d, f])),
            ];
            let reference = [
                ("bias", random(&[d])),
                ("encoder.weight", random(&[f, d])),
                ("encoder.bias", random(&[f])),
                ("decoder.weight", random(&[d, f])),
            ];
            torch_file::write(&path, if reader == "openai" { &openai } else { &reference }).unwrap();
            let weights = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            if reader == "openai" {
                write("resid_post_mlp/8.pt", &weights);
            } else {
                let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
                for (name, bytes) in [("ae.pt", &weights[..]), ("config.json", b"{\"dict_size\": 10}")] {
                    let name = format!("dictionaries/pythia-70m-deduped/embed/10_32768/{name}");
                    archive.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
                    std::io::Write::write_all(&mut archive, bytes).unwrap();
                }
                let bytes = archive.finish().unwrap().into_inner();
                let repo = root.join("hf/hub/models--saprmarks--pythia-70m-deduped-saes");
                fs::create_dir_all(repo.join("refs")).unwrap();
                fs::write(repo.join("refs/main"), "c0").unwrap();
                let file = repo.join("snapshots/c0/dictionaries_pythia-70m-deduped_10.zip");
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(&file, bytes).unwrap();
                files.push(file);
            }
        }
        "releases" => write("table/pretrained_saes.yaml", b"some-release:\n  repo_id: a/b\n  model: gpt2-small\n  \
            conversion_func: null\n  config_overrides: {dataset_path: c/d}\n  saes:\n  - {id: five, path: e/f, l0: 12.5}\n  \
            - id: six\n    path: 6\n    norm_scaling_factor: 1.5\n"),
        _ => {}
    }
    files
}

/// Every file below a folder, with its length.
fn inventory_of(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(path.clone(), fs::metadata(&path).unwrap().len());
            }
        }
    }
    found
}

/// Serves each file once undamaged, then damaged copies in random order: truncations, bit flips, extreme values, and
/// removed or repeated pieces.
struct Damage {
    files: Vec<(PathBuf, Vec<u8>)>,
    /// Number of files served undamaged.
    whole: usize,
    random: fastrand::Rng,
    /// Index of the file last served.
    current: usize,
}

/// Replacements for values in text.
const NUMBERS: [&str; 12] =
    ["-1", "0", "1", "1e400", "99999999999999999999", "9223372036854775807", "NaN", "null", "\"x\"", "[]", "{}", "1.5"];

impl Damage {
    fn new(files: &[PathBuf]) -> Self {
        let files = files.iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect();
        Damage { files, whole: 0, random: fastrand::Rng::with_seed(7), current: 0 }
    }

    /// A file and its new content.
    fn next(&mut self) -> (PathBuf, Vec<u8>) {
        if let Some(file) = self.files.get(self.whole) {
            (self.current, self.whole) = (self.whole, self.whole + 1);
            return file.clone();
        }
        let random = &mut self.random;
        self.current = random.usize(..self.files.len());
        let (path, whole) = &self.files[self.current];
        let mut bytes = whole.clone();
        let is_text = path.extension().is_some_and(|extension| extension == "json" || extension == "yaml");
        // Headers are the most dangerous part. They are at the start, in archives at the end.
        let place = |random: &mut fastrand::Rng, length: usize| match random.u8(..4) {
            0 => random.usize(..length),
            1 => length - 1 - random.usize(..length.min(600)),
            _ => random.usize(..length.min(1200)),
        };
        for _ in 0..=random.u8(..3) {
            if bytes.is_empty() {
                break;
            }
            let at = place(random, bytes.len());
            match random.u8(..10) {
                0 => bytes.truncate(at),
                1..=3 => bytes[at] ^= 1 << random.u8(..8),
                4 => bytes[at] = random.u8(..),
                5 => {
                    // An eight-byte field with an extreme value.
                    let end = bytes.len().min(at + 8);
                    let value = [u64::MAX, i64::MAX as u64, 1 << 32, 1 << 40, 0][random.usize(..5)].to_le_bytes();
                    bytes[at..end].copy_from_slice(&value[..end - at]);
                }
                6 => {
                    let end = bytes.len().min(at + random.usize(1..64));
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                7 => {
                    let end = bytes.len().min(at + random.usize(1..64));
                    bytes.drain(at..end);
                }
                _ if is_text => replace_a_value(&mut bytes, random),
                _ => replace_a_number(&mut bytes, at, random),
            }
        }
        (path.clone(), bytes)
    }

    /// Restores the undamaged file.
    fn mend(&self) {
        let (path, whole) = &self.files[self.current];
        let beside = path.with_extension("next");
        fs::write(&beside, whole).unwrap();
        fs::rename(&beside, path).unwrap();
    }
}

/// Replaces a value of a JSON or YAML text.
fn replace_a_value(bytes: &mut Vec<u8>, random: &mut fastrand::Rng) {
    let starts: Vec<usize> = (1..bytes.len()).filter(|at| bytes[at - 1] == b':').collect();
    let Some(start) = random.choice(starts) else { return };
    let length = bytes[start..].iter().position(|byte| b",}\n".contains(byte)).unwrap_or(bytes.len() - start);
    let value = random.choice(NUMBERS).unwrap_or_default();
    bytes.splice(start..start + length, format!(" {value}").bytes());
}

/// Replaces the first digits at or after `at`, for example a number in a tensor file's header.
fn replace_a_number(bytes: &mut [u8], at: usize, random: &mut fastrand::Rng) {
    for byte in
        bytes[at..].iter_mut().skip_while(|byte| !byte.is_ascii_digit()).take_while(|byte| byte.is_ascii_digit())
    {
        *byte = b'0' + random.u8(..10);
    }
}
