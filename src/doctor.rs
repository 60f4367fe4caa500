//! `dictlearn doctor`: reports this machine's hardware, software and speed, and checks that training steps are correct.

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use tch::{Cuda, Device, Kind, Tensor};

use dictlearn_core::data::Batch;
use dictlearn_core::error::InputError;
use dictlearn_core::files::from_yaml;
use dictlearn_core::hub;
use dictlearn_core::hub::About;
use dictlearn_core::machine::device;
use dictlearn_core::machine::device::Precision;
use dictlearn_core::machine::device::PrecisionChoice;
use dictlearn_core::machine::memory;
use dictlearn_core::machine::memory::Size;
use dictlearn_core::registry::{Component, ComponentKind, components, find};
use dictlearn_core::sae::DictionaryCx;
use dictlearn_core::train::Modifier;
use dictlearn_core::train::SaeConfig;
use dictlearn_core::train::{Training, TrainingCx};

/// The supported version of libtorch.
const LIBTORCH: &str = "2.11";

/// Python packages that read or write the same files, or that produce activations.
const PACKAGES: [&str; 12] = [
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "datasets",
    "huggingface_hub",
    "sae_lens",
    "transformer_lens",
    "dictionary_learning",
    "nnsight",
    "dictlearn",
];

/// Variables that set the number of threads, and how threads wait.
const THREADING: [&str; 6] =
    ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_PROC_BIND"];

/// The doctor's report.
#[derive(Debug, Serialize)]
pub struct Report {
    /// True if no problem is an error.
    pub healthy: bool,
    /// The problems found.
    pub problems: Vec<Problem>,
    dictlearn: Program,
    libtorch: Libtorch,
    device: DeviceReport,
    precision: PrecisionReport,
    products: Vec<Product>,
    threads: Threads,
    memory: Memory,
    hub: Option<About>,
    python: Option<Python>,
    training: Vec<Check>,
    /// The `DICTLEARN_*` variables that are set, which override config keys.
    environment: Vec<String>,
}

/// A problem with the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// `error` if something is broken, `warning` if it could work better.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What to do.
    pub help: String,
}

/// Severity of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Something is broken.
    Error,
    /// Something could work better.
    Warning,
}

#[derive(Debug, Serialize)]
struct Program {
    version: &'static str,
    build: &'static str,
    path: Option<PathBuf>,
    os: String,
}

#[derive(Debug, Serialize)]
struct Libtorch {
    version: Option<String>,
    /// The loaded file.
    path: Option<PathBuf>,
    /// Path when the program was built.
    built_with: Option<&'static str>,
    cuda: bool,
    openmp: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct DeviceReport {
    /// The device that `auto` selects.
    auto: String,
    cpu: String,
    cores: usize,
    gpus: Vec<String>,
    /// The NVIDIA driver's version.
    driver: Option<String>,
}

#[derive(Debug, Serialize)]
struct PrecisionReport {
    /// The dtype that `auto` selects.
    auto: String,
    why: &'static str,
}

#[derive(Debug, Serialize)]
struct Product {
    device: String,
    #[serde(rename = "type")]
    kind: &'static str,
    /// Number of rows and columns of the matrices.
    size: i64,
    milliseconds: f64,
    /// 10⁹ multiplications and additions per second.
    gflops: f64,
}

#[derive(Debug, Serialize)]
struct Threads {
    libtorch: i32,
    wait_policy: &'static str,
    variables: Vec<(String, String)>,
}

#[derive(Debug, Serialize)]
struct Memory {
    /// Bytes.
    total: u64,
    free: u64,
    free_on_gpu: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Python {
    path: PathBuf,
    /// `None` if it does not run.
    version: Option<String>,
    packages: serde_json::Map<String, Value>,
}

/// Some steps of a trainer, compared with autograd's on the CPU.
#[derive(Debug, Serialize)]
struct Check {
    device: String,
    trainer: &'static str,
    /// Largest relative difference of the loss.
    difference: f64,
}

/// Examines the machine.
pub fn examine() -> Report {
    let mut problems = Vec::new();
    let best = device::best();
    let (precision, why) = PrecisionChoice::Auto.precision(best);
    let libtorch = libtorch(&mut problems);
    let device = devices(best, &libtorch, &mut problems);
    let threads = threads(device.cores, &mut problems);
    let products = products(best, precision, &mut problems);
    let training = training(best, &mut problems);
    let memory = memory_of(best, &mut problems);
    let hub = hub_of(&mut problems);
    temporary_files(&mut problems);
    let healthy = problems.iter().all(|problem| problem.level != Level::Error);
    Report {
        healthy,
        problems,
        dictlearn: Program {
            version: env!("CARGO_PKG_VERSION"),
            build: if cfg!(debug_assertions) { "debug" } else { "release" },
            path: env::current_exe().ok(),
            os: os(),
        },
        libtorch,
        device,
        precision: PrecisionReport { auto: precision.to_string(), why },
        products,
        threads,
        memory,
        hub,
        python: python(),
        training,
        environment: crate::config::variables().into_iter().map(|(name, _)| name).collect(),
    }
}

fn problem(level: Level, what: impl Into<String>, help: impl Into<String>) -> Problem {
    Problem { level, what: what.into(), help: help.into() }
}

fn os() -> String {
    let name = sysinfo::System::long_os_version().unwrap_or_else(|| env::consts::OS.to_owned());
    format!("{name} ({})", env::consts::ARCH)
}

/// Returns the loaded library file that contains a function.
fn file_of(symbol: &std::ffi::CStr) -> Option<PathBuf> {
    // SAFETY: looks up a name and the file of its address; the returned name lives as long as the library.
    unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr());
        let mut info: libc::Dl_info = std::mem::zeroed();
        if found.is_null() || libc::dladdr(found, &mut info) == 0 || info.dli_fname.is_null() {
            return None;
        }
        let name = std::ffi::CStr::from_ptr(info.dli_fname).to_string_lossy().into_owned();
        Some(std::fs::canonicalize(&name).unwrap_or_else(|_| PathBuf::from(name)))
    }
}

/// Returns a libtorch's version, from the archive's `build-version` or a Python package's `version.py`.
fn libtorch_version(library: &Path) -> Option<String> {
    let root = library.parent()?.parent()?;
    let whole = |file: &str| Some(std::fs::read_to_string(root.join(file)).ok()?.trim().to_owned());
    let python = || {
        let text = whole("version.py")?;
        let line = text.lines().find(|line| line.starts_with("__version__"))?;
        Some(line.split(['\'', '"']).nth(1)?.to_owned())
    };
    whole("build-version").or_else(python)
}

fn libtorch(problems: &mut Vec<Problem>) -> Libtorch {
    // at::get_num_threads()
    let path = file_of(c"_ZN2at15get_num_threadsEv");
    let version = path.as_deref().and_then(libtorch_version);
    let built_with = option_env!("LIBTORCH");
    if let Some(version) = version.as_deref().filter(|version| !is_version(version, LIBTORCH)) {
        let place = path.as_deref().unwrap_or(Path::new("?")).display();
        problems.push(problem(
            Level::Error,
            format!("libtorch {version} is loaded from {place}, but the program needs {LIBTORCH}"),
            "unset LD_LIBRARY_PATH, or set LIBTORCH to a libtorch of that version and rebuild (`cargo xtask setup`)",
        ));
    } else if let Some((path, built)) = path.as_deref().zip(built_with) {
        let built_lib = std::fs::canonicalize(Path::new(built).join("lib"));
        if built_lib.is_ok_and(|lib| path.parent() != Some(&lib)) {
            problems.push(problem(
                Level::Warning,
                format!("libtorch is loaded from {}, but the program was built with {built}", path.display()),
                "unset LD_LIBRARY_PATH, unless it is intended",
            ));
        }
    }
    Libtorch { version, path, built_with, cuda: tch::utils::has_cuda(), openmp: file_of(c"omp_get_max_threads") }
}

/// True if a version belongs to a series: 2.11.0+cpu to 2.11.
fn is_version(version: &str, series: &str) -> bool {
    version.strip_prefix(series).is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn devices(best: Device, libtorch: &Libtorch, problems: &mut Vec<Problem>) -> DeviceReport {
    let cards = glob::glob("/proc/driver/nvidia/gpus/*/information").into_iter().flatten().flatten();
    let gpus: Vec<String> = cards
        .filter_map(|file| {
            let text = std::fs::read_to_string(file).ok()?;
            Some(text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_owned())
        })
        .collect();
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok().and_then(|text| {
        let version = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.');
        text.split_whitespace().find(version).map(str::to_owned)
    });
    if best == Device::Cpu && (!gpus.is_empty() || driver.is_some()) {
        let (what, help) = match libtorch.cuda {
            true => (
                "there is an NVIDIA GPU, but libtorch does not find it",
                "check the driver with `nvidia-smi`, and that CUDA_VISIBLE_DEVICES does not hide it",
            ),
            false => {
                ("there is an NVIDIA GPU, but this libtorch has no CUDA", "run `cargo xtask setup --cuda` and rebuild")
            }
        };
        problems.push(problem(Level::Warning, what, help));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    DeviceReport { auto: device::name(best), cpu: device::processor(), cores, gpus, driver }
}

fn threads(cores: usize, problems: &mut Vec<Problem>) -> Threads {
    let variables = THREADING.iter().filter_map(|name| Some(((*name).to_owned(), env::var(name).ok()?))).collect();
    let threads = tch::get_num_threads();
    if threads as usize > cores {
        problems.push(problem(
            Level::Warning,
            format!("libtorch uses {threads} threads on {cores} cores"),
            format!("set OMP_NUM_THREADS={cores} or unset it"),
        ));
    }
    let wait_policy = wait_policy(&|name| env::var(name).ok());
    if wait_policy == "active" {
        problems.push(problem(
            Level::Warning,
            "OpenMP threads spin while they wait (OMP_WAIT_POLICY=active), which is slow if other processes run",
            "unset OMP_WAIT_POLICY, or set it to passive",
        ));
    }
    Threads { libtorch: threads, wait_policy, variables }
}

/// Returns what OpenMP threads do between loops, according to the variables that libgomp reads.
fn wait_policy(variable: &dyn Fn(&str) -> Option<String>) -> &'static str {
    if variable("GOMP_SPINCOUNT").is_some() {
        return "set by GOMP_SPINCOUNT";
    }
    match variable("OMP_WAIT_POLICY").as_deref().map(str::trim).map(str::to_lowercase).as_deref() {
        Some("active") => "active",
        Some("passive") => "passive",
        _ => "libgomp's default: spin for some milliseconds, then sleep",
    }
}

/// Times matrix products in each dtype on the CPU and on the device that `auto` selects.
fn products(best: Device, auto: Precision, problems: &mut Vec<Problem>) -> Vec<Product> {
    let devices = [Device::Cpu, best];
    let mut found: Vec<Product> = Vec::new();
    for device in &devices[..if best == Device::Cpu { 1 } else { 2 }] {
        for precision in [Precision::Float32, Precision::BFloat16] {
            match caught(|| product(*device, precision)) {
                Ok(product) => found.push(product),
                Err(error) => problems.push(problem(
                    Level::Error,
                    format!("{} cannot multiply {precision} matrices: {error:#}", device::name(*device)),
                    "check the driver and its version; until it works, set `device: cpu` or `precision: float32`",
                )),
            }
        }
    }
    let speed = |precision: Precision| {
        let own = |product: &&Product| product.device == device::name(best) && product.kind == name(precision);
        found.iter().find(own).map(|product| product.gflops)
    };
    if let Some((float32, bfloat16)) = speed(Precision::Float32).zip(speed(Precision::BFloat16)) {
        let (chosen, other) = match auto {
            Precision::Float32 => (float32, (Precision::BFloat16, bfloat16)),
            Precision::BFloat16 => (bfloat16, (Precision::Float32, float32)),
        };
        if other.1 > 1.5 * chosen {
            problems.push(problem(
                Level::Warning,
                format!("`precision: auto` is {auto} here, but {} was {:.1} times as fast", other.0, other.1 / chosen),
                format!("if this holds on an idle machine, set `precision: {}` and report it", other.0),
            ));
        }
    }
    found
}

fn name(precision: Precision) -> &'static str {
    match precision {
        Precision::Float32 => "float32",
        Precision::BFloat16 => "bfloat16",
    }
}

fn product(device: Device, precision: Precision) -> Result<Product> {
    let size = if device.is_cuda() { 4096 } else { 1024 };
    let matrix = || Tensor::ones([size, size], (Kind::Float, device)).to_kind(precision.kind());
    let (a, b) = (matrix(), matrix());
    let take = || {
        let started = Instant::now();
        let product = a.matmul(&b);
        if let Device::Cuda(index) = device {
            Cuda::synchronize(index as i64);
        }
        (started.elapsed(), product)
    };
    let (mut fastest, product) = take();
    let one = product.to_kind(Kind::Float).double_value(&[size / 2, size / 3]);
    ensure!(one == size as f64, "a product of ones is {one}, not {size}");
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(200) {
        fastest = fastest.min(take().0);
    }
    let seconds = fastest.as_secs_f64().max(1e-9);
    Ok(Product {
        device: device::name(device),
        kind: name(precision),
        size,
        milliseconds: 1e3 * seconds,
        gflops: 2.0 * (size as f64).powi(3) / seconds / 1e9,
    })
}

/// Runs `work`, and returns libtorch's panics as errors.
fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    std::panic::set_hook(hook);
    done.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let first = text.and_then(|text| text.lines().next()).unwrap_or("unknown");
        Err(anyhow::anyhow!("{first}"))
    })
}

/// A modifier that does nothing: an SAE with modifiers trains by autograd.
struct Nothing;

impl Modifier for Nothing {}

/// Number of steps compared.
const STEPS: u64 = 3;
/// Maximum relative difference of a loss.
const TOLERANCE: f64 = 1e-3;
/// Width of the activations.
const WIDTH: i64 = 32;

/// Takes some steps of each trainer on the CPU and on the device, and compares their losses with those of autograd on
/// the CPU.
fn training(best: Device, problems: &mut Vec<Problem>) -> Vec<Check> {
    let batches = batches();
    let devices = [Device::Cpu, best];
    let mut checks = Vec::new();
    for trainer in components(ComponentKind::Trainer) {
        let Some(sae) = sae(trainer) else { continue };
        let reference = caught(|| losses(&sae, Device::Cpu, &batches, true));
        for device in &devices[..if best == Device::Cpu { 1 } else { 2 }] {
            let compared = caught(|| {
                let own = losses(&sae, *device, &batches, false)?;
                let expected = reference.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
                let apart = |(own, expected): (&f64, &f64)| (own - expected).abs() / expected.abs().max(1e-6);
                Ok(own.iter().zip(expected).map(apart).fold(0.0, f64::max))
            });
            let what = match compared {
                Ok(difference) => {
                    checks.push(Check { device: device::name(*device), trainer: trainer.name, difference });
                    if difference <= TOLERANCE {
                        continue;
                    }
                    format!("its loss is off by {difference:.1e}")
                }
                Err(error) => format!("it fails: {error:#}"),
            };
            problems.push(problem(
                Level::Error,
                format!("a training step of `{}` on {} is wrong: {what}", trainer.name, device::name(*device)),
                match device {
                    Device::Cpu => "please report it with this output",
                    _ => "train with `device: cpu`, check the GPU and its driver, and report it with this output",
                },
            ));
        }
    }
    checks
}

/// Returns the config of a trainer on its default dictionary, if they take activations of one site.
fn sae(trainer: &Component) -> Option<SaeConfig> {
    let dictionary = find(ComponentKind::Dictionary, trainer.default_dictionary?)?;
    let (name, trainer, dictionary) = (trainer.name, trainer.example, dictionary.example);
    let sae = format!("{{name: {name}, trainer: {trainer}, dictionary: {dictionary}}}");
    let sae: SaeConfig = from_yaml(&sae).ok()?;
    let device = Device::Cpu;
    let cx =
        DictionaryCx { activation_dim: WIDTH, output_dim: WIDTH, parts: &[], device, precision: Precision::Float32 };
    sae.dictionary.build(&cx).ok().map(|_| sae)
}

fn batches() -> Vec<Batch> {
    // A few directions each, from a formula that needs no random numbers.
    let rows = 64 * STEPS as i64;
    let options = (Kind::Float, Device::Cpu);
    let at = |n: i64, scale: f64| Tensor::arange(n, options) * scale;
    let codes = (at(rows, 0.731).unsqueeze(1) * (at(48, 1.17) + 1.0).unsqueeze(0)).sin();
    let codes = (codes - 0.8).relu() * 5.0;
    let directions = (at(48, 2.399).unsqueeze(1) * (at(WIDTH, 0.917) + 1.0).unsqueeze(0)).cos();
    (codes.matmul(&directions) + 0.1).split(64, 0).into_iter().map(Batch::of).collect()
}

/// Returns the losses of the first steps.
fn losses(sae: &SaeConfig, device: Device, batches: &[Batch], autograd: bool) -> Result<Vec<f64>> {
    let cx = TrainingCx {
        widths: (WIDTH, WIDTH),
        parts: Vec::new(),
        steps: 100_000,
        seed: 1,
        // Weights are drawn on the CPU and moved: a GPU would draw others.
        device: Device::Cpu,
        precision: Precision::Float32,
    };
    let on_cpu = Training::new(sae, &cx)?;
    let mut training = Training::new(sae, &TrainingCx { device, ..cx })?;
    for ((_, mut own), (_, from)) in training.dictionary.state_dict().into_iter().zip(on_cpu.dictionary.state_dict()) {
        tch::no_grad(|| own.copy_(&from));
    }
    if autograd {
        training.modify(Box::new(Nothing));
    }
    let mut losses = Vec::new();
    for (step, batch) in batches.iter().enumerate() {
        let batch = Batch::of(batch.x.to_device(device));
        let row = training.step(step as u64, &batch, true)?.context("nothing is logged")?;
        losses.push(row.get("loss").and_then(Value::as_f64).context("there is no finite loss")?);
    }
    training.settle()?;
    Ok(losses)
}

fn memory_of(best: Device, problems: &mut Vec<Problem>) -> Memory {
    let memory = Memory { total: memory::total(), free: memory::free(), free_on_gpu: memory::free_on_gpu(best) };
    if memory.free < 1_000_000_000 {
        problems.push(problem(
            Level::Warning,
            format!("only {} of memory is free", Size(memory.free)),
            "close other programs; `dictlearn train --dry-run` shows what a run needs",
        ));
    }
    memory
}

fn hub_of(problems: &mut Vec<Problem>) -> Option<About> {
    let about = match hub::hub() {
        Ok(hub) => About { endpoint: without_login(&hub.about().endpoint), ..hub.about() },
        Err(error) => {
            let input = InputError::take(error);
            let (what, help) = match &input {
                Ok(input) => (input.message().to_owned(), input.help_text().unwrap_or_default().to_owned()),
                Err(error) => (format!("{error:#}"), "set HF_HOME to a writable folder".to_owned()),
            };
            problems.push(problem(Level::Error, format!("the Hugging Face Hub cannot be used: {what}"), help));
            return None;
        }
    };
    if let (Err(why), false) = (writable(&about.cache), about.offline) {
        problems.push(problem(
            Level::Error,
            format!("the Hub's cache, {}, is not writable: {why}", about.cache.display()),
            "set HF_HOME or HF_HUB_CACHE to a writable folder, or HF_HUB_OFFLINE=1 to only read the cache",
        ));
    }
    Some(about)
}

/// Returns an address without user name and password.
fn without_login(address: &str) -> String {
    let Some((scheme, rest)) = address.split_once("://") else { return address.to_owned() };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    format!("{scheme}://{}{path}", host.rsplit('@').next().unwrap_or(host))
}

/// Checks that files can be created in a folder, or in the nearest existing one above it.
fn writable(dir: &Path) -> std::io::Result<()> {
    let there = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    if !there.is_dir() {
        return Err(std::io::Error::other(format!("{} is a file", there.display())));
    }
    tempfile::tempfile_in(there).map(|_| ())
}

fn temporary_files(problems: &mut Vec<Problem>) {
    let dir = env::temp_dir();
    if let Err(why) = writable(&dir).and_then(|()| std::fs::metadata(&dir).map(|_| ())) {
        problems.push(problem(
            Level::Error,
            format!("no temporary file can be created in {}: {why}", dir.display()),
            "set TMPDIR to a writable folder",
        ));
    }
}

/// Returns the first Python on the PATH, with the versions of relevant packages, which are not imported.
fn python() -> Option<Python> {
    let paths = env::var_os("PATH")?;
    let found = |name: &str| env::split_paths(&paths).map(|dir| dir.join(name)).find(|file| file.is_file());
    let path = found("python3").or_else(|| found("python"))?;
    let code = format!(
        "import json, sys, importlib.metadata as m\nfound = {{}}\nfor name in {PACKAGES:?}:\n    try: found[name] = \
         m.version(name)\n    except Exception: pass\nprint(json.dumps([sys.version.split()[0], found]))"
    );
    let (version, packages) = match asked(&path, &code) {
        Some((version, packages)) => (Some(version), packages),
        None => (None, serde_json::Map::new()),
    };
    Some(Python { path, version, packages })
}

/// Returns the JSON that a Python program prints; `None` if it does not run, or takes too long.
fn asked<T: serde::de::DeserializeOwned>(python: &Path, code: &str) -> Option<T> {
    let mut child = Command::new(python)
        .args(["-c", code])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let started = Instant::now();
    while child.try_wait().ok()?.is_none() {
        if started.elapsed() > Duration::from_secs(20) {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    serde_json::from_slice(&child.wait_with_output().ok()?.stdout).ok()
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = |path: &Option<PathBuf>| path.as_ref().map_or("?".to_owned(), |path| path.display().to_string());
        let mut line = |name: &str, value: String| writeln!(f, "{name:12} {value}");
        let Program { version, build, path: program, os } = &self.dictlearn;
        line("dictlearn", format!("{version} ({build} build), {}", path(program)))?;
        line("system", os.clone())?;
        let Libtorch { version, path: library, cuda, openmp, .. } = &self.libtorch;
        let version = version.as_deref().unwrap_or("unknown version");
        line("libtorch", format!("{version}, {}", path(library)))?;
        line("", format!("{} CUDA; OpenMP: {}", if *cuda { "with" } else { "without" }, path(openmp)))?;
        line("device", format!("auto: {}", self.device.auto))?;
        line("", format!("{}, {} cores", self.device.cpu, self.device.cores))?;
        for gpu in &self.device.gpus {
            let driver = self.device.driver.as_deref().unwrap_or("?");
            line("", format!("{gpu}, driver {driver}"))?;
        }
        line("precision", self.precision.why.replacen("auto:", &format!("auto: {},", self.precision.auto), 1))?;
        for (index, Product { device, kind, size, milliseconds, gflops }) in self.products.iter().enumerate() {
            let name = if index == 0 { "products" } else { "" };
            let value = format!("{kind} on {device}: {gflops:.0} GFLOP/s ({size} x {size} in {milliseconds:.2} ms)");
            line(name, value)?;
        }
        let Threads { libtorch, wait_policy, variables } = &self.threads;
        line("threads", format!("{libtorch}; wait policy: {wait_policy}"))?;
        for (name, value) in variables {
            line("", format!("{name}={value}"))?;
        }
        let mut memory = format!("{} free of {}", Size(self.memory.free), Size(self.memory.total));
        if let Some(gpu) = self.memory.free_on_gpu {
            let _ = write!(memory, "; {} free on the GPU", Size(gpu));
        }
        line("memory", memory)?;
        if let Some(About { cache, endpoint, offline, token }) = &self.hub {
            line("Hub", format!("{endpoint}{}", if *offline { " (offline)" } else { "" }))?;
            line("", format!("cache {}", cache.display()))?;
            line("", if *token { "token found" } else { "no token" }.to_owned())?;
        }
        match &self.python {
            None => line("Python", "none on the PATH".to_owned())?,
            Some(Python { path, version: None, .. }) => line("Python", format!("{} does not run", path.display()))?,
            Some(Python { path, version: Some(version), packages }) => {
                line("Python", format!("{version}, {}", path.display()))?;
                let packages =
                    packages.iter().map(|(name, version)| format!("{name} {}", version.as_str().unwrap_or_default()));
                let packages = packages.collect::<Vec<_>>().join(", ");
                line("", if packages.is_empty() { "no relevant packages".to_owned() } else { packages })?;
            }
        }
        let mut devices: Vec<&str> = self.training.iter().map(|check| check.device.as_str()).collect();
        devices.dedup();
        devices.sort_unstable();
        devices.dedup();
        for device in devices {
            let own = || self.training.iter().filter(|check| check.device == device);
            let most = own().map(|check| check.difference).fold(0.0, f64::max);
            line(
                "training",
                format!("{STEPS} steps of {} trainers on {device}: losses differ by {most:.0e} at most", own().count()),
            )?;
        }
        if !self.environment.is_empty() {
            line("environment", self.environment.join(", "))?;
        }
        for Problem { level, what, help } in &self.problems {
            let level = if *level == Level::Error { "error" } else { "warning" };
            write!(f, "\n{level}: {what}\nhelp: {help}\n")?;
        }
        if self.problems.is_empty() {
            write!(f, "\nno problems found\n")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_match_only_their_own_versions() {
        assert!(is_version("2.11.0+cpu", "2.11") && is_version("2.11", "2.11"));
        assert!(!is_version("2.110.0", "2.11") && !is_version("2.1.1", "2.11") && !is_version("1.2.11", "2.11"));
    }

    #[test]
    fn libtorch_version_is_read_from_archives_and_packages() {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("lib/libtorch_cpu.so");
        assert_eq!(libtorch_version(&library), None);
        std::fs::write(dir.path().join("version.py"), "debug = False\n__version__ = '2.11.0+cu128'\n").unwrap();
        assert_eq!(libtorch_version(&library).as_deref(), Some("2.11.0+cu128"));
        std::fs::write(dir.path().join("build-version"), "2.11.0+cpu\n").unwrap();
        assert_eq!(libtorch_version(&library).as_deref(), Some("2.11.0+cpu"));
    }

    #[test]
    fn wait_policy_follows_libgomp() {
        let with = |known: &'static [(&str, &str)]| {
            wait_policy(&|name| known.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned()))
        };
        assert_eq!(with(&[("OMP_WAIT_POLICY", "ACTIVE")]), "active");
        assert_eq!(with(&[("OMP_WAIT_POLICY", "passive")]), "passive");
        assert_eq!(with(&[("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "1000")]), "set by GOMP_SPINCOUNT");
        assert!(with(&[]).contains("default"));
    }

    #[test]
    fn folder_below_a_file_is_not_writable() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(writable(&dir.path().join("file/hub")).is_err());
        assert!(writable(&dir.path().join("new/hub")).is_ok());
        assert!(!dir.path().join("new").exists());
    }

    #[test]
    fn python_that_does_not_run_has_no_version() {
        assert_eq!(asked::<Value>(Path::new("/bin/false"), "print(1)"), None);
        assert_eq!(asked::<Value>(Path::new("/nowhere/python3"), "print(1)"), None);
    }

    #[test]
    fn credentials_are_removed_from_addresses() {
        assert_eq!(without_login("https://me:secret@mirror.org/hf@x"), "https://mirror.org/hf@x");
        assert_eq!(without_login("https://huggingface.co"), "https://huggingface.co");
    }

    #[test]
    fn panics_become_errors() {
        let error = caught(|| -> Result<()> { panic!("CUDA error\nand a stack") }).unwrap_err();
        assert_eq!(error.to_string(), "CUDA error");
    }
}
