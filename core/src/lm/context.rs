//! What the layers of one forward pass share: masks, positions, rotary tables, keys and values.

use tch::{Kind, Tensor};

use super::hook_point::Tokens;
use super::rotary::Rotary;

/// ALiBi: a bias on attention scores that grows with the key's position, at a slope for each head (Press et al. 2021,
/// <https://arxiv.org/abs/2108.12409>). Positions count the text tokens of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Alibi {
    /// Number of heads.
    pub heads: i64,
    /// Whether slopes and biases are rounded to bfloat16.
    pub rounded: bool,
    /// Factor on biases.
    pub factor: f64,
}

impl Alibi {
    /// Returns the slopes of the heads. Beyond the largest power of two, heads have the odd slopes of twice as many.
    fn slopes(self) -> Vec<f64> {
        let power = 1_i64 << self.heads.max(1).ilog2();
        let slope = |heads: i64, index: i64| 2_f64.powf(-8.0 * index as f64 / heads as f64);
        let first = (1..=power).map(|index| slope(power, index));
        first.chain((0..self.heads - power).map(|index| slope(2 * power, 2 * index + 1))).collect()
    }

    /// Returns the biases of keys, [B, H, 1, L], float32.
    fn biases(self, positions: &Tensor) -> Tensor {
        let kind = if self.rounded { Kind::BFloat16 } else { Kind::Float };
        let slopes =
            Tensor::from_slice(&self.slopes()).to_kind(Kind::Float).to_kind(kind).to_device(positions.device());
        let biases = slopes.view([1, -1, 1, 1]) * positions.unsqueeze(1).unsqueeze(1);
        biases.to_kind(Kind::Float) * self.factor
    }
}

/// What a model's layers need to know of a batch.
#[derive(Debug, Clone, Default)]
pub struct ContextConfig {
    /// Windows of the layers, each once; `None` stands for full attention.
    pub windows: Vec<Option<i64>>,
    /// Rotary embeddings.
    pub rotary: Vec<Rotary>,
    /// Bias on attention scores, if there is one.
    pub alibi: Option<Alibi>,
    /// Layers whose keys and values later layers use.
    pub kept: Vec<usize>,
}

/// Masks, positions and rotary tables that the layers of one forward pass share.
#[derive(Debug)]
pub struct Context {
    /// Mask of visible keys, [B, 1, L, L] or [L, L], bool, for each window of the model's layers; `None` if the mask is
    /// purely causal.
    masks: Vec<(Option<i64>, Option<Tensor>)>,
    /// Rotary embeddings of the model, with their cosines and sines [L, rotated width], float32.
    rotary: Vec<(Rotary, (Tensor, Tensor))>,
    /// Biases of keys, [B, H, 1, L], float32.
    alibi: Option<Tensor>,
    /// Text positions, [B, L], bool; `None` if no position is padding.
    text: Option<Tensor>,
    /// Layers whose keys and values later layers use.
    kept: Vec<usize>,
    /// Inputs of layers beside the residual stream, [B, L, N, p], float32.
    inputs: Option<Tensor>,
}

impl Context {
    /// Computes the context of a batch. Rotary positions count from the row's first column, padded or not, as in
    /// Hugging Face models that get no `position_ids`: only their differences matter.
    pub fn new(tokens: &Tokens, config: &ContextConfig) -> Self {
        let (_, length) = tokens.size();
        let device = tokens.ids.device();
        let padded = !bool::try_from(tokens.mask.all()).unwrap_or(false);
        let mask = |window: Option<i64>| {
            let window = window.filter(|window| *window < length);
            if !padded && window.is_none() {
                return None;
            }
            let mut visible = Tensor::ones([length, length], (Kind::Bool, device)).tril(0);
            if let Some(window) = window {
                // A query sees itself and the `window - 1` positions before it.
                visible = visible.triu(1 - window);
            }
            if padded {
                visible = tokens.mask.unsqueeze(1).unsqueeze(1).logical_and(&visible);
                // A padded position sees no key, and softmax would return NaN. Let it see itself: its output is unused.
                visible = visible.logical_or(&Tensor::eye(length, (Kind::Bool, device)));
            }
            Some(visible)
        };
        Context {
            masks: config.windows.iter().map(|window| (*window, mask(*window))).collect(),
            rotary: config.rotary.iter().map(|rotary| (rotary.clone(), rotary.tables(length, device))).collect(),
            alibi: config.alibi.map(|alibi| alibi.biases(&tokens.text_positions().clamp_min(0))),
            text: padded.then(|| tokens.mask.shallow_clone()),
            kept: config.kept.clone(),
            inputs: None,
        }
    }

    /// Adds inputs of layers beside the residual stream, [B, L, N, p].
    pub(super) fn with_inputs(self, inputs: Option<Tensor>) -> Self {
        Context { inputs, ..self }
    }

    /// Returns the input of a layer beside the residual stream, [B, L, p].
    pub(super) fn input(&self, layer: usize) -> Option<Tensor> {
        self.inputs.as_ref().map(|inputs| inputs.select(2, layer as i64))
    }

    /// Returns the mask of visible keys of layers with this window; `None` if it is purely causal.
    pub(super) fn mask(&self, window: Option<i64>) -> Option<&Tensor> {
        self.masks.iter().find(|(known, _)| *known == window).and_then(|(_, mask)| mask.as_ref())
    }

    /// Returns one of the model's rotary embeddings, with its cosines and sines.
    pub(super) fn rotary(&self, index: usize) -> &(Rotary, (Tensor, Tensor)) {
        &self.rotary[index]
    }

    /// Returns true if later layers use the keys and values of this one.
    pub(super) fn is_kept(&self, layer: usize) -> bool {
        self.kept.contains(&layer)
    }

    /// Returns the biases of keys, [B, H, 1, L], float32.
    pub(super) fn alibi(&self) -> Option<&Tensor> {
        self.alibi.as_ref()
    }

    /// Returns the text positions, [B, L], bool; `None` if no position is padding.
    pub(super) fn text(&self) -> Option<&Tensor> {
        self.text.as_ref()
    }
}

/// Keys and values that later layers of a pass use again, by the layer that computed them; each is [B, G, L, D].
#[derive(Debug, Default)]
pub struct KeysValues(Vec<(usize, Tensor, Tensor)>);

impl KeysValues {
    /// Keeps the keys and values of a layer.
    pub(super) fn keep(&mut self, layer: usize, keys: &Tensor, values: &Tensor) {
        self.0.retain(|(kept, ..)| *kept != layer);
        self.0.push((layer, keys.shallow_clone(), values.shallow_clone()));
    }

    /// Returns the keys and values of a layer.
    pub(super) fn of(&self, layer: usize) -> (Tensor, Tensor) {
        let (_, keys, values) = self.0.iter().find(|(kept, ..)| *kept == layer).expect("an earlier layer kept them");
        (keys.shallow_clone(), values.shallow_clone())
    }

    /// Returns the same keys and values, sharing memory.
    pub(super) fn fork(&self) -> Self {
        KeysValues(self.0.iter().map(|(layer, k, v)| (*layer, k.shallow_clone(), v.shallow_clone())).collect())
    }
}
