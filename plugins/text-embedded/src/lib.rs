//! Text bundled with the program, so that a first run needs no download.

use dictlearn_core::data::text::{EmbeddedText, Wanted, WrittenText};
use dictlearn_core::prelude::*;
use dictlearn_core::suggest::nearest;

/// Text bundled with the program.
#[component(text "embedded", summary = "Text bundled with the program", example = "{type: embedded, name: austen}")]
pub struct EmbeddedConfig {
    /// Name of the text: `austen`.
    pub name: String,
    /// `train`, or `held_out` for text that the bundled model was not trained on.
    #[default("train")]
    pub split: String,
}

inventory::submit! {
    WrittenText {
        config: |wanted| {
            let name = inventory::iter::<EmbeddedText>.into_iter().map(|text| text.name).min()?;
            matches!(wanted, Wanted::Bundled).then(|| serde_json::json!({"type": EmbeddedConfig::NAME, "name": name}))
        },
    }
}

impl TextConfig for EmbeddedConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        let texts: Vec<&EmbeddedText> = inventory::iter::<EmbeddedText>.into_iter().collect();
        let refused = |what: &str, field: &str, found: &str, mut known: Vec<&'static str>| {
            known.sort_unstable();
            known.dedup();
            let near = nearest(found, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
            InputError::new(format!("there is no bundled {what} `{found}`")).field(field).help(format!(
                "{}known: {}",
                near.unwrap_or_default(),
                known.join(", ")
            ))
        };
        if !texts.iter().any(|text| text.name == self.name) {
            bail!(refused("text", "name", &self.name, texts.iter().map(|text| text.name).collect()));
        }
        let splits: Vec<_> = texts.into_iter().filter(|text| text.name == self.name).collect();
        let Some(text) = splits.iter().find(|text| text.split == self.split) else {
            bail!(refused("split", "split", &self.split, splits.iter().map(|text| text.split).collect()));
        };
        Ok(Box::new(Embedded { text, position: 0, rest: text.text }))
    }
}

struct Embedded {
    text: &'static EmbeddedText,
    position: u64,
    rest: &'static str,
}

impl TextStream for Embedded {
    fn next_record(&mut self) -> Result<Option<Record>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (document, rest) = self.rest.split_once("\n\n").unwrap_or((self.rest, ""));
        self.rest = rest;
        self.position += 1;
        let origin = format!("{} {} document {}", self.text.name, self.text.split, self.position);
        Ok(Some(Record::Text(Document { text: document.to_owned(), origin })))
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn seek(&mut self, position: u64) -> Result<()> {
        self.rest = self.text.text;
        self.position = 0;
        while self.position < position && self.next_record()?.is_some() {}
        Ok(())
    }
}
