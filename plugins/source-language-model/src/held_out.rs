//! Splits a text's documents into a training part and a held-out part, as other sources split their rows.

use std::collections::BTreeMap;

use dictlearn_core::prelude::*;

/// The records of a text that training reads, or those that metrics read.
pub struct PartOfText {
    /// The whole text.
    pub text: Box<dyn TextStream>,
    /// The records to hold out.
    pub held_out: HeldOut,
    /// Training or evaluation.
    pub purpose: Purpose,
}

impl TextStream for PartOfText {
    fn next_record(&mut self) -> Result<Option<Record>> {
        loop {
            let row = self.text.position();
            let record = self.text.next_record()?;
            if record.is_none() || self.held_out.wants(row, self.purpose) {
                return Ok(record);
            }
        }
    }
    fn is_tokenized(&self) -> bool {
        self.text.is_tokenized()
    }
    fn longest_row(&self) -> Option<i64> {
        self.text.longest_row()
    }
    fn files(&self) -> BTreeMap<String, u64> {
        self.text.files()
    }
    /// Returns the position in the whole text.
    fn position(&self) -> u64 {
        self.text.position()
    }
    fn seek(&mut self, position: u64) -> Result<()> {
        self.text.seek(position)
    }
    fn refuse(&mut self, origin: &str, why: &str) -> Result<()> {
        self.text.refuse(origin, why)
    }
    fn skipped(&self) -> (u64, Option<String>) {
        self.text.skipped()
    }
    fn skipped_files(&self) -> (u64, Option<String>) {
        self.text.skipped_files()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Numbers(u64);

    impl TextStream for Numbers {
        fn next_record(&mut self) -> Result<Option<Record>> {
            self.0 += 1;
            let document = Document { text: self.0.to_string(), origin: String::new() };
            Ok((self.0 <= 100).then_some(Record::Text(document)))
        }
        fn position(&self) -> u64 {
            self.0
        }
        fn seek(&mut self, position: u64) -> Result<()> {
            self.0 = position;
            Ok(())
        }
    }

    fn part(purpose: Purpose, seed: u64) -> PartOfText {
        PartOfText { text: Box::new(Numbers(0)), held_out: HeldOut::new(0.2, seed).unwrap(), purpose }
    }

    fn rest(text: &mut PartOfText) -> Vec<u64> {
        let mut found = Vec::new();
        while let Some(Record::Text(document)) = text.next_record().unwrap() {
            found.push(document.text.parse().unwrap());
        }
        found
    }

    #[test]
    fn each_document_is_either_trained_on_or_evaluated() {
        let (trained, measured) = (rest(&mut part(Purpose::Training, 0)), rest(&mut part(Purpose::Evaluation, 0)));
        assert_eq!((trained.len(), measured.len()), (80, 20));
        let mut all = [trained, measured.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (1..=100).collect::<Vec<_>>());
        assert_ne!(measured, rest(&mut part(Purpose::Evaluation, 1)));
    }

    #[test]
    fn a_part_continues_after_seeking() {
        let mut text = part(Purpose::Training, 0);
        let all = rest(&mut part(Purpose::Training, 0));
        for _ in 0..30 {
            text.next_record().unwrap();
        }
        let position = text.position();
        let mut resumed = part(Purpose::Training, 0);
        resumed.seek(position).unwrap();
        assert_eq!(rest(&mut resumed), all[30..]);
    }
}
