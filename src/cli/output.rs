//! Output of the command line: results on stdout; the library's events and progress on stderr.

use std::fmt::{self, Debug, Write as _};
use std::io::Write as _;
use std::io::{IsTerminal, stderr};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use crate::run::compare::shell_quoted;
use anyhow::{Context as _, Result};
use dictlearn_core::progress::{self, Meter, Task};
use indicatif::{HumanBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry;

/// Writes a line to stderr, above the progress bars. A closed stderr (`2>&1 | head`) does not end the program.
macro_rules! say {
    ($($words:tt)*) => { $crate::cli::output::line(format_args!($($words)*)) };
}
pub(crate) use say;

static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Implements [`say!`].
pub fn line(words: fmt::Arguments) {
    BARS.suspend(|| {
        let _ = writeln!(stderr(), "{words}");
    });
}

/// Starts showing the library's events and progress.
pub fn show() {
    let _ = tracing::subscriber::set_global_default(registry().with(Messages));
    progress::show_with(|task| match stderr().is_terminal() {
        true => Box::new(Bar::new(task)),
        false => Box::new(Lines::new(task)),
    });
}

/// Events as lines on stderr: warnings and errors begin with their level.
struct Messages;

impl<S: Subscriber> Layer<S> for Messages {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if !metadata.target().starts_with("dictlearn") || *metadata.level() > Level::INFO {
            return;
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        let level = match *metadata.level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            _ => "",
        };
        say!("{level}{}", message.0);
    }
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            let _ = write!(self.0, "{value:?}");
        }
    }
}

/// A progress bar on a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new(task: &Task) -> Self {
        let (bar, style) = match task.last {
            Some(last) if task.bytes => {
                (ProgressBar::new(last), "{bar:24} {bytes}/{total_bytes} {prefix}, {bytes_per_sec}, {eta} left")
            }
            Some(last) => (ProgressBar::new(last), "{bar:24} {pos}/{len} {prefix}, {eta} left{msg}"),
            None => (ProgressBar::new_spinner(), "{spinner} {pos} {prefix} in {elapsed}{msg}"),
        };
        let bar = BARS.add(bar);
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(500));
        Bar(bar.with_position(task.first).with_prefix(task.unit.clone()))
    }
}

impl Meter for Bar {
    fn update(&mut self, done: u64, message: &str) {
        self.0.set_position(done);
        self.0.set_message(message.to_owned());
    }

    fn finish(&self) {
        self.0.finish_and_clear();
        BARS.remove(&self.0);
    }
}

/// Interval between progress lines if stderr is not a terminal.
const SILENCE: Duration = Duration::from_secs(10);

/// Progress as plain lines, if stderr is not a terminal.
struct Lines {
    task: Task,
    started: Instant,
    spoke: Instant,
}

impl Lines {
    fn new(task: &Task) -> Self {
        Lines { task: task.clone(), started: Instant::now(), spoke: Instant::now() }
    }

    fn amount(&self, count: u64) -> String {
        if self.task.bytes { HumanBytes(count).to_string() } else { count.to_string() }
    }
}

impl Meter for Lines {
    fn update(&mut self, done: u64, message: &str) {
        if self.spoke.elapsed() < SILENCE {
            return;
        }
        self.spoke = Instant::now();
        let of = self.task.last.map_or_else(String::new, |last| {
            let (left, made) = (last.saturating_sub(done), done.saturating_sub(self.task.first).max(1));
            let left = self.started.elapsed().mul_f64(left as f64 / made as f64);
            format!("/{}, {} left", self.amount(last), HumanDuration(left))
        });
        say!("{} {}{of}{message}", self.task.unit, self.amount(done));
    }
}

/// Prints a result to stdout. A closed pipe (`| head`) is not an error.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let line_end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let written =
        out.write_all(text.as_bytes()).and_then(|()| out.write_all(line_end.as_bytes())).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// Returns the name that this program was called by, quoted for a shell.
pub fn program() -> String {
    let name = std::env::args().next().unwrap_or_else(|| "dictlearn".to_owned());
    shell_quoted(&name)
}
