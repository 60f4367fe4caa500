//! `example_name`: numbered documents. Change it into your own.

use dictlearn_core::prelude::*;

/// Numbered documents.
#[component(text "example_name", summary = "Numbered documents", example = "{type: example_name, documents: 5000}")]
pub struct ExampleNameConfig {
    /// Number of documents.
    #[schemars(range(min = 1))]
    pub documents: u64,
}

impl TextConfig for ExampleNameConfig {
    fn build(&self) -> Result<Box<dyn TextStream>> {
        Ok(Box::new(ExampleName { documents: self.documents, position: 0 }))
    }
}

struct ExampleName {
    documents: u64,
    position: u64,
}

impl TextStream for ExampleName {
    fn next_record(&mut self) -> Result<Option<Record>> {
        if self.position == self.documents {
            return Ok(None);
        }
        self.position += 1;
        let text = format!("This is document {} of {}.", self.position, self.documents);
        let origin = format!("{}: document {}", ExampleNameConfig::NAME, self.position);
        Ok(Some(Record::Text(Document { text, origin })))
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn seek(&mut self, position: u64) -> Result<()> {
        self.position = position.min(self.documents);
        Ok(())
    }
}
