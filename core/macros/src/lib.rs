//! The attribute with which a dictlearn plugin declares a component. Use it as `dictlearn_core::component`.

mod args;
mod expand;
mod fields;

use proc_macro::TokenStream;

/// Declares a component: the config struct below it, under a name in YAML.
///
/// ```ignore
/// /// The loss is the squared error plus λ times the L1 norm of the features.
/// #[component(trainer "my_method", summary = "Squared error with an L1 penalty",
///     paper = "Author et al. 2024, https://arxiv.org/abs/...",
///     example = "{type: my_method, lr: 1e-3, l1_penalty: 0.05}",
///     default_dictionary = "auto_encoder", fields(lr = 1e-3, .., schedule))]
/// pub struct MyConfig {
///     /// Weight λ of the penalty.
///     #[default(0.1)]
///     #[schemars(range(min = 0))]
///     pub l1_penalty: f64,
/// }
///
/// impl TrainerConfig for MyConfig { /* build, class */ }
/// ```
///
/// # Arguments
///
/// Kind and name stand first, `trainer "tanh"`. The kinds are `dictionary`, `trainer`, `modifier`, `source`, `text`, `model`, `metric`, `logger` or `format`.
///
/// | argument | meaning |
/// | --- | --- |
/// | the name | value of `type` in a config, in lowercase letters, digits and underscores; for a model, its `model_type` |
/// | `summary = "..."` | one line for `dictlearn list` |
/// | `paper = "..."` | authors, year and address; left out where there is none |
/// | `example = "..."` | YAML of the component that runs as it stands; for a format, a command; models have none |
/// | `default_dictionary = "..."` | for a trainer, the dictionary that it trains by default |
/// | `usual` | used where a config names no component of the kind (see `Component::usual`) |
/// | `short_run = "...", measured = "..."` | for a trainer, settings for a short run and what they gave |
/// | `fields(...)` | shared fields to write into the struct |
///
/// Values are expressions, so a constant does where two components share a text.
///
/// # Fields
///
/// `#[default(VALUE)]` gives a field its default, and `#[default]` the default of its type. An `Option` is null by default; any
/// other field with neither must be set in the config. If every field has a default, the struct implements `Default`.
///
/// `fields(...)` writes fields that several components share, with their docs, ranges and defaults. It lists them in the
/// order in which the struct has them; `..` stands for the struct's own fields that the list does not name. Without `..`
/// these come first.
///
/// | in the list | fields | methods |
/// | --- | --- | --- |
/// | `width` | `dict_size`, `expansion_factor` | `features(&DictionaryCx)`: the number of features |
/// | `lr = VALUE` | `lr` | |
/// | `schedule` | `warmup_steps`, `sparsity_warmup_steps`, `decay_start` | `schedule(&TrainerCx)` |
/// | `resampling` | `resample_steps`, `resample_weight` | |
/// | `top_k` | what the trainers of the TopK family share | `settings()` |
///
/// One field of a group can stand in the list by itself. `field = VALUE` changes a default: `fields(lr = 1e-3, ..,
/// warmup_steps = 500)`; within a group, `schedule(warmup_steps = 500)`. `width = "the input's width"` says what
/// `expansion_factor` is a multiple of. A field that the struct writes itself takes the place of the shared one, with its
/// own docs and default. The defaults of a trainer's shared fields are adapted to the length of a run.
///
/// # What it writes
///
/// The derives `Debug`, `Clone`, `Serialize`, `Deserialize` and `JsonSchema`, `deny_unknown_fields`, `Default`, the constant
/// `NAME`, the registry's entry, and what lets YAML name the component. A model is read from a config.json of others: it
/// gets no `Serialize`, and other keys are ignored.
#[proc_macro_attribute]
pub fn component(args: TokenStream, item: TokenStream) -> TokenStream {
    expand::component(args.into(), item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}
