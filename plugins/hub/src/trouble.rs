//! Failures of requests: transient ones are retried, lasting ones are not.

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
/// Maximum pause that a server may request: the Hub's rate limits use windows of five minutes.
const LONGEST: Duration = Duration::from_secs(300);

/// Code of a failure to trust a server's certificate.
pub const CERTIFICATE: &str = "Certificate";
/// True once a server has answered in this process.
static REACHED: AtomicBool = AtomicBool::new(false);

/// Records that a server has answered. Refused connections then count as transient.
pub fn reached() {
    REACHED.store(true, Ordering::Relaxed);
}

/// Why a request failed.
#[derive(Debug)]
pub struct Failure {
    why: String,
    passing: bool,
    status: Option<u16>,
    /// The Hub's error code, such as `GatedRepo`.
    code: String,
    /// Pause that the server requests.
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

    /// A refusal with this error code of the Hub.
    pub fn refused(status: Option<u16>, code: &str) -> Self {
        Failure { status, code: code.to_owned(), ..Failure::new(code.to_owned(), false) }
    }

    /// A failure that retrying does not fix: an invalid response, an unreadable file.
    pub fn lasting(why: impl Into<String>) -> Self {
        Failure::new(why.into(), false)
    }

    /// An interruption by the user.
    pub fn interrupted() -> Self {
        Failure::lasting("interrupted")
    }

    /// Marks the failure as transient.
    pub fn passing(self) -> Self {
        Failure { passing: true, ..self }
    }

    /// A failure to connect, or a broken connection.
    fn of_connection(error: &io::Error) -> Self {
        let why = error.to_string();
        let passing = match error.kind() {
            // A TLS error. Below: an unknown host is lasting, a name server that does not answer is transient.
            io::ErrorKind::InvalidData => false,
            _ if why.contains("failed to lookup") => why.contains("Temporary failure"),
            io::ErrorKind::ConnectionRefused => REACHED.load(Ordering::Relaxed),
            _ => true,
        };
        let code = if why.contains("certificate") { CERTIFICATE.to_owned() } else { String::new() };
        Failure { code, ..Failure::new(why, passing) }
    }

    /// Returns a successful response unchanged, and any other as a failure.
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

    /// True if retrying may succeed.
    pub fn is_passing(&self) -> bool {
        self.passing
    }

    /// True if the server did not answer, or its answer says nothing about the request itself.
    pub fn is_silence(&self) -> bool {
        self.passing || self.status.is_none()
    }

    /// Returns the HTTP status, if there was a response.
    pub fn status(&self) -> Option<u16> {
        self.status
    }

    /// Returns the Hub's error code; may be empty.
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
            HostNotFound => Failure::new("host not found".to_owned(), false),
            other => Failure::new(other.to_string(), false),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::new(error.to_string(), true)
    }
}

/// Waits before the next attempt, and logs pauses of a second or more.
pub fn pause(what: &str, failure: &Failure, milliseconds: u64) {
    let pause = failure.pause.unwrap_or(Duration::from_millis(milliseconds)).min(LONGEST);
    if pause >= Duration::from_secs(1) {
        tracing::info!("{what}: {failure}; retrying in {} s", pause.as_secs());
    }
    let until = Instant::now() + pause;
    while Instant::now() < until && !interrupt::asked() {
        sleep(Duration::from_millis(50).min(pause));
    }
}

/// Calls `attempt`, and retries transient failures after these pauses in milliseconds.
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
    fn only_transient_failures_are_retried() {
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
        // After a server has answered, a refused connection is transient.
        reached();
        assert!(error(io::ErrorKind::ConnectionRefused, "refused").is_passing());
    }
}
