//! The temporal autoencoder: Lubana et al. 2025, *Priors in Time: Missing Inductive Biases for Language Model
//! Interpretability*, <https://arxiv.org/abs/2511.01836>.
//!
//! It splits each activation of a context into what earlier positions predict and what is new; the features are the new
//! part. With activations x [L, d], a scale s, λ = 1/(4d), and E = W_dec^T unless W_enc is saved:
//!
//! ```text
//! r ← s x − b,  p ← 0
//! for each attention layer:
//!     z  = relu(λ r E)                              [L, F]
//!     ẑ  = relu(c_proj(attention(q_target(z), k_ctx(z'), v_ctx(z'))))     z': z one position later, zeros first
//!     y  = ẑ W_dec,  a = (y · r) / (‖y‖ + 1e-6)²
//!     p ← p + a ẑ,  r ← r − a y
//! f  = relu(λ r E), or its k largest
//! x̂  = ((f + p) W_dec + b) / s
//! ```
//!
//! Attention is causal, with n heads of width [E/n] for queries and keys. Features of a position depend on the positions
//! before it, so [`Dictionary::encode`] takes whole contexts [.., L, d]. Published SAEs can be imported and used. No
//! trainer trains this dictionary, since training serves shuffled activations.

use dictlearn_core::prelude::*;

const CLASS: &str = "TemporalSAE";

/// Names of the attention layers' tensors, each with one entry per layer: weights [layers, out, in], biases
/// [layers, out]. Every other one is a bias.
const ATTENTION: [&str; 8] = [
    "attn.q_target.weight",
    "attn.q_target.bias",
    "attn.k_ctx.weight",
    "attn.k_ctx.bias",
    "attn.v_ctx.weight",
    "attn.v_ctx.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
];

/// sae_lens's `TemporalSAE`.
pub struct Temporal {
    w_dec: Tensor,          // [F, d]
    b_dec: Tensor,          // [d]
    w_enc: Option<Tensor>,  // [d, F], unless tied
    attention: [Tensor; 8], // as ATTENTION
    n_heads: Tensor,        // int64 scalar
    kval_topk: Tensor,      // int64 scalar; 0 for ReLU
    scaling_factor: Tensor, // scalar
}

inventory::submit! {
    SavedClass { class: CLASS, name: "temporal", shaped: |saved| Ok(Box::new(shaped(saved)?)) }
}

fn shaped(saved: &SavedTensors) -> Result<Temporal> {
    let [features, d] = saved.shape("W_dec")?;
    let [layers, bottleneck, _] = saved.shape(ATTENTION[0])?;
    let mut attention = Vec::new();
    for index in 0..ATTENTION.len() {
        let out = if index < 4 { bottleneck } else { features };
        attention.push(saved.zeros(&if index % 2 == 0 { vec![layers, out, features] } else { vec![layers, out] }));
    }
    // Reshaping by a number that does not divide the widths would fail inside libtorch.
    let heads = match saved.tensors.get("n_heads") {
        Some(heads) if heads.numel() == 1 && !heads.is_floating_point() => heads.reshape([1]).int64_value(&[0]),
        _ => 0,
    };
    if heads < 1 || bottleneck % heads != 0 || features % heads != 0 {
        bail!(InputError::new(format!(
            "`n_heads` is {heads}, but must divide the widths of attention, {bottleneck} and {features}"
        )));
    }
    let topk = match saved.tensors.get("kval_topk") {
        Some(k) if k.numel() == 1 && !k.is_floating_point() => k.reshape([1]).int64_value(&[0]),
        _ => -1,
    };
    if !(0..=features).contains(&topk) {
        bail!(InputError::new(format!(
            "`kval_topk` is {topk}, but must be from 0 to {features}, the number of features"
        )));
    }
    let whole = || Tensor::zeros([0_i64; 0], (Kind::Int64, saved.device));
    Ok(Temporal {
        w_dec: saved.zeros(&[features, d]),
        b_dec: saved.zeros(&[d]),
        w_enc: saved.tensors.contains_key("W_enc").then(|| saved.zeros(&[d, features])),
        attention: attention.try_into().map_err(|_| InputError::new("attention has other tensors"))?,
        n_heads: whole(),
        kval_topk: whole(),
        scaling_factor: Tensor::zeros([0_i64; 0], (Kind::Float, saved.device)),
    })
}

impl Temporal {
    /// Returns the novel features and the predicted ones, both [B, L, F], of contexts [B, L, d].
    fn codes(&self, x: &Tensor) -> (Tensor, Tensor) {
        let dims = self.dims();
        let lambda = 1.0 / (4.0 * dims.input as f64);
        let encoder = self.w_enc.as_ref().map_or_else(|| self.w_dec.tr(), Tensor::shallow_clone);
        let mut residual = x * &self.scaling_factor - &self.b_dec;
        let size = x.size();
        let mut predicted = Tensor::zeros([size[0], size[1], dims.features], (x.kind(), x.device()));
        for layer in 0..self.attention[0].size()[0] {
            let codes = (&residual * lambda).matmul(&encoder).relu();
            let codes = self.attend(layer, &codes).relu();
            let y = codes.matmul(&self.w_dec);
            let norm = y.norm_scalaropt_dim(2.0, [-1], true) + 1e-6;
            let along = (&y * &residual).sum_dim_intlist([-1].as_slice(), true, x.kind()) / norm.square();
            predicted += &along * codes;
            residual -= along * y;
        }
        let codes = (residual * lambda).matmul(&encoder).relu();
        let novel = match self.kval_topk.int64_value(&[]) {
            0 => codes,
            k => {
                let (values, indices) = codes.topk(k, -1, true, false);
                codes.zeros_like().scatter(-1, &indices, &values)
            }
        };
        (novel, predicted)
    }

    /// Attends from codes [B, L, F] to those of the positions before.
    fn attend(&self, layer: i64, codes: &Tensor) -> Tensor {
        let size = codes.size();
        let (batch, length) = (size[0], size[1]);
        let of = |index: usize| self.attention[index].select(0, layer);
        let heads =
            |projected: Tensor| projected.reshape([batch, length, self.n_heads.int64_value(&[]), -1]).transpose(1, 2);
        // The first position sees zeros.
        let before = codes.narrow(1, 0, length - 1).constant_pad_nd([0, 0, 1, 0]);
        let query = heads(codes.linear(&of(0), Some(&of(1))));
        let key = heads(before.linear(&of(2), Some(&of(3))));
        let value = heads(before.linear(&of(4), Some(&of(5))));
        let attended =
            Tensor::scaled_dot_product_attention(&query, &key, &value, None::<&Tensor>, 0.0, true, None, false);
        attended.transpose(1, 2).reshape([batch, length, -1]).linear(&of(6), Some(&of(7)))
    }

    /// Applies `f` to contexts [B, L, d], and restores the shape [.., L, d] of `x`.
    fn by_context(&self, x: &Tensor, f: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        let mut shape = x.size();
        let length = if shape.len() > 1 { shape[shape.len() - 2] } else { 1 };
        let y = f(&x.reshape([-1, length, self.dims().input]));
        shape.pop();
        shape.extend(y.size().last());
        y.reshape(shape)
    }
}

impl Dictionary for Temporal {
    fn class(&self) -> &'static str {
        CLASS
    }

    fn dims(&self) -> Dims {
        let size = self.w_dec.size();
        Dims { input: size[1], features: size[0], output: size[1] }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut parameters = vec![("W_dec", self.w_dec.shallow_clone()), ("b_dec", self.b_dec.shallow_clone())];
        parameters.extend(self.w_enc.as_ref().map(|w_enc| ("W_enc", w_enc.shallow_clone())));
        parameters.extend(ATTENTION.into_iter().zip(self.attention.iter().map(Tensor::shallow_clone)));
        parameters
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        vec![
            ("n_heads", self.n_heads.shallow_clone()),
            ("kval_topk", self.kval_topk.shallow_clone()),
            ("scaling_factor", self.scaling_factor.shallow_clone()),
        ]
    }

    fn reads_contexts(&self) -> bool {
        true
    }

    fn encode(&self, x: &Tensor) -> Tensor {
        self.by_context(x, |x| self.codes(x).0)
    }

    /// Decodes the new part only; [`Dictionary::reconstruction`] adds what earlier positions predict.
    fn decode(&self, features: &Tensor) -> Tensor {
        (features.matmul(&self.w_dec) + &self.b_dec) / &self.scaling_factor
    }

    fn reconstruction(&self, features: &Tensor, x: &Tensor) -> Tensor {
        self.decode(&(features + self.by_context(x, |x| self.codes(x).1)))
    }

    fn decoder(&self) -> Option<Weight> {
        Some(Weight { name: "W_dec", tensor: self.w_dec.shallow_clone(), feature_dim: 0 })
    }

    fn directions(&self) -> Option<Tensor> {
        Some(&self.w_dec / &self.scaling_factor)
    }

    /// Attention is not linear in the activations, so the features stay as they are and the scale takes the factor.
    fn scale_biases(&mut self, scale: f64) {
        scale_in_place(&self.scaling_factor, 1.0 / scale);
    }
}
