//! How a command shows that it is alive: a bar on a terminal, elsewhere one plain line now and then. All on stderr.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

/// Prints a line to stderr, as `eprintln!` does. Whoever reads may have closed it (`2>&1 | head`), which is no reason to stop.
#[macro_export]
macro_rules! say {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($words)*);
    }};
}

/// How long a command without a terminal stays silent.
const SILENCE: Duration = Duration::from_secs(10);

/// Progress through something that is counted.
pub struct Progress {
    bar: Option<ProgressBar>,
    started: Instant,
    spoke: Instant,
    unit: String,
    bytes: bool,
    first: u64,
    last: Option<u64>,
    activations: i64,
    figures: String,
}

impl Progress {
    /// Progress of a run from one step to another.
    pub fn of_steps(first: u64, last: u64) -> Self {
        Progress::new("steps", first, Some(last), false)
    }

    /// Progress of fetching a file of so many bytes, of which some are there already.
    pub fn of_bytes(file: &str, first: u64, last: u64) -> Self {
        Progress::new(file, first, Some(last), true)
    }

    /// Progress of something that ends at `last`, or nobody knows when.
    pub fn counting(unit: &'static str, last: Option<u64>) -> Self {
        Progress::new(unit, 0, last, false)
    }

    fn new(unit: &str, first: u64, last: Option<u64>, bytes: bool) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let (bar, style) = match last {
                Some(last) if bytes => {
                    (ProgressBar::new(last), "{bar:24} {bytes}/{total_bytes} {prefix}, {bytes_per_sec}, {eta} left")
                }
                Some(last) => (ProgressBar::new(last), "{bar:24} {pos}/{len} {prefix}, {eta} left{msg}"),
                None => (ProgressBar::new_spinner(), "{spinner} {pos} {prefix} in {elapsed}{msg}"),
            };
            bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(500));
            bar.with_position(first).with_prefix(unit.to_owned())
        });
        let now = Instant::now();
        let (unit, figures) = (unit.to_owned(), String::new());
        Progress { bar, started: now, spoke: now, unit, bytes, first, last, activations: 0, figures }
    }

    /// Takes the figures of one logged step, one row for each SAE.
    pub fn figures(&mut self, rows: &[Map<String, Value>]) {
        let one = |row: &Map<String, Value>| {
            let figure = |key: &str| row.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
            format!(
                "{}: loss {:.4} L0 {:.1} explained {:.1}%",
                row.get("sae").and_then(Value::as_str).unwrap_or_default(),
                figure("loss"),
                figure("l0"),
                100.0 * figure("frac_variance_explained"),
            )
        };
        // More SAEs than fit a line are in the log; the line shows the first and the number.
        const SHOWN: usize = 3;
        self.figures = rows.iter().take(SHOWN).map(one).collect::<Vec<_>>().join(" | ");
        if rows.len() > SHOWN {
            self.figures += &format!(" | and {} more", rows.len() - SHOWN);
        }
    }

    /// So many are done; `activations` were worked on since the last call.
    pub fn step(&mut self, done: u64, activations: i64) {
        self.activations += activations;
        let elapsed = self.started.elapsed();
        let mut message = String::new();
        if self.activations > 0 {
            let rate = self.activations as f64 / elapsed.as_secs_f64().max(1e-9);
            message = format!(", {rate:.0} activations/s");
        }
        if !self.figures.is_empty() {
            message += &format!(", {}", self.figures);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(message);
        } else if self.spoke.elapsed() >= SILENCE {
            self.spoke = Instant::now();
            let of = self.last.map_or_else(String::new, |last| {
                let left = elapsed.mul_f64(last.saturating_sub(done) as f64 / (done - self.first).max(1) as f64);
                format!("/{}, {} left", self.amount(last), HumanDuration(left))
            });
            crate::say!("{} {}{of}{message}", self.unit, self.amount(done));
        }
    }

    fn amount(&self, count: u64) -> String {
        match self.bytes {
            true => HumanBytes(count).to_string(),
            false => count.to_string(),
        }
    }

    /// Says something without breaking the bar.
    pub fn say(&self, message: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| crate::say!("{message}")),
            None => crate::say!("{message}"),
        }
    }

    /// It ends; returns its summary.
    pub fn finish(&self) -> String {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let elapsed = self.started.elapsed();
        let rate = self.activations as f64 / elapsed.as_secs_f64().max(1e-9);
        let took = match elapsed.as_secs() {
            seconds @ 0..=119 => format!("{seconds} s"),
            seconds => format!("{} min {} s", seconds / 60, seconds % 60),
        };
        format!("{} activations in {took}, {rate:.0} a second", self.activations)
    }
}
