//! `metrics.jsonl`: one JSON object per SAE and logged step, in the run's folder.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use dictlearn_core::prelude::*;

const NAME: &str = "jsonl";

/// Figures as lines of JSON.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JsonlConfig {
    /// The file's name in the run's folder.
    #[serde(default = "default_file")]
    pub file: String,
}

fn default_file() -> String {
    "metrics.jsonl".to_owned()
}

register! {
    logger JsonlConfig, NAME,
    summary: "metrics.jsonl: one JSON object per SAE and logged step",
    paper: "",
    example: "{type: jsonl}",
    usual: true,
}

#[typetag::serde(name = NAME)]
impl LoggerConfig for JsonlConfig {
    fn build(&self, run_dir: &Path, resume_at: Option<u64>) -> Result<Box<dyn Logger>> {
        let plain = Path::new(&self.file).file_name().is_some_and(|name| name == self.file.as_str());
        if !plain || !self.file.ends_with(".jsonl") {
            bail!(InputError::new(format!("`file` is \"{}\"", self.file))
                .field("file")
                .help("it is a name in the run's folder that ends in .jsonl"));
        }
        let path = run_dir.join(&self.file);
        if let Some(step) = resume_at {
            drop_from(&path, step)?;
        }
        let open = OpenOptions::new().create(true).append(true).open(&path);
        let file = open.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Box::new(Jsonl { path, file }))
    }
}

/// Rewrites the log without the rows from `step` on: they will be logged again. A half-written last line goes too.
fn drop_from(path: &Path, step: u64) -> Result<()> {
    let Ok(text) = fs::read_to_string(path) else { return Ok(()) };
    let earlier = |line: &&str| {
        let row: Option<Value> = serde_json::from_str(line).ok();
        row.and_then(|row| row.get("step")?.as_u64()).is_some_and(|logged| logged < step)
    };
    let kept: String = text.lines().filter(earlier).flat_map(|line| [line, "\n"]).collect();
    dictlearn_core::tensors::write_file(path, kept.as_bytes())
}

struct Jsonl {
    path: PathBuf,
    file: File,
}

impl Logger for Jsonl {
    fn log(&mut self, row: &Map<String, Value>) -> Result<()> {
        let mut line = serde_json::to_vec(row)?;
        line.push(b'\n');
        // One write for a line, so that whoever looks in the middle of a run sees whole ones.
        self.file.write_all(&line).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_drops_what_will_be_logged_again() {
        let dir = std::env::temp_dir().join(format!("dictlearn-jsonl-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("metrics.jsonl");
        fs::write(&path, "{\"step\":0}\n{\"step\":5}\n{\"step\":10}\n{\"ste").unwrap();
        drop_from(&path, 10).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":0}\n{\"step\":5}\n");
        fs::remove_dir_all(dir).unwrap();
    }
}
