//! The terms of a loss.

use serde_json::{Map, Value};
use tch::{Kind, Tensor};

/// Returns the mean over the batch of each row's sum, a scalar of `[B, n]`. For squared residuals this is the
/// reconstruction loss ‖x − x̂‖²; for features, the L1 penalty ‖f‖₁.
pub fn mean_of_sums(rows: &Tensor) -> Tensor {
    rows.sum_dim_intlist(-1, false, rows.kind()).mean(rows.kind())
}

/// Terms of a loss, in the order in which they were added. The loss is the sum of weight × value.
#[derive(Debug, Default)]
pub struct Terms {
    terms: Vec<Term>,
}

/// Purpose of a term, by which modifiers find it whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Reconstruction error.
    Reconstruction,
    /// Sparsity penalty: the number or size of the features.
    Sparsity,
    /// Anything else.
    Other,
}

/// One term of a loss.
#[derive(Debug)]
pub struct Term {
    /// Name in the log.
    pub name: &'static str,
    /// Purpose of the term.
    pub role: Role,
    /// Unweighted value, a scalar.
    pub value: Tensor,
    /// Weight in the loss; 0 for a figure that is only logged.
    pub weight: f64,
}

impl Terms {
    /// Makes an empty loss.
    pub fn new() -> Self {
        Terms::default()
    }

    /// Adds `weight × value` to the loss and `value` to the log.
    pub fn add(&mut self, name: &'static str, value: Tensor, weight: f64) {
        self.terms.push(Term { name, role: Role::Other, value, weight });
    }

    /// Adds the reconstruction error, with weight 1.
    pub fn add_reconstruction(&mut self, name: &'static str, value: Tensor) {
        self.terms.push(Term { name, role: Role::Reconstruction, value, weight: 1.0 });
    }

    /// Adds the sparsity penalty. A trainer that calls this must declare it in
    /// [`Trainer::has_sparsity_term`](super::trainer::Trainer::has_sparsity_term).
    pub fn add_sparsity(&mut self, name: &'static str, value: Tensor, weight: f64) {
        self.terms.push(Term { name, role: Role::Sparsity, value, weight });
    }

    /// Adds a figure to the log only.
    pub fn log(&mut self, name: &'static str, value: Tensor) {
        self.add(name, value.detach(), 0.0);
    }

    /// Returns the term of this name, to read or change.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Term> {
        self.terms.iter_mut().find(|term| term.name == name)
    }

    /// Returns the weighted reconstruction error, a scalar.
    pub fn reconstruction(&self) -> Option<Tensor> {
        sum(self.terms.iter().filter(|term| term.role == Role::Reconstruction))
    }

    /// Removes the sparsity penalty from the loss, but not from the log.
    pub fn drop_sparsity(&mut self) {
        for term in self.terms.iter_mut().filter(|term| term.role == Role::Sparsity) {
            term.weight = 0.0;
        }
    }

    /// Frees the graphs of the values.
    pub(super) fn detach(&mut self) {
        for term in &mut self.terms {
            term.value = term.value.detach();
        }
    }

    /// Iterates over the terms.
    pub fn iter(&self) -> impl Iterator<Item = &Term> {
        self.terms.iter()
    }

    /// Returns the loss, the weighted sum, a scalar.
    pub fn total(&self) -> Option<Tensor> {
        sum(self.terms.iter())
    }

    /// Writes every figure to a log row, `loss` last.
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

/// Converts a scalar tensor to a JSON number.
///
/// A float32 is written with its shortest unique digits, not with those of the nearest float64.
pub fn number(value: &Tensor) -> Value {
    if value.kind() == Kind::Float {
        return float(value.double_value(&[]) as f32);
    }
    if matches!(value.kind(), Kind::Int64 | Kind::Int) {
        return value.int64_value(&[]).into();
    }
    value.double_value(&[]).into()
}

/// Converts a float32 to a JSON number with its shortest digits; null if it is not finite, since JSON cannot represent
/// it.
pub fn float(value: f32) -> Value {
    value.to_string().parse::<serde_json::Number>().map_or(Value::Null, Value::Number)
}
