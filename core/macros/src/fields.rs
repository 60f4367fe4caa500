//! The fields that components share: their docs, ranges and defaults, each stated here and nowhere else.
//!
//! They are written into the struct. With `#[serde(flatten)]` errors would lose their line and column.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::parse::Parser;
use syn::{Error, Expr, ExprLit, Field, Ident, Lit, Result, parse_quote};

use crate::args::Listed;

/// Each group with its fields, in order.
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

/// The fields of a struct, and the methods that shared ones bring.
pub struct Fields {
    /// In order.
    pub fields: Vec<Field>,
    /// Names of the groups in the list and of its single fields.
    listed: Vec<Ident>,
}

impl Fields {
    /// The struct's own fields with the listed ones.
    pub fn new(own: Vec<Field>, list: &[Listed]) -> Result<Self> {
        let mut listed = Vec::new();
        let resamples = list.iter().any(
            |entry| matches!(entry, Listed::Named { name, .. } if name == "resampling" || name == "resample_steps"),
        );
        let mut own: Vec<Option<Field>> = own.into_iter().map(Some).collect();
        let mut before: Vec<Field> = Vec::new();
        let mut after: Vec<Field> = Vec::new();
        // Whether `..` has come.
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
                    format!("`{name}` is one field: give its default as `{name} = ...`"),
                ));
            }
            let of = match (group, value) {
                (Some((group, _)), Some(value)) if *group != "width" => {
                    return Err(Error::new_spanned(
                        value,
                        format!("`{group}` is a group of fields: give the default of one as `{group}(field = ...)`"),
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
                                "the struct has a field `{member}` of its own: give its default there, `#[default(...)]`"
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
                return Err(Error::new(name.span(), format!("`fields` gives the struct `{name}` twice")));
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

    /// The methods of the listed fields.
    pub fn methods(&self, core: &TokenStream) -> TokenStream {
        let mut methods = TokenStream::new();
        if self.lists("width") {
            methods.extend(quote! {
                /// The number of features that `dict_size` and `expansion_factor` ask for, F. An error if both are given,
                /// or if it needs more memory than there is.
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
                /// The schedule of the learning rate and the sparsity penalty, not yet checked (`Schedule::check`).
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
                /// The settings that the trainers of the TopK family share.
                pub fn settings(&self) -> #core::TopKSettings {
                    #core::TopKSettings { #(#members: self.#members,)* }
                }
            });
        }
        methods
    }

    /// What adapts the defaults of a trainer's shared fields to the length of a run, given as `length`.
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

/// The shared field `member`, listed as `name`, with this default instead of its own. `resamples` if the trainer
/// resamples; `of` is what a width is a multiple of.
fn shared(name: &Ident, member: &str, default: Option<&Expr>, resamples: bool, of: Option<&Expr>) -> Result<Field> {
    let field: TokenStream = match member {
        "dict_size" => quote! {
            /// Number of features; or give `expansion_factor`.
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
                        "say in words what it is a multiple of: `\"the input's width\"`",
                    ));
                }
            };
            let doc = format!(" Number of features as a multiple of {width}; 8 if neither is given.");
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
                return Err(Error::new(name.span(), "give the method's learning rate: `lr = 1e-3`"));
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
            /// Steps over which λ rises from 0; null for none.
            #[default(Some(2000))]
            pub sparsity_warmup_steps: Option<u64>
        },
        "decay_start" => quote! {
            /// Step from which the learning rate falls to 0 at the last step; null for never.
            #[default]
            pub decay_start: Option<u64>
        },
        "resample_steps" => quote! {
            /// Resample dead features every so many steps: those silent for half of them; null for never.
            #[default]
            pub resample_steps: Option<u64>
        },
        "resample_weight" => quote! {
            /// How activations are drawn for dead features: by their `loss` (the reference) or `loss_squared` (the paper).
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
            /// How slowly the threshold's running mean moves.
            #[default(0.999)]
            #[schemars(range(min = 0, max = 1))]
            pub threshold_beta: f64
        },
        "threshold_start_step" => quote! {
            /// The threshold is kept from the step after this one on.
            #[default(1000)]
            pub threshold_start_step: u64
        },
        "k_anneal_steps" => quote! {
            /// Steps over which k falls from the activations' width to the dictionary's `k`; null for none.
            #[default]
            #[schemars(range(min = 1))]
            pub k_anneal_steps: Option<u64>
        },
        "dead_feature_threshold" => quote! {
            /// A feature is dead when no activation selected it for so many tokens.
            #[default(10_000_000)]
            #[schemars(range(min = 1))]
            pub dead_feature_threshold: i64
        },
        _ => {
            let groups: Vec<&str> = GROUPS.iter().map(|(group, _)| *group).collect();
            return Err(Error::new(
                name.span(),
                format!(
                    "there is no shared field `{name}`: name a group ({}), a field of one, `lr`, a field of this struct, or \
                     `..` for the fields of this struct",
                    groups.join(", ")
                ),
            ));
        }
    };
    let mut field = Field::parse_named.parse2(field)?;
    // So that an error about the field points at the list.
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
    fn fields_stand_in_the_order_of_the_list() {
        let own = quote!(pub a: i64, pub b: i64);
        let order = |list| names(&fields(list, own.clone()));
        assert_eq!(order(quote!(width)), ["a", "b", "dict_size", "expansion_factor"]);
        assert_eq!(order(quote!(lr = 1.0, .., decay_start)), ["lr", "a", "b", "decay_start"]);
        assert_eq!(order(quote!(lr = 1.0, b, resample_steps, ..)), ["lr", "b", "resample_steps", "a"]);
    }

    #[test]
    fn a_field_of_the_struct_takes_the_place_of_the_shared_one() {
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
