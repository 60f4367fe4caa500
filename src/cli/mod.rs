//! The command line.

mod args;
mod components;
mod encode;
mod eval;
mod output;
pub mod reference;
mod signals;
mod train;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::config;
use dictlearn_core::error::InputError;
use dictlearn_core::error::printable;

use crate::doctor;
use crate::new_plugin;
use crate::publish::Push;
use args::{Cli, Command};
use components::{activations, describe, docs, import, kind, list};
use dictlearn_core::formats;
use dictlearn_core::hub;
use dictlearn_core::machine::device;
use dictlearn_core::registry;
use dictlearn_core::sae::saved;
use encode::{encode, encode_text};
use eval::{compare, eval};
use output::{print, say};
use train::train;

/// Runs the program with every linked plugin. Call it from `main`.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    output::show();
    // libtorch's unforeseen errors, above all running out of memory, arrive as panics.
    std::panic::set_hook(Box::new(|panic| say!("error: {}", unforeseen(panic))));
    match std::panic::catch_unwind(|| registry::check().and_then(|()| run(cli.command))) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => fail(error),
        Err(_) => ExitCode::FAILURE,
    }
}

fn unforeseen(panic: &std::panic::PanicHookInfo) -> String {
    let payload = panic.payload();
    let message = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    let message = message.unwrap_or("unknown");
    if ["allocate memory", "out of memory"].iter().any(|want| message.contains(want)) {
        return "not enough memory\nhelp: make the dictionary, the batch or the buffer smaller; \
                `--dry-run` shows what they need"
            .to_owned();
    }
    let place = panic.location().map_or_else(String::new, |place| format!(" ({place})"));
    // The lines after the first are libtorch's stack trace.
    format!("{}{place}\nhelp: this should not happen; please report it", message.lines().next().unwrap_or_default())
}

/// Prints an error and returns the exit status: 2 for invalid input, 1 for any other error.
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
                "created {}; in that folder, `cargo test` tests the plugin, and \
                 `cargo run --release -- train CONFIG.yaml` runs dictlearn with it",
                out.display()
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Docs { out } => docs(&out),
    }
}

fn doctor(json: bool) -> Result<ExitCode> {
    let report = doctor::examine();
    print(&if json { serde_json::to_string(&report)? } else { report.to_string() })?;
    Ok(if report.healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
