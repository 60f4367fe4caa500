//! Schedules: learning-rate warm-up and decay, sparsity warm-up. Those of the reference, step for step.

use anyhow::{bail, Result};

use crate::config::InputError;

/// The schedule of a learning rate and of a sparsity penalty.
///
/// Both are linear from 0 at step 0, so the very first step moves no weight, as in the reference.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// Steps that the run is laid out for.
    pub steps: u64,
    /// Steps over which the learning rate rises to its full value.
    pub warmup_steps: u64,
    /// Step from which the learning rate falls linearly, to reach 0 at `steps`.
    pub decay_start: Option<u64>,
    /// With resampling: the warm-up starts again every so many steps.
    pub resample_steps: Option<u64>,
    /// Steps over which the sparsity penalty rises to its full value.
    pub sparsity_warmup_steps: Option<u64>,
}

impl Schedule {
    /// The schedule, if its parts fit each other and the length of the run.
    pub fn check(self) -> Result<Self> {
        let Schedule { steps, warmup_steps, decay_start, resample_steps, sparsity_warmup_steps } = self;
        let refused =
            |field: &str, message: String, help: &str| bail!(InputError::new(message).field(field).help(help));
        if warmup_steps >= steps {
            return refused(
                "warmup_steps",
                format!("`warmup_steps` is {warmup_steps}, but the run has only {steps} steps"),
                "`warmup_steps` must be less than `steps`",
            );
        }
        if let Some(warmup) = sparsity_warmup_steps.filter(|warmup| *warmup >= steps) {
            return refused(
                "sparsity_warmup_steps",
                format!("`sparsity_warmup_steps` is {warmup}, but the run has only {steps} steps"),
                "`sparsity_warmup_steps` must be less than `steps`",
            );
        }
        if let Some(every) = resample_steps {
            if every == 0 || every >= steps {
                return refused(
                    "resample_steps",
                    format!("`resample_steps` is {every}, and the run has {steps} steps"),
                    "`resample_steps` must be above 0 and less than `steps`",
                );
            }
        }
        if let Some(start) = decay_start {
            if resample_steps.is_some() {
                return refused(
                    "decay_start",
                    "both `decay_start` and `resample_steps` are given".to_owned(),
                    "resampling starts the warm-up again and again: leave one of them out",
                );
            }
            let warm = warmup_steps.max(sparsity_warmup_steps.unwrap_or(0));
            if start <= warm || start >= steps {
                return refused(
                    "decay_start",
                    format!("`decay_start` is {start}, with warm-ups until step {warm} and {steps} steps in all"),
                    "`decay_start` must come after `warmup_steps` and `sparsity_warmup_steps` and before `steps`",
                );
            }
        }
        Ok(self)
    }

    /// The factor of the learning rate at a step, between 0 and 1.
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

    /// Whether any of it depends on how many steps the run is laid out for.
    pub fn depends_on_steps(&self) -> bool {
        self.decay_start.is_some()
    }

    /// The factor of the sparsity penalty at a step, between 0 and 1.
    pub fn sparsity_factor(&self, step: u64) -> f64 {
        match self.sparsity_warmup_steps {
            None | Some(0) => 1.0,
            Some(warmup) => (step as f64 / warmup as f64).min(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Schedule =
        Schedule { steps: 100, warmup_steps: 10, decay_start: None, resample_steps: None, sparsity_warmup_steps: None };

    #[test]
    fn warms_up_and_decays() {
        let schedule = Schedule { decay_start: Some(80), ..PLAIN }.check().unwrap();
        assert_eq!(schedule.lr_factor(0), 0.0);
        assert_eq!(schedule.lr_factor(5), 0.5);
        assert_eq!(schedule.lr_factor(10), 1.0);
        assert_eq!(schedule.lr_factor(80), 1.0);
        assert_eq!(schedule.lr_factor(90), 0.5);
        assert_eq!(schedule.lr_factor(100), 0.0);
    }

    #[test]
    fn warms_up_again_after_resampling() {
        let schedule = Schedule { resample_steps: Some(50), ..PLAIN }.check().unwrap();
        assert_eq!(schedule.lr_factor(49), 1.0);
        assert_eq!(schedule.lr_factor(50), 0.0);
        assert_eq!(schedule.lr_factor(55), 0.5);
    }

    #[test]
    fn sparsity_rises() {
        let schedule = Schedule { sparsity_warmup_steps: Some(20), ..PLAIN };
        assert_eq!(schedule.sparsity_factor(5), 0.25);
        assert_eq!(schedule.sparsity_factor(40), 1.0);
        assert_eq!(PLAIN.sparsity_factor(0), 1.0);
    }

    #[test]
    fn refuses_what_does_not_fit() {
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
