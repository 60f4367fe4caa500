//! Concatenates activations of the same tokens from several sites: for crosscoders, and for any dictionary that reads
//! several sites at once.
//!
//! Each inner source has a name, and each of its sites becomes a part: a model and its fine-tune on the same text, or
//! several submodules of one model. All parts of a row must be of the same token; this is checked if the sources know
//! their tokens. All sources shuffle with the run's seed, so the same text, contexts and buffer give the same tokens.

use std::collections::BTreeMap;

use dictlearn_core::prelude::*;

/// Concatenated activations of the same tokens, from several models or from several submodules of one model. Each site
/// of each source is a part, named after the source, the site, or both (`source/site`). Training stops with an error if
/// the sources know their tokens and these differ.
#[component(source "joined", summary = "Concatenated activations of the same tokens from several sites or models",
    example = "{type: joined, sources: {model: {type: language_model, model: \"embedded:austen\", submodule: \
        [gpt_neox.layers.1, gpt_neox.layers.2], text: {type: embedded, name: austen}, ctx_len: 64, n_ctxs: 64, \
        out_batch_size: 256, pack: true}}}")]
pub struct JoinedConfig {
    /// The sources, by name; their parts are concatenated in alphabetical order of the names. They must return the same
    /// tokens in the same order. Language models do so with the same text, `ctx_len`, `n_ctxs` and batch sizes. Files
    /// do so if they have equal lengths.
    #[schemars(extend("minProperties" = 1))]
    pub sources: BTreeMap<String, Box<dyn TaggedSource>>,
}

impl SourceConfig for JoinedConfig {
    fn build(&self, cx: &SourceCx) -> Result<Box<dyn ActivationSource>> {
        let mut sources = Vec::new();
        for (name, config) in &self.sources {
            if name.is_empty() || name.contains('/') {
                bail!(
                    InputError::new(format!("`{name}` is not a valid name of a source"))
                        .field("sources")
                        .help("give a name that is not empty and has no slash")
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

/// Concatenates tensors [B, ..] along their second dimension.
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
        // Either all sources know their tokens, or none does.
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
                    InputError::new(format!("the source `{name}` does not know its tokens, but others do"))
                        .field("sources")
                        .help("join language models with each other, or files with files")
                );
            }
            let other = *rows.get_or_insert(activations.len());
            let same = match (&tokens, &activations.tokens) {
                // Compares token, context and position.
                (Some(tokens), Some(others)) => other == activations.len() && tokens.equal(others),
                _ => other == activations.len(),
            };
            if !same {
                bail!(
                    InputError::new(format!("the source `{name}` returned different tokens from the first source"))
                        .field("sources")
                        .help(
                            "give all of them the same text, tokenizer, contexts and batch sizes, and remove \
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
