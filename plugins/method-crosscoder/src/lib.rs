//! Crosscoders: Lindsey et al. 2024, *Sparse Crosscoders for Cross-Layer Features and Model Diffing*,
//! <https://transformer-circuits.pub/2024/crosscoders/index.html>.
//!
//! One set of features reads and writes several sites: layers of a model, or the same layer of a model and its
//! fine-tune. The source joins their activations side by side (`type: joined`). With activations aˢ `[d_s]` of the
//! parts s, encoders W_eˢ, decoders W_dˢ with columns d_iˢ, and features f `[F]`:
//!
//! ```text
//! f  = ReLU(Σ_s W_eˢ aˢ/cˢ + b_e)
//! âˢ = cˢ W_dˢ f + b_dˢ
//! L  = Σ_s ‖(aˢ − âˢ)/cˢ‖² + λ Σ_i f_i Σ_s ‖d_iˢ‖        (means over the batch)
//! ```
//!
//! The scale cˢ is the median norm of part s in the first batch, so that a part with large activations does not
//! dominate. It is saved with the weights (`scale`), and the dictionary takes unscaled activations.
//!
//! With `k`, the code keeps the B·k features with the largest f_i Σ_s ‖d_iˢ‖ of a batch of B, and no penalty is needed:
//! Minder et al. 2025, *Robustly identifying concepts introduced during chat fine-tuning using crosscoders*,
//! <https://arxiv.org/abs/2504.02922>, section 3. After training, a threshold replaces the selection.

use dictlearn_core::prelude::*;
use dictlearn_core::train::top_k::{Prefixes, TopKTrainer};

const PAPER: &str = "Lindsey et al. 2024, Sparse Crosscoders for Cross-Layer Features and Model Diffing, \
                     https://transformer-circuits.pub/2024/crosscoders/index.html";

const TOP_K_PAPER: &str = "Minder et al. 2025, Robustly identifying concepts introduced during chat fine-tuning using \
                           crosscoders, https://arxiv.org/abs/2504.02922";

/// A crosscoder. Its parts are those of the source `joined`; with any other source it has a single part.
#[component(dictionary "crosscoder",
    summary = "One set of features for several sites, with an encoder and a decoder for each", paper = PAPER,
    example = "{type: crosscoder, expansion_factor: 4}", fields(width = "the parts' joint width"))]
pub struct CrosscoderConfig {}

/// A crosscoder that selects its features over a batch. Its parts are those of the source `joined`; with any other
/// source it has a single part.
#[component(dictionary "batch_top_k_crosscoder",
    summary = "A crosscoder that keeps the k largest features per activation, on average over a batch",
    paper = TOP_K_PAPER,
    example = "{type: batch_top_k_crosscoder, expansion_factor: 4, k: 8}", fields(width = "the parts' joint width"))]
pub struct BatchTopKCrosscoderDictionaryConfig {
    /// Number of features kept per activation, on average over a batch.
    #[schemars(range(min = 1))]
    pub k: i64,
}

impl DictionaryConfig for CrosscoderConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        let features = self.features(cx)?;
        Ok(Box::new(Crosscoder::new(features, None, cx)))
    }
}

impl DictionaryConfig for BatchTopKCrosscoderDictionaryConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        let features = self.features(cx)?;
        Selection::check(self.k, features)?;
        Ok(Box::new(Crosscoder::new(features, Some(self.k), cx)))
    }
}

/// A crosscoder. Its parts lie side by side, in the source's order.
#[derive(Debug)]
pub struct Crosscoder {
    affine: Affine,
    /// Scales cˢ of the parts' inputs and outputs, [S, 2].
    scale: Tensor,
    /// Widths of the parts' inputs and outputs, [S, 2], int64.
    widths: Tensor,
    selection: Option<Selection>,
    /// Widths of the parts' inputs and outputs, in host memory.
    parts: [Vec<i64>; 2],
}

const LAYOUT: Layout = Layout::matrices("Crosscoder");
const TOP_K_LAYOUT: Layout = Layout::matrices("BatchTopKCrosscoder");

inventory::submit! { SavedClass { class: LAYOUT.class, name: CrosscoderConfig::NAME, shaped } }

inventory::submit! { SavedClass { class: TOP_K_LAYOUT.class, name: BatchTopKCrosscoderDictionaryConfig::NAME, shaped } }

fn shaped(saved: &SavedTensors) -> Result<Box<dyn Dictionary>> {
    let [_, features] = saved.shape("W_enc")?;
    let [parts, 2] = saved.shape("widths")? else {
        bail!(InputError::new("the tensor `widths` must have two columns"));
    };
    let widths = Vec::<i64>::try_from(saved.tensors["widths"].to_kind(Kind::Int64).reshape([-1]))?;
    let widths: Vec<[i64; 2]> = widths.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect();
    if parts == 0 || widths.iter().flatten().any(|width| !(1..1 << 24).contains(width)) {
        bail!(InputError::new("the tensor `widths` has values that cannot be widths of activations"));
    }
    let has_k = saved.tensors.contains_key("k");
    let selection = has_k.then(|| Selection::saved(saved, features, true)).transpose()?;
    Ok(Box::new(Crosscoder::zeros(&widths, features, selection, saved.device, saved.precision)))
}

impl Crosscoder {
    fn new(features: i64, k: Option<i64>, cx: &DictionaryCx) -> Self {
        let parts = match cx.parts {
            [] => vec![[cx.activation_dim, cx.output_dim]],
            parts => parts.iter().map(|part| [part.activation_dim, part.output_dim]).collect(),
        };
        let selection = k.map(|k| Selection::new(k, true, cx.device));
        let dictionary = Crosscoder::zeros(&parts, features, selection, cx.device, cx.precision);
        // Each part's directions have norm 0.1. The encoder is the decoder's transpose where widths allow.
        let (mut read, mut write) = (Vec::new(), Vec::new());
        for [input, output] in &parts {
            let directions = random_directions([*input, features], 0.1, cx.device);
            write.push(match input == output {
                true => directions.shallow_clone(),
                false => random_directions([*output, features], 0.1, cx.device),
            });
            read.push(directions);
        }
        dictionary.affine.set_directions(&Tensor::cat(&read, 0), &Tensor::cat(&write, 0));
        dictionary
    }

    fn zeros(
        parts: &[[i64; 2]],
        features: i64,
        selection: Option<Selection>,
        device: Device,
        precision: Precision,
    ) -> Self {
        let column = |column: usize| parts.iter().map(|part| part[column]).collect::<Vec<i64>>();
        let (inputs, outputs) = (column(0), column(1));
        let dims = Dims { input: inputs.iter().sum(), features, output: outputs.iter().sum() };
        let layout = if selection.is_some() { TOP_K_LAYOUT } else { LAYOUT };
        Crosscoder {
            affine: Affine::zeros(layout, dims, device, precision),
            scale: Tensor::ones([parts.len() as i64, 2], (Kind::Float, device)),
            widths: Tensor::from_slice(&parts.concat()).view([-1, 2]).to_device(device),
            selection,
            parts: [inputs, outputs],
        }
    }

    /// The scale of each input dimension (side 0) or output dimension (side 1).
    fn scales(&self, side: usize) -> Tensor {
        let widths = Tensor::from_slice(&self.parts[side]).to_device(self.scale.device());
        self.scale.select(1, side as i64).repeat_interleave_self_tensor(
            &widths,
            0,
            self.parts[side].iter().sum::<i64>(),
        )
    }

    /// Σ_s ‖d_iˢ‖, `[F]`.
    fn norms(&self) -> Tensor {
        let parts = self.affine.decoder().rows().split_with_sizes(self.parts[1].as_slice(), 1);
        // libtorch defines the gradient of a zero vector's norm as 0.
        let norms = parts.iter().map(|part| part.norm_scalaropt_dim(2.0, [1], false));
        norms.reduce(|sum, norm| sum + norm).unwrap_or_else(|| self.scale.zeros_like())
    }

    /// The residual of a pass in units of the parts' scales.
    fn residual(&self, pass: &Pass) -> Tensor {
        pass.residual() / self.scales(1)
    }
}

impl Dictionary for Crosscoder {
    fn affine(&self) -> Option<&Affine> {
        Some(&self.affine)
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        let mut buffers = vec![("scale", self.scale.shallow_clone()), ("widths", self.widths.shallow_clone())];
        buffers.extend(self.selection.iter().flat_map(Selection::buffers));
        buffers
    }

    fn encode(&self, x: &Tensor) -> Tensor {
        let pre_activations = self.affine.pre_activations(&(x / self.scales(0)));
        match &self.selection {
            None => pre_activations.relu(),
            Some(selection) => {
                let norms = self.norms().clamp_min(f64::from(f32::MIN_POSITIVE));
                selection.above_threshold(&(pre_activations * &norms)) / norms
            }
        }
    }

    fn decode(&self, features: &Tensor) -> Tensor {
        self.affine.decode_without_bias(features) * self.scales(1) + self.affine.bias().1
    }

    fn forward(&self, x: &Tensor) -> Code {
        self.code(self.affine.pre_activations(&(x / self.scales(0))))
    }

    /// Penalises f_i Σ_s ‖d_iˢ‖, which rescaling a feature's columns cannot reduce.
    fn code(&self, pre_activations: Tensor) -> Code {
        let norms = self.norms();
        match &self.selection {
            None => {
                let features = pre_activations.relu();
                let weighted = &features * norms;
                Code::new(features).penalize(weighted).with("pre_activations", pre_activations)
            }
            Some(selection) => {
                // The norms only rank features, so no gradient goes through them.
                let norms = norms.detach().clamp_min(f64::from(f32::MIN_POSITIVE));
                let mut code = selection.of_batch(&pre_activations * &norms);
                code.features = &code.features / norms;
                code.with("post_relu", pre_activations.relu()).with("pre_activations", pre_activations)
            }
        }
    }

    /// Resampling is not supported: a feature reads several parts, each with its own scale.
    fn encoder(&self) -> Option<Encoder> {
        None
    }

    fn directions(&self) -> Option<Tensor> {
        Some(self.affine.decoder().rows() * self.scales(1))
    }

    fn selection(&self) -> Option<&Selection> {
        self.selection.as_ref()
    }

    fn begin(&mut self, batch: &Batch) {
        let medians = |values: &Tensor, widths: &[i64]| {
            let parts = values.split_with_sizes(widths, 1);
            let medians = parts.iter().map(|part| part.norm_scalaropt_dim(2.0, [1], false).median().clamp_min(1e-6));
            Tensor::stack(&medians.collect::<Vec<_>>(), 0)
        };
        let [inputs, outputs] = &self.parts;
        self.scale.copy_(&Tensor::stack(&[medians(&batch.x, inputs), medians(&batch.target, outputs)], 1));
        let mean = batch.target.mean_dim([0].as_slice(), false, Kind::Float);
        tch::no_grad(|| self.affine.bias().1.shallow_clone().copy_(&mean));
    }

    /// Features stay unchanged: only the parts' scales and the output bias change.
    fn scale_biases(&mut self, scale: f64) {
        scale_in_place(&self.scale, scale);
        scale_in_place(self.affine.bias().1, scale);
    }
}

/// The loss is the squared error of each part's reconstruction in units of the part's median norm, summed over parts
/// and dimensions, plus l1_penalty times the sum of the features, each weighted by its decoder norms summed over parts.
/// Both are averaged over the batch. Gradients are clipped to norm 1.
#[component(trainer "crosscoder",
    summary = "Squared error of every part, with an L1 penalty weighted by decoder norms", paper = PAPER,
    example = "{type: crosscoder, lr: 2e-3, l1_penalty: 0.02, warmup_steps: 20, sparsity_warmup_steps: 40}",
    default_dictionary = CrosscoderConfig::NAME, fields(lr = 1e-3, .., schedule))]
pub struct CrosscoderTrainerConfig {
    /// Weight λ of the penalty.
    #[default(4e-2)]
    #[schemars(range(min = 0))]
    pub l1_penalty: f64,
}

impl TrainerConfig for CrosscoderTrainerConfig {
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
        let schedule = self.schedule(cx).check()?;
        if cx.dictionary.downcast::<Crosscoder>().is_none() {
            bail!(not_a_crosscoder(Self::NAME, cx.dictionary));
        }
        penalizable(cx.dictionary, Self::NAME)?;
        Ok(Box::new(CrosscoderTrainer { l1_penalty: self.l1_penalty, schedule }))
    }

    fn class(&self) -> &'static str {
        "CrosscoderTrainer"
    }
}

fn not_a_crosscoder(trainer: &str, dictionary: &dyn Dictionary) -> InputError {
    cannot_train(trainer, dictionary, "it is not a crosscoder", "leave `dictionary.type` out")
}

struct CrosscoderTrainer {
    l1_penalty: f64,
    schedule: Schedule,
}

impl Trainer for CrosscoderTrainer {
    fn schedule(&self) -> Schedule {
        self.schedule
    }

    fn constraints(&self) -> Constraints {
        Constraints { unit_norm_decoder: false, clip_gradients: Some(1.0) }
    }

    fn has_sparsity_term(&self) -> bool {
        true
    }

    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        let Some(crosscoder) = pass.dictionary.downcast::<Crosscoder>() else { bail!("not a crosscoder") };
        let penalty = Penalty::l1(self.l1_penalty * self.schedule.sparsity_factor(pass.step));
        Objective::squared_error(penalty).add(&crosscoder.residual(pass), pass.code.penalized(), pass.logging, terms);
        Ok(())
    }
}

/// The loss is the squared error of each part's reconstruction in units of the part's median norm, plus auxk_alpha
/// times the squared error of the dead features' best reconstruction of the residual, divided by the residual's
/// variance. Each feature's directions have joint norm 1. Gradients are clipped to norm 1.
#[component(trainer "batch_top_k_crosscoder",
    summary = "Squared error of every part, reconstructed from the batch's largest features", paper = TOP_K_PAPER,
    example = "{type: batch_top_k_crosscoder, lr: 1e-3, warmup_steps: 20, threshold_start_step: 50}",
    default_dictionary = BatchTopKCrosscoderDictionaryConfig::NAME, fields(top_k))]
pub struct BatchTopKCrosscoderConfig {}

impl TrainerConfig for BatchTopKCrosscoderConfig {
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
        if cx.dictionary.downcast::<Crosscoder>().is_none() {
            bail!(not_a_crosscoder(Self::NAME, cx.dictionary));
        }
        let prefixes = Prefixes {
            ends: vec![cx.dictionary.dims().features],
            weights: vec![1.0],
            residuals: |pass| {
                let Some(crosscoder) = pass.dictionary.downcast::<Crosscoder>() else { bail!("not a crosscoder") };
                Ok(vec![crosscoder.residual(pass)])
            },
        };
        Ok(Box::new(TopKTrainer::new(Self::NAME, self.settings(), cx)?.with_prefixes(prefixes)))
    }

    fn class(&self) -> &'static str {
        "BatchTopKCrosscoderTrainer"
    }
}
