//! `example_name`: ReLU SAEs as one safetensors file, `weights.safetensors` with the tensors `enc` [d, F], `enc_bias`
//! `[F]`, `dec` [F, d] and `dec_bias` `[d]`. Change it into your own.

use std::path::Path;

use dictlearn_core::formats::{SaeActivation, AffineSae, Format, Place, Published, take};
use dictlearn_core::prelude::*;
use dictlearn_core::sae::saved::Saved;
use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;

/// ReLU SAEs as one safetensors file.
#[component(format "example_name", summary = "ReLU SAEs as one safetensors file",
    example = "dictlearn import example_name DIR")]
pub struct ExampleName {}

impl Format for ExampleName {
    fn read(&self, place: &Place) -> Result<Published> {
        // A local folder or one on the Hub: `need` fetches a file, or lists the existing files if it is missing.
        let mut tensors = TensorFile::open(&place.need("weights.safetensors")?)?.tensors()?;
        let (class, tensors) = AffineSae {
            w_enc: take(&mut tensors, "enc")?,
            b_enc: take(&mut tensors, "enc_bias")?,
            w_dec: take(&mut tensors, "dec")?,
            b_dec: take(&mut tensors, "dec_bias")?,
            w_skip: None,
            subtract_b_dec: false,
            transcodes: false,
            activation: SaeActivation::Relu,
        }
        .into_class()?;
        Ok(Published { class: class.to_owned(), tensors, ..Published::default() })
    }

    fn write(&self, sae: &Saved, dir: &Path) -> Result<()> {
        let class = sae.dictionary.class();
        if class != "AutoEncoderNew" || sae.normalization.is_some() {
            bail!(InputError::new(format!("this format cannot hold the class {class}")).help("it holds AutoEncoderNew"));
        }
        let state = sae.dictionary.state_dict();
        let get = |name: &str| state.iter().find(|(known, _)| *known == name).map(|(_, tensor)| tensor.detach());
        let turned = |name: &str| get(name).map(|tensor| tensor.transpose(0, 1).contiguous());
        let named = [
            ("enc", turned("encoder.weight")),
            ("enc_bias", get("encoder.bias")),
            ("dec", turned("decoder.weight")),
            ("dec_bias", get("decoder.bias")),
        ];
        let named: Vec<(&str, Tensor)> = named.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect();
        tensors::write(&dir.join("weights.safetensors"), &named)
    }

    fn writes(&self) -> bool {
        true
    }
}
