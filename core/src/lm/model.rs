//! Language models with hooks on every module.
//!
//! A model's forward pass names its modules as Hugging Face does and hands every module's input and output to
//! [`Hooks`]. Hooks read values, replace them, and stop the pass after the last requested value.

use std::rc::Rc;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::blocks::Linear;
use super::context::{Context, KeysValues};
use super::hook_point::{HookPoint, Io, Tokens};
use super::names::Names;
use super::norm::Norm;
use crate::error::InputError;
use crate::suggest::nearest;

/// The forward pass ended early because all requested values have been read.
#[derive(Debug)]
pub struct Stop;

enum Action<'a> {
    Read(Option<Tensor>),
    Replace(Box<dyn Fn(&Tensor) -> Tensor + 'a>),
}

/// Actions of a forward pass at its modules.
#[derive(Default)]
pub struct Hooks<'a> {
    actions: Vec<(HookPoint, Action<'a>)>,
    unread: usize,
    stop_when_read: bool,
    path: String,
    visits: Option<Vec<Visit>>,
}

/// One module visited by a forward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visit {
    /// The module's path.
    pub module: String,
    /// Width (last dimension) of its input.
    pub input: i64,
    /// Width (last dimension) of its output.
    pub output: i64,
}

impl<'a> Hooks<'a> {
    /// Reads and replaces nothing.
    pub fn none() -> Self {
        Hooks::default()
    }

    /// Reads the values at these points; [`Hooks::take`] returns them. With `stop`, the pass ends after the last of
    /// them.
    pub fn read(points: &[HookPoint], stop: bool) -> Self {
        Hooks {
            actions: points.iter().map(|point| (point.clone(), Action::Read(None))).collect(),
            unread: points.len(),
            stop_when_read: stop,
            ..Hooks::default()
        }
    }

    /// Replaces the value at a point, [B, L, width], by the function's result of the same shape.
    pub fn replace(point: &HookPoint, with: impl Fn(&Tensor) -> Tensor + 'a) -> Self {
        Hooks { actions: vec![(point.clone(), Action::Replace(Box::new(with)))], ..Hooks::default() }
    }

    /// Records every module of the pass, without computing products of linear maps.
    pub fn record() -> Self {
        Hooks { visits: Some(Vec::new()), ..Hooks::default() }
    }

    /// Takes the value that was read at a point.
    pub fn take(&mut self, point: &HookPoint) -> Option<Tensor> {
        self.actions.iter_mut().find_map(|(at, action)| match action {
            Action::Read(value) if at == point => value.take(),
            _ => None,
        })
    }

    /// Returns the modules visited by a recording pass, in order of their outputs.
    pub fn into_visits(self) -> Vec<Visit> {
        self.visits.unwrap_or_default()
    }

    /// Runs a submodule of the current module, applying the hooks to its input and output.
    pub fn module(
        &mut self,
        name: &str,
        input: &Tensor,
        run: impl FnOnce(&mut Self, &Tensor) -> Result<Tensor, Stop>,
    ) -> Result<Tensor, Stop> {
        self.within(name, |hooks| {
            let input = hooks.meet(Io::In, input)?;
            let output = run(hooks, &input)?;
            hooks.leave(&input, &output)
        })
    }

    /// Applies the hooks of a submodule to the input and output of a computation; modules that it runs remain submodules
    /// of the current module.
    pub fn around(
        &mut self,
        name: &str,
        input: &Tensor,
        run: impl FnOnce(&mut Self, &Tensor) -> Result<Tensor, Stop>,
    ) -> Result<Tensor, Stop> {
        let input = self.within(name, |hooks| hooks.meet(Io::In, input))?;
        let output = run(self, &input)?;
        self.within(name, |hooks| hooks.leave(&input, &output))
    }

    /// Continues in a submodule of the current module.
    fn within<T>(&mut self, name: &str, run: impl FnOnce(&mut Self) -> Result<T, Stop>) -> Result<T, Stop> {
        let outer = self.path.len();
        if outer > 0 {
            self.path.push('.');
        }
        self.path.push_str(name);
        let result = run(self)?;
        self.path.truncate(outer);
        Ok(result)
    }

    /// Records the current module, and applies the hooks to its output.
    fn leave(&mut self, input: &Tensor, output: &Tensor) -> Result<Tensor, Stop> {
        if let Some(visits) = &mut self.visits {
            let width = |value: &Tensor| value.size().last().copied().unwrap_or(0);
            visits.push(Visit { module: self.path.clone(), input: width(input), output: width(output) });
        }
        self.meet(Io::Out, output)
    }

    /// Runs a linear map as [`Hooks::module`] does. A recording pass skips the product and returns zeros.
    pub fn linear(&mut self, name: &str, input: &Tensor, linear: &Linear) -> Result<Tensor, Stop> {
        self.module(name, input, |hooks, x| {
            if hooks.visits.is_none() {
                return Ok(linear.forward(x));
            }
            let mut size = x.size();
            *size.last_mut().expect("a linear map's input has a width") = linear.width();
            Ok(Tensor::zeros(size, (x.kind(), x.device())))
        })
    }

    /// Runs a norm as [`Hooks::module`] does; the result has dtype `out`.
    pub fn norm(&mut self, name: &str, input: &Tensor, norm: &Norm, out: Kind) -> Result<Tensor, Stop> {
        self.module(name, input, |hooks, x| {
            let asked = |(point, _): &(HookPoint, Action)| point.io == Io::Normed && point.module == hooks.path;
            if !hooks.actions.iter().any(asked) {
                return Ok(norm.forward(x, out));
            }
            let normed = hooks.meet(Io::Normed, &norm.normalize(x))?;
            Ok(norm.scale(&normed).to_kind(out))
        })
    }

    /// Returns true if the pass only records modules: products may be skipped, and values are meaningless.
    pub fn records(&self) -> bool {
        self.visits.is_some()
    }

    /// Returns true if a hook reads, replaces or records this submodule of the current module.
    pub fn sees(&self, name: &str) -> bool {
        let inner = |module: &str| module.strip_prefix(&self.path)?.strip_prefix('.').map(|rest| rest == name);
        self.visits.is_some() || self.actions.iter().any(|(point, _)| inner(&point.module) == Some(true))
    }

    fn meet(&mut self, io: Io, value: &Tensor) -> Result<Tensor, Stop> {
        let mut value = value.shallow_clone();
        for (point, action) in &mut self.actions {
            if point.io != io || point.module != self.path {
                continue;
            }
            match action {
                Action::Read(slot) => {
                    if slot.replace(value.shallow_clone()).is_none() {
                        self.unread -= 1;
                    }
                }
                Action::Replace(with) => value = with(&value).to_kind(value.kind()),
            }
        }
        if self.stop_when_read && self.unread == 0 {
            return Err(Stop);
        }
        Ok(value)
    }
}

/// State of a pass between two layers.
#[derive(Debug)]
pub struct Hidden {
    /// Residual stream, [B, L, d]; several of a model with AltUp, [A, B, L, d].
    pub x: Tensor,
    /// Masks and rotary tables of attention, computed once per pass.
    pub context: Rc<Context>,
    /// Keys and values that later layers use again.
    pub kept: KeysValues,
}

impl Hidden {
    /// Returns the same state, sharing memory, so that several passes can continue from it.
    pub fn fork(&self) -> Hidden {
        Hidden { x: self.x.shallow_clone(), context: self.context.clone(), kept: self.kept.fork() }
    }
}

/// A language model: embeddings, layers and a head.
pub trait LanguageModel: Send {
    /// Returns the width of the residual stream.
    fn hidden_size(&self) -> i64;

    /// Returns the number of layers.
    fn n_layers(&self) -> usize;

    /// Returns the number of attention heads per layer.
    fn n_heads(&self) -> i64;

    /// Returns the number of token ids.
    fn vocab_size(&self) -> i64;

    /// Returns the longest context in tokens; `None` if there is no limit.
    fn max_positions(&self) -> Option<i64>;

    /// Returns the module paths of the family.
    fn names(&self) -> &Names;

    /// Returns the device of the weights.
    fn device(&self) -> Device;

    /// Returns every weight by its Hugging Face name, sharing memory with the model.
    fn parameters(&self) -> Vec<(String, Tensor)>;

    /// Returns the size of all weights in bytes, including those not read yet.
    fn memory(&self) -> u64 {
        self.parameters().iter().map(|(_, parameter)| crate::files::tensors::bytes(parameter) as u64).sum()
    }

    /// Returns the number of tokens per pass that is fastest on a CPU: few enough that a layer's intermediate values stay in
    /// the caches, and enough for efficient products.
    fn tokens_at_once(&self) -> usize {
        1024
    }

    /// Returns every module in the order of a forward pass.
    fn modules(&self) -> Vec<Visit>;

    /// Embeds the tokens.
    fn begin(&self, tokens: &Tokens, hooks: &mut Hooks) -> Result<Hidden, Stop>;

    /// Runs one layer.
    fn layer(&self, index: usize, hidden: &Hidden, hooks: &mut Hooks) -> Result<Hidden, Stop>;

    /// Applies the final norm and the head. Returns logits [B, L, vocabulary], float32.
    fn end(&self, hidden: &Hidden, hooks: &mut Hooks) -> Result<Tensor, Stop>;
}

impl dyn LanguageModel + '_ {
    /// Runs the whole pass, unless the hooks stop it. Returns logits [B, L, vocabulary].
    pub fn forward(&self, tokens: &Tokens, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let hidden = self.begin(tokens, hooks)?;
        self.forward_from(0, &hidden, hooks)
    }

    /// Runs the pass from the input of a layer. Returns logits [B, L, vocabulary].
    pub fn forward_from(&self, layer: usize, hidden: &Hidden, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        let mut hidden = hidden.fork();
        for index in layer..self.n_layers() {
            hidden = self.layer(index, &hidden, hooks)?;
        }
        self.end(&hidden, hooks)
    }

    /// Returns the value at one point, [B, L, width]; the pass stops there.
    pub fn value_at(&self, tokens: &Tokens, point: &HookPoint) -> Tensor {
        let mut hooks = Hooks::read(std::slice::from_ref(point), true);
        let _ = self.forward(tokens, &mut hooks);
        hooks.take(point).expect("every pass visits every hook point of the model")
    }

    /// Computes the layers before the one that holds the point, once. Passes that replace the value at the point share
    /// this prefix.
    pub fn before<'a>(&'a self, tokens: &'a Tokens, point: &HookPoint) -> Prefix<'a> {
        let names = self.names();
        let modules = self.modules();
        let mut embeddings = modules.iter().take_while(|visit| names.layer_of(&visit.module).is_none());
        let layer = match names.layer_of(&point.module) {
            None if embeddings.any(|visit| visit.module == point.module) => {
                return Prefix { model: self, tokens, hidden: None };
            }
            None => self.n_layers(),
            Some(layer) => layer,
        };
        let run = |hooks: &mut Hooks| {
            let mut hidden = self.begin(tokens, hooks)?;
            for index in 0..layer {
                hidden = self.layer(index, &hidden, hooks)?;
            }
            Ok::<_, Stop>((layer, hidden))
        };
        Prefix { model: self, tokens, hidden: run(&mut Hooks::none()).ok() }
    }

    /// Resolves a module path with `io`, or a TransformerLens name. Returns the point and its width.
    ///
    /// # Errors
    /// Fails if the model has no such module; the help lists the nearest names.
    pub fn hook_point(&self, name: &str, io: Io) -> Result<(HookPoint, i64)> {
        let point = self.names().transformer_lens(name).unwrap_or_else(|| HookPoint { module: name.to_owned(), io });
        let modules = self.modules();
        let width = |module: &Visit| if point.io == Io::In { module.input } else { module.output };
        let found = modules.iter().find(|visit| visit.module == point.module).or_else(|| {
            // Libraries and releases differ in the outer modules: `layers.3`, `language_model.layers.3`.
            let bare = self.names().without_outer(name);
            let mut same = modules.iter().filter(|visit| self.names().without_outer(&visit.module) == bare);
            same.next().filter(|_| same.next().is_none())
        });
        if let Some(module) = found {
            return Ok((HookPoint { module: module.module.clone(), io: point.io }, width(module)));
        }
        let modules: Vec<String> = modules.into_iter().map(|visit| visit.module).collect();
        // Suggest TransformerLens names to users who write them.
        let hooks = self.names().transformer_lens_names(self.n_layers());
        let theirs = ["blocks.", "hook_", "ln_final."].iter().any(|start| name.starts_with(start));
        let known: Vec<&str> = (if theirs { &hooks } else { &modules }).iter().map(String::as_str).collect();
        let mut near: Vec<&str> = known.clone();
        near.sort_by(|a, b| strsim::jaro_winkler(b, name).total_cmp(&strsim::jaro_winkler(a, name)));
        near.truncate(5);
        let error = InputError::new(format!("the model has no module `{name}`"));
        let near = near.join(", ");
        Err(error
            .help(match nearest(name, known.iter().copied()) {
                Some(best) => format!("did you mean `{best}`? nearest names: {near}"),
                None => format!("nearest names: {near}"),
            })
            .into())
    }
}

/// Beginning of a forward pass that several passes continue.
pub struct Prefix<'a> {
    model: &'a dyn LanguageModel,
    tokens: &'a Tokens,
    hidden: Option<(usize, Hidden)>,
}

impl Prefix<'_> {
    /// Runs the rest of the pass. Returns logits [B, L, vocabulary].
    pub fn forward(&self, hooks: &mut Hooks) -> Result<Tensor, Stop> {
        match &self.hidden {
            Some((layer, hidden)) => self.model.forward_from(*layer, hidden, hooks),
            None => self.model.forward(self.tokens, hooks),
        }
    }
}

/// Returns the mean cross entropy of next-token prediction, in nats, and the number of predicted tokens.
///
/// A prediction counts where both the token and the one before it are text. `logits` is [B, L, vocabulary].
pub fn cross_entropy(logits: &Tensor, tokens: &Tokens) -> (f64, i64) {
    let length = tokens.size().1 - 1;
    let counted = tokens.mask.narrow(1, 1, length).logical_and(&tokens.mask.narrow(1, 0, length)).reshape([-1]);
    let count = counted.sum(Kind::Int64).int64_value(&[]);
    if count == 0 {
        return (0.0, 0);
    }
    let logits = logits.narrow(1, 0, length);
    let logits = logits.reshape([-1, logits.size()[2]]);
    let targets = tokens.ids.narrow(1, 1, length).reshape([-1]).masked_fill(&counted.logical_not(), -100);
    let loss = logits.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::Mean, -100, 0.0);
    (loss.double_value(&[]), count)
}
