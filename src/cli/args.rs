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
        /// Write the run to this folder instead of the config's `output_dir`.
        #[arg(long, value_name = "DIR")]
        output_dir: Option<PathBuf>,
        /// Resume from the run's last checkpoint; start if there is no run yet.
        #[arg(long)]
        resume: bool,
        /// Print the merged config with every default, shapes and memory use; do not train.
        #[arg(long)]
        dry_run: bool,
    },
    /// Evaluate trained SAEs.
    Eval {
        /// One or more SAE folders, or run folders to evaluate all their SAEs.
        #[arg(value_name = "SAE_OR_RUN", required = true)]
        places: Vec<PathBuf>,
        /// Config that provides source and metrics; by default, the one that each SAE was trained with.
        #[arg(long, value_name = "CONFIG.yaml")]
        config: Option<PathBuf>,
        /// Override a config key: `--set 'source.text={type: text_files, path: mine.txt}'` sets the text.
        ///
        /// Overrides of `source` also apply to `eval_source`, if the config has one.
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
        /// Print JSON instead of a table: one object, or for several SAEs a list, each object with its path as `sae`.
        #[arg(long)]
        json: bool,
        /// Also write the results to each SAE's eval.json.
        #[arg(long)]
        save: bool,
    },
    /// Compare the SAEs of runs: differences of their configs, and their metrics.
    Compare {
        /// One or more SAE folders, run folders, or folders of runs.
        #[arg(value_name = "RUN_OR_SAE", required = true)]
        places: Vec<PathBuf>,
        /// Sort by a config key or a metric: `--sort l0`, or `--sort=-l0` for descending order.
        #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
        sort: Option<String>,
        /// Print a JSON list of objects with every metric.
        #[arg(long, conflicts_with = "csv")]
        json: bool,
        /// Print comma-separated values with every numeric metric.
        #[arg(long)]
        csv: bool,
    },
    /// Write the activations of a config's source to disk, in order.
    Activations {
        #[command(flatten)]
        config: ConfigArgs,
        /// Output folder.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Stop after this many activations; by default, read the data once to its end.
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(i64).range(1..))]
        limit: Option<i64>,
        /// Dtype on disk: `float32`, or `bfloat16` or `float16` at half the size.
        #[arg(long, default_value_t, value_parser = dtypes())]
        dtype: Dtype,
    },
    /// Encode activations from a file, or show the strongest features of each token of a text.
    Encode(EncodeArgs),
    /// Import a published SAE into a folder that `eval`, `encode`, `export` and `init_from` accept.
    Import {
        /// `sae_lens`, `gemma_scope`, `dictionary_learning`, ... (`dictlearn list formats`).
        format: String,
        /// A folder or file, `owner/name[@revision]/path` on the Hub, or (sae_lens) `release:sae_id`.
        #[arg(value_name = "PATH_OR_REPO")]
        place: Option<String>,
        /// Output folder; `saes/<name>` by default.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Name of one of the format's published SAEs, or a glob that matches several.
        #[arg(long, value_name = "NAME")]
        pretrained: Option<String>,
        /// sae_lens's release table, pretrained_saes.yaml; by default, that of the installed Python package, or a bundled one.
        #[arg(long, value_name = "FILE")]
        releases: Option<String>,
        /// List the format's published SAEs by name instead of importing.
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
        /// Output folder.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Upload a trained SAE to the Hugging Face Hub, with a model card.
    Push {
        /// The SAE's folder.
        sae_dir: PathBuf,
        /// Hub repository `owner/name`, created if missing; add `@BRANCH` for a branch other than main.
        #[arg(value_name = "REPO[@BRANCH]")]
        repo: String,
        /// Folder inside the repository; its root by default.
        #[arg(long, value_name = "PATH_IN_REPO")]
        path: Option<String>,
        /// Make the repository private.
        #[arg(long)]
        private: bool,
        /// Commit message.
        #[arg(long, value_name = "TEXT")]
        message: Option<String>,
        /// Print the files and the model card without uploading.
        #[arg(long)]
        dry_run: bool,
    },
    /// List the registered components: dictionaries, trainers, modifiers, ...
    List {
        /// List one kind only, such as `trainers`.
        kind: Option<String>,
    },
    /// Show a component's fields with defaults and docs, its paper, and an example.
    Describe {
        /// `dictionary`, `trainer`, `modifier`, `source`, `text`, `metric`, `logger`, `model` or `format`.
        kind: String,
        /// The component's name in a config.
        name: String,
    },
    /// Print the JSON Schema of configs, for completion in an editor.
    Schema,
    /// Create a plugin crate for your own component: it builds, and its test passes.
    NewPlugin {
        /// `dictionary` (with its trainer), `modifier`, `source`, `text`, `metric`, `logger`, `model` or `format`.
        kind: String,
        /// The component's name in a config, such as `log_penalty`.
        name: String,
        /// Output folder.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Folder of dictlearn's source code; by default, where this program was built.
        #[arg(long, value_name = "DIR")]
        dictlearn: Option<PathBuf>,
    },
    /// Check this machine: versions, device, speed, and correctness of training steps.
    ///
    /// Exits with status 1 if a check fails. Include the output in bug reports.
    Doctor {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Write the Markdown reference: one page for each component, as shown by `describe`.
    Docs {
        /// Output folder, with a subfolder for each kind.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["input", "text"])))]
pub(super) struct EncodeArgs {
    /// The SAE's folder.
    pub(super) sae_dir: PathBuf,
    /// File of activations [N, d]: .safetensors or .npz with a tensor `x`, or .npy.
    #[arg(long, value_name = "FILE", requires = "output")]
    pub(super) input: Option<PathBuf>,
    /// Name of the tensor in `--input`; `x` by default, `activations` in files from `dictlearn activations`.
    #[arg(long, value_name = "NAME", requires = "input")]
    pub(super) tensor: Option<String>,
    /// Output .safetensors file: `features` [N, F] and `recon` [N, d_out]; for a text also `x` [N, d] and `tokens` [N].
    #[arg(long, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,
    /// Text for the SAE's model to read; each token's strongest features are shown. Repeatable.
    #[arg(long, value_name = "TEXT")]
    pub(super) text: Vec<String>,
    /// Number of features to show for each token.
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(i64).range(1..))]
    pub(super) top: i64,
    /// Print the tokens and their features as one JSON value instead of a table.
    #[arg(long, requires = "text")]
    pub(super) json: bool,
    /// Config whose source names the model and the hook point; by default, the SAE's own.
    #[arg(long, value_name = "CONFIG.yaml")]
    pub(super) config: Option<PathBuf>,
    /// Override a config key: `--set source.model=folder`.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    /// Path of the config.
    pub(super) config: PathBuf,
    /// Override a config key: `--set saes[0].trainer.lr=1e-4`.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Apply one of the config's profiles.
    #[arg(long, value_name = "NAME")]
    pub(super) profile: Option<String>,
}

impl ConfigArgs {
    pub(super) fn load(&self) -> Result<RunConfig> {
        load(&self.config, self.profile.clone(), self.set.clone())
    }

    /// Loads a config to train. The error also lists mistakes found by building the valid parts.
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

/// Parses the dtype of activations on disk.
fn dtypes() -> impl TypedValueParser<Value = Dtype> {
    let names = Dtype::ALL.map(Dtype::name);
    PossibleValuesParser::new(names)
        .try_map(|name| Dtype::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or("unknown type"))
}
