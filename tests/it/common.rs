//! Helpers that run the program in temporary folders.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dictlearn_core::data::ActivationSource;
use serde_json::Value;
use tch::Tensor;
use tempfile::TempDir;

/// A path below `tests/fixtures`.
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

/// Reads a JSON file.
pub fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The folders in a folder, sorted.
pub fn folders(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    found.sort();
    found
}

/// A temporary folder in which the program can be run.
pub struct Desk {
    pub dir: TempDir,
    /// Endpoint of the Hub that the program uses, if any.
    hub: Option<String>,
}

impl Desk {
    pub fn new() -> Self {
        Desk { dir: TempDir::new().unwrap(), hub: None }
    }

    /// Creates a desk with a `config.yaml`.
    pub fn with_config(text: &str) -> Self {
        let desk = Self::new();
        desk.write("config.yaml", text);
        desk
    }

    pub fn with_hub(endpoint: &str) -> Self {
        Desk { hub: Some(endpoint.to_owned()), ..Self::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    pub fn read(&self, name: &str) -> String {
        let path = self.path(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub fn json(&self, name: &str) -> Value {
        read_json(&self.path(name))
    }

    /// The rows of a run's log.
    pub fn log(&self, name: &str) -> Vec<Value> {
        self.read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// A command that starts the program in this folder.
    pub fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dictlearn"));
        command.current_dir(self.dir.path());
        // The tester's Hub cache and network must not matter.
        command.env("HF_HOME", self.path("hf")).env("HF_HUB_OFFLINE", "1");
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            let theirs = ["DICTLEARN_", "HF_", "HUGGING", "TRANSFORMERS_"].iter().any(|start| name.starts_with(start));
            if theirs && !["HF_HOME", "HF_HUB_OFFLINE"].contains(&&*name) {
                command.env_remove(&*name);
            }
        }
        if let Some(endpoint) = &self.hub {
            command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", endpoint);
        }
        command
    }

    /// Runs the program and waits for it.
    pub fn run(&self, args: &[&str]) -> Run {
        Run::of(self.program().args(args).output().unwrap())
    }

    /// Runs the program, which must succeed; returns its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let run = self.run(args);
        assert_eq!(run.code, 0, "dictlearn {}\n{}\n{}", args.join(" "), run.stdout, run.stderr);
        run.stdout
    }

    /// Runs the program, which must refuse its input; returns its standard error.
    pub fn refused(&self, args: &[&str]) -> String {
        let run = self.run(args);
        assert_eq!(run.code, 2, "dictlearn {}\n{}\n{}", args.join(" "), run.stdout, run.stderr);
        assert_eq!(run.stdout, "", "a failed command printed results");
        run.stderr
    }

    /// Relative paths of all files below the folder, sorted.
    pub fn files(&self) -> Vec<String> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, found);
                } else {
                    found.push(path);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.dir.path(), &mut found);
        let mut names: Vec<String> =
            found.iter().map(|path| path.strip_prefix(self.dir.path()).unwrap().display().to_string()).collect();
        names.sort();
        names
    }

    /// Writes a saved SAE with the reference's final weights; returns its folder.
    pub fn golden_sae(&self, case: &str) -> PathBuf {
        let dir = self.path(case);
        fs::create_dir_all(&dir).unwrap();
        let from = fixture("trainers").join(case);
        fs::copy(from.join("final.safetensors"), dir.join("ae.safetensors")).unwrap();
        fs::copy(from.join("config.json"), dir.join("config.json")).unwrap();
        dir
    }
}

/// The result of a finished run of the program.
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    pub fn of(output: Output) -> Self {
        Run {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// A config that trains on the fixtures' activations `[5120, 32]`.
pub fn tensor_file_config(steps: u64, more: &str) -> String {
    tensor_file_config_of(&fixture("trainers/batches.safetensors"), 64, steps, more)
}

/// A config that trains on the given activations.
pub fn tensor_file_config_of(activations: &Path, batch_size: u64, steps: u64, more: &str) -> String {
    format!(
        "steps: {steps}\noutput_dir: run\nprecision: float32\nlog_every: 1\n\
         source: {{type: tensor_file, path: {activations:?}, batch_size: {batch_size}, shuffle: false}}\n{more}"
    )
}

/// A small tmpfs, unmounted on drop.
pub struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    /// Mounts a tmpfs of `size` kB. Returns `None` if mounting fails; it needs root.
    pub fn mount(at: &'a Path, size: u64) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let options = format!("size={size}k");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "none"]).arg(at);
        mount.status().is_ok_and(|status| status.success()).then(|| Disk(at))
    }

    /// Fills the file system.
    pub fn fill(&self) {
        let mut file = fs::File::create(self.0.join("ballast")).unwrap();
        while file.write_all(&[1; 1 << 16]).is_ok() {}
    }

    pub fn free(&self) {
        let _ = fs::remove_file(self.0.join("ballast"));
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Reads the rest of a source's pass: activations of each site, and tokens.
pub fn drain(source: &mut dyn ActivationSource) -> (Vec<Tensor>, Tensor) {
    let mut sites: Vec<Vec<Tensor>> = source.sites().iter().map(|_| Vec::new()).collect();
    let mut tokens = Vec::new();
    while let Some(activations) = source.next_batch().unwrap() {
        assert_eq!(activations.sites.len(), sites.len());
        for (all, batch) in sites.iter_mut().zip(activations.sites) {
            all.push(batch.x);
        }
        tokens.extend(activations.tokens);
    }
    (sites.iter().map(|batches| Tensor::cat(batches, 0)).collect(), Tensor::cat(&tokens, 0))
}
