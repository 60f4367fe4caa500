//! sae_lens: `cfg.json` and `sae_weights.safetensors`, of every version, and its table of releases.
//!
//! <https://github.com/decoderesearch/SAELens>. For an activation x `[d]` its SAEs compute:
//!
//! ```text
//! f = σ((norm(x) [− b_dec]) W_enc + b_enc)         σ: ReLU, the k largest, or those above a threshold
//! x̂ = norm⁻¹(f W_dec + b_dec) [+ W_skip x]
//! ```
//!
//! The import builds the class that computes exactly this: it moves a bias past the encoder, and folds factors and
//! decoder norms into the weights. It refuses, by name, whatever no class supports.

mod cfg;
mod export;
mod models;
mod table;
mod whitening;

use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::formats::{
    AffineSae, Format, Place, Published, Python, Request, SaeActivation, nothing_left, take, take_float, through,
};
use dictlearn_core::prelude::*;
use dictlearn_core::sae::saved::Saved;

use cfg::{Cfg, Normalize};
use whitening::Whitening;

/// A folder with cfg.json and sae_weights.safetensors, of any version of sae_lens, on disk or on the Hub; or
/// `release:sae_id` from its table of releases. The table comes from `--releases FILE`, the installed Python package, the
/// Hub's cache, or this program. `--list` shows its names, and says whether each SAE can be imported and its model run.
///
/// Architectures: standard, gated, topk, abstopk, jumprelu, matching_pursuit, transcoder, skip_transcoder,
/// jumprelu_transcoder, jumprelu_skip_transcoder, and batchtopk and matryoshka_batchtopk checkpoints. If activations were
/// normalised in training, the factor or the whitening is folded into the weights (`expected_average_only_in`,
/// `covariance_whitening`), or each activation is normalised here too (layer_norm, constant_norm_rescale). An SAE in
/// bfloat16 or float16 computes in that dtype, as in sae_lens.
///
/// On export, batch_top_k and matryoshka_batch_top_k become jumprelu with one threshold.
#[component(format "sae_lens", summary = "cfg.json and sae_weights.safetensors, of all versions; release names",
    paper = "Bloom et al., SAELens, https://github.com/decoderesearch/SAELens",
    example = "dictlearn import sae_lens gpt2-small-res-jb:blocks.8.hook_resid_pre")]
pub struct SaeLens {}

impl Format for SaeLens {
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        if let Some(names) = &request.pretrained {
            return table::find(names, request);
        }
        let name = request.named()?;
        match name.split_once(':') {
            Some((release, id)) if !std::path::Path::new(name).exists() => {
                Ok(vec![table::place(release, id, request)?])
            }
            _ => Ok(vec![Place::parse(name)?]),
        }
    }

    fn offers(&self, request: &Request) -> Result<Vec<(String, String)>> {
        table::offers(request)
    }

    fn coverage(&self) -> Option<String> {
        table::coverage().ok()
    }

    fn marks(&self) -> &'static [&'static str] {
        &["sae_weights.safetensors"]
    }

    fn read(&self, place: &Place) -> Result<Published> {
        read(place)
    }

    fn write(&self, sae: &Saved, dir: &std::path::Path) -> Result<()> {
        export::write(sae, dir)
    }

    fn writes(&self) -> bool {
        true
    }

    fn is_in(&self, dir: &std::path::Path) -> bool {
        ["cfg.json", "sae_weights.safetensors"].into_iter().all(|file| dir.join(file).is_file())
    }

    fn python(&self, _: Option<&Saved>) -> Option<Python> {
        Some(Python {
            library: "[sae_lens](https://github.com/decoderesearch/SAELens)",
            import: "from sae_lens import SAE",
            load: "sae = SAE.load_from_disk(folder)",
        })
    }
}

fn read(place: &Place) -> Result<Published> {
    let mut raw = place.json("cfg.json")?;
    if let Some(overrides) = place.table.get("config_overrides").and_then(Value::as_object) {
        // Since 6.0, part of the config is under `metadata`.
        if let Some(metadata) = raw.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.extend(overrides.clone());
        }
        if let Some(raw) = raw.as_object_mut() {
            raw.extend(overrides.clone());
        }
    }
    let cfg = Cfg::read(&raw)?;
    let mut tensors = TensorFile::open(&place.need("sae_weights.safetensors")?)?.tensors()?;
    let mut notes = cfg.notes.clone();

    // The factor by which training scaled activations, which the weights expect.
    let mut scale = None;
    if cfg.normalize == Normalize::ExpectedAverageOnlyIn {
        scale = norm_factor(place, &raw)?;
        if scale.is_none() {
            notes.push(
                "`normalize_activations` is `expected_average_only_in`, but no factor is given: activations are not \
                 scaled, as in sae_lens"
                    .to_owned(),
            );
        }
    }
    if !cfg.center.is_empty() {
        notes.push(format!(
            "it was trained with TransformerLens's {}, which changes the values at `{}`: features may differ",
            cfg.center.join(", "),
            cfg.site.submodule
        ));
    }
    // Integer data could hold any value that a damaged header claims.
    for (name, tensor) in &tensors {
        if !tensor.is_floating_point() {
            bail!(InputError::new(format!(
                "tensor `{name}` has the type {:?}, but must be floating point",
                tensor.kind()
            )));
        }
    }
    let sparsity = match place.file("sparsity.safetensors")? {
        Some(file) => TensorFile::open(&file)?.tensors()?.remove("sparsity"),
        None => None,
    };
    let published = |class: &str, tensors| Published {
        class: class.to_owned(),
        tensors,
        normalization: cfg.normalization(),
        dtype: cfg.dtype,
        site: (!cfg.site.submodule.is_empty()).then(|| cfg.site.clone()),
        trainer: cfg.kept.clone(),
        sparsity,
        notes,
        ..Published::default()
    };
    let output = |tensors: &mut std::collections::BTreeMap<String, Tensor>| -> Result<(Tensor, Tensor)> {
        let (w_dec, b_dec) = (single(take(tensors, "W_dec")?), double(take(tensors, "b_dec")?));
        let factor = finetuning_factor(tensors, &cfg)?;
        let w_dec = match factor {
            Some(factor) if factor.size() == [w_dec.size().first().copied().unwrap_or(0)] => {
                w_dec * single(factor).unsqueeze(1)
            }
            Some(factor) => bail!(InputError::new(format!(
                "`scaling_factor` has shape {:?}, but needs one value per feature",
                factor.size()
            ))),
            None => w_dec,
        };
        Ok(match scale {
            Some(scale) => (w_dec / scale, b_dec / scale),
            None => (w_dec, b_dec),
        })
    };
    // sae_lens holds the weights in this dtype, whatever the file has.
    if let Some(dtype) = cfg.dtype {
        let kind = if dtype == "bfloat16" { Kind::BFloat16 } else { Kind::Half };
        tensors.values_mut().for_each(|tensor| *tensor = tensor.to_kind(kind));
    }
    if cfg.architecture == "matching_pursuit" {
        let pursuit = pursuit(&mut tensors, &cfg, scale.unwrap_or(1.0))?;
        return Ok(published("MatchingPursuitSAE", pursuit));
    }
    let whitening = match cfg.normalize {
        Normalize::CovarianceWhitening => Some(Whitening::read(place, &cfg.architecture)?),
        _ => None,
    };
    let w_enc = single(take(&mut tensors, "W_enc")?);
    let w_enc = scale.map_or_else(|| w_enc.shallow_clone(), |scale| &w_enc * scale);

    if cfg.architecture == "gated" {
        let (mut w_dec, mut b_dec) = output(&mut tensors)?;
        let [b_gate, b_mag, r_mag] = ["b_gate", "b_mag", "r_mag"].map(|name| take(&mut tensors, name));
        let (b_gate, b_mag, r_mag) = (double(b_gate?), double(b_mag?), double(r_mag?));
        nothing_left(&tensors)?;
        // An SAE with a plain encoder, to check the shapes.
        let check = |bias: &Tensor| AffineSae {
            w_enc: w_enc.shallow_clone(),
            b_enc: bias.shallow_clone(),
            w_dec: w_dec.shallow_clone(),
            b_dec: b_dec.shallow_clone(),
            w_skip: None,
            subtract_b_dec: cfg.apply_b_dec_to_input,
            transcodes: false,
            activation: SaeActivation::Relu,
        };
        for bias in [&b_gate, &b_mag, &r_mag] {
            cfg.fits(check(bias).check()?)?;
        }
        // The class subtracts b_dec from its input. Where sae_lens does not, the biases compensate.
        let (moved, mut w_enc) = match cfg.apply_b_dec_to_input {
            true => (b_gate.zeros_like(), w_enc),
            false => (through(&b_dec, &w_enc), w_enc),
        };
        if let Some(whitening) = &whitening {
            // Both b_dec and the mean are subtracted from the input once folded, so `moved` stays the same.
            (w_enc, w_dec, b_dec) = whitening.folded(&w_enc, &w_dec, &b_dec)?;
        }
        let (b_gate, b_mag) = (b_gate + &moved, b_mag + moved * r_mag.exp());
        let tensors = [
            ("encoder.weight", w_enc.transpose(0, 1).contiguous()),
            ("decoder.weight", w_dec.transpose(0, 1).contiguous()),
            ("decoder_bias", b_dec),
            ("gate_bias", b_gate),
            ("mag_bias", b_mag),
            ("r_mag", r_mag),
        ];
        let named = |(name, tensor): (&str, Tensor)| (name.to_owned(), single(tensor));
        return Ok(published("GatedAutoEncoder", tensors.into_iter().map(named).collect()));
    }

    let (w_dec, b_dec) = output(&mut tensors)?;
    let mut affine = AffineSae {
        w_enc,
        b_enc: double(take(&mut tensors, "b_enc")?),
        w_dec: w_dec.shallow_clone(),
        b_dec,
        w_skip: tensors.remove("W_skip").map(single),
        subtract_b_dec: cfg.apply_b_dec_to_input,
        transcodes: cfg.architecture.ends_with("transcoder"),
        activation: SaeActivation::Relu,
    };
    if affine.w_skip.is_some() != cfg.architecture.contains("skip") {
        bail!(InputError::new(format!(
            "the architecture is `{}`, but the weights {} `W_skip`",
            cfg.architecture,
            match affine.w_skip {
                Some(_) => "have",
                None => "have no",
            }
        )));
    }
    // The class applies W_skip to its input; sae_lens applies it to the input before normalisation.
    if affine.w_skip.is_some() && cfg.normalization().is_some() {
        bail!(InputError::new(format!(
            "a skip connection with `normalize_activations: {}` is not supported",
            cfg.normalize.name()
        )));
    }
    cfg.fits(affine.check()?)?;
    let norms = || w_dec.norm_scalaropt_dim(2.0, [1], false);
    affine.activation = match cfg.architecture.as_str() {
        architecture @ ("topk" | "abstopk") => {
            let Some(k) = cfg.k else {
                bail!(InputError::new(format!("cfg.json has architecture `{architecture}` but no `k`")));
            };
            if architecture == "topk" { SaeActivation::TopK(k) } else { SaeActivation::AbsTopK(k) }
        }
        // A batchtopk checkpoint has one threshold for all features.
        "batchtopk" | "matryoshka_batchtopk" => {
            let threshold = double(take(&mut tensors, "topk_threshold")?);
            if threshold.numel() != 1 {
                bail!(InputError::new(format!(
                    "`topk_threshold` has shape {:?}, but must be one number",
                    threshold.size()
                )));
            }
            let scale = if cfg.rescale_acts_by_decoder_norm { scale.unwrap_or(1.0) } else { 1.0 };
            SaeActivation::Jump(affine.b_enc.ones_like() * threshold.reshape([1]) / scale)
        }
        "jumprelu" | "jumprelu_transcoder" | "jumprelu_skip_transcoder" => {
            SaeActivation::Jump(match tensors.remove("log_threshold") {
                Some(threshold) => double(threshold).exp(),
                None => double(take(&mut tensors, "threshold")?),
            })
        }
        _ => SaeActivation::Relu,
    };
    if cfg.rescale_acts_by_decoder_norm {
        // Features are in units of decoder row norms: multiply the encoder by the norms, divide the rows by them.
        let norms = norms();
        affine.w_enc *= norms.unsqueeze(0);
        affine.b_enc *= double(norms.shallow_clone());
        affine.w_dec = &w_dec / norms.unsqueeze(1);
    }
    if let Some(whitening) = &whitening {
        let b_dec = affine.b_dec.shallow_clone();
        (affine.w_enc, affine.w_dec, affine.b_dec) = whitening.folded(&affine.w_enc, &affine.w_dec, &b_dec)?;
        if !affine.subtract_b_dec {
            affine.b_enc -= whitening.through(&affine.w_enc);
        }
    }
    nothing_left(&tensors)?;
    cfg.fits(affine.check()?)?;
    let (class, tensors) = affine.into_class()?;
    Ok(published(class, tensors))
}

/// The tensors of a matching pursuit, which uses its decoder to encode. Training multiplied activations by `scale`.
fn pursuit(
    tensors: &mut std::collections::BTreeMap<String, Tensor>,
    cfg: &Cfg,
    scale: f64,
) -> Result<std::collections::BTreeMap<String, Tensor>> {
    if cfg.normalize == Normalize::CovarianceWhitening {
        bail!(
            InputError::new("`normalize_activations: covariance_whitening` is not supported for a matching pursuit")
                .help("it cannot be folded into weights that encode and decode; sae_lens refuses it too")
        );
    }
    let (w_dec, b_dec) = (take_float::<2>(tensors, "W_dec")?, take_float::<1>(tensors, "b_dec")?);
    nothing_left(tensors)?;
    let (features, d) = w_dec.size2()?;
    if b_dec.size() != [d] {
        bail!(InputError::new(format!("`b_dec` has shape {:?}, not [{d}]", b_dec.size())));
    }
    cfg.fits((d, features, d))?;
    // b_dec is added to reconstructions only if it is subtracted from activations.
    let b_dec = if cfg.apply_b_dec_to_input { b_dec / scale } else { b_dec.zeros_like() };
    let tensors = [
        ("W_dec", w_dec),
        ("b_dec", b_dec),
        ("residual_threshold", Tensor::from((cfg.pursuit.residual_threshold / scale) as f32)),
        ("max_iterations", Tensor::from(cfg.pursuit.max_iterations.unwrap_or(d))),
        ("stop_on_duplicate_support", Tensor::from(i64::from(cfg.pursuit.stop_on_duplicate_support))),
    ];
    Ok(tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect())
}

fn single(tensor: Tensor) -> Tensor {
    tensor.to_kind(Kind::Float)
}

/// Biases and factors are kept in double precision, so that folding loses no digits.
fn double(tensor: Tensor) -> Tensor {
    tensor.to_kind(Kind::Double)
}

/// The factor by which training multiplied activations, from the table, the config or a checkpoint's scaler.
fn norm_factor(place: &Place, raw: &Value) -> Result<Option<f64>> {
    let mut factor = place.table.get("norm_scaling_factor").or(raw.get("norm_scaling_factor")).and_then(Value::as_f64);
    if factor.is_none() && place.file("activation_scaler.json")?.is_some() {
        factor = place.json("activation_scaler.json")?["scaling_factor"].as_f64();
    }
    if let Some(factor) = factor.filter(|factor| *factor <= 0.0 || !factor.is_finite()) {
        bail!(InputError::new(format!(
            "the scaling factor of activations is {factor}, but must be finite and above 0"
        )));
    }
    Ok(factor)
}

/// The factor of each feature before decoding, in SAEs finetuned that way.
fn finetuning_factor(tensors: &mut std::collections::BTreeMap<String, Tensor>, cfg: &Cfg) -> Result<Option<Tensor>> {
    let Some(factor) = tensors.remove("finetuning_scaling_factor").or_else(|| tensors.remove("scaling_factor")) else {
        return Ok(None);
    };
    let factor = double(factor);
    if factor.allclose(&factor.ones_like(), 1e-5, 1e-8, false) {
        return Ok(None);
    }
    if !cfg.finetuning_scaling_factor {
        bail!(InputError::new(
            "the weights have a `scaling_factor`, but cfg.json does not set `finetuning_scaling_factor`"
        ));
    }
    Ok(Some(factor))
}
