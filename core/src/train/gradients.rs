//! Gradients of one step, between the loss and the optimiser.

use anyhow::{Result, bail};
use tch::Tensor;

/// Gradient of the loss for each parameter, in parameter order.
///
/// Kept between steps: an analytic step overwrites the memory of the last step's gradients ([`Gradients::get`]), so it
/// allocates none. Autograd's tensors are taken over without a copy. A parameter's own `.grad` is not used.
#[derive(Debug)]
pub struct Gradients {
    all: Vec<Gradient>,
    /// One tensor that holds all gradients, each a view of it. Used on a GPU, to save kernel launches.
    joined: Option<Tensor>,
}

#[derive(Debug)]
struct Gradient {
    name: String,
    parameter: Tensor,
    /// Same shape, strides and dtype as the parameter.
    tensor: Tensor,
}

impl Gradients {
    /// Allocates gradients of these parameters, by state-dict name. Their values are undefined before the first step.
    pub fn new(parameters: impl IntoIterator<Item = (impl Into<String>, Tensor)>) -> Self {
        let gradient = |(name, parameter): (_, Tensor)| {
            // Non-contiguous parameters keep their strides.
            let tensor = parameter.detach().empty_like();
            Gradient { name: Into::into(name), parameter, tensor }
        };
        Gradients { all: parameters.into_iter().map(gradient).collect(), joined: None }
    }

    /// Allocates gradients as views of one tensor.
    pub(super) fn joined(parameters: impl IntoIterator<Item = (impl Into<String>, Tensor)>) -> Self {
        let mut gradients = Gradients::new(parameters);
        gradients.joined = Some(join_in_memory(gradients.all.iter_mut().map(|gradient| &mut gradient.tensor)));
        gradients
    }

    /// Returns the gradient of a parameter, in its shape.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.all.iter().find(|gradient| gradient.name == name).map(|gradient| &gradient.tensor)
    }

    /// Iterates over all gradients with their parameters' names. Values may be edited in place.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.all.iter().map(|gradient| (gradient.name.as_str(), &gradient.tensor))
    }

    /// Returns the tensors that hold the gradients: one per parameter, or a single one for all.
    pub fn tensors(&self) -> Vec<Tensor> {
        match &self.joined {
            Some(joined) => vec![joined.shallow_clone()],
            None => self.all.iter().map(|gradient| gradient.tensor.shallow_clone()).collect(),
        }
    }

    /// Computes the gradients of a loss, a scalar, with autograd, and frees the graph.
    pub fn backward(&mut self, loss: &Tensor) -> Result<()> {
        let parameters: Vec<&Tensor> = self.all.iter().map(|gradient| &gradient.parameter).collect();
        let found = Tensor::run_backward(&[loss], &parameters, false, false);
        let names: Vec<String> = self.all.iter().map(|gradient| gradient.name.clone()).collect();
        let found = names.iter().map(String::as_str).zip(found).filter(|(_, gradient)| gradient.defined());
        self.take(found.collect())
    }

    /// Stores the gradients of a step by parameter name; those of other parameters become 0.
    pub fn take(&mut self, found: Vec<(&str, Tensor)>) -> Result<()> {
        if let Some((unknown, _)) = found.iter().find(|(name, _)| self.get(name).is_none()) {
            bail!("a gradient for `{unknown}`, which is not a parameter of the dictionary");
        }
        let find = |name: &str| found.iter().find(|(known, _)| *known == name).map(|(_, gradient)| gradient);
        for Gradient { name, tensor, .. } in &self.all {
            if let Some(gradient) = find(name).filter(|gradient| gradient.size() != tensor.size()) {
                bail!("the gradient of `{name}` has shape {:?}, not {:?}", gradient.size(), tensor.size());
            }
        }
        tch::no_grad(|| match &self.joined {
            Some(joined) => {
                let in_place =
                    |own: &Gradient| find(&own.name).is_some_and(|found| found.data_ptr() == own.tensor.data_ptr());
                if self.all.iter().any(in_place) {
                    self.all.iter().filter(|own| !in_place(own)).for_each(|own| own.fill(find(&own.name)));
                    return;
                }
                // One operation for all: autograd's gradients are new tensors.
                let row = |own: &Gradient| match find(&own.name) {
                    Some(gradient) => in_memory_order(gradient, lies_turned(&own.tensor)),
                    None => own.tensor.zeros_like().reshape([-1]),
                };
                let _ = Tensor::cat_out(joined, &self.all.iter().map(row).collect::<Vec<_>>(), 0);
            }
            None => {
                let mut taken = Vec::new();
                for own in &mut self.all {
                    match find(&own.name) {
                        // The optimiser changes gradients in place, so each needs memory of its own.
                        Some(gradient) if own.is_laid_out_as(gradient) && !taken.contains(&gradient.data_ptr()) => {
                            own.tensor = gradient.shallow_clone();
                            taken.push(gradient.data_ptr());
                        }
                        gradient => own.fill(gradient),
                    }
                }
            }
        });
        Ok(())
    }
}

impl Gradient {
    fn is_laid_out_as(&self, other: &Tensor) -> bool {
        other.stride() == self.tensor.stride() && other.kind() == self.tensor.kind()
    }

    fn fill(&self, gradient: Option<&Tensor>) {
        let mut own = self.tensor.shallow_clone();
        match gradient {
            Some(gradient) => own.copy_(gradient),
            None => drop(own.zero_()),
        }
    }
}

/// Whether a matrix is stored column by column.
fn lies_turned(tensor: &Tensor) -> bool {
    tensor.dim() == 2 && !tensor.is_contiguous() && tensor.tr().is_contiguous()
}

/// Flattens a tensor, or its transpose if `turned`.
fn in_memory_order(tensor: &Tensor, turned: bool) -> Tensor {
    if turned { tensor.tr().reshape([-1]) } else { tensor.reshape([-1]) }
}

/// Copies tensors into one new tensor, each in its memory order, turns them into views of it, and returns it.
pub(super) fn join_in_memory<'a>(tensors: impl Iterator<Item = &'a mut Tensor>) -> Tensor {
    tch::no_grad(|| {
        let tensors: Vec<&mut Tensor> = tensors.collect();
        let rows = tensors.iter().map(|tensor| in_memory_order(&tensor.detach(), lies_turned(tensor)));
        let all = Tensor::cat(&rows.collect::<Vec<_>>(), 0);
        let mut at = 0;
        for tensor in tensors {
            let (turned, count) = (lies_turned(tensor), tensor.numel() as i64);
            let size = if turned { tensor.tr().size() } else { tensor.size() };
            let part = all.narrow(0, at, count).view(size.as_slice());
            tensor.set_data(&if turned { part.tr() } else { part });
            at += count;
        }
        all
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn parameters() -> Vec<(&'static str, Tensor)> {
        let matrix = Tensor::randn([3, 4], (Kind::Float, Device::Cpu)).tr().set_requires_grad(true);
        vec![("matrix", matrix), ("bias", Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true))]
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.reshape([-1])).unwrap()
    }

    #[test]
    fn parameters_without_gradient_get_zeros() {
        for join in [false, true] {
            let parameters = parameters();
            let mut gradients = if join { Gradients::joined(parameters) } else { Gradients::new(parameters) };
            gradients.take(vec![("bias", Tensor::from_slice(&[1.0_f32, 2.0, 3.0]))]).unwrap();
            assert_eq!(numbers(gradients.get("matrix").unwrap()), [0.0; 12]);
            assert_eq!(numbers(gradients.get("bias").unwrap()), [1.0, 2.0, 3.0]);
        }
    }

    #[test]
    fn gradients_written_in_place_keep_their_memory() {
        for join in [false, true] {
            let parameters = parameters();
            let mut gradients = if join { Gradients::joined(parameters) } else { Gradients::new(parameters) };
            let mut room = gradients.get("matrix").unwrap().shallow_clone();
            let _ = room.fill_(5.0);
            gradients.take(vec![("matrix", room.shallow_clone())]).unwrap();
            let matrix = gradients.get("matrix").unwrap();
            assert_eq!((matrix.data_ptr(), numbers(matrix)), (room.data_ptr(), vec![5.0; 12]));
            assert_eq!(numbers(gradients.get("bias").unwrap()), [0.0; 3]);
        }
    }

    #[test]
    fn gradients_that_share_memory_are_copied() {
        let one = Tensor::ones([3], (Kind::Float, Device::Cpu));
        let mut gradients = Gradients::new(vec![("a", one.zeros_like()), ("b", one.zeros_like())]);
        gradients.take(vec![("a", one.shallow_clone()), ("b", one.shallow_clone())]).unwrap();
        let _ = gradients.get("a").unwrap().shallow_clone().zero_();
        assert_eq!(numbers(gradients.get("b").unwrap()), [1.0; 3]);
    }

    #[test]
    fn joined_gradients_match_separate_ones() {
        let parameters = parameters();
        let clone = || parameters.iter().map(|(name, parameter)| (*name, parameter.shallow_clone()));
        let (mut one, mut other) = (Gradients::new(clone()), Gradients::joined(clone()));
        for gradients in [&mut one, &mut other] {
            let loss = (&parameters[0].1.square() * &parameters[1].1).sum(Kind::Float);
            gradients.backward(&loss).unwrap();
            assert!(!parameters[0].1.grad().defined());
        }
        for ((name, a), (_, b)) in one.iter().zip(other.iter()) {
            assert_eq!((numbers(a), a.stride()), (numbers(b), b.stride()), "{name}");
        }
        assert!(one.take(vec![("other", Tensor::new())]).is_err());
        assert!(one.take(vec![("bias", Tensor::from(1.0))]).is_err());
    }
}
