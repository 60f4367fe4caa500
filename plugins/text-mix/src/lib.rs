//! Several texts mixed by weight, such as pretraining text with some chats.
//!
//! Weights count documents. The next document comes from the text that is furthest behind its share, so every stretch
//! of the stream has the given proportions, without randomness. A text that ends restarts. The mix ends when all texts
//! have ended at least once, or with `first_exhausted` when the first one ends.

use std::collections::BTreeMap;

use dictlearn_core::prelude::*;

/// Several texts mixed by weight.
#[component(text "mix", summary = "Several texts mixed by weight",
    example = "{type: mix, streams: [{weight: 0.9, text: {type: embedded, name: austen}}, {weight: 0.1, text: \
        {type: embedded, name: austen, split: held_out}}]}")]
pub struct MixConfig {
    /// The texts, each as a `text` with its `weight`.
    #[schemars(length(min = 1))]
    pub streams: Vec<Weighted>,
    /// When the mix ends: when every text has ended at least once (`all_exhausted`; texts that end earlier restart), or
    /// when the first text ends (`first_exhausted`).
    #[default]
    pub stopping_strategy: StoppingStrategy,
}

/// When a mix of texts ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum StoppingStrategy {
    /// When every text has ended at least once.
    #[default]
    AllExhausted,
    /// When the first text ends.
    FirstExhausted,
}

/// A text with its weight.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Weighted {
    /// Weight relative to the other texts. It counts documents, not tokens.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// The text.
    pub text: Box<dyn TaggedText>,
}

impl TextConfig for MixConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        let streams = self.streams.iter().enumerate().map(|(index, Weighted { weight, text })| {
            if weight.is_nan() || *weight <= 0.0 {
                bail!(
                    InputError::new(format!("the weight {weight} is not above 0"))
                        .field(format!("streams[{index}].weight"))
                        .help("give a number above 0, or remove the text")
                );
            }
            let text = text.build().under("text").under(format_args!("streams[{index}]"))?;
            if text.is_tokenized() {
                bail!(
                    InputError::new("rows of tokens cannot be mixed with documents")
                        .field(format!("streams[{index}].text"))
                        .help("mix texts only, or use the rows of tokens without a mix")
                );
            }
            Ok(Part { text, weight: *weight, given: 0, ended: false })
        });
        let parts: Vec<Part> = streams.collect::<Result<_>>()?;
        if parts.is_empty() {
            bail!(InputError::new("the mix has no texts").field("streams").help("list texts, each with a weight"));
        }
        Ok(Box::new(Mix { parts, stopping: self.stopping_strategy, position: 0, last: 0 }))
    }
}

struct Part {
    text: Box<dyn TextStream>,
    weight: f64,
    given: u64,
    /// Whether the text has ended and restarted.
    ended: bool,
}

struct Mix {
    parts: Vec<Part>,
    stopping: StoppingStrategy,
    position: u64,
    /// The part that the last document is from.
    last: usize,
}

impl Part {
    /// Seeks to the position after `given` documents, restarting the text as often as needed.
    fn seek(&mut self) -> Result<()> {
        self.text.seek(self.given)?;
        let length = self.text.position();
        if (1..self.given).contains(&length) {
            self.ended = true;
            // A position after the last document is the end, not the beginning.
            self.text.seek((self.given - 1) % length + 1)?;
        }
        Ok(())
    }
}

impl Mix {
    /// Returns the index of the part whose next document is due first.
    fn due(&self) -> Option<usize> {
        let due = |part: &Part| (part.given as f64 + 0.5) / part.weight;
        let parts = self.parts.iter().enumerate();
        parts.min_by(|(_, a), (_, b)| due(a).total_cmp(&due(b))).map(|(index, _)| index)
    }
}

impl TextStream for Mix {
    fn next_record(&mut self) -> Result<Option<Record>> {
        let Some(due) = self.due() else { return Ok(None) };
        self.last = due;
        let part = &mut self.parts[due];
        let mut record = part.text.next_record()?;
        if record.is_none() {
            if part.given == 0 {
                let why = part.text.skipped().1.or(part.text.skipped_files().1);
                let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
                bail!(InputError::new(format!("streams[{due}] of the mix has no documents{why}")));
            }
            part.ended = true;
            let over = match self.stopping {
                StoppingStrategy::AllExhausted => self.parts.iter().all(|part| part.ended),
                StoppingStrategy::FirstExhausted => true,
            };
            if over {
                return Ok(None);
            }
            let part = &mut self.parts[due];
            part.text.seek(0)?;
            record = part.text.next_record()?;
        }
        if record.is_some() {
            self.parts[due].given += 1;
            self.position += 1;
        }
        Ok(record)
    }

    fn files(&self) -> BTreeMap<String, u64> {
        self.parts.iter().flat_map(|part| part.text.files()).collect()
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn seek(&mut self, position: u64) -> Result<()> {
        self.parts.iter_mut().for_each(|part| (part.given, part.ended) = (0, false));
        // The part that is due depends only on the counts.
        for _ in 0..position {
            if let Some(due) = self.due() {
                self.parts[due].given += 1;
            }
        }
        self.position = position;
        self.parts.iter_mut().try_for_each(Part::seek)
    }

    fn refuse(&mut self, origin: &str, why: &str) -> Result<()> {
        self.parts[self.last].text.refuse(origin, why)
    }

    fn skipped(&self) -> (u64, Option<String>) {
        sum(self.parts.iter().map(|part| part.text.skipped()))
    }

    fn skipped_files(&self) -> (u64, Option<String>) {
        sum(self.parts.iter().map(|part| part.text.skipped_files()))
    }
}

/// Returns the sum of the counts and the first message.
fn sum(counts: impl Iterator<Item = (u64, Option<String>)>) -> (u64, Option<String>) {
    counts.fold((0, None), |(count, first), (more, other)| (count + more, first.or(other)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text of numbered documents: prefix, position and length.
    struct Numbered(&'static str, u64, u64);

    impl TextStream for Numbered {
        fn next_record(&mut self) -> Result<Option<Record>> {
            if self.1 == self.2 {
                return Ok(None);
            }
            self.1 += 1;
            let text = format!("{}{}", self.0, self.1);
            Ok(Some(Record::Text(Document { origin: text.clone(), text })))
        }

        fn position(&self) -> u64 {
            self.1
        }

        fn seek(&mut self, position: u64) -> Result<()> {
            self.1 = position.min(self.2);
            Ok(())
        }
    }

    fn mix(stopping: StoppingStrategy) -> Mix {
        let part = |text, weight| Part { text: Box::new(text), weight, given: 0, ended: false };
        let parts = vec![part(Numbered("a", 0, 70), 0.75), part(Numbered("b", 0, 100), 0.25)];
        Mix { parts, stopping, position: 0, last: 0 }
    }

    fn rest(mix: &mut Mix) -> Vec<String> {
        let mut texts = Vec::new();
        while let Some(record) = mix.next_record().unwrap() {
            let Record::Text(document) = record else { panic!("not a text") };
            texts.push(document.text);
        }
        texts
    }

    #[test]
    fn every_stretch_has_the_given_proportions() {
        let all = rest(&mut mix(StoppingStrategy::FirstExhausted));
        assert!(all.len() >= 92 && all.len() <= 94, "70 of 3 in 4: {}", all.len());
        for stretch in all.chunks_exact(8) {
            assert_eq!(stretch.iter().filter(|text| text.starts_with('b')).count(), 2, "{stretch:?}");
        }
        let of_a: Vec<_> = all.iter().filter(|text| text.starts_with('a')).cloned().collect();
        assert_eq!(of_a, (1..=70).map(|n| format!("a{n}")).collect::<Vec<_>>());
    }

    #[test]
    fn texts_that_end_restart_until_all_have_ended() {
        let all = rest(&mut mix(StoppingStrategy::AllExhausted));
        let of = |text: char| all.iter().filter(move |other| other.starts_with(text)).cloned();
        assert_eq!(of('b').collect::<Vec<_>>(), (1..=100).map(|n| format!("b{n}")).collect::<Vec<_>>());
        let expected = (0..).map(|n| format!("a{}", n % 70 + 1));
        assert!(of('a').count() >= 299 && of('a').zip(expected).all(|(a, expected)| a == expected));
    }

    #[test]
    fn seeking_continues_at_the_position() {
        for stopping in [StoppingStrategy::AllExhausted, StoppingStrategy::FirstExhausted] {
            let all = rest(&mut mix(stopping));
            for position in [0, 1, 13, 92, 93, 94, 95, 187, 200, all.len()] {
                let mut other = mix(stopping);
                other.seek(position.min(all.len()) as u64).unwrap();
                assert_eq!(rest(&mut other), all[position.min(all.len())..], "{stopping:?} from {position}");
            }
        }
    }
}
