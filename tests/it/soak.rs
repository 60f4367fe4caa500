//! Soak test: one run is killed, stopped, has its disk filled and its text truncated, again and again. Another run is
//! left undisturbed. Both must end on the same weights. Ignored by default:
//!
//!     DICTLEARN_SOAK_MINUTES=60 cargo test --release --test it soak -- --ignored --nocapture
//!
//! The disk is a small tmpfs, which needs root on Linux; without it, the disk does not fill up.

use std::fs;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::{Desk, Disk};
use crate::resume::{same, send, wait_for};

/// Size of the disturbed run's disk in kB: a little more than three checkpoints.
const DISK: u64 = 400_000;

const CONFIG: &str = "steps: 1000000\nlog_every: 20\ncheckpoint_every: EVERY\nnormalize_activations: true\n\
    source: {type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.2, ctx_len: 128, n_ctxs: 256, \
             out_batch_size: 1024, pack: true, text: {type: text_files, path: TEXT}}\n\
    saes:\n\
    - {name: standard, dictionary: {dict_size: 1536}, trainer: {type: standard, resample_steps: 400, warmup_steps: 20, \
       sparsity_warmup_steps: 100}}\n\
    - {name: top_k, dictionary: {dict_size: 1536, k: 16}, trainer: {type: top_k, warmup_steps: 20}}\n\
    - {name: batch_top_k, dictionary: {dict_size: 1536, k: 16}, trainer: {type: batch_top_k, warmup_steps: 20}}\n\
    - {name: jump_relu, dictionary: {dict_size: 1536}, trainer: {type: jump_relu, warmup_steps: 20, \
       sparsity_warmup_steps: 100}}\n\
    - {name: gated, dictionary: {dict_size: 1536}, trainer: {type: gated, warmup_steps: 20, sparsity_warmup_steps: 100}}\n\
    - {name: ghosts, dictionary: {dict_size: 1536}, trainer: {type: standard, warmup_steps: 20, \
       sparsity_warmup_steps: 100}, modifiers: [{type: ghost_grads, threshold: 100}]}\n";

/// A run on one thread, so that two runs do not compete for cores.
struct Trainee<'a> {
    desk: &'a Desk,
    dir: &'static str,
    config: &'static str,
    child: Child,
    started: Instant,
}

impl<'a> Trainee<'a> {
    fn start(desk: &'a Desk, dir: &'static str, config: &'static str, more: &[&str]) -> Self {
        let log = fs::File::options().create(true).append(true).open(desk.path(&format!("{config}.log"))).unwrap();
        let mut program = desk.program();
        program.args(["train", config, "--resume", "--output-dir", dir]).args(more).env("OMP_NUM_THREADS", "1");
        let child = program.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Trainee { desk, dir, config, child, started: Instant::now() }
    }

    /// The last logged step.
    fn step(&self) -> u64 {
        let log = fs::read_to_string(self.desk.path(&format!("{}/metrics.jsonl", self.dir))).unwrap_or_default();
        let row = log.lines().last().and_then(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        row.and_then(|row| row["step"].as_u64()).unwrap_or(0)
    }

    /// Resident memory in MB.
    fn memory(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(line.trim().split(' ').next()?.parse::<u64>().ok()? / 1000)
    }

    fn ended(&mut self) -> Option<i32> {
        self.child.try_wait().unwrap().map(|status| status.code().unwrap_or(-1))
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn said(&self) -> String {
        fs::read_to_string(self.desk.path(&format!("{}.log", self.config))).unwrap_or_default()
    }
}

impl Drop for Trainee<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
#[ignore = "runs for DICTLEARN_SOAK_MINUTES minutes"]
fn soak() {
    let number = |name: &str, usual: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual);
    let minutes = number("DICTLEARN_SOAK_MINUTES", 2);
    let every = number("DICTLEARN_SOAK_EVERY", 60);
    let seed = number("DICTLEARN_SOAK_SEED", 1);
    let mut random = fastrand::Rng::with_seed(seed);
    let desk = Desk::new();
    let words =
        ["river", "letter", "sister", "walked", "never", "house", "morning", "said", "happy", "and", "the", "of"];
    let mut text = String::new();
    for _ in 0..9000 {
        let line: Vec<&str> = (0..20).map(|_| words[random.usize(..words.len())]).collect();
        text += &(serde_json::json!({"text": line.join(" ")}).to_string() + "\n");
    }
    for (config, file) in [("calm.yaml", "calm.jsonl"), ("stormy.yaml", "stormy.jsonl")] {
        desk.write(file, &text);
        desk.write(config, &CONFIG.replace("TEXT", file).replace("EVERY", &every.to_string()));
    }
    let at = desk.path("disk");
    let disk = Disk::mount(&at, DISK);
    if disk.is_none() {
        println!("soak: cannot mount a tmpfs; the disk will not fill up");
    }

    let began = Instant::now();
    let until = began + Duration::from_secs(60 * minutes);
    let mut calm = Trainee::start(&desk, "calm", "calm.yaml", &[]);
    let mut calm_memory: Vec<u64> = Vec::new();
    let mut stormy = Trainee::start(&desk, "disk/stormy", "stormy.yaml", &[]);
    let mut lives: Vec<(Duration, u64)> = Vec::new();
    let (mut kills, mut stops, mut full, mut cuts, mut paused) = (0, 0, 0, 0, false);
    let mut waits = |calm: &mut Trainee, stormy: &mut Trainee, seconds: f64, memory: &mut u64| {
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        while Instant::now() < end && stormy.ended().is_none() {
            sleep(Duration::from_millis(500));
            *memory = stormy.memory().unwrap_or(0).max(*memory);
            calm_memory.extend(calm.memory());
            assert_eq!(calm.ended(), None, "{}", calm.said());
            // The undisturbed run waits, so that neither is far ahead at the end.
            let ahead = calm.step() > stormy.step() + 100;
            if ahead != paused {
                send(if ahead { "-STOP" } else { "-CONT" }, &calm.child);
                paused = ahead;
            }
        }
    };
    while Instant::now() < until {
        let mut memory = 0;
        waits(&mut calm, &mut stormy, 4.0 + 50.0 * random.f64() * random.f64(), &mut memory);
        match random.u32(0..10) {
            0 | 1 if disk.is_some() => {
                full += 1;
                let disk = disk.as_ref().unwrap();
                disk.fill();
                waits(&mut calm, &mut stormy, 20.0 + 30.0 * random.f64(), &mut memory);
                // A kill while the disk is full must not damage earlier files.
                if random.bool() {
                    kills += 1;
                    stormy.kill();
                }
                disk.free();
                waits(&mut calm, &mut stormy, 5.0, &mut memory);
            }
            2 => {
                cuts += 1;
                let file = fs::File::options().write(true).open(desk.path("stormy.jsonl")).unwrap();
                file.set_len(text.len() as u64 / 3).unwrap();
                waits(&mut calm, &mut stormy, 120.0, &mut memory);
                if let Some(code) = stormy.ended() {
                    assert_eq!(code, 2, "{}", stormy.said());
                    assert!(stormy.said().contains("was truncated while being read"), "{}", stormy.said());
                }
                stormy.kill();
                fs::write(desk.path("stormy.jsonl"), &text).unwrap();
            }
            3 => {
                stops += 1;
                send("-TERM", &stormy.child);
                let asked = Instant::now();
                wait_for("the end", || stormy.ended().is_some());
                assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
                let code = stormy.ended();
                assert!(code == Some(143), "{code:?} {}", stormy.said());
            }
            _ => {
                kills += 1;
                stormy.kill();
            }
        }
        lives.push((stormy.started.elapsed(), memory));
        if let Some(code) = stormy.ended() {
            assert!([-1, 2, 143].contains(&code), "{code}: {}", stormy.said());
            drop(stormy);
            stormy = Trainee::start(&desk, "disk/stormy", "stormy.yaml", &[]);
        }
    }

    // Resumes both and runs them to the same step.
    send("-CONT", &calm.child);
    send("-TERM", &calm.child);
    wait_for("the end", || calm.ended().is_some());
    assert_eq!(calm.ended(), Some(143), "{}", calm.said());
    send("-TERM", &stormy.child);
    wait_for("the end", || stormy.ended().is_some());
    let steps = |dir: &str| {
        let names = fs::read_dir(desk.path(&format!("{dir}/checkpoints"))).unwrap();
        let step = |name: String| name.strip_prefix("step_")?.strip_suffix(".safetensors")?.parse::<u64>().ok();
        names.filter_map(|entry| step(entry.unwrap().file_name().into_string().unwrap())).max().unwrap()
    };
    // One step more, because a run always logs its last step.
    let end = steps("calm").max(steps("disk/stormy")) + 1;
    for (dir, config) in [("calm", "calm.yaml"), ("disk/stormy", "stormy.yaml")] {
        let stop = format!("stop_after={end}");
        let mut last = Trainee::start(&desk, dir, config, &["--set", &stop, "--set", "metrics=[]"]);
        while last.ended().is_none() {
            sleep(Duration::from_millis(100));
        }
        assert_eq!(last.ended(), Some(0), "{}", last.said());
    }
    let third = calm_memory.len() / 3;
    let mean = |part: &[u64]| part.iter().sum::<u64>() / part.len().max(1) as u64;
    println!(
        "soak: {minutes} minutes, {end} steps, checkpoint every {every} steps; {} starts: {kills} kills, {stops} \
         stops, {full} full disks, {cuts} truncated texts; memory of the undisturbed run {} MB in the second third and \
         {} MB in the last, of the disturbed run at most {} MB; longest time between starts {:.0} s",
        lives.len(),
        mean(&calm_memory[third..2 * third]),
        mean(&calm_memory[2 * third..]),
        lives.iter().map(|(_, memory)| *memory).max().unwrap_or(0),
        lives.iter().map(|(life, _)| life.as_secs_f64()).fold(0.0, f64::max),
    );
    for said in stormy_warnings(&desk) {
        println!("soak: {} times: {}", said.1, said.0);
    }
    let (second, last) = (mean(&calm_memory[third..2 * third]), mean(&calm_memory[2 * third..]));
    assert!(last <= second + second / 10, "memory grows: {second} -> {last} MB");
    // These name the text, which is a different file for each run.
    for config in desk.files().iter().filter(|file| file.ends_with("/config.json")) {
        fs::remove_file(desk.path(config)).unwrap();
    }
    same(&desk, "calm", "disk/stormy");
    println!("soak: weights and log are the same");
}

/// The disturbed run's warnings and errors, and how often each occurred.
fn stormy_warnings(desk: &Desk) -> std::collections::BTreeMap<String, usize> {
    let mut found = std::collections::BTreeMap::new();
    for line in desk.read("stormy.yaml.log").lines() {
        if ["warning:", "error:", "writing succeeds"].iter().any(|start| line.starts_with(start)) {
            // Paths vary.
            let words = line.split(' ').map(|word| if word.contains('/') { "…" } else { word });
            *found.entry(words.collect::<Vec<_>>().join(" ")).or_default() += 1;
        }
    }
    found
}
