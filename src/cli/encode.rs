//! `dictlearn encode`.

use super::args::{EncodeArgs, load};
use super::output::{print, say};
use crate::config::RunConfig;
use crate::evaluate::{own_config, own_site, source_cx};
use crate::run::evaluate;
use anyhow::{Context, Result, bail};
use dictlearn_core::data::text;
use dictlearn_core::data::text::Wanted;
use dictlearn_core::error::{InputError, Under};
use dictlearn_core::files::numpy;
use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::machine::device;
use dictlearn_core::registry::{ComponentKind, find};
use dictlearn_core::sae::saved;
use dictlearn_core::sae::saved::Saved;
use dictlearn_core::suggest::nearest;
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use tch::Tensor;

/// Returns the activations to encode, and their name in messages.
pub(super) fn activations_in(input: &Path, tensor: Option<&str>) -> Result<(Tensor, String)> {
    let name = tensor.unwrap_or("x");
    let said = format!("tensor `{name}`");
    let other_name = |names: &[String]| -> InputError {
        let near = nearest(name, names.iter().map(String::as_str));
        let shown = near.or(names.first().map(String::as_str)).unwrap_or_default();
        InputError::new(format!("{} has no {said}", input.display())).help(if names.is_empty() {
            "the file has no tensors".to_owned()
        } else {
            format!("choose another, such as `--tensor {shown}`; it has: {}", names.join(", "))
        })
    };
    let extension = input.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "npy" => match tensor {
            None => Ok((numpy::read_npy(input)?, "the array".to_owned())),
            Some(_) => bail!(
                InputError::new(format!("{} has a single array without a name", input.display()))
                    .help("omit `--tensor`")
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

pub(super) fn encode(sae_dir: &Path, input: &Path, tensor: Option<&str>, output: &Path) -> Result<ExitCode> {
    /// Activations per encoding pass.
    const ROWS: i64 = 4096;
    if input.is_dir() {
        bail!(InputError::new(format!("--input is a folder, {}", input.display())).help(
            "give a .safetensors, .npz or .npy file; read a folder of activations with the source `activation_cache`"
        ));
    }
    if let Some(dir) = output.parent().filter(|dir| !dir.as_os_str().is_empty() && !dir.is_dir()) {
        bail!(
            InputError::new(format!("the folder of --output does not exist: {}", dir.display()))
                .help(format!("create it: `mkdir -p {}`", dir.display()))
        );
    }
    let device = device::best();
    let saved = saved::read(sae_dir, device, device::Precision::Float32)?;
    let (x, said) = activations_in(input, tensor)?;
    let width = saved.dictionary.dims().input;
    let contexts = saved.dictionary.reads_contexts();
    if x.dim() != if contexts { 3 } else { 2 } || x.size().last() != Some(&width) {
        bail!(InputError::new(format!("{}: {said} has shape {:?}", input.display(), x.size())).help(match contexts {
            true => format!(
                "features depend on earlier positions: the SAE takes whole contexts [B, L, {width}], positions in order"
            ),
            false => format!("the SAE takes activations [N, {width}]"),
        }));
    }
    if std::path::absolute(input)? == std::path::absolute(output)? {
        bail!(
            InputError::new(format!("--output and --input are the same file, {}", input.display()))
                .help("write to another file, or the input would be lost")
        );
    }
    let bad: Vec<i64> =
        x.reshape([x.size()[0], -1]).isfinite().all_dim(1, false).logical_not().nonzero().reshape([-1]).try_into()?;
    if let Some(row) = bad.first() {
        bail!(
            InputError::new(format!("{}: row {row} of {said} has a value that is not finite", input.display()))
                .help("fix or remove the row")
        );
    }
    let (mut features, mut recon) = (Vec::new(), Vec::new());
    tch::no_grad(|| {
        let rows = if contexts { (ROWS / x.size()[1].max(1)).max(1) } else { ROWS };
        for rows in x.split(rows, 0) {
            let rows = rows.to_device(device).to_kind(tch::Kind::Float);
            let (x_hat, encoded) = saved.dictionary.reconstruct(&rows);
            features.push(encoded.to_device(tch::Device::Cpu));
            recon.push(x_hat.to_device(tch::Device::Cpu));
        }
    });
    tensors::write(output, &[("features", Tensor::cat(&features, 0)), ("recon", Tensor::cat(&recon, 0))])?;
    let count = x.numel() as i64 / width;
    say!("{count} activations encoded to {}", output.display());
    Ok(ExitCode::SUCCESS)
}

/// Shows the strongest features of each token of a text.
pub(super) fn encode_text(args: &EncodeArgs) -> Result<ExitCode> {
    if args.text.iter().all(|text| text.trim().is_empty()) {
        bail!(InputError::new("`--text` is empty").help("give a text for the model to read"));
    }
    saved::weights(&args.sae_dir)?;
    // The source reads texts from files: write them to one, a record each.
    let dir = tempfile::tempdir().context("cannot create a temporary folder")?;
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
        bail!(InputError::new("the text has no tokens"));
    }
    if args.json {
        print(&serde_json::to_string(&json!({"sae": saved.name(), "tokens": tokens}))?)?;
    } else {
        print(&evaluate::token_table(&tokens))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the error to show if the config's source has no language model to read a text.
pub(super) fn without_model(config: &Path, args: &EncodeArgs) -> Option<anyhow::Error> {
    let source = load(config, None, args.set.clone()).ok()?.source;
    let name = source.typetag_name();
    let schema = (find(ComponentKind::Source, name)?.schema)();
    if schema.pointer("/properties/text").is_some() {
        return None;
    }
    let error = InputError::new(format!(
        "`--text` needs a language model, and the source `{name}` of {} has none",
        config.display()
    ));
    let help = "give a config whose source runs the activations' model (`--config CONFIG.yaml`), or encode activations \
                (`--input FILE`)";
    Some(error.help(help).into())
}

/// Tokens with their activations, features and reconstructions.
pub(super) struct Shown {
    x: Tensor,
    features: Tensor,
    recon: Tensor,
    /// Token ids.
    ids: Tensor,
    /// Index of the text, and position in it.
    places: Vec<(i64, i64)>,
    texts: Vec<String>,
}

impl Shown {
    /// Returns an object for each token with its features of largest magnitude.
    pub(super) fn tokens(&self, top: i64) -> Result<Vec<Value>> {
        // By magnitude: features may be negative.
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

/// Returns rows and tokens (id, text, position) of each text whole, from batches that may end within a text.
fn contexts_of(batches: &[(Tensor, Tensor)]) -> Result<Vec<(Tensor, Tensor)>> {
    if batches.is_empty() {
        return Ok(Vec::new());
    }
    let rows = Tensor::cat(&batches.iter().map(|(rows, _)| rows).collect::<Vec<_>>(), 0);
    let tokens = Tensor::cat(&batches.iter().map(|(_, tokens)| tokens).collect::<Vec<_>>(), 0);
    let texts: Vec<i64> = tokens.select(1, 1).to_device(tch::Device::Cpu).try_into()?;
    let lengths: Vec<i64> = texts.chunk_by(|one, two| one == two).map(|text| text.len() as i64).collect();
    Ok(rows.split_with_sizes(&lengths, 0).into_iter().zip(tokens.split_with_sizes(&lengths, 0)).collect())
}

pub(super) fn features_of_text(args: &EncodeArgs, config: &RunConfig) -> Result<(Saved, Vec<Shown>)> {
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
            .help("use the model and submodule that it was trained on")
        );
    }
    let longest = serde_json::to_value(&config.source)?["ctx_len"].as_i64();
    let mut shown: Vec<Shown> = Vec::new();
    let mut parts = Vec::new();
    while let Some(batch) = source.next_batch()? {
        let Some(tokens) = batch.tokens else { bail!("the source does not report the tokens of its activations") };
        parts.push((batch.sites[site].x.shallow_clone(), tokens));
    }
    if saved.dictionary.reads_contexts() {
        parts = contexts_of(&parts)?;
    }
    for (x, tokens) in parts {
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
            Some(_) => "the model accepts no more",
            None => "`--set source.ctx_len=N` changes the limit",
        };
        say!("texts are truncated to a context of {length} tokens; {more}");
    }
    Ok((saved, shown))
}
