//! Tokenising beside the forward pass: a thread makes the contexts that the model reads next.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};

use chrono::NaiveDate;
use dictlearn_core::prelude::*;

use crate::contexts::{Contexts, Place, Row};

/// Stack of a thread that renders chats: a template can nest lists as deep as its instructions allow, and freeing or
/// comparing them takes stack for each level.
pub const CHAT_STACK: usize = 512 << 20;

/// Contexts that are made ahead of their use, the same and in the same order as without a thread.
pub struct Ahead {
    /// While no thread has them.
    contexts: Option<Contexts>,
    worker: Option<Worker>,
    /// How many are made ahead at most.
    count: usize,
    /// Where the stream stands for who uses it.
    place: Place,
    note: Option<String>,
}

struct Worker {
    made: Receiver<Result<Made>>,
    thread: JoinHandle<Contexts>,
}

/// A context, or the end of the text, and what stands after it.
struct Made {
    row: Option<Row>,
    place: Place,
    note: Option<String>,
}

impl Ahead {
    /// Up to `count` contexts ahead.
    pub fn new(contexts: Contexts, count: usize) -> Self {
        Ahead { contexts: Some(contexts), worker: None, count, place: Place::default(), note: None }
    }

    /// The next contexts, at most `count`; none at the end of the text.
    pub fn next_rows(&mut self, count: usize) -> Result<Vec<Row>> {
        let mut rows = Vec::with_capacity(count);
        let before = self.place;
        while rows.len() < count {
            let Some(worker) = &self.worker else {
                self.start()?;
                continue;
            };
            // A thread that ends without a word has panicked.
            let made = match worker.made.recv() {
                Ok(Ok(made)) => made,
                Ok(Err(error)) => {
                    self.stop();
                    // The rows before it were not handed on.
                    self.place = before;
                    return Err(error);
                }
                Err(_) => {
                    self.stop();
                    continue;
                }
            };
            (self.place, self.note) = (made.place, made.note);
            match made.row {
                Some(row) => rows.push(row),
                None => {
                    self.stop();
                    break;
                }
            }
        }
        Ok(rows)
    }

    fn start(&mut self) -> Result<()> {
        let Some(mut contexts) = self.contexts.take() else { bail!("the contexts are lost") };
        let renders_chats = contexts.has_chat_template();
        let (send, made) = sync_channel(self.count);
        let work = move || {
            loop {
                let row = contexts.next_row();
                let last = !matches!(row, Ok(Some(_)));
                let row = row.map(|row| Made { row, place: contexts.place(), note: contexts.note() });
                // Who goes away takes no more.
                if send.send(row).is_err() || last {
                    return contexts;
                }
            }
        };
        let thread = thread::Builder::new().name("contexts".to_owned());
        let thread = if renders_chats { thread.stack_size(CHAT_STACK) } else { thread };
        let thread = thread.spawn(work)?;
        self.worker = Some(Worker { made, thread });
        Ok(())
    }

    /// Takes the contexts back from the thread.
    fn stop(&mut self) {
        let Some(Worker { made, thread }) = self.worker.take() else { return };
        drop(made);
        match thread.join() {
            Ok(contexts) => self.contexts = Some(contexts),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Goes back to the beginning.
    pub fn rewind(&mut self) -> Result<()> {
        self.seek(Place::default())
    }

    /// Where the stream stands.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Goes to a place.
    pub fn seek(&mut self, place: Place) -> Result<()> {
        self.stop();
        if let Some(contexts) = &mut self.contexts {
            contexts.seek(place)?;
        }
        self.place = place;
        Ok(())
    }

    /// Sets the date that chat templates see.
    pub fn set_today(&mut self, today: NaiveDate) {
        self.stop();
        if let Some(contexts) = &mut self.contexts {
            contexts.set_today(today);
        }
    }

    /// Lets the stream stand where it stood, for a state to be saved; there is no more to be read.
    pub fn end_at(&mut self, place: Place) {
        self.stop();
        (self.contexts, self.place) = (None, place);
    }

    /// What the user should know: records skipped.
    pub fn note(&self) -> Option<String> {
        self.note.clone()
    }
}
