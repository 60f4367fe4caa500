//! Resampling of dead features (Bricken et al. 2023, "Neuron resampling"): a dead feature restarts from an activation
//! that the dictionary reconstructs badly.

use anyhow::{Result, anyhow, bail};
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::firing::Firing;
use super::trainer::AfterStep;
use crate::error::InputError;
use crate::files::state::State;
use crate::machine::ranks;
use crate::sae::{Dictionary, Encoder};

/// Probability with which an activation is drawn for a dead feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum ResampleWeight {
    /// Proportional to its loss, the norm of its residual, as in the reference.
    #[default]
    Loss,
    /// Proportional to its squared loss, as in the paper.
    LossSquared,
}

/// Whether a dictionary's features can be resampled.
pub(crate) fn can_resample(dictionary: &dyn Dictionary) -> bool {
    dictionary.encoder().is_some() && dictionary.decoder().is_some()
}

/// Resampling at regular steps, for trainers with a field `resample_steps`.
#[derive(Debug)]
pub struct Resampling {
    every: u64,
    /// Number of silent steps from which a feature is dead.
    dead_from: u64,
    /// Remainder, modulo `every`, of the steps at which resampling happens.
    at: u64,
    weight: ResampleWeight,
    firing: Firing,
    /// Counters to keep if the step is taken.
    next: Option<Firing>,
}

impl Resampling {
    /// Resamples at the last of every `every` steps; `None` if the trainer's `resample_steps` is null.
    ///
    /// A feature is dead after more than `every / 2` silent steps.
    pub fn new(every: Option<u64>, weight: ResampleWeight, dictionary: &dyn Dictionary) -> Result<Option<Self>> {
        let Some(every) = every else { return Ok(None) };
        if !can_resample(dictionary) {
            bail!(
                InputError::new(format!("the features of the class {} cannot be resampled", dictionary.class()))
                    .field("resample_steps")
                    .help("leave `resample_steps` out")
            );
        }
        Ok(Some(Resampling::every(every, None, weight, dictionary)))
    }

    /// Resamples at the last of every `every` steps. A feature is dead after more than `dead_after` silent steps;
    /// `None` means `every / 2`.
    pub fn every(every: u64, dead_after: Option<u64>, weight: ResampleWeight, dictionary: &dyn Dictionary) -> Self {
        let firing = Firing::new(dictionary.dims().features, dictionary.device());
        let dead_from = dead_after.unwrap_or(every / 2).saturating_add(1);
        Resampling { every, dead_from, at: every.saturating_sub(1), weight, firing, next: None }
    }

    /// Resamples at the first of every `every` steps instead.
    #[must_use]
    pub fn at_multiples(mut self) -> Self {
        self.at = 0;
        self
    }

    /// Notes which features of a batch fired, bool `[F]`; [`Resampling::after_step`] counts them.
    pub fn see(&mut self, fired: &Tensor) {
        self.next = Some(self.firing.after(fired, 1));
    }

    /// Counts the features that fired in the step.
    pub fn count(&mut self) {
        if let Some(next) = self.next.take() {
            self.firing = next;
        }
    }

    /// Counts the features that fired in the step and resamples dead ones when due. Returns the number resampled.
    pub fn after_step(&mut self, cx: &mut AfterStep) -> Result<i64> {
        self.count();
        let mut count = 0;
        if cx.step % self.every == self.at {
            let dead = self.firing.silent_for(self.dead_from.try_into().unwrap_or(i64::MAX));
            count = resample(cx, &dead, self.weight)?;
            // Resampled features get time to fire.
            self.firing.reset(&dead);
        }
        Ok(count)
    }

    /// Returns the state for a checkpoint.
    pub fn state(&self) -> State {
        self.firing.state()
    }

    /// Restores what [`Resampling::state`] returned.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        self.firing.restore(state)
    }
}

/// Resamples dead features, bool `[F]`, at most one per activation of the batch. Returns the number resampled.
///
/// Each draws an activation without replacement. Its decoder direction becomes that of the activation's target. Its
/// encoder row becomes the activation times 0.2 times the mean norm of the live rows. Its biases and moments become 0.
fn resample(cx: &mut AfterStep, dead: &Tensor, weight: ResampleWeight) -> Result<i64> {
    tch::no_grad(|| {
        let dead_indices = Vec::<i64>::try_from(dead.nonzero().reshape([-1]))?;
        if dead_indices.is_empty() {
            return Ok(0);
        }
        let missing = || anyhow!("the features of the class {} cannot be resampled", cx.dictionary.class());
        let Encoder { weight: encoder, biases } = cx.dictionary.encoder().ok_or_else(missing)?;
        let decoder = cx.dictionary.decoder().ok_or_else(missing)?;

        let (x, target) = (ranks::gather_rows(&cx.batch.x), ranks::gather_rows(&cx.batch.target));
        let (x_hat, _) = cx.dictionary.reconstruct(&x);
        let loss = (&target - x_hat).norm_scalaropt_dim(2.0, [-1], false).to_kind(Kind::Double);
        let loss = if weight == ResampleWeight::LossSquared { loss.square() } else { loss };
        let drawn = draw(&Vec::<f64>::try_from(loss)?, dead_indices.len(), cx.rng);
        let count = drawn.len();
        let device = dead.device();
        let features = Tensor::from_slice(&dead_indices[..count]).to_device(device);
        let drawn = Tensor::from_slice(&drawn).to_device(device);
        let (inputs, targets) = (x.index_select(0, &drawn), target.index_select(0, &drawn));

        let parameter = |name: &str| {
            let found = cx.dictionary.parameters().into_iter().find(|(known, _)| *known == name);
            found.map(|(_, tensor)| tensor).ok_or_else(|| anyhow!("no parameter `{name}`"))
        };
        let norms = encoder.norms();
        let alive = dead.logical_not();
        let alive_norm = if bool::try_from(alive.any())? {
            norms.masked_select(&alive).mean(Kind::Float)
        } else {
            norms.mean(Kind::Float)
        };
        let rows = inputs * alive_norm * 0.2;
        let _ = encoder.rows().index_copy_(0, &features, &rows);
        let directions = &targets / targets.norm_scalaropt_dim(2.0, [-1], true).clamp_min(1e-12);
        let _ = decoder.rows().index_copy_(0, &features, &directions);
        let mut forget = vec![(encoder.name, encoder.feature_dim), (decoder.name, decoder.feature_dim)];
        for name in biases {
            let _ = parameter(name)?.index_fill_(0, &features, 0.0);
            forget.push((name, 0));
        }
        for (name, dim) in forget {
            if let Some(moments) = cx.optimizer.moments(name) {
                let _ = moments.exp_avg.index_fill_(dim, &features, 0.0);
                let _ = moments.exp_avg_sq.index_fill_(dim, &features, 0.0);
            }
        }
        Ok(count as i64)
    })
}

/// Draws up to `count` indices without replacement, in proportion to their weights. Indices of weight 0 are never
/// drawn.
fn draw(weights: &[f64], count: usize, rng: &mut crate::machine::rng::Rng) -> Vec<i64> {
    let mut drawn = Vec::with_capacity(count);
    let Ok(mut index) = WeightedIndex::new(weights) else { return drawn };
    while drawn.len() < count {
        let next = index.sample(rng);
        drawn.push(next as i64);
        // An error means that no positive weight is left.
        if index.update_weights(&[(next, &0.0)]).is_err() {
            break;
        }
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_without_replacement_and_skip_zero_weights() {
        let mut rng = crate::machine::rng::rng(1, "test");
        let mut drawn = draw(&[1.0, 0.0, 2.0, 3.0], 10, &mut rng);
        drawn.sort_unstable();
        assert_eq!(drawn, [0, 2, 3]);
        assert!(draw(&[0.0, 0.0], 2, &mut rng).is_empty());
    }
}
