//! Ghost gradients: Jermyn and Templeton 2024, *Ghost Grads: An improvement on resampling*,
//! <https://transformer-circuits.pub/2024/jan-update/index.html#dict-learning-resampling>.
//!
//! A dead feature gets no gradient through its ReLU. So the dead features alone reconstruct the residual, through an
//! exponential. With pre-activations π `[F]`, the dead features' decoder columns W_d, and the residual r = x − x̂:
//!
//! ```text
//! g  = W_d exp(π)
//! g' = g ‖r‖ / (2 ‖g‖)          (the norms are constants)
//! L' = ‖r − g'‖                  (r is a constant; mean over the batch)
//! L += L' · L_rec / L'           (the quotient is a constant)
//! ```
//!
//! Dead features thus contribute as much loss as the reconstruction, whatever the size of their exponentials. This
//! follows the reference's code of spring 2024, which uses norms instead of their squares and counts steps.

use dictlearn_core::prelude::*;

/// Keeps quotients of zeros finite; the reference's value.
const EPSILON: f64 = 1e-8;

/// Gives dead features gradients through the exponential of their pre-activations.
#[component(modifier "ghost_grads", summary = "Dead features reconstruct the residual through an exponential",
    paper = "Jermyn and Templeton 2024, Ghost Grads, \
        https://transformer-circuits.pub/2024/jan-update/index.html#dict-learning-resampling",
    example = "{type: ghost_grads, threshold: 50}")]
pub struct GhostGradsConfig {
    /// A feature is dead after more than this many steps (or tokens, see `unit`) without firing.
    #[schemars(range(min = 0))]
    pub threshold: u64,
    /// Unit of `threshold`.
    #[default]
    pub unit: Unit,
}

/// Unit of a threshold.
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
    /// Counters after the current step, kept once it is taken.
    next: Option<Firing>,
}

impl Modifier for GhostGrads {
    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        // Features that were dead before this batch.
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

/// Mean distance of the ghost reconstruction by the features `dead`, indices `[n]`, from the residual.
fn ghost_loss(pass: &Pass, dead: &Tensor) -> Result<Tensor> {
    let directions = pass.dictionary.directions().context("the dictionary has no decoder")?.index_select(0, dead);
    // Only the ghost's direction matters, so a common factor can keep the exponentials finite: in a TopK dictionary
    // dead features can have large pre-activations.
    let pre_activations = pass.code.extra("pre_activations")?.index_select(-1, dead);
    let most = pre_activations.detach().amax([-1], true).clamp_min(0.0);
    let ghost = (pre_activations - most).exp().matmul(&directions);
    let norms = |x: &Tensor| x.detach().norm_scalaropt_dim(2.0, [-1], true);
    let residual = pass.residual().detach();
    let ghost = &ghost * (norms(&residual) / (norms(&ghost) * 2.0 + EPSILON));
    let distance = (residual - ghost).norm_scalaropt_dim(2.0, [-1], false);
    Ok(distance.mean(distance.kind()))
}
