//! What goes wrong with a request: what passes and is tried again, and what does not.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use dictlearn_core::interrupt;
use dictlearn_core::tracing;
use ureq::Body;
use ureq::http::Response;

/// Pauses between attempts, in milliseconds.
pub const PATIENT: [u64; 4] = [250, 1_000, 4_000, 16_000];
/// The longest pause that a server may ask for: the Hub counts requests in windows of five minutes.
const LONGEST: Duration = Duration::from_secs(300);

/// The code of a failure to trust a server's certificate.
pub const CERTIFICATE: &str = "Certificate";
/// Whether a server has answered since the program began.
static REACHED: AtomicBool = AtomicBool::new(false);

/// Notes that a server has answered: one that refuses connections later is down for a moment, and not elsewhere.
pub fn reached() {
    REACHED.store(true, Ordering::Relaxed);
}

/// Why a request gave nothing.
#[derive(Debug)]
pub struct Failure {
    why: String,
    passing: bool,
    status: Option<u16>,
    /// The Hub's own name for it: `GatedRepo`.
    code: String,
    /// How long the server wants to be left alone.
    pause: Option<Duration>,
}

impl Failure {
    fn new(why: String, passing: bool) -> Self {
        Failure { why, passing, status: None, code: String::new(), pause: None }
    }

    fn of_status(status: u16) -> Self {
        let passing = matches!(status, 408 | 429 | 500 | 502 | 503 | 504);
        Failure { status: Some(status), ..Failure::new(format!("status {status}"), passing) }
    }

    /// A refusal that the Hub gives this name.
    pub fn refused(status: Option<u16>, code: &str) -> Self {
        Failure { status, code: code.to_owned(), ..Failure::new(code.to_owned(), false) }
    }

    /// What stays as it is: an answer that makes no sense, a file that cannot be read.
    pub fn lasting(why: impl Into<String>) -> Self {
        Failure::new(why.into(), false)
    }

    /// The user breaks it off.
    pub fn interrupted() -> Self {
        Failure::lasting("interrupted")
    }

    /// The same, which passes.
    pub fn passing(self) -> Self {
        Failure { passing: true, ..self }
    }

    /// A connection that could not be made, or broke.
    fn of_connection(error: &io::Error) -> Self {
        let why = error.to_string();
        let passing = match error.kind() {
            // What TLS does not accept; a name that is not there, other than a name server that does not answer.
            io::ErrorKind::InvalidData => false,
            _ if why.contains("failed to lookup") => why.contains("Temporary failure"),
            io::ErrorKind::ConnectionRefused => REACHED.load(Ordering::Relaxed),
            _ => true,
        };
        let code = if why.contains("certificate") { CERTIFICATE.to_owned() } else { String::new() };
        Failure { code, ..Failure::new(why, passing) }
    }

    /// Passes on a response that is a success.
    pub fn check(mut response: Response<Body>) -> Result<Response<Body>, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let header = |name: &str| {
            let value = response.headers().get(name).and_then(|value| value.to_str().ok());
            value.unwrap_or_default().to_owned()
        };
        let (code, mut message) = (header("x-error-code"), header("x-error-message"));
        let pause = header("retry-after").parse().ok().map(Duration::from_secs);
        if message.is_empty() {
            let body = response.body_mut().with_config().limit(1 << 16).read_json::<serde_json::Value>().ok();
            message = body.and_then(|body| Some(body.get("error")?.as_str()?.to_owned())).unwrap_or_default();
        }
        let mut failure = Failure { code, pause, ..Failure::of_status(status.as_u16()) };
        if !message.is_empty() {
            failure.why += &format!(", {message}");
        }
        Err(failure)
    }

    /// Whether it may be otherwise a little later.
    pub fn is_passing(&self) -> bool {
        self.passing
    }

    /// Whether the server gave no answer, or none that says anything about what was asked.
    pub fn is_silence(&self) -> bool {
        self.passing || self.status.is_none()
    }

    /// The HTTP status, if there was an answer.
    pub fn status(&self) -> Option<u16> {
        self.status
    }

    /// The Hub's own name for it, or nothing.
    pub fn code(&self) -> &str {
        &self.code
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        use ureq::Error::{ConnectionFailed, HostNotFound, Io, Protocol, StatusCode, Timeout};
        match error {
            StatusCode(status) => Failure::of_status(status),
            Io(error) => Failure::of_connection(&error),
            Timeout(_) | ConnectionFailed | Protocol(_) => Failure::new(error.to_string(), true),
            HostNotFound => Failure::new("there is no host of that name".to_owned(), false),
            other => Failure::new(other.to_string(), false),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::new(error.to_string(), true)
    }
}

/// Waits before the next attempt, and says so.
pub fn pause(what: &str, failure: &Failure, milliseconds: u64) {
    let pause = failure.pause.unwrap_or(Duration::from_millis(milliseconds)).min(LONGEST);
    if pause >= Duration::from_secs(1) {
        tracing::info!("{what}: {failure}; trying again in {} s", pause.as_secs());
    }
    let until = Instant::now() + pause;
    while Instant::now() < until && !interrupt::asked() {
        sleep(Duration::from_millis(50).min(pause));
    }
}

/// Tries again, after these pauses in milliseconds, what fails in a way that passes.
pub fn patiently<T>(pauses: &[u64], what: &str, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    for milliseconds in pauses {
        if interrupt::asked() {
            break;
        }
        match attempt() {
            Err(failure) if failure.passing => pause(what, &failure, *milliseconds),
            done => return done,
        }
    }
    attempt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_pass_is_not_tried_again() {
        let error =
            |kind: io::ErrorKind, why: &str| Failure::from(ureq::Error::Io(io::Error::new(kind, why.to_owned())));
        let other = io::ErrorKind::Other;
        for lasting in [
            error(io::ErrorKind::InvalidData, "invalid peer certificate: UnknownIssuer"),
            error(other, "failed to lookup address information: Name or service not known"),
            error(io::ErrorKind::ConnectionRefused, "Connection refused (os error 111)"),
            Failure::from(ureq::Error::HostNotFound),
        ] {
            assert!(!lasting.is_passing() && lasting.is_silence(), "{lasting}");
        }
        for status in [401, 403, 404, 410, 418] {
            let refused = Failure::of_status(status);
            assert!(!refused.is_passing() && !refused.is_silence(), "{refused}");
        }
        for passing in [
            error(other, "failed to lookup address information: Temporary failure in name resolution"),
            error(io::ErrorKind::ConnectionReset, "Connection reset by peer"),
            error(io::ErrorKind::UnexpectedEof, "Peer disconnected"),
            Failure::of_status(503),
            Failure::of_status(429),
        ] {
            assert!(passing.is_passing(), "{passing}");
        }
        // A host that has answered is down for a moment.
        reached();
        assert!(error(io::ErrorKind::ConnectionRefused, "refused").is_passing());
    }
}
