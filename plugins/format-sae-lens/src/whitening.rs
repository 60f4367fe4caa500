//! Covariance whitening: a checkpoint of training keeps it in a file of its own; sae_lens folds it into finished SAEs.
//!
//! ```text
//! z = (x − μ) M          x̂ = ẑ M⁻¹ + μ
//! ```

use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::formats::{Place, nothing_left, take, through};
use dictlearn_core::prelude::*;

/// The whitening of activations `[d]`, in double precision.
pub struct Whitening {
    mean: Tensor,    // μ   [d]
    matrix: Tensor,  // M   [d, d]
    inverse: Tensor, // M⁻¹ [d, d]
}

impl Whitening {
    /// Reads the whitening of a checkpoint.
    pub fn read(place: &Place, architecture: &str) -> Result<Self> {
        if architecture.ends_with("transcoder") {
            bail!(InputError::new("`normalize_activations: covariance_whitening` is not supported for transcoders"));
        }
        let Some(file) = place.file("activation_whitening.safetensors")? else {
            bail!(
                InputError::new(format!(
                    "`normalize_activations` is `covariance_whitening`, but {place} has no activation_whitening.safetensors"
                ))
                .help("fold it in sae_lens before saving, or import the checkpoint's whole folder")
            );
        };
        let mut tensors = TensorFile::open(&file)?.tensors()?;
        let [mean, matrix, inverse] = ["mean", "matrix", "inverse_matrix"].map(|name| take(&mut tensors, name));
        let (mean, matrix, inverse) = (mean?, matrix?, inverse?);
        nothing_left(&tensors)?;
        let width = mean.size().first().copied().unwrap_or(0);
        for (name, tensor, wanted) in [
            ("mean", &mean, vec![width]),
            ("matrix", &matrix, vec![width; 2]),
            ("inverse_matrix", &inverse, vec![width; 2]),
        ] {
            if tensor.size() != wanted || width == 0 || !tensor.is_floating_point() {
                let (size, kind) = (tensor.size(), tensor.kind());
                bail!(InputError::new(format!(
                    "activation_whitening.safetensors: `{name}` has shape {size:?} and type {kind:?}, not floats {wanted:?}"
                )));
            }
        }
        let [mean, matrix, inverse] = [mean, matrix, inverse].map(|tensor| tensor.to_kind(Kind::Double));
        let identity = Tensor::eye(width, (Kind::Double, Device::Cpu));
        let off = (matrix.matmul(&inverse) - identity).abs().max().double_value(&[]);
        if off.is_nan() || off > 1e-3 {
            bail!(InputError::new(format!(
                "activation_whitening.safetensors: `matrix` times `inverse_matrix` is off the identity by {off:.1e}"
            )));
        }
        Ok(Whitening { mean, matrix, inverse })
    }

    /// Returns W_enc [d, F], W_dec [F, d] and b_dec `[d]` that read and write activations as the model makes them.
    pub fn folded(&self, w_enc: &Tensor, w_dec: &Tensor, b_dec: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let width = self.mean.size()[0];
        if w_enc.size()[0] != width || b_dec.size() != [width] {
            bail!(InputError::new(format!(
                "activation_whitening.safetensors is for activations of width {width}, but the weights have {}",
                w_enc.size()[0]
            )));
        }
        // In pieces: a copy of all weights in double precision may not fit into memory.
        let product = |pieces: Vec<Tensor>, dim: i64, times: &dyn Fn(&Tensor) -> Tensor| {
            let pieces: Vec<Tensor> =
                pieces.iter().map(|piece| times(&piece.to_kind(Kind::Double)).to_kind(Kind::Float)).collect();
            Tensor::cat(&pieces, dim)
        };
        Ok((
            product(w_enc.split(4096, 1), 1, &|piece| self.matrix.matmul(piece)),
            product(w_dec.split(4096, 0), 0, &|piece| piece.matmul(&self.inverse)),
            b_dec.to_kind(Kind::Double).unsqueeze(0).matmul(&self.inverse).squeeze_dim(0) + &self.mean,
        ))
    }

    /// Returns μ W_enc, `[F]`, for a folded encoder.
    pub fn through(&self, w_enc: &Tensor) -> Tensor {
        through(&self.mean, w_enc)
    }
}
