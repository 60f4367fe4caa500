//! How much of the language model's loss survives when activations are replaced by their reconstructions.
//!
//! Three passes over the same contexts: as the model is, with the hooked value replaced by its reconstruction at every
//! position, and with it replaced by zeros.
//!
//! ```text
//! frac_recovered = (loss_reconstructed − loss_zero) / (loss_original − loss_zero)
//! ```
//!
//! Losses are means over all predicted tokens, in nats. What comes before the hooked layer is computed once for all.
//!
//! Where this differs from the reference: padding is left out by the attention mask and not by the id of the padding
//! token, which in many models is the end-of-text token; and the fraction is taken of the totals, not as a mean of each
//! batch's fraction.

use dictlearn_core::model::cross_entropy;
use dictlearn_core::prelude::*;

const NAME: &str = "loss_recovered";

/// The language model's loss with activations reconstructed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LossRecoveredConfig {
    /// Batches of text to measure on.
    #[serde(default = "n_batches")]
    #[schemars(range(min = 1))]
    pub n_batches: u64,
    /// Contexts in a batch.
    #[serde(default = "batch_size")]
    #[schemars(range(min = 1))]
    pub batch_size: u64,
}

fn n_batches() -> u64 {
    10
}

fn batch_size() -> u64 {
    32
}

register! {
    metric LossRecoveredConfig, NAME,
    summary: "Cross entropy with activations reconstructed, zeroed and as they are",
    paper: "",
    example: "{type: loss_recovered, n_batches: 10, batch_size: 32}",
    usual: true,
}

#[typetag::serde(name = NAME)]
impl MetricConfig for LossRecoveredConfig {
    fn build(&self) -> Result<Box<dyn Metric>> {
        Ok(Box::new(self.clone()))
    }
}

impl Metric for LossRecoveredConfig {
    fn refuses(&self, source: &mut dyn ActivationSource) -> Option<String> {
        source.language_model().is_none().then(|| "the source has no language model".to_owned())
    }

    fn evaluate(
        &mut self,
        dictionaries: &[&dyn Dictionary],
        source: &mut dyn ActivationSource,
    ) -> Result<Option<Vec<Figures>>> {
        let Some(source) = source.language_model() else { bail!("the source has no language model") };
        let (mut original, mut zero) = (Loss::default(), Loss::default());
        let mut reconstructed = vec![Loss::default(); dictionaries.len()];
        for _ in 0..self.n_batches {
            let Some(tokens) = source.next_tokens(self.batch_size as i64)? else { break };
            let (reads, writes) = (source.reads(), source.writes());
            // What is read comes first, so the pass is shared up to its layer.
            let prefix = source.model().before(&tokens, reads);
            let run = |hooks: &mut Hooks| prefix.forward(hooks).map_err(|_| anyhow::anyhow!("the pass stopped early"));

            let mut reading = Hooks::read(std::slice::from_ref(reads), false);
            original.add(&run(&mut reading)?, &tokens);
            let Some(x) = reading.take(reads) else { bail!("nothing was read at {reads}") };
            for (dictionary, loss) in dictionaries.iter().zip(&mut reconstructed) {
                let x_hat = dictionary.reconstruct(&x).0;
                loss.add(&run(&mut Hooks::replace(writes, |_| x_hat.shallow_clone()))?, &tokens);
            }
            zero.add(&run(&mut Hooks::replace(writes, |x| x.zeros_like()))?, &tokens);
        }
        if original.count == 0.0 {
            return Ok(None);
        }
        let (original, zero) = (original.mean(), zero.mean());
        let figures = |reconstructed: &Loss| {
            let reconstructed = reconstructed.mean();
            Figures::from([
                ("loss_original", original),
                ("loss_reconstructed", reconstructed),
                ("loss_zero", zero),
                ("frac_recovered", (reconstructed - zero) / (original - zero)),
            ])
        };
        Ok(Some(reconstructed.iter().map(figures).collect()))
    }
}

/// A mean loss over several batches.
#[derive(Clone, Default)]
struct Loss {
    sum: f64,
    count: f64,
}

impl Loss {
    fn add(&mut self, logits: &Tensor, tokens: &Tokens) {
        let (mean, count) = cross_entropy(logits, tokens);
        self.sum += mean * count as f64;
        self.count += count as f64;
    }

    fn mean(&self) -> f64 {
        self.sum / self.count
    }
}
