//! From a text stream to contexts: rows of token ids.

use dictlearn_core::lm::ModelFiles;
use dictlearn_core::prelude::*;
use tokenizers::Tokenizer;

/// How documents become contexts.
#[derive(Debug, Clone, Copy)]
pub struct ContextsCx {
    /// Tokens in a context.
    pub ctx_len: usize,
    /// Whether documents are joined and cut into full contexts, instead of one document a context.
    pub pack: bool,
    /// Whether the tokenizer adds its special tokens to each document.
    pub add_special_tokens: bool,
    /// Number of token ids that the model embeds.
    pub vocab_size: i64,
    /// The longest context that the model takes.
    pub max_positions: Option<i64>,
}

/// One context.
#[derive(Debug, Clone)]
pub struct Row {
    ids: Vec<i64>,
    mask: Vec<bool>,
    /// Where its text is from, for messages.
    pub origin: String,
}

impl Row {
    /// Positions, padding among them.
    pub fn len(&self) -> usize {
        self.ids.len()
    }
}

/// Contexts of a text stream.
pub struct Contexts {
    text: Box<dyn TextStream>,
    tokenizer: Option<Tokenizer>,
    cx: ContextsCx,
    /// The token between documents.
    end_of_text: Option<i64>,
    /// Tokens of the text read so far that fill no context yet.
    carry: Vec<i64>,
    rows: u64,
}

impl Contexts {
    /// Contexts of a text for a model.
    pub fn new(text: Box<dyn TextStream>, files: &ModelFiles, cx: ContextsCx) -> Result<Self> {
        let tokenizer = match files.read("tokenizer.json")? {
            None => None,
            Some(bytes) => {
                let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| {
                    InputError::new(format!("the tokenizer.json of {} cannot be read: {error}", files.name()))
                })?;
                // Length and padding are ours to decide, whatever the file was saved with.
                tokenizer.with_padding(None);
                let _ = tokenizer.with_truncation(None);
                Some(tokenizer)
            }
        };
        if tokenizer.is_none() && !text.is_tokenized() {
            bail!(InputError::new(format!("the model {} has no tokenizer.json", files.name()))
                .help("add it to the model's folder, or give tokens: `text: {type: token_file, path: ...}`"));
        }
        // Embeddings are often longer than the vocabulary, for speed, but never shorter.
        let ids = tokenizer.iter().flat_map(|tokenizer| tokenizer.get_vocab(true)).map(|(_, id)| i64::from(id));
        if let Some(largest) = ids.max().filter(|largest| *largest >= cx.vocab_size && !text.is_tokenized()) {
            bail!(InputError::new(format!(
                "the tokenizer of {} has token ids up to {largest}, but the model embeds only 0 to {}",
                files.name(),
                cx.vocab_size - 1
            ))
            .help("the tokenizer and the model do not belong together"));
        }
        let tokenizer_config = files.json("tokenizer_config.json")?.unwrap_or_default();
        let model_config = files.json("config.json")?.unwrap_or_default();
        // A special token is a string, or an object with the string as `content`.
        let name = tokenizer_config.get("eos_token");
        let name = name.and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
        let by_name = name.and_then(|token| tokenizer.as_ref()?.token_to_id(token)).map(i64::from);
        let end_of_text = by_name.or_else(|| model_config.get("eos_token_id")?.as_i64());
        Ok(Contexts { text, tokenizer, cx, end_of_text, carry: Vec::new(), rows: 0 })
    }

    /// The next contexts, at most `count`; none at the end of the text.
    pub fn next_rows(&mut self, count: usize) -> Result<Vec<Row>> {
        let mut rows = Vec::with_capacity(count);
        while rows.len() < count {
            let Some(row) = self.next_row()? else { break };
            rows.push(row);
        }
        Ok(rows)
    }

    fn next_row(&mut self) -> Result<Option<Row>> {
        let length = self.cx.ctx_len;
        loop {
            if self.carry.len() >= length {
                let rest = self.carry.split_off(length);
                return self.packed(rest).map(Some);
            }
            match self.text.next_record()? {
                None if self.carry.is_empty() => return Ok(None),
                // The end of the text is a context too, if a shorter one.
                None => return self.packed(Vec::new()).map(Some),
                Some(Record::Tokens { ids, mask }) => {
                    self.rows += 1;
                    let origin = format!("row {}", self.rows - 1);
                    self.check(&ids, &origin)?;
                    if let Some(most) = self.cx.max_positions.filter(|most| ids.len() as i64 > *most) {
                        bail!(InputError::new(format!(
                            "{origin} has {} positions, but the model takes at most {most}",
                            ids.len()
                        )));
                    }
                    return Ok(Some(Row { ids, mask, origin }));
                }
                Some(Record::Text(document)) => {
                    let mut ids = self.encode(&document)?;
                    self.check(&ids, &document.origin)?;
                    if self.cx.pack {
                        self.carry.extend(self.end_of_text);
                        self.carry.append(&mut ids);
                    } else if !ids.is_empty() {
                        ids.truncate(length);
                        let mask = vec![true; ids.len()];
                        return Ok(Some(Row { ids, mask, origin: document.origin }));
                    }
                }
            }
        }
    }

    /// Everything in `carry` as a row; `rest` is carried on.
    fn packed(&mut self, rest: Vec<i64>) -> Result<Row> {
        let ids = std::mem::replace(&mut self.carry, rest);
        let mask = vec![true; ids.len()];
        Ok(Row { ids, mask, origin: format!("text up to record {}", self.text.position()) })
    }

    fn encode(&self, document: &Document) -> Result<Vec<i64>> {
        let Some(tokenizer) = &self.tokenizer else {
            bail!("a text that is not tokenised needs a tokenizer");
        };
        let encoding = tokenizer
            .encode(document.text.as_str(), self.cx.add_special_tokens)
            .map_err(|error| anyhow::anyhow!("{}: cannot tokenise: {error}", document.origin))?;
        Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
    }

    fn check(&self, ids: &[i64], origin: &str) -> Result<()> {
        if let Some(wrong) = ids.iter().find(|id| !(0..self.cx.vocab_size).contains(*id)) {
            bail!(InputError::new(format!(
                "{origin}: token id {wrong}, but the model embeds only the ids 0 to {}",
                self.cx.vocab_size - 1
            ))
            .help("the tokenizer and the model do not belong together"));
        }
        Ok(())
    }

    /// Rows as one batch, padded on the right to the longest.
    pub fn batch(rows: &[&Row], device: Device) -> Tokens {
        let length = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for row in rows {
            ids.extend(&row.ids);
            ids.resize(ids.len() + length - row.ids.len(), 0);
            mask.extend(&row.mask);
            mask.resize(mask.len() + length - row.mask.len(), false);
        }
        let size = [rows.len() as i64, length as i64];
        Tokens {
            ids: Tensor::from_slice(&ids).view(size).to_device(device),
            mask: Tensor::from_slice(&mask).view(size).to_device(device),
        }
    }

    /// Goes back to the beginning.
    pub fn rewind(&mut self) -> Result<()> {
        self.carry.clear();
        self.rows = 0;
        self.text.seek(0)
    }

    /// Where the stream stands.
    pub fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.put("position", self.text.position())?;
        state.put("carry", &self.carry)?;
        state.put("rows", self.rows)?;
        Ok(state)
    }

    /// Goes to where [`Contexts::state`] was called.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        self.text.seek(state.get("position")?)?;
        self.carry = state.get("carry")?;
        self.rows = state.get("rows")?;
        Ok(())
    }

    /// What the user should know: records skipped.
    pub fn note(&self) -> Option<String> {
        let (count, first) = self.text.skipped();
        first.map(|first| format!("warning: {count} bad records were skipped, the first is {first}"))
    }
}
