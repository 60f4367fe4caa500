//! The place in a language model that a published SAE reads.

use serde_json::{Map, Value};

use crate::data::text::{self, Wanted};

/// A place in a language model that a published SAE reads.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelSite {
    /// The model's repository on the Hub.
    pub model: String,
    /// A TransformerLens name or a module path.
    pub submodule: String,
    /// `in` or `out`, where the name leaves it open.
    pub io: Option<&'static str>,
    /// For transcoders: the place whose value is predicted.
    pub target: Option<String>,
    /// For an SAE on one attention head: its number.
    pub head: Option<i64>,
    /// Whether each context begins with the BOS token.
    pub prepend_bos: Option<bool>,
    /// Tokens in a context.
    pub ctx_len: Option<i64>,
    /// The dataset's repository on the Hub.
    pub dataset: Option<String>,
    /// Whether the mean over dimensions is taken off each activation, as TransformerLens does.
    pub center: bool,
}

impl ModelSite {
    /// Takes a module path with the value's end, `model.layers.3.output`, as some formats write it.
    pub fn at(&mut self, hook: &str) {
        (self.submodule, self.io) = match hook.rsplit_once('.') {
            Some((module, "input")) => (module.to_owned(), Some("in")),
            Some((module, "output")) => (module.to_owned(), Some("out")),
            _ => (hook.to_owned(), None),
        };
    }

    /// What config.json says of it under `buffer`.
    pub(super) fn buffer(&self) -> Value {
        let mut buffer = Map::new();
        let mut add = |name: &str, value: Value| {
            if !value.is_null() {
                buffer.insert(name.to_owned(), value);
            }
        };
        add("model", self.model.as_str().into());
        add("submodule", self.submodule.as_str().into());
        add("io", self.io.into());
        add("target", self.target.as_deref().into());
        add("head", self.head.into());
        add("site", self.head.map(|head| format!("{}.head{head}", self.submodule)).into());
        add("ctx_len", self.ctx_len.into());
        add("prepend_bos", self.prepend_bos.into());
        add("center", if self.center { true.into() } else { Value::Null });
        let dataset = self.dataset.as_deref().and_then(|dataset| text::written(Wanted::Dataset(dataset)));
        add("text", dataset.unwrap_or(Value::Null));
        Value::Object(buffer)
    }

    /// The text that it is to be read on: its own dataset, or what there is.
    pub(super) fn text(&self) -> Value {
        let own = self.dataset.as_deref().and_then(|dataset| text::written(Wanted::Dataset(dataset)));
        own.or_else(|| text::written(Wanted::Bundled)).unwrap_or(Value::Null)
    }

    /// The number of the layer, if the name has one.
    pub(super) fn layer(&self) -> Option<u64> {
        self.submodule.split('.').find_map(|part| part.parse().ok())
    }
}

/// How a place in a model is written as the `source` of a config. Submitted by the plugin that has the source.
pub struct WrittenSource {
    /// The config of a source that gives the place's activations on a text.
    pub config: fn(&ModelSite, Value) -> Value,
}

inventory::collect!(WrittenSource);
