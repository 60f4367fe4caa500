//! How a run shows that it is alive: a bar on a terminal, elsewhere one plain line now and then. All on stderr.

use std::io::{stderr, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

/// How long a run without a terminal stays silent.
const SILENCE: Duration = Duration::from_secs(10);

/// The progress of a run.
pub struct Progress {
    bar: Option<ProgressBar>,
    started: Instant,
    spoke: Instant,
    first: u64,
    last: u64,
    activations: i64,
    figures: String,
}

impl Progress {
    /// Progress from one step to another.
    pub fn new(first: u64, last: u64) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(last).with_position(first);
            let style = "{bar:24} {pos}/{len} steps, {eta} left, {msg}";
            bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        let now = Instant::now();
        Progress { bar, started: now, spoke: now, first, last, activations: 0, figures: String::new() }
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

    /// One step is done, on so many activations.
    pub fn step(&mut self, step: u64, activations: i64) {
        self.activations += activations;
        let elapsed = self.started.elapsed();
        let rate = self.activations as f64 / elapsed.as_secs_f64().max(1e-9);
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            bar.set_message(format!("{rate:.0} activations/s, {}", self.figures));
        } else if self.spoke.elapsed() >= SILENCE {
            self.spoke = Instant::now();
            let done = (step - self.first).max(1) as f64;
            let left = elapsed.mul_f64((self.last - step) as f64 / done);
            let left = HumanDuration(left);
            eprintln!("step {step}/{}, {left} left, {rate:.0} activations/s, {}", self.last, self.figures);
        }
    }

    /// Says something without breaking the bar.
    pub fn say(&self, message: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{message}")),
            None => eprintln!("{message}"),
        }
    }

    /// The run ends; returns its summary.
    pub fn finish(&self) -> String {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let elapsed = self.started.elapsed();
        let rate = self.activations as f64 / elapsed.as_secs_f64().max(1e-9);
        format!("{} activations in {}, {rate:.0} a second", self.activations, HumanDuration(elapsed))
    }
}
