//! Arguments of the attribute.

use proc_macro2::Span;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{Error, Expr, Ident, Result, Token, parenthesized};

/// Kinds of components; one comes first in the attribute.
const KINDS: [&str; 9] = ["dictionary", "trainer", "modifier", "source", "text", "model", "metric", "logger", "format"];

/// Parsed arguments of the attribute.
pub struct Args {
    pub kind: Ident,
    pub name: Expr,
    pub summary: Expr,
    pub paper: Option<Expr>,
    pub example: Option<Expr>,
    pub default_dictionary: Option<Expr>,
    pub default: bool,
    pub short_run: Option<(Expr, Expr)>,
    pub fields: Vec<Listed>,
}

/// An entry of `fields(...)`.
pub enum Listed {
    /// `..`: the struct's own fields.
    Own,
    /// A field or a group, with a value, or with values for fields of the group.
    Named { name: Ident, value: Option<Box<Expr>>, values: Vec<(Ident, Expr)> },
}

impl Parse for Args {
    fn parse(input: ParseStream) -> Result<Self> {
        let kind = kind(input)?;
        let name = if input.is_empty() || input.peek(Token![,]) { None } else { Some(input.parse()?) };
        let mut given: Vec<(Ident, Option<Expr>)> = Vec::new();
        let mut fields = Vec::new();
        while !input.is_empty() {
            input.parse::<Token![,]>()?;
            if input.is_empty() {
                break;
            }
            let argument: Ident = input.call(Ident::parse_any)?;
            if given.iter().any(|(known, _)| *known == argument) {
                return Err(Error::new(argument.span(), format!("`{argument}` is given twice")));
            }
            let value = match argument.to_string().as_str() {
                "summary" | "paper" | "example" | "default_dictionary" | "short_run" | "measured" => {
                    Some(value(input, &argument)?)
                }
                "default" => None,
                "fields" => {
                    if !input.peek(syn::token::Paren) {
                        return Err(Error::new(argument.span(), "`fields` takes a list: `fields(width)`"));
                    }
                    let list;
                    parenthesized!(list in input);
                    fields = Punctuated::<Listed, Token![,]>::parse_terminated(&list)?.into_iter().collect();
                    None
                }
                _ => {
                    return Err(Error::new(
                        argument.span(),
                        format!(
                            "unknown argument `{argument}`: use `summary`, `paper`, `example`, \
                             `default_dictionary`, `default`, `short_run` with `measured`, or `fields`"
                        ),
                    ));
                }
            };
            given.push((argument, value));
        }
        Args::new(kind, name, given, fields)
    }
}

impl Args {
    fn new(
        kind: Ident,
        name: Option<Expr>,
        mut given: Vec<(Ident, Option<Expr>)>,
        fields: Vec<Listed>,
    ) -> Result<Self> {
        let span = |name: &str| given.iter().find(|(known, _)| known == name).map(|(ident, _)| ident.span());
        for argument in ["default_dictionary", "short_run"] {
            if let Some(span) = span(argument).filter(|_| kind != "trainer") {
                return Err(Error::new(span, format!("`{argument}` is only for trainers, but this is a {kind}")));
            }
        }
        let short_run = match (span("short_run"), span("measured")) {
            (Some(span), None) => return Err(Error::new(span, "add `measured`: the result of the short run")),
            (None, Some(span)) => {
                return Err(Error::new(span, "add `short_run`: the settings that were measured"));
            }
            (short_run, _) => short_run.is_some(),
        };
        let default = span("default").is_some();
        let mut take = |name: &str| {
            let index = given.iter().position(|(known, _)| known == name)?;
            given.swap_remove(index).1
        };
        let summary = take("summary");
        let example = take("example");
        // One error lists everything that is missing, so that one compilation shows it.
        let needed = [
            (name.is_none(), "a name after the kind, the value of `type` in a config: `trainer \"tanh\"`"),
            (summary.is_none(), "`summary = \"...\"`: one line for `dictlearn list`"),
            (
                example.is_none() && kind != "model",
                "`example = \"...\"`: YAML of the component that runs unchanged (for a format, a command)",
            ),
        ];
        let missing: Vec<&str> = needed.into_iter().filter(|(missing, _)| *missing).map(|(_, text)| text).collect();
        match (name, summary) {
            (Some(name), Some(summary)) if missing.is_empty() => Ok(Args {
                name,
                summary,
                example,
                paper: take("paper"),
                default_dictionary: take("default_dictionary"),
                default,
                short_run: if short_run { take("short_run").zip(take("measured")) } else { None },
                fields,
                kind,
            }),
            _ => Err(Error::new(kind.span(), format!("the {kind} lacks {}", missing.join(", and ")))),
        }
    }
}

fn kind(input: ParseStream) -> Result<Ident> {
    let expected = || format!("the kind of component comes first: {}", KINDS.join(", "));
    if input.is_empty() {
        return Err(Error::new(Span::call_site(), expected()));
    }
    let kind = input.call(Ident::parse_any).map_err(|error| Error::new(error.span(), expected()))?;
    if !KINDS.contains(&kind.to_string().as_str()) {
        return Err(Error::new(kind.span(), format!("`{kind}` is not a kind of component; {}", expected())));
    }
    Ok(kind)
}

/// Parses the value after an argument.
fn value(input: ParseStream, argument: &Ident) -> Result<Expr> {
    if !input.peek(Token![=]) {
        return Err(Error::new(argument.span(), format!("`{argument}` needs a value: `{argument} = \"...\"`")));
    }
    input.parse::<Token![=]>()?;
    input.parse()
}

impl Parse for Listed {
    fn parse(input: ParseStream) -> Result<Self> {
        if input.peek(Token![..]) {
            input.parse::<Token![..]>()?;
            return Ok(Listed::Own);
        }
        let name: Ident = input.parse()?;
        if input.peek(Token![=]) {
            let value = Some(Box::new(value(input, &name)?));
            return Ok(Listed::Named { name, value, values: Vec::new() });
        }
        let mut values = Vec::new();
        if input.peek(syn::token::Paren) {
            let list;
            parenthesized!(list in input);
            let pair = |input: ParseStream| {
                let name: Ident = input.parse()?;
                let value = value(input, &name)?;
                Ok((name, value))
            };
            values = list.parse_terminated(pair, Token![,])?.into_iter().collect();
        }
        Ok(Listed::Named { name, value: None, values })
    }
}
