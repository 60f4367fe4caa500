//! Resampling of dead features for trainers that do not resample: Bricken et al. 2023, *Towards Monosemanticity*,
//! "Neuron resampling", <https://transformer-circuits.pub/2023/monosemantic-features>.
//!
//! Every `every` steps, each dead feature is reinitialised from an activation that the dictionary reconstructs badly
//! ([`Resampling`]). As in the reference, the new encoder row is the activation times a fifth of the live rows' mean
//! norm; the paper normalises the activation first. With `normalize_activations` the two nearly agree; without it,
//! large activations make large features. The learning rate keeps the trainer's schedule. `standard`, `p_anneal` and
//! `gated_anneal` have their own field `resample_steps`, which also restarts the warm-up.

use dictlearn_core::prelude::*;

/// Resamples dead features.
#[component(modifier "resample", summary = "Reinitialises dead features from badly reconstructed activations",
    paper = "Bricken et al. 2023, Towards Monosemanticity, \
        https://transformer-circuits.pub/2023/monosemantic-features", example = "{type: resample, every: 100}")]
pub struct ResampleConfig {
    /// Steps between resamplings.
    #[schemars(range(min = 1))]
    pub every: u64,
    /// A feature is dead after more than this many steps without firing; null for half of `every`.
    pub dead_after: Option<u64>,
    /// Step from which resampling stops, so that resampled features have time to learn; null for never.
    pub until: Option<u64>,
    /// How activations are sampled: in proportion to their `loss` (the reference) or `loss_squared` (the paper).
    #[default]
    pub weight: ResampleWeight,
}

impl ModifierConfig for ResampleConfig {
    fn needs(&self) -> Vec<Requirement> {
        vec![Requirement::Resampling]
    }

    fn build(&self, cx: &ModifierCx) -> Result<Box<dyn Modifier>> {
        Ok(Box::new(Resample {
            until: self.until,
            resampling: Resampling::every(self.every, self.dead_after, self.weight, cx.dictionary),
            resampled: 0,
        }))
    }
}

struct Resample {
    until: Option<u64>,
    resampling: Resampling,
    /// Number of features resampled so far, which is logged.
    resampled: i64,
}

impl Modifier for Resample {
    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        self.resampling.see(&pass.code.fired());
        if pass.logging {
            terms.log("resampled", Tensor::from(self.resampled));
        }
        Ok(())
    }

    fn after_step(&mut self, cx: &mut AfterStep) -> Result<()> {
        if self.until.is_some_and(|until| cx.step >= until) {
            self.resampling.count();
        } else {
            self.resampled += self.resampling.after_step(cx)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<State> {
        let mut state = self.resampling.state();
        state.put("resampled", self.resampled)?;
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.resampled = state.get("resampled")?;
        self.resampling.restore(state)
    }
}
