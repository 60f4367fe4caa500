//! What the attribute writes.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::{
    Attribute, Data, DeriveInput, Error, Expr, ExprLit, Field, Fields as SynFields, Lit, LitStr, Meta, Result, Type,
};

use crate::args::Args;
use crate::fields::Fields;

/// The attribute with its arguments, applied to an item.
pub fn component(args: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let args: Args = syn::parse2(args)?;
    let item: DeriveInput = syn::parse2(item)?;
    let own = own_fields(&item)?;
    if let Some(generics) = item.generics.params.first() {
        return Err(Error::new_spanned(generics, "a config cannot be generic: YAML names one type"));
    }
    let core = quote!(::dictlearn_core::__component);
    let serde = "::dictlearn_core::__component::serde";
    let schemars = "::dictlearn_core::__component::schemars";
    let DeriveInput { attrs, vis, ident, .. } = &item;
    let Args { kind, name, summary, .. } = &args;
    let is_model = kind == "model";

    let mut fields = Fields::new(own, &args.fields)?;
    let methods = fields.methods(&core);
    let adapt = fields.adapt();
    let mut functions = TokenStream::new();
    let mut defaults = Some(Vec::new());
    for field in &mut fields.fields {
        let default = default_of(field)?.or_else(|| (!is_model && is_option(field)).then_some(Default::OfItsType));
        let Some(field_name) = field.ident.clone() else { continue };
        let Some(default) = default else {
            // Serde gives a skipped field the default of its type.
            defaults = defaults.filter(|_| is_skipped(field)).map(|mut known| {
                known.push(quote!(#field_name: ::core::default::Default::default()));
                known
            });
            continue;
        };
        let value = match &default {
            Default::OfItsType => {
                field.attrs.push(syn::parse_quote!(#[serde(default)]));
                quote!(::core::default::Default::default())
            }
            Default::Value(value) => {
                let function = format_ident!("__default_{}", field_name.to_string().trim_start_matches("r#"));
                let path = LitStr::new(&format!("{ident}::{function}"), field_name.span());
                field.attrs.push(syn::parse_quote!(#[serde(default = #path)]));
                let field_type = &field.ty;
                functions.extend(quote! {
                    #[doc(hidden)]
                    fn #function() -> #field_type {
                        #value
                    }
                });
                quote!(#ident::#function())
            }
        };
        if let Some(known) = &mut defaults {
            known.push(quote!(#field_name: #value));
        }
    }
    let default = defaults.filter(|_| !is_model).map(|defaults| {
        quote! {
            #[automatically_derived]
            impl ::core::default::Default for #ident {
                fn default() -> Self {
                    #ident { #(#defaults,)* }
                }
            }
        }
    });

    let (serialize, deny) = if is_model {
        (None, None)
    } else {
        (Some(quote!(#core::serde::Serialize,)), Some(quote!(, deny_unknown_fields)))
    };
    let written = &fields.fields;
    let tagged = (!is_model).then(|| {
        let tagged = format_ident!("Tagged{}", capital(&kind.to_string()));
        let adapt = (kind == "trainer").then(|| {
            quote! {
                fn adapt_shared(&mut self, length: &mut #core::RunLength) {
                    let _ = &length;
                    #adapt
                }
            }
        });
        quote! {
            #[typetag::serde(name = #ident::NAME)]
            impl #core::#tagged for #ident {
                fn boxed(&self) -> ::std::boxed::Box<dyn #core::#tagged> {
                    ::std::boxed::Box::new(::core::clone::Clone::clone(self))
                }
                #adapt
            }
        }
    });
    let family = is_model.then(|| {
        quote! {
            #core::inventory::submit! {
                #core::ModelFamily {
                    model_type: #ident::NAME,
                    load: |config, weights, cx| {
                        #core::ModelConfig::load(#core::read::<#ident>(config)?, weights, cx)
                    },
                }
            }
        }
    });
    let kind = format_ident!("{}", capital(&kind.to_string()));
    let text = |text: &Option<Expr>| text.as_ref().map_or(quote!(""), |text| quote!(#text));
    let (paper, example, is_default) = (text(&args.paper), text(&args.example), args.default);
    let default_dictionary = option(args.default_dictionary.as_ref().map(|name| quote!(#name)));
    let short_run = option(
        args.short_run
            .as_ref()
            .map(|(settings, measured)| quote!(#core::ShortRun { settings: #settings, measured: #measured })),
    );
    Ok(quote! {
        #(#attrs)*
        #[derive(::core::fmt::Debug, ::core::clone::Clone, #serialize #core::serde::Deserialize, #core::schemars::JsonSchema)]
        #[serde(crate = #serde #deny)]
        #[schemars(crate = #schemars)]
        #vis struct #ident {
            #(#written,)*
        }

        impl #ident {
            /// The component's name in a config.
            #[allow(dead_code)]
            pub const NAME: &'static str = #name;
            #methods
            #functions
        }

        #default

        const _: () = {
            // For what typetag's macro expands to.
            #[allow(unused_imports)]
            use #core::typetag;

            #tagged
            #family

            #core::inventory::submit! {
                #core::Component {
                    kind: #core::ComponentKind::#kind,
                    name: #ident::NAME,
                    summary: #summary,
                    paper: #paper,
                    example: #example,
                    default_dictionary: #default_dictionary,
                    default: #is_default,
                    short_run: #short_run,
                    schema: || #core::schemars::schema_for!(#ident),
                }
            }
        };
    })
}

/// The fields of the struct that the attribute stands on.
fn own_fields(item: &DeriveInput) -> Result<Vec<Field>> {
    let Data::Struct(data) = &item.data else {
        return Err(Error::new_spanned(
            &item.ident,
            "a component is declared by its config, a struct with named fields",
        ));
    };
    match &data.fields {
        SynFields::Named(fields) => Ok(fields.named.iter().cloned().collect()),
        SynFields::Unit | SynFields::Unnamed(_) => Err(Error::new_spanned(
            &item.ident,
            format!("a config has named fields; without any, write `struct {} {{}}`", item.ident),
        )),
    }
}

/// The default of a field.
enum Default {
    OfItsType,
    Value(TokenStream),
}

/// Takes `#[default]` off a field.
fn default_of(field: &mut Field) -> Result<Option<Default>> {
    let mut found = None;
    let mut kept = Vec::new();
    for attribute in std::mem::take(&mut field.attrs) {
        if !attribute.path().is_ident("default") {
            kept.push(attribute);
            continue;
        }
        if found.is_some() {
            return Err(Error::new_spanned(attribute, "the field has two defaults"));
        }
        found = Some(match &attribute.meta {
            Meta::Path(_) => Default::OfItsType,
            Meta::List(_) => Default::Value(match attribute.parse_args::<Expr>()? {
                // So that the default of a `String` is a plain literal.
                Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) => quote!(::core::convert::Into::into(#text)),
                value => quote!(#value),
            }),
            Meta::NameValue(_) => {
                return Err(Error::new_spanned(attribute, "write the default in parentheses: `#[default(0.1)]`"));
            }
        });
    }
    field.attrs = kept;
    Ok(found)
}

/// Whether the field's type is an `Option`.
fn is_option(field: &Field) -> bool {
    matches!(&field.ty, Type::Path(path) if path.path.segments.last().is_some_and(|last| last.ident == "Option"))
}

/// Whether the field is `#[serde(skip)]`.
fn is_skipped(field: &Field) -> bool {
    let skips = |attribute: &Attribute| {
        let mut skips = false;
        if attribute.path().is_ident("serde") {
            // What serde does not understand it refuses itself.
            let _ = attribute.parse_nested_meta(|meta| {
                skips |= meta.path.is_ident("skip");
                Ok(())
            });
        }
        skips
    };
    field.attrs.iter().any(skips)
}

fn option(value: Option<TokenStream>) -> TokenStream {
    value.map_or(quote!(::core::option::Option::None), |value| quote!(::core::option::Option::Some(#value)))
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
