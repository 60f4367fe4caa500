//! The tanh penalty: Jermyn, Templeton, Batson and Bricken 2024, *Tanh Penalty in Dictionary Learning*,
//! <https://transformer-circuits.pub/2024/feb-update/index.html#dict-learning-tanh>.
//!
//! An L1 penalty pulls on large features as hard as on small ones, so it shrinks all of them. A hyperbolic tangent
//! saturates: beyond the scale s, a feature's cost no longer depends on its size. The penalty then approaches the number
//! of active features.
//!
//! ```text
//! L = mean ‖x − x̂‖² + λ mean Σ tanh(f / s)
//! ```

use dictlearn_core::prelude::*;

/// Squared error with a saturating penalty. Every decoder direction keeps norm 1.
#[component(trainer "tanh", summary = "Squared error with a saturating penalty",
    paper = "Jermyn et al. 2024, Tanh Penalty in Dictionary Learning, \
        https://transformer-circuits.pub/2024/feb-update/index.html#dict-learning-tanh",
    example = "{type: tanh, lr: 2e-3, sparsity_penalty: 0.02}", default_dictionary = "auto_encoder",
    fields(lr = 1e-3, ..))]
pub struct TanhConfig {
    /// Weight λ of the penalty: the cost of a saturated feature.
    #[default(0.05)]
    #[schemars(range(min = 0))]
    pub sparsity_penalty: f64,
    /// Feature magnitude s at which the penalty saturates.
    #[default(1.0)]
    #[schemars(range(min = 1e-6))]
    pub scale: f64,
}

impl TrainerConfig for TanhConfig {
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
        penalizable(cx.dictionary, Self::NAME)?;
        Ok(Box::new(self.clone()))
    }
    fn class(&self) -> &'static str {
        "TanhTrainer"
    }
}

impl Trainer for TanhConfig {
    fn schedule(&self) -> Schedule {
        Schedule::constant(self.lr)
    }
    fn constraints(&self) -> Constraints {
        Constraints { unit_norm_decoder: true, clip_gradients: None }
    }
    fn objective(&self, _step: u64) -> Option<Objective<'_>> {
        let s = self.scale;
        let slope = move |f: &Tensor| (1.0 - (f / s).tanh().square()) / s;
        Some(Objective::squared_error(Penalty::of(self.sparsity_penalty, move |f| (f / s).tanh(), slope)))
    }
}
