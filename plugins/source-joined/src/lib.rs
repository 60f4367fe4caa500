//! Activations of the same tokens at several places, side by side: for crosscoders, and for any dictionary that is to read
//! several places at once.
//!
//! Each inner source has a name, and every one of its sites becomes a part: a model and its fine-tune that read the same
//! text, or one model with several submodules. The parts of a row are the same token, which is checked where the sources
//! know their tokens. They do because all of them shuffle by the run's seed: give them the same text, contexts and buffer.

use std::collections::BTreeMap;

use dictlearn_core::prelude::*;

/// Activations of the same tokens at several places, side by side: of several models, or of several submodules of one. Each
/// site of each source is a part, called by the source's name, the site's, or both with a slash between. That the tokens are
/// the same is checked where the sources know them.
#[component(source "joined", summary = "The same tokens at several places or in several models, side by side",
    example = "{type: joined, sources: {model: {type: language_model, model: \"embedded:austen\", submodule: \
        [gpt_neox.layers.1, gpt_neox.layers.2], text: {type: embedded, name: austen}, ctx_len: 64, n_ctxs: 64, \
        out_batch_size: 256, pack: true}}}")]
pub struct JoinedConfig {
    /// The sources, by name; their parts lie side by side in the order of the names' letters. They must give the same tokens
    /// in the same order: language models that read the same text with the same `ctx_len`, `n_ctxs` and batch sizes do, and
    /// so do files of equal length.
    #[schemars(extend("minProperties" = 1))]
    pub sources: BTreeMap<String, Box<dyn TaggedSource>>,
}

impl SourceConfig for JoinedConfig {
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        let mut sources = Vec::new();
        for (name, config) in &self.sources {
            if name.is_empty() || name.contains('/') {
                bail!(
                    InputError::new(format!("`{name}` cannot be the name of a source"))
                        .field("sources")
                        .help("names have letters and no slash")
                );
            }
            let source = config.build(cx).under(name).under("sources")?;
            sources.push((name.clone(), source));
        }
        if sources.is_empty() {
            bail!(InputError::new("no sources to join").field("sources").help("name at least one"));
        }
        let mut parts_held_out = self.sources.values().map(|source| source.held_out());
        let first = parts_held_out.next().flatten();
        if parts_held_out.any(|other| other != first) {
            bail!(
                InputError::new("the joined sources hold out different rows")
                    .field("sources")
                    .help("give all of them the same `held_out` and `held_out_seed`")
            );
        }
        let several = sources.len() > 1;
        let mut parts = Vec::new();
        for (name, source) in &sources {
            let sites = source.sites();
            for site in &sites {
                let name = match (several, sites.len() > 1) {
                    (true, true) => format!("{name}/{}", site.name),
                    (true, false) => name.clone(),
                    (false, _) => site.name.clone(),
                };
                parts.push(SitePart { name, activation_dim: site.activation_dim, output_dim: site.output_dim });
            }
        }
        Ok(Box::new(Joined { sources, parts }))
    }

    fn held_out(&self) -> Option<HeldOut> {
        self.sources.values().find_map(|source| source.held_out())
    }
}

struct Joined {
    sources: Vec<(String, Box<dyn ActivationSource>)>,
    parts: Vec<SitePart>,
}

/// Tensors [B, ..] side by side.
fn side_by_side<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Tensor {
    Tensor::cat(&tensors.collect::<Vec<_>>(), 1)
}

impl ActivationSource for Joined {
    fn sites(&self) -> Vec<Site> {
        let input = self.parts.iter().map(|part| part.activation_dim).sum();
        let output = self.parts.iter().map(|part| part.output_dim).sum();
        vec![Site { parts: self.parts.clone(), ..Site::new(JoinedConfig::NAME, (input, output)) }]
    }

    fn next_batch(&mut self) -> Result<Option<Activations>> {
        let mut batches: Vec<Batch> = Vec::new();
        let mut tokens: Option<Tensor> = None;
        let mut rows = None;
        let given: Vec<Option<Activations>> =
            self.sources.iter_mut().map(|(_, source)| source.next_batch()).collect::<Result<_>>()?;
        if given.iter().all(Option::is_none) {
            return Ok(None);
        }
        // Whether the rows are known to be of tokens must be so for all or for none.
        let known = given.iter().flatten().any(|activations| activations.tokens.is_some());
        for ((name, _), activations) in self.sources.iter().zip(given) {
            let Some(activations) = activations else {
                bail!(
                    InputError::new(format!("the source `{name}` ended before the others"))
                        .field("sources")
                        .help("give all of them the same text, or files of equal length")
                );
            };
            if known && activations.tokens.is_none() {
                bail!(
                    InputError::new(format!("the source `{name}` does not know its tokens, and others do"))
                        .field("sources")
                        .help("join language models with each other, or files with files")
                );
            }
            let other = *rows.get_or_insert(activations.len());
            let same = match (&tokens, &activations.tokens) {
                // Token, context and position.
                (Some(tokens), Some(others)) => other == activations.len() && tokens.equal(others),
                _ => other == activations.len(),
            };
            if !same {
                bail!(
                    InputError::new(format!("the source `{name}` gives other tokens than the first"))
                        .field("sources")
                        .help(
                            "give all of them the same text, tokenizer, contexts and batch sizes, and leave out \
                         `max_activation_norm_multiple`"
                        )
                );
            }
            tokens = tokens.or(activations.tokens);
            batches.extend(activations.sites);
        }
        let x = side_by_side(batches.iter().map(|batch| &batch.x));
        let batch = match batches.iter().all(Batch::is_autoencoding) {
            true => Batch::of(x),
            false => Batch { x, target: side_by_side(batches.iter().map(|batch| &batch.target)) },
        };
        Ok(Some(Activations { sites: vec![batch], tokens }))
    }

    fn rewind(&mut self) -> Result<()> {
        self.sources.iter_mut().try_for_each(|(_, source)| source.rewind())
    }

    fn passes(&self) -> Option<u64> {
        self.sources.iter().filter_map(|(_, source)| source.passes()).min()
    }

    fn is_endless(&self) -> bool {
        self.sources.iter().all(|(_, source)| source.is_endless())
    }

    fn mean_squared_norms(&mut self) -> Result<Vec<f64>> {
        let mut sum = 0.0;
        for (_, source) in &mut self.sources {
            sum += source.mean_squared_norms()?.into_iter().sum::<f64>();
        }
        Ok(vec![sum])
    }

    fn memory(&self) -> Vec<MemoryNeed> {
        let of = |(name, source): &(String, Box<dyn ActivationSource>)| {
            let named = |need: MemoryNeed| MemoryNeed { what: format!("{} of `{name}`", need.what), ..need };
            source.memory().into_iter().map(named).collect::<Vec<_>>()
        };
        self.sources.iter().flat_map(of).collect()
    }

    fn batch_size(&self) -> Option<i64> {
        self.sources.iter().filter_map(|(_, source)| source.batch_size()).max()
    }

    fn describe(&self) -> Value {
        let sources = self.sources.iter().map(|(name, source)| (name.clone(), source.describe()));
        let names: Vec<&str> = self.parts.iter().map(|part| part.name.as_str()).collect();
        serde_json::json!({"type": JoinedConfig::NAME, "sources": sources.collect::<Map<_, _>>(), "parts": names})
    }

    fn overlap(&self, trained: &Value) -> Option<String> {
        self.sources.iter().find_map(|(name, source)| source.overlap(&trained["sources"][name]))
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        for (name, source) in &self.sources {
            state.put_all(name, source.state()?);
        }
        Ok(state)
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        self.sources.iter_mut().try_for_each(|(name, source)| source.restore(&state.under(name)))
    }

    fn notes(&self) -> Vec<String> {
        self.sources.iter().flat_map(|(_, source)| source.notes()).collect()
    }
}
