//! The attribute macro with which a dictlearn plugin declares a component. Use it as `dictlearn_core::component`.

mod args;
mod expand;
mod fields;

use proc_macro::TokenStream;

/// Declares a component: the annotated config struct, under a name in YAML.
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
/// Kind and name come first: `trainer "tanh"`. The kinds are `dictionary`, `trainer`, `modifier`, `source`, `text`,
/// `model`, `metric`, `logger` and `format`.
///
/// | argument | meaning |
/// | --- | --- |
/// | name | value of `type` in a config: lowercase letters, digits and underscores; for a model, its `model_type` |
/// | `summary = "..."` | one line for `dictlearn list` |
/// | `paper = "..."` | authors, year and URL; omitted if there is none |
/// | `example = "..."` | YAML of the component that runs unchanged; for a format, a command; optional for a model |
/// | `default_dictionary = "..."` | for a trainer, the dictionary that it trains by default |
/// | `default` | used where a config names no component of the kind (see `Component::default`) |
/// | `short_run = "...", measured = "..."` | for a trainer, settings for a short run and their measured result |
/// | `fields(...)` | shared fields to add to the struct |
///
/// Values are expressions, so components can share a text as a constant.
///
/// # Fields
///
/// `#[default(VALUE)]` sets a field's default, and `#[default]` uses the default of its type. An `Option` is null by
/// default; a config must set any other field without a default. If every field has a default, the struct implements
/// `Default`.
///
/// `fields(...)` adds fields that several components share, with their docs, ranges and defaults, in the listed order.
/// `..` stands for the struct's own fields that the list does not name; without it, these come first.
///
/// | in the list | fields | methods |
/// | --- | --- | --- |
/// | `width` | `dict_size`, `expansion_factor` | `features(&DictionaryCx)`: number of features |
/// | `lr = VALUE` | `lr` | |
/// | `schedule` | `warmup_steps`, `sparsity_warmup_steps`, `decay_start` | `schedule(&TrainerCx)` |
/// | `resampling` | `resample_steps`, `resample_weight` | |
/// | `top_k` | fields shared by the trainers of the TopK family | `settings()` |
///
/// The list can also name single fields of a group. `field = VALUE` changes a default: `fields(lr = 1e-3, ..,
/// warmup_steps = 500)`; within a group, `schedule(warmup_steps = 500)`. `width = "the input's width"` names what
/// `expansion_factor` is a multiple of. A field that the struct declares itself replaces the shared one, with its own
/// docs and default. The defaults of a trainer's shared fields adapt to the length of a run.
///
/// # Generated code
///
/// The derives `Debug`, `Clone`, `Serialize`, `Deserialize` and `JsonSchema`, `deny_unknown_fields`, `Default`, the
/// constant `NAME`, the registry entry, and the tagged trait by which YAML names the component. A model is read from a
/// third party's config.json: it gets no `Serialize` and ignores unknown keys.
#[proc_macro_attribute]
pub fn component(args: TokenStream, item: TokenStream) -> TokenStream {
    expand::component(args.into(), item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}
