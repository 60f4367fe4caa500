//! The BatchTopK autoencoder: Bussmann, Leask and Nanda 2024, *BatchTopK Sparse Autoencoders*,
//! <https://arxiv.org/abs/2412.06410>.
//!
//! Activations share their features: of a batch of B the B·k largest are kept, so that a hard one may have more than an
//! easy one. With activations x `[d]`, features f `[F]` and a decoder W_d `[d, F]` whose columns have norm 1:
//!
//! ```text
//! F  = BatchTopK(ReLU(W_e (X − b) + b_e))          in training, over the batch X
//! f  = z ⊙ 1[z > θ],  z = ReLU(W_e (x − b) + b_e)    afterwards
//! θ  = mean over batches of the smallest feature that is kept
//! x̂  = W_d f + b
//! L  = ‖x − x̂‖² + α ‖e − ê‖² / Var(e),   e = x − x̂
//! ```
//!
//! ê is the best that dead features make of e, as in TopK; that, the geometric median where b starts, the threshold's
//! mean and the annealing of k are in [`dictlearn_core::train::top_k`].
//!
//! Until the threshold is known, after `threshold_start_step`, it is −1 and every positive feature passes, as in the
//! reference. Where this differs from it: a batch without any positive feature leaves the threshold as it is (there it
//! counts as 0); activations in three dimensions have k features each.

use dictlearn_core::prelude::*;
use dictlearn_core::sae::Selection;
use dictlearn_core::train::top_k::TopKTrainer;

/// The BatchTopK autoencoder.
#[component(
    dictionary,
    name = "batch_top_k",
    summary = "Keeps the k largest features of each activation on average over the batch",
    paper = "Bussmann et al. 2024, BatchTopK Sparse Autoencoders, https://arxiv.org/abs/2412.06410",
    example = "{type: batch_top_k, expansion_factor: 8, k: 8}",
    fields(width)
)]
pub struct BatchTopKDictionaryConfig {
    /// How many features activations keep, on average over a batch.
    #[schemars(range(min = 1))]
    pub k: i64,
}

impl DictionaryConfig for BatchTopKDictionaryConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        let features = self.features(cx)?;
        Selection::check(self.k, features)?;
        let mut dictionary = BatchTopK::zeros(cx.activation_dim, features, self.k, cx.device, cx.precision);
        // Random unit directions, the encoder the decoder's transpose.
        let directions = random_directions([cx.activation_dim, features], 1.0, cx.device);
        tch::no_grad(|| {
            dictionary.encoder_weight.copy_(&directions.transpose(0, 1));
            dictionary.decoder_weight.copy_(&directions);
        });
        Ok(Box::new(dictionary))
    }
}

/// The reference's `BatchTopKSAE`.
#[derive(Debug)]
pub struct BatchTopK {
    b_dec: Tensor,          // b   [d]
    encoder_weight: Tensor, // W_e [F, d]
    encoder_bias: Tensor,   // b_e [F]
    decoder_weight: Tensor, // W_d [d, F]
    selection: Selection,   // k, θ
    precision: Precision,
}

inventory::submit! {
    SavedClass {
        class: "BatchTopKSAE",
        name: BatchTopKDictionaryConfig::NAME,
        shaped: |tensors, trainer, device, precision| {
            let [features, d] = saved_shape(tensors, "encoder.weight")?;
            let k = Selection::saved_k(tensors, trainer, features)?;
            Ok(Box::new(BatchTopK::zeros(d, features, k, device, precision)))
        },
    }
}

impl BatchTopK {
    fn zeros(d: i64, features: i64, k: i64, device: Device, precision: Precision) -> Self {
        let zeros = |size: &[i64]| trained(Tensor::zeros(size, (Kind::Float, device)));
        BatchTopK {
            b_dec: zeros(&[d]),
            encoder_weight: trained_matrix([features, d], 0, device),
            encoder_bias: zeros(&[features]),
            decoder_weight: trained_matrix([d, features], 1, device),
            selection: Selection::new(k, true, device),
            precision,
        }
    }

    /// W_e (x − b) + b_e, [.., F].
    fn pre_activations(&self, x: &Tensor) -> Tensor {
        self.precision.linear(&(x - &self.b_dec), &self.encoder_weight, Some(&self.encoder_bias))
    }
}

impl Dictionary for BatchTopK {
    fn class(&self) -> &'static str {
        "BatchTopKSAE"
    }

    fn dims(&self) -> Dims {
        let size = self.encoder_weight.size();
        Dims { input: size[1], features: size[0], output: size[1] }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![
            ("b_dec", self.b_dec.shallow_clone()),
            ("encoder.weight", self.encoder_weight.shallow_clone()),
            ("encoder.bias", self.encoder_bias.shallow_clone()),
            ("decoder.weight", self.decoder_weight.shallow_clone()),
        ]
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.selection.buffers()
    }

    fn loaded(&mut self) {
        self.selection.loaded();
    }

    /// By the threshold: an activation's features do not depend on its batch.
    fn encode(&self, x: &Tensor) -> Tensor {
        self.selection.above_threshold(&self.pre_activations(x))
    }

    fn decode(&self, features: &Tensor) -> Tensor {
        self.precision.linear(features, &self.decoder_weight, None) + &self.b_dec
    }

    fn forward(&self, x: &Tensor) -> Code {
        self.selection.of_batch(self.pre_activations(x))
    }

    fn decoder(&self) -> Option<Decoder> {
        Some(Decoder { name: "decoder.weight", weight: self.decoder_weight.shallow_clone(), feature_dim: 1 })
    }

    fn encoder(&self) -> Option<Encoder> {
        Some(Encoder { weight: "encoder.weight", feature_dim: 0, biases: &["encoder.bias"] })
    }

    fn selection(&self) -> Option<&Selection> {
        Some(&self.selection)
    }

    fn selection_mut(&mut self) -> Option<&mut Selection> {
        Some(&mut self.selection)
    }

    fn two_layer(&self) -> Option<TwoLayer> {
        Some(TwoLayer {
            encoder: Weight::matrix("encoder.weight", &self.encoder_weight, 0),
            encoder_bias: Some(Weight::vector("encoder.bias", &self.encoder_bias)),
            decoder: Weight::matrix("decoder.weight", &self.decoder_weight, 1),
            bias: Weight::vector("b_dec", &self.b_dec),
            centred: true,
            precision: self.precision,
        })
    }

    fn scale_biases(&mut self, scale: f64) {
        tch::no_grad(|| {
            let _ = self.b_dec.g_mul_scalar_(scale);
            let _ = self.encoder_bias.g_mul_scalar_(scale);
        });
        self.selection.scale(scale);
    }
}

/// The loss is the squared error of the reconstruction from the B·k largest features of a batch of B activations,
/// summed over dimensions and averaged over the batch. Selecting is all the sparsity there is: no penalty. Features
/// that nothing selected for long are revived by an auxiliary loss, weighted by auxk_alpha: the squared error of
/// what the best of them make of the error that is left, divided by that error's variance. A running mean of the
/// smallest feature that is kept becomes the threshold by which the trained dictionary encodes.
#[component(
    trainer,
    name = "batch_top_k",
    summary = "Squared error of a batch's largest features, with an auxiliary loss for dead ones",
    paper = "Bussmann et al. 2024, BatchTopK Sparse Autoencoders, https://arxiv.org/abs/2412.06410",
    example = "{type: batch_top_k, lr: 1e-3, warmup_steps: 20, threshold_start_step: 20}",
    usual_dictionary = BatchTopKDictionaryConfig::NAME,
    short_run = "{dictionary: {type: batch_top_k, expansion_factor: 4, k: 32}, trainer: {type: batch_top_k, lr: 2e-3, \
           warmup_steps: 100, decay_start: 1200, dead_feature_threshold: 200_000, threshold_start_step: 300, \
           threshold_beta: 0.99}}",
    measured = "89.7% of the variance explained with L0 33, 99.6% of the cross entropy recovered",
    fields(top_k),
)]
pub struct BatchTopKConfig {}

impl TrainerConfig for BatchTopKConfig {
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
        Ok(Box::new(TopKTrainer::new(Self::NAME, self.settings(), cx)?))
    }

    fn class(&self) -> &'static str {
        "BatchTopKTrainer"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Features are activations, but for their sign.
    fn identity(k: i64) -> BatchTopK {
        let mut dictionary = BatchTopK::zeros(3, 3, k, Device::Cpu, Precision::Float32);
        tch::no_grad(|| {
            dictionary.encoder_weight.copy_(&Tensor::eye(3, (Kind::Float, Device::Cpu)));
            dictionary.decoder_weight.copy_(&Tensor::eye(3, (Kind::Float, Device::Cpu)));
        });
        dictionary
    }

    #[test]
    fn a_batch_shares_its_features() {
        let x = Tensor::from_slice2(&[[5.0f32, 4.0, 3.0], [1.0, -9.0, 2.0]]);
        let code = tch::no_grad(|| identity(2).forward(&x));
        assert_eq!(code.features, Tensor::from_slice2(&[[5.0f32, 4.0, 3.0], [0.0, 0.0, 2.0]]));
    }

    #[test]
    fn a_trained_one_goes_by_the_threshold_alone() {
        let mut dictionary = identity(1);
        let x = Tensor::from_slice2(&[[5.0f32, 4.0, -3.0], [1.0, -9.0, 2.0]]);
        // Not known yet: every positive feature.
        assert_eq!(tch::no_grad(|| dictionary.encode(&x)), x.relu());
        let _ = dictionary.selection.threshold().shallow_clone().fill_(2.0);
        let expected = Tensor::from_slice2(&[[5.0f32, 4.0, 0.0], [0.0, 0.0, 0.0]]);
        assert_eq!(tch::no_grad(|| dictionary.encode(&x)), expected);
        // And so for activations times 3, when it was scaled.
        dictionary.scale_biases(3.0);
        assert_eq!(tch::no_grad(|| dictionary.encode(&(x * 3.0))), expected * 3.0);
    }
}
