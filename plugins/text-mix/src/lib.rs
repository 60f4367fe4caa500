//! Several texts mixed by weight: pretraining text with a part of chats, say.
//!
//! Weights are of documents. The next document comes from the text that is furthest behind its share, so that every
//! stretch of the stream holds the texts in their proportion, the same way each time. The mix ends where the first of its
//! texts ends: from there on the proportion could not be kept.

use dictlearn_core::prelude::*;

const NAME: &str = "mix";

/// Several texts mixed by weight.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MixConfig {
    /// The texts.
    #[schemars(length(min = 1))]
    pub streams: Vec<Weighted>,
}

/// A text and its share.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Weighted {
    /// How many of its documents there are in proportion to the others'.
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// The text.
    pub text: Box<dyn TextConfig>,
}

register! {
    text MixConfig, NAME,
    summary: "Several texts mixed by weight",
    paper: "",
    example: "{type: mix, streams: [{weight: 0.9, text: {type: embedded, name: austen}}, \
              {weight: 0.1, text: {type: embedded, name: austen, split: held_out}}]}",
}

#[typetag::serde(name = NAME)]
impl TextConfig for MixConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        let streams = self.streams.iter().enumerate().map(|(index, Weighted { weight, text })| {
            if weight.is_nan() || *weight <= 0.0 {
                bail!(InputError::new(format!("a weight of {weight} gives the text no share"))
                    .field(format!("streams[{index}].weight"))
                    .help("give a number above 0, or leave the text out"));
            }
            let text = text.build().under("text").under(format_args!("streams[{index}]"))?;
            if text.is_tokenized() {
                bail!(InputError::new("rows of tokens cannot be mixed with documents")
                    .field(format!("streams[{index}].text"))
                    .help("mix texts, or harvest the rows by themselves"));
            }
            Ok(Part { text, weight: *weight, given: 0 })
        });
        Ok(Box::new(Mix { parts: streams.collect::<Result<_>>()?, position: 0, last: 0 }))
    }
}

struct Part {
    text: Box<dyn TextStream>,
    weight: f64,
    given: u64,
}

struct Mix {
    parts: Vec<Part>,
    position: u64,
    /// The part that the last document is from.
    last: usize,
}

impl Mix {
    /// The part whose next document is due first.
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
        let record = part.text.next_record()?;
        if record.is_some() {
            part.given += 1;
            self.position += 1;
        }
        Ok(record)
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn seek(&mut self, position: u64) -> Result<()> {
        self.parts.iter_mut().for_each(|part| part.given = 0);
        // Who is due depends on nothing but what was given.
        for _ in 0..position {
            if let Some(due) = self.due() {
                self.parts[due].given += 1;
            }
        }
        self.position = position;
        self.parts.iter_mut().try_for_each(|part| part.text.seek(part.given))
    }

    fn refuse(&mut self, origin: &str, why: &str) -> Result<()> {
        self.parts[self.last].text.refuse(origin, why)
    }

    fn skipped(&self) -> (u64, Option<String>) {
        let all = self.parts.iter().map(|part| part.text.skipped());
        all.fold((0, None), |(count, first), (more, other)| (count + more, first.or(other)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many documents, numbered.
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
            self.1 = position;
            Ok(())
        }
    }

    fn mix() -> Mix {
        let part = |text, weight| Part { text: Box::new(text), weight, given: 0 };
        Mix { parts: vec![part(Numbered("a", 0, 70), 0.75), part(Numbered("b", 0, 1000), 0.25)], position: 0, last: 0 }
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
    fn every_stretch_is_in_proportion_until_the_first_ends() {
        let all = rest(&mut mix());
        assert!(all.len() >= 92 && all.len() <= 94, "70 of 3 in 4: {}", all.len());
        for stretch in all.chunks_exact(8) {
            assert_eq!(stretch.iter().filter(|text| text.starts_with('b')).count(), 2, "{stretch:?}");
        }
        let of_a: Vec<_> = all.iter().filter(|text| text.starts_with('a')).cloned().collect();
        assert_eq!(of_a, (1..=70).map(|n| format!("a{n}")).collect::<Vec<_>>());
    }

    #[test]
    fn seeking_continues_where_it_was() {
        let mut first = mix();
        for _ in 0..13 {
            first.next_record().unwrap();
        }
        let (position, expected) = (first.position(), rest(&mut first));
        let mut other = mix();
        other.seek(position).unwrap();
        assert_eq!(rest(&mut other), expected);
    }
}
