//! Tokenises the next contexts on a thread, in parallel to the forward pass.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};

use chrono::NaiveDate;
use dictlearn_core::prelude::*;

use crate::contexts::{Contexts, Place, Row};

/// Stack of a thread that renders chats. A template can nest lists as deep as its instructions allow, and freeing or
/// comparing them uses stack for each level.
pub const CHAT_STACK: usize = 512 << 20;

/// Prepares contexts ahead of their use. They are the same, in the same order, as without a thread.
pub struct Ahead {
    /// `None` while the thread owns them.
    contexts: Option<Contexts>,
    worker: Option<Worker>,
    /// Maximum number of contexts prepared ahead.
    count: usize,
    /// Position after the last context that was returned.
    place: Place,
    note: Option<String>,
}

struct Worker {
    made: Receiver<Result<Made>>,
    thread: JoinHandle<Contexts>,
}

/// A context, or the end of the text, with the position and the note after it.
struct Made {
    row: Option<Row>,
    place: Place,
    note: Option<String>,
}

impl Ahead {
    /// Prepares up to `count` contexts ahead.
    pub fn new(contexts: Contexts, count: usize) -> Self {
        Ahead { contexts: Some(contexts), worker: None, count, place: Place::default(), note: None }
    }

    /// Returns the next contexts, at most `count`; none at the end of the text.
    pub fn next_rows(&mut self, count: usize) -> Result<Vec<Row>> {
        let mut rows = Vec::with_capacity(count);
        let before = self.place;
        while rows.len() < count {
            let Some(worker) = &self.worker else {
                self.start()?;
                continue;
            };
            // If the thread ended without a message, it panicked.
            let made = match worker.made.recv() {
                Ok(Ok(made)) => made,
                Ok(Err(error)) => {
                    self.stop();
                    // The rows before the error are not returned.
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
                // Receiver dropped: stop producing.
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

    /// Seeks to the beginning.
    pub fn rewind(&mut self) -> Result<()> {
        self.seek(Place::default())
    }

    /// Returns the current position.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Seeks to a position.
    pub fn seek(&mut self, place: Place) -> Result<()> {
        self.stop();
        if let Some(contexts) = &mut self.contexts {
            contexts.seek(place)?;
        }
        self.place = place;
        Ok(())
    }

    /// Sets today's date for chat templates.
    pub fn set_today(&mut self, today: NaiveDate) {
        self.stop();
        if let Some(contexts) = &mut self.contexts {
            contexts.set_today(today);
        }
    }

    /// Sets the position to be saved in a checkpoint. Nothing can be read afterwards.
    pub fn end_at(&mut self, place: Place) {
        self.stop();
        (self.contexts, self.place) = (None, place);
    }

    /// Returns warnings for the user: skipped records and files, truncated documents.
    pub fn note(&self) -> Option<String> {
        self.note.clone()
    }
}
