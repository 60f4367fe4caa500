//! Checks the layers of ARCHITECTURE.md: no import cycle between the files of a crate, core names no plugin, no plugin
//! depends on another, modules of core import only from lower layers, and only the command line prints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use syn::visit::Visit;

/// Core's layers, lowest first; unlisted modules are below them all.
const ROOMS: [&str; 8] = ["machine", "files", "lm", "data", "sae", "train", "report", "formats"];

/// Fails if an import breaks a layer, and lists all that do.
pub fn check(root: &Path, metadata: &Value) -> Result<()> {
    let mut broken = dependencies(metadata)?;
    let core = Crate::read(&root.join("core/src"))?;
    broken.extend(core.upward());
    let plugins: Vec<PathBuf> =
        std::fs::read_dir(root.join("plugins"))?.map(|entry| Ok(entry?.path().join("src"))).collect::<Result<_>>()?;
    broken.extend(named_plugins(root, &plugins)?);
    for dir in [root.join("src"), root.join("core/macros/src"), root.join("core/process/src")].iter().chain(&plugins) {
        broken.extend(Crate::read(dir)?.circles());
    }
    broken.extend(core.circles());
    let cli = root.join("src/cli");
    for dir in [root.join("src"), root.join("core/src")].iter().chain(&plugins) {
        for file in rust_files(dir)?.into_iter().filter(|file| !file.starts_with(&cli)) {
            let parsed = parsed(&file)?;
            broken.extend(prints(&parsed).into_iter().map(|name| format!("{} prints: {name}!", file.display())));
        }
    }
    ensure!(broken.is_empty(), "imports break the layers of ARCHITECTURE.md:\n  {}", broken.join("\n  "));
    Ok(())
}

/// Lists dependencies of core on plugins, and of plugins on other plugins or the application.
fn dependencies(metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let mut broken = Vec::new();
    for package in packages {
        let (name, manifest) = (text(package, "name")?, text(package, "manifest_path")?);
        let is_plugin = |path: &str| path.contains("/plugins/");
        let is_core = manifest.contains("/core/");
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let (Some(path), on) = (dependency["path"].as_str(), text(dependency, "name")?) else { continue };
            let application = on == "dictlearn" && (is_core || is_plugin(manifest));
            if is_plugin(&format!("{path}/")) && (is_core || is_plugin(manifest)) || application {
                broken.push(format!("{name} depends on {on} ({manifest})"));
            }
        }
    }
    Ok(broken)
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("cargo metadata has no `{key}`"))
}

/// Lists files of core that mention a plugin's crate name, also in comments.
fn named_plugins(root: &Path, plugins: &[PathBuf]) -> Result<Vec<String>> {
    let names: Vec<String> = plugins
        .iter()
        .filter_map(|src| src.parent()?.file_name()?.to_str().map(|name| name.replace('-', "_")))
        .map(|name| format!("dictlearn_{name}"))
        .collect();
    let mut broken = Vec::new();
    for file in rust_files(&root.join("core/src"))? {
        let text = std::fs::read_to_string(&file)?;
        broken.extend(
            names.iter().filter(|name| text.contains(*name)).map(|name| format!("{} names {name}", file.display())),
        );
    }
    Ok(broken)
}

fn parsed(path: &Path) -> Result<syn::File> {
    syn::parse_file(&std::fs::read_to_string(path)?).with_context(|| format!("cannot parse {}", path.display()))
}

/// Lists the printing macros of a file outside its tests.
fn prints(file: &syn::File) -> Vec<String> {
    struct Prints(Vec<String>);
    impl Visit<'_> for Prints {
        fn visit_macro(&mut self, call: &syn::Macro) {
            let name = call.path.segments.last().map(|segment| segment.ident.to_string()).unwrap_or_default();
            if ["print", "println", "eprint", "eprintln", "dbg"].contains(&name.as_str()) {
                self.0.push(name);
            }
        }
    }
    let mut prints = Prints(Vec::new());
    file.items.iter().filter(|item| !is_test(item)).for_each(|item| prints.visit_item(item));
    prints.0
}

fn rust_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(found)
}

/// Path of a module from its crate's root.
type Module = Vec<String>;

/// Modules of a crate (one per file), and the paths in the crate that each imports.
#[derive(Default)]
struct Crate {
    imports: BTreeMap<Module, BTreeSet<Vec<String>>>,
    /// Re-exports of each module: name and defining module.
    reexports: BTreeMap<Module, BTreeMap<String, Module>>,
    /// Names that each module defines.
    items: BTreeMap<Module, BTreeSet<String>>,
}

impl Crate {
    fn read(dir: &Path) -> Result<Self> {
        let mut read = Crate::default();
        for path in rust_files(dir)? {
            let mut module: Module = path
                .strip_prefix(dir)?
                .with_extension("")
                .iter()
                .map(|part| part.to_string_lossy().into_owned())
                .collect();
            if module.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
                module.pop();
            }
            read.add(module, &parsed(&path)?);
        }
        Ok(read)
    }

    fn add(&mut self, module: Module, file: &syn::File) {
        let mut imports = Imports { module: &module, found: BTreeSet::new() };
        let mut items = BTreeSet::new();
        let mut reexports = BTreeMap::new();
        for item in &file.items {
            if is_test(item) {
                continue;
            }
            imports.visit_item(item);
            match item {
                syn::Item::Use(item) if !matches!(item.vis, syn::Visibility::Inherited) => {
                    for path in leaves(&item.tree) {
                        let path = absolute(&module, path);
                        if let Some((name, from)) = path.and_then(|mut path| Some((path.pop()?, path))) {
                            reexports.insert(name, from);
                        }
                    }
                }
                syn::Item::Struct(item) => drop(items.insert(item.ident.to_string())),
                syn::Item::Enum(item) => drop(items.insert(item.ident.to_string())),
                syn::Item::Trait(item) => drop(items.insert(item.ident.to_string())),
                syn::Item::Fn(item) => drop(items.insert(item.sig.ident.to_string())),
                syn::Item::Const(item) => drop(items.insert(item.ident.to_string())),
                syn::Item::Static(item) => drop(items.insert(item.ident.to_string())),
                syn::Item::Type(item) => drop(items.insert(item.ident.to_string())),
                syn::Item::Macro(item) => items.extend(words(&item.mac.tokens.to_string())),
                _ => {}
            }
        }
        self.imports.insert(module.clone(), imports.found);
        self.items.insert(module.clone(), items);
        self.reexports.insert(module, reexports);
    }

    /// Returns the module that defines a path, following re-exports.
    fn resolve(&self, path: &[String]) -> Option<Module> {
        let module =
            (0..=path.len()).rev().map(|length| &path[..length]).find(|part| self.items.contains_key(*part))?;
        let Some(name) = path.get(module.len()) else { return Some(module.to_vec()) };
        if self.items[module].contains(name) {
            return Some(module.to_vec());
        }
        if let Some(from) = self.reexports[module].get(name).filter(|from| from.as_slice() != module) {
            return self.resolve(&[from.as_slice(), std::slice::from_ref(name)].concat());
        }
        // A glob import: a module that it covers defines the name.
        let globs = self.reexports[module].get("*").into_iter();
        let children = self.items.keys().filter(|child| child.len() == module.len() + 1 && child.starts_with(module));
        let mut all = globs.chain(children);
        all.find(|child| self.items.get(*child).is_some_and(|items| items.contains(name)))
            .cloned()
            .or(Some(module.to_vec()))
    }

    fn edges(&self) -> BTreeMap<&Module, BTreeSet<Module>> {
        let edges = self.imports.iter().map(|(module, paths)| {
            let to = paths.iter().filter_map(|path| self.resolve(path));
            (module, to.filter(|to| to != module && !to.is_empty()).collect())
        });
        edges.collect()
    }

    /// Lists import cycles between files.
    fn circles(&self) -> Vec<String> {
        let edges = self.edges();
        let mut circles = BTreeSet::new();
        for start in self.imports.keys() {
            if let Some(circle) = way(&edges, start) {
                circles.insert(circle);
            }
        }
        circles.into_iter().map(|circle| format!("import cycle: {circle}")).collect()
    }

    /// Lists imports of core from a layer above.
    fn upward(&self) -> Vec<String> {
        let floor = |module: &[String]| {
            module.first().and_then(|room| ROOMS.iter().position(|known| known == room)).map_or(0, |floor| floor + 1)
        };
        let exempt = |module: &Module| module.is_empty() || module[0] == "prelude";
        let edges = self.edges();
        let all = edges.iter().flat_map(|(from, to)| to.iter().map(move |to| (*from, to)));
        all.filter(|(from, to)| !exempt(from) && floor(from) < floor(to))
            .map(|(from, to)| format!("core's {} imports upwards from {}", from.join("::"), to.join("::")))
            .collect()
    }
}

/// Returns the shortest import cycle through a module; `None` unless the module is the first of the cycle.
fn way(edges: &BTreeMap<&Module, BTreeSet<Module>>, start: &Module) -> Option<String> {
    let mut before: BTreeMap<&Module, &Module> = BTreeMap::new();
    let mut queue = std::collections::VecDeque::from([start]);
    while let Some(at) = queue.pop_front() {
        for to in edges.get(at).into_iter().flatten() {
            if to == start {
                let mut circle = vec![at];
                while let Some(earlier) = before.get(circle[circle.len() - 1]) {
                    circle.push(earlier);
                }
                // Report each cycle once, from its first module.
                return circle.iter().all(|module| *start <= **module).then(|| {
                    let names: Vec<String> = circle.iter().rev().map(|module| module.join("::")).collect();
                    format!("{} -> {}", names.join(" -> "), start.join("::"))
                });
            }
            if !before.contains_key(to) && to != start {
                before.insert(to, at);
                queue.push_back(to);
            }
        }
    }
    None
}

fn is_test(item: &syn::Item) -> bool {
    let syn::Item::Mod(module) = item else { return false };
    module.attrs.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && matches!(&attribute.meta, syn::Meta::List(list) if list.tokens.to_string().contains("test"))
    })
}

/// Collects the paths in a module's code that refer to its own crate.
struct Imports<'a> {
    module: &'a [String],
    found: BTreeSet<Vec<String>>,
}

impl Visit<'_> for Imports<'_> {
    fn visit_item_use(&mut self, item: &syn::ItemUse) {
        // A re-export from the module's own folder is not an import.
        let own = !matches!(item.vis, syn::Visibility::Inherited);
        for path in leaves(&item.tree) {
            if let Some(path) = absolute(self.module, path).filter(|path| !own || !path.starts_with(self.module)) {
                self.found.insert(path);
            }
        }
    }

    fn visit_path(&mut self, path: &syn::Path) {
        let parts = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.found.extend(absolute(self.module, parts));
        syn::visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &syn::Macro) {
        // Macro tokens are not parsed; a path is `crate :: a :: b`.
        let text = call.tokens.to_string().replace(' ', "");
        for part in text.split("crate::").skip(1) {
            let path: String = part.chars().take_while(|c| c.is_alphanumeric() || "_:".contains(*c)).collect();
            self.found.insert(path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect());
        }
        syn::visit::visit_macro(self, call);
    }
}

/// Returns a path from the crate's root if it begins with `crate`, `super` or `self`.
fn absolute(module: &[String], path: Vec<String>) -> Option<Vec<String>> {
    match path.first()?.as_str() {
        "crate" => Some(path[1..].to_vec()),
        "self" => Some([module, &path[1..]].concat()),
        "super" => {
            let up = path.iter().take_while(|part| *part == "super").count();
            Some([&module[..module.len().checked_sub(up)?], &path[up..]].concat())
        }
        _ => None,
    }
}

/// Returns the paths that a `use` imports.
fn leaves(tree: &syn::UseTree) -> Vec<Vec<String>> {
    let under = |name: String, below: Vec<Vec<String>>| {
        below.into_iter().map(|path| std::iter::once(name.clone()).chain(path).collect()).collect()
    };
    match tree {
        syn::UseTree::Path(path) => under(path.ident.to_string(), leaves(&path.tree)),
        syn::UseTree::Name(name) if name.ident == "self" => vec![Vec::new()],
        syn::UseTree::Name(name) => vec![vec![name.ident.to_string()]],
        syn::UseTree::Rename(rename) => vec![vec![rename.ident.to_string()]],
        syn::UseTree::Glob(_) => vec![vec!["*".to_owned()]],
        syn::UseTree::Group(group) => group.items.iter().flat_map(leaves).collect(),
    }
}

fn words(tokens: &str) -> impl Iterator<Item = String> {
    tokens.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crate_of(files: &[(&str, &str)]) -> Crate {
        let mut read = Crate::default();
        for (module, text) in files {
            let module = module.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
            read.add(module, &syn::parse_file(text).unwrap());
        }
        read
    }

    #[test]
    fn an_import_cycle_is_found_through_flat_reexports() {
        let room = ("sae", "mod a; mod b; pub use a::*; pub use b::*;");
        let down = [("", ""), room, ("sae::a", "pub struct A;"), ("sae::b", "use super::a::A; pub struct B(A);")];
        assert_eq!(crate_of(&down).circles(), Vec::<String>::new());
        let circle = [("", ""), room, ("sae::a", "pub struct A(crate::sae::B);"), down[3]];
        assert_eq!(crate_of(&circle).circles(), ["import cycle: sae::a -> sae::b -> sae::a"]);
        // Tests may import from above.
        let test = [("", ""), room, ("sae::a", "pub struct A; #[cfg(test)] mod tests { use crate::sae::B; }"), down[3]];
        assert_eq!(crate_of(&test).circles(), Vec::<String>::new());
    }

    #[test]
    fn an_import_from_a_room_above_is_found() {
        let files = [("files", "use crate::train::Trainer;"), ("train", "pub struct Trainer;"), ("", "")];
        assert_eq!(crate_of(&files).upward(), ["core's files imports upwards from train"]);
        let files = [("train", "use crate::files::open;"), ("files", "pub fn open() {}"), ("", "")];
        assert_eq!(crate_of(&files).upward(), Vec::<String>::new());
    }

    #[test]
    fn a_file_that_prints_is_found() {
        let found = |text: &str| prints(&syn::parse_file(text).unwrap());
        assert_eq!(found("fn f() { if true { eprintln!(\"x\") } }"), ["eprintln"]);
        assert!(found("#[cfg(test)] mod tests { fn f() { println!(\"x\") } }").is_empty());
    }

    #[test]
    fn a_plugin_that_depends_on_another_is_found() {
        let package = |name: &str, folder: &str, on: &str, path: &str| {
            serde_json::json!({"name": name, "manifest_path": format!("/x/{folder}/Cargo.toml"),
                "dependencies": [{"name": on, "path": format!("/x/{path}")}]})
        };
        let broken = |package: Value| dependencies(&serde_json::json!({"packages": [package]})).unwrap().len();
        assert_eq!(broken(package("a", "plugins/a", "b", "plugins/b")), 1);
        assert_eq!(broken(package("core", "core", "b", "plugins/b")), 1);
        assert_eq!(broken(package("a", "plugins/a", "dictlearn", "")), 1);
        assert_eq!(broken(package("a", "plugins/a", "core", "core")), 0);
        assert_eq!(broken(package("dictlearn", "", "b", "plugins/b")), 0);
    }
}

#[cfg(test)]
mod tree {
    #[test]
    fn this_workspace_keeps_its_layers() {
        let root = crate::root().unwrap();
        super::check(&root, &crate::metadata(&root).unwrap()).unwrap();
    }
}
