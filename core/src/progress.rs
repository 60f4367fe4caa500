//! Progress of long operations. The library displays nothing; a program installs a display with [`show_with`].

use std::sync::OnceLock;
use std::time::Instant;

use serde_json::{Map, Value};

/// A task whose progress is counted.
#[derive(Debug, Clone)]
pub struct Task {
    /// Unit of the count (`steps`), or the file whose bytes are counted.
    pub unit: String,
    /// Items done at the start.
    pub first: u64,
    /// Items in total, if known.
    pub last: Option<u64>,
    /// True if bytes are counted.
    pub bytes: bool,
}

/// Displays the progress of one task.
pub trait Meter: Send {
    /// Displays that `done` items are finished. `message` follows the count; it is empty or begins with `, `.
    fn update(&mut self, done: u64, message: &str);

    /// Ends the display.
    fn finish(&self) {}
}

/// Function that creates the [`Meter`] of a task.
pub type ShowWith = fn(&Task) -> Box<dyn Meter>;

static SHOW_WITH: OnceLock<ShowWith> = OnceLock::new();

/// Installs the display for all later tasks of this process. Only the first call has an effect.
pub fn show_with(meter: ShowWith) {
    let _ = SHOW_WITH.set(meter);
}

/// Progress of one task.
pub struct Progress {
    meter: Option<Box<dyn Meter>>,
    started: Instant,
    activations: i64,
    figures: String,
}

impl Progress {
    /// Starts the progress of a run from step `first` to `last`.
    pub fn of_steps(first: u64, last: u64) -> Self {
        Progress::new(Task { unit: "steps".to_owned(), first, last: Some(last), bytes: false })
    }

    /// Starts the progress of downloading a file of `last` bytes, `first` of which are already there.
    pub fn of_bytes(file: &str, first: u64, last: u64) -> Self {
        Progress::new(Task { unit: file.to_owned(), first, last: Some(last), bytes: true })
    }

    /// Starts the progress of a task from 0 to `last`, if known.
    pub fn counting(unit: &'static str, last: Option<u64>) -> Self {
        Progress::new(Task { unit: unit.to_owned(), first: 0, last, bytes: false })
    }

    fn new(task: Task) -> Self {
        let meter = SHOW_WITH.get().map(|meter| meter(&task));
        Progress { meter, started: Instant::now(), activations: 0, figures: String::new() }
    }

    /// Sets the figures to display: those of one logged step, one row for each SAE.
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
        // A line has room for a few SAEs; the log has all of them.
        const SHOWN: usize = 3;
        self.figures = rows.iter().take(SHOWN).map(one).collect::<Vec<_>>().join(" | ");
        if rows.len() > SHOWN {
            self.figures += &format!(" | and {} more", rows.len() - SHOWN);
        }
    }

    /// Reports that `done` items are finished, and that `activations` were processed since the last call.
    pub fn step(&mut self, done: u64, activations: i64) {
        self.activations += activations;
        let Some(meter) = &mut self.meter else { return };
        let mut message = String::new();
        if self.activations > 0 {
            let rate = self.activations as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
            message = format!(", {rate:.0} activations/s");
        }
        if !self.figures.is_empty() {
            message += &format!(", {}", self.figures);
        }
        meter.update(done, &message);
    }

    /// Ends the task and returns its summary.
    pub fn finish(&self) -> String {
        if let Some(meter) = &self.meter {
            meter.finish();
        }
        let elapsed = self.started.elapsed();
        let rate = self.activations as f64 / elapsed.as_secs_f64().max(1e-9);
        let took = match elapsed.as_secs() {
            seconds @ 0..=119 => format!("{seconds} s"),
            seconds => format!("{} min {} s", seconds / 60, seconds % 60),
        };
        format!("{} activations in {took}, {rate:.0} per second", self.activations)
    }
}
