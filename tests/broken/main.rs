//! The contract catches components that break a promise, and says which. They are registered here, so these tests have a
//! process of their own.

use std::marker::PhantomData;
use std::panic::catch_unwind;

use dictlearn as _;
use dictlearn::contract::keep;
use dictlearn_core::prelude::*;
use dictlearn_core::registry::Kind as Slot;

/// The message with which the contract refuses a component.
fn refusal(kind: Slot, name: &'static str) -> String {
    let panic = catch_unwind(|| keep(kind, name)).expect_err("the contract accepts it");
    panic.downcast_ref::<String>().expect("a message").clone()
}

fn says(kind: Slot, name: &'static str, parts: &[&str]) {
    let said = refusal(kind, name);
    let start = format!("{kind} `{name}`");
    assert!(said.starts_with(&start), "{said}");
    for part in ["breaks the contract\n  promise: ", "\n  found: ", "\n  remedy: "].iter().chain(parts) {
        assert!(said.contains(part), "no {part:?} in: {said}");
    }
}

/// A dictionary that keeps the k features of greatest magnitude, but for its fault.
trait Fault: Sized + Send + 'static {
    const NAME: &'static str;

    fn code(selection: &Selection, pre_activations: Tensor) -> Code {
        let code = selected(selection, pre_activations);
        let magnitudes = code.features.abs();
        code.penalize(magnitudes)
    }
    fn encode(dictionary: &dyn Dictionary, x: &Tensor) -> Tensor {
        dictionary.encode(x)
    }
    fn loaded(dictionary: &mut dyn Dictionary) {
        dictionary.loaded();
    }
    fn scale_biases(dictionary: &mut dyn Dictionary, scale: f64) {
        dictionary.scale_biases(scale);
    }
}

fn selected(selection: &Selection, pre_activations: Tensor) -> Code {
    let scores = pre_activations.abs();
    selection.by_score(pre_activations, &scores)
}

struct Inner<F> {
    affine: Affine,
    selection: Selection,
    fault: PhantomData<F>,
}

impl<F: Fault> Inner<F> {
    const LAYOUT: Layout = Layout::modules(F::NAME, "b_dec").centred();
}

impl<F: Fault> Dictionary for Inner<F> {
    fn affine(&self) -> Option<&Affine> {
        Some(&self.affine)
    }
    fn code(&self, pre_activations: Tensor) -> Code {
        F::code(&self.selection, pre_activations)
    }
    fn selection(&self) -> Option<&Selection> {
        Some(&self.selection)
    }
}

struct Broken<F> {
    inner: Box<dyn Dictionary>,
    fault: PhantomData<F>,
}

impl<F: Fault> Broken<F> {
    const SAVED: SavedClass = SavedClass {
        class: F::NAME,
        name: F::NAME,
        shaped: |saved| {
            let affine = saved.affine(Inner::<F>::LAYOUT)?;
            let selection = Selection::saved(saved, affine.dims().features, false)?;
            Ok(Box::new(Broken::<F>::new(affine, selection)))
        },
    };

    fn new(affine: Affine, selection: Selection) -> Self {
        Broken { inner: Box::new(Inner::<F> { affine, selection, fault: PhantomData }), fault: PhantomData }
    }

    fn build(cx: &DictionaryCx) -> Box<dyn Dictionary> {
        let affine = Affine::random(Inner::<F>::LAYOUT, 128, 1.0, cx);
        Box::new(Broken::<F>::new(affine, Selection::new(8, false, cx.device)))
    }
}

impl<F: Fault> Dictionary for Broken<F> {
    fn class(&self) -> &'static str {
        F::NAME
    }
    fn dims(&self) -> Dims {
        self.inner.dims()
    }
    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        self.inner.parameters()
    }
    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.inner.buffers()
    }
    fn encode(&self, x: &Tensor) -> Tensor {
        F::encode(&*self.inner, x)
    }
    fn decode(&self, features: &Tensor) -> Tensor {
        self.inner.decode(features)
    }
    fn forward(&self, x: &Tensor) -> Code {
        self.inner.forward(x)
    }
    fn decoder(&self) -> Option<Weight> {
        self.inner.decoder()
    }
    fn encoder(&self) -> Option<Encoder> {
        self.inner.encoder()
    }
    fn selection(&self) -> Option<&Selection> {
        self.inner.selection()
    }
    fn loaded(&mut self) {
        F::loaded(&mut *self.inner);
    }
    fn scale_biases(&mut self, scale: f64) {
        F::scale_biases(&mut *self.inner, scale);
    }
}

macro_rules! dictionary {
    ($module:ident, $name:literal, { $($method:item)* }) => {
        mod $module {
            use super::*;

            /// A dictionary with a fault.
            #[component(
                dictionary,
                name = $name,
                summary = "A dictionary with a fault",
                example = concat!("{type: ", $name, "}"),
            )]
            pub struct Config {}

            pub struct ThisFault;

            impl Fault for ThisFault {
                const NAME: &'static str = $name;
                $($method)*
            }

            impl DictionaryConfig for Config {
                fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
                    Ok(Broken::<ThisFault>::build(cx))
                }
            }

            inventory::submit! { Broken::<ThisFault>::SAVED }
        }
    };
}

dictionary!(faultless, "faultless", {});

dictionary!(no_post_relu, "no_post_relu", {
    fn code(selection: &Selection, pre_activations: Tensor) -> Code {
        let code = selected(selection, pre_activations);
        let values = code.extra("top_values").unwrap().shallow_clone();
        let magnitudes = code.features.abs();
        Code::new(code.features).penalize(magnitudes).with("top_values", values)
    }
});

dictionary!(narrow_post_relu, "narrow_post_relu", {
    fn code(selection: &Selection, pre_activations: Tensor) -> Code {
        let code = selected(selection, pre_activations);
        let values = code.extra("top_values").unwrap().shallow_clone();
        let magnitudes = code.features.abs();
        Code::new(code.features)
            .penalize(magnitudes)
            .with("post_relu", values.shallow_clone())
            .with("top_values", values)
    }
});

dictionary!(negative_penalty, "negative_penalty", {
    fn code(selection: &Selection, pre_activations: Tensor) -> Code {
        selected(selection, pre_activations)
    }
});

dictionary!(unscaled_bias, "unscaled_bias", {
    fn scale_biases(dictionary: &mut dyn Dictionary, scale: f64) {
        for (name, mut parameter) in dictionary.parameters() {
            if name == "encoder.bias" {
                let _ = tch::no_grad(|| parameter.g_mul_scalar_(scale));
            }
        }
    }
});

dictionary!(stale_k, "stale_k", {
    fn loaded(_: &mut dyn Dictionary) {}
});

dictionary!(two_dimensions_only, "two_dimensions_only", {
    fn encode(dictionary: &dyn Dictionary, x: &Tensor) -> Tensor {
        let [rows, width] = x.size()[..] else { panic!("not enough values to unpack: {:?}", x.size()) };
        dictionary.encode(&x.view([rows, width]))
    }
});

#[test]
fn a_dictionary_without_a_fault_is_accepted() {
    keep(Slot::Dictionary, "faultless");
}

#[test]
fn a_selection_without_post_relu_is_named() {
    says(Slot::Dictionary, "no_post_relu", &["a code without `post_relu`", "Selection::of_each"]);
}

#[test]
fn a_post_relu_of_another_shape_is_named() {
    says(Slot::Dictionary, "narrow_post_relu", &["the shape of `post_relu` is [50, 8], not [50, 128]"]);
}

#[test]
fn negative_penalized_activations_are_named() {
    says(
        Slot::Dictionary,
        "negative_penalty",
        &["never negative", "the smallest is -", "code.penalize(features.abs())"],
    );
}

#[test]
fn scale_biases_that_leaves_a_bias_is_named_with_the_bias() {
    let parts = ["scale_biases(s)", "`b_dec` was left as it was", "`encoder.bias` was scaled", "thresholds"];
    says(Slot::Dictionary, "unscaled_bias", &parts);
}

#[test]
fn a_k_that_is_not_loaded_is_named() {
    says(Slot::Dictionary, "stale_k", &["k can be changed while training, and is saved", "Selection::loaded"]);
}

#[test]
fn a_panic_of_the_component_is_named_with_the_promise() {
    let parts = ["[B, L, d] is read as [B, d]", "it panicked: not enough values to unpack: [5, 10, 32]"];
    says(Slot::Dictionary, "two_dimensions_only", &parts);
}

/// A trainer with one of two faults.
macro_rules! trainer {
    ($module:ident, $name:literal, $sparsity:literal, $steps:expr_2021) => {
        mod $module {
            use super::*;

            const EXAMPLE: &str = concat!("{type: ", $name, "}");

            /// A trainer with a fault.
            #[component(trainer, name = $name, summary = "Faulty", example = EXAMPLE, usual_dictionary = "auto_encoder")]
            pub struct Config {
                /// How many steps were taken.
                #[serde(skip)]
                steps: u64,
            }

            impl TrainerConfig for Config {
                fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
                    penalizable(cx.dictionary, $name)?;
                    Ok(Box::new(self.clone()))
                }
                fn class(&self) -> &'static str {
                    "FaultyTrainer"
                }
            }

            impl Trainer for Config {
                fn schedule(&self) -> Schedule {
                    Schedule::constant(1e-3)
                }
                fn has_sparsity_term(&self) -> bool {
                    $sparsity
                }
                fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
                    terms.add_reconstruction("mse_loss", mean_of_sums(&pass.residual().square()));
                    let weight: fn(&Config) -> f64 = $steps;
                    terms.add_sparsity("sparsity_loss", mean_of_sums(pass.code.penalized()), weight(self));
                    Ok(())
                }
                fn after_step(&mut self, _: &mut AfterStep) -> Result<()> {
                    self.steps += 1;
                    Ok(())
                }
            }
        }
    };
}

trainer!(forgetful, "forgetful", true, |config| 1e-4 * config.steps as f64);
trainer!(undeclared, "undeclared", false, |_| 1e-3);

#[test]
fn a_trainer_that_does_not_save_its_count_is_named() {
    says(
        Slot::Trainer,
        "forgetful",
        &["a resumed run ends on the same weights", "weights that differ: ", "in `state`"],
    );
}

#[test]
fn a_sparsity_term_that_is_not_declared_is_named() {
    says(Slot::Trainer, "undeclared", &["`has_sparsity_term` is false, and the loss has a term of sparsity"]);
}
