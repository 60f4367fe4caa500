//! p-annealing: Karvonen et al. 2024, *Measuring Progress in Dictionary Learning for Language Model Interpretability
//! with Board Game Models*, <https://arxiv.org/abs/2408.00113>.
//!
//! An L1 penalty is easy to train under and shrinks features; an Lp penalty with p < 1 is closer to counting them and
//! hard to train under. So p falls from 1 while training. With activations x, their reconstruction x̂, and a the
//! activations that the dictionary lets a penalty fall on ([`Code::penalized`]: features, or a gate's):
//!
//! ```text
//! L       = ‖x − x̂‖² + λ_s ‖a‖_p^p     `Lp^p`: Σᵢ aᵢ^p,   or  λ_s ‖a‖_p     `Lp`: (Σᵢ aᵢ^p)^(1/p)
//! p       takes n_sparsity_updates evenly spaced values, p_start first and p_end last, at as many steps from anneal_start
//!         to anneal_end (a single update leaves it at p_start)
//! λ_{s+1} = λ_s E‖a‖_{p_s} / E‖a‖_{p_{s+1}}, means over the last sparsity_queue_length batches
//! ```
//!
//! The last line keeps the strength of the penalty where it was when p changes.
//!
//! Two trainers: `p_anneal`, for any dictionary, and `gated_anneal`, the same with the reference's settings for a
//! gated one (no momentum, a lower learning rate, `Lp^p`). A gated dictionary brings its auxiliary loss along whichever
//! trains it.
//!
//! Where this differs from the reference: resampling works (there it writes to a copy); `p_end: 0` is defined. At p = 0
//! the penalty is the number of active features in both forms, the limit of Lp^p, and has no gradient: an annealing
//! that reaches it presses no more. With `anneal_end` at its default, the end of the run, it is not reached. Where the
//! ratio of the norms is no number above 0 (no feature is active, or ‖a‖_p with a p near 0 is too large for a float32)
//! p and λ stay as they are.

use std::collections::VecDeque;

use dictlearn_core::prelude::*;
use dictlearn_core::train::analytic;
use dictlearn_core::train::analytic::{Penalty, squared_error};

const PAPER: &str = "Karvonen et al. 2024, Measuring Progress in Dictionary Learning, https://arxiv.org/abs/2408.00113";

/// The form of the penalty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
pub enum SparsityFunction {
    /// (Σ a^p)^(1/p)
    #[serde(rename = "Lp")]
    Lp,
    /// Σ a^p
    #[serde(rename = "Lp^p")]
    LpToTheP,
}

/// How often p and λ are updated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum Updates {
    /// So many times.
    Times(u64),
    /// At every step of the annealing.
    Continuous,
}

const CONTINUOUS: &str = "continuous";

impl TryFrom<Value> for Updates {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let number = match &value {
            Value::String(text) if text == CONTINUOUS => return Ok(Updates::Continuous),
            Value::String(text) => text.replace('_', "").parse::<f64>().ok(),
            other => other.as_f64(),
        };
        match number.filter(|number| number.fract() == 0.0 && (1.0..1e15).contains(number)) {
            Some(number) => Ok(Updates::Times(number as u64)),
            None => Err(format!("{value} is neither a whole number above 0 nor `{CONTINUOUS}`")),
        }
    }
}

impl From<Updates> for Value {
    fn from(updates: Updates) -> Value {
        match updates {
            Updates::Times(times) => times.into(),
            Updates::Continuous => CONTINUOUS.into(),
        }
    }
}

impl JsonSchema for Updates {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Updates".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": ["integer", "string"], "minimum": 1})
    }
}

/// The two trainers' configs: the same fields with defaults of their own.
macro_rules! config {
    ($(#[$about:meta])* $name:ident, sparsity_function: $sparsity_function:expr_2021) => {
        $(#[$about])*
        pub struct $name {
            /// Steps over which the penalty rises from 0; null for none.
            #[default(Some(2000))]
            pub sparsity_warmup_steps: Option<u64>,
            /// The penalty: `Lp`, (Σ a^p)^(1/p), or `Lp^p`, Σ a^p.
            #[default($sparsity_function)]
            pub sparsity_function: SparsityFunction,
            /// Weight λ of the penalty before annealing; what `l1_penalty` is where p is 1.
            #[default(1e-1)]
            #[schemars(range(min = 0))]
            pub initial_sparsity_penalty: f64,
            /// Step at which p starts to fall.
            #[default(15000)]
            pub anneal_start: u64,
            /// Step at which it has fallen to `p_end`; null for the end of the run, which is never reached.
            #[default]
            pub anneal_end: Option<u64>,
            /// p before annealing.
            #[default(1.0)]
            #[schemars(range(min = 0))]
            pub p_start: f64,
            /// p after it. At 0 the penalty counts active features and has no gradient.
            #[default(0.0)]
            #[schemars(range(min = 0))]
            pub p_end: f64,
            /// How many times p and λ are updated: a number, or `continuous` for every step of the annealing.
            #[default(Updates::Times(10))]
            pub n_sparsity_updates: Updates,
            /// Batches over which the penalty is averaged to adapt λ.
            #[default(10)]
            #[schemars(range(min = 1))]
            pub sparsity_queue_length: u64,
            /// How activations are drawn for dead features: by their `loss` (the reference) or `loss_squared` (Bricken
            /// et al. 2023).
            #[default]
            pub resample_weight: ResampleWeight,
        }

        impl $name {
            /// Adapts defaults to the length of the run. Annealing that would not begin takes the last two fifths.
            fn adapt_annealing(&mut self, length: &mut RunLength) {
                let end = self.anneal_end.unwrap_or(length.steps());
                let last = end.min(length.steps());
                let three_fifths = last - last / 5 * 2;
                let begins = self.anneal_start < last && !length.is_short();
                let most = if begins { self.anneal_start } else { three_fifths.min(last.saturating_sub(1)) };
                length.at_most("anneal_start", &mut self.anneal_start, most);
                let most = end.saturating_add(1).saturating_sub(self.anneal_start);
                if let Updates::Times(count) = &mut self.n_sparsity_updates {
                    length.at_most("n_sparsity_updates", count, most.max(1));
                }
            }

            fn trainer(&self, adam: AdamConfig, cx: &TrainerCx) -> Result<PAnneal> {
                penalizable(cx.dictionary, Self::NAME)?;
                let schedule = self.schedule(cx);
                let mut mistakes = Mistakes::new();
                mistakes.keep(schedule.check())?;
                let annealing = mistakes.keep(Annealing::new(
                    (self.p_start, self.p_end),
                    (self.anneal_start, self.anneal_end.unwrap_or(cx.steps)),
                    self.n_sparsity_updates,
                    cx.steps,
                ))?;
                mistakes.into_result()?;
                Ok(PAnneal {
                    adam,
                    lr: self.lr,
                    schedule,
                    sparsity_function: self.sparsity_function,
                    annealing: annealing.context("no annealing")?,
                    anneals_to_the_end: self.anneal_end.is_none(),
                    queue_length: self.sparsity_queue_length as usize,
                    state: Annealed {
                        p: self.p_start,
                        next_p: None,
                        updates: 0,
                        coefficient: self.initial_sparsity_penalty,
                        queue: VecDeque::new(),
                    },
                    resampling: Resampling::new(self.resample_steps, self.resample_weight, cx.dictionary)?,
                    seen: None,
                })
            }
        }
    };
}

config! {
    /// The loss is the squared error of the reconstruction, summed over dimensions, plus λ times the Lp norm of the
    /// activations that the dictionary lets a penalty fall on (or that norm to the power p), both averaged over the
    /// batch. From anneal_start on p falls from p_start to p_end in steps; at each, λ is multiplied by the ratio of the
    /// mean norms with the old and the new p, so that the penalty keeps its strength. Every decoder column keeps norm 1.
    #[component(
        trainer,
        name = "p_anneal",
        summary = "Squared error with an Lp penalty whose p falls from 1",
        paper = PAPER,
        example = "{type: p_anneal, lr: 1e-3, initial_sparsity_penalty: 0.05, warmup_steps: 20, sparsity_warmup_steps: 20, \
              anneal_start: 25, anneal_end: 45, p_end: 0.5, n_sparsity_updates: 5}",
        usual_dictionary = "auto_encoder",
        short_run = "{dictionary: {type: auto_encoder, expansion_factor: 4}, trainer: {type: p_anneal, lr: 2e-3, \
               initial_sparsity_penalty: 0.04, warmup_steps: 100, sparsity_warmup_steps: 300, decay_start: 1200, \
               anneal_start: 500, anneal_end: 1200, p_end: 0.5}}",
        measured = "87.3% of the variance explained with L0 39, 99.4% of the cross entropy recovered",
        fields(lr = 1e-3, warmup_steps, decay_start, sparsity_warmup_steps, .., resample_steps, resample_weight),
    )]
    PAnnealConfig, sparsity_function: SparsityFunction::Lp
}

config! {
    /// p_anneal with the settings of gated training: no momentum, a lower learning rate, Lp^p. The loss is the squared
    /// error of the reconstruction, plus λ times the p-th powers of the open gates' activations, plus, from the gated
    /// dictionary, the squared error of what these alone reconstruct. From anneal_start on p falls from p_start to
    /// p_end in steps; at each, λ is multiplied by the ratio of the mean penalties with the old and the new p. Every
    /// decoder column keeps norm 1.
    #[component(
        trainer,
        name = "gated_anneal",
        summary = "p_anneal on a gate, with the settings of gated training",
        paper = PAPER,
        example = "{type: gated_anneal, lr: 1e-3, initial_sparsity_penalty: 0.05, warmup_steps: 20, \
              sparsity_warmup_steps: 20, anneal_start: 25, anneal_end: 45, p_end: 0.5, n_sparsity_updates: 5}",
        usual_dictionary = "gated",
        short_run = "{dictionary: {type: gated, expansion_factor: 4}, trainer: {type: gated_anneal, lr: 2e-3, \
               initial_sparsity_penalty: 0.13, warmup_steps: 100, sparsity_warmup_steps: 300, decay_start: 1200, \
               anneal_start: 500, anneal_end: 1200, p_end: 0.5}}",
        measured = "81.4% of the variance explained with L0 27, 99.1% of the cross entropy recovered",
        fields(lr = 3e-4, warmup_steps, decay_start, sparsity_warmup_steps, .., resample_steps, resample_weight),
    )]
    GatedAnnealConfig, sparsity_function: SparsityFunction::LpToTheP
}

impl TrainerConfig for PAnnealConfig {
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
        Ok(Box::new(self.trainer(AdamConfig::default(), cx)?))
    }

    fn class(&self) -> &'static str {
        "PAnnealTrainer"
    }

    fn adapt(&mut self, length: &mut RunLength) {
        self.adapt_annealing(length);
    }
}

impl TrainerConfig for GatedAnnealConfig {
    fn build(&self, cx: &TrainerCx) -> Result<Box<dyn Trainer>> {
        if !cx.dictionary.exposes("gate") {
            bail!(
                InputError::new(format!(
                    "the trainer `{}` cannot train the class {}: it has no gate to penalise",
                    Self::NAME,
                    cx.dictionary.class()
                ))
                .help(format!("use the trainer `{}`, or a gated dictionary", PAnnealConfig::NAME))
            );
        }
        let adam = AdamConfig { betas: (0.0, 0.999), ..AdamConfig::default() };
        Ok(Box::new(self.trainer(adam, cx)?))
    }

    fn class(&self) -> &'static str {
        "GatedAnnealTrainer"
    }

    fn adapt(&mut self, length: &mut RunLength) {
        self.adapt_annealing(length);
    }
}

/// When p is updated, and to what.
struct Annealing {
    /// The steps, rising.
    steps: Vec<u64>,
    /// p from each of them on.
    values: Vec<f64>,
    p_end: f64,
}

impl Annealing {
    fn new((p_start, p_end): (f64, f64), (start, end): (u64, u64), updates: Updates, steps: u64) -> Result<Self> {
        if start >= steps {
            bail!(
                InputError::new(format!("`anneal_start` is {start}, but the run has only {steps} steps"))
                    .field("anneal_start")
                    .help("`anneal_start` must be less than `steps`")
            );
        }
        if end <= start {
            bail!(
                InputError::new(format!("`anneal_end` is {end}, and `anneal_start` {start}"))
                    .field("anneal_end")
                    .help("`anneal_end` must come after `anneal_start`")
            );
        }
        let most = end - start + 1;
        let count = match updates {
            Updates::Times(count) if count > most => {
                bail!(
                    InputError::new(format!("`n_sparsity_updates` is {count}, in {most} steps of annealing"))
                        .field("n_sparsity_updates")
                        .help(format!("it can be at most {most}, or `{CONTINUOUS}`"))
                )
            }
            Updates::Times(count) => count,
            Updates::Continuous => most,
        } as i64;
        // libtorch's own, for its rounding: whole steps are cut off, p is a float32.
        let at = Tensor::linspace(start as i64, end as i64, count, (Kind::Int64, Device::Cpu));
        let values = Tensor::linspace(p_start, p_end, count, (Kind::Float, Device::Cpu));
        Ok(Annealing {
            steps: Vec::<i64>::try_from(at)?.into_iter().map(|step| step as u64).collect(),
            values: Vec::<f32>::try_from(values)?.into_iter().map(f64::from).collect(),
            p_end,
        })
    }

    /// Whether the update that comes after `done` of them is due at a step.
    fn due(&self, step: u64, done: usize) -> bool {
        self.steps.get(done) == Some(&step)
    }
}

/// Where the annealing stands.
#[derive(Debug)]
struct Annealed {
    p: f64,
    next_p: Option<f64>,
    updates: usize,
    /// λ
    coefficient: f64,
    /// The penalty with p and with the next p, scalars, of the last batches. They are read when they are used: a GPU would have to
    /// be waited for at each step.
    queue: VecDeque<[Tensor; 2]>,
}

/// The reference's `PAnnealTrainer` and `GatedAnnealTrainer`.
struct PAnneal {
    adam: AdamConfig,
    lr: f64,
    schedule: Schedule,
    sparsity_function: SparsityFunction,
    annealing: Annealing,
    /// Whether it ends where the run does.
    anneals_to_the_end: bool,
    queue_length: usize,
    state: Annealed,
    resampling: Option<Resampling>,
    /// The last loss's penalty with p and with the next p, queued once the step is taken.
    seen: Option<[Tensor; 2]>,
}

/// The mean penalty of activations [B, F], none negative. At p = 0 the mean number of those above 0.
fn lp(activations: &Tensor, p: f64, function: SparsityFunction) -> Tensor {
    let active = activations.gt(0.0);
    if p == 0.0 {
        return mean_of_sums(&active.to_kind(activations.kind()));
    }
    // The derivative of a^p at 0 is infinite for p < 1, and an infinite number times 0 further back would be NaN: where
    // an activation is 0, so is its power, and no gradient passes.
    let powers = activations.where_self(&active, &activations.ones_like()).pow_tensor_scalar(p) * active;
    if function == SparsityFunction::LpToTheP || p == 1.0 {
        return mean_of_sums(&powers);
    }
    let sums = powers.sum_dim_intlist(-1, false, powers.kind());
    let some = sums.gt(0.0);
    let norms = sums.where_self(&some, &sums.ones_like()).pow_tensor_scalar(1.0 / p) * some;
    norms.mean(norms.kind())
}

/// The same penalty by hand, with what the next p would make of it.
struct Lp {
    weight: f64,
    function: SparsityFunction,
    p: f64,
    next_p: Option<f64>,
    /// Σ a^p of each row, with p and with the next p.
    sums: [Tensor; 2],
}

impl Lp {
    fn value(&self, sums: &Tensor, p: f64) -> Tensor {
        if self.function == SparsityFunction::LpToTheP || p == 1.0 || p == 0.0 {
            return sums.mean(Kind::Float);
        }
        sums.pow_tensor_scalar(1.0 / p).mean(Kind::Float)
    }
}

/// a^p of activations, none negative: 0 where a is 0.
fn powers(activations: &Tensor, p: f64) -> Tensor {
    let activations = activations.to_kind(Kind::Float);
    if p == 1.0 {
        return activations;
    }
    let active = activations.gt(0.0);
    if p == 0.0 {
        return active.to_kind(Kind::Float);
    }
    activations.where_self(&active, &activations.ones_like()).pow_tensor_scalar(p) * active
}

impl Penalty for Lp {
    fn see(&mut self, block: &Block, activations: &Tensor) {
        for (p, sums) in [Some(self.p), self.next_p].into_iter().zip(&mut self.sums) {
            if let Some(p) = p {
                *sums += block.sum_by_row(&powers(activations, p));
            }
        }
    }

    fn terms(&mut self, terms: &mut Terms) -> Result<()> {
        terms.add_sparsity("lp_loss", self.value(&self.sums[0], self.p), self.weight);
        Ok(())
    }

    fn slope(&self, block: &Block, activations: &dyn Fn() -> Tensor) -> Slope {
        let (p, weight) = (self.p, self.weight / self.sums[0].numel() as f64);
        if p == 0.0 || p == 1.0 {
            return Slope::Same(p * weight);
        }
        let slope = powers(&activations(), p - 1.0) * weight;
        Slope::Each(match self.function {
            SparsityFunction::LpToTheP => slope * p,
            SparsityFunction::Lp => {
                let sums = &self.sums[0];
                let some = sums.gt(0.0);
                let outer = sums.where_self(&some, &sums.ones_like()).pow_tensor_scalar(1.0 / p - 1.0) * some;
                slope * block.of_rows(&outer)
            }
        })
    }
}

impl PAnneal {
    /// Notes the penalty, and the one with the next p, where there is one.
    fn see(&mut self, penalty: &Tensor, next: impl FnOnce(f64) -> Tensor) {
        self.seen = self.state.next_p.map(|next_p| [penalty.detach(), next(next_p)]);
    }

    fn weight(&self, step: u64) -> f64 {
        self.state.coefficient * self.schedule.sparsity_factor(step)
    }

    /// p and λ for the steps to come, if it is time for the next ones.
    fn update(&mut self, step: u64) {
        let Annealing { values, p_end, .. } = &self.annealing;
        let state = &mut self.state;
        if !self.annealing.due(step, state.updates) {
            return;
        }
        let [old, new] = [0, 1].map(|which| state.queue.iter().map(|pair| pair[which].double_value(&[])).sum::<f64>());
        let ratio = if state.next_p.is_some() { old / new } else { 1.0 };
        if ratio.is_finite() && ratio > 0.0 {
            state.coefficient *= ratio;
            state.p = values[state.updates];
        }
        state.next_p = Some(values.get(state.updates + 1).copied().unwrap_or(*p_end));
        state.updates += 1;
    }
}

impl Trainer for PAnneal {
    fn adam(&self) -> AdamConfig {
        self.adam
    }

    fn lr(&self, step: u64) -> f64 {
        self.lr * self.schedule.lr_factor(step)
    }

    fn depends_on_steps(&self) -> bool {
        self.schedule.depends_on_steps() || self.anneals_to_the_end
    }

    fn settings(&self, settings: &mut Map<String, Value>) {
        settings.insert("sparsity_penalty".to_owned(), self.state.coefficient.into());
        settings.insert("n_sparsity_updates".to_owned(), self.annealing.steps.len().into());
    }

    fn constraints(&self) -> Constraints {
        Constraints { unit_norm_decoder: true, clip_gradients: None }
    }

    fn has_sparsity_term(&self) -> bool {
        true
    }

    fn resamples(&self) -> bool {
        self.resampling.is_some()
    }

    fn by_hand(&mut self, pass: &HandPass, terms: &mut Terms) -> Result<Option<ByHand>> {
        let Some(Between::Elementwise(mut activation)) = pass.dictionary.between() else { return Ok(None) };
        let zeros = || Tensor::zeros([pass.batch.len()], (Kind::Float, pass.batch.x.device()));
        let weight = self.weight(pass.step);
        let mut penalty = Lp {
            weight,
            function: self.sparsity_function,
            p: self.state.p,
            next_p: self.state.next_p,
            sums: [zeros(), zeros()],
        };
        let reconstruction = squared_error("mse_loss");
        let count = self.resampling.is_some();
        let found = analytic::step(pass, terms, &mut *activation, &reconstruction, &mut penalty, count)?;
        let Some(found) = found else { return Ok(None) };
        let value = penalty.value(&penalty.sums[0], penalty.p);
        if pass.logging {
            terms.log("scaled_lp_loss", &value * weight);
        }
        self.see(&value, |next_p| penalty.value(&penalty.sums[1], next_p));
        if let Some(resampling) = &mut self.resampling {
            resampling.see_by_hand(&found);
        }
        Ok(Some(found))
    }

    fn loss(&mut self, pass: &Pass, terms: &mut Terms) -> Result<()> {
        terms.add_reconstruction("mse_loss", mean_of_sums(&pass.residual().square()));
        let activations = pass.code.penalized();
        let penalty = lp(activations, self.state.p, self.sparsity_function);
        let weight = self.weight(pass.step);
        if pass.logging {
            terms.log("scaled_lp_loss", &penalty * weight);
        }
        let function = self.sparsity_function;
        self.see(&penalty, |next_p| lp(&activations.detach(), next_p, function));
        terms.add_sparsity("lp_loss", penalty, weight);
        if let Some(resampling) = &mut self.resampling {
            resampling.see(&pass.code.features);
        }
        Ok(())
    }

    fn after_step(&mut self, cx: &mut AfterStep) -> Result<()> {
        if let Some(seen) = self.seen.take() {
            self.state.queue.push_back(seen);
            if self.state.queue.len() > self.queue_length {
                self.state.queue.pop_front();
            }
        }
        self.update(cx.step);
        self.resampling.as_mut().map_or(Ok(()), |resampling| resampling.after_step(cx).map(drop))
    }

    fn log(&self, row: &mut Map<String, Value>) {
        let Annealed { p, next_p, coefficient, .. } = self.state;
        row.insert("p".to_owned(), p.into());
        row.insert("next_p".to_owned(), next_p.into());
        row.insert("sparsity_coeff".to_owned(), coefficient.into());
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        let Annealed { p, next_p, updates, coefficient, queue } = &self.state;
        state.put("annealed", (p, next_p, updates, coefficient))?;
        // A tensor and not JSON, which has no infinity.
        let queue: Vec<f64> = queue.iter().flatten().map(|penalty| penalty.double_value(&[])).collect();
        state.put_tensor("queue", &Tensor::from_slice(&queue));
        if let Some(resampling) = &self.resampling {
            state.put_all("resampling", resampling.state());
        }
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        let (p, next_p, updates, coefficient) = state.get("annealed")?;
        let queue = Vec::<f64>::try_from(state.tensor("queue")?)?;
        let queue = queue.chunks_exact(2).map(|pair| [pair[0], pair[1]].map(Tensor::from)).collect();
        self.state = Annealed { p, next_p, updates, coefficient, queue };
        self.resampling.as_mut().map_or(Ok(()), |resampling| resampling.restore(&state.under("resampling")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scalar(tensor: &Tensor) -> f64 {
        tensor.double_value(&[])
    }

    #[test]
    fn penalties_are_norms_and_their_powers() {
        let a = Tensor::from_slice2(&[[4.0f32, 9.0, 0.0], [0.0, 0.0, 0.0]]);
        // √4 + √9 = 5; its square is 25; halved by the row of zeros.
        assert_eq!(scalar(&lp(&a, 0.5, SparsityFunction::LpToTheP)), 2.5);
        assert_eq!(scalar(&lp(&a, 0.5, SparsityFunction::Lp)), 12.5);
        for function in [SparsityFunction::Lp, SparsityFunction::LpToTheP] {
            assert_eq!(scalar(&lp(&a, 1.0, function)), 6.5);
            assert_eq!(scalar(&lp(&a, 0.0, function)), 1.0);
        }
    }

    #[test]
    fn silent_features_have_no_gradient() {
        for function in [SparsityFunction::Lp, SparsityFunction::LpToTheP] {
            let a = Tensor::from_slice2(&[[4.0f32, 0.0], [0.0, 0.0]]).set_requires_grad(true);
            lp(&a, 0.5, function).backward();
            let grad = Vec::<f32>::try_from(a.grad().reshape([-1])).unwrap();
            assert!(grad[0] > 0.0 && grad[1..] == [0.0; 3], "{function:?}: {grad:?}");
        }
    }

    #[test]
    fn updates_are_a_number_or_continuous() {
        let updates = |value: Value| Updates::try_from(value).ok();
        assert_eq!(updates(10.into()), Some(Updates::Times(10)));
        assert_eq!(updates("1e1".into()), Some(Updates::Times(10)));
        assert_eq!(updates("continuous".into()), Some(Updates::Continuous));
        assert!(updates(0.into()).is_none() && updates("often".into()).is_none() && updates(1.5.into()).is_none());
        let annealing = Annealing::new((1.0, 0.5), (10, 12), Updates::Continuous, 20).unwrap();
        assert_eq!((annealing.steps, annealing.values), (vec![10, 11, 12], vec![1.0, 0.75, 0.5]));
    }

    #[test]
    fn an_annealing_that_reaches_zero_stays_finite() {
        let annealing = Annealing::new((1.0, 0.0), (1, 3), Updates::Continuous, 10).unwrap();
        let mut trainer = PAnneal {
            adam: AdamConfig::default(),
            lr: 0.0,
            schedule: Schedule {
                steps: 10,
                warmup_steps: 0,
                decay_start: None,
                resample_steps: None,
                sparsity_warmup_steps: None,
            },
            sparsity_function: SparsityFunction::Lp,
            annealing,
            anneals_to_the_end: false,
            queue_length: 2,
            state: Annealed { p: 1.0, next_p: None, updates: 0, coefficient: 0.1, queue: VecDeque::new() },
            resampling: None,
        };
        let a = Tensor::from_slice2(&[[4.0f32, 9.0]]);
        let mut ps = Vec::new();
        for step in 0..6 {
            let penalty = lp(&a, trainer.state.p, SparsityFunction::Lp);
            if let Some(next) = trainer.state.next_p {
                trainer.queue(&penalty, |_| lp(&a, next, SparsityFunction::Lp));
            }
            trainer.update(step);
            ps.push(trainer.state.p);
            assert!(trainer.state.coefficient.is_finite() && trainer.state.coefficient > 0.0);
        }
        assert_eq!(ps, [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]);
        let mut settings = Map::new();
        trainer.settings(&mut settings);
        assert_eq!(settings["n_sparsity_updates"], 3, "saved is how many they were");
    }
}
