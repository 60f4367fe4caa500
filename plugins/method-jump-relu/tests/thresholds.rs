//! Thresholds: where features jump, and what moves the threshold.

use dictlearn_core::prelude::*;
use dictlearn_method_jump_relu::{JumpReluConfig, JumpReluDictionaryConfig, SteOn};

/// A dictionary with one feature, whose pre-activation equals the activation, and threshold 1.
fn one() -> Box<dyn Dictionary> {
    let (device, precision) = (Device::Cpu, Precision::Float32);
    let cx = DictionaryCx { activation_dim: 1, output_dim: 1, parts: &[], device, precision };
    let config = JumpReluDictionaryConfig { dict_size: Some(1), expansion_factor: None };
    let dictionary = config.build(&cx).unwrap();
    for name in ["W_enc", "W_dec", "threshold"] {
        let _ = tch::no_grad(|| parameter(&*dictionary, name).fill_(1.0));
    }
    dictionary
}

fn parameter(dictionary: &dyn Dictionary, name: &str) -> Tensor {
    dictionary.parameters().into_iter().find(|(known, _)| *known == name).unwrap().1
}

/// The threshold's gradient for the activations `x`, with λ = 1, L0* = 2 and ε = 0.5.
fn gradient(ste_on: SteOn, x: &[[f32; 1]]) -> f64 {
    let dictionary = one();
    let config = JumpReluConfig {
        bandwidth: 0.5,
        target_l0: 2.0,
        warmup_steps: 0,
        sparsity_warmup_steps: None,
        ste_on,
        ..JumpReluConfig::default()
    };
    let mut trainer = config.build(&TrainerCx { dictionary: &*dictionary, steps: 10, seed: 0 }).unwrap();
    let batch = Batch::of(Tensor::from_slice2(x));
    let pass = Pass::forward(&*trainer, &*dictionary, &batch, 1, false);
    let mut terms = Terms::new();
    trainer.loss(&pass, &mut terms).unwrap();
    terms.total().unwrap().backward();
    parameter(&*dictionary, "threshold").grad().double_value(&[0])
}

#[test]
fn features_jump_at_the_threshold() {
    let x = Tensor::from_slice2(&[[0.9f32], [1.0], [1.1], [-2.0]]);
    let features = Vec::<f32>::try_from(tch::no_grad(|| one().encode(&x)).reshape([-1])).unwrap();
    assert_eq!(features, [0.0, 0.0, 1.1, 0.0]);
}

#[test]
fn activations_inside_the_window_move_the_threshold_as_in_the_paper() {
    // 0.9 lies below the threshold, inside the window of width 0.5 around 1. The residual is 0.9, so the
    // reconstruction's gradient is −2 · 0.9 · (−1/0.5) = 3.6. L0 is 0, so the penalty's gradient is 2 (0/2 − 1) (1/2) ·
    // (−1/0.5) = 2.
    assert!((gradient(SteOn::PreActivation, &[[0.9]]) - 5.6).abs() < 1e-5);
    assert!((gradient(SteOn::PostJump, &[[0.9]]) - 3.6).abs() < 1e-5);
    // 1.1 lies above and is reconstructed. L0 is 1, so the penalty's gradient is 2 (1/2 − 1) (1/2) · (−1/0.5) = 1
    // either way.
    assert!((gradient(SteOn::PreActivation, &[[1.1]]) - 1.0).abs() < 1e-5);
    assert!((gradient(SteOn::PostJump, &[[1.1]]) - 1.0).abs() < 1e-5);
    // Outside the window there is no gradient.
    assert_eq!(gradient(SteOn::PreActivation, &[[1.3]]), 0.0);
}
