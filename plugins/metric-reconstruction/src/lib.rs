//! How well a dictionary reconstructs activations, in the reference's figures.
//!
//! With activations x, reconstructions x̂ and features f, over all evaluated activations:
//!
//! ```text
//! l2_loss                       mean ‖x − x̂‖
//! l1_loss                       mean ‖f‖₁
//! l0                            mean number of nonzero features
//! frac_variance_explained       1 − Σ Var(x − x̂) / Σ Var(x), sums over dimensions
//! cossim                        mean cosine of x and x̂, over nonzero x
//! l2_ratio                      mean ‖x̂‖ / ‖x‖, over the same
//! relative_reconstruction_bias  mean ‖x̂‖² / mean x·x̂   (Rajamanoharan et al. 2024, eq. 10)
//! frac_alive                    fraction of features that were ever nonzero
//! ```
//!
//! Where this differs from the reference: variance explained and bias are ratios of totals, not means of the batches'
//! ratios, and `frac_alive` covers all evaluated activations. With one batch the results agree.

use dictlearn_core::prelude::*;

/// Maximum number of feature elements in memory at a time.
const FEATURES_AT_A_TIME: i64 = 1 << 25;

/// Measures reconstruction error and sparsity.
#[component(metric "reconstruction", summary = "Variance explained, L0, L1, L2, cosine similarity, bias, live features",
    example = "{type: reconstruction, n_batches: 10}", default)]
pub struct ReconstructionConfig {
    /// Number of batches to measure on.
    #[default(10)]
    #[schemars(range(min = 1))]
    pub n_batches: u64,
}

impl Metric for ReconstructionConfig {
    fn evaluate(&mut self, subjects: &[Subject], source: &mut dyn ActivationSource) -> Result<Option<Vec<Figures>>> {
        let mut totals: Vec<Totals> = subjects.iter().map(|subject| Totals::new(subject.dictionary)).collect();
        for _ in 0..self.n_batches {
            let Some(activations) = source.next_batch()? else { break };
            for (Subject { dictionary, site }, totals) in subjects.iter().zip(&mut totals) {
                let batch = &activations.sites[*site];
                let rows = (FEATURES_AT_A_TIME / dictionary.dims().features).max(1);
                for (x, target) in batch.x.split(rows, 0).iter().zip(batch.target.split(rows, 0)) {
                    totals.add(*dictionary, x, &target);
                }
            }
        }
        if totals.iter().any(|totals| totals.count == 0.0) {
            return Ok(None);
        }
        Ok(Some(totals.iter().map(Totals::figures).collect()))
    }
}

/// Sums over activations, accumulated in float64.
struct Totals {
    count: f64,
    l2: f64,
    l1: f64,
    l0: f64,
    nonzero: f64,
    cossim: f64,
    l2_ratio: f64,
    x_hat_squared: f64,
    x_dot_x_hat: f64,
    variance: Variance,
    residual_variance: Variance,
    alive: Option<Tensor>,
    features: f64,
}

impl Totals {
    fn new(dictionary: &dyn Dictionary) -> Self {
        Totals {
            count: 0.0,
            l2: 0.0,
            l1: 0.0,
            l0: 0.0,
            nonzero: 0.0,
            cossim: 0.0,
            l2_ratio: 0.0,
            x_hat_squared: 0.0,
            x_dot_x_hat: 0.0,
            variance: Variance::default(),
            residual_variance: Variance::default(),
            alive: None,
            features: dictionary.dims().features as f64,
        }
    }

    fn add(&mut self, dictionary: &dyn Dictionary, x: &Tensor, target: &Tensor) {
        let (x_hat, features) = dictionary.reconstruct(x);
        let residual = target - &x_hat;
        let norm = |x: &Tensor| x.norm_scalaropt_dim(2.0, [-1], false);
        let sum = |x: Tensor| x.sum(Kind::Double).double_value(&[]);
        let (target_norm, x_hat_norm) = (norm(target), norm(&x_hat));
        let dot = (target * &x_hat).sum_dim_intlist(-1, false, Kind::Float);
        let active = features.not_equal(0.0);

        self.count += x.size()[0] as f64;
        self.l2 += sum(norm(&residual));
        self.l1 += sum(features.abs());
        self.l0 += active.sum(Kind::Int64).double_value(&[]);
        // Cosine and norm ratio are undefined for an activation that is 0.
        let some = target_norm.gt(0.0);
        self.nonzero += some.sum(Kind::Int64).double_value(&[]);
        let least = f64::from(f32::MIN_POSITIVE);
        self.cossim += sum(&dot / (&target_norm * &x_hat_norm).clamp_min(least) * &some);
        self.l2_ratio += sum(&x_hat_norm / target_norm.clamp_min(least) * &some);
        self.x_hat_squared += sum(x_hat_norm.square());
        self.x_dot_x_hat += sum(dot);
        self.variance.add(target);
        self.residual_variance.add(&residual);
        let active = active.any_dim(0, false);
        self.alive = Some(match &self.alive {
            Some(alive) => alive.logical_or(&active),
            None => active,
        });
    }

    fn figures(&self) -> Figures {
        let alive = self.alive.as_ref().map_or(0.0, |alive| alive.sum(Kind::Int64).double_value(&[]));
        figures([
            ("l2_loss", self.l2 / self.count),
            ("l1_loss", self.l1 / self.count),
            ("l0", self.l0 / self.count),
            ("frac_variance_explained", 1.0 - self.residual_variance.total() / self.variance.total()),
            ("cossim", self.cossim / self.nonzero),
            ("l2_ratio", self.l2_ratio / self.nonzero),
            ("relative_reconstruction_bias", self.x_hat_squared / self.x_dot_x_hat),
            ("frac_alive", alive / self.features),
        ])
    }
}
