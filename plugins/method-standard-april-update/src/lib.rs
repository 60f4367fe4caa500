//! The autoencoder and training method of Anthropic's April 2024 update: Conerly et al. 2024, *Update on How We Train
//! SAEs*, <https://transformer-circuits.pub/2024/april-update/index.html#training-saes>.
//!
//! Decoder columns have any norm; the penalty weights each feature by its column's norm. With activations x `[d]`,
//! features f `[F]` and a decoder W_d `[d, F]` with columns dᵢ:
//!
//! ```text
//! f  = ReLU(W_e x + b_e)
//! x̂  = W_d f + b_d
//! L  = ‖x − x̂‖² + λ Σᵢ fᵢ ‖dᵢ‖
//! ```
//!
//! The encoder starts as the decoder's transpose, whose columns have norm 0.1. λ warms up; gradients are clipped to
//! norm 1. Nothing is resampled: few features die.
//!
//! In the reference, a forward pass of this autoencoder returns features already multiplied by ‖dᵢ‖, and the trainer
//! multiplies by it again: the penalty is Σᵢ fᵢ ‖dᵢ‖². `norm_weight: reference`, the default, reproduces this on this
//! dictionary; `paper` weights by ‖dᵢ‖ once. On `auto_encoder` both weight once. Gated dictionaries are refused: the
//! penalty applies to the gate, so columns could shrink while magnitudes grow.
//! Where this differs from the reference: the autoencoder has `scale_biases`, so that it can train on normalised
//! activations, and config.json names the trained class (there always `AutoEncoder`).

use dictlearn_core::prelude::*;

const PAPER: &str =
    "Conerly et al. 2024, Update on How We Train SAEs, https://transformer-circuits.pub/2024/april-update";

/// The ReLU autoencoder without a bias on its input.
#[component(dictionary "auto_encoder_new",
    summary = "ReLU of an affine map, decoded by an affine map; no bias is subtracted from the input", paper = PAPER,
    example = "{type: auto_encoder_new, expansion_factor: 8}", fields(width))]
pub struct AutoEncoderNewConfig {}

impl DictionaryConfig for AutoEncoderNewConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        let features = self.features(cx)?;
        Ok(Box::new(AutoEncoderNew { affine: Affine::random(LAYOUT, features, 0.1, cx) }))
    }
}

/// The reference's `AutoEncoderNew`.
#[derive(Debug)]
pub struct AutoEncoderNew {
    affine: Affine,
}

const LAYOUT: Layout = Layout::modules("AutoEncoderNew", "decoder.bias");

inventory::submit! {
    SavedClass {
        class: LAYOUT.class,
        name: AutoEncoderNewConfig::NAME,
        shaped: |saved| Ok(Box::new(AutoEncoderNew { affine: saved.affine(LAYOUT)? })),
    }
}

impl Dictionary for AutoEncoderNew {
    fn affine(&self) -> Option<&Affine> {
        Some(&self.affine)
    }

    /// Penalises fᵢ ‖dᵢ‖, which rescaling columns cannot reduce.
    fn code(&self, pre_activations: Tensor) -> Code {
        let features = pre_activations.relu();
        let weighted = &features * self.affine.decoder().norms();
        Code::new(features).penalize(weighted).with("pre_activations", pre_activations)
    }

    /// Skips the norms, which only a penalty needs.
    fn encode(&self, x: &Tensor) -> Tensor {
        self.affine.pre_activations(x).relu()
    }

    fn fold_norms(&mut self) -> bool {
        self.affine.fold_norms();
        true
    }
}

/// How the norms of the decoder's columns weight the penalty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum NormWeight {
    /// Multiplies the penalised activations, which on `auto_encoder_new` already contain the norm, as in the reference.
    #[default]
    Reference,
    /// Multiplies the features, as in the paper.
    Paper,
}

/// The loss is the squared error of the reconstruction, summed over dimensions, plus l1_penalty times the sum of the
/// features, each weighted by the norm of its decoder column, both averaged over the batch. On auto_encoder_new the
/// weight is the squared norm, as in the reference, unless norm_weight is paper. Columns have any norm; gradients are
/// clipped to norm 1.
#[component(trainer "standard_april_update",
    summary = "Squared error with an L1 penalty weighted by decoder norms, which are not fixed", paper = PAPER,
    example = "{type: standard_april_update, lr: 1e-3, l1_penalty: 0.05, warmup_steps: 20, sparsity_warmup_steps: 40}",
    default_dictionary = AutoEncoderNewConfig::NAME,
    short_run = "{dictionary: {type: auto_encoder_new, expansion_factor: 4}, trainer: {type: standard_april_update, \
        lr: 2e-3, l1_penalty: 0.1, norm_weight: paper, warmup_steps: 100, sparsity_warmup_steps: 300, decay_start: \
        1200}}", measured = "84.1% of the variance explained with L0 31, 99.0% of the cross entropy recovered",
    fields(lr = 1e-3, l1_penalty, schedule, ..))]
pub struct AprilUpdateConfig {
    /// Weight λ of the penalty.
    #[default(1e-1)]
    #[schemars(range(min = 0))]
    pub l1_penalty: f64,
    /// Power of a column's norm in the penalty on `auto_encoder_new`: 2 (`reference`) or 1 (`paper`).
    #[default(NormWeight::Reference)]
    pub norm_weight: NormWeight,
}

impl TrainerConfig for AprilUpdateConfig {
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
        penalizable(cx.dictionary, Self::NAME)?;
        if cx.dictionary.exposes("gate") {
            let why = "its decoder could evade the penalty on the gate by shrinking its columns";
            let or = format!("the dictionary `{}`", AutoEncoderNewConfig::NAME);
            bail!(cannot_train(Self::NAME, cx.dictionary, why, &or));
        }
        let schedule = self.schedule(cx).check()?;
        Ok(Box::new(AprilUpdate { l1_penalty: self.l1_penalty, schedule, norm_weight: self.norm_weight }))
    }

    fn class(&self) -> &'static str {
        "StandardTrainerAprilUpdate"
    }
}

/// The reference's `StandardTrainerAprilUpdate`.
struct AprilUpdate {
    norm_weight: NormWeight,
    l1_penalty: f64,
    schedule: Schedule,
}

impl Trainer for AprilUpdate {
    fn schedule(&self) -> Schedule {
        self.schedule
    }

    fn constraints(&self) -> Constraints {
        Constraints { unit_norm_decoder: false, clip_gradients: Some(1.0) }
    }

    fn objective(&self, step: u64) -> Option<Objective<'_>> {
        let penalty = Penalty::l1(self.l1_penalty * self.schedule.sparsity_factor(step));
        Some(Objective::squared_error(penalty).log_other_error())
    }

    /// fᵢ ‖dᵢ‖, or fᵢ ‖dᵢ‖² ([`NormWeight`]).
    fn penalized(&self, pass: &Pass) -> Result<Tensor> {
        let activations = match self.norm_weight {
            NormWeight::Reference => pass.code.penalized(),
            NormWeight::Paper => &pass.code.features,
        };
        Ok(match pass.dictionary.decoder() {
            Some(decoder) => activations * decoder.norms(),
            None => activations.shallow_clone(),
        })
    }

    /// The norms need a gradient, which is left to autograd.
    fn activation_function<'a>(&self, _: &'a dyn Dictionary) -> Option<Box<dyn ActivationFunction + 'a>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn penalty(norm_weight: NormWeight) -> f64 {
        let dims = Dims { input: 1, features: 1, output: 1 };
        let dictionary = AutoEncoderNew { affine: Affine::zeros(LAYOUT, dims, Device::Cpu, Precision::Float32) };
        dictionary.affine.set_directions(&Tensor::from_slice2(&[[1.0f32]]), &Tensor::from_slice2(&[[-3.0f32]]));
        let config =
            AprilUpdateConfig { norm_weight, warmup_steps: 0, sparsity_warmup_steps: None, ..Default::default() };
        let mut trainer = config.build(&TrainerCx { dictionary: &dictionary, steps: 10, seed: 0 }).unwrap();
        let batch = Batch::of(Tensor::from_slice2(&[[2.0f32]]));
        let pass = Pass::forward(&*trainer, &dictionary, &batch, 0, false);
        let mut terms = Terms::new();
        trainer.loss(&pass, &mut terms).unwrap();
        terms.get_mut("sparsity_loss").unwrap().value.double_value(&[])
    }

    #[test]
    fn the_reference_weights_by_the_squared_norm_and_the_paper_by_the_norm() {
        // f = 2, ‖d‖ = 3.
        assert_eq!(penalty(NormWeight::Reference), 18.0);
        assert_eq!(penalty(NormWeight::Paper), 6.0);
    }
}
