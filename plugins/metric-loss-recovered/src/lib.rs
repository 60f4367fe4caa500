//! How much of the language model's loss is recovered when reconstructions replace activations.
//!
//! Three passes over the same contexts: with the model unchanged, with the hooked value replaced by its reconstruction
//! at every position, and with it replaced by zeros.
//!
//! ```text
//! frac_recovered = (loss_reconstructed − loss_zero) / (loss_original − loss_zero)
//! ```
//!
//! Losses are means over all predicted tokens, in nats. The layers before the hook point run once for all passes. Each
//! dictionary's reconstructions replace its own site's value; for a single attention head, only that head's columns.
//!
//! Where this differs from the reference: padding is excluded by the attention mask, not by the id of the padding
//! token, which in many models is the end-of-text token. The fraction is computed from totals, not as a mean of the
//! batches' fractions.

use dictlearn_core::lm::cross_entropy;
use dictlearn_core::prelude::*;

/// The language model's loss with reconstructed activations.
#[component(metric "loss_recovered", summary = "Cross entropy with activations reconstructed, zeroed and unchanged",
    example = "{type: loss_recovered, n_batches: 10, batch_size: 32}", default)]
pub struct LossRecoveredConfig {
    /// Number of batches of text to measure on.
    #[default(10)]
    #[schemars(range(min = 1))]
    pub n_batches: u64,
    /// Number of contexts per batch.
    #[default(32)]
    #[schemars(range(min = 1))]
    pub batch_size: u64,
}

impl Metric for LossRecoveredConfig {
    fn refuses(&self, source: &mut dyn ActivationSource) -> Option<String> {
        source
            .language_model()
            .is_none()
            .then(|| "the source has no language model; an `eval_source` can provide one".to_owned())
    }

    fn gives_contexts(&self) -> bool {
        true
    }

    fn memory(&self, source: &mut dyn ActivationSource) -> u64 {
        // Logits and their logarithms.
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
                // The value read precedes the one replaced, so all passes share the layers before it.
                let prefix = source.model().before(&tokens, &reads.point);
                let run = |hooks: &mut Hooks| {
                    prefix.forward(hooks).map_err(|_| anyhow::anyhow!("the forward pass stopped early"))
                };

                // The unmodified loss does not depend on the site, so only the first site's pass runs to the end.
                let mut reading = Hooks::read(std::slice::from_ref(&reads.point), index > 0);
                if index == 0 {
                    original.add(&run(&mut reading)?, &tokens);
                } else {
                    let _ = prefix.forward(&mut reading);
                }
                let Some(value) = reading.take(&reads.point) else { bail!("nothing was read at {}", reads.point) };
                // A model in bfloat16 may return bfloat16 values.
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
