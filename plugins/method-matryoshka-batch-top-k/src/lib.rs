//! The Matryoshka autoencoder on BatchTopK: Bussmann, Nabeshima, Karvonen and Nanda 2025, *Learning Multi-Level
//! Features with Matryoshka Sparse Autoencoders*, <https://arxiv.org/abs/2503.17547>.
//!
//! The features come in groups, and each prefix of groups must reconstruct on its own: the first groups learn general
//! features, later ones the remaining detail. With activations x `[d]`, features f `[F]`, a decoder W_d `[F, d]` whose
//! rows have norm 1, and groups that end at m₁ < … < mₙ = F:
//!
//! ```text
//! F   = BatchTopK(ReLU((X − b) W_e + b_e))                in training; threshold θ afterwards, as in BatchTopK
//! x̂ᵢ  = f[..mᵢ] W_d[..mᵢ] + b
//! L   = (1/n) Σᵢ wᵢ ‖x − x̂ᵢ‖² + α ‖e − ê‖² / Var(e),   e = x − x̂ₙ
//! ```
//!
//! ê is the dead features' best reconstruction of e, as in TopK. [`dictlearn_core::train::top_k`] implements it, the
//! geometric median as b's initial value, θ's running mean and the annealing of k.
//!
//! As in the reference, the weights wᵢ are 1/n by default and the loss is also a mean over groups. Compared with the
//! paper's plain sum, the auxiliary loss thus weighs n² times as much. `group_weights: [n, n, ...]` gives the sum.
//! Where this differs from the reference: a batch without positive features leaves the threshold unchanged;
//! `effective_l0` in the log is the step's k, also while k is annealed.

use dictlearn_core::prelude::*;
use dictlearn_core::train::top_k::{Prefixes, TopKTrainer};

/// The Matryoshka autoencoder on BatchTopK.
#[component(dictionary "matryoshka_batch_top_k",
    summary = "BatchTopK with nested groups of features; each prefix is itself a dictionary",
    paper = "Bussmann et al. 2025, Learning Multi-Level Features with Matryoshka SAEs, \
        https://arxiv.org/abs/2503.17547",
    example = "{type: matryoshka_batch_top_k, expansion_factor: 8, k: 8, group_fractions: [0.125, 0.125, 0.25, 0.5]}",
    fields(width))]
pub struct MatryoshkaDictionaryConfig {
    /// Number of features kept per activation, on average over a batch.
    #[schemars(range(min = 1))]
    pub k: i64,
    /// Fraction of the features in each group, in order; must add up to 1. The last group absorbs the rounding.
    #[schemars(length(min = 1))]
    pub group_fractions: Vec<f64>,
}

impl DictionaryConfig for MatryoshkaDictionaryConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        let features = self.features(cx)?;
        Selection::check(self.k, features)?;
        let groups = group_sizes(&self.group_fractions, features)?;
        // Random unit directions; the encoder is the decoder's transpose.
        let affine = Affine::random(LAYOUT, features, 1.0, cx);
        Ok(Box::new(Matryoshka::new(affine, Selection::new(self.k, true, cx.device), groups)))
    }
}

/// Returns the groups' sizes, rounded as in the reference.
fn group_sizes(fractions: &[f64], features: i64) -> Result<Vec<i64>> {
    if fractions.is_empty() {
        bail!(
            InputError::new("`group_fractions` is empty")
                .field("group_fractions")
                .help("give each group's fraction, for example `[0.25, 0.25, 0.5]`; they must add up to 1")
        );
    }
    let sum: f64 = fractions.iter().sum();
    if (sum - 1.0).abs() > 1e-9 {
        bail!(
            InputError::new(format!("`group_fractions` add up to {sum}"))
                .field("group_fractions")
                .help("they must add up to 1")
        );
    }
    let mut sizes: Vec<i64> = fractions.iter().map(|fraction| (fraction * features as f64) as i64).collect();
    let others: i64 = sizes.iter().rev().skip(1).sum();
    if let Some(last) = sizes.last_mut() {
        *last = features - others;
    }
    if let Some(index) = sizes.iter().position(|size| *size < 1) {
        bail!(
            InputError::new(format!(
                "a fraction of {} of {features} features rounds to {}",
                fractions[index], sizes[index]
            ))
            .field(format!("group_fractions[{index}]"))
            .help("every group needs at least one feature")
        );
    }
    Ok(sizes)
}

/// The reference's `MatryoshkaBatchTopKSAE`. After training it encodes with the threshold, as BatchTopK does.
#[derive(Debug)]
pub struct Matryoshka {
    affine: Affine,
    selection: Selection, // k, θ
    group_sizes: Tensor,  // int64 [n], as saved
    groups: Vec<i64>,
}

const LAYOUT: Layout = Layout::matrices("MatryoshkaBatchTopKSAE").centred();

inventory::submit! {
    SavedClass {
        class: LAYOUT.class,
        name: MatryoshkaDictionaryConfig::NAME,
        shaped: |saved| {
            let affine = saved.affine(LAYOUT)?;
            let features = affine.dims().features;
            let selection = Selection::saved(saved, features, true)?;
            let [_] = saved.shape("group_sizes")?;
            let groups = Vec::<i64>::try_from(&saved.tensors["group_sizes"].to_kind(Kind::Int64))?;
            if groups.is_empty()
                || groups.iter().any(|size| !(1..=features).contains(size))
                || groups.iter().sum::<i64>() != features
            {
                bail!(InputError::new(format!(
                    "`group_sizes` is {groups:?}, but the dictionary has {features} features"
                )));
            }
            Ok(Box::new(Matryoshka::new(affine, selection, groups)))
        },
    }
}

impl Matryoshka {
    fn new(affine: Affine, selection: Selection, groups: Vec<i64>) -> Self {
        let group_sizes = Tensor::from_slice(&groups).to_device(selection.threshold().device());
        Matryoshka { affine, selection, group_sizes, groups }
    }
}

impl Dictionary for Matryoshka {
    fn affine(&self) -> Option<&Affine> {
        Some(&self.affine)
    }

    fn selection(&self) -> Option<&Selection> {
        Some(&self.selection)
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        let mut buffers = self.selection.buffers();
        buffers.push(("group_sizes", self.group_sizes.shallow_clone()));
        buffers
    }

    fn loaded(&mut self) {
        self.selection.loaded();
        if let Ok(groups) = Vec::<i64>::try_from(&self.group_sizes) {
            self.groups = groups;
        }
    }

    fn code(&self, pre_activations: Tensor) -> Code {
        self.selection.of_batch(pre_activations)
    }

    fn between(&self) -> Option<Between<'_>> {
        Some(Between::Selection(&self.selection))
    }
}

/// The loss is the weighted mean, over groups, of the squared error of the reconstruction from that group and all
/// groups before it. Features are selected over the whole batch, as in BatchTopK. An auxiliary loss with weight
/// auxk_alpha revives dead features: the squared error of their best reconstruction of the whole dictionary's residual,
/// divided by the residual's variance. The threshold with which the trained dictionary encodes is a running mean of the
/// smallest selected feature.
#[component(trainer "matryoshka_batch_top_k",
    summary = "BatchTopK's loss, with the squared error of every prefix of groups",
    paper = "Bussmann et al. 2025, Learning Multi-Level Features with Matryoshka SAEs, \
        https://arxiv.org/abs/2503.17547",
    example = "{type: matryoshka_batch_top_k, lr: 1e-3, warmup_steps: 20, threshold_start_step: 20}",
    default_dictionary = MatryoshkaDictionaryConfig::NAME,
    short_run = "{dictionary: {type: matryoshka_batch_top_k, expansion_factor: 4, k: 32, group_fractions: [0.125, \
        0.125, 0.25, 0.5]}, trainer: {type: matryoshka_batch_top_k, lr: 2e-3, warmup_steps: 100, decay_start: 1200, \
        dead_feature_threshold: 200_000, threshold_start_step: 300, threshold_beta: 0.99}}",
    measured = "87.4% of the variance explained with L0 33, 99.7% of the cross entropy recovered", fields(top_k))]
pub struct MatryoshkaConfig {
    /// Weight of each group's squared error, before the mean over groups; null for 1 / number of groups.
    #[default]
    pub group_weights: Option<Vec<f64>>,
}

impl TrainerConfig for MatryoshkaConfig {
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
        let Some(dictionary) = cx.dictionary.downcast::<Matryoshka>() else {
            let or = format!("the dictionary `{}`", MatryoshkaDictionaryConfig::NAME);
            bail!(cannot_train(Self::NAME, cx.dictionary, "it has no groups of features", &or));
        };
        let groups = dictionary.groups.len();
        let weights = self.group_weights.clone().unwrap_or_else(|| vec![1.0 / groups as f64; groups]);
        if weights.len() != groups {
            bail!(
                InputError::new(format!("there are {} `group_weights` for {groups} groups", weights.len()))
                    .field("group_weights")
                    .help("give one weight for each of the dictionary's `group_fractions`")
            );
        }
        if let Some(index) = weights.iter().position(|weight| *weight < 0.0) {
            bail!(
                InputError::new(format!("a group weight is {}", weights[index]))
                    .field(format!("group_weights[{index}]"))
                    .help("it must be at least 0")
            );
        }
        if weights.iter().all(|weight| *weight == 0.0) {
            bail!(
                InputError::new("every group weight is 0, so nothing would be reconstructed")
                    .field("group_weights")
                    .help("make at least one positive")
            );
        }
        let (weights_saved, sizes_saved) = (weights.clone().into(), dictionary.groups.clone().into());
        let mut end = 0;
        let ends = dictionary.groups.iter().map(|size| {
            end += size;
            end
        });
        let prefixes = Prefixes { ends: ends.collect(), weights, residuals };
        let trainer = TopKTrainer::new(Self::NAME, self.settings(), cx)?.with_prefixes(prefixes);
        Ok(Box::new(trainer.with_setting("group_weights", weights_saved).with_setting("group_sizes", sizes_saved)))
    }

    fn class(&self) -> &'static str {
        "MatryoshkaBatchTopKTrainer"
    }
}

/// Returns x − x̂ᵢ `[B, d]` of each prefix of groups.
fn residuals(pass: &Pass) -> Result<Vec<Tensor>> {
    let Some(dictionary) = pass.dictionary.downcast::<Matryoshka>() else { bail!("not a Matryoshka dictionary") };
    let groups = &dictionary.groups;
    let affine = &dictionary.affine;
    let features = pass.code.features.split_with_sizes(groups, 1);
    let rows = affine.decoder().rows().split_with_sizes(groups, 0);
    // The residual of the groups so far; the last group's is the whole dictionary's, from the pass.
    let mut residual = &pass.batch.target - affine.bias().1;
    let mut residuals = Vec::with_capacity(groups.len());
    for (features, rows) in features[..groups.len() - 1].iter().zip(&rows) {
        let less = &residual - affine.precision().linear(features, &rows.tr(), None);
        residuals.push(less.shallow_clone());
        residual = less;
    }
    residuals.push(pass.residual());
    Ok(residuals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_group_absorbs_the_rounding() {
        assert_eq!(group_sizes(&[0.1, 0.2, 0.7], 96).unwrap(), [9, 19, 68]);
        assert!(group_sizes(&[0.5, 0.4], 96).is_err());
        assert!(group_sizes(&[0.001, 0.999], 96).is_err());
    }

    #[test]
    fn the_loss_averages_the_error_of_every_prefix() {
        let dims = Dims { input: 2, features: 2, output: 2 };
        let affine = Affine::zeros(LAYOUT, dims, Device::Cpu, Precision::Float32);
        let eye = Tensor::eye(2, (Kind::Float, Device::Cpu));
        affine.set_directions(&eye, &eye);
        let dictionary = Matryoshka::new(affine, Selection::new(2, true, Device::Cpu), vec![1, 1]);
        let config = MatryoshkaConfig { auxk_alpha: 0.0, warmup_steps: 0, ..MatryoshkaConfig::default() };
        let mut trainer = config.build(&TrainerCx { dictionary: &dictionary, steps: 10, seed: 0 }).unwrap();
        let batch = Batch::of(Tensor::from_slice2(&[[3.0f32, 4.0]]));
        let pass = Pass::forward(&*trainer, &dictionary, &batch, 0, true);
        let mut terms = Terms::new();
        trainer.loss(&pass, &mut terms).unwrap();
        // The first group leaves a residual of 4, both groups none: (0.5 · 16 + 0.5 · 0) / 2.
        assert_eq!(terms.total().unwrap().double_value(&[]), 4.0);
        assert_eq!(terms.get_mut("max_group_loss").unwrap().value.double_value(&[]), 8.0);
    }
}
