//! Shared parts of the TopK family: selecting features, the inference threshold, and a trainer with the auxiliary loss
//! for dead features (Gao et al. 2024, *Scaling and evaluating sparse autoencoders*,
//! <https://arxiv.org/abs/2406.04093>).
//!
//! A dictionary of the family has a [`Selection`], which makes its [`Code`](crate::sae::Code). The trainer reads from
//! the code:
//!
//! | | | |
//! | --- | --- | --- |
//! | `post_relu` | [B, F] | features before the selection, from which the auxiliary loss selects among the dead |
//! | `top_values` | [rows, k] | magnitudes of the selected features, one row per activation or batch; the smallest positive ones update the threshold |
//! | `top_indices` | [rows, k] | features that count as fired (optional; default: those that are not 0) |

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use super::analytic::{AnalyticParts, AnalyticPass, AnalyticStep, mean_square, sum_of_rows};
use super::constraint::Constraints;
use super::firing::Firing;
use super::schedule::Schedule;
use super::terms::{Terms, mean_of_sums, number};
use super::trainer::{AfterStep, Pass, Trainer, TrainerCx, cannot_train};
use crate::data::Batch;
use crate::error::{InputError, Mistakes};
use crate::files::state::State;
use crate::machine::ranks;
use crate::sae::{Between, Dictionary, Selection};

/// Returns the smallest positive value of each row of `[rows, k]`, `[rows]`, or infinity if there is none.
fn smallest_positive(values: &Tensor) -> Tensor {
    values.masked_fill(&values.le(0.0), f64::INFINITY).amin([1], false)
}

/// Settings shared by the trainers of the family. `fields(top_k)` of [`component`](macro@crate::component) documents
/// them and sets their defaults.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct TopKSettings {
    pub lr: Option<f64>,
    pub auxk_alpha: f64,
    pub warmup_steps: u64,
    pub decay_start: Option<u64>,
    pub threshold_beta: f64,
    pub threshold_start_step: u64,
    pub k_anneal_steps: Option<u64>,
    pub dead_feature_threshold: i64,
}

/// Prefixes of the features that are also trained to reconstruct on their own.
pub struct Prefixes {
    /// End of each prefix, in ascending order; the last one is the number of features.
    pub ends: Vec<i64>,
    /// Weight of each prefix's squared error. The loss is the mean of the weighted errors.
    pub weights: Vec<f64>,
    /// Returns the residual of each prefix, `[B, d]`. Analytic steps always use target − reconstruction: a
    /// dictionary with other residuals must leave its steps to autograd.
    pub residuals: fn(&Pass) -> Result<Vec<Tensor>>,
}

/// Trainer of the family. The loss is the squared error of the reconstruction, or the mean of those of several
/// prefixes, plus the auxiliary loss for dead features.
///
/// Initialises `b_dec` to the geometric median of the first batch. Updates the threshold after step
/// `threshold_start_step`, and anneals k. The decoder is kept at norm 1 and gradients are clipped to norm 1.
pub struct TopKTrainer {
    settings: TopKSettings,
    schedule: Schedule,
    /// k after annealing.
    k: i64,
    top_k_aux: i64,
    fired: Firing,
    figures: Log,
    /// Results that [`Trainer::after_step`] keeps.
    seen: Option<Seen>,
    added: Map<String, Value>,
    prefixes: Prefixes,
}

/// Results of computing a loss.
struct Seen {
    /// Counters after the batch.
    fired: Firing,
    /// Smallest positive value of each row or batch that was selected from, `[rows]`, if this step updates the
    /// threshold.
    smallest: Option<Tensor>,
}

/// Figures that the reference's trainers log besides their losses.
#[derive(Default)]
struct Log {
    effective_l0: i64,
    pre_norm_auxk_loss: Option<Tensor>,
}

impl TopKTrainer {
    /// Builds the trainer; `name` is for error messages.
    pub fn new(name: &str, settings: TopKSettings, cx: &TrainerCx) -> Result<Self> {
        let Some(selection) = cx.dictionary.selection() else {
            let why = "it has no `k` to keep its features sparse";
            bail!(cannot_train(name, cx.dictionary, why, "a dictionary with `k`"));
        };
        let dims = cx.dictionary.dims();
        let mut mistakes = Mistakes::new();
        let schedule = Schedule {
            lr: settings.lr.unwrap_or_else(|| 2e-4 / (dims.features as f64 / 16384.0).sqrt()),
            steps: cx.steps,
            warmup_steps: settings.warmup_steps,
            decay_start: settings.decay_start,
            resample_steps: None,
            sparsity_warmup_steps: None,
        };
        mistakes.keep(schedule.check())?;
        if let Some(anneal) = settings.k_anneal_steps {
            if anneal >= cx.steps {
                mistakes.add(
                    InputError::new(format!("`k_anneal_steps` is {anneal}, but the run has only {} steps", cx.steps))
                        .field("k_anneal_steps")
                        .help("`k_anneal_steps` must be less than `steps`"),
                );
            }
            if selection.k() >= dims.input {
                mistakes.add(
                    InputError::new(format!(
                        "k is annealed down from the activations' width, {}, but `k` is {}",
                        dims.input,
                        selection.k()
                    ))
                    .field("k_anneal_steps")
                    .help("leave `k_anneal_steps` out, or make `k` smaller"),
                );
            }
        }
        mistakes.into_result()?;
        if selection.by_threshold() && settings.threshold_start_step + 1 >= cx.steps {
            tracing::warn!(
                "`threshold_start_step` is {}, but the run has only {} steps: the threshold by which the class {} \
                 encodes will not be set, and every positive feature will fire",
                settings.threshold_start_step,
                cx.steps,
                cx.dictionary.class()
            );
        }
        Ok(TopKTrainer {
            schedule,
            k: selection.k(),
            // Half the activation width, a heuristic from the paper.
            top_k_aux: dims.input / 2,
            fired: Firing::new(dims.features, cx.dictionary.device()),
            figures: Log::default(),
            seen: None,
            added: Map::new(),
            settings,
            prefixes: Prefixes {
                ends: vec![dims.features],
                weights: vec![1.0],
                residuals: |pass| Ok(vec![pass.residual()]),
            },
        })
    }

    /// Adds a setting to config.json.
    #[must_use]
    pub fn with_setting(mut self, name: &str, value: Value) -> Self {
        self.added.insert(name.to_owned(), value);
        self
    }

    /// Trains prefixes of the features too.
    #[must_use]
    pub fn with_prefixes(mut self, prefixes: Prefixes) -> Self {
        self.prefixes = prefixes;
        self
    }

    /// Records k for the log and returns `smallest` at steps that update the threshold.
    fn selected(&mut self, step: u64, selection: &Selection, smallest: impl FnOnce() -> Tensor) -> Option<Tensor> {
        self.figures = Log { effective_l0: selection.k(), ..Log::default() };
        (step > self.settings.threshold_start_step).then(smallest)
    }

    /// Adds the reconstruction loss: the weighted mean of the prefixes' squared errors.
    fn reconstruction(&self, losses: &[Tensor], logging: bool, terms: &mut Terms) {
        let losses: Vec<Tensor> =
            losses.iter().zip(&self.prefixes.weights).map(|(loss, weight)| loss * *weight).collect();
        let losses = Tensor::stack(&losses, 0);
        let groups = self.prefixes.ends.len() > 1;
        if logging && groups {
            terms.log("min_group_loss", losses.min());
            terms.log("max_group_loss", losses.max());
        }
        terms.add_reconstruction(if groups { "group_loss" } else { "mse_loss" }, losses.mean(losses.kind()));
    }

    /// Returns mean ‖e − ê‖² / Var(e), and Var(e). The undivided mean is logged.
    ///
    /// A zero variance (a single activation, or equal ones) counts as infinite, because dividing by 0 would make every
    /// gradient NaN.
    fn over_variance(&mut self, residual: &Tensor, off: &Tensor) -> (Tensor, Tensor) {
        let loss = mean_of_sums(&off.square());
        self.figures.pre_norm_auxk_loss = Some(loss.detach());
        let centred = residual - residual.mean_dim([0].as_slice(), true, residual.kind());
        let variance = mean_of_sums(&centred.square());
        let variance = variance.masked_fill(&variance.le(0.0), f64::INFINITY);
        (loss / &variance, variance)
    }

    /// Returns ‖e − ê‖² / Var(e), where the dead features reconstruct ê from the residual e `[B, d]`, which takes no
    /// gradient.
    fn auxk_loss(&mut self, pass: &Pass, fired: &mut Firing, residual: &Tensor) -> Result<Tensor> {
        let dead = fired.silent_indices(self.settings.dead_feature_threshold);
        let Some((dead, directions)) = dead.zip(pass.dictionary.directions()) else {
            return Ok(Tensor::zeros([0_i64; 0], (residual.kind(), residual.device())));
        };
        // Only dead features take part, so only they are sorted and decoded.
        let features = pass.code.extra("post_relu")?.index_select(1, &dead);
        let (_, indices) = features.detach().abs().topk(self.top_k_aux.min(dead.size()[0]), -1, true, false);
        let kept = features.zeros_like().scatter(-1, &indices, &features.gather(-1, &indices, false));
        let off = residual - kept.matmul(&directions.index_select(0, &dead));
        Ok(self.over_variance(residual, &off).0)
    }

    /// Returns the analytic auxiliary loss for the error x̂ − x = −e, and the step on the dead features, if there are
    /// any.
    fn auxk_analytic<'a>(
        &mut self,
        parts: &AnalyticParts<'a>,
        fired: &mut Firing,
        error: &Tensor,
    ) -> (Tensor, Option<(Tensor, AnalyticParts<'a>)>) {
        let Some(dead) = fired.silent_indices(self.settings.dead_feature_threshold) else {
            return (Tensor::zeros([0_i64; 0], (error.kind(), error.device())), None);
        };
        let mut part = parts.of_features(&dead);
        let block = part.select_of_each(self.top_k_aux.min(dead.size()[0]));
        // ê − e
        let mut off = error.copy();
        part.decode(&block, &block.z.relu(), &mut off);
        let (loss, variance) = self.over_variance(error, &off);
        let by_off = off * (variance.reciprocal() * (2.0 * self.settings.auxk_alpha / error.size()[0] as f64));
        part.backward_of_selected(&block, &by_off);
        (loss, Some((dead, part)))
    }
}

impl Trainer for TopKTrainer {
    fn schedule(&self) -> Schedule {
        self.schedule
    }

    fn settings(&self, settings: &mut Map<String, Value>) {
        settings.insert("lr".to_owned(), self.schedule.lr.into());
        settings.insert("top_k_aux".to_owned(), self.top_k_aux.into());
        settings.extend(self.added.clone());
    }

    fn begin(&mut self, dictionary: &mut dyn Dictionary, batch: &Batch) -> Result<()> {
        let bias = dictionary.parameters().into_iter().find(|(name, _)| *name == "b_dec");
        if let Some((_, mut bias)) = bias {
            tch::no_grad(|| bias.copy_(&geometric_median(&batch.target)));
        }
        Ok(())
    }

    fn constraints(&self) -> Constraints {
        Constraints { unit_norm_decoder: true, clip_gradients: Some(1.0) }
    }

    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        let top_values = pass.code.extra("top_values")?.detach();
        let selection = pass.dictionary.selection();
        let smallest = selection.and_then(|selection| {
            self.selected(pass.step, selection, || ranks::gather_rows(&smallest_positive(&top_values.abs())))
        });
        let mut fired = match pass.code.get("top_indices") {
            Some(indices) => self.fired.after_indices(indices, pass.batch.len()),
            None => self.fired.after(&pass.code.features.detach().not_equal(0.0).any_dim(0, false), pass.batch.len()),
        };

        let residuals = (self.prefixes.residuals)(pass)?;
        let losses: Vec<Tensor> = residuals.iter().map(|residual| mean_of_sums(&residual.square())).collect();
        self.reconstruction(&losses, pass.logging, terms);
        if self.settings.auxk_alpha > 0.0 {
            let auxk = self.auxk_loss(pass, &mut fired, &pass.residual().detach())?;
            terms.add("auxk_loss", auxk, self.settings.auxk_alpha);
        }
        self.seen = Some(Seen { fired, smallest });
        Ok(())
    }

    fn analytic(&mut self, pass: &AnalyticPass, terms: &mut Terms) -> Result<Option<AnalyticStep>> {
        let Some(Between::Selection(selection)) = pass.dictionary.between() else { return Ok(None) };
        let Some(mut parts) = AnalyticParts::new(pass) else { return Ok(None) };
        let (block, indices) = parts.select(selection);
        let smallest = self.selected(pass.step, selection, || {
            let smallest = ranks::gather_rows(&block.smallest_positive());
            if selection.by_threshold() { smallest.amin([0], true) } else { smallest }
        });
        let mut counts = Tensor::zeros([parts.features()], (Kind::Float, block.z.device()));
        block.sum_by_feature(&block.z.gt(0.0).to_kind(Kind::Float), &mut counts);
        let mut fired = self.fired.after(&counts.gt(0.0), pass.batch.len());
        if !selection.by_threshold() {
            let selected = indices.unwrap_or_else(|| parts.selected_at_zero(&block, selection.k()));
            fired.reset_indices(&selected);
        }

        let groups = parts.groups(block, &self.prefixes.ends);
        let mut error = parts.begin(pass.batch);
        let mut losses = Vec::with_capacity(groups.len());
        for group in &groups {
            parts.decode(group, &group.z.relu(), &mut error);
            losses.push(mean_square(&error));
        }
        self.reconstruction(&losses, pass.logging, terms);
        let mut revived = None;
        if self.settings.auxk_alpha > 0.0 {
            let (auxk, part) = self.auxk_analytic(&parts, &mut fired, &error);
            terms.add("auxk_loss", auxk, self.settings.auxk_alpha);
            revived = part;
        }
        let logged = pass.logging.then(|| error.copy());
        // A group's features contribute to its own prefix and to all longer ones. The errors are recomputed in place
        // from the longest prefix down, to avoid keeping them all. With a single prefix, the derivative reuses that
        // memory.
        let scale = 2.0 / (groups.len() as f64 * pass.batch.len() as f64);
        let mut of_longer: Option<Tensor> = None;
        for (index, (group, weight)) in groups.iter().zip(&self.prefixes.weights).enumerate().rev() {
            let scale = scale * weight;
            let by_x_hat = match of_longer {
                Some(mut sum) => sum.addcmul_(&error, &Tensor::from(scale as f32)),
                None if index == 0 => error.g_mul_scalar_(scale),
                None => &error * scale,
            };
            parts.backward_of_selected(group, &by_x_hat);
            if index > 0 {
                parts.decode(group, &group.z.relu().neg(), &mut error);
            }
            of_longer = Some(by_x_hat);
        }
        let by_sum = sum_of_rows(&of_longer.context("there are no prefixes")?);
        if let Some((dead, part)) = revived {
            parts.add(&dead, &part);
        }
        let gradients = parts.gradients(by_sum);
        self.seen = Some(Seen { fired, smallest });
        Ok(Some(AnalyticStep { fired: Some(counts), error: logged, gradients }))
    }

    fn after_step(&mut self, cx: &mut AfterStep) -> Result<()> {
        if let Some(Seen { fired, smallest }) = self.seen.take() {
            self.fired = fired;
            if let Some((smallest, selection)) = smallest.zip(cx.dictionary.selection()) {
                selection.update_threshold(&smallest, self.settings.threshold_beta);
            }
        }
        let dims = cx.dictionary.dims();
        if let Some((anneal, selection)) = self.settings.k_anneal_steps.zip(cx.dictionary.selection()) {
            let ratio = cx.step.min(anneal) as f64 / anneal as f64;
            let k = dims.input as f64 * (1.0 - ratio) + self.k as f64 * ratio;
            selection.set_k((k as i64).min(dims.features));
        }
        Ok(())
    }

    fn log(&self, row: &mut Map<String, Value>) {
        row.insert("effective_l0".to_owned(), self.figures.effective_l0.into());
        let dead = self.fired.silent_for(self.settings.dead_feature_threshold).sum(Kind::Int64).int64_value(&[]);
        row.insert("dead_features".to_owned(), dead.into());
        // −1 if there is none, as in the reference.
        let pre_norm = self.figures.pre_norm_auxk_loss.as_ref().map_or(Value::from(-1), number);
        row.insert("pre_norm_auxk_loss".to_owned(), pre_norm);
    }

    fn state(&self) -> Result<State> {
        Ok(self.fired.state())
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.fired.restore(state)
    }
}

/// Returns the geometric median `[d]` of points `[N, d]`, by Weiszfeld's iteration from their mean.
///
/// A point at the current estimate has a very large weight; in the reference it makes everything NaN.
pub fn geometric_median(points: &Tensor) -> Tensor {
    let mut guess = points.mean_dim([0].as_slice(), false, Kind::Float);
    for _ in 0..100 {
        // A point at the estimate would have infinite weight.
        let distances = (points - &guess).norm_scalaropt_dim(2.0, [1], false).clamp_min(1e-12);
        let weights = distances.reciprocal();
        let weights = &weights / weights.sum(Kind::Float);
        let next = (weights.unsqueeze(1) * points).sum_dim_intlist([0].as_slice(), false, Kind::Float);
        let moved = (&next - &guess).norm().double_value(&[]);
        guess = next;
        if moved < 1e-5 {
            break;
        }
    }
    guess
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn geometric_median_of_a_constant_batch_is_the_point() {
        // The mean is the point itself: every distance is 0, and 0/0 must not occur.
        let points = Tensor::from_slice2(&[[1.0f32, 2.0], [1.0, 2.0], [1.0, 2.0]]);
        let apart = (geometric_median(&points) - points.get(0)).abs().max().double_value(&[]);
        assert!(apart < 1e-6, "{apart}");
    }

    #[test]
    fn geometric_median_of_a_line_is_its_middle_point() {
        // In one dimension it is the median, 1; the mean is 34.
        let points = Tensor::from_slice2(&[[0.0f32, 0.0], [1.0, 0.0], [101.0, 0.0]]);
        let median = Vec::<f32>::try_from(geometric_median(&points)).unwrap();
        assert!((median[0] - 1.0).abs() < 0.05 && median[1] == 0.0, "{median:?}");
    }

    #[test]
    fn a_row_without_positive_features_leaves_the_threshold_finite() {
        let selection = Selection::new(2, false, Device::Cpu);
        let threshold = |rows: &[[f32; 2]]| {
            selection.update_threshold(&smallest_positive(&Tensor::from_slice2(rows)), 0.5);
            selection.threshold().double_value(&[])
        };
        assert_eq!(threshold(&[[0.0, 0.0]]), -1.0);
        assert_eq!(threshold(&[[3.0, 1.0], [0.0, 0.0]]), 1.0);
        assert_eq!(threshold(&[[0.0, 0.0], [0.0, 0.0]]), 1.0);
        // Smallest positive of the rows: 3 and 9, mean 6; 0.5 · 1 + 0.5 · 6.
        assert_eq!(threshold(&[[5.0, 3.0], [9.0, 0.0]]), 3.5);
    }
}
