//! `dictlearn list`, `describe`, `schema` and `docs`, and `import`.

use super::args::{ConfigArgs, load};
use super::output::{print, say};
use super::reference;
use super::signals;
use crate::evaluate::source_cx;
use crate::run::harvest;
use anyhow::{Context, Result, bail};
use dictlearn_core::data::manifest::Dtype;
use dictlearn_core::error::printable;
use dictlearn_core::error::{InputError, Under};
use dictlearn_core::files::tensors;
use dictlearn_core::formats;
use dictlearn_core::registry;
use dictlearn_core::registry::{Component, ComponentKind, components, find};
use dictlearn_core::suggest::nearest;
use std::path::Path;
use std::process::ExitCode;

pub(super) fn import(
    name: &str,
    request: &formats::Request,
    out: Option<&Path>,
    list: Option<&str>,
) -> Result<ExitCode> {
    if let Some(glob) = list {
        let wanted = formats::glob(glob)?;
        let offers = formats::named(name)?.offers(request)?;
        let shown: Vec<_> = offers.iter().filter(|(offer, _)| wanted.matches(offer)).collect();
        let width = shown.iter().map(|(offer, _)| offer.len()).max().unwrap_or(0);
        let line = |(offer, about): &&(String, String)| format!("{offer:width$}  {about}").trim_end().to_owned() + "\n";
        print(&printable(&shown.iter().map(line).collect::<String>()))?;
        say!("{} of {} names match", shown.len(), offers.len());
        return Ok(ExitCode::SUCCESS);
    }
    for dir in formats::import(name, request, out)? {
        print(&dir.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn activations(args: &ConfigArgs, out: &Path, limit: Option<i64>, dtype: Dtype) -> Result<ExitCode> {
    let mut config = args.load()?;
    let source = find(ComponentKind::Source, config.source.typetag_name()).map(|source| (source.schema)());
    if source.is_some_and(|schema| schema.pointer("/properties/shuffle").is_some()) {
        // The command promises the data's order, even if the config shuffles for training.
        let in_order = args.set.iter().cloned().chain(["source.shuffle=false".to_owned()]).collect();
        config = load(&args.config, args.profile.clone(), in_order)?;
    }
    let interrupt = signals::listen()?;
    let source = source_cx(&config).and_then(|cx| config.source.build(&cx).under("source"));
    if source.is_err() && interrupt.asked() {
        return Ok(ExitCode::from(interrupt.status()));
    }
    let mut source = source.map_err(|error| config.written.locate(error))?;
    let manifest = harvest::write(&mut *source, out, limit, dtype, &interrupt);
    let manifest = manifest.map_err(|error| config.written.locate(error))?;
    say!("{} activations written to {}", manifest.activations, out.display());
    Ok(ExitCode::from(if manifest.complete { 0 } else { interrupt.status() }))
}

pub(super) fn kind(name: &str) -> Result<ComponentKind> {
    ComponentKind::parse(name).ok_or_else(|| {
        let known: Vec<&str> = ComponentKind::ALL.into_iter().map(ComponentKind::plural).collect();
        let near = nearest(name, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
        InputError::new(format!("unknown kind `{name}`"))
            .help(format!("{}known: {}", near.unwrap_or_default(), known.join(", ")))
            .into()
    })
}

pub(super) fn list(name: Option<&str>) -> Result<ExitCode> {
    let kinds = match name {
        Some(name) => vec![kind(name)?],
        None => ComponentKind::ALL.to_vec(),
    };
    let width = kinds.iter().flat_map(|kind| registry::names(*kind)).map(str::len).max().unwrap_or(0);
    let mut text = String::new();
    for (index, kind) in kinds.iter().filter(|kind| name.is_some() || !components(**kind).is_empty()).enumerate() {
        if name.is_none() {
            text += &format!("{}{}\n", if index > 0 { "\n" } else { "" }, kind.plural());
        }
        let indent = if name.is_none() { "  " } else { "" };
        for Component { name, summary, .. } in components(*kind) {
            text += &format!("{indent}{name:width$}  {summary}\n");
        }
    }
    if text.is_empty() {
        say!("no components are linked in");
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn describe(kind_name: &str, name: &str) -> Result<ExitCode> {
    let kind = kind(kind_name)?;
    let Some(component) = find(kind, name) else {
        let known = registry::names(kind);
        let near = nearest(name, known.iter().copied()).map(|near| format!("did you mean `{near}`? "));
        bail!(InputError::new(format!("unknown {kind} `{name}`")).help(format!(
            "{}known: {}",
            near.unwrap_or_default(),
            known.join(", ")
        )));
    };
    print(&reference::text(component, Path::new("")))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn docs(out: &Path) -> Result<ExitCode> {
    let pages = reference::pages();
    for (path, page) in &pages {
        let path = out.join(path);
        let dir = path.parent().unwrap_or(out);
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        tensors::write_file(&path, page.as_bytes())?;
    }
    say!("{} pages written to {}", pages.len(), out.display());
    Ok(ExitCode::SUCCESS)
}
