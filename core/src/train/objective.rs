//! Reconstruction loss plus penalty, stated once. Autograd's loss and the analytic step both follow from it, with
//! float32 sums over the same values.
//!
//! ```text
//! L = mean_b ‖e_b‖² or mean_b ‖e_b‖  +  λ T(mean_b r(Σ_i h(a_bi)))
//! ```
//!
//! e is the residual, a the penalised activations, never negative. h, r and T are the identity unless a [`Penalty`]
//! says otherwise; the penalty is then λ mean ‖a‖₁.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::terms::{Terms, mean_of_sums};
use crate::machine::ranks;
use crate::sae::two_layer::{Block, Slope};

/// Error of the residuals `[B, d]`, averaged over the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum ResidualError {
    /// ‖x − x̂‖², the sum of squares.
    #[default]
    Mse,
    /// ‖x − x̂‖.
    L2Norm,
}

impl ResidualError {
    fn name(self) -> &'static str {
        match self {
            ResidualError::Mse => "mse_loss",
            ResidualError::L2Norm => "residual_norm",
        }
    }

    fn other(self) -> Self {
        match self {
            ResidualError::Mse => ResidualError::L2Norm,
            ResidualError::L2Norm => ResidualError::Mse,
        }
    }

    /// Returns the error, a scalar.
    fn of(self, residual: &Tensor) -> Tensor {
        match self {
            ResidualError::Mse => mean_of_sums(&residual.square()),
            ResidualError::L2Norm => residual.norm_scalaropt_dim(2.0, [-1], false).mean(residual.kind()),
        }
    }

    /// Returns its derivative with respect to the residuals, `[B, d]`.
    fn derivative(self, residual: &Tensor) -> Tensor {
        let rows = residual.size()[0] as f64;
        match self {
            ResidualError::Mse => residual * (2.0 / rows),
            ResidualError::L2Norm => {
                let norms = residual.norm_scalaropt_dim(2.0, [-1], true);
                // The norm has no derivative at 0; 0 is used.
                (residual / &norms).masked_fill(&norms.le(0.0), 0.0) / rows
            }
        }
    }
}

type Function<'a> = Box<dyn Fn(&Tensor) -> Tensor + 'a>;

/// h(a) and its derivative h'(a), which is 0 if omitted.
struct Each<'a> {
    value: Function<'a>,
    slope: Option<Function<'a>>,
}

/// Sparsity penalty λ T(mean_b r(Σ_i h(a_bi))) on activations a, never negative. h comes with its derivative; libtorch
/// differentiates r and T.
pub struct Penalty<'a> {
    name: &'static str,
    weight: f64,
    each: Option<Each<'a>>,
    row: Option<Function<'a>>,
    batch: Option<Function<'a>>,
}

impl<'a> Penalty<'a> {
    /// Returns the L1 penalty λ mean ‖a‖₁, named `sparsity_loss`.
    pub fn l1(weight: f64) -> Self {
        Penalty { name: "sparsity_loss", weight, each: None, row: None, batch: None }
    }

    /// Returns the L0 penalty λ mean ‖a‖₀, the number of activations above 0. It has no gradient.
    pub fn l0(weight: f64) -> Self {
        let value = Box::new(|activations: &Tensor| activations.gt(0.0).to_kind(Kind::Float));
        Penalty { each: Some(Each { value, slope: None }), ..Penalty::l1(weight) }
    }

    /// Returns the penalty λ mean Σ h(a). `value` and `slope` map float32 activations of any shape to h and h'.
    /// Autograd differentiates `value`, the analytic step uses `slope`, and the contract test compares them.
    pub fn of(weight: f64, value: impl Fn(&Tensor) -> Tensor + 'a, slope: impl Fn(&Tensor) -> Tensor + 'a) -> Self {
        let each = Each { value: Box::new(value), slope: Some(Box::new(slope)) };
        Penalty { each: Some(each), ..Penalty::l1(weight) }
    }

    /// Renames the term.
    #[must_use]
    pub fn named(self, name: &'static str) -> Self {
        Penalty { name, ..self }
    }

    /// Applies r to the sums of rows, `[B]`.
    #[must_use]
    pub fn of_rows(self, row: impl Fn(&Tensor) -> Tensor + 'a) -> Self {
        Penalty { row: Some(Box::new(row)), ..self }
    }

    /// Applies T to the mean over the batch, a scalar. An analytic step reads its derivative, which is a GPU sync.
    #[must_use]
    pub fn of_mean(self, batch: impl Fn(&Tensor) -> Tensor + 'a) -> Self {
        Penalty { batch: Some(Box::new(batch)), ..self }
    }

    /// Returns the unweighted penalty of activations `[B, F]`, a scalar.
    pub fn value(&self, activations: &Tensor) -> Tensor {
        match &self.each {
            None => self.of_sums(&activations.sum_dim_intlist(-1, false, activations.kind())),
            Some(each) => {
                let values = (each.value)(activations);
                self.of_sums(&values.sum_dim_intlist(-1, false, values.kind()))
            }
        }
    }

    fn of_sums(&self, sums: &Tensor) -> Tensor {
        let mean = ranks::mean_of(&match &self.row {
            None => sums.mean(sums.kind()),
            Some(row) => {
                let rows = row(sums);
                rows.mean(rows.kind())
            }
        });
        match &self.batch {
            None => mean,
            Some(batch) => batch(&mean),
        }
    }

    /// Returns the derivative of the weighted penalty with respect to the row sums.
    fn by_sums(&self, sums: &Tensor) -> BySums {
        let count = sums.numel() as f64;
        if self.row.is_some() {
            let sums = sums.detach().set_requires_grad(true);
            let value = tch::with_grad(|| self.of_sums(&sums) * self.weight);
            return BySums::Each(derivative(&value, &sums).unwrap_or_else(|| sums.zeros_like()));
        }
        let Some(batch) = &self.batch else { return BySums::Same(self.weight / count) };
        let mean = ranks::mean_of(&sums.mean(Kind::Float)).set_requires_grad(true);
        let value = tch::with_grad(|| batch(&mean));
        let slope = derivative(&value, &mean).map_or(0.0, |slope| slope.double_value(&[]));
        BySums::Same(slope * self.weight / count)
    }
}

/// Differentiates a scalar; `None` if it does not depend on the tensor.
fn derivative(scalar: &Tensor, by: &Tensor) -> Option<Tensor> {
    scalar.requires_grad().then(|| Tensor::run_backward(&[scalar], &[by], false, false).remove(0))
}

/// Derivative with respect to the row sums.
enum BySums {
    Same(f64),
    /// `[B]`
    Each(Tensor),
}

/// A sparsity penalty, evaluated block by block.
pub(super) struct Sums<'a> {
    penalty: &'a Penalty<'a>,
    /// Σ h(a) of each row, `[B]`.
    sums: Tensor,
    by_sums: Option<BySums>,
}

impl<'a> Sums<'a> {
    pub(super) fn new(penalty: &'a Penalty<'a>, like: &Tensor) -> Self {
        let sums = Tensor::zeros([like.size()[0]], (Kind::Float, like.device()));
        Sums { penalty, sums, by_sums: None }
    }

    /// Accumulates one block's penalised activations, in the shape of z.
    pub(super) fn see(&mut self, block: &Block, activations: &Tensor) {
        self.sums += match &self.penalty.each {
            None => block.sum_by_row(activations),
            Some(each) => block.sum_by_row(&(each.value)(&activations.to_kind(Kind::Float))),
        };
    }

    /// Returns the unweighted penalty, after all blocks were seen.
    pub(super) fn value(&self) -> Tensor {
        self.penalty.of_sums(&self.sums)
    }

    /// Computes the derivative with respect to the row sums, after all blocks were seen.
    pub(super) fn differentiate(&mut self) {
        self.by_sums = Some(self.penalty.by_sums(&self.sums));
    }

    /// Returns the derivative of the weighted penalty with respect to a block's activations. `activations` is called
    /// only if the derivative depends on them.
    pub(super) fn slope(&self, block: &Block, activations: impl FnOnce() -> Tensor) -> Slope {
        let Some(by_sums) = &self.by_sums else { return Slope::Same(0.0) };
        match (&self.penalty.each, by_sums) {
            (None, BySums::Same(by_sum)) => Slope::Same(*by_sum),
            (None, BySums::Each(by_sums)) => Slope::Each(block.z.zeros_like() + block.of_rows(by_sums)),
            (Some(Each { slope: None, .. }), _) => Slope::Same(0.0),
            (Some(Each { slope: Some(slope), .. }), by_sums) => {
                let slope = slope(&activations().to_kind(Kind::Float));
                Slope::Each(match by_sums {
                    BySums::Same(by_sum) => slope * *by_sum,
                    BySums::Each(by_sums) => slope * block.of_rows(by_sums),
                })
            }
        }
    }
}

/// A reconstruction error and a sparsity penalty.
pub struct Objective<'a> {
    error: ResidualError,
    log_other: bool,
    pub(super) penalty: Penalty<'a>,
    pub(super) watched: Option<Penalty<'a>>,
}

impl<'a> Objective<'a> {
    /// Combines the mean squared norm of the residuals with a penalty.
    pub fn squared_error(penalty: Penalty<'a>) -> Self {
        Objective::new(ResidualError::Mse, penalty)
    }

    /// Combines an error of the residuals with a penalty.
    pub fn new(error: ResidualError, penalty: Penalty<'a>) -> Self {
        Objective { error, log_other: false, penalty, watched: None }
    }

    /// Also logs the other error of the residuals.
    #[must_use]
    pub fn log_other_error(self) -> Self {
        Objective { log_other: true, ..self }
    }

    /// Also computes a penalty that is not part of the loss ([`Seen::values`]).
    #[must_use]
    pub fn watch(self, penalty: Option<Penalty<'a>>) -> Self {
        Objective { watched: penalty, ..self }
    }

    /// Adds the terms for residuals `[B, d]` and penalised activations `[B, F]`. Returns the values of the penalty and
    /// the watched penalty.
    pub fn add(&self, residual: &Tensor, penalized: &Tensor, logging: bool, terms: &mut Terms) -> Values {
        self.add_error(residual, logging, terms);
        let watched = self.watched.as_ref().map(|watched| tch::no_grad(|| watched.value(penalized)));
        self.add_penalty(self.penalty.value(penalized), watched, terms)
    }

    pub(super) fn add_error(&self, residual: &Tensor, logging: bool, terms: &mut Terms) {
        terms.add_reconstruction(self.error.name(), self.error.of(residual));
        if self.log_other && logging {
            let other = self.error.other();
            terms.log(other.name(), other.of(&residual.detach()));
        }
    }

    pub(super) fn add_penalty(&self, value: Tensor, watched: Option<Tensor>, terms: &mut Terms) -> Values {
        let penalty = value.detach();
        terms.add_sparsity(self.penalty.name, value, self.penalty.weight);
        Values { penalty, watched }
    }

    /// Returns the derivative of the error with respect to the residuals, `[B, d]`.
    pub(super) fn derivative(&self, residual: &Tensor) -> Tensor {
        self.error.derivative(residual)
    }
}

/// Unweighted penalties of an objective, scalars.
#[derive(Debug)]
pub struct Values {
    /// Penalty in the loss.
    pub penalty: Tensor,
    /// Watched penalty, if there is one.
    pub watched: Option<Tensor>,
}

/// Results of a step, for a trainer with an objective.
#[derive(Debug)]
pub struct Seen {
    /// Unweighted penalties.
    pub values: Values,
    /// Which features fired, bool `[F]`, if the trainer counts them.
    pub fired: Option<Tensor>,
    /// Number of activations in the batch.
    pub rows: i64,
    /// Whether this step is logged.
    pub logging: bool,
}
