//! The arguments of each command.

use super::output::say;
use crate::config;
use crate::config::{RunConfig, Sources};
use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use dictlearn_core::data::manifest::Dtype;
use dictlearn_core::error::printable;
use std::path::{Path, PathBuf};

/// Train and evaluate sparse autoencoders on language-model activations, from YAML.
#[derive(Debug, Parser)]
#[command(name = "dictlearn", version, max_term_width = 100)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
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
        #[arg(long, default_value_t, value_parser = dtypes())]
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
pub(super) struct EncodeArgs {
    /// The SAE's folder.
    pub(super) sae_dir: PathBuf,
    /// A file with activations [N, d]: .safetensors or .npz with a tensor `x`, or .npy.
    #[arg(long, value_name = "FILE", requires = "output")]
    pub(super) input: Option<PathBuf>,
    /// The tensor of `--input`, if it is not called `x`: `activations` in what `dictlearn activations` writes.
    #[arg(long, value_name = "NAME", requires = "input")]
    pub(super) tensor: Option<String>,
    /// The .safetensors file to write: `features` [N, F] and `recon` [N, d_out]; of a text also `x` [N, d] and `tokens` [N].
    #[arg(long, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,
    /// A text for the SAE's model to read: each token's strongest features are shown. May be given several times.
    #[arg(long, value_name = "TEXT")]
    pub(super) text: Vec<String>,
    /// How many features to show of each token.
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(i64).range(1..))]
    pub(super) top: i64,
    /// Print the tokens and their features as one JSON value instead of a table.
    #[arg(long, requires = "text")]
    pub(super) json: bool,
    /// The config whose source says which model to run and where to read it; by default the SAE's own.
    #[arg(long, value_name = "CONFIG.yaml")]
    pub(super) config: Option<PathBuf>,
    /// Change a key of the config: `--set source.model=folder`.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    /// The config.
    pub(super) config: PathBuf,
    /// Change a key of the config: `--set saes[0].trainer.lr=1e-4`.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Use one of the config's profiles.
    #[arg(long, value_name = "NAME")]
    pub(super) profile: Option<String>,
}

impl ConfigArgs {
    pub(super) fn load(&self) -> Result<RunConfig> {
        load(&self.config, self.profile.clone(), self.set.clone())
    }

    /// The same for a run. An error has what is wrong with its parts too.
    pub(super) fn load_to_train(&self) -> Result<RunConfig> {
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

pub(super) fn load(file: &Path, profile: Option<String>, set: Vec<String>) -> Result<RunConfig> {
    load_from(&Sources { file: file.to_owned(), profile, set, variables: config::variables(), ..Sources::default() })
}

pub(super) fn load_from(sources: &Sources) -> Result<RunConfig> {
    let config = config::load(sources)?;
    config.written.notes().iter().for_each(|note| say!("{}", printable(note)));
    Ok(config)
}

/// The types of activations on disk, by their names.
fn dtypes() -> impl TypedValueParser<Value = Dtype> {
    let names = Dtype::ALL.map(Dtype::name);
    PossibleValuesParser::new(names)
        .try_map(|name| Dtype::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or("unknown type"))
}
