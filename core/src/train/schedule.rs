//! Schedules, step for step as in the reference: learning-rate warm-up and decay, and sparsity warm-up.

use std::fmt::Display;

use anyhow::Result;
use serde::de::DeserializeOwned;
use serde_yaml::Value;

use crate::error::{InputError, Mistakes};

/// Schedule of a learning rate and of a sparsity penalty.
///
/// Both warm up linearly from 0 at step 0, so the first step changes no weight, as in the reference.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// Peak learning rate.
    pub lr: f64,
    /// Total steps that the schedule is planned for.
    pub steps: u64,
    /// Steps over which the learning rate rises to its peak.
    pub warmup_steps: u64,
    /// Step from which the learning rate falls linearly, reaching 0 at `steps`.
    pub decay_start: Option<u64>,
    /// With resampling: interval in steps at which the warm-up restarts.
    pub resample_steps: Option<u64>,
    /// Steps over which the sparsity penalty rises to its full weight.
    pub sparsity_warmup_steps: Option<u64>,
}

impl Schedule {
    /// Returns a schedule with a constant learning rate and penalty.
    pub fn constant(lr: f64) -> Self {
        Schedule { lr, steps: 0, warmup_steps: 0, decay_start: None, resample_steps: None, sparsity_warmup_steps: None }
    }

    /// Checks that the parts fit each other and the length of the run. The error lists every part that does not.
    pub fn check(self) -> Result<Self> {
        let Schedule { steps, warmup_steps, decay_start, resample_steps, sparsity_warmup_steps, lr: _ } = self;
        let mut mistakes = Mistakes::new();
        let mut refused =
            |field: &str, message: String, help: &str| mistakes.add(InputError::new(message).field(field).help(help));
        if warmup_steps >= steps {
            refused(
                "warmup_steps",
                format!("`warmup_steps` is {warmup_steps}, but the run has only {steps} steps"),
                "`warmup_steps` must be less than `steps`",
            );
        }
        if let Some(warmup) = sparsity_warmup_steps.filter(|warmup| *warmup >= steps) {
            refused(
                "sparsity_warmup_steps",
                format!("`sparsity_warmup_steps` is {warmup}, but the run has only {steps} steps"),
                "`sparsity_warmup_steps` must be less than `steps`",
            );
        }
        if let Some(every) = resample_steps
            && (every == 0 || every >= steps)
        {
            refused(
                "resample_steps",
                format!("`resample_steps` is {every}, but the run has {steps} steps"),
                "`resample_steps` must be above 0 and less than `steps`",
            );
        }
        if let Some(start) = decay_start {
            if resample_steps.is_some() {
                refused(
                    "decay_start",
                    "both `decay_start` and `resample_steps` are given".to_owned(),
                    "each resampling restarts the warm-up: leave one of them out",
                );
            }
            // A warm-up that does not end is reported above.
            let ends = |warmup: &u64| *warmup < steps;
            let warm =
                [Some(warmup_steps), sparsity_warmup_steps].into_iter().flatten().filter(ends).max().unwrap_or(0);
            let message = if start >= steps {
                Some(format!("`decay_start` is {start}, but the run has only {steps} steps"))
            } else if start == 0 {
                Some("`decay_start` is 0, the first step".to_owned())
            } else if start <= warm {
                Some(format!("`decay_start` is {start}, but the warm-up ends at step {warm}"))
            } else {
                None
            };
            if let Some(message) = message {
                refused(
                    "decay_start",
                    message,
                    "`decay_start` must come after `warmup_steps` and `sparsity_warmup_steps` and before `steps`",
                );
            }
        }
        mistakes.into_result()?;
        Ok(self)
    }

    /// Returns the learning rate at a step.
    pub fn lr(&self, step: u64) -> f64 {
        self.lr * self.lr_factor(step)
    }

    /// Returns the factor of the learning rate at a step, between 0 and 1.
    pub fn lr_factor(&self, step: u64) -> f64 {
        let warmup = self.warmup_steps as f64;
        if let Some(every) = self.resample_steps {
            if self.warmup_steps == 0 {
                return 1.0;
            }
            return ((step % every) as f64 / warmup).min(1.0);
        }
        if step < self.warmup_steps {
            return step as f64 / warmup;
        }
        match self.decay_start {
            Some(start) if step >= start => self.steps.saturating_sub(step) as f64 / (self.steps - start) as f64,
            _ => 1.0,
        }
    }

    /// Whether the schedule depends on the planned number of steps.
    pub fn depends_on_steps(&self) -> bool {
        self.decay_start.is_some()
    }

    /// Returns the factor of the sparsity penalty at a step, between 0 and 1.
    pub fn sparsity_factor(&self, step: u64) -> f64 {
        match self.sparsity_warmup_steps {
            None | Some(0) => 1.0,
            Some(warmup) => (step as f64 / warmup as f64).min(1.0),
        }
    }
}

/// Run length that defaults in steps are planned for. They shrink in proportion in shorter runs.
pub const FULL_LENGTH: u64 = 10_000;

/// Length of a run, to which omitted fields adapt their defaults ([`TrainerConfig::adapt`]).
///
/// A run of [`FULL_LENGTH`] steps or more keeps every default that is valid. A resumed run keeps the defaults of its
/// first start, even if it is extended.
///
/// [`TrainerConfig::adapt`]: crate::train::trainer::TrainerConfig::adapt
pub struct RunLength<'a> {
    steps: u64,
    batch_size: Option<u64>,
    written: &'a dyn Fn(&str) -> bool,
    begun: Option<&'a Value>,
    adapted: Vec<String>,
}

impl<'a> RunLength<'a> {
    /// Describes a run of this many steps, with batches of this many activations if known. `written` tells whether the
    /// config sets a field of the trainer. `begun` is the trainer's config in the run being resumed.
    pub fn new(
        steps: u64,
        batch_size: Option<u64>,
        written: &'a dyn Fn(&str) -> bool,
        begun: Option<&'a Value>,
    ) -> Self {
        RunLength { steps, batch_size, written, begun, adapted: Vec::new() }
    }

    /// Number of steps.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Number of activations that an SAE trains on, if known.
    pub fn tokens(&self) -> Option<u64> {
        Some(self.steps.saturating_mul(self.batch_size?))
    }

    /// Whether defaults in steps must shrink for this run.
    pub fn is_short(&self) -> bool {
        self.steps < FULL_LENGTH
    }

    /// Returns the changes: `warmup_steps 1000 -> 10`.
    pub fn into_adapted(self) -> Vec<String> {
        self.adapted
    }

    /// Limits a field's default.
    pub fn at_most<T: Copy + PartialOrd + Display + DeserializeOwned>(&mut self, field: &str, value: &mut T, most: T) {
        if (self.written)(field) {
            return;
        }
        let begun = self.begun.and_then(|begun| serde_yaml::from_value(begun.get(field)?.clone()).ok());
        let adapted = begun.unwrap_or(if *value > most { most } else { *value });
        if adapted != *value {
            self.adapted.push(format!("{field} {value} -> {adapted}"));
            *value = adapted;
        }
    }

    /// Shrinks a default number of steps in proportion, in a run shorter than [`FULL_LENGTH`].
    pub fn shrink(&mut self, field: &str, value: &mut u64) {
        let most = self.in_proportion(*value);
        self.at_most(field, value, most);
    }

    /// Shrinks the defaults of warm-ups likewise; they also must end before the learning rate decays.
    pub fn shrink_warm_ups(&mut self, warmup: &mut u64, sparsity_warmup: &mut Option<u64>, decay_start: Option<u64>) {
        let before = decay_start.map_or(u64::MAX, |start| start.saturating_sub(1));
        let most = self.in_proportion(*warmup).min(before);
        self.at_most("warmup_steps", warmup, most);
        if let Some(warmup) = sparsity_warmup {
            let most = self.in_proportion(*warmup).min(before);
            self.at_most("sparsity_warmup_steps", warmup, most);
        }
    }

    /// In a short run, limits the default of `dead_feature_threshold` to a fifth of the run's tokens.
    pub fn shrink_dead_feature_threshold(&mut self, threshold: &mut i64) {
        let fifth = self.tokens().filter(|_| self.is_short()).map(|tokens| (tokens / 5).max(1));
        let most = fifth.and_then(|fifth| i64::try_from(fifth).ok()).unwrap_or(i64::MAX);
        self.at_most("dead_feature_threshold", threshold, most);
    }

    fn in_proportion(&self, count: u64) -> u64 {
        if self.is_short() {
            // The product of two u64 fits into u128, and the quotient is at most `count`.
            (u128::from(count) * u128::from(self.steps) / u128::from(FULL_LENGTH)) as u64
        } else {
            count
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Schedule = Schedule {
        lr: 1.0,
        steps: 100,
        warmup_steps: 10,
        decay_start: None,
        resample_steps: None,
        sparsity_warmup_steps: None,
    };

    #[test]
    fn learning_rate_warms_up_and_decays() {
        let schedule = Schedule { decay_start: Some(80), ..PLAIN }.check().unwrap();
        assert_eq!(schedule.lr_factor(0), 0.0);
        assert_eq!(schedule.lr_factor(5), 0.5);
        assert_eq!(schedule.lr_factor(10), 1.0);
        assert_eq!(schedule.lr_factor(80), 1.0);
        assert_eq!(schedule.lr_factor(90), 0.5);
        assert_eq!(schedule.lr_factor(100), 0.0);
    }

    #[test]
    fn warm_up_restarts_after_resampling() {
        let schedule = Schedule { resample_steps: Some(50), ..PLAIN }.check().unwrap();
        assert_eq!(schedule.lr_factor(49), 1.0);
        assert_eq!(schedule.lr_factor(50), 0.0);
        assert_eq!(schedule.lr_factor(55), 0.5);
    }

    #[test]
    fn sparsity_warms_up() {
        let schedule = Schedule { sparsity_warmup_steps: Some(20), ..PLAIN };
        assert_eq!(schedule.sparsity_factor(5), 0.25);
        assert_eq!(schedule.sparsity_factor(40), 1.0);
        assert_eq!(PLAIN.sparsity_factor(0), 1.0);
    }

    #[test]
    fn inconsistent_schedules_are_errors() {
        for wrong in [
            Schedule { warmup_steps: 100, ..PLAIN },
            Schedule { sparsity_warmup_steps: Some(100), ..PLAIN },
            Schedule { decay_start: Some(10), ..PLAIN },
            Schedule { decay_start: Some(100), ..PLAIN },
            Schedule { resample_steps: Some(0), ..PLAIN },
            Schedule { resample_steps: Some(50), decay_start: Some(80), ..PLAIN },
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
    }
}
