//! What goes wrong with a request: what passes and is tried again, and what does not.

use std::fmt;
use std::thread::sleep;
use std::time::{Duration, Instant};

use dictlearn_core::interrupt;
use hf_hub::api::sync::ApiError;
use ureq::http::Response;
use ureq::Body;

/// Pauses between attempts, in milliseconds.
pub const PATIENT: [u64; 4] = [250, 1_000, 4_000, 16_000];
/// The longest pause that a server may ask for: the Hub counts requests in windows of five minutes.
const LONGEST: Duration = Duration::from_secs(300);

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
            Io(_) | Timeout(_) | ConnectionFailed | HostNotFound | Protocol(_) => Failure::new(error.to_string(), true),
            other => Failure::new(other.to_string(), false),
        }
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::RequestError(error) => Failure::from(*error),
            ApiError::IoError(error) => Failure::new(error.to_string(), true),
            other => Failure::new(other.to_string(), false),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::new(error.to_string(), true)
    }
}

/// Waits before the next attempt, and says so.
pub fn pause(what: &str, failure: &Failure, milliseconds: u64) {
    let pause = failure.pause.unwrap_or(Duration::from_millis(milliseconds)).min(LONGEST);
    if pause >= Duration::from_secs(1) {
        eprintln!("{what}: {failure}; trying again in {} s", pause.as_secs());
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
