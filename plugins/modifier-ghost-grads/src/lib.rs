//! Ghost gradients: Jermyn and Templeton 2024, *Ghost Grads: An improvement on resampling*,
//! <https://transformer-circuits.pub/2024/jan-update/index.html#dict-learning-resampling>.
//!
//! A feature that has been silent for long gets no gradient through its ReLU. So a second reconstruction, of what the
//! first left over, is made of the dead features alone, through an exponential. With pre-activations π `[F]`, the columns
//! W_d of the dead, and the residual r = x − x̂:
//!
//! ```text
//! g  = W_d exp(π)
//! g' = g ‖r‖ / (2 ‖g‖)          (the norms are constants)
//! L' = ‖r − g'‖                  (r is a constant; mean over the batch)
//! L += L' · L_rec / L'           (the quotient is a constant)
//! ```
//!
//! Dead features thus pull with as much loss as the reconstruction has, whatever the size of their exponentials. It
//! follows the reference's code of spring 2024, which takes norms and not their squares and counts steps.

use dictlearn_core::prelude::*;

/// Keeps quotients of zeros finite; the reference's value.
const EPSILON: f64 = 1e-8;

/// Gradients for dead features, through the exponential of their pre-activations.
#[component(modifier "ghost_grads", summary = "Dead features reconstruct the residual through their exponential",
    paper = "Jermyn and Templeton 2024, Ghost Grads, \
        https://transformer-circuits.pub/2024/jan-update/index.html#dict-learning-resampling",
    example = "{type: ghost_grads, threshold: 50}")]
pub struct GhostGradsConfig {
    /// A feature is dead that has been silent for more than so many steps, or tokens.
    #[schemars(range(min = 0))]
    pub threshold: u64,
    /// What the threshold counts.
    #[default]
    pub unit: Unit,
}

/// What a threshold counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Unit {
    /// Batches.
    #[default]
    Steps,
    /// Activations.
    Tokens,
}

impl ModifierConfig for GhostGradsConfig {
    fn needs(&self) -> Vec<Requirement> {
        vec![Requirement::PreActivations, Requirement::Decoder]
    }

    fn build(&self, cx: &ModifierCx) -> Result<Box<dyn Modifier>> {
        let firing = Firing::new(cx.dictionary.dims().features, cx.dictionary.device());
        let threshold = self.threshold.try_into().unwrap_or(i64::MAX);
        Ok(Box::new(GhostGrads { threshold, unit: self.unit, firing, next: None }))
    }
}

struct GhostGrads {
    threshold: i64,
    unit: Unit,
    firing: Firing,
    /// The counters if the step is taken.
    next: Option<Firing>,
}

impl Modifier for GhostGrads {
    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        // Those that were dead before this batch.
        let threshold = self.threshold.saturating_add(1);
        if let Some(dead) = self.firing.silent_indices(threshold) {
            let ghost_loss = ghost_loss(pass, &dead)?;
            if let Some(reconstruction) = terms.reconstruction() {
                let scale = reconstruction.detach() / (ghost_loss.detach() + EPSILON);
                terms.add("ghost_loss", ghost_loss * scale, 1.0);
            }
        }
        let fired = pass.code.features.detach().not_equal(0.0).any_dim(0, false);
        let amount = if self.unit == Unit::Steps { 1 } else { pass.batch.x.size()[0] };
        let next = self.firing.after(&fired, amount);
        if pass.logging {
            terms.log("ghosts", next.silent_for(threshold).sum(Kind::Int64));
        }
        self.next = Some(next);
        Ok(())
    }

    fn after_step(&mut self, _: &mut AfterStep) -> Result<()> {
        if let Some(next) = self.next.take() {
            self.firing = next;
        }
        Ok(())
    }

    fn state(&self) -> Result<State> {
        Ok(self.firing.state())
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.firing.restore(state)
    }
}

/// How far the ghosts of these features, indices `[n]`, are from the residual.
fn ghost_loss(pass: &Pass, dead: &Tensor) -> Result<Tensor> {
    let directions = pass.dictionary.directions().context("the dictionary has no decoder")?.index_select(0, dead);
    // Only the ghost's direction matters, so that a common factor may keep exponentials finite: in a TopK dictionary dead
    // features can have large pre-activations.
    let pre_activations = pass.code.extra("pre_activations")?.index_select(-1, dead);
    let most = pre_activations.detach().amax([-1], true).clamp_min(0.0);
    let ghost = (pre_activations - most).exp().matmul(&directions);
    let norms = |x: &Tensor| x.detach().norm_scalaropt_dim(2.0, [-1], true);
    let residual = pass.residual().detach();
    let ghost = &ghost * (norms(&residual) / (norms(&ghost) * 2.0 + EPSILON));
    let distance = (residual - ghost).norm_scalaropt_dim(2.0, [-1], false);
    Ok(distance.mean(distance.kind()))
}
