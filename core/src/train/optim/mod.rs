//! Adam with accessible moments: resampling resets rows of them, and checkpoints save them.

mod fused;

use anyhow::Result;
use tch::Tensor;

use crate::files::state::State;
use crate::machine::device::on_host;
use crate::sae::{Dictionary, Weight};
use crate::train::constraint::{Constraints, clip_gradients, normalize_decoder, remove_parallel_gradient};
use crate::train::gradients::{Gradients, join_in_memory};

/// Adam's settings (Kingma and Ba 2014, <https://arxiv.org/abs/1412.6980>). Defaults are PyTorch's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConfig {
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the square root of the second moment.
    pub eps: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig { betas: (0.9, 0.999), eps: 1e-8 }
    }
}

/// The two moments of one parameter, in the parameter's shape.
#[derive(Debug)]
pub struct Moments {
    /// State-dict name of the parameter.
    pub name: String,
    /// The parameter, sharing memory with the dictionary's.
    pub parameter: Tensor,
    /// Running mean of the gradient, m.
    pub exp_avg: Tensor,
    /// Running mean of the squared gradient, v.
    pub exp_avg_sq: Tensor,
}

/// The Adam optimiser.
#[derive(Debug)]
pub struct Adam {
    config: AdamConfig,
    steps: u64,
    moments: Vec<Moments>,
    /// All parameters and moments as one tensor each, on a GPU. There, launching an operation costs more than updating
    /// a bias.
    joined: Option<Joined>,
}

/// Contiguous tensors that hold all parameters or moments, which are views of them.
#[derive(Debug)]
struct Joined {
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

/// Whether the norm of a step's gradients is finite.
#[derive(Debug)]
pub enum GradientNorm {
    /// Finite: the step was taken.
    Finite,
    /// Not finite: nothing has changed.
    NotFinite {
        /// Parameter with this gradient. Empty when parameters are joined.
        name: String,
        /// Norm of the gradient.
        norm: f64,
    },
    /// The step was taken without reading the joint norm, a scalar on the GPU.
    Unread(Tensor),
}

impl Adam {
    /// Makes an optimiser for parameters by state-dict name. On a GPU, moves the parameters into one tensor.
    pub fn new(config: AdamConfig, parameters: impl IntoIterator<Item = (impl Into<String>, Tensor)>) -> Self {
        let parameters: Vec<(String, Tensor)> =
            parameters.into_iter().map(|(name, parameter)| (name.into(), parameter)).collect();
        let join = !parameters.is_empty() && !parameters.iter().any(|(_, parameter)| on_host(parameter.device()));
        Adam::build(config, parameters, join)
    }

    fn build(config: AdamConfig, parameters: Vec<(String, Tensor)>, join: bool) -> Self {
        let mut moments: Vec<Moments> = parameters
            .into_iter()
            .map(|(name, parameter)| Moments {
                name,
                exp_avg: parameter.detach().zeros_like(),
                exp_avg_sq: parameter.detach().zeros_like(),
                parameter,
            })
            .collect();
        let joined = join.then(|| Joined {
            parameters: join_in_memory(moments.iter_mut().map(|moments| &mut moments.parameter)),
            exp_avg: join_in_memory(moments.iter_mut().map(|moments| &mut moments.exp_avg)),
            exp_avg_sq: join_in_memory(moments.iter_mut().map(|moments| &mut moments.exp_avg_sq)),
        });
        Adam { config, steps: 0, moments, joined }
    }

    /// Returns the moments of a parameter.
    pub fn moments(&mut self, name: &str) -> Option<&mut Moments> {
        self.moments.iter_mut().find(|moments| moments.name == name)
    }

    /// Returns the moments of all parameters.
    pub fn all_moments(&mut self) -> impl Iterator<Item = &mut Moments> {
        self.moments.iter_mut()
    }

    /// Allocates gradients in the layout that this optimiser needs.
    pub fn gradients(&self) -> Gradients {
        let parameters = self.moments.iter().map(|Moments { name, parameter, .. }| (name, parameter.shallow_clone()));
        if self.joined.is_some() { Gradients::joined(parameters) } else { Gradients::new(parameters) }
    }

    /// Takes one step within constraints, with gradients from [`Adam::gradients`], which it modifies. Refuses a step
    /// whose gradient norm is not finite. With `look` false it reads no value, to avoid a GPU sync, and takes the step
    /// regardless.
    pub fn step_within(
        &mut self,
        lr: f64,
        constraints: &Constraints,
        dictionary: &dyn Dictionary,
        gradients: &Gradients,
        look: bool,
    ) -> GradientNorm {
        let decoder = dictionary.decoder();
        match fused::step(self.config, self.steps + 1, &mut self.moments, gradients, lr, constraints, decoder.as_ref())
        {
            Some(GradientNorm::Finite) => {
                self.steps += 1;
                GradientNorm::Finite
            }
            Some(other) => other,
            None => self.step_by_parts(lr, constraints, decoder, gradients, look),
        }
    }

    fn step_by_parts(
        &mut self,
        lr: f64,
        constraints: &Constraints,
        decoder: Option<Weight>,
        gradients: &Gradients,
        look: bool,
    ) -> GradientNorm {
        let decoder = decoder.filter(|_| constraints.unit_norm_decoder);
        if let Some((decoder, gradient)) = decoder.as_ref().and_then(|it| Some((it, gradients.get(it.name)?))) {
            remove_parallel_gradient(decoder, gradient);
        }
        let mut tensors = gradients.tensors();
        let norms: Vec<Tensor> = tensors.iter().map(Tensor::norm).collect();
        let norm = match norms.as_slice() {
            [] => return GradientNorm::Finite,
            [norm] => norm.shallow_clone(),
            norms => Tensor::stack(norms, 0).norm(),
        };
        if look && !norm.double_value(&[]).is_finite() {
            let bad = gradients.iter().find(|(_, gradient)| !gradient.norm().double_value(&[]).is_finite());
            let name = bad.filter(|_| self.joined.is_none()).map_or_else(String::new, |(name, _)| name.to_owned());
            return GradientNorm::NotFinite { name, norm: norm.double_value(&[]) };
        }
        if let Some(max_norm) = constraints.clip_gradients {
            clip_gradients(&mut tensors, &norm, max_norm);
        }
        self.step(lr, gradients);
        if let Some(decoder) = &decoder {
            normalize_decoder(decoder);
        }
        if look { GradientNorm::Finite } else { GradientNorm::Unread(norm) }
    }

    /// Takes one step with gradients from [`Adam::gradients`]: θ ← θ − lr · m̂ / (√v̂ + ε).
    pub fn step(&mut self, lr: f64, gradients: &Gradients) {
        self.steps += 1;
        let AdamConfig { betas: (beta1, beta2), eps } = self.config;
        let steps = self.steps as f64;
        let correction1 = 1.0 - beta1.powf(steps);
        let correction2 = (1.0 - beta2.powf(steps)).sqrt();
        let update = |gradient: &Tensor, parameter: &Tensor, exp_avg: &Tensor, exp_avg_sq: &Tensor| {
            let [mut parameter, mut exp_avg, mut exp_avg_sq] =
                [parameter, exp_avg, exp_avg_sq].map(Tensor::shallow_clone);
            let _ = exp_avg.lerp_(gradient, 1.0 - beta1);
            let _ = exp_avg_sq.lerp_(&gradient.square(), 1.0 - beta2);
            if lr > 0.0 {
                let scale = -correction1 / lr;
                let mut denominator = exp_avg_sq.sqrt();
                let _ = denominator.g_mul_scalar_(scale / correction2);
                let _ = denominator.g_add_scalar_(scale * eps);
                let _ = parameter.addcdiv_(&exp_avg, &denominator);
            }
        };
        tch::no_grad(|| match &self.joined {
            Some(Joined { parameters, exp_avg, exp_avg_sq }) => {
                update(&gradients.tensors()[0], parameters, exp_avg, exp_avg_sq);
            }
            None => {
                for ((_, gradient), moments) in gradients.iter().zip(&self.moments) {
                    update(gradient, &moments.parameter, &moments.exp_avg, &moments.exp_avg_sq);
                }
            }
        });
    }

    /// Returns the number of steps taken and all moments.
    pub fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.put("steps", self.steps)?;
        for moments in &self.moments {
            state.put_tensor(format!("{}/exp_avg", moments.name), &moments.exp_avg);
            state.put_tensor(format!("{}/exp_avg_sq", moments.name), &moments.exp_avg_sq);
        }
        Ok(state)
    }

    /// Restores what [`Adam::state`] returned.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        self.steps = state.get("steps")?;
        for moments in &mut self.moments {
            state.load_tensor(&format!("{}/exp_avg", moments.name), &mut moments.exp_avg)?;
            state.load_tensor(&format!("{}/exp_avg_sq", moments.name), &mut moments.exp_avg_sq)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::sae::{Dims, trained_matrix};

    /// Dictionary with weights only.
    struct Weights {
        encoder: Tensor,
        bias: Tensor,
        decoder: Tensor,
        feature_dim: i64,
    }

    impl Dictionary for Weights {
        fn class(&self) -> &'static str {
            "Weights"
        }
        fn dims(&self) -> Dims {
            Dims { input: 1, features: 1, output: 1 }
        }
        fn parameters(&self) -> Vec<(&'static str, Tensor)> {
            let clone = Tensor::shallow_clone;
            vec![("encoder", clone(&self.encoder)), ("bias", clone(&self.bias)), ("decoder", clone(&self.decoder))]
        }
        fn encode(&self, x: &Tensor) -> Tensor {
            x.shallow_clone()
        }
        fn decode(&self, features: &Tensor) -> Tensor {
            features.shallow_clone()
        }
        fn decoder(&self) -> Option<Weight> {
            let tensor = self.decoder.shallow_clone();
            Some(Weight { name: "decoder", tensor, feature_dim: self.feature_dim })
        }
        fn scale_biases(&mut self, _: f64) {}
    }

    #[test]
    fn fused_step_matches_separate_operations() {
        let options = (Kind::Float, Device::Cpu);
        for (features, d) in [(1, 1), (7, 19), (300, 64)] {
            for feature_dim in [0, 1] {
                for (unit_norm_decoder, clip_gradients) in
                    [(false, None), (true, None), (false, Some(0.5)), (true, Some(0.5)), (true, Some(1e9))]
                {
                    for (betas, join) in [((0.9, 0.999), false), ((0.0, 0.999), false), ((0.9, 0.999), true)] {
                        let size = if feature_dim == 0 { [features, d] } else { [d, features] };
                        let [one, other] = [0, 1].map(|_| Weights {
                            encoder: trained_matrix([features, d], 0, Device::Cpu),
                            bias: Tensor::zeros([d], options).set_requires_grad(true),
                            decoder: trained_matrix(size, feature_dim, Device::Cpu),
                            feature_dim,
                        });
                        for ((_, mut one), (_, mut other)) in one.parameters().into_iter().zip(other.parameters()) {
                            let start = Tensor::randn(one.size(), options);
                            tch::no_grad(|| [one.copy_(&start), other.copy_(&start)]);
                        }
                        // A zero direction stays zero.
                        for weights in [&one, &other] {
                            let _ = tch::no_grad(|| weights.decoder.select(feature_dim, 0).zero_());
                        }
                        let constraints = Constraints { unit_norm_decoder, clip_gradients };
                        let config = AdamConfig { betas, ..AdamConfig::default() };
                        let named = |weights: &Weights| {
                            weights
                                .parameters()
                                .into_iter()
                                .map(|(name, parameter)| (name.to_owned(), parameter))
                                .collect()
                        };
                        let mut fused = Adam::build(config, named(&one), false);
                        let mut plain = Adam::build(config, named(&other), join);
                        let (mut fused_gradients, mut plain_gradients) = (fused.gradients(), plain.gradients());
                        for step in 0..4 {
                            let found: Vec<_> = one
                                .parameters()
                                .into_iter()
                                .map(|(name, one)| (name, Tensor::randn(one.size(), options)))
                                .collect();
                            let copies = found.iter().map(|(name, gradient)| (*name, gradient.copy())).collect();
                            fused_gradients.take(found).unwrap();
                            plain_gradients.take(copies).unwrap();
                            let lr = 0.05 * f64::from(step);
                            let decoder = one.decoder();
                            let done = fused::step(
                                config,
                                step as u64 + 1,
                                &mut fused.moments,
                                &fused_gradients,
                                lr,
                                &constraints,
                                decoder.as_ref(),
                            );
                            assert!(
                                matches!(done, Some(GradientNorm::Finite)),
                                "the fused step refused these parameters"
                            );
                            plain.step_by_parts(lr, &constraints, other.decoder(), &plain_gradients, false);
                            for (a, b) in fused.moments.iter().zip(&plain.moments) {
                                // Sums near 0 differ by the rounding errors of their summands.
                                for (a, b, added) in [
                                    (&a.parameter, &b.parameter, 1e-2),
                                    (&a.exp_avg, &b.exp_avg, 1e-2),
                                    (&a.exp_avg_sq, &b.exp_avg_sq, 1e-6),
                                ] {
                                    // Compares norms: Adam takes a full step even along a gradient that is only
                                    // rounding error.
                                    let (off, size) = ((a - b).norm(), b.norm());
                                    let off = off.double_value(&[]) / size.double_value(&[]).max(added);
                                    assert!(off < 1e-4, "{constraints:?} {betas:?}: off by {off:e}\n{a}\n{b}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn nonfinite_gradients_change_nothing() {
        let options = (Kind::Float, Device::Cpu);
        for unit_norm_decoder in [false, true] {
            for (clip_gradients, fused) in [(None, true), (Some(1.0), true), (None, false), (Some(1.0), false)] {
                for (bad, which) in [(f64::NAN, 0), (f64::INFINITY, 1), (f64::NEG_INFINITY, 2), (f64::NAN, 2)] {
                    let weights = Weights {
                        encoder: trained_matrix([40, 30], 0, Device::Cpu),
                        bias: Tensor::zeros([30], options).set_requires_grad(true),
                        decoder: trained_matrix([30, 40], 1, Device::Cpu),
                        feature_dim: 1,
                    };
                    let mut adam = Adam::new(AdamConfig::default(), weights.parameters());
                    let gradients = adam.gradients();
                    let step = |adam: &mut Adam, bad: Option<f64>| {
                        for (index, (_, gradient)) in gradients.iter().enumerate() {
                            let _ = gradient.shallow_clone().fill_(1.0);
                            if let Some(bad) = bad.filter(|_| index == which) {
                                // `flatten` would copy a tensor that is not contiguous.
                                let mut number = gradient.shallow_clone();
                                while number.dim() > 0 {
                                    number = number.get(-1);
                                }
                                let _ = number.fill_(bad);
                            }
                        }
                        let constraints = Constraints { unit_norm_decoder, clip_gradients };
                        match fused {
                            true => adam.step_within(0.1, &constraints, &weights, &gradients, true),
                            false => adam.step_by_parts(0.1, &constraints, weights.decoder(), &gradients, true),
                        }
                    };
                    assert!(matches!(step(&mut adam, None), GradientNorm::Finite));
                    let copies = || -> Vec<Tensor> {
                        weights.parameters().iter().map(|(_, parameter)| parameter.copy()).collect()
                    };
                    let (before, state) = (copies(), adam.state().unwrap());
                    let found = step(&mut adam, Some(bad));
                    let name = weights.parameters()[which].0;
                    assert!(
                        matches!(&found, GradientNorm::NotFinite { name: found, norm } if found == name && !norm.is_finite()),
                        "{name}, {bad}, fused {fused}: {found:?}"
                    );
                    assert!(adam.state().unwrap() == state && copies() == before, "{name}, {bad}, fused {fused}");
                }
            }
        }
    }

    #[test]
    fn first_step_moves_by_the_learning_rate_against_the_sign() {
        // m̂ = g and v̂ = g² after one step, so θ moves by lr · g / (|g| + ε).
        let weight = Tensor::from_slice(&[1.0f32, -2.0, 0.5]).set_requires_grad(true);
        let mut adam = Adam::new(AdamConfig::default(), vec![("weight", weight.shallow_clone())]);
        let mut gradients = adam.gradients();
        gradients.take(vec![("weight", Tensor::from_slice(&[3.0f32, -4.0, 0.0]))]).unwrap();
        adam.step(0.1, &gradients);
        let expected = Tensor::from_slice(&[0.9f32, -1.9, 0.5]);
        assert!((weight.detach() - expected).abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn restored_optimizer_continues_bit_for_bit() {
        let run = |split: bool| {
            let weight = Tensor::from_slice(&[1.0f32, -2.0]).set_requires_grad(true);
            let mut adam = Adam::new(AdamConfig::default(), vec![("weight", weight.shallow_clone())]);
            for step in 0..6 {
                if split && step == 3 {
                    let state = adam.state().unwrap();
                    adam = Adam::new(AdamConfig::default(), vec![("weight", weight.shallow_clone())]);
                    adam.restore(&state).unwrap();
                }
                let mut gradients = adam.gradients();
                gradients.backward(&(weight.square() * (step + 1)).sum(tch::Kind::Float)).unwrap();
                adam.step(0.01, &gradients);
            }
            Vec::<f32>::try_from(weight.detach()).unwrap()
        };
        assert_eq!(run(false), run(true));
    }
}
