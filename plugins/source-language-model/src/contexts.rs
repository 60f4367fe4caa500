//! Turns a text stream into contexts: rows of token ids.

mod tokenizer;

use std::collections::{BTreeMap, VecDeque};

use chrono::NaiveDate;
use dictlearn_core::lm::ModelFiles;
use dictlearn_core::prelude::*;
use tokenizers::Tokenizer;

use crate::chat::{self, ChatTemplate};

/// Maximum bytes tokenised at once. The tokenizer needs about a hundred times as much memory.
const PIECE: usize = 1 << 18;

/// Upper bound on the average bytes per token in any text.
const BYTES_OF_A_TOKEN: usize = 64;

/// Settings for turning documents into contexts.
#[derive(Debug, Clone, Copy)]
pub struct ContextsCx {
    /// Tokens per context.
    pub ctx_len: usize,
    /// Join documents and cut them into full contexts, instead of one context per document.
    pub pack: bool,
    /// Let the tokenizer add its special tokens to each document.
    pub add_special_tokens: bool,
    /// Start every context with the BOS token, whatever the tokenizer does.
    pub prepend_bos: bool,
    /// Number of token ids that the model embeds.
    pub vocab_size: i64,
    /// Maximum context length of the model.
    pub max_positions: Option<i64>,
    /// Today's date for chat templates.
    pub today: NaiveDate,
    /// True if the user set the date.
    pub date_is_chosen: bool,
}

/// One context.
#[derive(Debug, Clone)]
pub struct Row {
    ids: Vec<i64>,
    mask: Vec<bool>,
    /// Where its text comes from, for messages.
    pub origin: String,
}

impl Row {
    /// Returns the number of positions, including padding.
    pub fn len(&self) -> usize {
        self.ids.len()
    }
}

/// Position in a stream of contexts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Records of the text that are completely used.
    position: u64,
    /// Tokens used of the next record.
    used: usize,
    /// Rows of token ids returned.
    rows: u64,
}

/// Contexts of a text stream.
pub struct Contexts {
    text: Box<dyn TextStream>,
    tokenizer: Option<Tokenizer>,
    /// Special tokens that the tokenizer adds before and after a document.
    special: [Vec<i64>; 2],
    /// The chat template, or why there is none.
    chats: std::result::Result<ChatTemplate, String>,
    cx: ContextsCx,
    /// Token between packed documents.
    end_of_text: Option<i64>,
    /// Token that starts every context.
    bos: Option<i64>,
    /// Ids of BOS, EOS, padding and separator.
    special_ids: Vec<i64>,
    /// Documents with tokens that are not in a context yet.
    carry: VecDeque<Tokenised>,
    rows: u64,
    /// Number of documents read.
    documents: u64,
    /// Number of truncated documents, and the origin of the first.
    cut: (u64, Option<String>),
}

/// A tokenised document.
struct Tokenised {
    ids: Vec<i64>,
    origin: String,
    /// Number of records of the text before it.
    position: u64,
    /// Number of its tokens that are already in a context.
    used: usize,
    /// True if these are all of its tokens. A document longer than its context is tokenised only in part.
    whole: bool,
}

impl Contexts {
    /// Makes the contexts of a text for a model.
    pub fn new(mut text: Box<dyn TextStream>, files: &ModelFiles, cx: ContextsCx) -> Result<Self> {
        let tokenizer = tokenizer(files)?;
        if tokenizer.is_none() && !text.is_tokenized() && begins_with_text(&mut *text)? {
            bail!(
                InputError::new(format!("the model {} has no tokenizer.json", files.name()))
                    .help("add it to the model's folder, or give token ids: `text: {type: token_file, path: ...}`")
            );
        }
        let mut tokenizer_config =
            files.json("tokenizer_config.json")?.unwrap_or_else(|| Value::Object(Default::default()));
        // Older models list special tokens in a separate file, which takes precedence.
        let older = files.json("special_tokens_map.json")?;
        if let (Some(config), Some(Value::Object(older))) = (tokenizer_config.as_object_mut(), older) {
            for (name, token) in older {
                config.insert(name, token);
            }
        }
        let model_config = files.json("config.json")?.unwrap_or_default();
        let mut by_key = BTreeMap::new();
        for name in ["bos", "eos", "pad", "sep"] {
            let id = special_id(&model_config, name).map_err(|(key, value)| {
                InputError::new(format!(
                    "the config.json of {} has `{key}: {value}`, but token ids are integers",
                    files.name()
                ))
                .help(format!("correct `{key}` in that file: an integer, a list of them, or null"))
            })?;
            by_key.extend(id.map(|id| (name, id)));
        }
        let special = |name: &str| {
            let token = chat::special_token(&tokenizer_config, &format!("{name}_token"));
            let by_name = token.and_then(|token| tokenizer.as_ref()?.token_to_id(token)).map(i64::from);
            by_name.or_else(|| by_key.get(name).copied())
        };
        let end_of_text = special("eos");
        let first = special("bos");
        let bos = cx.prepend_bos.then(|| first.or(end_of_text)).flatten();
        let embedded = |id: &i64| (0..cx.vocab_size).contains(id);
        for (name, id) in [("eos", end_of_text.filter(|_| cx.pack)), ("bos", bos)] {
            if let Some(id) = id.filter(|id| !embedded(id) && !text.is_tokenized()) {
                bail!(
                    InputError::new(format!(
                        "in the files of {}, {} is token {id}, but the model embeds only the ids 0 to {}",
                        files.name(),
                        name.to_uppercase(),
                        cx.vocab_size - 1
                    ))
                    .help(format!(
                        "correct `{name}_token_id` in its config.json, or `{name}_token` in its tokenizer_config.json"
                    ))
                );
            }
        }
        if cx.prepend_bos && bos.is_none() && !text.is_tokenized() {
            bail!(
                InputError::new(format!("the files of {} do not define a BOS token", files.name()))
                    .help("remove `prepend_bos`, or add `bos_token` to its tokenizer_config.json")
            );
        }
        let chats = ChatTemplate::read(files, &tokenizer_config, cx.today)?;
        let special_ids = ["bos", "eos", "pad", "sep"].into_iter().filter_map(special).filter(embedded).collect();
        let mut contexts = Contexts {
            text,
            tokenizer,
            special: Default::default(),
            chats,
            cx,
            end_of_text,
            bos,
            special_ids,
            carry: VecDeque::new(),
            rows: 0,
            documents: 0,
            cut: (0, None),
        };
        if contexts.tokenizer.is_some() && cx.add_special_tokens {
            let [with, plain] = [true, false].map(|special| contexts.piece("a", special, files.name()));
            let (with, plain) = (with?, plain?);
            // The plain tokens are in the middle, between the special ones.
            let start = with.windows(plain.len().max(1)).position(|window| window == plain).unwrap_or(0);
            contexts.special = [with[..start].to_vec(), with[(start + plain.len()).min(with.len())..].to_vec()];
        }
        if !contexts.text.is_tokenized() {
            contexts.warn(files, &tokenizer_config, first);
        }
        Ok(contexts)
    }

    /// Warns of files that disagree about special tokens, and of packed documents without a separator.
    fn warn(&self, files: &ModelFiles, tokenizer_config: &Value, bos: Option<i64>) {
        let [before, after] = &self.special;
        let name = files.name();
        let eos = self.end_of_text;
        for (key, id) in [("bos", bos), ("eos", eos)] {
            let token = chat::special_token(tokenizer_config, &format!("{key}_token"));
            let known = |token: &&str| self.tokenizer.as_ref().is_none_or(|known| known.token_to_id(token).is_some());
            if let Some(token) = token.filter(|token| !known(token)) {
                tracing::warn!(
                    "the tokenizer_config.json of {name} has `{key}_token: {token}`, which its tokenizer.json does not \
                     have: {}",
                    match id {
                        Some(id) => format!("using `{key}_token_id: {id}` of its config.json"),
                        None => format!("continuing without {}", key.to_uppercase()),
                    }
                );
            }
        }
        if self.cx.add_special_tokens && !self.cx.prepend_bos {
            // A first token other than BOS has its own warning below.
            let other = bos.zip(before.first()).filter(|(bos, _)| !before.contains(bos));
            for (key, token, place) in [("bos", bos, before), ("eos", eos, after)] {
                let setting = tokenizer_config.get(format!("add_{key}_token")).filter(|value| !value.is_null());
                if let Some(value) = setting.filter(|value| !value.is_boolean()) {
                    tracing::warn!(
                        "the tokenizer_config.json of {name} has `add_{key}_token: {value}`, which is neither true nor \
                         false: ignoring it"
                    );
                }
                let says = setting.and_then(Value::as_bool);
                let does = token.is_some_and(|token| place.contains(&token));
                if says.is_some_and(|says| says != does) && !(key == "bos" && other.is_some()) {
                    tracing::warn!(
                        "the tokenizer_config.json of {name} has `add_{key}_token: {}`, but its tokenizer.json \
                         adds {} {}; using tokenizer.json, as transformers 5 does (4 uses the other for some \
                         classes); `prepend_bos` on the source overrides both",
                        !does,
                        match key {
                            _ if !does => "no",
                            "eos" => "an",
                            _ => "a",
                        },
                        key.to_uppercase(),
                    );
                }
            }
            if let Some((bos, first)) = other {
                let text = |id: i64| {
                    let known = self.tokenizer.as_ref().zip(u32::try_from(id).ok());
                    known.and_then(|(tokenizer, id)| tokenizer.id_to_token(id)).unwrap_or_else(|| id.to_string())
                };
                tracing::warn!(
                    "the tokenizer.json of {name} starts a text with `{}`, but its tokenizer_config.json names \
                     `{}` as BOS; using tokenizer.json, as transformers does; `prepend_bos: true` on the source \
                     uses the other",
                    text(*first),
                    text(bos)
                );
            }
        }
        if self.cx.pack && eos.is_none() && self.bos.is_none() && before.is_empty() && after.is_empty() {
            tracing::warn!(
                "packing documents without a separator: the files of {name} name no end-of-text token; \
                 add `eos_token` to its tokenizer_config.json, or `eos_token_id` to its config.json"
            );
        }
    }

    /// Returns the ids of BOS, EOS, padding and separator that the model's files name.
    pub fn special_ids(&self) -> &[i64] {
        &self.special_ids
    }

    /// Returns today's date for chat templates.
    pub fn today(&self) -> NaiveDate {
        self.cx.today
    }

    /// Sets today's date for chat templates.
    pub fn set_today(&mut self, today: NaiveDate) {
        self.cx.today = today;
        if let Ok(chats) = &mut self.chats {
            chats.set_today(today);
        }
    }

    /// True if chats can be rendered, which needs a large stack.
    pub fn has_chat_template(&self) -> bool {
        self.chats.is_ok()
    }

    /// Returns the next context; `None` at the end of the text.
    pub fn next_row(&mut self) -> Result<Option<Row>> {
        if self.text.is_tokenized() {
            return self.row_of_tokens();
        }
        let length = self.cx.ctx_len;
        loop {
            let there: usize = self.carry.iter().map(|document| document.ids.len() - document.used).sum();
            if there >= length || (there > 0 && !self.cx.pack) {
                return Ok(Some(self.row_of_carry(length)));
            }
            // The rest of the text makes a shorter context.
            match self.document()? {
                None => return Ok((there > 0).then(|| self.row_of_carry(length))),
                Some(document) => self.carry.push_back(document),
            }
        }
    }

    fn row_of_tokens(&mut self) -> Result<Option<Row>> {
        let Some(Record::Tokens { ids, mask, origin }) = self.text.next_record()? else { return Ok(None) };
        self.rows += 1;
        self.check(&ids, &origin)?;
        if let Some(most) = self.cx.max_positions.filter(|most| ids.len() as i64 > *most) {
            bail!(InputError::new(format!("{origin} has {} positions, but the model takes at most {most}", ids.len())));
        }
        Ok(Some(Row { ids, mask, origin }))
    }

    /// Makes a context of up to `length` carried tokens: of several documents, or without `pack` the beginning of one.
    fn row_of_carry(&mut self, length: usize) -> Row {
        let mut ids = Vec::with_capacity(length);
        // The tokenizer may already have added BOS.
        let begun = self.carry.front().and_then(|document| document.ids.get(document.used)).copied();
        ids.extend(self.bos.filter(|bos| begun != Some(*bos)));
        let origin = self.carry.front().map_or_else(String::new, |document| document.origin.clone());
        while let Some(document) = self.carry.front_mut().filter(|_| ids.len() < length) {
            let end = document.ids.len().min(document.used + length - ids.len());
            ids.extend(&document.ids[document.used..end]);
            document.used = end;
            if !self.cx.pack && (end < document.ids.len() || !document.whole) {
                self.cut.0 += 1;
                self.cut.1.get_or_insert_with(|| document.origin.clone());
            }
            if end == document.ids.len() || !self.cx.pack {
                self.carry.pop_front();
            }
        }
        Row { mask: vec![true; ids.len()], ids, origin }
    }

    /// Returns the next document of the text, tokenised.
    fn document(&mut self) -> Result<Option<Tokenised>> {
        loop {
            let position = self.text.position();
            let mut separator = self.end_of_text.filter(|_| self.cx.pack);
            let (ids, whole, origin) = match self.text.next_record().under("text")? {
                None => return Ok(None),
                Some(Record::Tokens { mut ids, mask, origin }) => {
                    // Pretokenised rows already have their special tokens.
                    separator = None;
                    let mut is_text = mask.into_iter();
                    ids.retain(|_| is_text.next().unwrap_or(true));
                    (ids, true, origin)
                }
                Some(Record::Text(document)) => {
                    let (ids, whole) = self.encode(&document.text, self.cx.add_special_tokens, &document.origin)?;
                    (ids, whole, document.origin)
                }
                Some(Record::Chat(Chat { messages, origin })) => {
                    let template = self.chats.as_ref().map_err(|why| {
                        InputError::new(format!("{origin} is a chat, but {why}"))
                            .help("use a chat model, or a text without chats")
                    })?;
                    if template.is_dated() && !std::mem::replace(&mut self.cx.date_is_chosen, true) {
                        tracing::info!(
                            "the chat template writes today's date, {today}, into chats; set `chat_date: {today}` on \
                             the source to get the same text on another day",
                            today = self.cx.today
                        );
                    }
                    match template.render(&messages) {
                        // The template already adds the special tokens.
                        Ok(text) => {
                            let (ids, whole) = self.encode(&text, false, &origin)?;
                            (ids, whole, origin)
                        }
                        Err(why) => {
                            self.text.refuse(&origin, &format!("the model's chat template rejects it: {why}"))?;
                            continue;
                        }
                    }
                }
            };
            self.check(&ids, &origin)?;
            let ids: Vec<i64> = separator.into_iter().chain(ids).collect();
            if !ids.is_empty() {
                self.documents += 1;
                return Ok(Some(Tokenised { ids, origin, position, used: 0, whole }));
            }
        }
    }

    /// Tokenises a document. Also returns whether the tokens are complete: without `pack`, it stops once a context is
    /// full.
    fn encode(&self, text: &str, add_special_tokens: bool, origin: &str) -> Result<(Vec<i64>, bool)> {
        let (piece, enough) = match self.cx.pack {
            true => (PIECE, usize::MAX),
            false => (PIECE.min(BYTES_OF_A_TOKEN * self.cx.ctx_len), self.cx.ctx_len),
        };
        if text.len() <= piece {
            return Ok((self.piece(text, add_special_tokens, origin)?, true));
        }
        let none = Default::default();
        let [before, after] = if add_special_tokens { &self.special } else { &none };
        let (mut ids, mut rest) = (before.clone(), text);
        while !rest.is_empty() && ids.len() < enough {
            let (now, later) = rest.split_at(between_words(rest, piece));
            ids.extend(self.piece(now, false, origin)?);
            rest = later;
        }
        ids.extend(after);
        Ok((ids, rest.is_empty()))
    }

    /// Tokenises a piece of a document.
    fn piece(&self, text: &str, add_special_tokens: bool, origin: &str) -> Result<Vec<i64>> {
        let Some(tokenizer) = &self.tokenizer else {
            bail!(
                InputError::new(format!("{origin} is text, but the model has no tokenizer.json"))
                    .help("add it to the model's folder, or give only token ids")
            );
        };
        tokenizer::ids(tokenizer, text, add_special_tokens).map_err(|why| {
            InputError::new(format!("{origin}: the model's tokenizer fails: {why}"))
                .help("its tokenizer.json is damaged or of an unsupported type: download it again")
                .into()
        })
    }

    /// Returns an error if the model does not embed one of the tokens.
    fn check(&self, ids: &[i64], origin: &str) -> Result<()> {
        let Some(wrong) = ids.iter().find(|id| !(0..self.cx.vocab_size).contains(*id)) else { return Ok(()) };
        let name = u32::try_from(*wrong).ok().and_then(|id| self.tokenizer.as_ref()?.id_to_token(id));
        let error = InputError::new(format!(
            "{origin}: token id {wrong}{}, but the model embeds only the ids 0 to {}",
            name.as_ref().map_or_else(String::new, |name| format!(" (`{name}`)")),
            self.cx.vocab_size - 1
        ));
        bail!(match name {
            Some(name) => error.help(format!(
                "remove `{name}` from the text; if ordinary words have such ids, the tokenizer is another model's"
            )),
            None => error.help("the token ids are of another model's tokenizer"),
        })
    }

    /// Combines rows into a batch, padded on the right to the longest.
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

    /// Returns the local files of the text, with their lengths.
    pub fn files(&self) -> BTreeMap<String, u64> {
        self.text.files()
    }

    /// Returns the current position.
    pub fn place(&self) -> Place {
        let (position, used) = match self.carry.front() {
            Some(document) => (document.position, document.used),
            None => (self.text.position(), 0),
        };
        Place { position, used, rows: self.rows }
    }

    /// Seeks to a position.
    pub fn seek(&mut self, place: Place) -> Result<()> {
        self.carry.clear();
        self.text.seek(place.position)?;
        self.rows = place.rows;
        if place.used > 0 {
            let document = self.document()?;
            self.carry.extend(document.map(|document| Tokenised { used: place.used, ..document }));
        }
        Ok(())
    }

    /// Returns warnings for the user: skipped records and files, truncated documents.
    pub fn note(&self) -> Option<String> {
        let (count, first) = self.text.skipped();
        let records = first.map(|first| match count {
            1 => format!("warning: 1 bad record was skipped: {first}"),
            _ => format!("warning: {count} bad records were skipped, the first is {first}"),
        });
        let (count, first) = self.text.skipped_files();
        let files = first.map(|first| match count {
            1 => format!("warning: 1 unreadable file was skipped, at least in part: {first}"),
            _ => format!("warning: {count} unreadable files were skipped, at least in part, the first is {first}"),
        });
        let (count, first) = &self.cut;
        let cut = first.as_ref().map(|first| {
            let (documents, length) = (self.documents, self.cx.ctx_len);
            let is_longest = self.cx.max_positions.is_some_and(|most| length as i64 >= most);
            let raise = if is_longest { "" } else { "raise `ctx_len`, or " };
            format!(
                "warning: {count} of {documents} documents are longer than `ctx_len` {length} and were truncated \
                 (the first is {first}); {raise}set `pack: true`"
            )
        });
        records.into_iter().chain(files).chain(cut).reduce(|one, other| format!("{one}\n{other}"))
    }
}

/// Returns the id of a special token in a model's config, the first of several. The error is the key with a value that
/// is not an id.
fn special_id(model_config: &Value, name: &str) -> std::result::Result<Option<i64>, (String, Value)> {
    let key = format!("{name}_token_id");
    // Multimodal models have a separate config for text.
    for config in [Some(model_config), model_config.get("text_config")].into_iter().flatten() {
        let id = match config.get(&key) {
            Some(Value::Array(several)) => several.first(),
            id => id,
        };
        if let Some(id) = id.filter(|id| !id.is_null()) {
            return id.as_i64().map(Some).ok_or_else(|| (key, id.clone()));
        }
    }
    Ok(None)
}

/// True if a stream's first record needs a tokenizer. A stream that cannot be read returns its error at the first real
/// read.
fn begins_with_text(text: &mut dyn TextStream) -> Result<bool> {
    let begins = matches!(text.next_record(), Ok(Some(Record::Text(_) | Record::Chat(_))));
    text.seek(0)?;
    Ok(begins)
}

/// Reads the model's tokenizer, if it has one.
fn tokenizer(files: &ModelFiles) -> Result<Option<Tokenizer>> {
    let Some(bytes) = files.read("tokenizer.json")? else { return Ok(None) };
    let tokenizer = tokenizer::read(&bytes)
        .map_err(|why| InputError::new(format!("the tokenizer.json of {} cannot be read: {why}", files.name())))?;
    Ok(Some(tokenizer))
}

/// Returns the text of each of these tokens, or the id of a token that has none.
pub fn token_texts(files: &ModelFiles, ids: &[i64]) -> Result<Vec<String>> {
    let tokenizer = tokenizer(files)?;
    let text = |id: &i64| {
        let known = tokenizer.as_ref().zip(u32::try_from(*id).ok());
        // A part of a character has no text of its own: show its bytes, or its name in the vocabulary.
        let decoded = known.and_then(|(tokenizer, id)| {
            let text = tokenizer::text(tokenizer, id).filter(|text| !text.is_empty() && !text.contains('\u{fffd}'));
            text.or_else(|| {
                let name = tokenizer.id_to_token(id)?;
                Some(tokenizer::bytes_of(&name).unwrap_or(name))
            })
        });
        decoded.unwrap_or_else(|| id.to_string())
    };
    Ok(ids.iter().map(text).collect())
}

/// Returns where to end a piece of at most `at_most` bytes: before a single space between two words, across which
/// tokenizers make no token; without one, after a character.
fn between_words(text: &str, at_most: usize) -> usize {
    if text.len() <= at_most {
        return text.len();
    }
    let bytes = text.as_bytes();
    let alone =
        |at: &usize| bytes[*at] == b' ' && !bytes[at - 1].is_ascii_whitespace() && !bytes[at + 1].is_ascii_whitespace();
    let letter = || (1..=at_most).rev().find(|at| text.is_char_boundary(*at));
    (1..at_most).rev().find(alone).or_else(letter).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_ids_are_read_from_every_form_of_config() {
        let of = |json: &str| special_id(&serde_json::from_str(json).unwrap(), "eos");
        assert_eq!(of(r#"{"eos_token_id": 7}"#), Ok(Some(7)));
        assert_eq!(of(r#"{"eos_token_id": [128001, 128008, 128009]}"#), Ok(Some(128_001)));
        assert_eq!(of(r#"{"text_config": {"eos_token_id": [1, 106]}, "eos_token_id": null}"#), Ok(Some(1)));
        for none in ["{}", r#"{"eos_token_id": null}"#, r#"{"eos_token_id": []}"#] {
            assert_eq!(of(none), Ok(None), "{none}");
        }
        for (bad, value) in
            [(r#"{"eos_token_id": "2"}"#, "\"2\""), (r#"{"text_config": {"eos_token_id": [true]}}"#, "true")]
        {
            let (key, found) = of(bad).unwrap_err();
            assert_eq!((key.as_str(), found.to_string().as_str()), ("eos_token_id", value), "{bad}");
        }
    }

    #[test]
    fn pieces_end_between_words() {
        assert_eq!(between_words("one two three", 9), 7);
        assert_eq!(between_words("one two", 100), 7);
        // Runs of spaces may be tokens.
        assert_eq!(between_words("one two   three", 11), 3);
        assert_eq!(between_words("äääää", 3), 2);
    }
}
