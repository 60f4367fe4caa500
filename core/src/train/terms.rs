//! The terms of a loss.

use serde_json::{Map, Value};
use tch::{Kind, Tensor};

/// The mean over the batch of each activation's sum: of [B, n] a scalar. Of squared residuals, the reconstruction loss
/// ‖x − x̂‖²; of features, the L1 penalty ‖f‖₁.
pub fn mean_of_sums(rows: &Tensor) -> Tensor {
    rows.sum_dim_intlist(-1, false, rows.kind()).mean(rows.kind())
}

/// The terms of a loss, in the order in which they were added. The loss is the sum of weight × value.
#[derive(Debug, Default)]
pub struct Terms {
    terms: Vec<Term>,
}

/// What a term of a loss is for, so that modifiers find it whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// How far the reconstruction is off.
    Reconstruction,
    /// How many features there are, or how large.
    Sparsity,
    /// Anything else.
    Other,
}

/// One term of a loss.
#[derive(Debug)]
pub struct Term {
    /// Its name in the log.
    pub name: &'static str,
    /// What it is for.
    pub role: Role,
    /// Its value, a scalar, before it is weighted.
    pub value: Tensor,
    /// Its weight in the loss; 0 for a figure that is only logged.
    pub weight: f64,
}

impl Terms {
    /// No terms.
    pub fn new() -> Self {
        Terms::default()
    }

    /// Adds `weight × value` to the loss and `value` to the log.
    pub fn add(&mut self, name: &'static str, value: Tensor, weight: f64) {
        self.terms.push(Term { name, role: Role::Other, value, weight });
    }

    /// Adds the error of the reconstruction, with weight 1.
    pub fn add_reconstruction(&mut self, name: &'static str, value: Tensor) {
        self.terms.push(Term { name, role: Role::Reconstruction, value, weight: 1.0 });
    }

    /// Adds the sparsity penalty. A trainer that does says so ([`Trainer::has_sparsity_term`](super::trainer::Trainer::has_sparsity_term)).
    pub fn add_sparsity(&mut self, name: &'static str, value: Tensor, weight: f64) {
        self.terms.push(Term { name, role: Role::Sparsity, value, weight });
    }

    /// Adds a figure to the log alone.
    pub fn log(&mut self, name: &'static str, value: Tensor) {
        self.add(name, value.detach(), 0.0);
    }

    /// The term of that name, to read or to change.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Term> {
        self.terms.iter_mut().find(|term| term.name == name)
    }

    /// The error of the reconstruction, a scalar, as it stands in the loss.
    pub fn reconstruction(&self) -> Option<Tensor> {
        sum(self.terms.iter().filter(|term| term.role == Role::Reconstruction))
    }

    /// Takes the sparsity penalty out of the loss; it stays in the log.
    pub fn drop_sparsity(&mut self) {
        for term in self.terms.iter_mut().filter(|term| term.role == Role::Sparsity) {
            term.weight = 0.0;
        }
    }

    /// Lets go of the graphs that the values come from.
    pub(super) fn detach(&mut self) {
        for term in &mut self.terms {
            term.value = term.value.detach();
        }
    }

    /// All terms.
    pub fn iter(&self) -> impl Iterator<Item = &Term> {
        self.terms.iter()
    }

    /// The loss: the weighted sum, a scalar.
    pub fn total(&self) -> Option<Tensor> {
        sum(self.terms.iter())
    }

    /// Writes every figure into a row of the log, `loss` last.
    pub fn write(&self, row: &mut Map<String, Value>) {
        for term in &self.terms {
            row.insert(term.name.to_owned(), number(&term.value));
        }
        if let Some(total) = self.total() {
            row.insert("loss".to_owned(), number(&total));
        }
    }
}

fn sum<'a>(terms: impl Iterator<Item = &'a Term>) -> Option<Tensor> {
    terms
        .filter(|term| term.weight != 0.0)
        .map(|term| if term.weight == 1.0 { term.value.shallow_clone() } else { &term.value * term.weight })
        .reduce(|sum, term| sum + term)
}

/// A scalar tensor as a JSON number.
///
/// A float32 is written with the digits that tell it from its neighbours, not with those of the nearest float64.
pub fn number(value: &Tensor) -> Value {
    if value.kind() == Kind::Float {
        return float(value.double_value(&[]) as f32);
    }
    if matches!(value.kind(), Kind::Int64 | Kind::Int) {
        return value.int64_value(&[]).into();
    }
    value.double_value(&[]).into()
}

/// A float32 as a JSON number with its shortest digits; null if it is not finite, as JSON has it.
pub fn float(value: f32) -> Value {
    value.to_string().parse::<serde_json::Number>().map_or(Value::Null, Value::Number)
}
