//! Resolves the hook points of a config: submodules, their inputs and outputs, attention heads.

use dictlearn_core::prelude::*;

use crate::LanguageModelConfig;

/// One module path or TransformerLens name, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "OneOrMany", into = "OneOrMany")]
pub struct Submodules(Vec<String>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl From<OneOrMany> for Submodules {
    fn from(written: OneOrMany) -> Self {
        match written {
            OneOrMany::One(name) => Submodules(vec![name]),
            OneOrMany::Many(names) => Submodules(names),
        }
    }
}

impl From<Submodules> for OneOrMany {
    fn from(Submodules(mut names): Submodules) -> Self {
        match names.len() {
            1 => OneOrMany::One(names.remove(0)),
            _ => OneOrMany::Many(names),
        }
    }
}

dictlearn_core::inline_schema!(Submodules, {"type": ["string", "array"], "items": {"type": "string"}, "minItems": 1});

/// The value of a module to harvest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum IoChoice {
    /// The module's input.
    In,
    /// The module's output.
    #[default]
    Out,
    /// Both: the input, to predict the output.
    InToOut,
}

/// How the outputs of attention heads form sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Heads {
    /// One site with all heads concatenated.
    #[default]
    Joined,
    /// One site for each head.
    Separate,
}

/// A site of a language model.
#[derive(Debug)]
pub struct LanguageModelSite {
    /// Name and widths.
    pub site: Site,
    /// The value that a dictionary reads.
    pub reads: Part,
    /// The value that it reconstructs.
    pub writes: Part,
}

impl LanguageModelSite {
    fn new(name: String, submodule: &str, head: Option<i64>, reads: Part, writes: Part) -> Self {
        let mut site = Site::new(name, (reads.width, writes.width));
        site.settings.insert("submodule".to_owned(), submodule.into());
        site.settings.insert("d_submodule".to_owned(), writes.width.into());
        if let Some(head) = head {
            site.settings.insert("head".to_owned(), head.into());
        }
        LanguageModelSite { site, reads, writes }
    }
}

/// Returns the sites of a config, in its order, or the mistakes of all its submodules.
pub fn sites(model: &dyn LanguageModel, config: &LanguageModelConfig) -> Result<Vec<LanguageModelSite>> {
    let Submodules(names) = &config.submodule;
    if names.is_empty() {
        bail!(InputError::new("`submodule` is an empty list").field("submodule").help("name at least one module"));
    }
    let add = |index: usize, sites: &mut Vec<LanguageModelSite>| {
        let name = &names[index];
        let key = if names.len() == 1 { "submodule".to_owned() } else { format!("submodule[{index}]") };
        if names[..index].contains(name) {
            bail!(InputError::new(format!("`{name}` is listed twice")).field(key).help("remove one of them"));
        }
        let part_of = |name: &str, io| {
            model.hook_point(name, io).map(|(point, width)| Part { center: config.center, ..Part::whole(point, width) })
        };
        let part = |io| part_of(name, io).under(&key);
        if let Some(target) = &config.target {
            if names.len() > 1 || config.heads == Heads::Separate {
                bail!(
                    InputError::new("`target` needs exactly one submodule, without separate heads")
                        .field("target")
                        .help("use a separate run for each pair of hook points")
                );
            }
            let reads = part(if config.io == IoChoice::Out { Io::Out } else { Io::In })?;
            let writes = part_of(target, Io::Out).under("target")?;
            let mut site = LanguageModelSite::new(name.clone(), name, None, reads, writes);
            site.site.settings.insert("target".to_owned(), target.as_str().into());
            sites.push(site);
            return Ok(());
        }
        let writes = part(if config.io == IoChoice::In { Io::In } else { Io::Out })?;
        if config.io == IoChoice::In && writes.point.io != Io::In {
            bail!(
                InputError::new(format!("`{name}` names an output, {}, but `io` is `in`", writes.point))
                    .field(key)
                    .help(format!("remove `io`, or name the module, `{}`", writes.point.module))
            );
        }
        let reads = if config.io == IoChoice::InToOut { part(Io::In)? } else { writes.clone() };
        if config.io == IoChoice::InToOut && reads == writes {
            bail!(
                InputError::new(format!("`{name}` names one value, but `in_to_out` needs two"))
                    .field(key)
                    .help(format!("name the module, `{}`", writes.point.module))
            );
        }
        let same = |site: &LanguageModelSite| (&site.reads.point, &site.writes.point) == (&reads.point, &writes.point);
        if let Some(other) = sites.iter().find(|site| same(site)) {
            bail!(
                InputError::new(format!("`{name}` is the same hook point as `{}`", other.site.name))
                    .field(key)
                    .help("remove one of them")
            );
        }
        match config.heads {
            Heads::Joined => sites.push(LanguageModelSite::new(name.clone(), name, None, reads, writes)),
            Heads::Separate => {
                let width = head_width(model, name, &reads, &writes)?;
                for head in 0..model.n_heads() {
                    let part = Part { start: head * width, width, ..reads.clone() };
                    let name_of_head = format!("{name}.head{head}");
                    sites.push(LanguageModelSite::new(name_of_head, name, Some(head), part.clone(), part));
                }
            }
        }
        Ok(())
    };
    let (mut sites, mut mistakes) = (Vec::new(), Mistakes::new());
    for index in 0..names.len() {
        mistakes.keep(add(index, &mut sites))?;
    }
    mistakes.into_result()?;
    Ok(sites)
}

/// Returns the width of one head's output. Returns an error if the site is not the output of attention heads.
fn head_width(model: &dyn LanguageModel, name: &str, reads: &Part, writes: &Part) -> Result<i64> {
    let layer = model.names().layer_of(&reads.point.module);
    let heads = |layer| model.names().transformer_lens(&format!("blocks.{layer}.attn.hook_z"));
    if reads == writes && layer.and_then(heads).as_ref() == Some(&reads.point) {
        return Ok(reads.whole / model.n_heads());
    }
    let example = heads(layer.unwrap_or(0)).map(|point| format!(", or `io: in` of `{}`", point.module));
    bail!(
        InputError::new(format!("`{name}` ({}) is not the output of attention heads", reads.point))
            .field("heads")
            .help(format!(
                "separate heads need `blocks.{}.attn.hook_z`{}",
                layer.unwrap_or(0),
                example.unwrap_or_default()
            ))
    );
}
