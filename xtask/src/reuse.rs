//! Checks that a plugin outside the workspace reuses the dependencies compiled for the workspace.
//!
//! cargo reuses a compilation unit with the same package, features, profile and dependencies. `--unit-graph`, an
//! unstable flag that `RUSTC_BOOTSTRAP` allows, lists the units without compiling anything. cargo identifies path
//! crates relative to the workspace root, so another workspace has different units: dictlearn's crates are compiled
//! once for all plugins.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::libtorch;

/// Fails if the plugin's release build or tests need a dependency that the workspace's did not compile.
pub fn dependencies(root: &Path, plugin: &Path) -> Result<()> {
    for (ours, theirs) in
        [(&["build", "--release"][..], &["build", "--release"][..]), (&["test", "--workspace"], &["test"])]
    {
        let (ours, theirs) = (units(root, ours)?, units(plugin, theirs)?);
        ensure!(theirs.values().any(|unit| !unit.own), "the unit graph of {} has no dependency", plugin.display());
        let differing: Vec<String> = theirs
            .iter()
            .filter(|(identity, unit)| !unit.own && !ours.contains_key(*identity))
            .map(|(identity, unit)| format!("  {}: {identity}", unit.name))
            .collect();
        if !differing.is_empty() {
            bail!(
                "{} would recompile dependencies of dictlearn because profiles or features differ:\n{}\n\
                 Copy the workspace's profiles to its Cargo.toml, and enable the features in the workspace's \
                 [dependencies].",
                plugin.display(),
                differing.join("\n")
            );
        }
    }
    Ok(())
}

/// Builds a plugin's tests and fails if that compiles any other crate.
pub fn everything_else(plugin: &Path, name: &str) -> Result<()> {
    let output = call(plugin, &["test", "--no-run", "--quiet", "--message-format=json-render-diagnostics"], &[])?;
    let mut compiled = BTreeSet::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: Value = serde_json::from_str(line).with_context(|| format!("cargo wrote {line}"))?;
        if message["fresh"] == false {
            compiled.insert(package(&message["package_id"])?.to_owned());
        }
    }
    ensure!(
        compiled.iter().map(String::as_str).eq([name]),
        "the tests of {name} compile more than its own crate: {}",
        compiled.into_iter().collect::<Vec<_>>().join(", ")
    );
    Ok(())
}

struct Unit {
    name: String,
    /// True for path crates: dictlearn's and the plugin's.
    own: bool,
}

/// Returns the units of a cargo command by identity: everything whose change makes cargo recompile a unit.
fn units(dir: &Path, args: &[&str]) -> Result<BTreeMap<String, Unit>> {
    let output = call(dir, args, &["--unit-graph", "-Z", "unstable-options"])?;
    let graph: Value = serde_json::from_slice(&output.stdout).context("cannot read cargo's unit graph")?;
    identified(&graph)
}

fn identified(graph: &Value) -> Result<BTreeMap<String, Unit>> {
    let units = graph["units"].as_array().context("cargo's unit graph has no `units`")?;
    let mut identities = vec![None; units.len()];
    let mut found = BTreeMap::new();
    for index in 0..units.len() {
        let identity = identify(units, index, &mut identities)?;
        let id = &units[index]["pkg_id"];
        let own = id.as_str().is_some_and(|id| id.starts_with("path+"));
        found.insert(identity, Unit { name: package(id)?.to_owned(), own });
    }
    Ok(found)
}

/// Returns a unit's identity: its own settings and a hash of its dependencies' identities.
fn identify(units: &[Value], index: usize, known: &mut [Option<String>]) -> Result<String> {
    if let Some(identity) = &known[index] {
        return Ok(identity.clone());
    }
    let unit = units.get(index).context("cargo's unit graph names a unit that it does not have")?;
    let mut profile = unit["profile"].clone();
    // Profiles of different names are equal if their settings are.
    profile.as_object_mut().context("a unit without a profile")?.remove("name");
    let mut hash = std::hash::DefaultHasher::new();
    for dependency in unit["dependencies"].as_array().into_iter().flatten() {
        let index = dependency["index"].as_u64().context("a dependency without an index")? as usize;
        std::hash::Hash::hash(&identify(units, index, known)?, &mut hash);
    }
    let identity = format!(
        "{} {} {} features {} platform {} profile {profile} dependencies {:016x}",
        unit["pkg_id"],
        unit["target"]["kind"],
        unit["mode"],
        unit["features"],
        unit["platform"],
        std::hash::Hasher::finish(&hash)
    );
    known[index] = Some(identity.clone());
    Ok(identity)
}

/// Returns the name in a package id: `path+file:///a/b#name@0.1.0`, or `path+file:///a/name#0.1.0` if the folder has
/// it.
fn package(id: &Value) -> Result<&str> {
    let (place, version) = id.as_str().and_then(|id| id.split_once('#')).context("a package id without a version")?;
    Ok(version.split_once('@').map_or_else(|| place.rsplit('/').next().unwrap_or(place), |(name, _)| name))
}

fn call(dir: &Path, args: &[&str], more: &[&str]) -> Result<Output> {
    let mut command = Command::new(libtorch::cargo_program());
    command.args(args).args(more).current_dir(dir);
    for name in libtorch::VARIABLES {
        command.env_remove(name);
    }
    if !more.is_empty() {
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    let output = command.output().context("cannot run cargo")?;
    ensure!(
        output.status.success(),
        "`cargo {}` failed in {}: {}",
        args.join(" "),
        dir.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(debug: u8, feature: &str) -> Value {
        let unit = |id: &str, profile: Value, features: Value, dependencies: Value| {
            serde_json::json!({
                "pkg_id": id, "target": {"kind": ["lib"]}, "mode": "build", "platform": null,
                "features": features, "profile": profile, "dependencies": dependencies,
            })
        };
        serde_json::json!({"units": [
            unit("registry#leaf@1.0.0", serde_json::json!({"name": "dev", "debuginfo": debug}), [feature].into(), Value::Null),
            unit("registry#tree@1.0.0", serde_json::json!({"name": "test"}), Value::Null, serde_json::json!([{"index": 0}])),
            unit("path+file:///a/mine#0.1.0", serde_json::json!({}), Value::Null, serde_json::json!([{"index": 1}])),
        ]})
    }

    #[test]
    fn unit_identity_depends_on_profile_features_and_dependencies() {
        let names = |found: &BTreeMap<String, Unit>, other: &BTreeMap<String, Unit>| {
            let differing = found.iter().filter(|(identity, unit)| !unit.own && !other.contains_key(*identity));
            differing.map(|(_, unit)| unit.name.clone()).collect::<BTreeSet<_>>()
        };
        let usual = identified(&graph(1, "a")).unwrap();
        assert_eq!(usual.values().filter(|unit| unit.own).map(|unit| unit.name.as_str()).collect::<Vec<_>>(), ["mine"]);
        assert!(names(&usual, &identified(&graph(1, "a")).unwrap()).is_empty());
        for other in [graph(2, "a"), graph(1, "b")] {
            assert_eq!(names(&usual, &identified(&other).unwrap()), ["leaf".into(), "tree".into()].into());
        }
    }
}
