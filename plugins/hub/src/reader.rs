//! A file of the Hub, read as it arrives, over connections that may break.

use std::io::{self, Read};

use dictlearn_core::interrupt;

use crate::trouble::{Failure, PATIENT, pause};

type Body = Box<dyn Read + Send>;
type Open = dyn FnMut(u64) -> Result<Body, Failure> + Send;

/// A file that is read over the network and taken up where the connection broke.
pub struct Remote {
    /// Which file, for messages.
    what: String,
    size: u64,
    position: u64,
    /// Connects from a byte on.
    open: Box<Open>,
    body: Option<Body>,
    /// Failures since something was read last.
    failures: usize,
}

impl Remote {
    /// A file of `size` bytes that is read from byte `position` on. `open` connects from a given byte.
    pub fn new(
        what: String,
        size: u64,
        position: u64,
        open: impl FnMut(u64) -> Result<Body, Failure> + Send + 'static,
    ) -> Self {
        Remote { what, size, position, open: Box::new(open), body: None, failures: 0 }
    }

    /// The length of the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How far it is read.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Reads on from byte `position`.
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
        // A server that goes on past the end of the file is not listened to.
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
