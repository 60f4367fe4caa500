//! Synthetic activations with known features, to test whether a dictionary recovers them (as in Sharkey et al. 2022,
//! *Taking features out of superposition with sparse autoencoders*).
//!
//! The features are n random directions gᵢ of norm 1 in d dimensions. An activation is
//!
//! ```text
//! x = Σᵢ sᵢ mᵢ gᵢ + noise · ε      sᵢ = 1 with probability pᵢ, else 0;  mᵢ uniform in `magnitude`;  ε standard normal
//! pᵢ ∝ i^(−frequency_exponent)     Σ pᵢ = n_active, none above 1
//! ```
//!
//! With a `correlation` ρ, the features of each group of `correlation_group` tend to be active together (a Gaussian
//! copula). Feature i is active if √ρ u + √(1 − ρ) vᵢ exceeds Φ⁻¹(1 − pᵢ), where u is the group's and vᵢ the
//! feature's own standard normal number. The frequencies pᵢ do not change. Features are assigned to groups in turn, so
//! every group has common and rare features.
//!
//! The stream has no end. The same seeds give the same features and the same activations on every machine.

use dictlearn_core::machine::rng::{Rng, rng};
use dictlearn_core::prelude::*;
use rand::Rng as _;
use rand_distr::StandardNormal;

/// Synthetic activations with known features.
#[component(source "synthetic", summary = "Sparse synthetic activations with known features of unequal frequency",
    paper = "Sharkey et al. 2022 (adapted), Taking features out of superposition with sparse autoencoders, \
        https://www.alignmentforum.org/posts/z6QQJbtpkEAX3Aojj",
    example = "{type: synthetic, activation_dim: 32, n_features: 64, n_active: 4, batch_size: 256}")]
pub struct SyntheticConfig {
    /// Activation width d.
    #[default(64)]
    #[schemars(range(min = 1))]
    pub activation_dim: i64,
    /// Number of features n.
    #[default(256)]
    #[schemars(range(min = 1))]
    pub n_features: i64,
    /// Mean number of active features per activation.
    #[default(8.0)]
    #[schemars(range(min = 0))]
    pub n_active: f64,
    /// Exponent a of the features' frequencies: the frequency of feature i is proportional to i^(−a). 0 makes them
    /// equal.
    #[default(0.5)]
    #[schemars(range(min = 0))]
    pub frequency_exponent: f64,
    /// Smallest and largest magnitude of an active feature.
    #[default([0.5, 1.5])]
    #[schemars(length(min = 2, max = 2))]
    pub magnitude: [f64; 2],
    /// Correlation ρ of the normal variables that activate the features of a group, from 0 to 1.
    #[default]
    #[schemars(range(min = 0, max = 1))]
    pub correlation: f64,
    /// Number of features in a correlated group.
    #[default(8)]
    #[schemars(range(min = 1))]
    pub correlation_group: i64,
    /// Standard deviation of the Gaussian noise in each dimension.
    #[default]
    #[schemars(range(min = 0))]
    pub noise: f64,
    /// Activations per batch.
    #[default(1024)]
    #[schemars(range(min = 1))]
    pub batch_size: i64,
    /// Seed of the activations; null uses the run's seed. Give `eval_source` a different seed for held-out activations
    /// of the same features.
    pub seed: Option<u64>,
    /// Seed of the features; null uses the run's seed.
    pub features_seed: Option<u64>,
}

impl SourceConfig for SyntheticConfig {
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        let [least, greatest] = self.magnitude;
        if !(0.0 <= least && least <= greatest) {
            bail!(
                InputError::new(format!("`magnitude` is [{least}, {greatest}]"))
                    .field("magnitude")
                    .help("give the smallest and then the largest magnitude, neither of them negative")
            );
        }
        if self.n_active > self.n_features as f64 {
            bail!(
                InputError::new(format!(
                    "`n_active` is {}, but there are only {} features",
                    self.n_active, self.n_features
                ))
                .field("n_active")
            );
        }
        let memory = self.memory();
        memory.iter().try_for_each(check_memory)?;
        let features_seed = self.features_seed.unwrap_or(cx.seed);
        let directions = normal(&mut rng(features_seed, "synthetic features"), [self.n_features, self.activation_dim]);
        let directions = &directions / directions.norm_scalaropt_dim(2.0, [1], true);
        let frequencies = frequencies(self.n_features as usize, self.n_active, self.frequency_exponent);
        // Φ⁻¹(1 − p): a standard normal number exceeds it with probability p.
        let quantiles = -Tensor::from_slice(&frequencies).special_ndtri();
        Ok(Box::new(Synthetic {
            config: serde_json::to_value(self)?,
            memory,
            directions: directions.to_device(cx.device),
            thresholds: Vec::<f64>::try_from(quantiles)?.into_iter().map(|quantile| quantile as f32).collect(),
            frequencies: frequencies.into_iter().map(|frequency| frequency as f32).collect(),
            magnitude: (least as f32, greatest as f32),
            correlation: self.correlation as f32,
            groups: (self.n_features as usize).div_ceil(self.correlation_group as usize),
            noise: self.noise,
            batch_size: self.batch_size,
            rng: rng(self.seed.unwrap_or(cx.seed), "synthetic activations"),
            device: cx.device,
        }))
    }
}

impl SyntheticConfig {
    fn memory(&self) -> Vec<MemoryNeed> {
        let [batch, features, width] = [self.batch_size, self.n_features, self.activation_dim].map(|size| size as u64);
        // Frequencies, and three copies of the directions during construction.
        let lasting = features.saturating_mul(width.saturating_mul(12).saturating_add(40));
        let passing = batch.saturating_mul(features.saturating_add(width).saturating_mul(8));
        vec![
            MemoryNeed::lasting(format!("{features} true features"), lasting, "`n_features`"),
            MemoryNeed::passing(format!("{batch} activations during generation"), passing, "`batch_size`").on_host(),
        ]
    }
}

/// Returns pᵢ ∝ i^(−exponent) with sum `active`. Frequencies that would exceed 1 become 1, and the others share the
/// rest.
fn frequencies(count: usize, active: f64, exponent: f64) -> Vec<f64> {
    let weights: Vec<f64> = (1..=count).map(|i| (i as f64).powf(-exponent)).collect();
    let mut certain = 0;
    loop {
        let rest = (active - certain as f64).max(0.0) / weights[certain..].iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let over = weights[certain..].iter().take_while(|weight| **weight * rest > 1.0).count();
        if over == 0 {
            let frequency = |(i, weight): (usize, &f64)| if i < certain { 1.0 } else { weight * rest };
            return weights.iter().enumerate().map(frequency).collect();
        }
        certain += over;
    }
}

/// Draws independent standard normal numbers [rows, columns].
fn normal(rng: &mut Rng, [rows, columns]: [i64; 2]) -> Tensor {
    let values: Vec<f32> = (0..rows * columns).map(|_| rng.sample(StandardNormal)).collect();
    Tensor::from_slice(&values).view([rows, columns])
}

struct Synthetic {
    config: Value,
    memory: Vec<MemoryNeed>,
    /// gᵢ, [n, d].
    directions: Tensor,
    /// pᵢ
    frequencies: Vec<f32>,
    /// Φ⁻¹(1 − pᵢ): a feature is active if its normal number exceeds this.
    thresholds: Vec<f32>,
    magnitude: (f32, f32),
    correlation: f32,
    groups: usize,
    noise: f64,
    batch_size: i64,
    rng: Rng,
    device: Device,
}

impl Synthetic {
    /// Draws sᵢ mᵢ of a batch, [B, n].
    fn features(&mut self) -> Tensor {
        let (least, greatest) = self.magnitude;
        let features = self.frequencies.len();
        let mut values = vec![0.0_f32; self.batch_size as usize * features];
        let mut common = vec![0.0_f32; self.groups];
        let (of_group, of_feature) = (self.correlation.sqrt(), (1.0 - self.correlation).sqrt());
        for row in values.chunks_exact_mut(features) {
            if self.correlation > 0.0 {
                common.fill_with(|| self.rng.sample(StandardNormal));
            }
            for (i, value) in row.iter_mut().enumerate() {
                let active = if self.correlation > 0.0 {
                    let own: f32 = self.rng.sample(StandardNormal);
                    of_group * common[i % self.groups] + of_feature * own > self.thresholds[i]
                } else {
                    self.rng.random::<f32>() < self.frequencies[i]
                };
                if active {
                    *value = least + (greatest - least) * self.rng.random::<f32>();
                }
            }
        }
        Tensor::from_slice(&values).view([self.batch_size, features as i64])
    }
}

impl ActivationSource for Synthetic {
    fn sites(&self) -> Vec<Site> {
        let width = self.directions.size()[1];
        vec![Site::new(SyntheticConfig::NAME, (width, width))]
    }

    fn next_batch(&mut self) -> Result<Option<Activations>> {
        let mut x = self.features().to_device(self.device).matmul(&self.directions);
        if self.noise > 0.0 {
            x +=
                normal(&mut self.rng, [self.batch_size, self.directions.size()[1]]).to_device(self.device) * self.noise;
        }
        Ok(Some(Batch::of(x).into()))
    }

    fn is_endless(&self) -> bool {
        true
    }

    /// Does nothing: the stream has no beginning, and every batch is new.
    fn rewind(&mut self) -> Result<()> {
        Ok(())
    }

    fn mean_squared_norms(&mut self) -> Result<Vec<f64>> {
        dictlearn_core::data::sampled_mean_squared_norms(self)
    }

    fn true_features(&self) -> Option<Tensor> {
        Some(self.directions.shallow_clone())
    }

    fn batch_size(&self) -> Option<i64> {
        Some(self.batch_size)
    }

    fn memory(&self) -> Vec<MemoryNeed> {
        self.memory.clone()
    }

    fn describe(&self) -> Value {
        let mut described = self.config.clone();
        described["d_submodule"] = self.directions.size()[1].into();
        described["out_batch_size"] = self.batch_size.into();
        described
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.put("rng", &self.rng)?;
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.rng = state.get("rng")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_follow_the_power_law_and_add_up() {
        let even = frequencies(4, 2.0, 0.0);
        assert_eq!(even, [0.5; 4]);
        let law = frequencies(256, 8.0, 1.0);
        assert!((law.iter().sum::<f64>() - 8.0).abs() < 1e-9);
        assert_eq!(law[0], 1.0);
        assert!((law[9] / law[19] - 2.0).abs() < 1e-9);
        assert_eq!(frequencies(3, 3.0, 2.0), [1.0; 3]);
    }

    /// Returns how often each feature is active, and how often the first two of a group are active together.
    fn measured(yaml: &str) -> (Vec<f64>, f64) {
        let config: SyntheticConfig = serde_json::from_str(yaml).unwrap();
        let cx = SourceCx { seed: 1, ..SourceCx::default() };
        config.build(&cx).unwrap();
        let frequencies = frequencies(config.n_features as usize, config.n_active, config.frequency_exponent);
        let quantiles = Vec::<f64>::try_from(-Tensor::from_slice(&frequencies).special_ndtri()).unwrap();
        let mut source = Synthetic {
            config: Value::Null,
            memory: Vec::new(),
            directions: Tensor::eye(config.n_features, (Kind::Float, Device::Cpu)),
            frequencies: frequencies.iter().map(|p| *p as f32).collect(),
            thresholds: quantiles.iter().map(|q| *q as f32).collect(),
            magnitude: (0.5, 1.5),
            correlation: config.correlation as f32,
            groups: (config.n_features / config.correlation_group) as usize,
            noise: 0.0,
            batch_size: 20_000,
            rng: rng(1, "test"),
            device: Device::Cpu,
        };
        let features = source.features();
        let active = features.gt(0.0).to_kind(Kind::Double);
        let groups = source.groups as i64;
        let together = (active.select(1, 0) * active.select(1, groups)).mean(Kind::Double).double_value(&[]);
        let magnitudes = features.masked_select(&features.gt(0.0));
        assert!(magnitudes.min().double_value(&[]) >= 0.5 && magnitudes.max().double_value(&[]) <= 1.5);
        (Vec::<f64>::try_from(active.mean_dim([0].as_slice(), false, Kind::Double)).unwrap(), together)
    }

    #[test]
    fn sizes_beyond_memory_are_refused_before_allocation() {
        for (field, size) in [("n_features", i64::MAX), ("batch_size", 1 << 50)] {
            let config: SyntheticConfig = serde_json::from_value(serde_json::json!({field: size})).unwrap();
            let error = InputError::take(config.build(&SourceCx::default()).err().unwrap()).unwrap();
            assert!(error.message().contains("GB is free") && error.key() == field, "{error}");
        }
    }

    #[test]
    fn correlated_features_fire_together_at_unchanged_frequencies() {
        let config = |correlation: f64| {
            format!(
                "{{\"n_features\": 16, \"n_active\": 4, \"frequency_exponent\": 0, \"correlation_group\": 4, \
                 \"correlation\": {correlation}}}"
            )
        };
        let (alone, independent) = measured(&config(0.0));
        let (often, together) = measured(&config(0.8));
        for frequency in alone.iter().chain(&often) {
            assert!((frequency - 0.25).abs() < 0.02, "{frequency}");
        }
        assert!((independent - 0.0625).abs() < 0.01, "{independent}");
        assert!(together > 0.14, "{together}");
    }
}
