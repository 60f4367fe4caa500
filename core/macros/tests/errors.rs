//! Compile errors of the attribute: each points at its place and says what to write.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns the path of the macro library that cargo compiled for this test.
fn library() -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    let deps = test.parent().expect("its folder");
    let prefix = format!("{}dictlearn_macros-", std::env::consts::DLL_PREFIX);
    let library = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with(&prefix) && name.ends_with(std::env::consts::DLL_SUFFIX)
    };
    let found =
        fs::read_dir(deps).expect("compiled crates").filter_map(|entry| Some(entry.ok()?.path())).filter(library);
    found.max_by_key(|path| fs::metadata(path).and_then(|data| data.modified()).ok()).expect("the compiled attribute")
}

/// Returns the first error as `line:column message`.
fn error_of(case: usize, source: &str) -> String {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = dir.join(format!("error_{case}.rs"));
    fs::write(&path, format!("use dictlearn_macros::component;\n{source}\n")).expect("a file to compile");
    let output = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args(["--edition=2024", "--crate-type=lib", "--emit=metadata", "--error-format=short", "--out-dir"])
        .arg(dir)
        .arg("--extern")
        .arg(format!("dictlearn_macros={}", library().display()))
        .arg(&path)
        .output()
        .expect("rustc");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let first = said.lines().find(|line| line.contains("error")).unwrap_or_else(|| panic!("no error: {said}"));
    first.replace(&format!("{}:", path.display()), "").replace(": error: ", " ")
}

#[test]
fn errors_name_the_place_and_the_fix() {
    const GOOD: &str = r#""a", summary = "A", example = "{type: a}""#;
    let with = |more: &str, body: &str| format!("#[component(trainer {GOOD}{more})]\npub struct Config {{\n{body}\n}}");
    let cases = [
        (
            "#[component]\nstruct Config {}".to_owned(),
            "2:1 the kind of component comes first: dictionary, trainer, modifier",
        ),
        ("#[component(trainr)]\nstruct Config {}".to_owned(), "2:13 `trainr` is not a kind of component; the kind"),
        (
            "#[component(text \"a\")]\nstruct Config {}".to_owned(),
            "2:13 the text lacks `summary = \"...\"`: one line for `dictlearn list`, and `example = \"...\"`: YAML",
        ),
        (
            "#[component(text, sumary = \"a\")]\nstruct Config {}".to_owned(),
            "2:19 unknown argument `sumary`: use `summary`",
        ),
        ("#[component(text, paper)]\nstruct Config {}".to_owned(), "2:19 `paper` needs a value: `paper = \"...\"`"),
        (
            "#[component(text, paper = \"a\", paper = \"b\")]\nstruct Config {}".to_owned(),
            "2:32 `paper` is given twice",
        ),
        (
            format!("#[component(text {GOOD},\n default_dictionary = \"b\")]\nstruct Config {{}}"),
            "3:2 `default_dictionary` is only for trainers, but this is a text",
        ),
        (with(",\n short_run = \"{}\"", ""), "3:2 add `measured`: the result of the short run"),
        (
            with(",\n fields(witdh)", ""),
            "3:9 there is no shared field `witdh`: name a group (width, schedule, resampling",
        ),
        (with(",\n fields(lr)", ""), "3:9 set the method's learning rate: `lr = 1e-3`"),
        (with(",\n fields(schedule = 3)", ""), "3:20 `schedule` is a group of fields: set a field's default as"),
        (with(",\n fields(schedule(steps = 3))", ""), "3:18 `schedule` has no field `steps`; it has warmup_steps,"),
        (with(",\n fields(width, dict_size)", ""), "3:16 `fields` adds `dict_size` twice"),
        (
            with(",\n fields(lr = 1e-3)", "#[default(1.0)] pub lr: f64"),
            "3:14 the struct has its own field `lr`: set its default there, `#[default(...)]`",
        ),
        (with("", "#[default = 1.0] pub lr: f64"), "4:1 write the default in parentheses: `#[default(0.1)]`"),
        (with("", "#[default] #[default] pub lr: f64"), "4:12 the field has two defaults"),
        (
            format!("#[component(text {GOOD})]\nenum Config {{}}"),
            "3:6 a component's config must be a struct with named fields",
        ),
        (
            format!("#[component(text {GOOD})]\nstruct Config;"),
            "3:8 a config must have named fields; if it has none, write `struct Config {}`",
        ),
        (
            format!("#[component(text {GOOD})]\nstruct Config<T> {{ value: T }}"),
            "3:15 a config cannot be generic: YAML names one type",
        ),
    ];
    for (case, (source, expected)) in cases.iter().enumerate() {
        let said = error_of(case, source);
        assert!(said.starts_with(expected), "{source}\ngives: {said}\nexpected: {expected}");
    }
}
