//! How a dictionary's features divide among the parts of a joined site: Lindsey et al. 2024, *Sparse Crosscoders for
//! Cross-Layer Features and Model Diffing*, <https://transformer-circuits.pub/2024/crosscoders/index.html>, "Model
//! Diffing".
//!
//! For a feature i with decoder directions d_iˢ, in units of the parts' median norms, the relative norm in part s is
//!
//! ```text
//! r_iˢ = ‖d_iˢ‖ / Σ_t ‖d_iᵗ‖
//! ```
//!
//! A feature exclusive to one part has 1 there; a feature that two parts share equally has 1/2 in both.

use dictlearn_core::prelude::*;

/// Variance explained per part, and how parts share features.
#[component(metric "crosscoder",
    summary = "Variance explained per part of a joined site, and how parts share features",
    paper = "Lindsey et al. 2024, Sparse Crosscoders for Cross-Layer Features and Model Diffing, \
        https://transformer-circuits.pub/2024/crosscoders/index.html", example = "{type: crosscoder}", default)]
pub struct CrosscoderMetricConfig {
    /// Number of batches to measure on.
    #[default(10)]
    #[schemars(range(min = 1))]
    pub n_batches: u64,
    /// Number of bins of the histogram of relative decoder norms, from 0 to 1.
    #[default(20)]
    #[schemars(range(min = 1, max = 10_000))]
    pub bins: u64,
    /// A feature is exclusive to a part if its relative norm there is above this.
    #[default(0.9)]
    #[schemars(range(min = 0.5, max = 1))]
    pub alone: f64,
}

impl Metric for CrosscoderMetricConfig {
    fn refuses(&self, source: &mut dyn ActivationSource) -> Option<String> {
        let joined = source.sites().iter().all(|site| !site.parts.is_empty());
        (!joined).then(|| "the activations do not have several parts (see source `joined`)".to_owned())
    }

    fn evaluate(&mut self, subjects: &[Subject], source: &mut dyn ActivationSource) -> Result<Option<Vec<Figures>>> {
        let sites = source.sites();
        let mut measured: Vec<Vec<Part>> = subjects.iter().map(|subject| parts(&sites[subject.site])).collect();
        let mut batches = 0;
        for _ in 0..self.n_batches {
            let Some(activations) = source.next_batch()? else { break };
            batches += 1;
            for (subject, parts) in subjects.iter().zip(&mut measured) {
                let batch = &activations.sites[subject.site];
                let (x_hat, _) = subject.dictionary.reconstruct(&batch.x);
                let residual = &batch.target - x_hat;
                parts.iter_mut().for_each(|part| part.add(&batch.target, &residual));
            }
        }
        if batches == 0 {
            return Ok(None);
        }
        let found = |(subject, parts): (&Subject, Vec<Part>)| self.figures(subject.dictionary, &parts);
        Ok(Some(subjects.iter().zip(measured).map(found).collect::<Result<_>>()?))
    }
}

/// Sums over the batches for one part of a site.
struct Part {
    name: String,
    start: i64,
    width: i64,
    variance: Variance,
    residual_variance: Variance,
    /// Median norm in each batch.
    norms: Vec<f64>,
}

fn parts(site: &Site) -> Vec<Part> {
    let mut start = 0;
    let part = |part: &SitePart| {
        start += part.output_dim;
        Part {
            name: part.name.clone(),
            start: start - part.output_dim,
            width: part.output_dim,
            variance: Variance::default(),
            residual_variance: Variance::default(),
            norms: Vec::new(),
        }
    };
    site.parts.iter().map(part).collect()
}

impl Part {
    fn of(&self, values: &Tensor) -> Tensor {
        values.narrow(1, self.start, self.width)
    }

    fn add(&mut self, target: &Tensor, residual: &Tensor) {
        let target = self.of(target);
        self.norms.push(target.norm_scalaropt_dim(2.0, [1], false).median().double_value(&[]));
        self.variance.add(&target);
        self.residual_variance.add(&self.of(residual));
    }

    fn norm(&self) -> f64 {
        (self.norms.iter().sum::<f64>() / self.norms.len().max(1) as f64).max(f64::MIN_POSITIVE)
    }
}

impl CrosscoderMetricConfig {
    fn figures(&self, dictionary: &dyn Dictionary, parts: &[Part]) -> Result<Figures> {
        let mut found = Map::new();
        for part in parts {
            let explained = 1.0 - part.residual_variance.total() / part.variance.total();
            found.insert(part.name.clone(), Value::Object(figures([("frac_variance_explained", explained)])));
        }
        let mut all = Figures::new();
        if let Some(directions) = dictionary.directions() {
            let norm = |part: &Part| part.of(&directions).norm_scalaropt_dim(2.0, [1], false) / part.norm();
            let norms = Tensor::stack(&parts.iter().map(norm).collect::<Vec<_>>(), 0);
            let sums = norms.sum_dim_intlist([0].as_slice(), false, Kind::Float);
            // A feature with zero decoder norm belongs to no part.
            let writing = sums.gt(0.0);
            let mut shared = writing.sum(Kind::Int64).int64_value(&[]);
            for (part, norms) in parts.iter().zip(norms.unbind(0)) {
                let relative = (norms / &sums).masked_select(&writing).to_device(Device::Cpu);
                let bins = self.bins as i64;
                let bin = (&relative * self.bins as f64).to_kind(Kind::Int64).clamp_max(bins - 1);
                let histogram = bin.bincount(None::<Tensor>, bins);
                let alone = relative.gt(self.alone).sum(Kind::Int64).int64_value(&[]);
                shared -= alone;
                if let Some(Value::Object(figures)) = found.get_mut(&part.name) {
                    figures.insert("relative_decoder_norms".to_owned(), Vec::<i64>::try_from(histogram)?.into());
                    figures.insert("features_alone".to_owned(), alone.into());
                }
            }
            all.insert("features_shared".to_owned(), shared.into());
        }
        all.insert("parts".to_owned(), found.into());
        Ok(all)
    }
}
