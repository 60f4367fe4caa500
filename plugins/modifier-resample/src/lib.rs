//! Resampling of dead features for trainers that have none of their own: Bricken et al. 2023, *Towards Monosemanticity*,
//! "Neuron resampling", <https://transformer-circuits.pub/2023/monosemantic-features>.
//!
//! Every so many steps each feature that has been silent for too long starts anew from an activation that the dictionary
//! reconstructs badly ([`Resampling`]). As in the reference the new encoder row is the activation itself times a fifth of
//! the living rows' norm, which the paper takes of the activation's direction: with `normalize_activations` it is about
//! the same, without it large activations make large features. The learning rate goes on as the trainer says; `standard`, `p_anneal` and
//! `gated_anneal`, which warm it up again, have a field `resample_steps` of their own.

use dictlearn_core::prelude::*;

/// Dead features start anew.
#[component(modifier "resample", summary = "Dead features start anew from activations that are reconstructed badly",
    paper = "Bricken et al. 2023, Towards Monosemanticity, \
        https://transformer-circuits.pub/2023/monosemantic-features", example = "{type: resample, every: 100}")]
pub struct ResampleConfig {
    /// Resample every so many steps.
    #[schemars(range(min = 1))]
    pub every: u64,
    /// A feature is dead that has been silent for more than so many steps; half of `every` if it is null.
    pub dead_after: Option<u64>,
    /// No more resampling from this step on, so that what starts anew has time to learn; null for never.
    pub until: Option<u64>,
    /// How activations are drawn for dead features: by their `loss` (the reference) or `loss_squared` (the paper).
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
    /// How many features started anew so far, which is logged.
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
