//! The AbsTopK autoencoder: Zhu, Khalili and Zhu 2025, *AbsTopK: Rethinking Sparse Autoencoders For Bidirectional
//! Features*, <https://arxiv.org/abs/2510.00404>.
//!
//! With activations x `[d]`, features f `[F]` and a decoder W_d `[d, F]`:
//!
//! ```text
//! z = W_e (x − b) + b_e
//! f = z where |z| is among the k largest, 0 elsewhere
//! x̂ = W_d f + b
//! ```
//!
//! Features keep their signs, so one feature can stand for both ends of an axis. The trainer `top_k` trains it. A
//! sparsity penalty applies to |f|.

use dictlearn_core::formats::{PublishedClass, SaeActivation};
use dictlearn_core::prelude::*;

/// The AbsTopK autoencoder.
#[component(dictionary "abs_top_k", summary = "Keeps the k features of largest magnitude, with their signs",
    paper = "Zhu et al. 2025, AbsTopK, https://arxiv.org/abs/2510.00404",
    example = "{type: abs_top_k, expansion_factor: 8, k: 8}", fields(width))]
pub struct AbsTopKConfig {
    /// Number of features kept per activation.
    #[schemars(range(min = 1))]
    pub k: i64,
}

impl DictionaryConfig for AbsTopKConfig {
    fn build(&self, cx: &DictionaryCx) -> Result<Box<dyn Dictionary>> {
        let features = self.features(cx)?;
        Selection::check(self.k, features)?;
        let affine = Affine::random(LAYOUT, features, 1.0, &cx.autoencoding());
        Ok(Box::new(AbsTopK { affine, selection: Selection::new(self.k, false, cx.device) }))
    }
}

/// sae_lens's `AbsTopKSAE`.
pub struct AbsTopK {
    affine: Affine,
    selection: Selection,
}

const LAYOUT: Layout = Layout::modules("AbsTopKSAE", "b_dec").centred();

inventory::submit! {
    SavedClass {
        class: LAYOUT.class,
        name: AbsTopKConfig::NAME,
        shaped: |saved| {
            let affine = saved.affine(LAYOUT)?;
            let selection = Selection::saved(saved, affine.dims().features, false)?;
            Ok(Box::new(AbsTopK { affine, selection }))
        },
    }
}

inventory::submit! {
    PublishedClass {
        layout: LAYOUT,
        holds: |sae| matches!(sae.activation, SaeActivation::AbsTopK(_)) && !sae.transcodes && sae.w_skip.is_none(),
    }
}

impl Dictionary for AbsTopK {
    fn affine(&self) -> Option<&Affine> {
        Some(&self.affine)
    }

    fn code(&self, pre_activations: Tensor) -> Code {
        let magnitudes = pre_activations.abs();
        let code = self.selection.by_score(pre_activations, &magnitudes);
        let penalized = code.features.abs();
        code.penalize(penalized)
    }

    fn selection(&self) -> Option<&Selection> {
        Some(&self.selection)
    }
}
