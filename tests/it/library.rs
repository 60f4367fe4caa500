//! The library, used without the command line.

use dictlearn::plugins::method_top_k::{TopKConfig, TopKDictionaryConfig};
use dictlearn::{Batches, Error, Run, Sae, Trainer, evaluate, import};
use dictlearn_core::files::tensors::TensorFile;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

const SOURCE: &str =
    "{type: synthetic, activation_dim: 16, n_features: 32, n_active: 4, batch_size: 64, seed: 3, features_seed: 4}";

fn dictionary() -> TopKDictionaryConfig {
    TopKDictionaryConfig { k: 4, dict_size: Some(32), expansion_factor: None }
}

fn x() -> Tensor {
    Tensor::arange(5 * 16, (Kind::Float, Device::Cpu)).view([5, 16]).sin()
}

/// The message of an [`Error::Input`], which the caller can fix.
fn refused<T>(result: dictlearn::Result<T>) -> String {
    match result {
        Err(Error::Input(error)) => error.message().to_owned(),
        Err(other) => panic!("not an input error: {other:?}"),
        Ok(_) => panic!("the input was accepted"),
    }
}

#[test]
fn a_trainer_in_code_matches_a_config() {
    let dir = TempDir::new().unwrap();
    let config = dir.path().join("config.yaml");
    let yaml = format!(
        "{{seed: 5, steps: 30, device: cpu, precision: float32, source: {SOURCE}, metrics: [{{type: reconstruction}}], \
         saes: [{{dictionary: {{type: top_k, k: 4, dict_size: 32}}, trainer: {{type: top_k}}}}]}}"
    );
    std::fs::write(&config, yaml).unwrap();
    let outcome = Run::from_yaml(&config).unwrap().output_dir(dir.path().join("run")).train().unwrap();
    assert_eq!(outcome.saes.len(), 1);
    assert!(outcome.saes[0].figures["frac_variance_explained"].as_f64().unwrap() > 0.1);
    let measured = evaluate(&[&outcome.saes[0].dir], None).unwrap();
    assert!(measured[0]["l0"].as_f64().unwrap() <= 4.0);

    let builder = Trainer::builder(dictionary(), TopKConfig::default()).steps(30).seed(5);
    let mut trainer = builder.device(dictlearn_core::machine::device::DeviceChoice::Cpu).build(16).unwrap();
    for batch in Batches::from_yaml(SOURCE).unwrap().take(30) {
        trainer.step(&batch.unwrap().sites[0].x).unwrap();
    }
    assert_eq!(trainer.steps_taken(), 30);
    let saved = dir.path().join("sae");
    trainer.save(&saved).unwrap();
    let weights = |dir: &std::path::Path| TensorFile::open(&dir.join("ae.safetensors")).unwrap();
    let (own, theirs) = (weights(&saved), weights(&outcome.saes[0].dir));
    assert!(own.names().len() >= 4);
    for name in own.names() {
        assert_eq!(own.tensor(&name).unwrap(), theirs.tensor(&name).unwrap(), "{name}");
    }
}

#[test]
fn an_sae_encodes_without_a_graph_and_checks_shapes() {
    let dir = TempDir::new().unwrap();
    let mut trainer = Trainer::builder(dictionary(), TopKConfig::default()).steps(5).build(16).unwrap();
    let stats = trainer.step_with_stats(&x()).unwrap();
    assert!(stats.loss() > 0.0 && stats.l0() <= 4.0 && stats.step == 1, "{stats:?}");
    let sae = trainer.finish().unwrap();
    sae.save(dir.path().join("sae")).unwrap();
    let read = Sae::load(dir.path().join("sae")).unwrap();
    let features = read.encode(&x().set_requires_grad(true)).unwrap();
    assert!(!features.requires_grad());
    assert_eq!(features, sae.encode(&x()).unwrap());
    assert_eq!(read.reconstruct(&x()).unwrap(), read.decode(&features).unwrap());
    assert_eq!(read.directions().unwrap().size(), [32, 16]);
    let again =
        Trainer::builder(dictionary(), TopKConfig::default()).init_from(dir.path().join("sae")).build(16).unwrap();
    assert_eq!(again.finish().unwrap().encode(&x()).unwrap(), features);
    assert_eq!(read.config()["trainer"]["dict_class"], "AutoEncoderTopK");
    let message = refused(read.encode(&Tensor::zeros([2, 15], (Kind::Float, Device::Cpu))));
    assert_eq!(message, "activations have shape [2, 15] and type Float; this SAE takes floats [.., 16]");
    assert!(refused(read.decode(&x())).starts_with("features have shape [5, 16]"));
    assert!(refused(read.encode(&Tensor::zeros([2, 16], (Kind::Int64, Device::Cpu)))).contains("Int64"));

    let out = dir.path().join("lens");
    read.export("sae_lens", &out).unwrap();
    let place = format!("sae_lens:{}", out.display());
    let published = Sae::load(&place).unwrap();
    assert!(
        (published.reconstruct(&x()).unwrap() - read.reconstruct(&x()).unwrap()).abs().max().double_value(&[]) < 1e-5
    );
    let folders = import("sae_lens", &out.to_string_lossy(), dir.path().join("back")).unwrap();
    assert_eq!(folders, [dir.path().join("back")]);
    assert_eq!(Sae::load(&folders[0]).unwrap().class(), published.class());
}

#[test]
fn input_errors_and_divergence_are_distinguished() {
    let place = refused(Sae::load("no/such/folder"));
    assert_eq!(place, "`no/such/folder` is neither a folder nor `FORMAT:NAME`");
    let dir = TempDir::new().unwrap();
    let config = dir.path().join("config.yaml");
    std::fs::write(&config, "steps: 10\nsteeps: 3\n").unwrap();
    let Err(Error::Input(error)) = Run::from_yaml(&config) else { panic!("the wrong config was accepted") };
    assert!(error.to_string().contains("config.yaml:2:1"), "{error}");

    let mut trainer = Trainer::builder(dictionary(), TopKConfig::default()).steps(5).build(16).unwrap();
    assert!(refused(trainer.step(&Tensor::zeros([4, 8], (Kind::Float, Device::Cpu)))).contains("[B, 16]"));
    let before = trainer.stats().is_none();
    assert!(before);
    match trainer.step(&(x() * f64::NAN)) {
        Err(Error::Diverged(_)) => {}
        other => panic!("a batch of NaN must diverge: {other:?}"),
    }
    trainer.step(&x()).unwrap();
    let source = "{type: synthetic, activation_dim: 16, n_features: 32, batch_size: 64}";
    let sae = "{trainer: {type: standard, lr: 1e38, warmup_steps: 0}, dictionary: {dict_size: 32}}";
    std::fs::write(&config, format!("steps: 20\nsource: {source}\nsaes: [{sae}]\n")).unwrap();
    match Run::from_yaml(&config).unwrap().output_dir(dir.path().join("run")).train() {
        Err(Error::Diverged(_)) => {}
        other => panic!("a run whose weights are infinite: {other:?}"),
    }
    let k = TopKDictionaryConfig { k: 33, dict_size: Some(32), expansion_factor: None };
    assert!(refused(Trainer::builder(k, TopKConfig::default()).build(16)).contains("`k` is 33"));
    for k in [0, -3] {
        let k = TopKDictionaryConfig { k, dict_size: Some(32), expansion_factor: None };
        let said = refused(Trainer::builder(k, TopKConfig::default()).build(16));
        assert!(said.contains("dictionary.k"), "{said}");
    }
    let rate = TopKConfig { lr: Some(-1.0), ..Default::default() };
    assert!(refused(Trainer::builder(dictionary(), rate).build(16)).contains("`trainer.lr`"));
    assert!(refused(Trainer::builder(dictionary(), TopKConfig::default()).build(0)).contains("width 0"));
    let whole = Tensor::zeros([4, 16], (Kind::Int64, Device::Cpu));
    let mut trainer = Trainer::builder(dictionary(), TopKConfig::default()).steps(5).build(16).unwrap();
    assert!(refused(trainer.step(&whole)).contains("Int64"));
}
