//! The contract, checked for every registered component.

use dictlearn as _;
use dictlearn::cli::reference;
use dictlearn::config::{RunConfig, to_yaml};
use dictlearn::contract;
use dictlearn::contract::example_files;
use dictlearn_core::files::from_yaml;
use dictlearn_core::registry::{ComponentKind, ShortRun, components, find};

use crate::common::Desk;

fn keep(kind: ComponentKind) {
    let components = components(kind);
    assert!(!components.is_empty(), "no {kind} is registered");
    components.into_iter().for_each(|component| contract::keep(kind, component.name));
}

macro_rules! keep {
    ($($name:ident: $kind:ident)*) => {
        $(#[test]
        fn $name() {
            keep(ComponentKind::$kind);
        })*
    };
}

keep! {
    dictionaries: Dictionary
    trainers: Trainer
    modifiers: Modifier
    sources: Source
    texts: Text
    metrics: Metric
    loggers: Logger
    formats: Format
    models: Model
}

#[test]
fn every_component_is_listed_and_described() {
    let desk = Desk::new();
    example_files(desk.dir.path());
    let listed = desk.ok(&["list"]);
    for kind in ComponentKind::ALL {
        let all = components(kind);
        assert!(!all.is_empty(), "no {kind} is registered");
        for (index, component) in all.into_iter().enumerate() {
            let mut described = reference::text(component, desk.dir.path());
            // Starting the program is slow, so once per kind.
            if index == 0 {
                let shown = desk.ok(&["describe", kind.name(), component.name]);
                assert_eq!(shown.trim_end(), described.trim_end());
                described = shown;
            }
            let row = format!("  {} ", component.name);
            let row = listed.lines().find(|line| line.starts_with(&row) && line.ends_with(component.summary));
            assert!(row.is_some(), "{kind} `{}` is not in\n{listed}", component.name);
            assert!(
                described.starts_with(&format!("{kind} {}\n{}\n", component.name, component.summary)),
                "{described}"
            );
            assert!(described.contains(component.paper), "{described}");
            let Some((_, example)) = described.split_once("ready to train:\n\n") else {
                assert!(matches!(kind, ComponentKind::Model | ComponentKind::Format), "{described}");
                continue;
            };
            assert!(example.contains(&format!("type: {}\n", component.name)), "{example}");
            // The contract checks that it trains.
            desk.write("config.yaml", example);
            if index == 0 {
                desk.ok(&["train", "config.yaml", "--dry-run"]);
            }
        }
    }
}

#[test]
fn a_config_made_of_examples_trains() {
    let desk = Desk::new();
    example_files(desk.dir.path());
    let source = find(ComponentKind::Source, "tensor_file").unwrap().example;
    for trainer in components(ComponentKind::Trainer) {
        let dictionary = find(ComponentKind::Dictionary, trainer.default_dictionary.unwrap()).unwrap().example;
        let config = format!(
            "steps: 60\noutput_dir: {name}\nsource: {source}\nsaes:\n- trainer: {}\n  dictionary: {dictionary}\n",
            trainer.example,
            name = trainer.name
        );
        desk.write("config.yaml", &config);
        desk.ok(&["train", "config.yaml"]);
        let merged: RunConfig = from_yaml(&desk.read(&format!("{}/config.yaml", trainer.name))).unwrap();
        assert_eq!(to_yaml(&merged).unwrap(), desk.read(&format!("{}/config.yaml", trainer.name)));
        desk.ok(&["eval", &format!("{0}/{0}", trainer.name), "--json"]);
    }
}

/// A trainer registers its short-run settings; users train them with the config.
#[test]
fn short_runs_shown_by_describe_match_the_config() {
    let desk = Desk::new();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/short-runs.yaml");
    let config: serde_yaml::Value = serde_yaml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(config["steps"], ShortRun::STEPS);
    assert_eq!(config["source"]["out_batch_size"], ShortRun::BATCH);
    let saes = config["saes"].as_sequence().unwrap();
    let mut found = 0;
    for trainer in components(ComponentKind::Trainer) {
        let Some(short) = trainer.short_run else {
            // Crosscoders read several sites: configs/crosscoder.yaml.
            assert!(trainer.default_dictionary.unwrap().contains("crosscoder"), "{} has no short run", trainer.name);
            continue;
        };
        let sae = saes.iter().find(|sae| sae["name"] == trainer.name).expect(trainer.name);
        let settings: serde_yaml::Value = serde_yaml::from_str(short.settings).unwrap();
        assert_eq!((&sae["trainer"], &sae["dictionary"]), (&settings["trainer"], &settings["dictionary"]));
        assert_eq!(settings["trainer"]["type"], trainer.name);
        let described = desk.ok(&["describe", "trainer", trainer.name]);
        assert!(described.contains(&serde_yaml::to_string(&settings).unwrap()), "{described}");
        assert!(described.contains(short.measured), "{described}");
        found += 1;
    }
    assert_eq!(saes.len(), found);
}
