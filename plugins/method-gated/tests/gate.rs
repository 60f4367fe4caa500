//! What the gate hides, and what trains it.

use dictlearn_core::prelude::*;
use dictlearn_method_gated::GatedDictionaryConfig;

/// Returns a gated dictionary with three features for activations of width `activation_dim`.
fn gated(activation_dim: i64) -> Box<dyn Dictionary> {
    let (device, precision) = (Device::Cpu, Precision::Float32);
    let cx = DictionaryCx { activation_dim, output_dim: activation_dim, parts: &[], device, precision };
    GatedDictionaryConfig { dict_size: Some(3), expansion_factor: None }.build(&cx).unwrap()
}

fn parameter(dictionary: &dyn Dictionary, name: &str) -> Tensor {
    dictionary.parameters().into_iter().find(|(known, _)| *known == name).unwrap().1
}

#[test]
fn a_closed_gate_zeroes_its_feature_and_the_penalty_falls_on_the_gate() {
    let dictionary = gated(1);
    let set = |name, values: [f32; 3]| {
        let mut tensor = parameter(&*dictionary, name);
        let values = Tensor::from_slice(&values).view_as(&tensor);
        tch::no_grad(|| tensor.copy_(&values));
    };
    set("encoder.weight", [1.0, 1.0, -1.0]);
    set("gate_bias", [0.5, -3.0, 4.0]);
    set("mag_bias", [1.0, 1.0, 1.0]);
    set("r_mag", [2.0f32.ln(), 0.0, 0.0]);
    // z = 2, 2, −2; π = 2.5, −1, 2; magnitudes 2·2 + 1, 2 + 1, ReLU(−2 + 1).
    let code = tch::no_grad(|| dictionary.forward(&Tensor::from_slice2(&[[2.0f32]])));
    assert_eq!(Vec::<f32>::try_from(code.features.get(0)).unwrap(), [5.0, 0.0, 0.0]);
    assert_eq!(Vec::<f32>::try_from(code.penalized().get(0)).unwrap(), [2.5, 0.0, 2.0]);
}

#[test]
fn the_auxiliary_loss_trains_the_gate_but_not_the_decoder() {
    let dictionary = gated(2);
    let _ = tch::no_grad(|| parameter(&*dictionary, "gate_bias").fill_(5.0));
    let batch = Batch::of(Tensor::from_slice2(&[[1.0f32, -1.0], [0.5, 0.5]]));
    let code = dictionary.forward(&batch.x);
    let (name, loss) = dictionary.auxiliary_loss(&batch, &code).unwrap();
    loss.backward();
    assert_eq!(name, "aux_loss");
    assert!(!parameter(&*dictionary, "decoder.weight").grad().defined());
    assert!(!parameter(&*dictionary, "mag_bias").grad().defined());
    assert!(parameter(&*dictionary, "gate_bias").grad().abs().min().double_value(&[]) > 0.0);
}
