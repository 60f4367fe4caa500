//! The site of a published SAE in a language model.

use serde_json::{Map, Value};

use crate::data::text::{self, Wanted};

/// The site of a published SAE in a language model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelSite {
    /// The model's repository on the Hub.
    pub model: String,
    /// A TransformerLens name or a module path.
    pub submodule: String,
    /// `in` or `out`, if the name does not determine it.
    pub io: Option<&'static str>,
    /// For transcoders: the hook point whose value is predicted.
    pub target: Option<String>,
    /// For an SAE on one attention head: the head's index.
    pub head: Option<i64>,
    /// True if each context begins with the BOS token.
    pub prepend_bos: Option<bool>,
    /// Number of tokens in a context.
    pub ctx_len: Option<i64>,
    /// The dataset's repository on the Hub.
    pub dataset: Option<String>,
    /// True if the mean over dimensions is subtracted from each activation, as TransformerLens does.
    pub center: bool,
}

impl ModelSite {
    /// Sets `submodule` and `io` from a module path that ends in `input` or `output`: `model.layers.3.output`.
    pub fn at(&mut self, hook: &str) {
        (self.submodule, self.io) = match hook.rsplit_once('.') {
            Some((module, "input")) => (module.to_owned(), Some("in")),
            Some((module, "output")) => (module.to_owned(), Some("out")),
            _ => (hook.to_owned(), None),
        };
    }

    /// Returns the `buffer` section of config.json.
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

    /// Returns the text to run the model on: its own dataset, or the bundled text.
    pub(super) fn text(&self) -> Value {
        let own = self.dataset.as_deref().and_then(|dataset| text::written(Wanted::Dataset(dataset)));
        own.or_else(|| text::written(Wanted::Bundled)).unwrap_or(Value::Null)
    }

    /// Returns the layer's index, if the name has one.
    pub(super) fn layer(&self) -> Option<u64> {
        self.submodule.split('.').find_map(|part| part.parse().ok())
    }
}

/// Writes a site as the `source` of a config. Submitted by the plugin that owns the source.
pub struct WrittenSource {
    /// Returns the config of a source of the site's activations on a text.
    pub config: fn(&ModelSite, Value) -> Value,
}

inventory::collect!(WrittenSource);
