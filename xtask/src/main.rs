//! Set-up and checks: `cargo xtask COMMAND`. Builds without libtorch; finds or downloads one.

mod book;
mod layers;
mod libtorch;
mod reuse;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};

use libtorch::Wanted;

/// Set-up and checks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    /// Use a libtorch without CUDA, even if the machine has a GPU.
    #[arg(long, global = true, conflicts_with = "cuda")]
    cpu: bool,
    /// Use a libtorch with CUDA, even if the machine has no GPU.
    #[arg(long, global = true)]
    cuda: bool,
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Find or download libtorch, so that plain `cargo build` works.
    Setup,
    /// Set up and build, then train and evaluate SAEs on the bundled language model.
    Quickstart,
    /// Set up, build and run every test.
    Test {
        /// Arguments for the tests.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run the checks that a commit must pass besides the tests: format, lints, docs, dependencies, packages, plugins.
    Ci,
    /// Run the fuzz targets with cargo-fuzz (needs a nightly toolchain).
    Fuzz {
        /// Seconds for each target.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
    },
    /// Write the reference pages, check the book's links and commands, and build it where mdBook is installed.
    Docs,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let root = root()?;
    let wanted = match (cli.cpu, cli.cuda) {
        (true, _) => Wanted::Cpu,
        (_, true) => Wanted::Cuda,
        _ => Wanted::WhatTheMachineHas,
    };
    let started = Instant::now();
    libtorch::set_up(&root, wanted)?;
    if started.elapsed().as_secs() > 0 {
        eprintln!("set-up took {} s", started.elapsed().as_secs());
    }
    match &cli.task {
        Task::Setup => Ok(()),
        Task::Quickstart => quickstart(&root),
        Task::Test { args } => test(&root, args),
        Task::Ci => {
            cargo(&root, &["fmt", "--all", "--check"], &[])?;
            layers::check(&root, &metadata(&root)?)?;
            book::check(&root)?;
            cargo(&root, &["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"], &[])?;
            // Manifests deny doc lints, because `RUSTDOCFLAGS` would replace the flags of libtorch.toml.
            cargo(&root, &["doc", "--workspace", "--no-deps"], &[])?;
            deny(&root)?;
            unused_dependencies(&root)?;
            package(&root)?;
            // Without cargo-fuzz, which rebuilds all dependencies for many minutes. `tests/it/fuzz.rs` runs its
            // targets.
            plugins(&root)
        }
        Task::Fuzz { seconds } => fuzz(&root, *seconds),
        Task::Docs => {
            cargo(&root, &["run", "--quiet", "--", "docs", "--out", "docs/reference"], &[])?;
            book::write_summary(&root)?;
            book::check(&root)?;
            // The pages' commands, configs and Python; then their Rust.
            cargo(&root, &["test", "--quiet", "--package", "dictlearn", "--test", "it", "--", "docs::"], &[])?;
            cargo(&root, &["test", "--quiet", "--package", "dictlearn", "--doc"], &[])?;
            book::build(&root)
        }
    }
}

fn test(root: &Path, args: &[String]) -> Result<()> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    cargo(root, &["test", "--workspace"], &args)
}

/// Checks licences and sources of dependencies. Not advisories: they need a download and change without a commit here;
/// run `cargo deny check` for them.
fn deny(root: &Path) -> Result<()> {
    if !answers(Command::new(libtorch::cargo_program()).args(["deny", "--version"])) {
        eprintln!("skipping `cargo deny check licenses bans sources`: cargo-deny is not installed");
        return Ok(());
    }
    cargo(root, &["deny", "check", "licenses", "bans", "sources"], &[])
}

/// Checks for unused dependencies.
fn unused_dependencies(root: &Path) -> Result<()> {
    if !answers(Command::new(libtorch::cargo_program()).args(["machete", "--version"])) {
        eprintln!("skipping `cargo machete`: cargo-machete is not installed");
        return Ok(());
    }
    // Not the root package: only build.rs uses its plugins, which machete does not see.
    cargo(root, &["machete", "core", "plugins", "xtask", "fuzz", "examples"], &[])
}

/// Checks that every crate can be packaged for a registry.
fn package(root: &Path) -> Result<()> {
    let all = ["package", "--workspace", "--exclude", "xtask", "--exclude", "train_tiny_lm"];
    // `--no-verify`: building from the packages would compile everything a second time.
    cargo(root, &all, &["--no-verify", "--allow-dirty", "--quiet", "--offline"])
}

/// Runs each fuzz target from its corpus. Inputs with new coverage go to fuzz/target/found, failing ones to
/// fuzz/artifacts.
fn fuzz(root: &Path, seconds: u64) -> Result<()> {
    let nightly = || {
        let mut command = Command::new("rustup");
        command.args(["run", "nightly", "cargo", "fuzz"]).current_dir(root);
        for name in libtorch::VARIABLES {
            command.env_remove(name);
        }
        command
    };
    if !answers(nightly().arg("--version")) {
        eprintln!("skipping `cargo fuzz run`: cargo-fuzz or a nightly toolchain is not installed");
        return Ok(());
    }
    let dir = root.join("fuzz");
    std::fs::copy(root.join("Cargo.lock"), dir.join("Cargo.lock")).context("cannot copy Cargo.lock")?;
    let mut targets: Vec<_> = std::fs::read_dir(dir.join("corpus"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    targets.sort();
    for target in targets {
        let found = dir.join("target/found").join(&target);
        std::fs::create_dir_all(&found).with_context(|| format!("cannot create {}", found.display()))?;
        // No sanitizer: its allocator conflicts with the program's. The targets limit their own memory.
        let mut command = nightly();
        command.args(["run", "--sanitizer", "none", &target]).args([found, dir.join("corpus").join(&target)]);
        call(command.args(["--", "-timeout=60", "-rss_limit_mb=0", &format!("-max_total_time={seconds}")]))?;
    }
    Ok(())
}

/// Returns true if a program runs successfully.
fn answers(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// Builds and tests plugins outside the workspace: the example, which also trains, and one of each kind as created by
/// `dictlearn new-plugin`.
fn plugins(root: &Path) -> Result<()> {
    const KINDS: [&str; 8] = ["dictionary", "modifier", "source", "text", "metric", "logger", "model", "format"];
    let example = root.join("examples/out-of-tree-plugin");
    // The same lock file as the workspace, so that cargo reuses the compiled dependencies.
    std::fs::copy(root.join("Cargo.lock"), example.join("Cargo.lock")).context("cannot copy Cargo.lock")?;
    reuse::dependencies(root, &example)?;
    cargo(&example, &["test"], &[])?;
    let out = tempfile::tempdir()?;
    let run_dir = out.path().join("run").display().to_string();
    let train = ["train", "config.yaml", "--set", "steps=100", "--output-dir", &run_dir];
    cargo(&example, &["run", "--quiet", "--"], &train)?;
    for kind in KINDS {
        let (name, dir) = (format!("my_{kind}"), out.path().join(kind));
        let dir_text = dir.display().to_string();
        cargo(root, &["run", "--quiet", "--", "new-plugin", kind, &name, "--out", &dir_text], &[])?;
        reuse::dependencies(root, &dir)?;
        // The example compiled dictlearn's crates; cargo reuses them for all plugins outside the workspace.
        reuse::everything_else(&dir, &name)?;
        cargo(&dir, &["test", "--quiet"], &[])?;
    }
    guide(root, out.path())
}

/// A crate of the guide: the commands that create it, its files, and the commands that follow.
#[derive(Default)]
struct GuideCrate<'a> {
    begin: &'a str,
    files: std::collections::BTreeMap<&'a str, String>,
    commands: Vec<&'a str>,
}

/// Returns the crates of docs/writing-plugins.md. A block with `new-plugin` begins one; a block's first line names its
/// file.
fn guide_crates(guide: &str) -> Result<Vec<GuideCrate<'_>>> {
    let mut crates: Vec<GuideCrate> = Vec::new();
    // Every other part is a fenced block, whose first line states its language and file.
    for block in guide.split("\n```").skip(1).step_by(2) {
        let (what, text) = block.split_once('\n').context("a block has a first line")?;
        if what == "text" {
            continue;
        }
        if what == "sh" && text.contains("dictlearn new-plugin ") {
            crates.push(GuideCrate { begin: text, ..GuideCrate::default() });
            continue;
        }
        let last = crates.last_mut().context("the guide begins with a crate")?;
        match what.split_once(' ') {
            None if what == "sh" => last.commands.push(text),
            Some((_, file)) => {
                let content = last.files.entry(file).or_default();
                if !content.is_empty() {
                    content.push('\n');
                }
                content.push_str(text);
                content.push('\n');
            }
            None => bail!("the guide has a block of `{what}` without a file name"),
        }
    }
    Ok(crates)
}

/// Follows docs/writing-plugins.md: writes the files of its blocks, piece by piece, and runs its commands.
fn guide(root: &Path, dir: &Path) -> Result<()> {
    let guide = std::fs::read_to_string(root.join("docs/writing-plugins.md")).context("cannot read the guide")?;
    let crates = guide_crates(&guide)?;
    ensure!(crates.len() == 2, "the guide has {} crates, expected a trainer and a dictionary", crates.len());
    let program = target_dir(root)?.join("debug");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(program).chain(std::env::split_paths(&path)))?;
    let place = dir.join("place");
    let shell = |script: &str, dir: &Path| {
        let mut command = Command::new("sh");
        for name in libtorch::VARIABLES {
            command.env_remove(name);
        }
        let script = format!("{script}\npwd > \"$PLACE\"");
        call(command.args(["-euc", &script]).current_dir(dir).env("PATH", &path).env("PLACE", &place))?;
        // The folder in which the commands ended.
        anyhow::Ok(PathBuf::from(std::fs::read_to_string(&place)?.trim_end()))
    };
    let mut current = dir.to_owned();
    for GuideCrate { begin, files, commands } in crates {
        current = shell(begin, &current)?;
        let name = current.file_name().context("a crate has a folder")?.to_owned();
        for (file, content) in files {
            // File names may begin with the crate's folder.
            let file = Path::new(file).strip_prefix(&name).unwrap_or(Path::new(file));
            std::fs::write(current.join(file), content).with_context(|| format!("cannot write {}", file.display()))?;
        }
        for script in commands {
            current = shell(script, &current)?;
        }
    }
    Ok(())
}

fn quickstart(root: &Path) -> Result<()> {
    let started = Instant::now();
    cargo(root, &["build", "--release"], &[])?;
    eprintln!("the build took {:.0} s", started.elapsed().as_secs_f64());
    let program = target_dir(root)?.join("release/dictlearn");
    // Every quickstart gets its own folder.
    let free = |number: usize| {
        root.join(if number == 1 { "runs/quickstart".into() } else { format!("runs/quickstart-{number}") })
    };
    let run_dir = (1..).map(free).find(|dir| !dir.exists()).context("no free name under runs/")?;
    let started = Instant::now();
    let mut command = Command::new(&program);
    command.arg("train").arg(root.join("configs/quickstart.yaml")).arg("--output-dir").arg(&run_dir);
    call(&mut command)?;
    eprintln!("training and evaluation took {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Returns the workspace's folder.
fn root() -> Result<PathBuf> {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    Ok(own.parent().context("xtask must be in the workspace")?.to_owned())
}

fn target_dir(root: &Path) -> Result<PathBuf> {
    metadata(root)?["target_directory"].as_str().map(PathBuf::from).context("cargo metadata names no target directory")
}

/// Returns cargo's metadata of the workspace's own packages.
fn metadata(root: &Path) -> Result<serde_json::Value> {
    let output = Command::new(libtorch::cargo_program())
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root)
        .output()
        .context("cannot run cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn cargo(root: &Path, args: &[&str], more: &[&str]) -> Result<()> {
    let mut command = Command::new(libtorch::cargo_program());
    command.args(args).args(more).current_dir(root);
    // Cargo started this program with the variables of an older libtorch.toml; let it read the current one.
    for name in libtorch::VARIABLES {
        command.env_remove(name);
    }
    call(&mut command)
}

/// Prints a command and runs it.
fn call(command: &mut Command) -> Result<()> {
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    let program = command.get_program().to_string_lossy().into_owned();
    let name = Path::new(&program).file_name().map_or(program.clone(), |name| name.to_string_lossy().into_owned());
    eprintln!("$ {name} {}", words.join(" "));
    let status = command.status().with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        bail!("`{name} {}` failed ({status})", words.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guide_blocks_belong_to_the_crate_before_them() {
        let guide = "a\n```sh\ndictlearn new-plugin x\n```\nb\n```rust src/lib.rs\nuse a;\n```\n\n```rust src/lib.rs\nuse b;\n```\n\
                     ```text\nnothing\n```\n```sh\ncargo test\n```\n```sh\ncd ..\ndictlearn new-plugin y\n```\n";
        let crates = guide_crates(guide).unwrap();
        assert_eq!(crates.len(), 2);
        assert_eq!(crates[0].files["src/lib.rs"], "use a;\n\nuse b;\n");
        assert_eq!(crates[0].commands, ["cargo test"]);
        assert!(crates[1].begin.starts_with("cd .."));
        assert!(guide_crates("\n```sh\ndictlearn new-plugin x\n```\n```zig\n```\n").is_err());
    }
}
