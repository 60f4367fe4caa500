//! The common form of published SAEs: two affine maps with an activation between them.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use tch::{Device, Tensor};

use crate::error::InputError;
use crate::sae::Layout;

/// An SAE as most formats have it: x̂ = σ((x [− b_dec]) W_enc + b_enc) W_dec + b_dec.
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
    /// Whether b_dec is subtracted from an activation first.
    pub subtract_b_dec: bool,
    /// Whether it predicts something else than it reads.
    pub transcodes: bool,
    /// σ.
    pub activation: SaeActivation,
}

/// How pre-activations become features.
#[derive(Debug)]
pub enum SaeActivation {
    /// The positive ones.
    Relu,
    /// The k largest of the positive ones.
    TopK(i64),
    /// Those above a threshold, `[F]`, and above 0.
    Jump(Tensor),
}

/// The shape of a tensor that must have N dimensions.
fn shape<const N: usize>(name: &str, tensor: &Tensor) -> Result<[i64; N]> {
    let size = tensor.size();
    let wrong = || InputError::new(format!("`{name}` has shape {size:?}, which does not have {N} dimensions"));
    let shape: [i64; N] = size.as_slice().try_into().map_err(|_| wrong())?;
    if shape.contains(&0) {
        bail!(InputError::new(format!("`{name}` has shape {size:?}: there is nothing in it")));
    }
    Ok(shape)
}

impl AffineSae {
    /// Checks that the tensors fit each other; gives d, F, d_out.
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
            SaeActivation::TopK(k) if !(1..=features).contains(k) => {
                bail!(InputError::new(format!("`k` is {k}, and there are {features} features")))
            }
            _ => {}
        }
        if !self.transcodes && d != d_out {
            bail!(
                InputError::new(format!("it reads activations of width {d} and reconstructs width {d_out}"))
                    .help("only a transcoder does, and this is not said to be one")
            );
        }
        if self.transcodes && self.subtract_b_dec && d != d_out {
            bail!(InputError::new("b_dec cannot be subtracted from activations of another width"));
        }
        Ok((d, features, d_out))
    }

    /// The class that does exactly this, and its tensors, in float32: what a class has in its input is moved from or to the
    /// encoder's bias, where it is elsewhere here.
    pub fn into_class(mut self) -> Result<(&'static str, BTreeMap<String, Tensor>)> {
        self.check()?;
        let Some(class) = inventory::iter::<PublishedClass>.into_iter().find(|class| (class.holds)(&self)) else {
            bail!(InputError::new(format!("no dictionary that is linked in does this: {}", self.words())));
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
            SaeActivation::Jump(_) => "JumpReLU",
        };
        let what = if self.transcodes { "transcoder" } else { "autoencoder" };
        let skip = if self.w_skip.is_some() { " with a skip connection" } else { "" };
        format!("{activation} {what}{skip}")
    }
}

impl SaeActivation {
    /// The tensors of it that a class saves: `k` and an unknown `threshold`, or the thresholds.
    pub fn tensors(self) -> Vec<(&'static str, Tensor)> {
        match self {
            SaeActivation::Relu => Vec::new(),
            SaeActivation::TopK(k) => vec![("k", Tensor::from(k as i32)), ("threshold", Tensor::from(-1f32))],
            SaeActivation::Jump(threshold) => vec![("threshold", threshold)],
        }
    }
}

/// A class that some [`AffineSae`] SAEs are. Submitted by the plugin that owns the class.
pub struct PublishedClass {
    /// Its tensors, which with those of the activation are all that it has.
    pub layout: Layout,
    /// Whether it does what this one does, wherever the bias is; of two classes no SAE is both.
    pub holds: fn(&AffineSae) -> bool,
}

/// b W, `[F]`, of a vector `[d]` and an encoder [d, F], added up in double precision.
pub fn through(vector: &Tensor, encoder: &Tensor) -> Tensor {
    // A copy of the whole encoder in double precision may not fit into memory.
    let row = vector.to_kind(tch::Kind::Double).unsqueeze(0);
    let pieces =
        encoder.split(4096, 1).into_iter().map(|piece| row.matmul(&piece.to_kind(tch::Kind::Double)).squeeze_dim(0));
    Tensor::cat(&pieces.collect::<Vec<_>>(), 0)
}

inventory::collect!(PublishedClass);
