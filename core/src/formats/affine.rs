//! The common form of published SAEs: two affine maps with an activation between them.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use tch::{Device, Tensor};

use crate::error::InputError;
use crate::sae::Layout;

/// An SAE in the form of most formats: x̂ = σ((x [− b_dec]) W_enc + b_enc) W_dec + b_dec.
#[derive(Debug)]
pub struct AffineSae {
    /// [d, F].
    pub w_enc: Tensor,
    /// `[F]`.
    pub b_enc: Tensor,
    /// [F, d_out].
    pub w_dec: Tensor,
    /// `[d_out]`.
    pub b_dec: Tensor,
    /// [d_out, d], of a skip connection.
    pub w_skip: Option<Tensor>,
    /// True if b_dec is subtracted from each activation before encoding.
    pub subtract_b_dec: bool,
    /// True for a transcoder, which predicts something other than its input.
    pub transcodes: bool,
    /// The activation function σ.
    pub activation: SaeActivation,
}

/// How pre-activations become features.
#[derive(Debug)]
pub enum SaeActivation {
    /// Keeps the positive pre-activations.
    Relu,
    /// Keeps the k largest of the positive pre-activations.
    TopK(i64),
    /// Keeps the k pre-activations of largest magnitude, with their signs.
    AbsTopK(i64),
    /// Keeps the pre-activations above both 0 and a threshold, `[F]`.
    Jump(Tensor),
}

/// Returns the shape of a tensor that must have N dimensions and not be empty.
fn shape<const N: usize>(name: &str, tensor: &Tensor) -> Result<[i64; N]> {
    let size = tensor.size();
    let wrong = || InputError::new(format!("`{name}` has shape {size:?}, which does not have {N} dimensions"));
    let shape: [i64; N] = size.as_slice().try_into().map_err(|_| wrong())?;
    if shape.contains(&0) {
        bail!(InputError::new(format!("`{name}` has shape {size:?}: it is empty")));
    }
    Ok(shape)
}

impl AffineSae {
    /// Checks that the tensors' shapes agree. Returns (d, F, d_out).
    pub fn check(&self) -> Result<(i64, i64, i64)> {
        let [d, features] = shape("W_enc", &self.w_enc)?;
        let [rows, d_out] = shape("W_dec", &self.w_dec)?;
        let fits =
            |name: &str, tensor: &Tensor, wanted: &[i64]| -> Result<()> {
                if tensor.size() != wanted {
                    bail!(
                        InputError::new(format!("`{name}` has shape {:?}, not {wanted:?}", tensor.size()))
                            .help(format!("with W_enc {:?} and W_dec {:?}", self.w_enc.size(), self.w_dec.size()))
                    );
                }
                Ok(())
            };
        if rows != features {
            bail!(
                InputError::new(format!("W_enc has {features} features and W_dec has {rows}"))
                    .help("W_enc is [d, F], W_dec [F, d]")
            );
        }
        fits("b_enc", &self.b_enc, &[features])?;
        fits("b_dec", &self.b_dec, &[d_out])?;
        if let Some(w_skip) = &self.w_skip {
            fits("W_skip", w_skip, &[d_out, d])?;
        }
        match &self.activation {
            SaeActivation::Jump(threshold) => fits("threshold", threshold, &[features])?,
            SaeActivation::TopK(k) | SaeActivation::AbsTopK(k) if !(1..=features).contains(k) => {
                bail!(InputError::new(format!("`k` is {k}, but there are {features} features")))
            }
            _ => {}
        }
        if !self.transcodes && d != d_out {
            bail!(
                InputError::new(format!("its input has width {d}, but its reconstruction has width {d_out}"))
                    .help("only a transcoder may do that, and this SAE is not marked as one")
            );
        }
        if self.transcodes && self.subtract_b_dec && d != d_out {
            bail!(InputError::new("b_dec cannot be subtracted from activations of another width"));
        }
        Ok((d, features, d_out))
    }

    /// Returns the class that computes exactly this, and its tensors in float32. If only one of the two subtracts b_dec
    /// from activations, the encoder's bias makes up for it.
    pub fn into_class(mut self) -> Result<(&'static str, BTreeMap<String, Tensor>)> {
        self.check()?;
        let Some(class) = inventory::iter::<PublishedClass>.into_iter().find(|class| (class.holds)(&self)) else {
            bail!(InputError::new(format!("no linked plugin has a dictionary for this: {}", self.words())));
        };
        let float = |tensor: &Tensor| tensor.to_device(Device::Cpu).to_kind(tch::Kind::Float).contiguous();
        self.w_enc = float(&self.w_enc);
        let centred = class.layout.is_centred();
        if centred != self.subtract_b_dec {
            let moved = through(&self.b_dec, &self.w_enc);
            let b_enc = self.b_enc.to_device(Device::Cpu).to_kind(tch::Kind::Double);
            self.b_enc = if centred { b_enc + moved } else { b_enc - moved };
        }
        for tensor in [&mut self.b_enc, &mut self.w_dec, &mut self.b_dec].into_iter().chain(&mut self.w_skip) {
            *tensor = float(tensor);
        }
        if let SaeActivation::Jump(threshold) = &mut self.activation {
            *threshold = float(threshold);
        }
        let mut tensors = class.layout.named(self.w_enc, self.b_enc, self.w_dec, self.b_dec);
        tensors.extend(self.activation.tensors());
        tensors.extend(self.w_skip.map(|w_skip| ("W_skip", w_skip)));
        let tensors = tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor.contiguous()));
        Ok((class.layout.class, tensors.collect()))
    }

    fn words(&self) -> String {
        let activation = match self.activation {
            SaeActivation::Relu => "ReLU",
            SaeActivation::TopK(_) => "TopK",
            SaeActivation::AbsTopK(_) => "AbsTopK",
            SaeActivation::Jump(_) => "JumpReLU",
        };
        let what = if self.transcodes { "transcoder" } else { "autoencoder" };
        let skip = if self.w_skip.is_some() { " with a skip connection" } else { "" };
        format!("{activation} {what}{skip}")
    }
}

impl SaeActivation {
    /// Returns the tensors that a class saves for it: `k` and an unknown `threshold` (-1), or the thresholds `[F]`.
    pub fn tensors(self) -> Vec<(&'static str, Tensor)> {
        match self {
            SaeActivation::Relu => Vec::new(),
            SaeActivation::TopK(k) | SaeActivation::AbsTopK(k) => {
                vec![("k", Tensor::from(k as i32)), ("threshold", Tensor::from(-1f32))]
            }
            SaeActivation::Jump(threshold) => vec![("threshold", threshold)],
        }
    }
}

/// A class that can hold certain [`AffineSae`]s. Submitted by the plugin that owns the class.
pub struct PublishedClass {
    /// Layout of its tensors. Its only other tensors are those of the activation and a skip connection.
    pub layout: Layout,
    /// True if the class computes what this SAE does, whether or not either subtracts b_dec. At most one class holds an
    /// SAE.
    pub holds: fn(&AffineSae) -> bool,
}

/// Returns b W, `[F]`, for a vector b `[d]` and an encoder W [d, F], summed in double precision.
pub fn through(vector: &Tensor, encoder: &Tensor) -> Tensor {
    // A copy of the whole encoder in double precision may not fit into memory.
    let row = vector.to_kind(tch::Kind::Double).unsqueeze(0);
    let pieces =
        encoder.split(4096, 1).into_iter().map(|piece| row.matmul(&piece.to_kind(tch::Kind::Double)).squeeze_dim(0));
    Tensor::cat(&pieces.collect::<Vec<_>>(), 0)
}

inventory::collect!(PublishedClass);
