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
//! Each dictionary's reconstructions take the place of its own site's value; of one attention head, that head's columns.
//!
//! Where this differs from the reference: padding is left out by the attention mask and not by the id of the padding
//! token, which in many models is the end-of-text token; and the fraction is taken of the totals, not as a mean of each
//! batch's fraction.

use dictlearn_core::lm::cross_entropy;
use dictlearn_core::prelude::*;

/// The language model's loss with activations reconstructed.
#[component(metric "loss_recovered", summary = "Cross entropy with activations reconstructed, zeroed and as they are",
    example = "{type: loss_recovered, n_batches: 10, batch_size: 32}", default)]
pub struct LossRecoveredConfig {
    /// Batches of text to measure on.
    #[default(10)]
    #[schemars(range(min = 1))]
    pub n_batches: u64,
    /// Contexts in a batch.
    #[default(32)]
    #[schemars(range(min = 1))]
    pub batch_size: u64,
}

impl Metric for LossRecoveredConfig {
    fn refuses(&self, source: &mut dyn ActivationSource) -> Option<String> {
        source
            .language_model()
            .is_none()
            .then(|| "the source has no language model, which an `eval_source` could have".to_owned())
    }

    fn memory(&self, source: &mut dyn ActivationSource) -> u64 {
        // The logits, and their logarithms.
        let logits = |source: &mut dyn ModelSource| {
            self.batch_size * source.context_length() as u64 * source.model().vocab_size() as u64 * 4
        };
        source.language_model().map_or(0, |source| 3 * logits(source))
    }

    fn evaluate(&mut self, subjects: &[Subject], source: &mut dyn ActivationSource) -> Result<Option<Vec<Figures>>> {
        let Some(source) = source.language_model() else { bail!("the source has no language model") };
        let mut sites: Vec<usize> = subjects.iter().map(|subject| subject.site).collect();
        sites.sort_unstable();
        sites.dedup();
        let mut original = Loss::default();
        let mut zeros = vec![Loss::default(); sites.len()];
        let mut reconstructed = vec![Loss::default(); subjects.len()];
        for _ in 0..self.n_batches {
            let Some(tokens) = source.next_tokens(self.batch_size as i64)? else { break };
            for (index, (site, zero)) in sites.iter().zip(&mut zeros).enumerate() {
                let (reads, writes) = (source.reads(*site), source.writes(*site));
                // What is read comes first, so the pass is shared up to its layer.
                let prefix = source.model().before(&tokens, &reads.point);
                let run =
                    |hooks: &mut Hooks| prefix.forward(hooks).map_err(|_| anyhow::anyhow!("the pass stopped early"));

                // The loss as it is is the same whichever the site, so only the first pass goes on to the end.
                let mut reading = Hooks::read(std::slice::from_ref(&reads.point), index > 0);
                if index == 0 {
                    original.add(&run(&mut reading)?, &tokens);
                } else {
                    let _ = prefix.forward(&mut reading);
                }
                let Some(value) = reading.take(&reads.point) else { bail!("nothing was read at {}", reads.point) };
                // A model in bfloat16 gives some of its values so.
                let x = reads.of(&value).to_kind(Kind::Float);
                let own = subjects.iter().zip(&mut reconstructed).filter(|(subject, _)| subject.site == *site);
                for (subject, loss) in own {
                    let x_hat = subject.dictionary.reconstruct(&x).0;
                    let splice = |value: &Tensor| writes.replaced(value, &x_hat);
                    loss.add(&run(&mut Hooks::replace(&writes.point, splice))?, &tokens);
                }
                let ablate = |value: &Tensor| writes.replaced(value, &writes.of(value).zeros_like());
                zero.add(&run(&mut Hooks::replace(&writes.point, ablate))?, &tokens);
            }
        }
        if original.count == 0.0 {
            return Ok(None);
        }
        let original = original.mean();
        let found = |(subject, reconstructed): (&Subject, &Loss)| {
            let zero = sites.binary_search(&subject.site).map_or(f64::NAN, |index| zeros[index].mean());
            let reconstructed = reconstructed.mean();
            figures([
                ("loss_original", original),
                ("loss_reconstructed", reconstructed),
                ("loss_zero", zero),
                ("frac_recovered", (reconstructed - zero) / (original - zero)),
            ])
        };
        Ok(Some(subjects.iter().zip(&reconstructed).map(found).collect()))
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
