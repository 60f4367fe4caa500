//! What every registered component keeps, whoever wrote it.

use dictlearn as _;
use dictlearn_core::config::{from_yaml, to_yaml, RunConfig};
use dictlearn_core::contract::{self, example_files};
use dictlearn_core::registry::{component, components, Kind as Slot};

use crate::common::Desk;

fn keep(kind: Slot) {
    let components = components(kind);
    assert!(!components.is_empty(), "no {kind} is registered");
    components.into_iter().for_each(|component| contract::keep(kind, component.name));
}

macro_rules! keep {
    ($($name:ident: $kind:ident)*) => {
        $(#[test]
        fn $name() {
            keep(Slot::$kind);
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
    for component in Slot::ALL.into_iter().flat_map(components) {
        let described = desk.ok(&["describe", component.kind.name(), component.name]);
        assert!(listed.contains(component.summary) && described.contains(component.summary));
        assert!(described.contains(component.paper));
        let Some((_, example)) = described.split_once("as it stands:\n\n") else {
            assert!(matches!(component.kind, Slot::Model | Slot::Format));
            continue;
        };
        assert!(example.contains(&format!("type: {}\n", component.name)), "{example}");
        desk.write("config.yaml", example);
        desk.ok(&["train", "config.yaml", "--dry-run"]);
    }
}

#[test]
fn a_config_of_examples_trains() {
    let desk = Desk::new();
    example_files(desk.dir.path());
    let source = component(Slot::Source, "tensor_file").unwrap().example;
    for trainer in components(Slot::Trainer) {
        let dictionary = component(Slot::Dictionary, trainer.usual_dictionary.unwrap()).unwrap().example;
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
