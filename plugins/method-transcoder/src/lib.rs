//! Transcoders: dictionaries that predict a module's output from its input.
//!
//! Dunefsky et al. 2024, *Transcoders Find Interpretable LLM Feature Circuits*, <https://arxiv.org/abs/2406.11944>, with
//! an input x `[d]`, a target y `[d_out]` and features f `[F]`:
//!
//! ```text
//! f = σ(W_e x + b_e)            σ: ReLU, or the k largest of ReLU
//! ŷ = W_d f + b_d
//! ```
//!
//! Paulo et al. 2025, *Transcoders Beat Sparse Autoencoders for Interpretability*, <https://arxiv.org/abs/2501.18823>,
//! add a linear map past the features, which takes over what is linear in the module:
//!
//! ```text
//! ŷ = W_d f + W_skip x + b_d
//! ```
//!
//! The source gives pairs: `io: in_to_out` on a submodule, or `tensor` and `target_tensor`. Any trainer that a dictionary
//! with these activations makes sense with trains them: those with a penalty where there is no `k`, the TopK family's
//! where there is one. On disk they have sae_lens's tensors. Published ones may have a threshold θ for each feature, which
//! is silent below it (Gemma Scope 2); they can be used and trained further, the thresholds as they are.
//!
//! Before training, a transcoder predicts about the mean of the targets, `b_d`; one with a skip connection exactly this,
//! since W_d and W_skip are 0 (section 3 of Paulo et al.). A trainer that keeps the decoder's norm at 1 gives W_d that
//! norm at its first steps.

use std::collections::BTreeMap;

use dictlearn_core::formats::{Activation, Affine, AffineClass};
use dictlearn_core::prelude::*;
use dictlearn_core::sae::Selection;

/// A transcoder.
#[component(
    dictionary,
    name = "transcoder",
    summary = "Predicts a module's output from its input",
    paper = "Dunefsky et al. 2024, Transcoders Find Interpretable LLM Feature Circuits, https://arxiv.org/abs/2406.11944",
    example = "{type: transcoder, expansion_factor: 8}",
    fields(width = "the input's width")
)]
pub struct TranscoderConfig {
    /// How many features each activation keeps; null for all that are positive.
    #[default]
    #[schemars(range(min = 1))]
    pub k: Option<i64>,
}

/// A transcoder with a skip connection.
#[component(
    dictionary,
    name = "skip_transcoder",
    summary = "Predicts a module's output from its input, with a linear map beside the features",
    paper = "Paulo et al. 2025, Transcoders Beat Sparse Autoencoders for Interpretability, \
             https://arxiv.org/abs/2501.18823",
    example = "{type: skip_transcoder, expansion_factor: 8}",
    fields(width = "the input's width")
)]
pub struct SkipTranscoderConfig {
    /// How many features each activation keeps; null for all that are positive.
    #[default]
    #[schemars(range(min = 1))]
    pub k: Option<i64>,
}

impl DictionaryConfig for TranscoderConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        Ok(Box::new(Transcoder::new(self.features(cx)?, self.k, false, cx)?))
    }
}

impl DictionaryConfig for SkipTranscoderConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        Ok(Box::new(Transcoder::new(self.features(cx)?, self.k, true, cx)?))
    }
}

/// A transcoder, with or without a skip connection.
#[derive(Debug)]
pub struct Transcoder {
    w_enc: Tensor,             // W_e    [d, F]
    b_enc: Tensor,             // b_e    [F]
    w_dec: Tensor,             // W_d    [F, d_out]
    b_dec: Tensor,             // b_d    [d_out]
    w_skip: Option<Tensor>,    // W_skip [d_out, d]
    threshold: Option<Tensor>, // θ   [F]
    selection: Option<Selection>,
    precision: Precision,
}

inventory::submit! {
    SavedClass { class: "Transcoder", name: TranscoderConfig::NAME, shaped: |tensors, trainer, device, precision| {
        shaped(tensors, trainer, false, device, precision)
    } }
}

inventory::submit! {
    SavedClass { class: "SkipTranscoder", name: SkipTranscoderConfig::NAME, shaped: |tensors, trainer, device, precision| {
        shaped(tensors, trainer, true, device, precision)
    } }
}

inventory::submit! {
    AffineClass {
        class: "Transcoder",
        subtracts_b_dec: false,
        holds: |sae| !matches!(sae.activation, Activation::Jump(_)) && sae.transcodes && sae.w_skip.is_none(),
        tensors,
    }
}

inventory::submit! {
    AffineClass {
        class: "SkipTranscoder",
        subtracts_b_dec: false,
        holds: |sae| sae.w_skip.is_some(),
        tensors,
    }
}

/// A published transcoder's tensors.
fn tensors(sae: Affine) -> Vec<(&'static str, Tensor)> {
    let mut tensors = sae.activation.tensors();
    tensors.extend([("W_enc", sae.w_enc), ("b_enc", sae.b_enc), ("W_dec", sae.w_dec), ("b_dec", sae.b_dec)]);
    tensors.extend(sae.w_skip.map(|w_skip| ("W_skip", w_skip)));
    tensors
}

fn shaped(
    tensors: &BTreeMap<String, Tensor>,
    trainer: &Value,
    skip: bool,
    device: Device,
    precision: Precision,
) -> Result<Box<dyn Dictionary>> {
    let [input, features] = saved_shape(tensors, "W_enc")?;
    let [output] = saved_shape(tensors, "b_dec")?;
    let k = tensors.contains_key("k").then(|| Selection::saved_k(tensors, trainer, features)).transpose()?;
    let mut dictionary = Transcoder::zeros(Dims { input, features, output }, k, skip, device, precision);
    if k.is_none() && tensors.contains_key("threshold") {
        dictionary.threshold = Some(trained(Tensor::zeros([features], (Kind::Float, device))));
    }
    Ok(Box::new(dictionary))
}

impl Transcoder {
    fn new(features: i64, k: Option<i64>, skip: bool, cx: &DictionaryCx) -> Result<Self> {
        if let Some(k) = k {
            Selection::check(k, features)?;
        }
        let dims = Dims { input: cx.activation_dim, features, output: cx.output_dim };
        let mut dictionary = Transcoder::zeros(dims, k, skip, cx.device, cx.precision);
        tch::no_grad(|| {
            // The mean norm of PyTorch's linear layers, which both papers' code begins with.
            dictionary.w_enc.copy_(&random_directions([dims.input, features], 3f64.sqrt().recip(), cx.device));
            if !skip {
                let directions = random_directions([dims.output, features], 0.1, cx.device);
                dictionary.w_dec.copy_(&directions.transpose(0, 1));
            }
        });
        Ok(dictionary)
    }

    fn zeros(dims: Dims, k: Option<i64>, skip: bool, device: Device, precision: Precision) -> Self {
        let Dims { input, features, output } = dims;
        let zeros = |size: &[i64]| trained(Tensor::zeros(size, (Kind::Float, device)));
        Transcoder {
            w_enc: trained_matrix([input, features], 1, device),
            b_enc: zeros(&[features]),
            w_dec: trained_matrix([features, output], 0, device),
            b_dec: zeros(&[output]),
            w_skip: skip.then(|| zeros(&[output, input])),
            threshold: None,
            selection: k.map(|k| Selection::new(k, false, device)),
            precision,
        }
    }
}

impl Dictionary for Transcoder {
    fn class(&self) -> &'static str {
        match self.w_skip {
            None => "Transcoder",
            Some(_) => "SkipTranscoder",
        }
    }

    fn dims(&self) -> Dims {
        let size = self.w_enc.size();
        Dims { input: size[0], features: size[1], output: self.b_dec.size()[0] }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut parameters = vec![
            ("W_enc", self.w_enc.shallow_clone()),
            ("b_enc", self.b_enc.shallow_clone()),
            ("W_dec", self.w_dec.shallow_clone()),
            ("b_dec", self.b_dec.shallow_clone()),
        ];
        parameters.extend(self.w_skip.as_ref().map(|w_skip| ("W_skip", w_skip.shallow_clone())));
        parameters.extend(self.threshold.as_ref().map(|threshold| ("threshold", threshold.shallow_clone())));
        parameters
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.selection.as_ref().map(Selection::buffers).unwrap_or_default()
    }

    fn loaded(&mut self) {
        if let Some(selection) = &mut self.selection {
            selection.loaded();
        }
    }

    fn encode(&self, x: &Tensor) -> Tensor {
        self.forward(x).features
    }

    fn decode(&self, features: &Tensor) -> Tensor {
        self.precision.linear(features, &self.w_dec.transpose(0, 1), None) + &self.b_dec
    }

    fn reconstruction(&self, features: &Tensor, x: &Tensor) -> Tensor {
        let decoded = self.decode(features);
        match &self.w_skip {
            Some(w_skip) => decoded + self.precision.linear(x, w_skip, None),
            None => decoded,
        }
    }

    fn forward(&self, x: &Tensor) -> Code {
        let pre_activations = self.precision.linear(x, &self.w_enc.transpose(0, 1), Some(&self.b_enc));
        if let Some(selection) = &self.selection {
            return selection.of_each(pre_activations);
        }
        let features = match &self.threshold {
            Some(threshold) => pre_activations.relu() * pre_activations.gt_tensor(threshold),
            None => pre_activations.relu(),
        };
        Code::new(features).with("pre_activations", pre_activations)
    }

    fn decoder(&self) -> Option<Decoder> {
        Some(Decoder { name: "W_dec", weight: self.w_dec.shallow_clone(), feature_dim: 0 })
    }

    fn encoder(&self) -> Option<Encoder> {
        Some(Encoder { weight: "W_enc", feature_dim: 1, biases: &["b_enc"] })
    }

    fn selection(&self) -> Option<&Selection> {
        self.selection.as_ref()
    }

    fn selection_mut(&mut self) -> Option<&mut Selection> {
        self.selection.as_mut()
    }

    fn begin(&mut self, batch: &Batch) {
        let mean = batch.target.mean_dim([0].as_slice(), false, Kind::Float);
        tch::no_grad(|| self.b_dec.copy_(&mean));
    }

    fn fold_norms(&mut self) -> bool {
        if self.selection.is_some() {
            return false;
        }
        if let Some(decoder) = self.decoder() {
            decoder.fold_into(&mut self.w_enc, 1, std::iter::once(&mut self.b_enc).chain(&mut self.threshold));
        }
        true
    }

    /// Not with a skip connection, whose weights such a step does not know.
    fn two_layer(&self) -> Option<TwoLayer> {
        self.w_skip.is_none().then(|| TwoLayer {
            encoder: Weight::matrix("W_enc", &self.w_enc, 1),
            encoder_bias: Some(Weight::vector("b_enc", &self.b_enc)),
            decoder: Weight::matrix("W_dec", &self.w_dec, 0),
            bias: Weight::vector("b_dec", &self.b_dec),
            centred: false,
            precision: self.precision,
        })
    }

    fn activation_function(&self) -> Option<Box<dyn ActivationFunction + '_>> {
        (self.threshold.is_none() && self.selection.is_none()).then(|| Box::new(Relu) as Box<dyn ActivationFunction>)
    }

    fn scale_biases(&mut self, scale: f64) {
        tch::no_grad(|| {
            let _ = self.b_enc.g_mul_scalar_(scale);
            let _ = self.b_dec.g_mul_scalar_(scale);
            if let Some(threshold) = &mut self.threshold {
                let _ = threshold.g_mul_scalar_(scale);
            }
        });
        if let Some(selection) = &mut self.selection {
            selection.scale(scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcoder(skip: bool) -> Transcoder {
        let config = TranscoderConfig { k: Some(3), dict_size: Some(20), expansion_factor: None };
        let (device, precision) = (Device::Cpu, Precision::Float32);
        let cx = DictionaryCx { activation_dim: 8, output_dim: 5, parts: &[], device, precision };
        Transcoder::new(&config, skip, &cx).unwrap()
    }

    #[test]
    fn with_a_skip_connection_it_starts_at_the_mean_of_the_targets() {
        let options = (Kind::Float, Device::Cpu);
        let batch = Batch { x: Tensor::randn([50, 8], options), target: Tensor::randn([50, 5], options) + 2.0 };
        let mut dictionary = transcoder(true);
        dictionary.begin(&batch);
        let (predicted, features) = (&dictionary as &dyn Dictionary).reconstruct(&batch.x);
        let mean = batch.target.mean_dim([0].as_slice(), true, Kind::Float);
        assert!((predicted - mean).abs().max().double_value(&[]) < 1e-6);
        assert_eq!(features.greater(0.0).sum(Kind::Int64).int64_value(&[]), 150);
    }

    #[test]
    fn the_skip_connection_is_added_to_what_features_decode_to() {
        let mut dictionary = transcoder(true);
        let x = Tensor::randn([4, 8], (Kind::Float, Device::Cpu));
        let skip = Tensor::randn([5, 8], (Kind::Float, Device::Cpu));
        tch::no_grad(|| dictionary.w_skip.as_mut().unwrap().copy_(&skip));
        let predicted = (&dictionary as &dyn Dictionary).reconstruct(&x).0;
        assert!((predicted - x.matmul(&skip.transpose(0, 1))).abs().max().double_value(&[]) < 1e-5);
        let without = transcoder(false);
        let features = without.encode(&x);
        assert_eq!(without.reconstruction(&features, &x), without.decode(&features));
    }
}
