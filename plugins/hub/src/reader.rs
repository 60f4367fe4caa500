//! Streams a file of the Hub over connections that may break.

use std::io::{self, Read};

use dictlearn_core::interrupt;

use crate::trouble::{Failure, PATIENT, pause};

type Body = Box<dyn Read + Send>;
type Open = dyn FnMut(u64) -> Result<Body, Failure> + Send;

/// A file read over the network. After a broken connection, reading resumes at the same byte.
pub struct Remote {
    /// Name of the file, for messages.
    what: String,
    size: u64,
    position: u64,
    /// Opens a connection that starts at a given byte.
    open: Box<Open>,
    body: Option<Body>,
    /// Failures since the last successful read.
    failures: usize,
}

impl Remote {
    /// Makes a reader of a file of `size` bytes, from byte `position` on. `open` connects from a given byte.
    pub fn new(
        what: String,
        size: u64,
        position: u64,
        open: impl FnMut(u64) -> Result<Body, Failure> + Send + 'static,
    ) -> Self {
        Remote { what, size, position, open: Box::new(open), body: None, failures: 0 }
    }

    /// Returns the length of the file in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the position of the next byte.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Continues at byte `position`.
    pub fn skip_to(&mut self, position: u64) {
        (self.position, self.body) = (position, None);
    }

    fn attempt(&mut self, bytes: &mut [u8]) -> Result<usize, Failure> {
        if self.body.is_none() {
            self.body = Some((self.open)(self.position)?);
        }
        let body = self.body.as_mut().expect("it was opened");
        match body.read(bytes)? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended early").into()),
            count => Ok(count),
        }
    }
}

impl Read for Remote {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        // Ignore bytes beyond the end of the file.
        let left = usize::try_from(self.size - self.position).unwrap_or(usize::MAX);
        let wanted = bytes.len().min(left);
        if wanted == 0 {
            return Ok(0);
        }
        loop {
            if interrupt::asked() {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "interrupted"));
            }
            match self.attempt(&mut bytes[..wanted]) {
                Ok(count) => {
                    self.position += count as u64;
                    self.failures = 0;
                    return Ok(count);
                }
                Err(failure) => {
                    self.body = None;
                    match PATIENT.get(self.failures).filter(|_| failure.is_passing()) {
                        Some(milliseconds) => pause(&self.what, &failure, *milliseconds),
                        None => {
                            let error = format!("cannot read {}: {failure}", self.what);
                            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, error));
                        }
                    }
                    self.failures += 1;
                }
            }
        }
    }
}
