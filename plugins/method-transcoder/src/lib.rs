//! Transcoders: dictionaries that predict a module's output from its input.
//!
//! Dunefsky et al. 2024, *Transcoders Find Interpretable LLM Feature Circuits*, <https://arxiv.org/abs/2406.11944>,
//! with input x `[d]`, target y `[d_out]` and features f `[F]`:
//!
//! ```text
//! f = σ(W_e x + b_e)            σ: ReLU, or the k largest of ReLU
//! ŷ = W_d f + b_d
//! ```
//!
//! Paulo et al. 2025, *Transcoders Beat Sparse Autoencoders for Interpretability*, <https://arxiv.org/abs/2501.18823>,
//! add a linear skip connection, which models the linear part of the module:
//!
//! ```text
//! ŷ = W_d f + W_skip x + b_d
//! ```
//!
//! The source provides pairs: `io: in_to_out` on a submodule, or `tensor` and `target_tensor`. Without `k`, any trainer
//! with a sparsity penalty can train a transcoder; with `k`, the trainers of the TopK family can. On disk they have
//! sae_lens's tensors. Published ones may have a threshold θ for each feature, below which it is 0 (Gemma Scope 2).
//! They can be used and trained further; training leaves their thresholds unchanged.
//!
//! Before training, a transcoder predicts roughly the targets' mean, `b_d`. With a skip connection it predicts exactly
//! the mean, since W_d and W_skip are 0 (section 3 of Paulo et al.). A trainer that keeps decoder norms at 1 gives W_d
//! that norm in its first steps.

use dictlearn_core::formats::{PublishedClass, SaeActivation};
use dictlearn_core::prelude::*;

/// Defines the two architectures' configs, which have the same fields.
macro_rules! config {
    ($(#[$about:meta])* $name:ident, skip: $skip:expr) => {
        $(#[$about])*
        pub struct $name {
            /// Number of features kept per activation; null for every positive one.
            #[default]
            #[schemars(range(min = 1))]
            pub k: Option<i64>,
        }

        impl DictionaryConfig for $name {
            fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
                Ok(Box::new(Transcoder::new(self.features(cx)?, self.k, $skip, cx)?))
            }
        }
    };
}

config! {
    /// A transcoder.
    #[component(dictionary "transcoder", summary = "Predicts a module's output from its input",
        paper = "Dunefsky et al. 2024, Transcoders Find Interpretable LLM Feature Circuits, \
            https://arxiv.org/abs/2406.11944", example = "{type: transcoder, expansion_factor: 8}",
        fields(width = "the input's width"))]
    TranscoderConfig, skip: false
}

config! {
    /// A transcoder with a skip connection.
    #[component(dictionary "skip_transcoder",
        summary = "Predicts a module's output from its input, with a linear skip connection",
        paper = "Paulo et al. 2025, Transcoders Beat Sparse Autoencoders for Interpretability, \
            https://arxiv.org/abs/2501.18823", example = "{type: skip_transcoder, expansion_factor: 8}",
        fields(width = "the input's width"))]
    SkipTranscoderConfig, skip: true
}

/// A transcoder, with or without a skip connection.
#[derive(Debug)]
pub struct Transcoder {
    affine: Affine,
    w_skip: Option<Tensor>,    // W_skip [d_out, d]
    threshold: Option<Tensor>, // θ   [F]
    selection: Option<Selection>,
}

const LAYOUT: Layout = Layout::matrices("Transcoder");
const SKIP_LAYOUT: Layout = Layout::matrices("SkipTranscoder");

inventory::submit! {
    SavedClass { class: LAYOUT.class, name: TranscoderConfig::NAME, shaped: |saved| shaped(saved, false) }
}
inventory::submit! {
    SavedClass { class: SKIP_LAYOUT.class, name: SkipTranscoderConfig::NAME, shaped: |saved| shaped(saved, true) }
}

inventory::submit! {
    PublishedClass {
        layout: LAYOUT,
        holds: |sae| matches!(sae.activation, SaeActivation::Relu | SaeActivation::TopK(_)) && sae.transcodes && sae.w_skip.is_none(),
    }
}
inventory::submit! {
    PublishedClass {
        layout: SKIP_LAYOUT,
        holds: |sae| sae.w_skip.is_some() && !matches!(sae.activation, SaeActivation::AbsTopK(_)),
    }
}

fn shaped(saved: &SavedTensors, skip: bool) -> Result<Box<dyn Dictionary>> {
    let affine = saved.affine(if skip { SKIP_LAYOUT } else { LAYOUT })?;
    let Dims { input, features, output } = affine.dims();
    let has = |name: &str| saved.tensors.contains_key(name);
    let selection = has("k").then(|| Selection::saved(saved, features, false)).transpose()?;
    let threshold = (!has("k") && has("threshold")).then(|| saved.zeros(&[features]));
    Ok(Box::new(Transcoder { affine, w_skip: skip.then(|| saved.zeros(&[output, input])), threshold, selection }))
}

impl Transcoder {
    fn new(features: i64, k: Option<i64>, skip: bool, cx: &DictionaryCx) -> Result<Self> {
        if let Some(k) = k {
            Selection::check(k, features)?;
        }
        let dims @ Dims { input, output, .. } = cx.dims(features);
        let affine = Affine::zeros(if skip { SKIP_LAYOUT } else { LAYOUT }, dims, cx.device, cx.precision);
        // The mean row norm of PyTorch's linear layers at initialisation, as in both papers' code.
        let read = random_directions([input, features], 3f64.sqrt().recip(), cx.device);
        let zeros = |size: [i64; 2]| Tensor::zeros(size, (Kind::Float, cx.device));
        let write = match skip {
            true => zeros([output, features]),
            false => random_directions([output, features], 0.1, cx.device),
        };
        affine.set_directions(&read, &write);
        Ok(Transcoder {
            affine,
            w_skip: skip.then(|| trained(zeros([output, input]))),
            threshold: None,
            selection: k.map(|k| Selection::new(k, false, cx.device)),
        })
    }
}

impl Dictionary for Transcoder {
    fn affine(&self) -> Option<&Affine> {
        Some(&self.affine)
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut parameters = self.affine.parameters();
        parameters.extend(self.w_skip.as_ref().map(|w_skip| ("W_skip", w_skip.shallow_clone())));
        parameters.extend(self.threshold.as_ref().map(|threshold| ("threshold", threshold.shallow_clone())));
        parameters
    }

    fn code(&self, pre_activations: Tensor) -> Code {
        if let Some(selection) = &self.selection {
            return selection.of_each(pre_activations);
        }
        let features = match &self.threshold {
            Some(threshold) => pre_activations.relu() * pre_activations.gt_tensor(threshold),
            None => pre_activations.relu(),
        };
        Code::new(features).with("pre_activations", pre_activations)
    }

    fn between(&self) -> Option<Between<'_>> {
        match (&self.w_skip, &self.threshold, &self.selection) {
            (None, None, None) => Some(Between::Elementwise(Box::new(Relu))),
            (None, None, Some(selection)) => Some(Between::Selection(selection)),
            _ => None,
        }
    }

    fn selection(&self) -> Option<&Selection> {
        self.selection.as_ref()
    }

    fn reconstruction(&self, features: &Tensor, x: &Tensor) -> Tensor {
        let decoded = self.decode(features);
        match &self.w_skip {
            Some(w_skip) => decoded + self.affine.precision().linear(x, w_skip, None),
            None => decoded,
        }
    }

    fn begin(&mut self, batch: &Batch) {
        let mean = batch.target.mean_dim([0].as_slice(), false, Kind::Float);
        tch::no_grad(|| self.affine.bias().1.shallow_clone().copy_(&mean));
    }

    fn fold_norms(&mut self) -> bool {
        if self.selection.is_some() {
            return false;
        }
        if let Some((norms, threshold)) = self.affine.fold_norms().zip(self.threshold.as_mut()) {
            let _ = tch::no_grad(|| threshold.g_mul_(&norms));
        }
        true
    }

    fn scale_biases(&mut self, scale: f64) {
        self.affine.scale_biases(scale);
        self.threshold.iter().for_each(|threshold| scale_in_place(threshold, scale));
        self.selection.iter().for_each(|selection| selection.scale(scale));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcoder(skip: bool) -> Transcoder {
        let (device, precision) = (Device::Cpu, Precision::Float32);
        let cx = DictionaryCx { activation_dim: 8, output_dim: 5, parts: &[], device, precision };
        Transcoder::new(20, Some(3), skip, &cx).unwrap()
    }

    #[test]
    fn a_skip_transcoder_starts_at_the_mean_of_the_targets() {
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
    fn the_skip_connection_is_added_to_the_decoded_features() {
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
