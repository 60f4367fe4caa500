//! `example_name`: an autoencoder whose decoder is the encoder's transpose (Cunningham et al. 2023, Sparse Autoencoders
//! Find Highly Interpretable Features in Language Models, <https://arxiv.org/abs/2309.08600>, section 2). Change it
//! into your own.
//!
//! ```text
//! f = ReLU(W x + b)      W [F, d], rows of norm 1
//! x̂ = Wᵀ f
//! L = mean ‖x − x̂‖² + α mean ‖f‖₁
//! ```

use dictlearn_core::prelude::*;

/// One matrix that encodes and decodes.
#[component(dictionary "example_name", summary = "ReLU of an affine map, decoded by its transpose",
    paper = "Cunningham et al. 2023, https://arxiv.org/abs/2309.08600",
    example = "{type: example_name, expansion_factor: 4}", fields(width))]
pub struct ExampleNameConfig {}

impl DictionaryConfig for ExampleNameConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        let features = self.features(cx)?;
        let weight = random_directions([cx.activation_dim, features], 1.0, cx.device).transpose(0, 1);
        let weight = trained(weight.contiguous());
        let bias = trained(Tensor::zeros([features], (Kind::Float, cx.device)));
        Ok(Box::new(ExampleName { weight, bias, precision: cx.precision }))
    }
}

// Lets `eval` and `encode` load a saved dictionary.
inventory::submit! {
    SavedClass {
        class: "ExampleName",
        name: ExampleNameConfig::NAME,
        shaped: |saved| {
            let size @ [features, _] = saved.shape("weight")?;
            let (weight, bias) = (saved.zeros(&size), saved.zeros(&[features]));
            Ok(Box::new(ExampleName { weight, bias, precision: saved.precision }))
        },
    }
}

struct ExampleName {
    weight: Tensor, // W [F, d]
    bias: Tensor,   // b [F]
    precision: Precision,
}

impl Dictionary for ExampleName {
    fn class(&self) -> &'static str {
        "ExampleName"
    }

    fn dims(&self) -> Dims {
        let size = self.weight.size();
        Dims { input: size[1], features: size[0], output: size[1] }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![("weight", self.weight.shallow_clone()), ("bias", self.bias.shallow_clone())]
    }

    fn encode(&self, x: &Tensor) -> Tensor {
        self.precision.linear(x, &self.weight, Some(&self.bias)).relu()
    }

    fn decode(&self, features: &Tensor) -> Tensor {
        self.precision.linear(features, &self.weight.tr(), None)
    }

    fn decoder(&self) -> Option<Weight> {
        Some(Weight { name: "weight", tensor: self.weight.shallow_clone(), feature_dim: 0 })
    }

    fn scale_biases(&mut self, scale: f64) {
        scale_in_place(&self.bias, scale);
    }
}

/// Squared error with an L1 penalty, rows of norm 1.
#[component(trainer "example_name", summary = "Squared error with an L1 penalty for tied autoencoders",
    paper = "Cunningham et al. 2023, https://arxiv.org/abs/2309.08600",
    example = "{type: example_name, lr: 1e-3, l1_penalty: 0.02}", default_dictionary = ExampleNameConfig::NAME,
    fields(lr = 1e-3, ..))]
pub struct ExampleNameTrainer {
    /// Weight α of the L1 penalty.
    #[default(1e-2)]
    #[schemars(range(min = 0))]
    pub l1_penalty: f64,
}

impl TrainerConfig for ExampleNameTrainer {
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
        penalizable(cx.dictionary, Self::NAME)?;
        Ok(Box::new(self.clone()))
    }

    fn class(&self) -> &'static str {
        "ExampleNameTrainer"
    }
}

impl Trainer for ExampleNameTrainer {
    fn schedule(&self) -> Schedule {
        Schedule::constant(self.lr)
    }

    fn constraints(&self) -> Constraints {
        Constraints { unit_norm_decoder: true, clip_gradients: None }
    }

    fn objective(&self, _step: u64) -> Option<Objective<'_>> {
        Some(Objective::squared_error(Penalty::l1(self.l1_penalty)))
    }
}
