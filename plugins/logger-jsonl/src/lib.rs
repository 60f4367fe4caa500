//! `metrics.jsonl`: one JSON object per SAE and logged step, in the run's folder.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use dictlearn_core::prelude::*;

/// Writes logged values as lines of JSON.
#[component(logger "jsonl", summary = "metrics.jsonl: one JSON object per SAE and logged step",
    example = "{type: jsonl}", default)]
pub struct JsonlConfig {
    /// File name in the run's folder; it must end in .jsonl.
    #[default("metrics.jsonl")]
    pub file: String,
}

impl LoggerConfig for JsonlConfig {
    fn build(&self, run_dir: &Path, resume_at: Option<u64>) -> Result<Box<dyn Logger>> {
        let plain = Path::new(&self.file).file_name().is_some_and(|name| name == self.file.as_str());
        if !plain || !self.file.ends_with(".jsonl") {
            bail!(
                InputError::new(format!("`file` is \"{}\"", self.file))
                    .field("file")
                    .help("give a file name without a folder, ending in .jsonl")
            );
        }
        let path = run_dir.join(&self.file);
        if let Some(step) = resume_at {
            drop_from(&path, step)?;
        }
        let mut log = Jsonl { path, file: None, length: None, waiting: Vec::new() };
        log.write()?;
        Ok(Box::new(log))
    }
}

/// Truncates the log at the first row of `step` or later, which the resumed run logs again. Also drops a partial last
/// line. Truncating, unlike rewriting, works on a full disk.
fn drop_from(path: &Path, step: u64) -> Result<()> {
    let bytes = fs::read(path).unwrap_or_default();
    let mut kept = 0;
    let mut strange = false;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let row: Option<Value> = serde_json::from_slice(line).ok();
        let later = row.as_ref().and_then(|row| row.get("step")?.as_u64()).is_some_and(|logged| logged >= step);
        if later || line.last() != Some(&b'\n') {
            break;
        }
        strange |= row.is_none();
        kept += line.len();
    }
    if step > 0 && (kept == 0 || strange) {
        let what = if strange { "has lines that are not JSON" } else { "has no rows of earlier steps" };
        tracing::warn!("{} {what}: rows logged before step {step} are lost", path.display());
    }
    if kept == bytes.len() {
        return Ok(());
    }
    let cut = || OpenOptions::new().write(true).open(path)?.set_len(kept as u64);
    cut().with_context(|| format!("cannot write {}", path.display()))
}

struct Jsonl {
    path: PathBuf,
    /// Reopened after an error, because its file system may have been unmounted.
    file: Option<File>,
    /// Length up to the last complete line; `None` until the file is first opened.
    length: Option<u64>,
    /// Lines still to be written, kept after a failed write.
    waiting: Vec<u8>,
}

impl Jsonl {
    fn write(&mut self) -> Result<()> {
        self.try_to_write().map_err(|error| {
            self.file = None;
            anyhow::anyhow!("cannot write {}: {error}", self.path.display())
        })
    }

    fn try_to_write(&mut self) -> std::io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                // Create it only once: if it has disappeared, its file system may be unmounted.
                let file = OpenOptions::new().create(self.length.is_none()).append(true).open(&self.path)?;
                let length = *self.length.get_or_insert(file.metadata()?.len());
                // A failed write may have left a partial line.
                file.set_len(length)?;
                self.file.insert(file)
            }
        };
        // Write whole lines at once, so that readers during a run never see a partial line.
        file.write_all(&self.waiting)?;
        self.length = self.length.map(|length| length + self.waiting.len() as u64);
        self.waiting.clear();
        Ok(())
    }
}

impl Logger for Jsonl {
    fn log(&mut self, row: &Map<String, Value>) -> Result<()> {
        serde_json::to_writer(&mut self.waiting, row)?;
        self.waiting.push(b'\n');
        self.write()
    }

    fn flush(&mut self) -> Result<()> {
        self.write()?;
        let synced = self.file.as_ref().map_or(Ok(()), File::sync_data);
        synced.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_kept_until_they_can_be_written() {
        let dir = std::env::temp_dir().join(format!("dictlearn-jsonl-waiting-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("metrics.jsonl");
        let mut log = JsonlConfig::default().build(&dir, None).unwrap();
        let row = |step: u64| Map::from_iter([("step".to_owned(), step.into())]);
        log.log(&row(0)).unwrap();
        let mut log = Jsonl { path: path.clone(), file: None, length: Some(11), waiting: Vec::new() };
        // The file disappears for a while, and a partial line was written before.
        fs::rename(&path, dir.join("other")).unwrap();
        assert!(log.log(&row(1)).is_err() && log.log(&row(2)).is_err() && log.flush().is_err());
        fs::write(&path, "{\"step\":0}\n{\"st").unwrap();
        log.log(&row(3)).unwrap();
        log.flush().unwrap();
        let lines = "{\"step\":0}\n{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n";
        assert_eq!(fs::read_to_string(&path).unwrap(), lines);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn resuming_drops_rows_that_will_be_logged_again() {
        let dir = std::env::temp_dir().join(format!("dictlearn-jsonl-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("metrics.jsonl");
        fs::write(&path, "{\"step\":0}\n{\"step\":5}\n{\"step\":10}\n{\"ste").unwrap();
        drop_from(&path, 10).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":0}\n{\"step\":5}\n");
        fs::remove_dir_all(dir).unwrap();
    }
}
