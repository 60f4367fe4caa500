//! The book in docs/: its table of contents, its links and commands, and its build with mdBook.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use pulldown_cmark::{CodeBlockKind, Event, Options, Tag, TagEnd};

/// A Markdown file: what it links to, where it can be linked, and its blocks of code.
struct Page {
    links: Vec<String>,
    anchors: BTreeSet<String>,
    /// Language and text of each block.
    blocks: Vec<(String, String)>,
}

impl Page {
    fn parse(text: &str) -> Page {
        let mut page = Page { links: Vec::new(), anchors: BTreeSet::new(), blocks: Vec::new() };
        let mut heading: Option<String> = None;
        let mut block: Option<(String, String)> = None;
        for event in pulldown_cmark::Parser::new_ext(text, Options::ENABLE_TABLES) {
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push(dest_url.into_string());
                }
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => page.anchor(&heading.take().unwrap_or_default()),
                Event::Start(Tag::CodeBlock(kind)) => {
                    let language = match kind {
                        CodeBlockKind::Fenced(language) => language.into_string(),
                        CodeBlockKind::Indented => String::new(),
                    };
                    block = Some((language, String::new()));
                }
                Event::End(TagEnd::CodeBlock) => page.blocks.extend(block.take()),
                Event::Text(text) | Event::Code(text) => match (&mut heading, &mut block) {
                    (Some(heading), _) => heading.push_str(&text),
                    (_, Some((_, block))) => block.push_str(&text),
                    _ => {}
                },
                _ => {}
            }
        }
        page
    }

    /// Adds the anchor of a heading, as mdBook and GitHub make it.
    fn anchor(&mut self, heading: &str) {
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        let plain = kept.collect::<String>().to_lowercase().replace(' ', "-");
        let mut anchor = plain.clone();
        let mut number = 1;
        while !self.anchors.insert(anchor.clone()) {
            anchor = format!("{plain}-{number}");
            number += 1;
        }
    }
}

/// The Markdown files that people read, by path below the repository's root.
fn pages(root: &Path) -> Result<BTreeMap<PathBuf, Page>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![PathBuf::from("docs")];
    for entry in fs::read_dir(root)? {
        let name = PathBuf::from(entry?.file_name());
        if name.extension().is_some_and(|extension| extension == "md") {
            found.insert(name.clone(), Page::parse(&fs::read_to_string(root.join(&name))?));
        }
    }
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder))? {
            let path = folder.join(entry?.file_name());
            if root.join(&path).is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                let page = Page::parse(&fs::read_to_string(root.join(&path))?);
                found.insert(path, page);
            }
        }
    }
    Ok(found)
}

/// Checks that the table of contents has every page, that links and anchors resolve, and that every `cargo xtask` command
/// of the pages exists.
pub fn check(root: &Path) -> Result<()> {
    let pages = pages(root)?;
    let mut wrong = Vec::new();
    let summary = pages.get(Path::new("docs/SUMMARY.md")).context("docs/SUMMARY.md is missing")?;
    let listed: BTreeSet<PathBuf> = summary.links.iter().map(|link| Path::new("docs").join(link)).collect();
    for page in pages.keys().filter(|page| page.starts_with("docs") && !page.ends_with("SUMMARY.md")) {
        if !listed.contains(page) {
            wrong.push(format!("docs/SUMMARY.md does not list {}; run `cargo xtask docs`", page.display()));
        }
    }
    for (path, page) in &pages {
        let broken = page.links.iter().filter(|link| !is_elsewhere(link) && !resolves(root, &pages, path, link));
        wrong.extend(broken.map(|link| format!("{}: the link `{link}` leads nowhere", path.display())));
        for line in page.blocks.iter().filter(|(language, _)| language == "sh").flat_map(|(_, text)| text.lines()) {
            let Some(command) = line.trim().strip_prefix("cargo xtask ") else { continue };
            let command = command.split('#').next().unwrap_or_default();
            if let Err(error) = crate::Cli::try_parse_from(["xtask"].into_iter().chain(command.split_whitespace())) {
                wrong.push(format!("{}: `cargo xtask {command}`: {error}", path.display()));
            }
        }
    }
    ensure!(wrong.is_empty(), "the documentation has faults:\n  {}", wrong.join("\n  "));
    Ok(())
}

fn is_elsewhere(link: &str) -> bool {
    link.contains("://") || link.starts_with("mailto:")
}

/// Whether a link of the page at `from` names a file or folder that exists, and an anchor of it, if it names one.
fn resolves(root: &Path, pages: &BTreeMap<PathBuf, Page>, from: &Path, link: &str) -> bool {
    let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    let to = if path.is_empty() { Some(from.to_owned()) } else { joined(from, path) };
    let Some(to) = to else { return false };
    match anchor {
        None => root.join(&to).exists(),
        Some(anchor) => pages.get(&to).is_some_and(|page| page.anchors.contains(anchor)),
    }
}

/// The path below the root of what a link of the page at `from` names; `None` outside the repository.
fn joined(from: &Path, link: &str) -> Option<PathBuf> {
    let mut to = from.parent()?.to_owned();
    for part in Path::new(link).components() {
        match part {
            Component::ParentDir => {
                if !to.pop() {
                    return None;
                }
            }
            Component::Normal(name) => to.push(name),
            Component::CurDir => {}
            _ => return None,
        }
    }
    Some(to)
}

/// Writes the reference part of the table of contents from the reference's index.
pub fn write_summary(root: &Path) -> Result<()> {
    const HEADING: &str = "# Reference\n";
    let path = root.join("docs/SUMMARY.md");
    let summary = fs::read_to_string(&path).context("cannot read docs/SUMMARY.md")?;
    let (own, _) = summary.split_once(HEADING).context("docs/SUMMARY.md has no part `# Reference`")?;
    let index = fs::read_to_string(root.join("docs/reference/README.md")).context("cannot read the reference")?;
    let mut reference = "\n- [All components](reference/README.md)\n".to_owned();
    for line in index.lines() {
        if let Some(kind) = line.strip_prefix("## ") {
            reference += &format!("- [{kind}]()\n");
        } else if let Some((name, rest)) = line.strip_prefix("| [`").and_then(|row| row.split_once("`](")) {
            let page = rest.split(')').next().unwrap_or_default();
            reference += &format!("  - [{name}](reference/{page})\n");
        }
    }
    fs::write(path, format!("{own}{HEADING}{reference}")).context("cannot write docs/SUMMARY.md")
}

/// Builds the book into target/book/docs, where mdBook is installed. Files outside docs/ that pages link to are copied beside
/// it, so that these links work too.
pub fn build(root: &Path) -> Result<()> {
    if !crate::answers(std::process::Command::new("mdbook").arg("--version")) {
        eprintln!("skipped, since mdbook is not installed: mdbook build docs");
        return Ok(());
    }
    crate::call(std::process::Command::new("mdbook").args(["build", "docs"]).current_dir(root))?;
    let book = root.join("target/book");
    for (path, page) in pages(root)?.iter().filter(|(path, _)| path.starts_with("docs")) {
        let files = page.links.iter().filter(|link| !is_elsewhere(link)).filter_map(|link| joined(path, link));
        for file in files.filter(|file| !file.starts_with("docs") && root.join(file).is_file()) {
            let copy = book.join(&file);
            fs::create_dir_all(copy.parent().context("a file lies in a folder")?)?;
            fs::copy(root.join(&file), copy).with_context(|| format!("cannot copy {}", file.display()))?;
        }
    }
    eprintln!("the book is target/book/docs/index.html");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_state_links_anchors_and_blocks() {
        let page = Page::parse("# A `b` c: d\n[x](y.md#z)\n## Again\n## Again\n```sh\ncargo xtask ci\n```\n");
        assert_eq!(page.links, ["y.md#z"]);
        assert_eq!(page.anchors.iter().map(String::as_str).collect::<Vec<_>>(), ["a-b-c-d", "again", "again-1"]);
        assert_eq!(page.blocks, [("sh".to_owned(), "cargo xtask ci\n".to_owned())]);
    }

    #[test]
    fn faults_of_pages_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("docs/reference")).unwrap();
        let write = |name: &str, text: &str| fs::write(root.join(name), text).unwrap();
        write("README.md", "[ok](docs/a.md#title)\n\n```sh\ncargo xtask test # all\n```\n");
        write("docs/SUMMARY.md", "[a](a.md)\n");
        write("docs/a.md", "# Title\n[up](../README.md)\n");
        assert!(check(root).is_ok());
        write("docs/b.md", "[x](nowhere.md) [y](a.md#absent) [z](../../out.md)\n\n```sh\ncargo xtask fly\n```\n");
        let said = check(root).unwrap_err().to_string();
        for fault in ["docs/b.md; run", "`nowhere.md`", "`a.md#absent`", "`../../out.md`", "cargo xtask fly"] {
            assert!(said.contains(fault), "{fault}: {said}");
        }
    }

    #[test]
    fn the_repository_has_no_such_fault() {
        check(&crate::root().unwrap()).unwrap();
    }

    #[test]
    fn the_summary_lists_the_reference() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("docs/reference")).unwrap();
        fs::write(dir.path().join("docs/SUMMARY.md"), "[a](a.md)\n\n# Reference\nold\n").unwrap();
        let index = "# Reference\n\n## Trainers\n\n| name | what |\n| [`top_k`](trainers/top_k.md) | k |\n";
        fs::write(dir.path().join("docs/reference/README.md"), index).unwrap();
        write_summary(dir.path()).unwrap();
        let summary = fs::read_to_string(dir.path().join("docs/SUMMARY.md")).unwrap();
        let listed =
            "- [All components](reference/README.md)\n- [Trainers]()\n  - [top_k](reference/trainers/top_k.md)\n";
        assert_eq!(summary, format!("[a](a.md)\n\n# Reference\n\n{listed}"));
    }
}
