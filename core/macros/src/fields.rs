//! Fields that components share, with their docs, ranges and defaults.
//!
//! They are added to the struct itself, because `#[serde(flatten)]` would lose the line and column of errors.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::parse::Parser;
use syn::{Error, Expr, ExprLit, Field, Ident, Lit, Result, parse_quote};

use crate::args::Listed;

/// Groups with their fields, in order.
const GROUPS: [(&str, &[&str]); 4] = [
    ("width", &["dict_size", "expansion_factor"]),
    ("schedule", &["warmup_steps", "sparsity_warmup_steps", "decay_start"]),
    ("resampling", &["resample_steps", "resample_weight"]),
    (
        "top_k",
        &[
            "lr",
            "auxk_alpha",
            "warmup_steps",
            "decay_start",
            "threshold_beta",
            "threshold_start_step",
            "k_anneal_steps",
            "dead_feature_threshold",
        ],
    ),
];

/// Fields of a struct, and the methods that come with shared ones.
pub struct Fields {
    /// All fields, in order.
    pub fields: Vec<Field>,
    /// Names of the listed groups and single fields.
    listed: Vec<Ident>,
}

impl Fields {
    /// Merges the struct's own fields with the listed ones.
    pub fn new(own: Vec<Field>, list: &[Listed]) -> Result<Self> {
        let mut listed = Vec::new();
        let resamples = list.iter().any(
            |entry| matches!(entry, Listed::Named { name, .. } if name == "resampling" || name == "resample_steps"),
        );
        let mut own: Vec<Option<Field>> = own.into_iter().map(Some).collect();
        let mut before: Vec<Field> = Vec::new();
        let mut after: Vec<Field> = Vec::new();
        // True after `..`.
        let mut passed = false;
        for entry in list {
            let (name, value, values) = match entry {
                Listed::Own => {
                    passed = true;
                    continue;
                }
                Listed::Named { name, value, values } => (name, value, values),
            };
            let into = if passed { &mut after } else { &mut before };
            let group = GROUPS.iter().find(|(group, _)| name == group);
            if group.is_none() && !values.is_empty() {
                return Err(Error::new(
                    name.span(),
                    format!("`{name}` is a single field: set its default as `{name} = ...`"),
                ));
            }
            let of = match (group, value) {
                (Some((group, _)), Some(value)) if *group != "width" => {
                    return Err(Error::new_spanned(
                        value,
                        format!("`{group}` is a group of fields: set a field's default as `{group}(field = ...)`"),
                    ));
                }
                (Some(_), of) => of.as_deref(),
                (None, _) => None,
            };
            let one = [name.to_string()];
            let members: Vec<&str> = match group {
                Some((_, members)) => members.to_vec(),
                None => one.iter().map(String::as_str).collect(),
            };
            if let Some((wrong, _)) = values.iter().find(|(name, _)| !members.iter().any(|member| name == member)) {
                return Err(Error::new(
                    wrong.span(),
                    format!("`{name}` has no field `{wrong}`; it has {}", members.join(", ")),
                ));
            }
            for member in members {
                let own = own.iter_mut().find(|field| is_called(field.as_ref(), member)).and_then(Option::take);
                let default = match group {
                    Some(_) => values.iter().find(|(name, _)| name == member).map(|(_, value)| value),
                    None => value.as_deref(),
                };
                let field = match (own, default) {
                    (Some(_), Some(value)) => {
                        return Err(Error::new_spanned(
                            value,
                            format!(
                                "the struct has its own field `{member}`: set its default there, `#[default(...)]`"
                            ),
                        ));
                    }
                    (Some(field), None) => field,
                    (None, default) => shared(name, member, default, resamples, of)?,
                };
                into.push(field);
            }
            listed.push(name.clone());
        }
        let own = own.into_iter().flatten();
        let fields: Vec<Field> =
            if passed { before.into_iter().chain(own).chain(after).collect() } else { own.chain(before).collect() };
        for (index, field) in fields.iter().enumerate() {
            let name = field.ident.as_ref();
            if let Some(name) = name.filter(|_| fields[..index].iter().any(|known| known.ident.as_ref() == name)) {
                return Err(Error::new(name.span(), format!("`fields` adds `{name}` twice")));
            }
        }
        Ok(Fields { fields, listed })
    }

    fn has(&self, name: &str) -> bool {
        self.fields.iter().any(|field| is_called(Some(field), name))
    }

    fn lists(&self, name: &str) -> bool {
        self.listed.iter().any(|listed| listed == name)
    }

    fn has_schedule(&self) -> bool {
        self.lists("schedule") || self.lists("warmup_steps")
    }

    /// Generates the methods of the listed fields.
    pub fn methods(&self, core: &TokenStream) -> TokenStream {
        let mut methods = TokenStream::new();
        if self.lists("width") {
            methods.extend(quote! {
                /// Returns the number of features, from `dict_size` or `expansion_factor`. Fails if both are set or if
                /// the dictionary does not fit in memory.
                pub fn features(&self, cx: &#core::DictionaryCx) -> #core::Result<i64> {
                    #core::dict_size(self.dict_size, self.expansion_factor, cx.activation_dim)
                }
            });
        }
        if self.has_schedule() {
            let or_none = |name: &str| {
                let field = format_ident!("{name}");
                if self.has(name) { quote!(self.#field) } else { quote!(::core::option::Option::None) }
            };
            let [decay, resample, sparsity] = ["decay_start", "resample_steps", "sparsity_warmup_steps"].map(or_none);
            methods.extend(quote! {
                /// Returns the schedule of learning rate and sparsity penalty, unchecked (see `Schedule::check`).
                pub fn schedule(&self, cx: &#core::TrainerCx) -> #core::Schedule {
                    #core::Schedule {
                        lr: self.lr,
                        steps: cx.steps,
                        warmup_steps: self.warmup_steps,
                        decay_start: #decay,
                        resample_steps: #resample,
                        sparsity_warmup_steps: #sparsity,
                    }
                }
            });
        }
        if self.lists("top_k") {
            let members = GROUPS.iter().find(|(group, _)| *group == "top_k").map_or(&[][..], |(_, members)| members);
            let members: Vec<Ident> = members.iter().map(|member| format_ident!("{member}")).collect();
            methods.extend(quote! {
                /// Returns the settings that the trainers of the TopK family share.
                pub fn settings(&self) -> #core::TopKSettings {
                    #core::TopKSettings { #(#members: self.#members,)* }
                }
            });
        }
        methods
    }

    /// Generates the code that adapts the defaults of a trainer's shared fields to the run length `length`.
    pub fn adapt(&self) -> TokenStream {
        let mut steps = TokenStream::new();
        if self.has_schedule() || self.lists("top_k") {
            let sparsity = if self.has("sparsity_warmup_steps") {
                quote!(&mut self.sparsity_warmup_steps)
            } else {
                quote!(&mut ::core::option::Option::None)
            };
            let decay =
                if self.has("decay_start") { quote!(self.decay_start) } else { quote!(::core::option::Option::None) };
            steps.extend(quote!(length.shrink_warm_ups(&mut self.warmup_steps, #sparsity, #decay);));
        }
        if self.lists("top_k") {
            steps.extend(quote! {
                length.shrink("threshold_start_step", &mut self.threshold_start_step);
                length.shrink_dead_feature_threshold(&mut self.dead_feature_threshold);
            });
        }
        steps
    }
}

fn is_called(field: Option<&Field>, name: &str) -> bool {
    field.and_then(|field| field.ident.as_ref()).is_some_and(|ident| ident == name)
}

/// Generates the shared field `member`, listed under `name`; `default` overrides its own. `resamples` is true if the
/// trainer resamples. `of` names the width that `expansion_factor` multiplies.
fn shared(name: &Ident, member: &str, default: Option<&Expr>, resamples: bool, of: Option<&Expr>) -> Result<Field> {
    let field: TokenStream = match member {
        "dict_size" => quote! {
            /// Number of features; alternatively set `expansion_factor`.
            #[default]
            #[serde(skip_serializing_if = "Option::is_none")]
            #[schemars(range(min = 1))]
            pub dict_size: Option<i64>
        },
        "expansion_factor" => {
            let width = match of {
                None => "the activations' width".to_owned(),
                Some(Expr::Lit(ExprLit { lit: Lit::Str(text), .. })) => text.value(),
                Some(other) => {
                    return Err(Error::new_spanned(
                        other,
                        "describe the width that it multiplies, as a string: `\"the input's width\"`",
                    ));
                }
            };
            let doc = format!(" Number of features as a multiple of {width}; 8 if neither is set.");
            quote! {
                #[doc = #doc]
                #[default]
                #[serde(skip_serializing_if = "Option::is_none")]
                #[schemars(range(min = 0))]
                pub expansion_factor: Option<f64>
            }
        }
        "lr" if name == "top_k" => quote! {
            /// Learning rate; null for 2e-4 / √(F / 2¹⁴), the scaling law of Gao et al. 2024.
            #[default]
            #[schemars(range(min = 0))]
            pub lr: Option<f64>
        },
        "lr" => {
            if default.is_none() {
                return Err(Error::new(name.span(), "set the method's learning rate: `lr = 1e-3`"));
            }
            quote! {
                /// Learning rate.
                #[schemars(range(min = 0))]
                pub lr: f64
            }
        }
        "warmup_steps" => {
            let again = if resamples { ", at the start and after each resampling" } else { "" };
            let doc = format!(" Steps over which the learning rate rises from 0{again}.");
            quote! {
                #[doc = #doc]
                #[default(1000)]
                pub warmup_steps: u64
            }
        }
        "sparsity_warmup_steps" => quote! {
            /// Steps over which the sparsity coefficient λ rises from 0; null for none.
            #[default(Some(2000))]
            pub sparsity_warmup_steps: Option<u64>
        },
        "decay_start" => quote! {
            /// Step at which the learning rate starts to fall, to 0 at the last step; null for never.
            #[default]
            pub decay_start: Option<u64>
        },
        "resample_steps" => quote! {
            /// Interval in steps at which features that have been silent for half of it are resampled; null for never.
            #[default]
            pub resample_steps: Option<u64>
        },
        "resample_weight" => quote! {
            /// Weight with which activations are drawn for dead features: `loss` (the reference) or `loss_squared` (the
            /// paper).
            #[default]
            pub resample_weight: ::dictlearn_core::__component::ResampleWeight
        },
        "auxk_alpha" => quote! {
            /// Weight α of the auxiliary loss.
            #[default(1.0 / 32.0)]
            #[schemars(range(min = 0))]
            pub auxk_alpha: f64
        },
        "threshold_beta" => quote! {
            /// Decay of the threshold's running mean.
            #[default(0.999)]
            #[schemars(range(min = 0, max = 1))]
            pub threshold_beta: f64
        },
        "threshold_start_step" => quote! {
            /// Step after which the threshold is tracked.
            #[default(1000)]
            pub threshold_start_step: u64
        },
        "k_anneal_steps" => quote! {
            /// Steps over which k falls from the activation width to the dictionary's `k`; null for none.
            #[default]
            #[schemars(range(min = 1))]
            pub k_anneal_steps: Option<u64>
        },
        "dead_feature_threshold" => quote! {
            /// Tokens after which a feature that no activation selected counts as dead.
            #[default(10_000_000)]
            #[schemars(range(min = 1))]
            pub dead_feature_threshold: i64
        },
        _ => {
            let groups: Vec<&str> = GROUPS.iter().map(|(group, _)| *group).collect();
            return Err(Error::new(
                name.span(),
                format!(
                    "there is no shared field `{name}`: name a group ({}), a field of one, `lr`, a field of this \
                     struct, or `..` for all of them",
                    groups.join(", ")
                ),
            ));
        }
    };
    let mut field = Field::parse_named.parse2(field)?;
    // Errors about the field then point at the list.
    field.ident = Some(Ident::new(member, name.span()));
    if let Some(default) = default {
        field.attrs.retain(|attribute| !attribute.path().is_ident("default"));
        field.attrs.push(parse_quote!(#[default(#default)]));
    }
    Ok(field)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use quote::ToTokens;

    fn fields(list: TokenStream, own: TokenStream) -> Fields {
        let args = quote!(trainer "a", summary = "A", example = "", fields(#list));
        let args: Args = syn::parse2(args).unwrap();
        let item: syn::ItemStruct = syn::parse2(quote!(struct Config { #own })).unwrap();
        Fields::new(item.fields.into_iter().collect(), &args.fields).unwrap()
    }

    fn names(fields: &Fields) -> Vec<String> {
        fields.fields.iter().filter_map(|field| Some(field.ident.as_ref()?.to_string())).collect()
    }

    fn field(fields: &Fields, name: &str) -> String {
        let found = fields.fields.iter().find(|field| is_called(Some(field), name)).unwrap();
        found.to_token_stream().to_string()
    }

    #[test]
    fn fields_follow_the_order_of_the_list() {
        let own = quote!(pub a: i64, pub b: i64);
        let order = |list| names(&fields(list, own.clone()));
        assert_eq!(order(quote!(width)), ["a", "b", "dict_size", "expansion_factor"]);
        assert_eq!(order(quote!(lr = 1.0, .., decay_start)), ["lr", "a", "b", "decay_start"]);
        assert_eq!(order(quote!(lr = 1.0, b, resample_steps, ..)), ["lr", "b", "resample_steps", "a"]);
    }

    #[test]
    fn a_field_of_the_struct_replaces_the_shared_one() {
        let own = quote! {
            /// Own.
            #[default(7)]
            pub warmup_steps: u64
        };
        let fields = fields(quote!(schedule), own);
        assert_eq!(names(&fields), ["warmup_steps", "sparsity_warmup_steps", "decay_start"]);
        assert!(field(&fields, "warmup_steps").contains("Own."));
        assert!(fields.adapt().to_string().contains("shrink_warm_ups"));
    }

    #[test]
    fn defaults_and_docs_can_be_changed() {
        let fields = fields(quote!(lr = 5e-5, schedule(warmup_steps = 7), resampling), quote!());
        assert!(field(&fields, "lr").contains("default (5e-5)"));
        let warmup = field(&fields, "warmup_steps");
        assert!(warmup.contains("default (7)") && !warmup.contains("1000"), "{warmup}");
        assert!(warmup.contains("at the start and after each resampling"), "{warmup}");
        let width = self::fields(quote!(width = "the input's width"), quote!());
        assert!(field(&width, "expansion_factor").contains("as a multiple of the input's width;"));
    }
}
