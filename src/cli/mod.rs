//! The command line.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use serde_json::{Map, Value, json};
use tch::Tensor;

use crate::config;
use crate::config::{RunConfig, Sources};
use crate::run::compare::{Comparison, shell_quoted, short_path};
use dictlearn_core::data::manifest::Dtype;
use dictlearn_core::error::printable;
use dictlearn_core::error::{InputError, Under};
mod describe;
mod output;
mod signals;

use crate::doctor;
use crate::new_plugin;
use crate::publish::Push;
use crate::run;
use crate::run::Ending;
use crate::run::evaluate;
use crate::run::evaluate::Measured;
use crate::run::harvest;
use dictlearn_core::data::text;
use dictlearn_core::data::text::Wanted;
use dictlearn_core::data::{Site, SourceCx};
use dictlearn_core::files::numpy;
use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::formats;
use dictlearn_core::hub;
use dictlearn_core::machine::device;
use dictlearn_core::registry;
use dictlearn_core::registry::{Component, Kind, component, components};
use dictlearn_core::report::Subject;
use dictlearn_core::sae::saved;
use dictlearn_core::sae::saved::Saved;
use dictlearn_core::suggest::nearest;
use output::say;

/// Train and evaluate sparse autoencoders on language-model activations, from YAML.
#[derive(Debug, Parser)]
#[command(name = "dictlearn", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train every SAE of a config, save and evaluate them.
    Train {
        #[command(flatten)]
        config: ConfigArgs,
        /// Where the run is written, instead of the config's `output_dir`.
        #[arg(long, value_name = "DIR")]
        output_dir: Option<PathBuf>,
        /// Go on from the run's last checkpoint; start afresh where there is none.
        #[arg(long)]
        resume: bool,
        /// Print the merged config with every default, and shapes and memory; train nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Measure trained SAEs.
    Eval {
        /// An SAE's folder, or a run's for all of its SAEs; several may be given.
        #[arg(value_name = "SAE_OR_RUN", required = true)]
        places: Vec<PathBuf>,
        /// The config whose source and metrics are used; by default the one that each SAE was trained with.
        #[arg(long, value_name = "CONFIG.yaml")]
        config: Option<PathBuf>,
        /// Change a key of the config, such as the text to measure on: `--set 'source.text={type: text_files, path: mine.txt}'`.
        ///
        /// Where the config has an `eval_source`, a change of `source` changes that too.
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
        /// Print one JSON object instead of a table; of several SAEs a list of objects, each with its path as `sae`.
        #[arg(long)]
        json: bool,
        /// Write the figures to each SAE's eval.json too.
        #[arg(long)]
        save: bool,
    },
    /// Compare the SAEs of runs: what their configs differ in, and what was measured of them.
    Compare {
        /// An SAE's folder, a run's, or a folder of runs; several may be given.
        #[arg(value_name = "RUN_OR_SAE", required = true)]
        places: Vec<PathBuf>,
        /// Sort by a key of the configs or a figure: `--sort l0`; `--sort=-l0` for the largest first.
        #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
        sort: Option<String>,
        /// Print a list of JSON objects, with every figure.
        #[arg(long, conflicts_with = "csv")]
        json: bool,
        /// Print comma-separated values, with every figure that is a number.
        #[arg(long)]
        csv: bool,
    },
    /// Write the activations of a config's source to disk, in order.
    Activations {
        #[command(flatten)]
        config: ConfigArgs,
        /// The folder to write to.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Stop after so many activations; by default the data is read once to its end.
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(i64).range(1..))]
        limit: Option<i64>,
        /// The type to write them in: `float32`, or `bfloat16` or `float16` at half the size.
        #[arg(long, default_value_t, value_parser = dtype)]
        dtype: Dtype,
    },
    /// Features and reconstructions of activations in a file, or the features of each token of a text.
    Encode(EncodeArgs),
    /// Import a published SAE into a folder that `eval`, `encode`, `export` and `init_from` take.
    Import {
        /// `sae_lens`, `gemma_scope`, `dictionary_learning`, ... (`dictlearn list formats`).
        format: String,
        /// A folder or file, `owner/name[@revision]/path` on the Hub, or for sae_lens `release:sae_id`.
        #[arg(value_name = "PATH_OR_REPO")]
        place: Option<String>,
        /// The folder to write; by default `saes/<name>`.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// A name in the format's own set of published SAEs, or a glob of several.
        #[arg(long, value_name = "NAME")]
        pretrained: Option<String>,
        /// sae_lens's table of releases, pretrained_saes.yaml; by default the one of the installed Python package.
        #[arg(long, value_name = "FILE")]
        releases: Option<String>,
        /// Import nothing: show what the format knows by name.
        #[arg(long, value_name = "GLOB", num_args = 0..=1, default_missing_value = "*")]
        list: Option<String>,
    },
    /// Export an SAE to the format of a Python library.
    Export {
        /// The SAE's folder.
        sae_dir: PathBuf,
        /// `sae_lens` or `dictionary_learning`.
        #[arg(long)]
        format: String,
        /// The folder to write.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Upload a trained SAE to the Hugging Face Hub, with a model card.
    Push {
        /// The SAE's folder.
        sae_dir: PathBuf,
        /// `owner/name` of the Hub, made if there is none; `@BRANCH` for another branch than main.
        #[arg(value_name = "REPO[@BRANCH]")]
        repo: String,
        /// The folder of the repository to put it in; its root by default.
        #[arg(long, value_name = "PATH_IN_REPO")]
        path: Option<String>,
        /// Make the repository private.
        #[arg(long)]
        private: bool,
        /// What the commit says of itself.
        #[arg(long, value_name = "TEXT")]
        message: Option<String>,
        /// Print what would be uploaded, and the card; upload nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// List what is registered: dictionaries, trainers, modifiers, ...
    List {
        /// One kind only: `trainers`.
        kind: Option<String>,
    },
    /// Show a component's fields with defaults and docs, its paper, and an example.
    Describe {
        /// `dictionary`, `trainer`, `modifier`, `source`, `text`, `metric`, `logger`, `model` or `format`.
        kind: String,
        /// Its name in a config.
        name: String,
    },
    /// Print the JSON Schema of a config, for completion in an editor.
    Schema,
    /// Write a crate for a component of your own, which builds, with a test that passes.
    NewPlugin {
        /// `dictionary` (with its trainer), `modifier`, `source`, `text`, `metric`, `logger`, `model` or `format`.
        kind: String,
        /// Its name in a config: `log_penalty`.
        name: String,
        /// The folder to write.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Where the source of dictlearn is, if not where this program was built.
        #[arg(long, value_name = "DIR")]
        dictlearn: Option<PathBuf>,
    },
    /// Examine this machine: versions, device, speed, and whether training steps are computed correctly.
    ///
    /// Exits with 1 if something is broken. Put its output into a bug report.
    Doctor {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Write a page for each component, as `describe` has it, in Markdown.
    Docs {
        /// The folder to write, one folder in it for each kind.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["input", "text"])))]
struct EncodeArgs {
    /// The SAE's folder.
    sae_dir: PathBuf,
    /// A file with activations [N, d]: .safetensors or .npz with a tensor `x`, or .npy.
    #[arg(long, value_name = "FILE", requires = "output")]
    input: Option<PathBuf>,
    /// The tensor of `--input`, if it is not called `x`: `activations` in what `dictlearn activations` writes.
    #[arg(long, value_name = "NAME", requires = "input")]
    tensor: Option<String>,
    /// The .safetensors file to write: `features` [N, F] and `recon` [N, d_out]; of a text also `x` [N, d] and `tokens` [N].
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// A text for the SAE's model to read: each token's strongest features are shown. May be given several times.
    #[arg(long, value_name = "TEXT")]
    text: Vec<String>,
    /// How many features to show of each token.
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(i64).range(1..))]
    top: i64,
    /// Print the tokens and their features as one JSON value instead of a table.
    #[arg(long, requires = "text")]
    json: bool,
    /// The config whose source says which model to run and where to read it; by default the SAE's own.
    #[arg(long, value_name = "CONFIG.yaml")]
    config: Option<PathBuf>,
    /// Change a key of the config: `--set source.model=folder`.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Args)]
struct ConfigArgs {
    /// The config.
    config: PathBuf,
    /// Change a key of the config: `--set saes[0].trainer.lr=1e-4`.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Use one of the config's profiles.
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
}

impl ConfigArgs {
    fn load(&self) -> Result<RunConfig> {
        load(&self.config, self.profile.clone(), self.set.clone())
    }

    /// The same for a run. An error has what is wrong with its parts too.
    fn load_to_train(&self) -> Result<RunConfig> {
        load_from(&Sources {
            file: self.config.clone(),
            profile: self.profile.clone(),
            set: self.set.clone(),
            variables: config::variables(),
            builds_rest: true,
            ..Sources::default()
        })
    }
}

fn load(file: &Path, profile: Option<String>, set: Vec<String>) -> Result<RunConfig> {
    load_from(&Sources { file: file.to_owned(), profile, set, variables: config::variables(), ..Sources::default() })
}

fn load_from(sources: &Sources) -> Result<RunConfig> {
    let config = config::load(sources)?;
    config.written.notes().iter().for_each(|note| say!("{}", printable(note)));
    Ok(config)
}

/// Runs the program: every plugin that is linked in can be named. Call it from `main`.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    output::show();
    // libtorch's errors that no one foresaw, want of memory above all, arrive as panics.
    std::panic::set_hook(Box::new(|panic| say!("error: {}", unforeseen(panic))));
    match std::panic::catch_unwind(|| registry::check().and_then(|()| run(cli.command))) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => fail(error),
        Err(_) => ExitCode::FAILURE,
    }
}

/// A type of activations on disk, by its name.
fn dtype(name: &str) -> Result<Dtype, String> {
    let known = Dtype::ALL.map(|dtype| dtype.to_string()).join(", ");
    Dtype::ALL.into_iter().find(|dtype| dtype.to_string() == name).ok_or(format!("known: {known}"))
}

fn unforeseen(panic: &std::panic::PanicHookInfo) -> String {
    let payload = panic.payload();
    let message = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    let message = message.unwrap_or("unknown");
    if ["allocate memory", "out of memory"].iter().any(|want| message.contains(want)) {
        return "there is not enough memory\nhelp: make the dictionary, the batch or the buffer smaller; \
                `--dry-run` says what they take"
            .to_owned();
    }
    let place = panic.location().map_or_else(String::new, |place| format!(" ({place})"));
    // What follows the first line is libtorch's own stack.
    format!("{}{place}\nhelp: this should not happen: please report it", message.lines().next().unwrap_or_default())
}

/// Prints an error and gives the exit status: 2 where the input is wrong, 1 for anything else.
fn fail(error: anyhow::Error) -> ExitCode {
    match InputError::take(error) {
        Ok(input) => {
            say!("error: {}", printable(&input.to_string()));
            ExitCode::from(2)
        }
        Err(other) => {
            say!("error: {}", printable(&format!("{other:#}")));
            ExitCode::from(1)
        }
    }
}

/// Prints a result. A reader that has seen enough, such as `head`, is no error.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let line_end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let written =
        out.write_all(text.as_bytes()).and_then(|()| out.write_all(line_end.as_bytes())).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Train { config, output_dir, resume, dry_run } => train(&config, output_dir, resume, dry_run),
        Command::Eval { places, config, set, json, save } => eval(&places, config, &set, json, save),
        Command::Compare { places, sort, json, csv } => compare(&places, sort.as_deref(), json, csv),
        Command::Doctor { json } => doctor(json),
        Command::Activations { config, out, limit, dtype } => activations(&config, &out, limit, dtype),
        Command::Encode(args) => match (&args.input, &args.output) {
            (Some(input), Some(output)) => encode(&args.sae_dir, input, args.tensor.as_deref(), output),
            _ => encode_text(&args),
        },
        Command::Import { format, place, out, pretrained, releases, list } => {
            import(&format, &formats::Request { place, pretrained, releases }, out.as_deref(), list.as_deref())
        }
        Command::Export { sae_dir, format, out } => {
            let sae = saved::read(&sae_dir, tch::Device::Cpu, device::Precision::Float32)?;
            formats::export(&sae, &format, &out)?;
            print(&out.display().to_string())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Push { sae_dir, repo, path, private, message, dry_run } => {
            let push = Push::of(&sae_dir, &repo, path.as_deref().unwrap_or_default())?;
            if dry_run {
                print(&push.to_string())?;
                return Ok(ExitCode::SUCCESS);
            }
            let interrupt = signals::listen()?;
            match push.upload(hub::hub()?, message.as_deref(), private) {
                Err(_) if interrupt.asked() => {
                    say!("stopped; nothing was committed");
                    Ok(ExitCode::from(interrupt.status()))
                }
                done => {
                    print(&done?)?;
                    Ok(ExitCode::SUCCESS)
                }
            }
        }
        Command::List { kind } => list(kind.as_deref()),
        Command::Describe { kind, name } => describe(&kind, &name),
        Command::Schema => {
            print(&serde_json::to_string_pretty(&config::json_schema())?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::NewPlugin { kind: name_of_kind, name, out, dictlearn } => {
            new_plugin::write(kind(&name_of_kind)?, &name, &out, &dictlearn.unwrap_or_else(new_plugin::own_source))?;
            say!(
                "{} is written: there, `cargo test` tries it, and `cargo run --release -- train CONFIG.yaml` is dictlearn \
                 with it",
                out.display()
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Docs { out } => docs(&out),
    }
}

fn train(args: &ConfigArgs, output_dir: Option<PathBuf>, resume: bool, dry_run: bool) -> Result<ExitCode> {
    let mut config = args.load_to_train()?;
    if let Some(dir) = output_dir {
        config.output_dir = Some(std::path::absolute(dir)?.into());
    }
    let run_dir = match &config.output_dir {
        Some(dir) => dir.as_path().to_owned(),
        // A config without `output_dir` gets a run of its own name.
        None => std::path::absolute(Path::new("runs").join(args.config.file_stem().unwrap_or_default()))?,
    };
    config.output_dir = Some(run_dir.clone().into());
    if dry_run {
        let plan = run::plan(&mut config).map_err(|error| config.written.locate(error))?;
        let yaml = config::to_yaml(&config)?;
        print(&plan.lines().fold(yaml, |all, line| all + "# " + line + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let interrupt = signals::listen()?;
    match run::train(&mut config, &run_dir, resume, &interrupt).map_err(|error| config.written.locate(error))? {
        Ending::Done { results, stopped, reads_text } => {
            let none = config.metrics.is_empty() || results.is_empty();
            let table = if none { String::new() } else { evaluate::table(&results) + "\n" };
            let next = what_next(&run_dir, &results, reads_text);
            print(&format!("{table}saved to {}\n{next}", run_dir.display()))?;
            if !stopped.is_empty() {
                bail!(run::stopped_error(stopped));
            }
            Ok(ExitCode::SUCCESS)
        }
        Ending::Interrupted(step) => {
            say!("stopped after {step} steps; everything is saved, `--resume` goes on");
            Ok(ExitCode::from(interrupt.status()))
        }
        Ending::NotBegun => {
            say!("stopped before the first step; nothing is left to go on from");
            Ok(ExitCode::from(interrupt.status()))
        }
    }
}

fn eval(places: &[PathBuf], config: Option<PathBuf>, set: &[String], json: bool, save: bool) -> Result<ExitCode> {
    // What is wrong with an SAE is said before what is wrong with a config.
    let mut dirs: Vec<PathBuf> = Vec::new();
    for place in places {
        for dir in saved::folders(place)? {
            if !dirs.contains(&dir) {
                dirs.push(dir);
            }
        }
    }
    // Those that are measured alike are measured together, in one pass over the source.
    let mut groups: Vec<(PathBuf, Value, RunConfig, Vec<usize>)> = Vec::new();
    for (index, dir) in dirs.iter().enumerate() {
        let file = own_config(dir, config.clone())?;
        if let Some((.., members)) = groups.iter_mut().find(|(other, ..)| *other == file) {
            members.push(index);
            continue;
        }
        let config = load_to_measure(&file, set)?;
        let alike = json!([
            config.seed,
            config.device,
            config.precision,
            config.on_nonfinite,
            config.eval_source.as_ref().unwrap_or(&config.source),
            config.metrics,
        ]);
        match groups.iter_mut().find(|(_, other, ..)| *other == alike) {
            Some((.., members)) => members.push(index),
            None => groups.push((file, alike, config, vec![index])),
        }
    }
    let mut results: Vec<Option<Map<String, Value>>> = vec![None; dirs.len()];
    // What can be measured is measured and shown, whatever is wrong with the others.
    let mut failed = None;
    for (_, _, config, members) in &groups {
        let mut measured = |members: &[usize]| {
            let own: Vec<&Path> = members.iter().map(|index| dirs[*index].as_path()).collect();
            let found = measure(&own, config)?;
            members.iter().zip(found).for_each(|(index, result)| results[*index] = Some(result));
            anyhow::Ok(())
        };
        let Err(error) = measured(members) else { continue };
        dictlearn_core::interrupt::check()?;
        failed.get_or_insert(config.written.locate(error));
        if members.len() > 1 {
            // One of them may be the cause.
            for index in members {
                let _ = measured(&[*index]);
                dictlearn_core::interrupt::check()?;
            }
        }
    }
    let one = dirs == places && dirs.len() == 1;
    let names = saved::labels(&dirs);
    let all = dirs.into_iter().zip(names).zip(results);
    let found: Vec<((PathBuf, String), Map<String, Value>)> =
        all.filter_map(|(sae, result)| Some((sae, result?))).collect();
    if save {
        found.iter().try_for_each(|((dir, _), result)| evaluate::write(dir, result))?;
    }
    if !json {
        let rows: Vec<_> = found.into_iter().map(|((_, name), result)| (name, result)).collect();
        if !rows.is_empty() {
            print(&evaluate::table(&rows))?;
        }
    } else if one && failed.is_none() {
        print(&serde_json::to_string(&found[0].1)?)?;
    } else {
        let named = |((dir, _), result): ((PathBuf, String), Map<String, Value>)| {
            let name = ("sae".to_owned(), dir.display().to_string().into());
            std::iter::once(name).chain(result).collect::<Map<_, _>>()
        };
        let all: Vec<Map<String, Value>> = found.into_iter().map(named).collect();
        print(&serde_json::to_string(&all)?)?;
    }
    failed.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// The keys of a config that measuring an SAE depends on.
const MEASURING: [&str; 7] = ["source", "eval_source", "metrics", "device", "precision", "seed", "on_nonfinite"];

/// Loads a config to measure with. What is set of `source` is set of `eval_source` too, if there is one: it is what is
/// measured.
fn load_to_measure(file: &Path, set: &[String]) -> Result<RunConfig> {
    let config = load_from(&Sources {
        file: file.to_owned(),
        profile: None,
        set: set.to_vec(),
        variables: config::variables(),
        eval_follows: true,
        ..Sources::default()
    })?;
    let first = |set: &str| set.split(['.', '[', '=']).next().unwrap_or_default().trim().to_owned();
    if let Some(other) = set.iter().find(|set| !MEASURING.contains(&first(set).as_str())) {
        bail!(
            InputError::new(format!("`--set {other}` changes nothing of what is measured"))
                .help(format!("an SAE is measured as it was saved; what can be set is {}", MEASURING.join(", ")))
        );
    }
    if let Some(none) = set.iter().rfind(|set| first(set) == "metrics").filter(|_| config.metrics.is_empty()) {
        bail!(
            InputError::new(format!("`--set {none}` leaves nothing to measure"))
                .help("name metrics (`dictlearn list metrics`), or leave `metrics` out for those of the config")
        );
    }
    Ok(config)
}

fn compare(places: &[PathBuf], sort: Option<&str>, json: bool, csv: bool) -> Result<ExitCode> {
    let mut comparison = Comparison::of(places)?;
    if let Some(key) = sort {
        comparison.sort(key)?;
    }
    comparison.notes(&program()).iter().for_each(|note| say!("{note}"));
    print(&match (json, csv) {
        (true, _) => serde_json::to_string(&comparison.json())?,
        (_, true) => comparison.csv(),
        _ => comparison.table(),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn doctor(json: bool) -> Result<ExitCode> {
    let report = doctor::examine();
    print(&if json { serde_json::to_string(&report)? } else { report.to_string() })?;
    Ok(if report.healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How this program was called, for a shell.
fn program() -> String {
    let name = std::env::args().next().unwrap_or_else(|| "dictlearn".to_owned());
    shell_quoted(&name)
}

/// Where everything of a run lies, and what can be done with it next: commands that work as printed, from here.
fn what_next(run_dir: &Path, results: &[(String, Map<String, Value>)], reads_text: bool) -> String {
    let mut text = String::new();
    let saes = saved::folders(run_dir).unwrap_or_default();
    // In the config's order, as in the table.
    let named = results.iter().map(|(name, _)| run_dir.join(name)).filter(|dir| saes.contains(dir));
    let saes: Vec<PathBuf> = named
        .chain(saes.iter().filter(|dir| !results.iter().any(|(name, _)| run_dir.join(name) == **dir)).cloned())
        .collect();
    let list = |dir: &Path| {
        let files = ["ae.safetensors", "ae.pt", "config.json", "eval.json", "checkpoints"];
        files.into_iter().filter(|file| dir.join(file).exists()).collect::<Vec<_>>().join(", ")
    };
    let name = |dir: &Path| dir.file_name().unwrap_or_default().to_string_lossy().into_owned() + "/";
    const SHOWN: usize = 8;
    let mut rows: Vec<(String, String)> = saes.iter().take(SHOWN).map(|dir| (name(dir), list(dir))).collect();
    if saes.len() > SHOWN {
        rows.push((format!("{} more", saes.len() - SHOWN), "with the same files".to_owned()));
    }
    for (file, what) in [
        ("config.yaml", "the config with every default"),
        ("metrics.jsonl", "the figures of each logged step"),
        ("checkpoints", "the state of training, for `--resume`"),
    ] {
        if run_dir.join(file).exists() {
            rows.push((file.to_owned() + if run_dir.join(file).is_dir() { "/" } else { "" }, what.to_owned()));
        }
    }
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).min(40);
    text.extend(rows.iter().map(|(name, what)| format!("  {name:width$}  {what}\n")));
    let Some(sae) = saes.first() else { return text };
    let (run, path) = (shell_quoted(&short_path(run_dir)), shell_quoted(&short_path(sae)));
    let mut next = Vec::new();
    if reads_text {
        next.push(format!("encode {path} --text 'The quick brown fox jumps over the lazy dog.'"));
    }
    next.extend(
        exports_to(sae).map(|(format, out)| format!("export {path} --format {format} --out {}", shell_quoted(&out))),
    );
    next.extend([format!("eval {run}"), format!("compare {run}"), format!("eval {path} --json")]);
    next.truncate(3);
    let program = program();
    text + "next:\n" + &next.iter().map(|command| format!("  {program} {command}\n")).collect::<String>()
}

/// A format that can write an SAE, and a folder beside which there is none of that name. What is large is not tried.
fn exports_to(sae: &Path) -> Option<(&'static str, String)> {
    const LARGE: u64 = 100_000_000;
    if std::fs::metadata(sae.join("ae.safetensors")).ok()?.len() > LARGE {
        return None;
    }
    let saved = saved::read(sae, tch::Device::Cpu, device::Precision::Float32).ok()?;
    let dir = tempfile::tempdir().ok()?;
    let fits = |format: &&str| formats::export(&saved, format, &dir.path().join(format)).is_ok();
    let format = formats::writers().into_iter().rev().find(fits)?;
    let name = format!("{}-{format}", saved.name());
    let free = (1..1000).map(|number| if number == 1 { name.clone() } else { format!("{name}-{number}") });
    let out = free.into_iter().find(|out| !Path::new(out).exists())?;
    // It would be read as an option.
    Some((format, if out.starts_with('-') { format!("./{out}") } else { out }))
}

/// The config that says where an SAE reads: the one that the user names, an imported SAE's own, or its run's.
fn own_config(sae_dir: &Path, named: Option<PathBuf>) -> Result<PathBuf> {
    let dir = std::path::absolute(sae_dir)?;
    let own = [Some(&*dir), dir.parent()].into_iter().flatten().map(|dir| dir.join("config.yaml"));
    let Some(file) = named.or_else(|| own.into_iter().find(|file| file.exists())) else {
        bail!(
            InputError::new(format!("nothing says which model {} reads, and where", sae_dir.display()))
                .help("give a config with a `source`: `--config CONFIG.yaml`")
        );
    };
    Ok(file)
}

/// The figures of SAEs, by the metrics of a config on its source, which is read once for all.
fn measure(sae_dirs: &[&Path], config: &RunConfig) -> Result<Vec<Map<String, Value>>> {
    let measured = Measured::of(config);
    let key = measured.key;
    let cx = source_cx(config)?;
    let read = |dir: &&Path| saved::read(dir, cx.device, device::Precision::Float32);
    let all: Vec<Saved> = sae_dirs.iter().map(read).collect::<Result<_>>()?;
    let mut source = measured.build(&cx)?;
    let sites = source.sites();
    let mut subjects = Vec::new();
    for saved in &all {
        let site = own_site(saved, &sites).under(key)?;
        let dims = saved.dictionary.dims();
        if (dims.input, dims.output) != sites[site].widths() {
            bail!(
                InputError::new(format!(
                    "{} takes activations of width {}, but the source's have width {}",
                    saved.dir.display(),
                    dims.input,
                    sites[site].activation_dim
                ))
                .field(key)
                .help("evaluate it on the model and submodule that it was trained on")
            );
        }
        subjects.push(Subject { dictionary: &*saved.dictionary, site });
    }
    let usual;
    let metrics = if config.metrics.is_empty() {
        usual = evaluate::usual(&mut *source)?;
        &usual
    } else {
        &config.metrics
    };
    // What others trained on is what theirs are measured on, too.
    let own = all.iter().filter(|saved| saved.config["imported"].is_null());
    if let Some(shared) = own.filter_map(|saved| source.overlap(&saved.config["buffer"])).next() {
        evaluate::warn_of_overlap(&shared);
    }
    let measuring = evaluate::Measuring {
        key,
        origin: evaluate::origin(measured.source)?,
        from_the_beginning: true,
        overlap_is_known: false,
        say: &|message| say!("{message}"),
    };
    evaluate::evaluate(metrics, &subjects, &mut *source, &measuring)
}

/// The number of the site that an SAE was trained on, by what its config.json says.
fn own_site(saved: &Saved, sites: &[Site]) -> Result<usize> {
    let buffer = &saved.config["buffer"];
    let name = buffer["site"].as_str().or(buffer["submodule"].as_str());
    let Some(site) = Site::find(sites, name.unwrap_or_default()) else {
        let names: Vec<&str> = sites.iter().map(|site| site.name.as_str()).collect();
        bail!(
            InputError::new(match name {
                Some(name) => format!("{} was trained at {name}, where the source has no site", saved.dir.display()),
                None => format!("{} does not say at which of the source's sites it was trained", saved.dir.display()),
            })
            .help(format!("its sites: {}", names.join(", ")))
        );
    };
    // Side by side in another order they would be read for each other.
    let trained: Vec<&str> = buffer["parts"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let parts: Vec<&str> = sites[site].parts.iter().map(|part| part.name.as_str()).collect();
    if !trained.is_empty() && trained != parts {
        bail!(
            InputError::new(format!(
                "{} was trained on the parts {}, and the source has {}",
                saved.dir.display(),
                trained.join(", "),
                if parts.is_empty() { "none".to_owned() } else { parts.join(", ") }
            ))
            .help("join the same sources under the same names")
        );
    }
    Ok(site)
}

fn source_cx(config: &RunConfig) -> Result<SourceCx> {
    let device = config.device.device().map_err(anyhow::Error::from).under("device")?;
    Ok(config.source_cx(device))
}

/// The activations to encode, and what to call them in messages.
fn activations_in(input: &Path, tensor: Option<&str>) -> Result<(Tensor, String)> {
    let name = tensor.unwrap_or("x");
    let said = format!("tensor `{name}`");
    let other_name = |names: &[String]| -> InputError {
        let near = nearest(name, names.iter().map(String::as_str));
        let shown = near.or(names.first().map(String::as_str)).unwrap_or_default();
        InputError::new(format!("{} has no {said}", input.display())).help(if names.is_empty() {
            "it has none at all".to_owned()
        } else {
            format!("`--tensor {shown}` takes another; it has: {}", names.join(", "))
        })
    };
    let extension = input.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "npy" => match tensor {
            None => Ok((numpy::read_npy(input)?, "the array".to_owned())),
            Some(_) => bail!(
                InputError::new(format!("{} has one array, without a name", input.display()))
                    .help("leave out `--tensor`")
            ),
        },
        "npz" => {
            let mut file = numpy::Npz::open(input)?;
            let names = file.names();
            if !names.iter().any(|known| known == name) {
                bail!(other_name(&names));
            }
            Ok((file.array(name)?, said))
        }
        other => {
            let file = match TensorFile::open(input) {
                Err(_) if other != "safetensors" && input.is_file() => {
                    bail!(
                        InputError::new(format!("cannot read {}: not a safetensors file", input.display()))
                            .help("`--input` takes .safetensors, .npy and .npz")
                    )
                }
                opened => opened?,
            };
            if !file.has(name) {
                bail!(other_name(&file.names()));
            }
            Ok((file.tensor(name)?, said))
        }
    }
}

fn encode(sae_dir: &Path, input: &Path, tensor: Option<&str>, output: &Path) -> Result<ExitCode> {
    /// Activations encoded at a time.
    const ROWS: i64 = 4096;
    if input.is_dir() {
        bail!(
            InputError::new(format!("--input is a folder, {}", input.display())).help(
                "give a .safetensors, .npz or .npy file; a folder of activations is a source, `activation_cache`"
            )
        );
    }
    if let Some(dir) = output.parent().filter(|dir| !dir.as_os_str().is_empty() && !dir.is_dir()) {
        bail!(
            InputError::new(format!("there is no folder {} to write --output to", dir.display()))
                .help(format!("make it: `mkdir -p {}`", dir.display()))
        );
    }
    let device = device::best();
    let saved = saved::read(sae_dir, device, device::Precision::Float32)?;
    let (x, said) = activations_in(input, tensor)?;
    let width = saved.dictionary.dims().input;
    if x.dim() != 2 || x.size()[1] != width {
        bail!(
            InputError::new(format!("{}: {said} has shape {:?}", input.display(), x.size()))
                .help(format!("the SAE takes activations [N, {width}]"))
        );
    }
    if std::path::absolute(input)? == std::path::absolute(output)? {
        bail!(
            InputError::new(format!("--output is --input, {}", input.display()))
                .help("the input would be lost: write to another file")
        );
    }
    let bad: Vec<i64> = x.isfinite().all_dim(1, false).logical_not().nonzero().reshape([-1]).try_into()?;
    if let Some(row) = bad.first() {
        bail!(
            InputError::new(format!("{}: row {row} of {said} has a value that is not finite", input.display()))
                .help("mend or remove the row")
        );
    }
    let (mut features, mut recon) = (Vec::new(), Vec::new());
    tch::no_grad(|| {
        for rows in x.split(ROWS, 0) {
            let rows = rows.to_device(device).to_kind(tch::Kind::Float);
            let (x_hat, encoded) = saved.dictionary.reconstruct(&rows);
            features.push(encoded.to_device(tch::Device::Cpu));
            recon.push(x_hat.to_device(tch::Device::Cpu));
        }
    });
    tensors::write(output, &[("features", Tensor::cat(&features, 0)), ("recon", Tensor::cat(&recon, 0))])?;
    say!("{} activations encoded to {}", x.size()[0], output.display());
    Ok(ExitCode::SUCCESS)
}

/// Shows the strongest features of each token of a text.
fn encode_text(args: &EncodeArgs) -> Result<ExitCode> {
    if args.text.iter().all(|text| text.trim().is_empty()) {
        bail!(InputError::new("`--text` is empty").help("give a text for the model to read"));
    }
    saved::weights(&args.sae_dir)?;
    // The source takes texts from files, so it is given one, in which each is a record.
    let dir = tempfile::tempdir().context("no folder for temporary files")?;
    let file = dir.path().join("text.jsonl");
    let records: String = args.text.iter().map(|text| json!({"text": text}).to_string() + "\n").collect();
    tensors::write_file(&file, records.as_bytes())?;
    let own = own_config(&args.sae_dir, args.config.clone())?;
    let Some(text) = text::written(Wanted::Lines(&file)) else {
        bail!("no plugin that reads texts from files is linked in");
    };
    let given = ["source.shuffle=false".to_owned(), "source.pack=false".to_owned(), format!("source.text={text}")];
    let config = load(&own, None, args.set.iter().cloned().chain(given).collect())
        .map_err(|error| without_model(&own, args).unwrap_or(error))?;
    let (saved, shown) = features_of_text(args, &config).map_err(|error| config.written.locate(error))?;
    if let Some(output) = &args.output {
        let column = |tensor: fn(&Shown) -> &Tensor| {
            Tensor::cat(&shown.iter().map(|part| tensor(part).shallow_clone()).collect::<Vec<_>>(), 0)
        };
        tensors::write(
            output,
            &[
                ("x", column(|part| &part.x)),
                ("features", column(|part| &part.features)),
                ("recon", column(|part| &part.recon)),
                ("tokens", column(|part| &part.ids)),
            ],
        )?;
        say!("written to {}", output.display());
    }
    let tokens: Vec<Value> = shown.iter().map(|part| part.tokens(args.top)).collect::<Result<Vec<_>>>()?.concat();
    if tokens.is_empty() {
        bail!(InputError::new("there is no token in the text"));
    }
    if args.json {
        print(&serde_json::to_string(&json!({"sae": saved.name(), "tokens": tokens}))?)?;
    } else {
        print(&evaluate::token_table(&tokens))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Why no text can be read by the config's source, if it has no model to read it with.
fn without_model(config: &Path, args: &EncodeArgs) -> Option<anyhow::Error> {
    let source = load(config, None, args.set.clone()).ok()?.source;
    let name = source.typetag_name();
    let schema = (component(Kind::Source, name)?.schema)();
    if schema.pointer("/properties/text").is_some() {
        return None;
    }
    let error = InputError::new(format!(
        "`--text` needs a language model, and the source `{name}` of {} has none",
        config.display()
    ));
    let help = "`--config CONFIG.yaml` names a config whose source is the model that the activations are from; \
                `--input FILE` encodes activations";
    Some(error.help(help).into())
}

/// Tokens, and what an SAE made of them.
struct Shown {
    x: Tensor,
    features: Tensor,
    recon: Tensor,
    /// Token ids.
    ids: Tensor,
    /// Number of the text, and position in it.
    places: Vec<(i64, i64)>,
    texts: Vec<String>,
}

impl Shown {
    /// An object for each token, with its strongest features, those of the largest magnitude.
    fn tokens(&self, top: i64) -> Result<Vec<Value>> {
        // By magnitude: codes may be negative.
        let (_, indices) = self.features.abs().topk(top.min(self.features.size()[1]), 1, true, true);
        let values = self.features.gather(1, &indices, false);
        let (values, indices): (Vec<Vec<f64>>, Vec<Vec<i64>>) =
            (values.to_kind(tch::Kind::Double).try_into()?, indices.try_into()?);
        let ids: Vec<i64> = (&self.ids).try_into()?;
        let l0: Vec<i64> = self.features.not_equal(0.0).sum_dim_intlist(1, false, tch::Kind::Int64).try_into()?;
        let of = |row: usize| {
            let pairs = indices[row].iter().zip(&values[row]).filter(|(_, value)| **value != 0.0);
            let features: Vec<Value> =
                pairs.map(|(index, value)| json!({"index": index, "activation": *value as f32})).collect();
            let (text, position) = self.places[row];
            json!({"text": text, "position": position, "token_id": ids[row], "token": self.texts[row], "l0": l0[row],
                   "features": features})
        };
        Ok((0..ids.len()).map(of).collect())
    }
}

fn features_of_text(args: &EncodeArgs, config: &RunConfig) -> Result<(Saved, Vec<Shown>)> {
    let cx = source_cx(config)?;
    let saved = saved::read(&args.sae_dir, cx.device, device::Precision::Float32)?;
    let mut source = config.source.build(&cx).under("source")?;
    let sites = source.sites();
    let site = own_site(&saved, &sites).under("source")?;
    let width = saved.dictionary.dims().input;
    if width != sites[site].activation_dim {
        bail!(
            InputError::new(format!(
                "{} takes activations of width {width}, but the model's have width {}",
                args.sae_dir.display(),
                sites[site].activation_dim
            ))
            .field("source")
            .help("name the model and submodule that it was trained on")
        );
    }
    let longest = serde_json::to_value(&config.source)?["ctx_len"].as_i64();
    let mut shown: Vec<Shown> = Vec::new();
    while let Some(batch) = source.next_batch()? {
        let Some(tokens) = batch.tokens else { bail!("the source does not say which tokens its activations are of") };
        let x = batch.sites[site].x.shallow_clone();
        let (recon, features) = tch::no_grad(|| saved.dictionary.reconstruct(&x));
        let cpu = |tensor: &Tensor| tensor.to_device(tch::Device::Cpu);
        let columns: Vec<Vec<i64>> = cpu(&tokens).try_into()?;
        let ids: Vec<i64> = columns.iter().map(|row| row[0]).collect();
        let Some(model) = source.language_model() else { bail!("the source has no language model") };
        shown.push(Shown {
            x: cpu(&x),
            features: cpu(&features),
            recon: cpu(&recon),
            texts: model.token_texts(&ids)?,
            ids: Tensor::from_slice(&ids),
            places: columns.iter().map(|row| (row[1], row[2])).collect(),
        });
    }
    let places = shown.iter().flat_map(|part| &part.places);
    if let Some(length) = longest.filter(|length| places.clone().any(|(_, position)| position + 1 >= *length)) {
        let most = source.language_model().and_then(|source| source.model().max_positions());
        let more = match most.filter(|most| length >= *most) {
            Some(_) => "the longest that the model takes",
            None => "`--set source.ctx_len=N` takes more",
        };
        say!("a text is cut to a context of {length} tokens; {more}");
    }
    Ok((saved, shown))
}

fn import(name: &str, request: &formats::Request, out: Option<&Path>, list: Option<&str>) -> Result<ExitCode> {
    if let Some(glob) = list {
        let wanted = formats::glob(glob)?;
        let offers = formats::named(name)?.offers(request)?;
        let shown: Vec<_> = offers.iter().filter(|(offer, _)| wanted.matches(offer)).collect();
        let width = shown.iter().map(|(offer, _)| offer.len()).max().unwrap_or(0);
        let line = |(offer, about): &&(String, String)| format!("{offer:width$}  {about}").trim_end().to_owned() + "\n";
        print(&printable(&shown.iter().map(line).collect::<String>()))?;
        say!("{} of {} names match", shown.len(), offers.len());
        return Ok(ExitCode::SUCCESS);
    }
    for dir in formats::import(name, request, out)? {
        print(&dir.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn activations(args: &ConfigArgs, out: &Path, limit: Option<i64>, dtype: Dtype) -> Result<ExitCode> {
    let mut config = args.load()?;
    let source = component(Kind::Source, config.source.typetag_name()).map(|source| (source.schema)());
    if source.is_some_and(|schema| schema.pointer("/properties/shuffle").is_some()) {
        // "In order" is what the command promises, whatever the config's training wants.
        let in_order = args.set.iter().cloned().chain(["source.shuffle=false".to_owned()]).collect();
        config = load(&args.config, args.profile.clone(), in_order)?;
    }
    let interrupt = signals::listen()?;
    let source = source_cx(&config).and_then(|cx| config.source.build(&cx).under("source"));
    if source.is_err() && interrupt.asked() {
        return Ok(ExitCode::from(interrupt.status()));
    }
    let mut source = source.map_err(|error| config.written.locate(error))?;
    let manifest = harvest::write(&mut *source, out, limit, dtype, &interrupt);
    let manifest = manifest.map_err(|error| config.written.locate(error))?;
    say!("{} activations written to {}", manifest.activations, out.display());
    Ok(ExitCode::from(if manifest.complete { 0 } else { interrupt.status() }))
}

fn kind(name: &str) -> Result<Kind> {
    Kind::parse(name).ok_or_else(|| {
        let known: Vec<&str> = Kind::ALL.into_iter().map(Kind::plural).collect();
        let near = nearest(name, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
        InputError::new(format!("unknown kind `{name}`"))
            .help(format!("{}known: {}", near.unwrap_or_default(), known.join(", ")))
            .into()
    })
}

fn list(name: Option<&str>) -> Result<ExitCode> {
    let kinds = match name {
        Some(name) => vec![kind(name)?],
        None => Kind::ALL.to_vec(),
    };
    let width = kinds.iter().flat_map(|kind| registry::names(*kind)).map(str::len).max().unwrap_or(0);
    let mut text = String::new();
    for (index, kind) in kinds.iter().filter(|kind| name.is_some() || !components(**kind).is_empty()).enumerate() {
        if name.is_none() {
            text += &format!("{}{}\n", if index > 0 { "\n" } else { "" }, kind.plural());
        }
        let indent = if name.is_none() { "  " } else { "" };
        for Component { name, summary, .. } in components(*kind) {
            text += &format!("{indent}{name:width$}  {summary}\n");
        }
    }
    if text.is_empty() {
        say!("none are linked in");
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn describe(kind_name: &str, name: &str) -> Result<ExitCode> {
    let kind = kind(kind_name)?;
    let Some(component) = component(kind, name) else {
        let known = registry::names(kind);
        let near = nearest(name, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
        bail!(InputError::new(format!("unknown {kind} `{name}`")).help(format!(
            "{}known: {}",
            near.unwrap_or_default(),
            known.join(", ")
        )));
    };
    print(&describe::text(component))?;
    Ok(ExitCode::SUCCESS)
}

fn docs(out: &Path) -> Result<ExitCode> {
    let pages = describe::pages();
    for (path, page) in &pages {
        let path = out.join(path);
        let dir = path.parent().unwrap_or(out);
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        tensors::write_file(&path, page.as_bytes())?;
    }
    say!("{} pages written to {}", pages.len(), out.display());
    Ok(ExitCode::SUCCESS)
}
