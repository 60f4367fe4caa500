//! Compares a training step with Python's: `cargo bench --bench compare -- --python PYTHON`.
//!
//! PYTHON needs the reference (`pip install dictionary-learning`); the Python of `--sae-lens` needs sae_lens. For each
//! size and trainer, the sides take turns for several rounds, each turn in a new process. The output is the median step
//! time, the ratios, and the memory of a step. That memory excludes weights, gradients and moments; its unit is one
//! float32 tensor of a batch's features. All sides draw activations from the same seed.
//!
//! `--grow` varies the dictionary, the batch and k. `--share` trains several SAEs on one stream.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use dictlearn_core::data::Batch;
use dictlearn_core::files::from_yaml;
use dictlearn_core::machine::device;
use dictlearn_core::machine::device::{Precision, bfloat16_is_faster};
use dictlearn_core::train::{Training, TrainingCx};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use common::silence;

// Links the plugins.
use dictlearn as _;
use dictlearn_process as _;

const TRAINERS: [&str; 8] =
    ["standard", "p_anneal", "gated", "gated_anneal", "jump_relu", "top_k", "batch_top_k", "matryoshka_batch_top_k"];

#[derive(Debug, Parser)]
struct Args {
    /// Python with the reference installed; default `DICTLEARN_BENCH_PYTHON`.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Python with sae_lens installed; default `DICTLEARN_BENCH_PYTHON_SAE_LENS`.
    #[arg(long)]
    sae_lens: Option<PathBuf>,
    /// Widths of activations and dictionaries, `DxF`.
    #[arg(long, value_delimiter = ',', default_value = "512x8192")]
    sizes: Vec<String>,
    /// Activations per batch.
    #[arg(long, default_value_t = 2048)]
    batch: i64,
    /// Active features, in the TopK family.
    #[arg(long, default_value_t = 64)]
    k: i64,
    /// Trainers to measure; default: all that the reference has.
    #[arg(long, value_delimiter = ',')]
    trainers: Vec<String>,
    /// Number of turns of each side.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Timed steps of a turn, after two warm-up steps.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// `cpu` or `cuda`. On a GPU, which runs asynchronously, a turn is timed as a whole.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Also measure bfloat16 products on all sides.
    #[arg(long)]
    bfloat16: bool,
    /// Also vary the sizes of the dictionary and the batch, and k.
    #[arg(long)]
    grow: bool,
    /// Also train 1, 2, 4 and 8 SAEs on one stream.
    #[arg(long)]
    share: bool,
    /// Also measure with one feature in a hundred firing, as later in training.
    #[arg(long)]
    trained: bool,
    /// Run one turn of our side: trainer, and case as JSON.
    #[arg(long, hide = true, num_args = 2)]
    turn: Option<Vec<String>>,
    /// Passed by `cargo bench`; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Settings of one measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Case {
    d: i64,
    f: i64,
    batch: i64,
    k: i64,
    steps: usize,
    saes: usize,
    autocast: bool,
    few: bool,
    device: String,
}

/// Time and memory of one turn.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Took {
    ms: Vec<f64>,
    peak_mb: f64,
    before_mb: f64,
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    args.python = args.python.or_else(|| variable("DICTLEARN_BENCH_PYTHON"));
    args.sae_lens = args.sae_lens.or_else(|| variable("DICTLEARN_BENCH_PYTHON_SAE_LENS"));
    if let Some(turn) = &args.turn {
        println!("{}", serde_json::to_string(&our_turn(&turn[0], &serde_json::from_str(&turn[1])?)?)?);
        return Ok(());
    }
    let trainers: Vec<&str> =
        if args.trainers.is_empty() { TRAINERS.to_vec() } else { args.trainers.iter().map(String::as_str).collect() };
    println!("{}; `precision: auto` is {}\n", machine(), kind(bfloat16_is_faster()));
    let case = Case {
        d: 0,
        f: 0,
        batch: args.batch,
        k: args.k,
        steps: args.steps,
        saes: 1,
        autocast: false,
        few: false,
        device: args.device.clone(),
    };
    for size in &args.sizes {
        let (d, f) = size.split_once('x').with_context(|| format!("`{size}` is not a size such as 512x8192"))?;
        let case = Case { d: d.parse()?, f: f.parse()?, ..case.clone() };
        let mut found = BTreeMap::new();
        for autocast in [false, true] {
            if autocast && !args.bfloat16 {
                continue;
            }
            let case = Case { autocast, ..case.clone() };
            println!("Activations of {d}, {f} features, batch {}, k {}, {}:\n", case.batch, case.k, kind(autocast));
            heading("trainer");
            for trainer in &trainers {
                found.insert((false, *trainer, autocast), row(&args, trainer, trainer, &case)?);
            }
            println!();
            if args.trained {
                println!("The same with biases lowered until one feature in a hundred fires:\n");
                heading("trainer");
                for trainer in trainers.iter().filter(|trainer| !trainer.contains("top_k")) {
                    let ms = row(&args, trainer, trainer, &Case { few: true, ..case.clone() })?;
                    found.insert((true, *trainer, autocast), ms);
                }
                println!();
            }
        }
        if args.bfloat16 {
            ratios(&found);
        }
        if args.grow {
            for trainer in &trainers {
                println!("{trainer}, varying one setting at a time, float32:\n");
                heading("");
                for f in [case.f / 2, case.f, case.f * 2] {
                    row(&args, &format!("{f} features"), trainer, &Case { f, ..case.clone() })?;
                }
                for batch in [case.batch / 2, case.batch * 2] {
                    row(&args, &format!("batch {batch}"), trainer, &Case { batch, ..case.clone() })?;
                }
                for k in [case.k / 2, case.k * 2, case.k * 4] {
                    row(&args, &format!("k {k}"), trainer, &Case { k, ..case.clone() })?;
                }
                println!();
            }
        }
        if args.share {
            for trainer in &trainers {
                println!("{trainer}, several SAEs on one stream, float32:\n");
                heading("");
                for saes in [1, 2, 4, 8] {
                    row(&args, &format!("{saes} SAEs"), trainer, &Case { saes, ..case.clone() })?;
                }
                println!();
            }
        }
    }
    Ok(())
}

fn kind(autocast: bool) -> &'static str {
    if autocast { "bfloat16" } else { "float32" }
}

fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    format!("{}, {} threads", model.unwrap_or("unknown processor"), tch::get_num_threads())
}

fn heading(what: &str) {
    println!(
        "| {what} | dictlearn, ms | dictionary_learning, ms | sae_lens, ms | speed-up over these | step memory / (batch x F x 4 bytes) | theirs |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
}

/// Prints our speed-ups: bfloat16 over the reference's float32, float32 over its float32, bfloat16 over its bfloat16,
/// and bfloat16 over sae_lens's bfloat16.
fn ratios(found: &BTreeMap<(bool, &str, bool), [f64; 3]>) {
    println!("Speed-ups, with few features firing or as initialised:\n");
    println!("| trainer | features | bfloat16 over their float32 | float32 | bfloat16 | over sae_lens in bfloat16 |");
    println!("| --- | --- | ---: | ---: | ---: | ---: |");
    for ((few, trainer, _), half) in found.iter().filter(|((_, _, autocast), _)| *autocast) {
        let float = &found[&(*few, *trainer, false)];
        let [auto, same, both, sae_lens] =
            [float[1] / half[0], float[1] / float[0], half[1] / half[0], half[2] / half[0]]
                .map(|ratio| shown(ratio, 1));
        let features = if *few { "few" } else { "all" };
        println!("| {trainer} | {features} | {auto} | {same} | {both} | {sae_lens} |");
    }
    println!();
}

/// Formats a number with this many decimals; empty for NaN, which stands for no measurement.
fn shown(value: f64, digits: usize) -> String {
    if value.is_nan() { String::new() } else { format!("{value:.digits$}") }
}

/// Runs all rounds, prints a row of the table and returns each side's median in milliseconds.
fn row(args: &Args, what: &str, trainer: &str, case: &Case) -> Result<[f64; 3]> {
    let json = serde_json::to_string(case)?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/compare.py");
    let mut took = [Took::default(), Took::default(), Took::default()];
    for _ in 0..args.rounds {
        let mut own = Command::new(std::env::current_exe()?);
        own.args(["--turn", trainer, &json]);
        add(&mut took[0], turn(&mut own)?);
        for (index, python, library) in [(1, &args.python, "dictionary_learning"), (2, &args.sae_lens, "sae_lens")] {
            let Some(python) = python else { continue };
            let known = ["standard", "gated", "jump_relu", "top_k", "batch_top_k"].contains(&trainer);
            if index == 2 && (case.few || !known) {
                continue;
            }
            let mut other = Command::new(python);
            other.args(["-W", "ignore", script, library, trainer, &json]);
            add(&mut took[index], turn(&mut other)?);
        }
    }
    let ms = took.each_mut().map(|took| median(&mut took.ms));
    let ratios: Vec<String> = ms[1..].iter().map(|other| shown(other / ms[0], 1)).filter(|s| !s.is_empty()).collect();
    // Weights, gradients and two moments last.
    let kept = case.saes as f64 * 4.0 * (2 * case.d * case.f) as f64 * 4.0 / 1e6;
    let one = (case.batch * case.f * 4) as f64 / 1e6;
    let digits = if ms[0] < 10.0 { 2 } else { 0 };
    // The peak of a GPU is unknown to its process, and lowering the biases needs more memory than a step.
    let beyond = |took: &Took| {
        shown(
            if took.ms.is_empty() || case.device != "cpu" || case.few {
                f64::NAN
            } else {
                (took.peak_mb - took.before_mb - kept) / one
            },
            2,
        )
    };
    println!(
        "| {what} | {} | {} | {} | {} | {} | {} |",
        shown(ms[0], digits),
        shown(ms[1], digits),
        shown(ms[2], digits),
        ratios.join(" / "),
        beyond(&took[0]),
        beyond(&took[1]),
    );
    Ok(ms)
}

fn add(sum: &mut Took, took: Took) {
    sum.ms.extend(took.ms);
    // Keep the minimum: anything above it is not due to the step.
    let less = |a: f64, b: f64| if a == 0.0 { b } else { a.min(b) };
    let beyond = less(sum.peak_mb - sum.before_mb, took.peak_mb - took.before_mb);
    (sum.peak_mb, sum.before_mb) = (beyond, 0.0);
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn turn(command: &mut Command) -> Result<Took> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().context("the turn printed nothing")?;
    serde_json::from_str(last).with_context(|| format!("{command:?} printed {last}"))
}

fn megabytes(field: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).context("/proc/self/status lacks the field")?;
    Ok(line.split_whitespace().nth(1).context("/proc/self/status lacks the value")?.parse::<f64>()? / 1e3)
}

/// Returns the dictionary and the trainer as YAML.
fn sae(trainer: &str, case: &Case) -> Result<String> {
    let Case { f, k, .. } = case;
    let penalty = "warmup_steps: 10, sparsity_warmup_steps: 20";
    let (dictionary, dictionary_fields, fields) = match trainer {
        "standard" => ("auto_encoder", String::new(), penalty.to_owned()),
        "p_anneal" => ("auto_encoder", String::new(), format!("{penalty}, anneal_start: 900")),
        "standard_april_update" => ("auto_encoder_new", String::new(), penalty.to_owned()),
        "gated" => ("gated", String::new(), penalty.to_owned()),
        "gated_anneal" => ("gated", String::new(), format!("{penalty}, anneal_start: 900")),
        "jump_relu" => ("jump_relu", String::new(), penalty.to_owned()),
        "top_k" | "batch_top_k" => (trainer, format!(", k: {k}"), "warmup_steps: 10".to_owned()),
        "matryoshka_batch_top_k" => (
            trainer,
            format!(", k: {k}, group_fractions: [0.03125, 0.0625, 0.125, 0.25, 0.53125]"),
            "warmup_steps: 10".to_owned(),
        ),
        other => bail!("cannot measure the trainer `{other}`"),
    };
    Ok(format!(
        "{{name: a, dictionary: {{type: {dictionary}, dict_size: {f}{dictionary_fields}}}, \
         trainer: {{type: {trainer}, {fields}}}}}"
    ))
}

fn our_turn(trainer: &str, case: &Case) -> Result<Took> {
    let device = if case.device == "cuda" { device::best() } else { Device::Cpu };
    ensure!(case.device == "cpu" || device != Device::Cpu, "there is no GPU");
    let precision = if case.autocast { Precision::BFloat16 } else { Precision::Float32 };
    let build = |f: i64, seed: u64| {
        let cx = TrainingCx { widths: (case.d, case.d), parts: Vec::new(), steps: 1000, seed, device, precision };
        Training::new(&from_yaml(&sae(trainer, &Case { f, ..case.clone() })?)?, &cx)
    };
    tch::manual_seed(0);
    let batches: Vec<Batch> =
        (0..4).map(|_| Batch::of(Tensor::randn([case.batch, case.d], (Kind::Float, device)))).collect();
    // Exclude the set-up of a first step.
    build(case.f.min(256.max(case.k)), 0)?.step(1, &Batch::of(batches[0].x.narrow(0, 0, 8)), false)?;
    let before_mb = megabytes("VmRSS")?;
    let mut trainings = (0..case.saes as u64).map(|seed| build(case.f, seed)).collect::<Result<Vec<_>>>()?;
    if case.few {
        let silent = trainings.iter().all(|training| silence(training, &batches[0]));
        ensure!(silent, "k decides how many features of `{trainer}` fire");
    }
    let mut ms = Vec::new();
    let settle = || {
        if let Device::Cuda(index) = device {
            tch::Cuda::synchronize(index as i64)
        }
    };
    let mut turn = Instant::now();
    for step in 0..case.steps + 2 {
        if step == 2 {
            settle();
            turn = Instant::now();
        }
        let started = Instant::now();
        for training in &mut trainings {
            training.step(step as u64 + 1, &batches[step % 4], false)?;
        }
        if step >= 2 {
            ms.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    trainings.iter().try_for_each(Training::settle)?;
    if device != Device::Cpu {
        ms = vec![turn.elapsed().as_secs_f64() * 1e3 / case.steps as f64];
    }
    Ok(Took { ms, peak_mb: megabytes("VmHWM")?, before_mb })
}
