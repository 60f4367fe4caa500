//! `dictlearn new-plugin`: writes a crate with a working component, for the user to change.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use dictlearn_core::error::InputError;
use dictlearn_core::registry::{ComponentKind, find};

/// Returns the template of a kind. Templates are Rust with the names `example_name` and `ExampleName`.
fn template(kind: ComponentKind) -> &'static str {
    match kind {
        ComponentKind::Dictionary | ComponentKind::Trainer => include_str!("dictionary.rs"),
        ComponentKind::Modifier => include_str!("modifier.rs"),
        ComponentKind::Source => include_str!("source.rs"),
        ComponentKind::Text => include_str!("text.rs"),
        ComponentKind::Metric => include_str!("metric.rs"),
        ComponentKind::Logger => include_str!("logger.rs"),
        ComponentKind::Model => include_str!("model.rs"),
        ComponentKind::Format => include_str!("format.rs"),
    }
}

/// Writes the crate of a component `name` to the folder `out`, which must be empty or missing. The crate depends on the
/// dictlearn whose source is in `dictlearn`.
pub fn write(kind: ComponentKind, name: &str, out: &Path, dictlearn: &Path) -> Result<()> {
    let template = template(kind);
    check_name(name)?;
    let both = if kind == ComponentKind::Trainer { [ComponentKind::Dictionary, kind] } else { [kind, kind] };
    if let Some(taken) = both.into_iter().find(|kind| find(*kind, name).is_some()) {
        bail!(InputError::new(format!("the {taken} `{name}` exists already")).help("choose another name"));
    }
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) || out.is_file() {
        bail!(InputError::new(format!("{} exists already", out.display())).help("choose another `--out`"));
    }
    let Ok(dictlearn) =
        fs::canonicalize(dictlearn).and_then(|dir| fs::metadata(dir.join("core/Cargo.toml")).map(|_| dir))
    else {
        bail!(
            InputError::new(format!("the source of dictlearn is not in {}", dictlearn.display()))
                .help("give the folder of your clone: `--dictlearn DIR`")
        );
    };
    refuse_the_workspace(out, &dictlearn)?;
    let manifest = dictlearn.join("Cargo.toml");
    let manifest = fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let camel: String = name.split('_').map(capital).collect();
    let filled = |text: &str| {
        text.replace("ExampleName", &camel)
            .replace("example_name", name)
            .replace("EXAMPLE_KIND", &capital(kind.name()))
            .replace("DICTLEARN", &toml_text(&dictlearn))
            .replace("PROFILES\n", &profiles(&manifest))
    };
    // cargo adapts it to the new crate, and keeps the versions that dictlearn was built with.
    let lock = fs::read_to_string(dictlearn.join("Cargo.lock")).ok();
    let mut files = vec![
        ("Cargo.toml", filled(include_str!("Cargo.toml.in"))),
        (".cargo/config.toml", filled(include_str!("config.toml.in"))),
        (".gitignore", "/target\n".to_owned()),
        ("src/lib.rs", filled(template)),
        ("src/main.rs", filled(include_str!("main.rs"))),
        ("tests/contract.rs", filled(include_str!("contract.rs"))),
    ];
    files.extend(lock.map(|lock| ("Cargo.lock", lock)));
    for (path, text) in files {
        let path = out.join(path);
        let dir = path.parent().unwrap_or(out);
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Returns the profiles of a manifest. cargo reuses builds of another workspace only if all settings are equal, so a
/// plugin copies dictlearn's.
pub fn profiles(manifest: &str) -> String {
    let mut kept = String::new();
    let mut inside = false;
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.starts_with("[profile.");
        }
        if inside && !line.trim().is_empty() && !line.starts_with('#') {
            if line.starts_with('[') && !kept.is_empty() {
                kept.push('\n');
            }
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

/// Refuses a folder whose crates belong to dictlearn's workspace: a crate there cannot be a workspace itself.
fn refuse_the_workspace(out: &Path, dictlearn: &Path) -> Result<()> {
    let parent = std::path::absolute(out).ok().and_then(|out| fs::canonicalize(out.parent()?).ok());
    if parent.is_some_and(|parent| ["plugins", "examples"].iter().any(|folder| parent == dictlearn.join(folder))) {
        bail!(InputError::new(format!("{} belongs to the workspace of dictlearn", out.display())).help(
            "choose an `--out` outside `plugins` and `examples`; CONTRIBUTING.md describes plugins of this repository"
        ));
    }
    Ok(())
}

/// Returns the folder that this dictlearn was built from.
pub fn own_source() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Refuses a component name that cannot be the name of a crate.
fn check_name(name: &str) -> Result<()> {
    let words = name.split('_');
    let word = |word: &str| {
        word.chars().next().is_some_and(|c| c.is_ascii_lowercase())
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    };
    // Names that a crate cannot have, or that its dependencies have.
    let reserved = [
        "core",
        "std",
        "alloc",
        "test",
        "main",
        "lib",
        "build",
        "contract",
        "dictlearn",
        "dictlearn_core",
        "serde",
        "serde_json",
        "schemars",
        "tch",
        "typetag",
        "inventory",
        "anyhow",
    ];
    if !words.clone().all(word) || reserved.contains(&name) || is_keyword(name) {
        bail!(
            InputError::new(format!("`{name}` cannot be the name of a plugin"))
                .help("names are lowercase words joined by underscores, such as `log_penalty`, and also name a crate")
        );
    }
    Ok(())
}

/// True if a name is a Rust keyword, which cannot be the name of a crate.
fn is_keyword(name: &str) -> bool {
    let keywords = "as break const continue crate else enum extern false fn for if impl in let loop match mod move mut pub \
                    ref return self static struct super trait true type unsafe use where while async await dyn abstract \
                    become box do final macro override priv typeof unsized virtual yield try gen";
    keywords.split_whitespace().any(|keyword| keyword == name)
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// Escapes a path for a TOML string.
fn toml_text(path: &Path) -> String {
    path.display().to_string().replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_copied_without_comments_and_other_tables() {
        let manifest = "[package]\nname = \"a\"\n\n# Why.\n[profile.dev]\nopt-level = 1\n\n# Members.\n\
                        [profile.dev.package.\"*\"]\nopt-level = 2\n\n[lints]\nworkspace = true\n";
        let expected = "[profile.dev]\nopt-level = 1\n\n[profile.dev.package.\"*\"]\nopt-level = 2\n";
        assert_eq!(profiles(manifest), expected);
        assert_eq!(profiles("[package]\n"), "");
    }

    #[test]
    fn folder_in_our_workspace_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let clone = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir_all(clone.join("plugins")).unwrap();
        let error = refuse_the_workspace(&clone.join("plugins/mine"), &clone).unwrap_err();
        assert!(format!("{error:?}").contains("belongs to the workspace of dictlearn"), "{error:?}");
        refuse_the_workspace(&clone.join("mine"), &clone).unwrap();
    }
}
