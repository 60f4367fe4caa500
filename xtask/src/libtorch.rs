//! Finds or downloads libtorch, and writes `.cargo/libtorch.toml`, which tells cargo where it is.
//!
//! libtorch comes from PyPI's torch wheel; pip downloads it and checks its hash. Without a GPU, only the CPU parts are
//! kept. Files are unpacked into a temporary folder, which is renamed when it is complete.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};

/// Version that tch requires.
const VERSION: &str = "2.11.0";
/// Libraries that the wheel's CPU part links to but never calls.
const CUDA_STUBS: [&str; 2] = ["nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"];
/// Environment variables that choose a libtorch, set by the user or by `libtorch.toml`.
pub const VARIABLES: [&str; 3] = ["LIBTORCH", "LIBTORCH_USE_PYTORCH", "LIBTORCH_CXX11_ABI"];

/// Requested kind of libtorch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// With CUDA if there is an NVIDIA GPU.
    WhatTheMachineHas,
    /// Without CUDA.
    Cpu,
    /// With CUDA.
    Cuda,
}

/// Returns the cargo that runs this program.
pub fn cargo_program() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Ensures that there is a libtorch and that cargo finds it.
pub fn set_up(root: &Path, wanted: Wanted) -> Result<()> {
    need_compiler()?;
    let config = root.join(".cargo/libtorch.toml");
    let recorded = fs::read_to_string(&config).ok().and_then(|text| recorded(&text));
    let cuda = match wanted {
        Wanted::Cpu => false,
        Wanted::Cuda => true,
        Wanted::WhatTheMachineHas => has_gpu(),
    };

    let libtorch = if let Some(own) = users_own(recorded.as_deref())? {
        check_version(&own)?;
        eprintln!("using your libtorch, {}", own.display());
        own
    } else if let Some(before) = recorded.filter(|path| wanted == Wanted::WhatTheMachineHas && is_whole(path)) {
        before
    } else {
        let cache = cache_dir()?;
        fetch(&cache, cuda)?
    };
    let text = toml(&libtorch);
    if fs::read_to_string(&config).ok().as_deref() != Some(&text) {
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        eprintln!("wrote .cargo/libtorch.toml: plain `cargo build`, `run`, `test` and `bench` now find libtorch");
    }
    Ok(())
}

/// Returns the content of `.cargo/libtorch.toml` for a libtorch.
fn toml(libtorch: &Path) -> String {
    let libtorch = libtorch.display().to_string().replace('\\', "\\\\").replace('"', "\\\"");
    format!(
        "# Written by `cargo xtask setup`; delete it to choose libtorch anew.\n\
         [env]\n\
         LIBTORCH = \"{libtorch}\"\n\
         LIBTORCH_CXX11_ABI = \"1\"\n\
         \n\
         [build]\n\
         rustflags = [\"-C\", \"link-arg=-Wl,--disable-new-dtags,-rpath,{libtorch}/lib\"]\n\
         rustdocflags = [\"-C\", \"link-arg=-Wl,--disable-new-dtags,-rpath,{libtorch}/lib\"]\n"
    )
}

/// Returns the libtorch that a `libtorch.toml` names.
fn recorded(toml: &str) -> Option<PathBuf> {
    let line = toml.lines().find_map(|line| line.strip_prefix("LIBTORCH = \""))?;
    Some(PathBuf::from(line.strip_suffix('"')?))
}

/// Returns the libtorch that the user's environment names, if any. cargo also sets `LIBTORCH` from `libtorch.toml`, so
/// a variable with that value is not the user's.
fn users_own(recorded: Option<&Path>) -> Result<Option<PathBuf>> {
    if std::env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
        let python = python()?;
        let script = "import os, torch; print(os.path.dirname(torch.__file__))";
        let output = output(Command::new(&python).args(["-c", script]))?;
        ensure!(
            output.status.success(),
            "LIBTORCH_USE_PYTORCH is set, but {python} cannot import torch: {}",
            last_lines(&output.stderr, 1)
        );
        return Ok(Some(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())));
    }
    let Some(path) = std::env::var_os("LIBTORCH").map(PathBuf::from) else { return Ok(None) };
    if Some(path.as_path()) == recorded {
        return Ok(None);
    }
    ensure!(
        path.join("lib").is_dir() && path.join("include").is_dir(),
        "LIBTORCH is {}, which is not a libtorch: it lacks `lib` or `include`",
        path.display()
    );
    Ok(Some(path))
}

fn check_version(libtorch: &Path) -> Result<()> {
    let Some(found) = version(libtorch) else { return Ok(()) };
    let plain = found.split('+').next().unwrap_or_default();
    if plain == VERSION || std::env::var_os("LIBTORCH_BYPASS_VERSION_CHECK").is_some() {
        return Ok(());
    }
    bail!(
        "the libtorch at {} is version {plain}, but {VERSION} is needed; unset LIBTORCH and LIBTORCH_USE_PYTORCH to \
         download it, or set LIBTORCH_BYPASS_VERSION_CHECK=1 to try this one anyway",
        libtorch.display()
    )
}

/// Returns the version recorded in a libtorch.
fn version(libtorch: &Path) -> Option<String> {
    if let Ok(text) = fs::read_to_string(libtorch.join("build-version")) {
        return Some(text.trim().to_owned());
    }
    let python = fs::read_to_string(libtorch.join("version.py")).ok()?;
    let line = python.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
    Some(line.trim_matches(['\'', '"']).to_owned())
}

fn is_whole(libtorch: &Path) -> bool {
    libtorch.join("lib/libtorch.so").exists() && libtorch.join("include").is_dir()
}

fn has_gpu() -> bool {
    let found = Command::new("nvidia-smi").arg("-L").output();
    found.is_ok_and(|output| output.status.success() && output.stdout.starts_with(b"GPU"))
}

fn need_compiler() -> Result<()> {
    let named = std::env::var("CXX").ok();
    let names: Vec<&str> = named.as_deref().into_iter().chain(["c++", "g++", "clang++"]).collect();
    if names.iter().any(|name| Command::new(name).arg("--version").output().is_ok_and(|out| out.status.success())) {
        return Ok(());
    }
    bail!(
        "there is no C++ compiler (looked for {}): install one with `apt-get install g++` (Debian, Ubuntu) or \
         `dnf install gcc-c++` (Fedora)",
        names.join(", ")
    )
}

/// Returns the name of a Python program.
fn python() -> Result<String> {
    let runs = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|out| out.status.success());
    let Some(name) = ["python3", "python"].into_iter().find(runs) else {
        bail!(
            "downloading libtorch needs Python 3, which was not found: install python3 and pip, or set LIBTORCH to the \
             folder of a libtorch {VERSION}"
        );
    };
    Ok(name.to_owned())
}

fn cache_dir() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("DICTLEARN_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("dictlearn")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/dictlearn")))
        .context("no cache folder for libtorch: set DICTLEARN_CACHE or HOME")
}

/// Returns the libtorch in the cache, downloading it if it is missing.
fn fetch(cache: &Path, cuda: bool) -> Result<PathBuf> {
    ensure!(
        cfg!(target_os = "linux"),
        "libtorch is downloaded on Linux only; install PyTorch {VERSION} and set LIBTORCH_USE_PYTORCH=1"
    );
    let place = cache.join(format!("libtorch-{VERSION}-{}", if cuda { "cuda" } else { "cpu" }));
    // pip installs the CUDA wheels in Python's layout, in which libtorch is the folder `torch`.
    let libtorch = if cuda { place.join("torch") } else { place.clone() };
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let lock = File::create(cache.join("lock")).with_context(|| format!("cannot write to {}", cache.display()))?;
    lock.lock().context("cannot lock the cache")?;
    if is_whole(&libtorch) {
        return Ok(libtorch);
    }

    let python = python()?;
    let pip = output(Command::new(&python).args(["-m", "pip", "--version"]))?;
    ensure!(
        pip.status.success(),
        "downloading libtorch needs pip, which {python} lacks: run `apt-get install python3-pip`, or set LIBTORCH"
    );
    let (size, megabytes) = if cuda { ("about 5 GB", 12_000) } else { ("about 550 MB", 1_600) };
    need_space(cache, megabytes)?;
    eprintln!("downloading libtorch {VERSION} ({size}) to {}", place.display());
    let partial = cache.join(format!("{}.partial", place.file_name().and_then(OsStr::to_str).unwrap_or("libtorch")));
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    if cuda {
        let mut install = Command::new(&python);
        install.args(["-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target"]).arg(&partial);
        pip_call(install.arg(format!("torch=={VERSION}")))?;
    } else {
        fetch_cpu(&python, &cache.join("downloads"), &partial)?;
    }
    let whole = if cuda { partial.join("torch") } else { partial.clone() };
    ensure!(is_whole(&whole), "the wheel of torch {VERSION} lacks libraries or headers: {}", whole.display());
    fs::rename(&partial, &place).with_context(|| format!("cannot rename {}", partial.display()))?;
    let _ = fs::remove_dir_all(cache.join("downloads"));
    Ok(libtorch)
}

/// Downloads the CPU parts of PyPI's wheel: 450 MB of libraries, and the headers.
fn fetch_cpu(python: &str, downloads: &Path, partial: &Path) -> Result<()> {
    let machine = std::env::consts::ARCH;
    let mut download = Command::new(python);
    // pip compares hashes and does not download a complete wheel again.
    download.args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]);
    for glibc in ["2_28", "2_27", "2_26", "2_25", "2_24", "2_17"] {
        download.args(["--platform", &format!("manylinux_{glibc}_{machine}")]);
    }
    download.args(["--platform", &format!("manylinux2014_{machine}"), "--dest"]).arg(downloads);
    pip_call(download.arg(format!("torch=={VERSION}")).args(CUDA_STUBS))?;

    fs::create_dir_all(partial)?;
    let unpack = Command::new(python).args(["-c", UNPACK]).arg(downloads).arg(partial).output();
    let unpack = unpack.context("cannot run Python")?;
    ensure!(unpack.status.success(), "cannot unpack libtorch: {}", last_lines(&unpack.stderr, 3));
    #[cfg(unix)]
    std::os::unix::fs::symlink("libtorch_cpu.so", partial.join("lib/libtorch.so"))?;
    fs::write(partial.join("build-version"), format!("{VERSION}+cpu\n"))?;
    Ok(())
}

/// Unpacks the needed files of a folder's wheels into another folder; zipfile verifies checksums.
const UNPACK: &str = r#"
import os, shutil, sys, zipfile
downloads, out = sys.argv[1:]
libraries = ("libc10.so", "libtorch_cpu.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13")
for wheel in sorted(os.listdir(downloads)):
    with zipfile.ZipFile(os.path.join(downloads, wheel)) as archive:
        for name in archive.namelist():
            base = os.path.basename(name)
            if name.startswith(("torch/include/", "torch/share/")):
                place = name[len("torch/"):]
            elif base in libraries:
                place = "lib/" + base
            else:
                continue
            if not base:
                continue
            path = os.path.join(out, place)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with archive.open(name) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
missing = [name for name in libraries if not os.path.exists(os.path.join(out, "lib", name))]
sys.exit("missing: " + ", ".join(missing) if missing else 0)
"#;

fn pip_call(command: &mut Command) -> Result<()> {
    // Newer versions of pip resume interrupted downloads.
    command.env("PIP_RESUME_RETRIES", "5").env("PIP_DISABLE_PIP_VERSION_CHECK", "1");
    let output = command.output().context("cannot run pip")?;
    ensure!(
        output.status.success(),
        "pip could not download libtorch; check the network and the package index. pip's output:\n{}\n\
         Without a network, set LIBTORCH to the folder of a libtorch {VERSION}.",
        last_lines(&output.stderr, 3)
    );
    Ok(())
}

fn need_space(dir: &Path, megabytes: u64) -> Result<()> {
    let Ok(output) = Command::new("df").arg("-Pk").arg(dir).output() else { return Ok(()) };
    let text = String::from_utf8_lossy(&output.stdout);
    let free = text.lines().nth(1).and_then(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok());
    match free.map(|kilobytes| kilobytes / 1024) {
        Some(free) if free < megabytes => bail!(
            "{} has {free} MB free, but downloading libtorch needs {megabytes} MB; set DICTLEARN_CACHE to another disk",
            dir.display()
        ),
        _ => Ok(()),
    }
}

fn output(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))
}

fn last_lines(text: &[u8], count: usize) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_in_libtorch_toml_is_read_back() {
        let libtorch = Path::new("/opt/libtorch");
        assert_eq!(recorded(&toml(libtorch)).as_deref(), Some(libtorch));
        assert_eq!(recorded(""), None);
    }

    #[test]
    fn a_libtorch_of_another_version_is_refused() {
        let dir = std::env::temp_dir().join(format!("xtask-version-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        assert_eq!(version(&dir), None);
        fs::write(dir.join("version.py"), "from typing import Optional\n__version__ = '2.10.0+cpu'\ndebug = False\n")
            .unwrap();
        assert_eq!(version(&dir).as_deref(), Some("2.10.0+cpu"));
        let error = check_version(&dir).unwrap_err().to_string();
        assert!(error.contains("version 2.10.0, but 2.11.0 is needed"), "{error}");
        fs::write(dir.join("build-version"), "2.11.0+cu130\n").unwrap();
        check_version(&dir).unwrap();
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn last_lines_skips_empty_lines() {
        assert_eq!(last_lines(b"a\n\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines(b"", 2), "");
    }
}
