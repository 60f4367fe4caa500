//! A trained SAE, for encoding and decoding.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use dictlearn_core::error::InputError;
use dictlearn_core::formats::{self, Request};
use dictlearn_core::machine::device::Precision;
use dictlearn_core::registry::{self, ComponentKind};
use dictlearn_core::sae::saved::{self, Saved};
use dictlearn_core::sae::{Dictionary, Dims};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::Result;

/// A trained SAE.
///
/// Inputs may have any device and floating-point dtype. They are converted to float32 on the SAE's device, where
/// results stay. No autograd graph is built.
pub struct Sae {
    saved: Saved,
}

impl Sae {
    /// Loads an SAE: a folder that dictlearn wrote, or `FORMAT:NAME`. The format is one of `dictlearn list formats`.
    /// The name is what `dictlearn import` takes: a folder, `owner/name/path` on the Hugging Face Hub, or a release's
    /// SAE (`sae_lens:gpt2-small-res-jb:blocks.8.hook_resid_pre`). Files in the Hub's cache need no network.
    ///
    /// Weights are placed on the first GPU, or on the CPU if there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) if the SAE does not exist or is damaged, [`Error::Hub`](crate::Error::Hub)
    /// if the Hub cannot be reached.
    pub fn load(place: impl AsRef<OsStr>) -> Result<Self> {
        Sae::load_on(place, dictlearn_core::machine::device::best())
    }

    /// As [`Sae::load`], onto a given device.
    pub fn load_on(place: impl AsRef<OsStr>, device: Device) -> Result<Self> {
        let dir = Path::new(place.as_ref());
        if dir.is_dir() {
            return Ok(Sae { saved: saved::read(dir, device, Precision::Float32)? });
        }
        let place = dir.to_string_lossy();
        let named = place.split_once(':').filter(|(format, _)| registry::find(ComponentKind::Format, format).is_some());
        let Some((format, name)) = named else {
            let known = registry::names(ComponentKind::Format).join(", ");
            return Err(InputError::new(format!("`{place}` is neither a folder nor `FORMAT:NAME`"))
                .help(format!("the formats are {known}"))
                .into());
        };
        Ok(Sae { saved: formats::load(format, name, device)? })
    }

    pub(crate) fn with_config(name: &str, dictionary: Box<dyn Dictionary>, config: Value) -> Self {
        Sae { saved: Saved { dir: PathBuf::from(name), dictionary, normalization: None, config } }
    }

    /// Returns the features [.., F] of activations [.., d].
    ///
    /// A dictionary whose features depend on earlier positions (`TemporalSAE`) takes whole contexts [.., L, d], with
    /// positions in order.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) where the last dimension is not d.
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.own(x, self.dims().input, "activations")?;
        Ok(tch::no_grad(|| self.dictionary().encode(&x)))
    }

    /// Decodes features [.., F] to [.., d_out].
    ///
    /// For SAEs with input normalisation or a skip connection use [`Sae::reconstruct`], which knows the activation.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) if the last dimension is not F.
    pub fn decode(&self, features: &Tensor) -> Result<Tensor> {
        let features = self.own(features, self.dims().features, "features")?;
        Ok(tch::no_grad(|| self.dictionary().decode(&features)))
    }

    /// Returns the reconstruction [.., d_out] of activations [.., d].
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) where the last dimension is not d.
    pub fn reconstruct(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.own(x, self.dims().input, "activations")?;
        Ok(tch::no_grad(|| self.dictionary().reconstruct(&x).0))
    }

    /// Returns the widths of its input, features and output: d, F and d_out.
    pub fn dims(&self) -> Dims {
        self.dictionary().dims()
    }

    /// Returns the decoder directions [F, d_out], in units of the output: add a multiple of a row to steer a model.
    pub fn directions(&self) -> Option<Tensor> {
        tch::no_grad(|| self.dictionary().directions().map(|directions| directions.detach()))
    }

    /// Returns the reference's class, such as `AutoEncoderTopK`.
    pub fn class(&self) -> &'static str {
        self.dictionary().class()
    }

    /// Returns the device of its tensors.
    pub fn device(&self) -> Device {
        self.dictionary().device()
    }

    /// Returns its config.json, which describes the SAE and the site that it was trained at.
    pub fn config(&self) -> &Value {
        &self.saved.config
    }

    /// Returns the underlying dictionary.
    pub fn dictionary(&self) -> &dyn Dictionary {
        &*self.saved.dictionary
    }

    /// Writes the SAE to a folder, as training does: `ae.safetensors`, `ae.pt` and `config.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`](crate::Error::Io) if the folder cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        Ok(saved::write(dir.as_ref(), self.dictionary(), &self.saved.config)?)
    }

    /// Writes the SAE to a new folder in another library's format (`sae_lens`), as `dictlearn export` does.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) if the format cannot express the SAE, or the folder exists already.
    pub fn export(&self, format: &str, dir: impl AsRef<Path>) -> Result<()> {
        Ok(formats::export(&self.saved, format, dir.as_ref())?)
    }

    /// Returns the caller's tensor on the SAE's device, as float32.
    fn own(&self, tensor: &Tensor, width: i64, what: &str) -> Result<Tensor> {
        if tensor.size().last() != Some(&width) || !tensor.is_floating_point() {
            return Err(InputError::new(format!(
                "{what} have shape {:?} and type {:?}; this SAE takes floats [.., {width}]",
                tensor.size(),
                tensor.kind()
            ))
            .into());
        }
        Ok(tensor.detach().to_device(self.device()).to_kind(Kind::Float))
    }
}

impl std::fmt::Debug for Sae {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sae").field("class", &self.class()).field("dims", &self.dims()).finish_non_exhaustive()
    }
}

/// Imports published SAEs into folders, as `dictlearn import` does, and returns the folders. `name` is what
/// [`Sae::load`] takes after the format; `out` is the folder of a single SAE, or the parent folder of several.
///
/// # Errors
///
/// As [`Sae::load`]; [`Error::Input`](crate::Error::Input) if a folder exists already.
pub fn import(format: &str, name: &str, out: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let request = Request { place: Some(name.to_owned()), ..Request::default() };
    Ok(formats::import(format, &request, Some(out.as_ref()))?)
}
