//! The analytic training step for dictionaries of two affine maps.
//!
//! Nearly every dictionary is two affine maps with an elementwise activation or a selection between them:
//!
//! ```text
//! z = W_e (x − b) + b_e        f = φ(z)        x̂ = W_d f + b
//! ```
//!
//! Their gradients have a closed form. With r = ∂L/∂x̂ `[B, d]` and s = ∂L/∂z `[B, F]`:
//!
//! ```text
//! ∂L/∂f = r W_d     s = ∂L/∂f φ'(z)     ∂L/∂W_d = rᵀ f     ∂L/∂W_e = sᵀ (x − b)
//! ∂L/∂b_e = Σ s     ∂L/∂b = Σ r − (Σ s) W_e
//! ```
//!
//! The last line sums over the batch before it multiplies, unlike autograd. This leaves five of six products of B·d·F
//! multiplications. They are computed in tiles of features ([`Block`]), so that intermediate values stay in the caches.
//! Few features fire after the first steps of training; then only the first product is dense. A sparse tile becomes a
//! list of entries, and the other four products use only these.
//!
//! On a GPU there is one dense tile with all features, clamped at 0 by ReLU, and libtorch's operations. Intermediate
//! values keep the dtype of products, which halves memory traffic in bfloat16.
//!
//! The dictionary provides the [`ActivationFunction`] between the maps, the trainer the [`Objective`]. [`step`]
//! combines them. Trainers of the TopK family use [`AnalyticParts`] directly.

use std::cell::{Cell, OnceCell};

use anyhow::Result;
use tch::{Kind, Tensor};

use super::gradients::Gradients;
use super::objective::{Objective, Sums, Values};
use super::terms::Terms;
use crate::data::Batch;
use crate::machine::device::{Precision, on_host};
use crate::machine::parallel::numbers;
use crate::sae::two_layer::select::{self, Kept, Selector, Tile};
use crate::sae::two_layer::{ActivationFunction, Block, Derivatives, Input, Operand};
use crate::sae::{Affine, Dictionary, Selection, Weight};

/// Features per tile. A tile of a typical batch's pre-activations fits into the caches, and products of this width run
/// at full speed. Products in bfloat16 are so fast that the overhead per tile matters.
fn tile_width(precision: Precision) -> i64 {
    if let Some(width) = TILE_WIDTH.get() {
        return width;
    }
    match precision {
        Precision::Float32 => 512,
        Precision::BFloat16 => 1024,
    }
}

thread_local! {
    static TILE_WIDTH: Cell<Option<i64>> = const { Cell::new(None) };
}

/// Runs `work` with tiles of this width, for tests, whose dictionaries would fit into one tile.
pub fn with_tile_width<T>(width: i64, work: impl FnOnce() -> T) -> T {
    TILE_WIDTH.set(Some(width));
    let done = work();
    TILE_WIDTH.set(None);
    done
}

/// Density below which a tile becomes a list. Steps with lists and with dense tiles take the same time at these
/// densities: in float32 at 18% on two cores of AMD's Zen 3 (AVX2) and at 17 to 22% on Zen 4 (AVX-512); in bfloat16 at
/// 9 to 12% there, and at 4% where bfloat16 products are four times as fast as float32.
fn sparse(precision: Precision) -> f64 {
    match precision {
        Precision::Float32 => 0.15,
        Precision::BFloat16 => 0.04,
    }
}

/// Dimensions of products that vary from step to step are padded to a multiple of this. oneDNN caches about 0.3 MB for
/// each distinct size, for up to a thousand sizes.
const ROUND: i64 = 64;

/// Returns the padding to the next multiple of [`ROUND`].
fn lacking(count: i64) -> i64 {
    (-count).rem_euclid(ROUND)
}

/// Input of an analytic step.
pub struct AnalyticPass<'a> {
    /// Step, counted from 0.
    pub step: u64,
    /// Activations and their targets.
    pub batch: &'a Batch,
    /// The dictionary.
    pub dictionary: &'a dyn Dictionary,
    /// Gradients of the last step, whose memory this step may reuse.
    pub gradients: &'a Gradients,
    /// Whether this step is logged.
    pub logging: bool,
}

impl AnalyticPass<'_> {
    /// Returns a parameter of the dictionary, detached.
    pub fn parameter(&self, name: &str) -> Result<Tensor> {
        let found = self.dictionary.parameters().into_iter().find(|(known, _)| *known == name);
        found
            .map(|(_, parameter)| parameter.detach())
            .ok_or_else(|| anyhow::anyhow!("the class {} has no parameter `{name}`", self.dictionary.class()))
    }
}

/// Result of an analytic step.
pub struct AnalyticStep {
    /// Firing count of each feature, `[F]`; required if the step is logged.
    pub fired: Option<Tensor>,
    /// Reconstruction error x̂ − target, `[B, d_out]`; required if the step is logged.
    pub error: Option<Tensor>,
    /// Gradient of the loss for each parameter that has one, by state-dict name. May share memory with
    /// [`AnalyticPass::gradients`], which the next step overwrites.
    pub gradients: Vec<(&'static str, Tensor)>,
}

/// Working data of an analytic step: weights, the encoder's input, and gradients.
pub struct AnalyticParts<'a> {
    affine: &'a Affine,
    precision: Precision,
    /// Encoder input, x or x − b, `[B, d]`.
    x: Operand,
    w_enc: Operand,
    b_enc: Option<Tensor>,
    w_dec: Operand,
    by_w_enc: Tensor,
    /// Σ ∂L/∂z, `[F]`.
    by_z: Tensor,
    by_w_dec: Tensor,
    /// Whether lists of entries can be used: on a CPU, with each feature's weights contiguous.
    lists: bool,
}

impl<'a> AnalyticParts<'a> {
    /// Prepares a step for a batch; `None` unless the dictionary is two affine maps in float32. Gradients reuse the
    /// last step's memory.
    pub fn new(pass: &'a AnalyticPass) -> Option<Self> {
        let (affine, batch) = (pass.dictionary.affine()?, pass.batch);
        let precision = affine.precision();
        let (encoder, decoder) = (affine.encoder(), affine.decoder());
        let x = if affine.is_centred() { &batch.x - affine.bias().1 } else { batch.x.shallow_clone() }.contiguous();
        let (w_enc, w_dec) = (encoder.rows().detach(), decoder.rows().detach());
        if [&x, &w_enc, &w_dec].iter().any(|matrix| matrix.kind() != Kind::Float) {
            return None;
        }
        let lists = on_host(x.device()) && [&x, &w_enc, &w_dec].iter().all(|matrix| matrix.is_contiguous());
        Some(AnalyticParts {
            by_w_enc: room(&encoder, pass.gradients),
            by_z: Tensor::zeros([w_enc.size()[0]], (Kind::Float, x.device())),
            by_w_dec: room(&decoder, pass.gradients),
            b_enc: affine.encoder_bias().map(|(_, bias)| bias.detach()),
            x: Operand::new(x, precision),
            w_enc: Operand::new(w_enc, precision),
            w_dec: Operand::new(w_dec, precision),
            affine,
            precision,
            lists,
        })
    }

    /// Number of features F.
    pub fn features(&self) -> i64 {
        self.by_z.size()[0]
    }

    /// Allocates storage for tiles with this many features in total.
    fn storage(&self, features: i64, kind: Kind) -> Tensor {
        let x = self.x.exact();
        Tensor::empty([x.size()[0] * features], (kind, x.device()))
    }

    /// Returns a tile `[B, count]` of such storage, which starts `at` features from its beginning.
    fn tile(&self, storage: &Tensor, at: i64, count: i64) -> Tensor {
        let rows = self.x.exact().size()[0];
        storage.narrow(0, rows * at, rows * count).view([rows, count])
    }

    /// Calls `work` with the encoder's product for each tile of features `[B, n]` with the features' biases, and the
    /// index of the tile's first feature. All products share one buffer.
    fn products(&self, mut work: impl FnMut(&Tile, i64)) {
        let bias = self.b_enc.as_ref().map_or_else(|| self.by_z.zeros_like(), Tensor::contiguous);
        let most = tile_width(self.precision);
        let storage = self.storage(most.min(self.features()), self.precision.kind());
        for first in (0..self.features()).step_by(most as usize) {
            let count = most.min(self.features() - first);
            let product = self.tile(&storage, 0, count);
            // Converted per tile: each part is used once, and a whole copy would cost memory.
            let weight = self.w_enc.exact().narrow(0, first, count).to_kind(self.precision.kind());
            let _ = self.x.for_products().matmul_out(&product, &weight.tr());
            let bias = &numbers::<f32>(&bias)[first as usize..(first + count) as usize];
            work(&Tile::new(&product, bias), first);
        }
    }

    /// Returns the pre-activations `[n, F]` of rows X of the encoder's input.
    fn plainly(&self, x: &Operand) -> Tensor {
        let z = self.precision.product(x.for_products(), &self.w_enc.for_products().tr());
        match &self.b_enc {
            Some(bias) => z + bias,
            None => z,
        }
    }

    /// Returns blocks with all pre-activations above `bounds` `[F]`, or above 0, and possibly others. CPU only.
    pub fn encode(&self, bounds: Option<&Tensor>) -> Vec<Block> {
        let bounds = bounds.map(Tensor::contiguous).unwrap_or_else(|| self.by_z.zeros_like());
        let precision = self.precision;
        // Allocated once: mixing lifetimes fragments the heap.
        let storage = self.storage(self.features(), Kind::Float);
        let mut used = 0;
        let mut blocks = Vec::new();
        self.products(|tile, first| {
            let count = tile.width() as i64;
            let bounds = &numbers::<f32>(&bounds)[first as usize..(first + count) as usize];
            let mut z = self.tile(&storage, used, count);
            let above = tile.finish(bounds, &mut z);
            blocks.push(if self.lists && (above as f64) < sparse(precision) * z.numel() as f64 {
                Block::sparse(select::above(&z, bounds), first, precision)
            } else {
                used += count;
                Block::dense(z, first, precision)
            });
        });
        blocks
    }

    /// Returns the pre-activations that a dictionary of the TopK family selects in training, possibly with some that
    /// are not above 0 and so give no feature. Also returns the selected features' indices, including those at 0,
    /// int64, if known.
    pub fn select(&mut self, selection: &Selection) -> (Block, Option<Tensor>) {
        let rows = self.x.exact().size()[0];
        let k = selection.k();
        let of_batch = selection.by_threshold();
        if self.lists && self.sparse(k) {
            let kept = if of_batch { Kept::OfBatch((k * rows) as usize) } else { Kept::OfEach(k as usize) };
            return (self.list(kept), None);
        }
        if of_batch {
            return (self.of_batch(k * rows), None);
        }
        let (block, indices) = self.of_each(k);
        (block, Some(indices))
    }

    /// Returns the k largest positive pre-activations of each row.
    pub fn select_of_each(&mut self, k: i64) -> Block {
        if k >= self.features() {
            return Block::dense(self.plainly(&self.x).relu(), 0, self.precision);
        }
        if self.lists && self.sparse(k) {
            return self.list(Kept::OfEach(k as usize));
        }
        self.of_each(k).0
    }

    /// Whether k features per row are few enough for lists. Above this, dense products are faster, even with libtorch's
    /// selection.
    fn sparse(&self, k: i64) -> bool {
        4 * k <= self.features()
    }

    fn list(&mut self, kept: Kept) -> Block {
        let mut selector = Selector::new(kept, self.x.exact().size()[0] as usize);
        self.products(|tile, _| selector.offer(tile));
        // Products of lists use exact values, so the cast copy is not needed.
        self.x.cast.take();
        Block::sparse(selector.finish(), 0, self.precision)
    }

    /// Returns all pre-activations after ReLU, `[B, F]`, in the dtype of products. The encoder's bias is cast to it
    /// too.
    fn whole(&self) -> Tensor {
        let bias = self.b_enc.as_ref().map(|bias| bias.to_kind(self.precision.kind()));
        self.x.for_products().linear(self.w_enc.for_products(), bias).relu_()
    }

    /// Selects the k largest pre-activations of each row with libtorch's `topk`; also returns their features.
    fn of_each(&self, k: i64) -> (Block, Tensor) {
        let z = self.whole();
        let size @ [rows, features] = [z.size()[0], z.size()[1]];
        let (values, indices) = z.topk(k, -1, true, false);
        let first = Tensor::arange(rows, (Kind::Int64, z.device())).unsqueeze(1) * features;
        let at = (&indices + first).reshape([-1]);
        let values = values.to_kind(Kind::Float).reshape([-1]);
        (Block::scattered(values, at, size, rows, self.precision), indices)
    }

    /// Selects the `count` largest pre-activations of the batch with libtorch's `topk`.
    fn of_batch(&self, count: i64) -> Block {
        let z = self.whole();
        let size = [z.size()[0], z.size()[1]];
        let (values, at) = z.reshape([-1]).topk(count, -1, true, false);
        Block::scattered(values.to_kind(Kind::Float), at, size, 1, self.precision)
    }

    /// Splits a block into the groups of features that end at `ends`.
    pub fn groups(&self, block: Block, ends: &[i64]) -> Vec<Block> {
        if ends.len() == 1 {
            return vec![block];
        }
        let block = block.matrix();
        let starts = std::iter::once(0).chain(ends.iter().copied());
        starts.zip(ends).map(|(start, end)| block.narrow(start..*end)).collect()
    }

    /// Returns features at 0 that `topk` selects in rows with fewer than k positive pre-activations: int64, of any
    /// shape. libtorch decides which of the tied features these are.
    pub fn selected_at_zero(&self, block: &Block, k: i64) -> Tensor {
        let few = block.sum_by_row(&block.z.gt(0.0).to_kind(Kind::Float)).less(k as f64).nonzero().reshape([-1]);
        if few.size()[0] == 0 {
            return few;
        }
        // In parts: there may be many rows, and each needs all its features.
        let selected = few.split(4 * ROUND, 0).into_iter().map(|few| {
            // Pads with a repeated row, which adds no new features.
            let again = few.narrow(0, 0, 1).expand([lacking(few.size()[0])], false);
            let rows = self.x.select(&Tensor::cat(&[few, again], 0));
            self.plainly(&rows).relu().topk(k, -1, true, false).1
        });
        Tensor::cat(&selected.collect::<Vec<_>>(), 0)
    }

    /// Returns the error of a reconstruction without features: b − target, `[B, d]`.
    pub fn begin(&self, batch: &Batch) -> Tensor {
        (self.affine.bias().1.detach() - &batch.target).contiguous()
    }

    /// Adds the reconstruction from a block's values, in the shape of z, to an error `[B, d]`.
    pub fn decode(&self, block: &Block, values: &Tensor, error: &mut Tensor) {
        block.decode(values, &self.w_dec, error);
    }

    /// Prepares ∂L/∂x̂ `[B, d]` for products.
    fn operand(&self, by_x_hat: &Tensor) -> Operand {
        Operand::new(by_x_hat.contiguous(), self.precision)
    }

    /// Accumulates gradients for f = ReLU(z), given ∂L/∂x̂ `[B, d]`.
    pub fn backward_of_selected(&mut self, block: &Block, by_x_hat: &Tensor) {
        let by_x_hat = self.operand(by_x_hat);
        block.accumulate(&block.z.relu(), &by_x_hat, &mut self.by_w_dec);
        let by_features = block.products(&by_x_hat, &self.w_dec).to_kind(Kind::Float);
        let by_z = block.z.threshold_backward(&by_features, 0);
        self.backward_of_encoder(block, &by_z);
    }

    fn backward_of_encoder(&mut self, block: &Block, by_z: &Tensor) {
        block.accumulate(by_z, &self.x, &mut self.by_w_enc);
        block.sum_by_feature(by_z, &mut self.by_z);
    }

    /// Returns the working data of a step on a subset of features, `[n]` int64; [`AnalyticParts::add`] adds its
    /// gradients. The subset is padded with features of zero weights, which never fire.
    pub fn of_features(&self, features: &Tensor) -> AnalyticParts<'a> {
        let lacking = lacking(features.size()[0]);
        let count = features.size()[0] + lacking;
        let like = |tensor: &Tensor| Tensor::empty([count, tensor.size()[1]], (Kind::Float, tensor.device()));
        AnalyticParts {
            affine: self.affine,
            precision: self.precision,
            x: Operand {
                exact: self.x.exact.shallow_clone(),
                precision: self.precision,
                cast: self.x.cast.get().map(Tensor::shallow_clone).map_or_else(OnceCell::new, OnceCell::from),
            },
            w_enc: self.w_enc.select(features).and_zeros(lacking),
            b_enc: self.b_enc.as_ref().map(|bias| bias.index_select(0, features).constant_pad_nd([0, lacking])),
            w_dec: self.w_dec.select(features).and_zeros(lacking),
            by_w_enc: like(&self.by_w_enc),
            by_z: Tensor::zeros([count], (Kind::Float, features.device())),
            by_w_dec: like(&self.by_w_dec),
            lists: self.lists,
        }
    }

    /// Adds the gradients of a step on a subset of features.
    pub fn add(&mut self, features: &Tensor, part: &AnalyticParts) {
        let own = |of_part: &Tensor| of_part.narrow(0, 0, features.size()[0]);
        let _ = self.by_w_enc.index_add_(0, features, &own(&part.by_w_enc));
        let _ = self.by_z.index_add_(0, features, &own(&part.by_z));
        let _ = self.by_w_dec.index_add_(0, features, &own(&part.by_w_dec));
    }

    /// Returns the gradients of both layers by state-dict name. `by_x_hat` `[d]` is the sum of ∂L/∂x̂ over the batch.
    pub fn gradients(self, by_x_hat: Tensor) -> Vec<(&'static str, Tensor)> {
        let affine = self.affine;
        let centred = affine.is_centred();
        let through_encoder = centred.then(|| self.by_z.unsqueeze(0).matmul(self.w_enc.exact()).squeeze_dim(0));
        let by_bias = match through_encoder {
            Some(through_encoder) => by_x_hat - through_encoder,
            None => by_x_hat,
        };
        let of_rows = |weight: Weight, rows: Tensor| (weight.name, weight.like_rows(&rows));
        let mut gradients = vec![
            of_rows(affine.encoder(), self.by_w_enc),
            of_rows(affine.decoder(), self.by_w_dec),
            (affine.bias().0, by_bias),
        ];
        gradients.extend(affine.encoder_bias().map(|(name, _)| (name, self.by_z)));
        gradients
    }
}

/// Returns memory for the gradient of a matrix, as rows `[F, d]`: the last step's gradient if its layout fits.
fn room(weight: &Weight, gradients: &Gradients) -> Tensor {
    let rows = weight.rows();
    let room = gradients.get(weight.name).map(|gradient| weight.like_rows(gradient));
    let fits = |room: &Tensor| room.size() == rows.size() && room.is_contiguous() && room.kind() == rows.kind();
    room.filter(fits).unwrap_or_else(|| rows.empty_like())
}

/// Returns the sum over rows `[d]` of a matrix `[B, d]`.
pub fn sum_of_rows(rows: &Tensor) -> Tensor {
    rows.sum_dim_intlist([0].as_slice(), false, Kind::Float)
}

/// Returns the mean squared norm of the rows `[B, d]`, a scalar, without a temporary for the squares.
pub fn mean_square(rows: &Tensor) -> Tensor {
    rows.norm_scalaropt_dim(2.0, [-1], false).square().mean(Kind::Float)
}

/// Runs the analytic step of an objective, if the dictionary is two affine maps. The loss is
///
/// ```text
/// L = error(x̂) + penalty + the activation function's auxiliary loss
/// ```
///
/// `count` requests which features fired.
pub fn step(
    pass: &AnalyticPass,
    terms: &mut Terms,
    activation: &mut dyn ActivationFunction,
    objective: &Objective,
    count: bool,
) -> Result<Option<(AnalyticStep, Values)>> {
    let on_gpu = !on_host(pass.batch.x.device());
    if on_gpu && !activation.on_gpu() {
        return Ok(None);
    }
    let Some(mut parts) = AnalyticParts::new(pass) else { return Ok(None) };
    let blocks = if on_gpu {
        vec![Block::dense(parts.whole(), 0, parts.precision)]
    } else {
        parts.encode(activation.bounds().as_ref())
    };
    let mut error = parts.begin(pass.batch);
    let mut auxiliary = activation.auxiliary().then(|| error.copy());
    let mut fired = (count || pass.logging).then(|| parts.by_z.zeros_like());
    let mut penalty = Sums::new(&objective.penalty, &error);
    let mut watched = objective.watched.as_ref().map(|watched| Sums::new(watched, &error));
    for block in &blocks {
        let features = activation.features(block);
        parts.decode(block, &features, &mut error);
        let penalized = activation.penalized(block);
        for penalty in std::iter::once(&mut penalty).chain(&mut watched) {
            penalty.see(block, penalized.as_ref().unwrap_or(&features));
        }
        if let (Some(auxiliary), Some(penalized)) = (&mut auxiliary, &penalized) {
            parts.decode(block, penalized, auxiliary);
        }
        if let Some(fired) = fired.as_mut().filter(|_| on_gpu) {
            // These features are not negative.
            block.sum_by_feature(&features.sign(), fired);
        } else if let Some(fired) = &mut fired {
            let ([], [count]) =
                block.map([Input::Each(&features)], [], |[feature], []| ([], [f32::from(feature != 0.0)]));
            block.add_sums(&count, fired);
        }
    }
    objective.add_error(&error, pass.logging, terms);
    let by_x_hat = objective.derivative(&error);
    let values = objective.add_penalty(penalty.value(), watched.as_ref().map(Sums::value), terms);
    penalty.differentiate();
    let by_auxiliary = auxiliary.map(|error| {
        terms.add("aux_loss", mean_square(&error), 1.0);
        parts.operand(&(error * (2.0 / pass.batch.len() as f64)))
    });

    let error = pass.logging.then_some(error);
    let by_sum = sum_of_rows(&by_x_hat);
    let by_x_hat = parts.operand(&by_x_hat);
    for block in blocks {
        let features = activation.features(&block);
        block.accumulate(&features, &by_x_hat, &mut parts.by_w_dec);
        let penalized = penalty.slope(&block, || activation.penalized(&block).unwrap_or(features));
        let by = Derivatives {
            features: block.products(&by_x_hat, &parts.w_dec),
            penalized,
            auxiliary: by_auxiliary.as_ref().map(|by_auxiliary| block.products(by_auxiliary, &parts.w_dec)),
        };
        let by_z = activation.backward(&block, &by);
        drop(by);
        parts.backward_of_encoder(&block, &by_z);
    }
    let mut gradients = parts.gradients(by_sum);
    gradients.extend(activation.gradients());
    Ok(Some((AnalyticStep { fired, error, gradients }, values)))
}
