//! `example_name`: the loss of each SAE at each logged step as comma-separated values. Change it into your own.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use dictlearn_core::prelude::*;

/// The loss as comma-separated values.
#[component(logger "example_name", summary = "The loss as comma-separated values", example = "{type: example_name}")]
pub struct ExampleNameConfig {
    /// The file, in the run's folder.
    #[default("example_name.csv")]
    pub file: String,
}

impl LoggerConfig for ExampleNameConfig {
    fn build(&self, run_dir: &Path, resume_at: Option<u64>) -> Result<Box<dyn Logger>> {
        let path = run_dir.join(&self.file);
        // Drop rows that will be logged again.
        let text = fs::read_to_string(&path).unwrap_or_default();
        let step = |line: &str| line.split(',').next().and_then(|step| step.parse::<u64>().ok());
        let earlier = |line: &&str| step(line).is_some_and(|step| resume_at.is_some_and(|from| step < from));
        let kept: String = text.lines().filter(earlier).flat_map(|line| [line, "\n"]).collect();
        dictlearn_core::files::tensors::write_file(&path, format!("step,sae,loss\n{kept}").as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path);
        Ok(Box::new(ExampleName { file: file.with_context(|| format!("cannot write {}", path.display()))? }))
    }
}

struct ExampleName {
    file: File,
}

impl Logger for ExampleName {
    fn log(&mut self, row: &Map<String, Value>) -> Result<()> {
        let value = |name: &str| row.get(name).map_or_else(String::new, |value| value.to_string().replace('"', ""));
        let line = format!("{},{},{}\n", value("step"), value("sae"), value("loss"));
        self.file.write_all(line.as_bytes()).context("cannot write the log")
    }
}
