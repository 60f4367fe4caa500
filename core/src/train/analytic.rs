//! The analytic training step for dictionaries of two affine maps.
//!
//! Nearly all dictionaries are two affine maps with something between them that looks at one number at a time:
//!
//! ```text
//! z = W_e (x − b) + b_e        f = φ(z)        x̂ = W_d f + b
//! ```
//!
//! For these there is no need of a graph. With r = ∂L/∂x̂ [B, d] and s = ∂L/∂z [B, F]:
//!
//! ```text
//! ∂L/∂f = r W_d     s = ∂L/∂f φ'(z)     ∂L/∂W_d = rᵀ f     ∂L/∂W_e = sᵀ (x − b)
//! ∂L/∂b_e = Σ s     ∂L/∂b = Σ r − (Σ s) W_e
//! ```
//!
//! The last line sums over the batch before it multiplies, which autograd does not: five products of B·d·F numbers are
//! left of six. They are taken a tile of features at a time ([`Block`]), so that what is calculated between them stays
//! in the caches. And where few features fire, in training after its beginning nearly always, only the first is taken in
//! full: a tile of which little matters is kept as a list of entries, and the four other products are taken of these
//! alone.
//!
//! On a GPU there is one tile, of all features, with ReLU done ([`Block`]s hold no number below 0), and libtorch's operations on it: what
//! lies between products stays in their type, so that half as much goes through its memory.
//!
//! What lies between the maps is an [`ActivationFunction`], which the dictionary has; what is minimised is an [`Objective`], which
//! the trainer has. [`step`] puts them together. Trainers of the TopK family use the parts ([`AnalyticParts`]).

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

/// Features of a tile: a tile of a usual batch's pre-activations fits into the caches, and a product of that many
/// columns runs at full speed. Products in bfloat16 take so little time that what is done once for each tile counts.
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

/// Does something with tiles of that many features: in tests, whose dictionaries would fit into one.
pub fn with_tile_width<T>(width: i64, work: impl FnOnce() -> T) -> T {
    TILE_WIDTH.set(Some(width));
    let done = work();
    TILE_WIDTH.set(None);
    done
}

/// Below which part of a tile's entries they are listed. Steps with lists and with dense tiles took the same time, in float32, at 18%
/// on two cores of AMD's Zen 3 (AVX2) and at 17 to 22% on Zen 4 (AVX-512); in bfloat16 at 9 to 12% there, and at 4% where
/// bfloat16's products are four times as fast as float32's.
fn sparse(precision: Precision) -> f64 {
    match precision {
        Precision::Float32 => 0.15,
        Precision::BFloat16 => 0.04,
    }
}

/// What products have of a size that changes from step to step is a multiple of it. oneDNN keeps what it has prepared for products of
/// each size, about 0.3 MB, for a thousand of them.
const ROUND: i64 = 64;

/// How much is lacking to a multiple of that.
fn lacking(count: i64) -> i64 {
    (-count).rem_euclid(ROUND)
}

/// What an analytic step starts from.
pub struct AnalyticPass<'a> {
    /// Step, counted from 0.
    pub step: u64,
    /// What the dictionary reads and what it is to reconstruct.
    pub batch: &'a Batch,
    /// The dictionary.
    pub dictionary: &'a dyn Dictionary,
    /// The last step's gradients, whose memory the gradients of this step may be written to.
    pub gradients: &'a Gradients,
    /// Whether the figures of this step will be logged.
    pub logging: bool,
}

impl AnalyticPass<'_> {
    /// A parameter of the dictionary, without its history.
    pub fn parameter(&self, name: &str) -> Result<Tensor> {
        let found = self.dictionary.parameters().into_iter().find(|(known, _)| *known == name);
        found
            .map(|(_, parameter)| parameter.detach())
            .ok_or_else(|| anyhow::anyhow!("the class {} has no parameter `{name}`", self.dictionary.class()))
    }
}

/// What an analytic step found.
pub struct AnalyticStep {
    /// For how many activations of the batch each feature fired, `[F]`; needed if the step is logged.
    pub fired: Option<Tensor>,
    /// How far the reconstruction is off, x̂ − target, [B, d_out]; needed if the step is logged.
    pub error: Option<Tensor>,
    /// The loss's gradient by each parameter that has one, by state-dict names. It may lie in the memory of
    /// [`AnalyticPass::gradients`], which the next step writes over.
    pub gradients: Vec<(&'static str, Tensor)>,
}

/// The parts of an analytic step: weights, what is encoded, and gradients as they are found.
pub struct AnalyticParts<'a> {
    affine: &'a Affine,
    precision: Precision,
    /// x or x − b, [B, d].
    x: Operand,
    w_enc: Operand,
    b_enc: Option<Tensor>,
    w_dec: Operand,
    by_w_enc: Tensor,
    /// Σ ∂L/∂z, `[F]`.
    by_z: Tensor,
    by_w_dec: Tensor,
    /// Whether lists of entries can be used: on a CPU, with the features' weights in one piece each.
    lists: bool,
}

impl<'a> AnalyticParts<'a> {
    /// For a batch, if the dictionary is two affine maps in float32. Gradients are written to the memory of the last step's.
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

    /// How many features the dictionary has.
    pub fn features(&self) -> i64 {
        self.by_z.size()[0]
    }

    /// Room for tiles of so many features in all.
    fn storage(&self, features: i64, kind: Kind) -> Tensor {
        let x = self.x.exact();
        Tensor::empty([x.size()[0] * features], (kind, x.device()))
    }

    /// A tile in such a room, [B, count], so many features from its beginning.
    fn tile(&self, storage: &Tensor, at: i64, count: i64) -> Tensor {
        let rows = self.x.exact().size()[0];
        storage.narrow(0, rows * at, rows * count).view([rows, count])
    }

    /// Calls `work` with the product of what is encoded with each tile of features, [B, n], the features' biases, and the
    /// first one's number. All products lie in the same place, one after the other.
    fn products(&self, mut work: impl FnMut(&Tile, i64)) {
        let bias = self.b_enc.as_ref().map_or_else(|| self.by_z.zeros_like(), Tensor::contiguous);
        let most = tile_width(self.precision);
        let storage = self.storage(most.min(self.features()), self.precision.kind());
        for first in (0..self.features()).step_by(most as usize) {
            let count = most.min(self.features() - first);
            let product = self.tile(&storage, 0, count);
            // As it is needed: all of it in another type would take room, and it is needed once.
            let weight = self.w_enc.exact().narrow(0, first, count).to_kind(self.precision.kind());
            let _ = self.x.for_products().matmul_out(&product, &weight.tr());
            let bias = &numbers::<f32>(&bias)[first as usize..(first + count) as usize];
            work(&Tile::new(&product, bias), first);
        }
    }

    /// Pre-activations of rows X, [n, F].
    fn plainly(&self, x: &Operand) -> Tensor {
        let z = self.precision.product(x.for_products(), &self.w_enc.for_products().tr());
        match &self.b_enc {
            Some(bias) => z + bias,
            None => z,
        }
    }

    /// The pre-activations above `bounds` `[F]`, or above 0, and perhaps others. On a CPU.
    pub fn encode(&self, bounds: Option<&Tensor>) -> Vec<Block> {
        let bounds = bounds.map(Tensor::contiguous).unwrap_or_else(|| self.by_z.zeros_like());
        let precision = self.precision;
        // In one piece: what comes and goes between pieces that stay would leave holes.
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

    /// The pre-activations that a dictionary of the TopK family selects in training, and perhaps some that are not above
    /// 0: no features either. With them, where they are known, the selected features' indices, those at 0 too, int64.
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

    /// The k largest pre-activations above 0 of each row.
    pub fn select_of_each(&mut self, k: i64) -> Block {
        if k >= self.features() {
            return Block::dense(self.plainly(&self.x).relu(), 0, self.precision);
        }
        if self.lists && self.sparse(k) {
            return self.list(Kept::OfEach(k as usize));
        }
        self.of_each(k).0
    }

    /// Whether k features of each row are few enough to be listed. More of them would be dearer than dense products, even
    /// with libtorch's selection before.
    fn sparse(&self, k: i64) -> bool {
        4 * k <= self.features()
    }

    fn list(&mut self, kept: Kept) -> Block {
        let mut selector = Selector::new(kept, self.x.exact().size()[0] as usize);
        self.products(|tile, _| selector.offer(tile));
        // What is listed is multiplied exactly.
        self.x.cast.take();
        Block::sparse(selector.finish(), 0, self.precision)
    }

    /// All pre-activations above 0, [B, F], of the type of the products, as the encoder's bias is here.
    fn whole(&self) -> Tensor {
        let bias = self.b_enc.as_ref().map(|bias| bias.to_kind(self.precision.kind()));
        self.x.for_products().linear(self.w_enc.for_products(), bias).relu_()
    }

    /// The k largest pre-activations of each row as libtorch finds them, and their features.
    fn of_each(&self, k: i64) -> (Block, Tensor) {
        let z = self.whole();
        let size @ [rows, features] = [z.size()[0], z.size()[1]];
        let (values, indices) = z.topk(k, -1, true, false);
        let first = Tensor::arange(rows, (Kind::Int64, z.device())).unsqueeze(1) * features;
        let at = (&indices + first).reshape([-1]);
        let values = values.to_kind(Kind::Float).reshape([-1]);
        (Block::scattered(values, at, size, rows, self.precision), indices)
    }

    /// The `count` largest pre-activations of the batch as libtorch finds them.
    fn of_batch(&self, count: i64) -> Block {
        let z = self.whole();
        let size = [z.size()[0], z.size()[1]];
        let (values, at) = z.reshape([-1]).topk(count, -1, true, false);
        Block::scattered(values.to_kind(Kind::Float), at, size, 1, self.precision)
    }

    /// A block in the groups that end at these features.
    pub fn groups(&self, block: Block, ends: &[i64]) -> Vec<Block> {
        if ends.len() == 1 {
            return vec![block];
        }
        let block = block.matrix();
        let starts = std::iter::once(0).chain(ends.iter().copied());
        starts.zip(ends).map(|(start, end)| block.narrow(start..*end)).collect()
    }

    /// The features that the k largest of a row after ReLU have among them though they are 0, of the rows that have less
    /// than k above: int64 of any shape. Which these are of many is libtorch's choice.
    pub fn selected_at_zero(&self, block: &Block, k: i64) -> Tensor {
        let few = block.sum_by_row(&block.z.gt(0.0).to_kind(Kind::Float)).less(k as f64).nonzero().reshape([-1]);
        if few.size()[0] == 0 {
            return few;
        }
        // A part at a time, for there may be many, and all features of each are computed.
        let selected = few.split(4 * ROUND, 0).into_iter().map(|few| {
            // Some row again says nothing new.
            let again = few.narrow(0, 0, 1).expand([lacking(few.size()[0])], false);
            let rows = self.x.select(&Tensor::cat(&[few, again], 0));
            self.plainly(&rows).relu().topk(k, -1, true, false).1
        });
        Tensor::cat(&selected.collect::<Vec<_>>(), 0)
    }

    /// How far a reconstruction without any features is off: b − target, [B, d].
    pub fn begin(&self, batch: &Batch) -> Tensor {
        (self.affine.bias().1.detach() - &batch.target).contiguous()
    }

    /// Adds to an error [B, d] what values of a block's features, as z, decode to.
    pub fn decode(&self, block: &Block, values: &Tensor, error: &mut Tensor) {
        block.decode(values, &self.w_dec, error);
    }

    /// ∂L/∂x̂ [B, d], to be multiplied with.
    fn operand(&self, by_x_hat: &Tensor) -> Operand {
        Operand::new(by_x_hat.contiguous(), self.precision)
    }

    /// Takes gradients of features that pass what comes to them on to z where this is above 0, given ∂L/∂x̂ [B, d].
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

    /// The same step for some features alone, `[n]` int64; its gradients are added by [`AnalyticParts::add`]. Their number is rounded up by
    /// features without weights, which are never above 0.
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

    /// Adds the gradients of a step for some features alone.
    pub fn add(&mut self, features: &Tensor, part: &AnalyticParts) {
        let own = |of_part: &Tensor| of_part.narrow(0, 0, features.size()[0]);
        let _ = self.by_w_enc.index_add_(0, features, &own(&part.by_w_enc));
        let _ = self.by_z.index_add_(0, features, &own(&part.by_z));
        let _ = self.by_w_dec.index_add_(0, features, &own(&part.by_w_dec));
    }

    /// The gradients of the two layers, by state-dict names, where `by_x_hat` `[d]` is the sum of ∂L/∂x̂ over the batch.
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

/// Memory for the gradient of a matrix, [F, d]: that of the last step's gradient if it lies right.
fn room(weight: &Weight, gradients: &Gradients) -> Tensor {
    let rows = weight.rows();
    let room = gradients.get(weight.name).map(|gradient| weight.like_rows(gradient));
    let fits = |room: &Tensor| room.size() == rows.size() && room.is_contiguous() && room.kind() == rows.kind();
    room.filter(fits).unwrap_or_else(|| rows.empty_like())
}

/// The sum over rows, `[d]` of [B, d].
pub fn sum_of_rows(rows: &Tensor) -> Tensor {
    rows.sum_dim_intlist([0].as_slice(), false, Kind::Float)
}

/// The mean over rows of their squared norms, a scalar of [B, d], without room for the squares.
pub fn mean_square(rows: &Tensor) -> Tensor {
    rows.norm_scalaropt_dim(2.0, [-1], false).square().mean(Kind::Float)
}

/// An analytic step of an objective, if the dictionary is two affine maps: terms and gradients of
///
/// ```text
/// L = error(x̂) + penalty + the activation function's auxiliary loss
/// ```
///
/// `count` if it is asked which features fired.
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
    let Some(mut hand) = AnalyticParts::new(pass) else { return Ok(None) };
    let blocks = if on_gpu {
        vec![Block::dense(hand.whole(), 0, hand.precision)]
    } else {
        hand.encode(activation.bounds().as_ref())
    };
    let mut error = hand.begin(pass.batch);
    let mut auxiliary = activation.auxiliary().then(|| error.copy());
    let mut fired = (count || pass.logging).then(|| hand.by_z.zeros_like());
    let mut penalty = Sums::new(&objective.penalty, &error);
    let mut watched = objective.watched.as_ref().map(|watched| Sums::new(watched, &error));
    for block in &blocks {
        let features = activation.features(block);
        hand.decode(block, &features, &mut error);
        let penalized = activation.penalized(block);
        for penalty in std::iter::once(&mut penalty).chain(&mut watched) {
            penalty.see(block, penalized.as_ref().unwrap_or(&features));
        }
        if let (Some(auxiliary), Some(penalized)) = (&mut auxiliary, &penalized) {
            hand.decode(block, penalized, auxiliary);
        }
        if let Some(fired) = fired.as_mut().filter(|_| on_gpu) {
            // Features here are not negative.
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
        hand.operand(&(error * (2.0 / pass.batch.len() as f64)))
    });

    let error = pass.logging.then_some(error);
    let by_sum = sum_of_rows(&by_x_hat);
    let by_x_hat = hand.operand(&by_x_hat);
    for block in blocks {
        let features = activation.features(&block);
        block.accumulate(&features, &by_x_hat, &mut hand.by_w_dec);
        let penalized = penalty.slope(&block, || activation.penalized(&block).unwrap_or(features));
        let by = Derivatives {
            features: block.products(&by_x_hat, &hand.w_dec),
            penalized,
            auxiliary: by_auxiliary.as_ref().map(|by_auxiliary| block.products(by_auxiliary, &hand.w_dec)),
        };
        let by_z = activation.backward(&block, &by);
        drop(by);
        hand.backward_of_encoder(&block, &by_z);
    }
    let mut gradients = hand.gradients(by_sum);
    gradients.extend(activation.gradients());
    Ok(Some((AnalyticStep { fired, error, gradients }, values)))
}
