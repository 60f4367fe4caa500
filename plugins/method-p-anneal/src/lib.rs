//! p-annealing: Karvonen et al. 2024, *Measuring Progress in Dictionary Learning for Language Model Interpretability
//! with Board Game Models*, <https://arxiv.org/abs/2408.00113>.
//!
//! An L1 penalty trains easily but shrinks features. An Lp penalty with p < 1 is closer to counting them but hard to
//! train under. So p falls from 1 during training. With activations x, their reconstruction x̂, and the penalised
//! activations a ([`Code::penalized`]: features, or a gate's):
//!
//! ```text
//! L       = ‖x − x̂‖² + λ_s ‖a‖_p^p     `Lp^p`: Σᵢ aᵢ^p,   or  λ_s ‖a‖_p     `Lp`: (Σᵢ aᵢ^p)^(1/p)
//! p       takes n_sparsity_updates evenly spaced values from p_start to p_end, at evenly spaced steps from
//!         anneal_start to anneal_end (a single update leaves it at p_start)
//! λ_{s+1} = λ_s E‖a‖_{p_s} / E‖a‖_{p_{s+1}}, means over the last sparsity_queue_length batches
//! ```
//!
//! The last line keeps the penalty's strength constant when p changes.
//!
//! There are two trainers: `p_anneal` for any dictionary, and `gated_anneal` with the reference's settings for a gated
//! one (no momentum, a lower learning rate, `Lp^p`). A gated dictionary adds its auxiliary loss under either.
//!
//! Where this differs from the reference: resampling works (there it writes to a copy), and `p_end: 0` is defined. At p
//! = 0 the penalty in both forms is the number of active features, the limit of Lp^p. It has no gradient, so an
//! annealing that reaches 0 ends the sparsity pressure. With the default `anneal_end`, the end of the run, p does not
//! reach it. If the ratio of norms is not a finite positive number (no feature is active, or ‖a‖_p with p near 0
//! overflows float32), p and λ stay unchanged.

use std::collections::VecDeque;

use dictlearn_core::prelude::*;
use dictlearn_core::train::Values;

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

/// Number of updates of p and λ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum Updates {
    /// This many updates.
    Times(u64),
    /// An update at every step of the annealing.
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

/// Defines the two trainers' configs: the same fields with different defaults.
macro_rules! config {
    ($(#[$about:meta])* $name:ident, sparsity_function: $sparsity_function:expr_2021) => {
        $(#[$about])*
        pub struct $name {
            /// Steps over which the penalty rises from 0; null for none.
            #[default(Some(2000))]
            pub sparsity_warmup_steps: Option<u64>,
            /// Form of the penalty: `Lp` for (Σ a^p)^(1/p), `Lp^p` for Σ a^p.
            #[default($sparsity_function)]
            pub sparsity_function: SparsityFunction,
            /// Weight λ of the penalty before annealing; at p = 1 it equals `l1_penalty`.
            #[default(1e-1)]
            #[schemars(range(min = 0))]
            pub initial_sparsity_penalty: f64,
            /// Step at which p starts to fall.
            #[default(15000)]
            pub anneal_start: u64,
            /// Step at which p reaches `p_end`; null for the end of the run, so that p never reaches it.
            #[default]
            pub anneal_end: Option<u64>,
            /// p before annealing.
            #[default(1.0)]
            #[schemars(range(min = 0))]
            pub p_start: f64,
            /// p after annealing. At 0 the penalty counts active features and has no gradient.
            #[default(0.0)]
            #[schemars(range(min = 0))]
            pub p_end: f64,
            /// Number of updates of p and λ, or `continuous` for one at every step of the annealing.
            #[default(Updates::Times(10))]
            pub n_sparsity_updates: Updates,
            /// Number of batches over which the penalty is averaged to adapt λ.
            #[default(10)]
            #[schemars(range(min = 1))]
            pub sparsity_queue_length: u64,
            /// How activations are sampled to replace dead features: in proportion to their `loss` (the reference) or
            /// `loss_squared` (Bricken et al. 2023).
            #[default]
            pub resample_weight: ResampleWeight,
        }

        impl $name {
            /// Adapts defaults to the run's length. Annealing that would start too late takes the last two fifths of
            /// the run.
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
    /// penalised activations (or that norm to the power p), both averaged over the batch. From anneal_start on, p falls
    /// from p_start to p_end in steps. At each step λ is multiplied by the ratio of the mean norms with the old and the
    /// new p, so that the penalty keeps its strength. Every decoder column keeps norm 1.
    #[component(trainer "p_anneal", summary = "Squared error with an Lp penalty whose p falls from 1", paper = PAPER,
        example = "{type: p_anneal, lr: 1e-3, initial_sparsity_penalty: 0.05, warmup_steps: 20, \
            sparsity_warmup_steps: 20, anneal_start: 25, anneal_end: 45, p_end: 0.5, n_sparsity_updates: 5}",
        default_dictionary = "auto_encoder",
        short_run = "{dictionary: {type: auto_encoder, expansion_factor: 4}, trainer: {type: p_anneal, lr: 2e-3, \
            initial_sparsity_penalty: 0.04, warmup_steps: 100, sparsity_warmup_steps: 300, decay_start: 1200, \
            anneal_start: 500, anneal_end: 1200, p_end: 0.5}}",
        measured = "87.3% of the variance explained with L0 39, 99.4% of the cross entropy recovered",
        fields(lr = 1e-3, warmup_steps, decay_start, sparsity_warmup_steps, .., resample_steps, resample_weight))]
    PAnnealConfig, sparsity_function: SparsityFunction::Lp
}

config! {
    /// p_anneal with the settings of gated training: no momentum, a lower learning rate, Lp^p. The loss is the squared
    /// error of the reconstruction, plus λ times the sum of the gate's activations to the power p, plus the squared
    /// error of what these alone reconstruct. From anneal_start on, p falls from p_start to p_end in steps. At each
    /// step λ is multiplied by the ratio of the mean penalties with the old and the new p. Every decoder column keeps
    /// norm 1.
    #[component(trainer "gated_anneal", summary = "p_anneal with a gate and the settings of gated training",
        paper = PAPER,
        example = "{type: gated_anneal, lr: 1e-3, initial_sparsity_penalty: 0.05, warmup_steps: 20, \
            sparsity_warmup_steps: 20, anneal_start: 25, anneal_end: 45, p_end: 0.5, n_sparsity_updates: 5}",
        default_dictionary = "gated",
        short_run = "{dictionary: {type: gated, expansion_factor: 4}, trainer: {type: gated_anneal, lr: 2e-3, \
            initial_sparsity_penalty: 0.13, warmup_steps: 100, sparsity_warmup_steps: 300, decay_start: 1200, \
            anneal_start: 500, anneal_end: 1200, p_end: 0.5}}",
        measured = "81.4% of the variance explained with L0 27, 99.1% of the cross entropy recovered",
        fields(lr = 3e-4, warmup_steps, decay_start, sparsity_warmup_steps, .., resample_steps, resample_weight))]
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
                InputError::incompatible(format!(
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

/// The schedule of p.
struct Annealing {
    /// Steps of the updates, ascending.
    steps: Vec<u64>,
    /// p from each of these steps on.
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
                InputError::new(format!("`anneal_end` is {end}, but `anneal_start` is {start}"))
                    .field("anneal_end")
                    .help("`anneal_end` must come after `anneal_start`")
            );
        }
        let most = end - start + 1;
        let count = match updates {
            Updates::Times(count) if count > most => {
                bail!(
                    InputError::new(format!("`n_sparsity_updates` is {count}, but annealing has only {most} steps"))
                        .field("n_sparsity_updates")
                        .help(format!("use at most {most}, or `{CONTINUOUS}`"))
                )
            }
            Updates::Times(count) => count,
            Updates::Continuous => most,
        } as i64;
        // libtorch's linspace, to round as the reference does: steps are truncated, p is a float32.
        let at = Tensor::linspace(start as i64, end as i64, count, (Kind::Int64, Device::Cpu));
        let values = Tensor::linspace(p_start, p_end, count, (Kind::Float, Device::Cpu));
        Ok(Annealing {
            steps: Vec::<i64>::try_from(at)?.into_iter().map(|step| step as u64).collect(),
            values: Vec::<f32>::try_from(values)?.into_iter().map(f64::from).collect(),
            p_end,
        })
    }

    /// Returns whether the update after the first `done` is due at `step`.
    fn due(&self, step: u64, done: usize) -> bool {
        self.steps.get(done) == Some(&step)
    }
}

/// State of the annealing.
#[derive(Debug)]
struct Annealed {
    p: f64,
    next_p: Option<f64>,
    updates: usize,
    /// λ
    coefficient: f64,
    /// The penalties with p and with the next p of the last batches, scalars. They stay tensors until used: reading
    /// them at each step would sync the GPU.
    queue: VecDeque<[Tensor; 2]>,
}

/// The reference's `PAnnealTrainer` and `GatedAnnealTrainer`.
struct PAnneal {
    adam: AdamConfig,
    schedule: Schedule,
    sparsity_function: SparsityFunction,
    annealing: Annealing,
    /// True if `anneal_end` is unset and annealing ends with the run.
    anneals_to_the_end: bool,
    queue_length: usize,
    state: Annealed,
    resampling: Option<Resampling>,
    /// The last loss's penalties with p and with the next p, queued once the step is taken.
    seen: Option<[Tensor; 2]>,
}

/// λ ‖a‖_p or λ ‖a‖_p^p, averaged over the batch. At p = 0, the number of activations above 0, without a gradient.
fn lp<'a>(weight: f64, p: f64, function: SparsityFunction) -> Penalty<'a> {
    if p == 1.0 {
        return Penalty::l1(weight).named("lp_loss");
    }
    if p == 0.0 {
        return Penalty::l0(weight).named("lp_loss");
    }
    let powers = Penalty::of(weight, move |a| power(a, p), move |a| power(a, p - 1.0) * p).named("lp_loss");
    match function {
        SparsityFunction::LpToTheP => powers,
        SparsityFunction::Lp => powers.of_rows(move |sums| power(sums, 1.0 / p)),
    }
}

/// Elementwise a^p for a ≥ 0. Where a is 0 it is 0, without a gradient: for p < 1 the derivative at 0 is infinite, and
/// infinity times 0 further back would be NaN.
fn power(a: &Tensor, p: f64) -> Tensor {
    let some = a.gt(0.0);
    a.where_self(&some, &a.ones_like()).pow_tensor_scalar(p) * some
}

impl PAnneal {
    fn weight(&self, step: u64) -> f64 {
        self.state.coefficient * self.schedule.sparsity_factor(step)
    }

    /// Queues the penalties of the step just taken, and updates p and λ for the following steps if an update is due.
    fn keep(&mut self, step: u64) {
        if let Some(seen) = self.seen.take() {
            self.state.queue.push_back(seen);
            if self.state.queue.len() > self.queue_length {
                self.state.queue.pop_front();
            }
        }
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

    fn schedule(&self) -> Schedule {
        self.schedule
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

    fn objective(&self, step: u64) -> Option<Objective<'_>> {
        let penalty = |p: f64| lp(self.weight(step), p, self.sparsity_function);
        Some(Objective::squared_error(penalty(self.state.p)).watch(self.state.next_p.map(penalty)))
    }

    fn resamples(&self) -> bool {
        self.resampling.is_some()
    }

    fn counts_firing(&self) -> bool {
        self.resampling.is_some()
    }

    fn see(&mut self, seen: Seen, terms: &mut Terms) {
        let Values { penalty, watched } = seen.values;
        if seen.logging
            && let Some(term) = terms.get_mut("lp_loss")
        {
            let weight = term.weight;
            terms.log("scaled_lp_loss", &penalty * weight);
        }
        self.seen = watched.map(|next| [penalty, next]);
        if let Some((resampling, fired)) = self.resampling.as_mut().zip(seen.fired) {
            resampling.see(&fired);
        }
    }

    fn after_step(&mut self, cx: &mut AfterStep) -> Result<()> {
        self.keep(cx.step);
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
        // A tensor, because JSON cannot represent infinity.
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

    #[test]
    fn penalties_are_the_norm_and_its_power() {
        let a = Tensor::from_slice2(&[[4.0f32, 9.0, 0.0], [0.0, 0.0, 0.0]]);
        // √4 + √9 = 5, squared 25; the row of zeros halves both means.
        let value = |p: f64, function| lp(1.0, p, function).value(&a).double_value(&[]);
        assert_eq!(value(0.5, SparsityFunction::LpToTheP), 2.5);
        assert_eq!(value(0.5, SparsityFunction::Lp), 12.5);
        for function in [SparsityFunction::Lp, SparsityFunction::LpToTheP] {
            assert_eq!(value(1.0, function), 6.5);
            assert_eq!(value(0.0, function), 1.0);
        }
    }

    #[test]
    fn inactive_features_get_no_gradient() {
        for function in [SparsityFunction::Lp, SparsityFunction::LpToTheP] {
            let a = Tensor::from_slice2(&[[4.0f32, 0.0], [0.0, 0.0]]).set_requires_grad(true);
            lp(1.0, 0.5, function).value(&a).backward();
            let grad = Vec::<f32>::try_from(a.grad().reshape([-1])).unwrap();
            assert!(grad[0] > 0.0 && grad[1..] == [0.0; 3], "{function:?}: {grad:?}");
        }
    }

    #[test]
    fn updates_parse_as_a_whole_number_or_continuous() {
        let updates = |value: Value| Updates::try_from(value).ok();
        assert_eq!(updates(10.into()), Some(Updates::Times(10)));
        assert_eq!(updates("1e1".into()), Some(Updates::Times(10)));
        assert_eq!(updates("continuous".into()), Some(Updates::Continuous));
        assert!(updates(0.into()).is_none() && updates("often".into()).is_none() && updates(1.5.into()).is_none());
        let annealing = Annealing::new((1.0, 0.5), (10, 12), Updates::Continuous, 20).unwrap();
        assert_eq!((annealing.steps, annealing.values), (vec![10, 11, 12], vec![1.0, 0.75, 0.5]));
    }

    #[test]
    fn annealing_to_zero_stays_finite() {
        let annealing = Annealing::new((1.0, 0.0), (1, 3), Updates::Continuous, 10).unwrap();
        let mut trainer = PAnneal {
            adam: AdamConfig::default(),
            schedule: Schedule::constant(0.0),
            sparsity_function: SparsityFunction::Lp,
            annealing,
            anneals_to_the_end: false,
            queue_length: 2,
            state: Annealed { p: 1.0, next_p: None, updates: 0, coefficient: 0.1, queue: VecDeque::new() },
            resampling: None,
            seen: None,
        };
        let a = Tensor::from_slice2(&[[4.0f32, 9.0]]);
        let mut ps = Vec::new();
        for step in 0..6 {
            let mut terms = Terms::new();
            let values = trainer.objective(step).unwrap().add(&a, &a, false, &mut terms);
            trainer.see(Seen { values, fired: None, rows: 1, logging: false }, &mut terms);
            trainer.keep(step);
            ps.push(trainer.state.p);
            assert!(trainer.state.coefficient.is_finite() && trainer.state.coefficient > 0.0);
        }
        assert_eq!(ps, [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]);
        let mut settings = Map::new();
        trainer.settings(&mut settings);
        assert_eq!(settings["n_sparsity_updates"], 3, "the number of updates is saved");
    }
}
