use std::path::Path;
use dictlearn as _;
use dictlearn_core::{config::SaeConfig, prelude::*, tensors::TensorFile, training::*};
fn run(case: &str, yaml: &str) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/trainers");
    let sae: SaeConfig = serde_yaml::from_str(yaml).unwrap();
    let cx = TrainingCx { widths: (32, 32), steps: 80, seed: 3, device: Device::Cpu, precision: Precision::Float32 };
    let mut t = Training::new(&sae, &cx).unwrap();
    dictlearn_core::saved::load_weights(&mut *t.dictionary, &dir.join(case).join("init.safetensors")).unwrap();
    let x = TensorFile::open(&dir.join("batches.safetensors")).unwrap().tensor("activations").unwrap();
    for step in 0..80 {
        let b = Batch::of(x.narrow(0, step * 64, 64));
        t.step(step as u64, &b, true).unwrap();
    }
    let f = TensorFile::open(&dir.join(case).join("final.safetensors")).unwrap().tensors().unwrap();
    for (n, own) in t.dictionary.state_dict() {
        let d = (&own.to_kind(Kind::Double) - f[n].to_kind(Kind::Double)).norm().double_value(&[]);
        println!("{case} {n} {:e}", d / f[n].to_kind(Kind::Double).norm().double_value(&[]).max(1e-30));
    }
}
#[test]
fn golden() {
    run("standard", "{name: a, dictionary: {type: auto_encoder, dict_size: 96}, trainer: {type: standard, lr: 0.003, l1_penalty: 0.05, warmup_steps: 10, sparsity_warmup_steps: 20}}");
    for (c, e) in [("top_k", ""), ("top_k_anneal", ", k_anneal_steps: 40")] {
    run(c, &format!("{{name: a, dictionary: {{type: top_k, dict_size: 96, k: 6}}, trainer: {{type: top_k, lr: 0.002, auxk_alpha: 0.03125, warmup_steps: 5, threshold_beta: 0.9, threshold_start_step: 20, dead_feature_threshold: 384{e}}}}}"));
    }
}
