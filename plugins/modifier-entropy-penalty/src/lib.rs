//! The entropy of an activation's features as a penalty. It is low where few features carry most of the sum, whatever
//! the sum, so it does not shrink features as L1 does.
//!
//! With features f `[F]` of an activation and ε = 1e-8:
//!
//! ```text
//! p = f / (Σ f + ε)
//! H = − Σ p log(p + ε)        (0 where Σ f = 0)
//! ```
//!
//! Where the penalised activations are not the features (a gate's, features times decoder norms), f stands for them.
//! The penalty is the mean of H over the batch, in nats. It comes from the reference of spring 2024 (commit bc09ba4);
//! it has no paper.

use dictlearn_core::prelude::*;

/// Keeps quotients and logarithms of zeros finite; the reference's value.
const EPSILON: f64 = 1e-8;

/// Penalises the entropy of each activation's features, normalised to sum to 1. Where the sparsity penalty applies to
/// something else (a gate's activations, features times decoder norms), it takes the entropy of that.
#[component(modifier "entropy_penalty",
    summary = "Entropy penalty on each activation's features, added to or replacing the sparsity term",
    example = "{type: entropy_penalty, weight: 0.02}")]
pub struct EntropyPenaltyConfig {
    /// Weight in the loss of the mean entropy, in nats.
    #[schemars(range(min = 0))]
    pub weight: f64,
    /// Whether it replaces the trainer's own sparsity term, which is then only logged, instead of adding to it.
    #[default]
    pub replace_sparsity: bool,
    /// Steps over which the weight rises from 0.
    #[default]
    pub warmup_steps: u64,
}

impl ModifierConfig for EntropyPenaltyConfig {
    fn needs(&self) -> Vec<Requirement> {
        if self.replace_sparsity { vec![Requirement::SparsityTerm] } else { Vec::new() }
    }

    fn build(&self, _: &ModifierCx) -> Result<Box<dyn Modifier>> {
        let EntropyPenaltyConfig { weight, replace_sparsity, warmup_steps } = *self;
        Ok(Box::new(EntropyPenalty { weight, replace_sparsity, warmup_steps }))
    }
}

struct EntropyPenalty {
    weight: f64,
    replace_sparsity: bool,
    warmup_steps: u64,
}

impl Modifier for EntropyPenalty {
    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        if self.replace_sparsity {
            terms.drop_sparsity();
        }
        let warm = if pass.step < self.warmup_steps { pass.step as f64 / self.warmup_steps as f64 } else { 1.0 };
        terms.add("entropy", entropy(pass.code.penalized()), self.weight * warm);
        Ok(())
    }
}

/// Mean entropy of the rows of a nonnegative tensor [B, F]: a scalar, in nats.
fn entropy(features: &Tensor) -> Tensor {
    let sums = features.sum_dim_intlist([-1].as_slice(), true, features.kind());
    let p = features / (&sums + EPSILON);
    // Where nothing fires, p is 0 and so is each product; `where` makes its gradient 0 too.
    let terms = (-&p * (&p + EPSILON).log()).where_self(&sums.greater(0.0), &Tensor::from(0f32).to_kind(p.kind()));
    mean_of_sums(&terms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_the_logarithm_of_the_number_of_equal_features() {
        let even = Tensor::from_slice2(&[[2f32, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]);
        // One row of four equal features, one without features.
        assert!((entropy(&even).double_value(&[]) - 4f64.ln() / 2.0).abs() < 1e-6);
        let single = Tensor::from_slice2(&[[0f32, 5.0, 0.0, 0.0]]);
        assert!(entropy(&single).double_value(&[]).abs() < 1e-6);
        // The sum does not matter.
        assert!((entropy(&(&even * 10.0)) - entropy(&even)).abs().double_value(&[]) < 1e-6);
    }

    #[test]
    fn a_row_without_features_gets_no_gradient() {
        let features = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        entropy(&features).backward();
        assert_eq!(features.grad().abs().sum(Kind::Float).double_value(&[]), 0.0);
    }
}
