//! The TopK autoencoder: Gao et al. 2024, *Scaling and evaluating sparse autoencoders*,
//! <https://arxiv.org/abs/2406.04093>.
//!
//! With activations x `[d]`, features f `[F]` and a decoder W_d `[d, F]` whose columns have norm 1:
//!
//! ```text
//! f  = TopK(ReLU(W_e (x − b) + b_e))        (§2.3, eq. 3)
//! x̂  = W_d f + b
//! L  = ‖x − x̂‖² + α ‖e − ê‖² / Var(e),      e = x − x̂   (appendix A.2)
//! ```
//!
//! ê decodes, without bias, the k_aux = d/2 largest features among the dead: those that no activation selected for
//! `dead_feature_threshold` tokens. b starts at the geometric median of the first batch. With `k_anneal_steps` k falls
//! linearly from d. A running mean of the smallest selected feature is kept as `threshold`, by which the features can
//! be selected without sorting.
//!
//! Where this differs from the reference: the geometric median of points one of which is the guess is defined, and a
//! row that selects no positive feature does not enter the threshold (there it makes it infinite for good).

use dictlearn_core::prelude::*;

const NAME: &str = "top_k";

/// The TopK autoencoder.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TopKDictionaryConfig {
    /// How many features each activation keeps.
    #[schemars(range(min = 1))]
    pub k: i64,
    /// Number of features; or give `expansion_factor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub dict_size: Option<i64>,
    /// Number of features as a multiple of the activations' width; 8 if neither is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub expansion_factor: Option<f64>,
}

register! {
    dictionary TopKDictionaryConfig, NAME,
    summary: "Keeps the k largest features of each activation",
    paper: "Gao et al. 2024, Scaling and evaluating sparse autoencoders, https://arxiv.org/abs/2406.04093",
    example: "{type: top_k, expansion_factor: 8, k: 8}",
}

#[typetag::serde(name = NAME)]
impl DictionaryConfig for TopKDictionaryConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        let features = dict_size(self.dict_size, self.expansion_factor, cx.activation_dim)?;
        if self.k > features {
            bail!(InputError::new(format!("`k` is {}, but the dictionary has only {features} features", self.k))
                .field("k")
                .help("make `k` smaller or `dict_size` larger"));
        }
        let mut dictionary = TopK::zeros(cx.activation_dim, features, self.k, cx.device, cx.precision);
        // Random unit directions, the encoder the decoder's transpose (appendix A.1).
        let directions = randn([cx.activation_dim, features], cx.device);
        let directions = &directions / directions.norm_scalaropt_dim(2.0, [0], true);
        tch::no_grad(|| {
            dictionary.encoder_weight.copy_(&directions.transpose(0, 1));
            dictionary.decoder_weight.copy_(&directions);
        });
        Ok(Box::new(dictionary))
    }
}

/// The reference's `AutoEncoderTopK`.
#[derive(Debug)]
pub struct TopK {
    b_dec: Tensor,          // b   [d]
    encoder_weight: Tensor, // W_e [F, d]
    encoder_bias: Tensor,   // b_e [F]
    decoder_weight: Tensor, // W_d [d, F]
    k_tensor: Tensor,       // int32, as it is saved
    threshold: Tensor,      // float32; negative until it is known
    k: i64,
    precision: Precision,
}

inventory::submit! {
    SavedClass {
        class: "AutoEncoderTopK",
        name: NAME,
        shaped: |tensors, trainer, device, precision| {
            let [features, d] = saved_shape(tensors, "encoder.weight")?;
            let k = match tensors.get("k") {
                Some(k) => k.int64_value(&[]),
                None => trainer.get("k").and_then(Value::as_i64).unwrap_or(0),
            };
            if !(1..=features).contains(&k) {
                bail!(InputError::new(format!("`k` is {k}, and the dictionary has {features} features")));
            }
            Ok(Box::new(TopK::zeros(d, features, k, device, precision)))
        },
    }
}

impl TopK {
    fn zeros(d: i64, features: i64, k: i64, device: Device, precision: Precision) -> Self {
        let zeros = |size: &[i64]| trained(Tensor::zeros(size, (Kind::Float, device)));
        TopK {
            b_dec: zeros(&[d]),
            encoder_weight: zeros(&[features, d]),
            encoder_bias: zeros(&[features]),
            decoder_weight: zeros(&[d, features]),
            k_tensor: Tensor::full([0_i64; 0], k, (Kind::Int, device)),
            threshold: Tensor::full([0_i64; 0], -1.0, (Kind::Float, device)),
            k,
            precision,
        }
    }

    /// ReLU(W_e (x − b) + b_e), [.., F].
    fn post_relu(&self, x: &Tensor) -> Tensor {
        self.precision.linear(&(x - &self.b_dec), &self.encoder_weight, Some(&self.encoder_bias)).relu()
    }

    fn select(&self, post_relu: &Tensor) -> (Tensor, Tensor, Tensor) {
        let (values, indices) = post_relu.topk(self.k, -1, true, false);
        let features = post_relu.zeros_like().scatter(-1, &indices, &values);
        (features, values, indices)
    }

    fn set_k(&mut self, k: i64) {
        self.k = k;
        let _ = self.k_tensor.fill_(k);
    }
}

impl Dictionary for TopK {
    fn class(&self) -> &'static str {
        "AutoEncoderTopK"
    }

    fn dims(&self) -> Dims {
        let size = self.encoder_weight.size();
        Dims { input: size[1], features: size[0], output: size[1] }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![
            ("b_dec", self.b_dec.shallow_clone()),
            ("encoder.weight", self.encoder_weight.shallow_clone()),
            ("encoder.bias", self.encoder_bias.shallow_clone()),
            ("decoder.weight", self.decoder_weight.shallow_clone()),
        ]
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        vec![("k", self.k_tensor.shallow_clone()), ("threshold", self.threshold.shallow_clone())]
    }

    fn loaded(&mut self) {
        self.k = self.k_tensor.int64_value(&[]);
    }

    fn encode(&self, x: &Tensor) -> Tensor {
        self.select(&self.post_relu(x)).0
    }

    fn decode(&self, features: &Tensor) -> Tensor {
        self.precision.linear(features, &self.decoder_weight, None) + &self.b_dec
    }

    fn forward(&self, x: &Tensor) -> Code {
        let post_relu = self.post_relu(x);
        let (features, values, indices) = self.select(&post_relu);
        Code::new(features).with("post_relu", post_relu).with("top_values", values).with("top_indices", indices)
    }

    fn decoder(&self) -> Option<Decoder> {
        Some(Decoder { name: "decoder.weight", weight: self.decoder_weight.shallow_clone(), feature_dim: 1 })
    }

    fn encoder(&self) -> Option<Encoder> {
        Some(Encoder { weight: "encoder.weight", feature_dim: 0, biases: &["encoder.bias"] })
    }

    fn scale_biases(&mut self, scale: f64) {
        tch::no_grad(|| {
            let _ = self.b_dec.g_mul_scalar_(scale);
            let _ = self.encoder_bias.g_mul_scalar_(scale);
            if self.threshold.double_value(&[]) >= 0.0 {
                let _ = self.threshold.g_mul_scalar_(scale);
            }
        });
    }
}

/// TopK training: the selection is the sparsity, and dead features are revived by the auxiliary loss.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TopKConfig {
    /// Learning rate; null for 2e-4 / √(F / 2¹⁴), the paper's scaling law.
    #[schemars(range(min = 0))]
    pub lr: Option<f64>,
    /// Weight α of the auxiliary loss.
    #[schemars(range(min = 0))]
    pub auxk_alpha: f64,
    /// Steps over which the learning rate rises from 0.
    pub warmup_steps: u64,
    /// Step from which the learning rate falls to 0 at the last step; null for never.
    pub decay_start: Option<u64>,
    /// How slowly the threshold's running mean moves.
    #[schemars(range(min = 0, max = 1))]
    pub threshold_beta: f64,
    /// The threshold is kept from the step after this one on.
    pub threshold_start_step: u64,
    /// Steps over which k falls from the activations' width to the dictionary's `k`; null for none.
    #[schemars(range(min = 1))]
    pub k_anneal_steps: Option<u64>,
    /// A feature is dead when no activation selected it for so many tokens.
    #[schemars(range(min = 1))]
    pub dead_feature_threshold: i64,
}

impl Default for TopKConfig {
    fn default() -> Self {
        TopKConfig {
            lr: None,
            auxk_alpha: 1.0 / 32.0,
            warmup_steps: 1000,
            decay_start: None,
            threshold_beta: 0.999,
            threshold_start_step: 1000,
            k_anneal_steps: None,
            dead_feature_threshold: 10_000_000,
        }
    }
}

register! {
    trainer TopKConfig, NAME,
    summary: "Squared error of the k largest features, with an auxiliary loss for dead ones",
    paper: "Gao et al. 2024, Scaling and evaluating sparse autoencoders, https://arxiv.org/abs/2406.04093",
    example: "{type: top_k, lr: 1e-3, warmup_steps: 20}",
    usual_dictionary: NAME,
}

#[typetag::serde(name = NAME)]
impl TrainerConfig for TopKConfig {
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
        let Some(dictionary) = cx.dictionary.downcast::<TopK>() else {
            bail!(InputError::new(format!("the trainer `{NAME}` cannot train the class {}", cx.dictionary.class()))
                .help(format!("it sets k and the threshold of the dictionary `{NAME}`, which others do not have")));
        };
        let schedule = Schedule {
            steps: cx.steps,
            warmup_steps: self.warmup_steps,
            decay_start: self.decay_start,
            resample_steps: None,
            sparsity_warmup_steps: None,
        }
        .check()?;
        let dims = dictionary.dims();
        if let Some(anneal) = self.k_anneal_steps {
            if anneal >= cx.steps {
                bail!(InputError::new(format!(
                    "`k_anneal_steps` is {anneal}, but the run has only {} steps",
                    cx.steps
                ))
                .field("k_anneal_steps")
                .help("`k_anneal_steps` must be less than `steps`"));
            }
            if dictionary.k >= dims.input {
                bail!(InputError::new(format!(
                    "k cannot fall from the activations' width, {}, to {}",
                    dims.input, dictionary.k
                ))
                .field("k_anneal_steps")
                .help("leave `k_anneal_steps` out, or make `k` smaller"));
            }
        }
        Ok(Box::new(TopKTrainer {
            lr: self.lr.unwrap_or_else(|| 2e-4 / (dims.features as f64 / 16384.0).sqrt()),
            auxk_alpha: self.auxk_alpha,
            schedule,
            threshold_beta: self.threshold_beta,
            threshold_start_step: self.threshold_start_step,
            k: dictionary.k,
            k_anneal_steps: self.k_anneal_steps,
            dead_feature_threshold: self.dead_feature_threshold,
            top_k_aux: dims.input / 2,
            fired: Firing::new(dims.features, dictionary.threshold.device()),
            figures: Figures::default(),
        }))
    }

    fn class(&self) -> &'static str {
        "TopKTrainer"
    }
}

/// The reference's `TopKTrainer`.
struct TopKTrainer {
    lr: f64,
    auxk_alpha: f64,
    schedule: Schedule,
    threshold_beta: f64,
    threshold_start_step: u64,
    /// The k that annealing ends at.
    k: i64,
    k_anneal_steps: Option<u64>,
    dead_feature_threshold: i64,
    top_k_aux: i64,
    fired: Firing,
    figures: Figures,
}

/// What the reference's trainer logs beside its losses.
#[derive(Default)]
struct Figures {
    effective_l0: i64,
    dead_features: i64,
    pre_norm_auxk_loss: Option<Tensor>,
}

impl Trainer for TopKTrainer {
    fn adam(&self) -> AdamConfig {
        AdamConfig::default()
    }

    fn lr(&self, step: u64) -> f64 {
        self.lr * self.schedule.lr_factor(step)
    }

    fn settings(&self, settings: &mut Map<String, Value>) {
        settings.insert("lr".to_owned(), self.lr.into());
    }

    fn begin(&mut self, dictionary: &mut dyn Dictionary, batch: &Batch) -> Result<()> {
        if let Some(dictionary) = dictionary.downcast_mut::<TopK>() {
            tch::no_grad(|| dictionary.b_dec.copy_(&geometric_median(&batch.x)));
        }
        Ok(())
    }

    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        let (values, indices) = (pass.code.extra("top_values")?, pass.code.extra("top_indices")?);
        if pass.step > self.threshold_start_step {
            self.update_threshold(pass.dictionary, values)?;
        }
        self.figures = Figures { effective_l0: values.size()[1], ..Figures::default() };
        self.fired.update_indices(indices, pass.batch.len());

        let residual = pass.residual();
        let mse = residual.square().sum_dim_intlist(-1, false, Kind::Float).mean(Kind::Float);
        terms.add("l2_loss", mse, 1.0);
        if self.auxk_alpha > 0.0 {
            let auxk = self.auxk_loss(pass, &residual.detach())?;
            terms.add("auxk_loss", auxk, self.auxk_alpha);
        }
        Ok(())
    }

    fn constrain_gradients(&mut self, dictionary: &dyn Dictionary) -> Result<()> {
        if let Some(decoder) = dictionary.decoder() {
            remove_parallel_gradient(&decoder, 1e-6);
        }
        clip_gradients(dictionary, 1.0);
        Ok(())
    }

    fn after_step(&mut self, cx: &mut AfterStep) -> Result<()> {
        if let Some(dictionary) = cx.dictionary.downcast_mut::<TopK>() {
            if let Some(anneal) = self.k_anneal_steps {
                let ratio = cx.step.min(anneal) as f64 / anneal as f64;
                let wide = dictionary.dims().input as f64;
                dictionary.set_k((wide * (1.0 - ratio) + self.k as f64 * ratio) as i64);
            }
        }
        if let Some(decoder) = cx.dictionary.decoder() {
            normalize_decoder(&decoder, f64::from(f32::EPSILON));
        }
        Ok(())
    }

    fn log(&self, row: &mut Map<String, Value>) {
        row.insert("effective_l0".to_owned(), self.figures.effective_l0.into());
        row.insert("dead_features".to_owned(), self.figures.dead_features.into());
        // −1 where there is none, as the reference logs it.
        let pre_norm =
            self.figures.pre_norm_auxk_loss.as_ref().map_or(Value::from(-1), dictlearn_core::trainer::number);
        row.insert("pre_norm_auxk_loss".to_owned(), pre_norm);
    }

    fn state(&self) -> Result<State> {
        Ok(self.fired.state())
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.fired.restore(state)
    }
}

impl TopKTrainer {
    /// θ ← β θ + (1 − β) · mean over activations of their smallest positive selected feature.
    fn update_threshold(&self, dictionary: &dyn Dictionary, top_values: &Tensor) -> Result<()> {
        let Some(dictionary) = dictionary.downcast::<TopK>() else { return Ok(()) };
        tch::no_grad(|| {
            let values = top_values.detach();
            let smallest = values.masked_fill(&values.le(0.0), f64::INFINITY).amin([1], false);
            let some = smallest.isfinite();
            if !bool::try_from(some.any())? {
                return Ok(());
            }
            let smallest = smallest.masked_select(&some).mean(Kind::Float);
            let mut threshold = dictionary.threshold.shallow_clone();
            if threshold.double_value(&[]) < 0.0 {
                threshold.copy_(&smallest);
            } else {
                threshold.copy_(&(&threshold * self.threshold_beta + smallest * (1.0 - self.threshold_beta)));
            }
            Ok(())
        })
    }

    /// ‖e − ê‖² / Var(e) for the dead features' best reconstruction ê of the residual e, [B, d].
    fn auxk_loss(&mut self, pass: &Pass, residual: &Tensor) -> Result<Tensor> {
        let dead = self.fired.silent_for(self.dead_feature_threshold);
        let dead = dead.nonzero().reshape([-1]);
        let count = dead.size()[0];
        self.figures.dead_features = count;
        let Some(decoder) = pass.dictionary.decoder().filter(|_| count > 0) else {
            return Ok(Tensor::zeros([0_i64; 0], (Kind::Float, residual.device())));
        };
        // Only the dead columns take part, so only they are sorted and decoded.
        let features = pass.code.extra("post_relu")?.index_select(1, &dead);
        let (values, indices) = features.topk(self.top_k_aux.min(count), -1, true, false);
        let kept = features.zeros_like().scatter(-1, &indices, &values);
        let reconstruction = kept.matmul(&decoder.weight.index_select(1, &dead).transpose(0, 1));
        let mean = |rows: Tensor| rows.sum_dim_intlist(-1, false, Kind::Float).mean(Kind::Float);
        let loss = mean((residual - reconstruction).square());
        self.figures.pre_norm_auxk_loss = Some(loss.detach());
        let centred = residual - residual.mean_dim([0].as_slice(), true, Kind::Float);
        Ok((loss / mean(centred.square())).nan_to_num(0.0, None::<f64>, None::<f64>))
    }
}

/// The point `[d]` with the least sum of distances to the points [N, d], by Weiszfeld's iteration from their mean.
fn geometric_median(points: &Tensor) -> Tensor {
    let mut guess = points.mean_dim([0].as_slice(), false, Kind::Float);
    for _ in 0..100 {
        // A point on the guess would weigh infinitely; within rounding of it, its weight is merely very large.
        let distances = (points - &guess).norm_scalaropt_dim(2.0, [1], false).clamp_min(1e-12);
        let weights = distances.reciprocal();
        let weights = &weights / weights.sum(Kind::Float);
        let next = (weights.unsqueeze(1) * points).sum_dim_intlist([0].as_slice(), false, Kind::Float);
        let moved = (&next - &guess).norm().double_value(&[]);
        guess = next;
        if moved < 1e-5 {
            break;
        }
    }
    guess
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometric_median_of_a_constant_batch_is_the_point() {
        // The mean is the point itself: every distance is 0, and 0/0 must not come of it.
        let points = Tensor::from_slice2(&[[1.0f32, 2.0], [1.0, 2.0], [1.0, 2.0]]);
        let apart = (geometric_median(&points) - points.get(0)).abs().max().double_value(&[]);
        assert!(apart < 1e-6, "{apart}");
    }

    #[test]
    fn geometric_median_of_a_line_is_its_middle_point() {
        // On a line it is the median, 1, where the mean is 34.
        let points = Tensor::from_slice2(&[[0.0f32, 0.0], [1.0, 0.0], [101.0, 0.0]]);
        let median = Vec::<f32>::try_from(geometric_median(&points)).unwrap();
        assert!((median[0] - 1.0).abs() < 0.05 && median[1] == 0.0, "{median:?}");
    }

    #[test]
    fn a_row_without_positive_features_leaves_the_threshold_finite() {
        let dictionary = TopK::zeros(2, 4, 2, Device::Cpu, Precision::Float32);
        let cx = TrainerCx { dictionary: &dictionary, steps: 2000, seed: 0 };
        let trainer = TopKTrainer {
            lr: 0.0,
            auxk_alpha: 0.0,
            schedule: Schedule {
                steps: cx.steps,
                warmup_steps: 0,
                decay_start: None,
                resample_steps: None,
                sparsity_warmup_steps: None,
            },
            threshold_beta: 0.5,
            threshold_start_step: 0,
            k: 2,
            k_anneal_steps: None,
            dead_feature_threshold: 1,
            top_k_aux: 1,
            fired: Firing::new(4, Device::Cpu),
            figures: Figures::default(),
        };
        trainer.update_threshold(&dictionary, &Tensor::from_slice2(&[[3.0f32, 1.0], [0.0, 0.0]])).unwrap();
        assert_eq!(dictionary.threshold.double_value(&[]), 1.0);
        trainer.update_threshold(&dictionary, &Tensor::from_slice2(&[[0.0f32, 0.0], [0.0, 0.0]])).unwrap();
        assert_eq!(dictionary.threshold.double_value(&[]), 1.0);
        trainer.update_threshold(&dictionary, &Tensor::from_slice2(&[[5.0f32, 3.0], [9.0, 0.0]])).unwrap();
        // Smallest positive of the rows: 3 and 9, mean 6; 0.5 · 1 + 0.5 · 6.
        assert_eq!(dictionary.threshold.double_value(&[]), 3.5);
    }
}
