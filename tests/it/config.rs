//! Configs: error messages, and how layers merge.

use dictlearn::config::{self, Sources};
use dictlearn::run;
use dictlearn_core::error::InputError;
use dictlearn_core::interrupt::Interrupt;
use serde_yaml::Value;

use crate::common::{Desk, fixture};

/// Valid parts around the wrong part of a config.
const SOURCE: &str = "source: {type: tensor_file, path: batches.safetensors, batch_size: 64}\n";
const SAES: &str = "saes:\n- trainer: {type: top_k, warmup_steps: 5}\n  dictionary: {k: 4, dict_size: 64}\n";

fn desk() -> Desk {
    let desk = Desk::new();
    std::fs::copy(fixture("trainers/batches.safetensors"), desk.path("batches.safetensors")).unwrap();
    desk
}

/// The sources that `dictlearn train mine.yaml` loads with these arguments. Most tests call the library, because a
/// process takes as long to load libtorch as to check ten configs.
fn sources(desk: &Desk, args: &[&str], variables: &[(&str, &str)]) -> Sources {
    let mut sources = Sources { file: desk.path("mine.yaml"), builds_rest: true, ..Sources::default() };
    for arg in args.chunks(2) {
        match arg {
            ["--set", set] => sources.set.push((*set).to_owned()),
            ["--profile", name] => sources.profile = Some((*name).to_owned()),
            other => panic!("{other:?}"),
        }
    }
    sources.variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    sources
}

/// A message without the test's folder.
fn without_folder(desk: &Desk, said: &str) -> String {
    let dir = desk.dir.path();
    let canonical = std::fs::canonicalize(dir).unwrap();
    let said = said.replace(&format!("{}/", canonical.display()), "");
    said.replace(&format!("{}/", dir.display()), "")
}

/// The library's error for a config, without the test's folder.
fn refusal(desk: &Desk, config: &str, args: &[&str], variables: &[(&str, &str)]) -> String {
    desk.write("mine.yaml", config);
    let before = desk.files();
    let train = || {
        let mut config = config::load(&sources(desk, args, variables))?;
        let trained = run::train(&mut config, &desk.path("run"), false, &Interrupt::default());
        trained.map_err(|error| config.written.locate(error))
    };
    let error = train().expect_err(config);
    let error = InputError::take(error).unwrap_or_else(|error| panic!("{config}\n{error:?}"));
    assert_eq!(desk.files(), before, "files were left behind");
    without_folder(desk, &format!("error: {}\n", dictlearn_core::error::printable(&error.to_string())))
}

/// The program's error for the same config.
fn refusal_of_the_program(desk: &Desk, config: &str, args: &[&str], variables: &[(&str, &str)]) -> String {
    desk.write("mine.yaml", config);
    let before = desk.files();
    let mut command = desk.program();
    command.args(["train", "mine.yaml"]).args(args).envs(variables.iter().copied()).env("HF_HOME", "/nowhere");
    let run = crate::common::Run::of(command.output().unwrap());
    assert_eq!(run.code, 2, "{config}\n{}{}", run.stdout, run.stderr);
    assert_eq!(desk.files(), before, "files were left behind");
    without_folder(desk, &run.stderr)
}

/// The JSON Schema of configs, as editors use it.
fn schema(desk: &Desk) -> jsonschema::Validator {
    jsonschema::validator_for(&serde_json::from_str(&desk.ok(&["schema"])).unwrap()).unwrap()
}

#[test]
fn every_config_satisfies_the_schema() {
    let schema = schema(&Desk::new());
    for path in crate::docs::configs() {
        let config = serde_yaml::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let errors: Vec<String> =
            schema.iter_errors(&config).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert!(errors.is_empty(), "{}: {errors:#?}", path.display());
    }
}

#[test]
fn the_schema_checks_partial_configs() {
    let schema = schema(&Desk::new());
    let sweep = |sae: &str| format!("{SOURCE}saes: [{{sweep: {{dictionary.k: [4, 8]}}, {sae}}}]\n");
    for (yaml, right) in [
        ("include: a.yaml\nsource: {batch_size: 3}\n".to_owned(), true),
        ("include: a.yaml\nsource: {type: tensorfile}\n".to_owned(), false),
        ("include: a.yaml\nmetrics: all\n".to_owned(), false),
        (sweep("trainer: {type: top_k}, dictionary: {type: top_k, dict_size: 64}"), true),
        (sweep("trainer: {type: topk}, dictionary: {type: top_k, dict_size: 64}"), false),
        (sweep("trainer: {type: top_k}, dictionary: {type: top_k, dict_sizes: 64}"), false),
        (format!("{SOURCE}{SAES}eval_source: {{shuffle: false}}\n"), true),
        (format!("{SOURCE}{SAES}eval_source: {{type: nope}}\n"), false),
        (format!("{SOURCE}{SAES}eval_source: {{type: tensor_file, batch_sizee: 3}}\n"), false),
    ] {
        assert_eq!(schema.is_valid(&serde_yaml::from_str(&yaml).unwrap()), right, "{yaml}");
    }
}

#[test]
fn the_schema_describes_every_field() {
    let schema: serde_json::Value = serde_json::from_str(&Desk::new().ok(&["schema"])).unwrap();
    fn fields(schema: &serde_json::Value, count: &mut usize) {
        let Some(map) = schema.as_object() else {
            schema.as_array().into_iter().flatten().for_each(|part| fields(part, count));
            return;
        };
        for (name, field) in map.get("properties").and_then(|fields| fields.as_object()).into_iter().flatten() {
            assert!(field["description"].is_string(), "`{name}` has no description: {field}");
            *count += 1;
        }
        map.values().for_each(|part| fields(part, count));
    }
    let mut count = 0;
    fields(&schema, &mut count);
    assert!(count > 100, "{count}");
    let lr = schema["$defs"]["trainer"]["oneOf"].as_array().unwrap().iter();
    let top_k = lr.clone().find(|trainer| trainer["properties"]["type"]["const"] == "top_k").unwrap();
    let said = top_k["properties"]["warmup_steps"]["description"].as_str().unwrap();
    assert!(said.ends_with("Default: 1000"), "{said}");
}

/// Wrong configs of every kind, with the program's errors.
#[test]
fn wrong_configs_are_refused_with_place_and_help() {
    let desk = desk();
    let fixtures = fixture("models/gpt_neox");
    let model = format!("{:?}", fixtures.display().to_string());
    let tokens = format!("{:?}", fixtures.join("io.safetensors").display().to_string());
    let lm = |keys: &str| {
        format!(
            "source:\n  type: language_model\n  model: {model}\n  submodule: gpt_neox.layers.1\n  \
             text: {{type: token_file, path: {tokens}}}\n  out_batch_size: 16\n{keys}{SAES}"
        )
    };
    let lm_with = |old: &str, new: &str| lm("").replace(old, new);
    desk.write("not-yaml.yaml", "a: [1, 2\n");
    desk.write("a.txt", "some text");
    desk.write("cut.safetensors", "\u{8}\0\0\0\0\0\0\0{");
    desk.write("bad-model/config.json", "{\"model_type\": \"gpt_nexo\"}");
    desk.write("no-type/config.json", "{}");

    type Case<'a> = (&'a str, String, &'a [&'a str], &'a [(&'a str, &'a str)]);
    let mut cases: Vec<Case> = Vec::new();
    let mut case = |what, yaml: String| cases.push((what, yaml, &[], &[]));
    case("an unknown trainer", format!("{SOURCE}saes:\n- trainer:\n    type: topk\n"));
    case("an unknown trainer in a flow map", format!("{SOURCE}saes:\n- {{trainer: {{type: p-standard}}}}\n"));
    case("an unknown dictionary", format!("{SOURCE}saes:\n- trainer: {{type: top_k}}\n  dictionary: {{type: topk}}\n"));
    case("an unknown source", format!("source: {{type: tensorfile, path: x}}\n{SAES}"));
    case("an unknown text", lm_with("type: token_file", "type: tokenfile"));
    case(
        "an unknown metric in a list",
        format!("{SOURCE}{SAES}metrics:\n- {{type: reconstruction}}\n- {{type: los_recovered}}\n"),
    );
    case("an unknown logger", format!("{SOURCE}{SAES}loggers: [{{type: json}}]\n"));
    case("an unknown modifier", format!("{SOURCE}{SAES}  modifiers: [{{type: ghosts}}]\n"));
    case("an unknown top-level key", format!("{SOURCE}{SAES}setps: 100\n"));
    case(
        "an unknown field of a trainer",
        format!("{SOURCE}saes:\n- trainer:\n    type: standard\n    l1_penalti: 0.1\n"),
    );
    case("a field of the dictionary on the trainer", format!("{SOURCE}saes:\n- trainer: {{type: top_k, k: 8}}\n"));
    case("a field of the trainer on the SAE", format!("{SOURCE}saes:\n- trainer: {{type: standard}}\n  lr: 1e-3\n"));
    case("dict_class", format!("{SOURCE}saes:\n- trainer: {{type: top_k, dict_class: AutoEncoderTopK}}\n"));
    case("text for a number", format!("{SOURCE}saes:\n- trainer: {{type: standard, lr: fast}}\n"));
    case("text for a whole number", format!("{SOURCE}{SAES}steps: many\n"));
    case("a fraction for a whole number", format!("{SOURCE}{SAES}steps: 10.5\n"));
    case("a negative count", format!("{SOURCE}{SAES}log_every: -1\n"));
    case("zero steps", format!("{SOURCE}{SAES}steps: 0\n"));
    case("a number for true or false", format!("{SOURCE}{SAES}normalize_activations: 2\n"));
    case("a negative learning rate", format!("{SOURCE}saes:\n- trainer: {{type: standard, lr: -1e-3}}\n"));
    case("an infinite learning rate", format!("{SOURCE}saes:\n- trainer: {{type: standard, lr: .inf}}\n"));
    case("a map for a list", format!("{SOURCE}saes: {{trainer: {{type: top_k}}}}\n"));
    case("a list for a map", format!("source: [tensor_file]\n{SAES}"));
    case("a name for a component", format!("source: tensor_file\n{SAES}"));
    case("no source", SAES.to_owned());
    case("no type", format!("source: {{path: batches.safetensors}}\n{SAES}"));
    case("no path", format!("source: {{type: tensor_file}}\n{SAES}"));
    case("no trainer", format!("{SOURCE}saes:\n- name: a\n"));
    case("no SAE", SOURCE.to_owned());
    case("an unknown device", format!("{SOURCE}{SAES}device: gpu\n"));
    case("a device that is not there", format!("{SOURCE}{SAES}device: cuda:7\n"));
    case("an unknown precision", format!("{SOURCE}{SAES}precision: float16\n"));
    case(
        "two SAEs of one name",
        format!("{SOURCE}{SAES}- trainer: {{type: top_k}}\n  dictionary: {{k: 4, dict_size: 64}}\n"),
    );
    case("a name that leaves the folder", format!("{SOURCE}saes:\n- name: ../a\n  trainer: {{type: standard}}\n"));
    case(
        "k above dict_size",
        format!("{SOURCE}saes:\n- trainer: {{type: top_k}}\n  dictionary: {{k: 65, dict_size: 64}}\n"),
    );
    case(
        "dict_size and expansion_factor",
        format!(
            "{SOURCE}saes:\n- trainer: {{type: top_k}}\n  dictionary: {{k: 4, dict_size: 64, expansion_factor: 2}}\n"
        ),
    );
    case("a warm-up that never ends", format!("{SOURCE}{SAES}steps: 4\n"));
    case(
        "a schedule of which nothing fits",
        format!(
            "{SOURCE}steps: 100\nsaes:\n- trainer: {{type: standard, warmup_steps: 100, sparsity_warmup_steps: 200, decay_start: 300}}\n"
        ),
    );
    case(
        "SAEs that are wrong each in its way",
        format!(
            "{SOURCE}steps: 100\nsaes:\n- trainer: {{type: top_k}}\n  dictionary: {{k: 65, dict_size: 64}}\n- trainer: {{type: gated}}\n  \
             dictionary: {{type: auto_encoder}}\nmetrics: [{{type: loss_recovered}}]\n"
        ),
    );
    let pair = |trainer: &str, dictionary: &str| {
        format!("{SOURCE}steps: 100\nsaes:\n- trainer: {{{trainer}}}\n  dictionary: {{{dictionary}}}\n")
    };
    let short = "warmup_steps: 5, sparsity_warmup_steps: 5";
    let modified = |trainer: &str, dictionary: &str, modifier: &str| {
        format!("{}  modifiers: [{{{modifier}}}]\n", pair(trainer, dictionary))
    };
    case(
        "a modifier that wants a sparsity term",
        modified(
            "type: top_k, warmup_steps: 5",
            "type: top_k, k: 4",
            "type: entropy_penalty, weight: 0.1, replace_sparsity: true",
        ),
    );
    case(
        "a modifier that wants pre-activations",
        modified(&format!("type: standard, {short}"), "type: identity", "type: ghost_grads, threshold: 5"),
    );
    case(
        "resampling twice",
        modified(
            &format!("type: standard, {short}, resample_steps: 20"),
            "type: auto_encoder",
            "type: resample, every: 20",
        ),
    );
    case("top_k on a gated dictionary", pair("type: top_k, warmup_steps: 5", "type: gated"));
    case("gated without a gate", pair(&format!("type: gated, {short}"), "type: auto_encoder"));
    case("gated_anneal without a gate", pair(&format!("type: gated_anneal, {short}"), "type: jump_relu"));
    case("jump_relu without thresholds", pair("type: jump_relu", "type: top_k, k: 4"));
    case(
        "a penalty that would keep no threshold",
        pair(&format!("type: standard, {short}"), "type: batch_top_k, k: 4"),
    );
    case("Matryoshka without groups", pair("type: matryoshka_batch_top_k", "type: batch_top_k, k: 4"));
    case(
        "groups that do not add up",
        pair(
            "type: matryoshka_batch_top_k, warmup_steps: 5",
            "type: matryoshka_batch_top_k, k: 4, group_fractions: [0.5, 0.4]",
        ),
    );
    case(
        "a group without a feature",
        pair(
            "type: matryoshka_batch_top_k, warmup_steps: 5",
            "type: matryoshka_batch_top_k, k: 4, group_fractions: [0.001, 0.999]",
        ),
    );
    case(
        "weights for other groups",
        pair(
            "type: matryoshka_batch_top_k, warmup_steps: 5, group_weights: [1, 1, 1]",
            "type: matryoshka_batch_top_k, k: 4, group_fractions: [0.5, 0.5]",
        ),
    );
    case("no groups", pair("type: matryoshka_batch_top_k", "type: matryoshka_batch_top_k, k: 4"));
    case("a window of no width", pair(&format!("type: jump_relu, {short}, bandwidth: 0"), "type: jump_relu"));
    case("an unknown estimator", pair("type: jump_relu, ste_on: preactivation", "type: jump_relu"));
    case(
        "an annealing after the end",
        pair(&format!("type: p_anneal, {short}, anneal_start: 15000"), "type: auto_encoder"),
    );
    let anneal =
        |fields: &str| pair(&format!("type: p_anneal, {short}, anneal_start: 50, {fields}"), "type: auto_encoder");
    case("an annealing that ends before it starts", anneal("anneal_end: 20"));
    case("more updates than steps", anneal("anneal_end: 55, n_sparsity_updates: 10"));
    case("updates that are no number", anneal("n_sparsity_updates: often"));
    case("an unknown penalty", anneal("sparsity_function: L1"));
    case("resampling what cannot be", pair(&format!("type: standard, {short}, resample_steps: 20"), "type: identity"));
    let synthetic = |fields: &str| format!("source: {{type: synthetic, {fields}}}\nsteps: 100\n{SAES}");
    case("more active features than there are", synthetic("n_features: 4"));
    case("magnitudes the wrong way round", synthetic("magnitude: [2, 1]"));
    case(
        "a truth that nobody knows",
        format!("{SOURCE}{SAES}steps: 100\nmetrics: [{{type: ground_truth_recovery}}]\n"),
    );
    case("a sweep that is not a list", format!("{SOURCE}{SAES}  sweep: {{trainer.lr: 1e-3}}\n"));
    case("in_to_out of one value", lm_with("gpt_neox.layers.1", "blocks.1.hook_resid_post\n  io: in_to_out"));
    case("a sweep over an unknown key", format!("{SOURCE}{SAES}  sweep: {{trainer.lrr: [1e-3, 1e-4]}}\n"));
    case("a wrong value in a sweep", format!("{SOURCE}{SAES}  sweep: {{trainer.lr: [1e-3, slow]}}\n"));
    case("not YAML", "source: {type: tensor_file\nsteps: 3\n".to_owned());
    case("a tab", "source:\n\ttype: tensor_file\n".to_owned());
    case("a tab in a later line", "source:\n  type: synthetic\n\tseed: 3\n".to_owned());
    case("a tab after a scalar", "steps: 10\n\tsource: x\n".to_owned());
    case("a tab after spaces", "source:\n  type: synthetic\n  \tfoo: 1\n".to_owned());
    case("a whole number beyond 64 bits", format!("{SOURCE}{SAES}seed: 99999999999999999999999\n"));
    case("a stop after the end", format!("steps: 50\nstop_after: 500\n{SOURCE}{SAES}"));
    case("the same key twice", format!("{SOURCE}{SAES}steps: 3\nsteps: 4\n"));
    case("the same key twice in a flow map", format!("{SOURCE}saes: [{{trainer: {{type: top_k, lr: 1, lr: 2}}}}]\n"));
    case("a glob without quotes", format!("source: {{type: tensor_file, path: *.npy}}\n{SAES}"));
    case("a decimal comma", format!("{SOURCE}saes:\n- trainer: {{type: top_k, lr: 0,002}}\n"));
    case("a decimal comma in a block", format!("{SOURCE}saes:\n- trainer:\n    type: top_k\n    lr: 0,002\n"));
    case("commas between thousands", format!("{SOURCE}{SAES}steps: 10,000\n"));
    case("thousands as a letter", format!("{SOURCE}{SAES}steps: 10k\n"));
    case("a list of names", format!("{SOURCE}{SAES}metrics: [reconstruction]\n"));
    case("a list of unknown names", format!("{SOURCE}{SAES}metrics: [recall]\n"));
    case("a name instead of a component", format!("{SOURCE}saes:\n- trainer: topk\n"));
    case("steps to save at as text", format!("{SOURCE}{SAES}save_steps: all\n"));
    case("an unknown spacing of steps", format!("{SOURCE}{SAES}save_steps: {{lin: 5}}\n"));
    case("a step to save at after the end", format!("{SOURCE}{SAES}steps: 100\nsave_steps: [0, 50, 200]\n"));
    case("a wrong seed of an SAE", format!("{SOURCE}{SAES}  seed: one\n"));
    case("an empty file", String::new());
    case("a list", "- a\n- b\n".to_owned());
    case("an include that is not there", format!("include: bse.yaml\n{SOURCE}{SAES}"));
    case("an include that is not YAML", format!("include: not-yaml.yaml\n{SOURCE}{SAES}"));
    case("an include of itself", format!("include: mine.yaml\n{SOURCE}{SAES}"));
    case("no such tensor file", format!("source: {{type: tensor_file, path: batchs.safetensors}}\n{SAES}"));
    case("a tensor file of another type", format!("source: {{type: tensor_file, path: a.txt}}\n{SAES}"));
    case("a truncated tensor file", format!("source: {{type: tensor_file, path: cut.safetensors}}\n{SAES}"));
    case("no such tensor", format!("source: {{type: tensor_file, path: batches.safetensors, tensor: x}}\n{SAES}"));
    case(
        "a batch larger than the file",
        format!("source: {{type: tensor_file, path: batches.safetensors, batch_size: 10_000}}\n{SAES}"),
    );
    case("no such initial weights", format!("{SOURCE}{SAES}  init_from: nowhere\n"));
    case("initial weights of another file", format!("{SOURCE}{SAES}  init_from: batches.safetensors\n"));
    case("a metric that needs a language model", format!("{SOURCE}{SAES}metrics: [{{type: loss_recovered}}]\n"));
    case("a metric on no such file", format!("{SOURCE}{SAES}eval_source:\n  path: nope.safetensors\n"));
    case(
        "a wrong key of `source`, which `eval_source` takes over",
        format!("source: {{type: tensor_file, paths: batches.safetensors}}\n{SAES}eval_source: {{batch_size: 32}}\n"),
    );
    case("a log outside the run", format!("{SOURCE}{SAES}loggers:\n- {{type: jsonl, file: ../x.jsonl}}\n"));
    case(
        "no features",
        format!("{SOURCE}saes: [{{trainer: {{type: top_k}}, dictionary: {{k: 4, expansion_factor: 0}}}}]\n"),
    );
    case("a name that is taken", format!("{SOURCE}saes:\n- name: config.yaml\n  trainer: {{type: standard}}\n"));
    case("profiles that are no map", format!("{SOURCE}{SAES}profiles: 4\n"));
    case("no such model", lm_with(&model, "nowhere/"));
    case("no such bundled model", lm_with(&model, "embedded:austin"));
    case("a model of another family", lm_with(&model, "bad-model/"));
    case("a model without a family", lm_with(&model, "no-type/"));
    case("no such submodule", lm_with("gpt_neox.layers.1", "gpt_neox.layers.1.mpl"));
    case("a layer too many", lm_with("gpt_neox.layers.1", "gpt_neox.layers.3"));
    case("a TransformerLens name of another model", lm_with("gpt_neox.layers.1", "blocks.9.hook_resid_post"));
    case("an unknown io", lm("  io: inout\n"));
    case("a batch larger than half of the buffer", lm("  n_ctxs: 1\n  ctx_len: 16\n"));
    case(
        "text without a tokenizer",
        lm_with("type: token_file, path:", "type: text_files, path: a.txt}\n  ctx_len: 16 #"),
    );
    case(
        "a context too long",
        lm_with(&format!("{{type: token_file, path: {tokens}}}"), "{type: text_files, path: a.txt}\n  ctx_len: 100"),
    );
    let plain = format!("{SOURCE}{SAES}");
    cases.push(("--set: an unknown field", plain.clone(), &["--set", "saes[0].trainer.lrr=1e-3"], &[]));
    cases.push(("--set: a wrong type", plain.clone(), &["--set", "steps=soon"], &[]));
    cases.push(("--set: an unknown type", plain.clone(), &["--set", "saes.0.trainer.type=topk"], &[]));
    cases.push(("--set: no such item", plain.clone(), &["--set", "saes[3].trainer.lr=1"], &[]));
    cases.push((
        "--set: a key that is nearly one that is set",
        plain.clone(),
        &["--set", "saes[0].trainer.warmup_step=5"],
        &[],
    ));
    cases.push(("--set: a section that is not there", plain.clone(), &["--set", "sourc.batch_size=3"], &[]));
    cases.push(("--set: a list that is not there", plain.clone(), &["--set", "metrics[0].n_batches=3"], &[]));
    cases.push(("--set: no value", plain.clone(), &["--set", "steps"], &[]));
    cases.push(("--set: not YAML", plain.clone(), &["--set", "steps=[1"], &[]));
    cases.push(("a variable: a wrong type", plain.clone(), &[], &[("DICTLEARN_STEPS", "soon")]));
    cases.push(("--set: a decimal comma", plain.clone(), &["--set", "saes[0].trainer.lr=0,002"], &[]));
    cases.push(("--set: a list of names", plain.clone(), &["--set", "metrics=[reconstruction]"], &[]));
    cases.push((
        "a mistake in the file, in a variable and in two arguments",
        format!("{plain}log_evry: 1\n"),
        &["--set", "saes[0].trainer.lrr=1", "--set", "seed=[1"],
        &[("DICTLEARN_STEPS", "soon")],
    ));
    cases.push(("a variable: a nested field", plain.clone(), &[], &[("DICTLEARN_SOURCE__BATCH_SIZE", "-3")]));
    cases.push((
        "an unknown profile",
        format!("{plain}profiles: {{quick: {{steps: 10}}}}\n"),
        &["--profile", "quik"],
        &[],
    ));
    cases.push(("no profiles", plain.clone(), &["--profile", "quick"], &[]));
    let profile = format!("{plain}profiles:\n  quick:\n    log_evry: 1\n");
    cases.push(("an unknown key in a profile", profile, &["--profile", "quick"], &[]));

    let schema = schema(&desk);
    let mut all = String::new();
    let mut as_processes = 0;
    for (what, yaml, args, variables) in &cases {
        let shown = refusal(&desk, yaml, args, variables);
        if AS_PROCESSES.contains(what) {
            let said = refusal_of_the_program(&desk, yaml, args, variables);
            assert_eq!(said, shown, "{what}");
            as_processes += 1;
        }
        let shown = shown.replace(&fixtures.display().to_string(), "MODEL");
        // The tester's machine may have a GPU.
        let none = "this machine (or this libtorch) has no GPU; `device: auto` uses the best available";
        let shown = shown.replace("this machine has one GPU, cuda:0", none);
        // Whether an editor reports a config that is wrong without arguments.
        let seen = match serde_yaml::from_str::<serde_json::Value>(yaml) {
            Ok(_) if !args.is_empty() || !variables.is_empty() => "",
            Ok(config) if !schema.is_valid(&config) => " (an editor sees it)",
            _ => "",
        };
        all += &format!("# {what}{seen}\n{shown}\n");
    }
    assert_eq!(as_processes, AS_PROCESSES.len());
    insta::assert_snapshot!(all);
}

/// The wrong configs that the program is run on too: one for each origin of an error.
const AS_PROCESSES: [&str; 5] = [
    "an unknown trainer",
    "k above dict_size",
    "not YAML",
    "a variable: a wrong type",
    "a mistake in the file, in a variable and in two arguments",
];

/// The merged config with derived values, as `--dry-run` prints it.
fn merged(desk: &Desk, args: &[&str], variables: &[(&str, &str)]) -> Value {
    let mut config = config::load(&sources(desk, args, variables)).unwrap();
    run::plan(&mut config).unwrap();
    serde_yaml::from_str(&config::to_yaml(&config).unwrap()).unwrap()
}

#[test]
fn later_layers_win() {
    let desk = desk();
    // Every layer sets keys that earlier layers set too; the last one must win.
    let keys = ["seed", "steps", "log_every", "save_every", "checkpoint_every", "stop_after"];
    let says = |value: u64, keys: &[&str]| keys.iter().map(|key| format!("{key}: {value}\n")).collect::<String>();
    desk.write("base.yaml", &says(11, &keys[1..]));
    let own = says(12, &keys[2..]);
    let profile: String = says(13, &keys[3..]).lines().map(|line| format!("    {line}\n")).collect();
    desk.write("mine.yaml", &format!("include: base.yaml\n{own}{SOURCE}{SAES}profiles:\n  quick:\n{profile}"));
    let args = ["--profile", "quick", "--set", "stop_after=10"];
    let merged = merged(&desk, &args, &[("DICTLEARN_CHECKPOINT_EVERY", "14"), ("DICTLEARN_STOP_AFTER", "14")]);
    let found: Vec<u64> = keys.iter().map(|key| merged[*key].as_u64().unwrap()).collect();
    assert_eq!(found, [42, 11, 12, 13, 14, 10]);
}

#[test]
fn numbers_are_read_in_every_spelling() {
    let desk = desk();
    desk.write(
        "mine.yaml",
        &format!(
            "steps: 1e4\nstop_after: null\nlog_every: 10_000\nsave_every: 2e+3\ncheckpoint_every: 0x10\n{SOURCE}saes:\n\
             - trainer: {{type: standard, lr: 1, l1_penalty: 5e-2, sparsity_warmup_steps: null, warmup_steps: 1_0}}\n"
        ),
    );
    let merged = merged(&desk, &["--set", "saes[0].trainer.decay_start=9_000"], &[]);
    assert_eq!(merged["steps"], Value::from(10_000));
    assert_eq!(merged["log_every"], Value::from(10_000));
    assert_eq!(merged["save_every"], Value::from(2000));
    assert_eq!(merged["checkpoint_every"], Value::from(16));
    assert_eq!(merged["stop_after"], Value::Null);
    let trainer = &merged["saes"][0]["trainer"];
    assert_eq!(trainer["lr"].as_f64(), Some(1.0));
    assert_eq!(trainer["l1_penalty"].as_f64(), Some(0.05));
    assert_eq!(trainer["sparsity_warmup_steps"], Value::Null);
    assert_eq!(trainer["warmup_steps"], Value::from(10));
    assert_eq!(trainer["decay_start"], Value::from(9000));
}

#[test]
fn a_later_type_replaces_the_component() {
    let desk = desk();
    let source = "source: {type: language_model, model: nowhere, submodule: a, text: {type: embedded, name: austen}}\n";
    desk.write("base.yaml", &format!("{source}saes:\n- trainer: {{type: standard, l1_penalty: 0.3}}\n"));
    desk.write("mine.yaml", &format!("include: base.yaml\n{SOURCE}"));
    // No field of the replaced source or trainer is left to be refused.
    let merged = merged(&desk, &["--set", "saes[0].trainer.type=top_k", "--set", "saes[0].dictionary.k=4"], &[]);
    assert_eq!(merged["source"]["type"], Value::from("tensor_file"));
    assert_eq!(merged["saes"][0]["trainer"]["type"], Value::from("top_k"));
    assert_eq!(merged["saes"][0]["dictionary"]["type"], Value::from("top_k"));
}

#[test]
fn a_sweep_is_the_cartesian_product() {
    let desk = desk();
    desk.write("mine.yaml", &format!("{SOURCE}{SAES}  sweep: {{trainer.lr: [1e-4, 3e-4], dictionary.k: [2, 4]}}\n"));
    let merged = merged(&desk, &[], &[]);
    let mut found: Vec<_> = merged["saes"]
        .as_sequence()
        .unwrap()
        .iter()
        .map(|sae| {
            let name = sae["name"].as_str().unwrap().to_owned();
            (name, sae["trainer"]["lr"].as_f64().unwrap(), sae["dictionary"]["k"].as_u64().unwrap())
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let mut names: Vec<&str> = found.iter().map(|sae| sae.0.as_str()).collect();
    names.dedup();
    assert_eq!(names.len(), 4);
    for (name, lr, k) in &found {
        assert!(
            // Keys appear in the order of the sweep.
            *name == format!("top_k-lr={lr}-k={k}"),
            "{name}"
        );
    }
}

#[test]
fn anchors_and_merge_keys_are_resolved() {
    let desk = desk();
    desk.write(
        "mine.yaml",
        &format!(
            "steps: 100\n{SOURCE}saes:\n- name: a\n  trainer: &usual {{type: top_k, lr: 1e-3, warmup_steps: 5}}\n  \
             dictionary: &k {{k: 4, dict_size: 64}}\n- name: b\n  trainer: {{<<: *usual, lr: 2e-3}}\n  dictionary: *k\n"
        ),
    );
    let merged = merged(&desk, &[], &[]);
    let trainer = |sae: usize| merged["saes"][sae]["trainer"].clone();
    let (a, b) = (trainer(0), trainer(1));
    assert_eq!((a["lr"].as_f64(), b["lr"].as_f64()), (Some(1e-3), Some(2e-3)));
    assert_eq!((&a["type"], &a["warmup_steps"]), (&b["type"], &b["warmup_steps"]));
}

#[test]
fn paths_are_relative_to_the_file_that_contains_them() {
    let desk = desk();
    std::fs::create_dir_all(desk.path("data")).unwrap();
    std::fs::rename(desk.path("batches.safetensors"), desk.path("data/batches.safetensors")).unwrap();
    desk.write("data/base.yaml", SOURCE);
    desk.write("mine.yaml", &format!("include: data/base.yaml\noutput_dir: runs/a\n{SAES}"));
    let merged = merged(&desk, &[], &[]);
    let dir = desk.dir.path();
    let absolute = |path: &str| Value::from(dir.join(path).display().to_string());
    assert_eq!(merged["source"]["path"], absolute("data/batches.safetensors"));
    assert_eq!(merged["output_dir"], absolute("runs/a"));
}

#[test]
fn the_saved_config_reproduces_the_run() {
    let desk = desk();
    desk.write("mine.yaml", &format!("steps: 8\noutput_dir: one\n{SOURCE}{SAES}"));
    desk.ok(&["train", "mine.yaml", "--set", "seed=7"]);
    desk.ok(&["train", "one/config.yaml", "--output-dir", "two"]);
    let weights = |run: &str| std::fs::read(desk.path(&format!("{run}/top_k/ae.safetensors"))).unwrap();
    assert_eq!(weights("one"), weights("two"));
    let settings = |run: &str| desk.read(&format!("{run}/config.yaml")).replace(&format!("/{run}\n"), "/RUN\n");
    assert_eq!(settings("one"), settings("two"));
}

#[test]
fn byte_order_marks_are_skipped() {
    let desk = desk();
    let plain = format!("steps: 10\n{SOURCE}{SAES}");
    desk.write("plain.yaml", &plain);
    desk.write("marked.yaml", &format!("\u{feff}{plain}"));
    desk.write("including.yaml", "\u{feff}include: marked.yaml\n");
    let merged = |config: &str| -> Value {
        serde_yaml::from_str(&desk.ok(&["train", config, "--output-dir", "run", "--dry-run"])).unwrap()
    };
    for config in ["marked.yaml", "including.yaml"] {
        assert_eq!(merged(config), merged("plain.yaml"));
    }
    // Positions do not count the mark.
    let said = refusal(&desk, &format!("\u{feff}setps: 1\n{SOURCE}{SAES}"), &[], &[]);
    assert!(said.contains("mine.yaml:1:1 (setps)"), "{said}");
}

#[test]
fn errors_quote_the_argument_as_typed() {
    let desk = desk();
    let said = refusal(&desk, &format!("{SOURCE}{SAES}"), &["--set", "saes[0].seed=99999999999999999999999"], &[]);
    let place = "error: `saes[0].seed` is 99999999999999999999999, which is out of range\n \
                 --> --set saes[0].seed=99999999999999999999999 (saes[0].seed)\n";
    assert!(said.starts_with(place), "{said}");
    // A key missing from a list that an argument gives whole.
    let set = "saes=[{trainer: {type: top_k}}]";
    let said = refusal(&desk, &format!("{SOURCE}{SAES}"), &["--set", set], &[]);
    assert!(said.contains(&format!("\n --> --set {set} (saes[0].dictionary)\n")), "{said}");
    // A value that `eval_source` takes from `source`.
    let other = format!("{SOURCE}eval_source: {{shuffle: false}}\n{SAES}");
    let said = refusal(&desk, &other, &["--set", "source.batch_size=0"], &[]);
    assert_eq!(errors(&said).len(), 1, "{said}");
    assert!(said.starts_with("error: `source.batch_size` is 0"), "{said}");
    assert!(said.contains("--set source.batch_size=0 (source.batch_size)"), "{said}");
}

/// A run on the bundled model.
const LM: &str = "steps: 1000\nsource:\n  type: language_model\n  model: embedded:austen\n  submodule: gpt_neox.layers.2\n  \
                  text: {type: embedded, name: austen}\n  ctx_len: 64\n  n_ctxs: 64\n  out_batch_size: 256\n\
                  saes:\n- trainer: {type: top_k}\n  dictionary: {type: top_k, dict_size: 256, k: 16}\n";

#[test]
fn errors_of_source_and_saes_are_reported_together() {
    let desk = desk();
    let keys = |sets: &[&str]| {
        let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
        let said = refusal(&desk, LM, &args, &[]);
        let key = |line: &str| line.rsplit_once('(').unwrap().1.trim_end_matches(')').to_owned();
        let mut keys: Vec<String> = said.lines().filter(|line| line.starts_with(" --> ")).map(key).collect();
        keys.sort();
        keys
    };
    assert_eq!(
        keys(&[
            "saes[0].trainer.warmup_steps=5000",
            "source.submodule=gpt_neox.layers.9",
            "source.ctx_len=1000",
            "source.out_batch_size=100000",
        ]),
        ["saes[0].trainer.warmup_steps", "source.ctx_len", "source.out_batch_size", "source.submodule"]
    );
    let text = "source.text={type: text_files, path: nothere.txt}";
    assert_eq!(
        keys(&[text, "source.submodule=gpt_neox.layers.9", "saes[0].dictionary.k=999"]),
        ["saes[0].dictionary.k", "source.submodule", "source.text.path"]
    );
    assert_eq!(
        keys(&["source.submodule=[gpt_neox.layers.8, gpt_neox.layers.1, gpt_neox.layers.9]"]),
        ["source.submodule[0]", "source.submodule[2]"]
    );
    // Without the width, the number of features is unknown.
    let unknown = "saes[0].dictionary={type: top_k, expansion_factor: 4, k: 200}";
    assert_eq!(keys(&["source.submodule=gpt_neox.layers.9", unknown]), ["source.submodule"]);
    let few = "saes[0].dictionary={type: auto_encoder, expansion_factor: 0.03}";
    let plain = "saes[0].trainer={type: standard}";
    assert_eq!(keys(&["source.submodule=gpt_neox.layers.9", plain, few]), ["source.submodule"]);
}

#[test]
fn valid_parts_are_checked_despite_wrong_keys() {
    let desk = desk();
    let two = format!("{LM}- trainer: {{type: standard, lr: fast}}\n");
    let said = |config: &str, sets: &[&str]| {
        let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
        refusal(&desk, config, &args, &[])
    };
    let several = ["source.submodule=gpt_neox.layers.9", "saes[0].dictionary.k=800", "log_evry=3"];
    let all = said(&two, &several);
    for error in ["unknown field `log_evry`", "`saes[1].trainer.lr` is \"fast\"", "`k` is 800", "gpt_neox.layers.9"] {
        assert!(errors(&all).iter().any(|line| line.contains(error)), "{error}: {all}");
    }
    assert_eq!(errors(&all).len(), 4, "{all}");
    // A warm-up is not compared with a number of steps that may be wrong.
    let warm = "saes[0].trainer.warmup_steps=15000";
    assert_eq!(errors(&said(LM, &[warm, "setps=20000"])).len(), 1);
    assert_eq!(errors(&said(LM, &[warm, "steps=many"])).len(), 1);
    assert_eq!(errors(&said(LM, &[warm, "sed=1"])).len(), 2);
    // A wrong part gets no further errors: the intended `dict_size` is unknown.
    assert_eq!(errors(&said(LM, &["saes[0].dictionary.dict_size=many", "saes[0].dictionary.k=300"])).len(), 1);
    // Nothing is downloaded for a run that is refused.
    let hub = ["source.model=nobody/nothing", "sed=1"];
    assert_eq!(errors(&said(LM, &hub)).len(), 1);
}

/// The error lines of a refusal.
fn errors(said: &str) -> Vec<&str> {
    said.lines().filter(|line| line.starts_with("error: ")).collect()
}

#[test]
fn all_errors_of_a_config_are_reported_at_once() {
    let desk = desk();
    let saes = "saes:\n- trainer: {type: topk, lr: 1}\n- trainer: {type: standard, lr: fast, l1_penalti: 1}\n  modifiers: [{type: ghosts}]\n";
    let config = format!(
        "seed: one\nsetps: 3\nlog_every: 0\n{SOURCE}{saes}metrics: [{{type: reconstruction, n_batches: -1}}]\n"
    );
    let said = refusal(&desk, &config, &["--set", "device=gpu"], &[("DICTLEARN_SAVE_EVERY", "often")]);
    let places: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix(" --> ")).collect();
    assert_eq!(
        places,
        [
            "mine.yaml:1:7 (seed)",
            "mine.yaml:2:1 (setps)",
            "mine.yaml:3:12 (log_every)",
            "mine.yaml:6:19 (saes[0].trainer.type)",
            "mine.yaml:7:33 (saes[1].trainer.lr)",
            "mine.yaml:7:39 (saes[1].trainer.l1_penalti)",
            "mine.yaml:8:22 (saes[1].modifiers[0].type)",
            "mine.yaml:9:45 (metrics[0].n_batches)",
            "--set device=gpu (device)",
            "variable DICTLEARN_SAVE_EVERY (save_every)",
        ],
        "{said}"
    );
    assert_eq!(errors(&said).len(), places.len(), "{said}");
    // At most 20 are shown.
    let keys = |count: usize| (0..count).map(|key| format!("wrong{key}: 1\n")).collect::<String>();
    let said = |count| refusal(&desk, &format!("{SOURCE}{SAES}{}", keys(count)), &[], &[]);
    assert!(errors(&said(20)).len() == 20 && !said(20).contains("more mistake"));
    assert!(errors(&said(21)).len() == 21 && said(21).contains("error: there is 1 more mistake\n"), "{}", said(21));
    assert!(errors(&said(50)).len() == 21 && said(50).contains("error: there are 30 more mistakes\n"), "{}", said(50));
    // A sweep and an `eval_source` repeat no error.
    let sweep = format!(
        "{SOURCE}eval_source: {{shuffle: false}}\n{SAES}  sweep: {{trainer.lrr: [1, 2, 3], dictionary.k: [1, 2]}}\n"
    )
    .replace("batch_size", "batch_sise");
    let said = refusal(&desk, &sweep, &[], &[]);
    assert_eq!(errors(&said).len(), 2, "{said}");
}

#[test]
fn defaults_adapt_to_short_runs() {
    let desk = desk();
    let trainers = [
        "standard",
        "standard_april_update",
        "gated",
        "top_k",
        "batch_top_k",
        "jump_relu",
        "p_anneal",
        "gated_anneal",
        "crosscoder",
        "batch_top_k_crosscoder",
    ];
    let sae = |name: &&str| {
        let k = if name.contains("top_k") { ", dictionary: {k: 4, dict_size: 64}" } else { "" };
        format!("- {{trainer: {{type: {name}}}{k}}}\n")
    };
    let saes = trainers.iter().map(sae).collect::<String>();
    let config = |steps: u64| format!("steps: {steps}\nmetrics: []\n{SOURCE}saes:\n{saes}");
    // Runs of any length train.
    for steps in [1, 2, 7, 60] {
        desk.write("mine.yaml", &config(steps));
        let run = desk.run(&["train", "mine.yaml", "--output-dir", &format!("run{steps}")]);
        assert_eq!(run.code, 0, "{steps} steps: {}", run.stderr);
        let said: Vec<&str> = run.stderr.lines().filter(|line| line.starts_with("defaults adapted to ")).collect();
        assert_eq!(said.len(), 1, "{}", run.stderr);
        if steps == 60 {
            assert_eq!(
                said[0],
                "defaults adapted to 60 steps: warmup_steps 1000 -> 6, sparsity_warmup_steps 2000 -> 12, \
                 threshold_start_step 1000 -> 6, dead_feature_threshold 10000000 -> 768, anneal_start 15000 -> 36"
            );
        }
    }
    // The saved config has the adapted values and gives the same weights.
    let run = desk.run(&["train", "run60/config.yaml", "--output-dir", "again"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(!run.stderr.contains("adapted"), "{}", run.stderr);
    for name in trainers {
        let weights = |run: &str| std::fs::read(desk.path(&format!("{run}/{name}/ae.safetensors"))).unwrap();
        assert!(weights("run60") == weights("again"), "{name}");
    }
    // Long runs keep the reference's defaults; written values never change.
    let default = |steps: u64, field: &str, more: &str| {
        desk.write("mine.yaml", &format!("steps: {steps}\n{SOURCE}saes: [{{trainer: {{type: p_anneal{more}}}}}, {{trainer: {{type: top_k}}, dictionary: {{k: 4}}}}]\n"));
        let merged = merged(&desk, &[], &[]);
        let sae = usize::from(merged["saes"][0]["trainer"].get(field).is_none());
        merged["saes"][sae]["trainer"][field].as_u64().unwrap()
    };
    for (field, long) in [
        ("warmup_steps", 1000),
        ("sparsity_warmup_steps", 2000),
        ("anneal_start", 15_000),
        ("dead_feature_threshold", 10_000_000),
        ("threshold_start_step", 1000),
    ] {
        assert_eq!(default(20_000, field, ""), long, "{field}");
    }
    assert_eq!(default(10_000, "warmup_steps", ""), 1000);
    assert_eq!(default(10_000, "anneal_start", ""), 6000);
    assert_eq!(default(20_000, "sparsity_warmup_steps", ", decay_start: 1500"), 1499);
    assert_eq!(default(100, "warmup_steps", ", warmup_steps: 70"), 70);
    assert_eq!(default(100, "sparsity_warmup_steps", ", decay_start: 15"), 14);
    let said = refusal(
        &desk,
        &format!("steps: 100\n{SOURCE}saes: [{{trainer: {{type: standard, warmup_steps: 1000}}}}]\n"),
        &[],
        &[],
    );
    assert!(
        said.contains("`warmup_steps` is 1000, but the run has only 100 steps") && errors(&said).len() == 1,
        "{said}"
    );
}

#[test]
fn metrics_default_to_those_that_the_source_supports() {
    let desk = desk();
    let figures = |config: &str| {
        desk.write("mine.yaml", config);
        let _ = std::fs::remove_dir_all(desk.path("run"));
        desk.ok(&["train", "mine.yaml", "--output-dir", "run"]);
        desk.path("run/top_k/eval.json").exists().then(|| desk.json("run/top_k/eval.json"))
    };
    let plain = format!("steps: 4\n{SOURCE}{SAES}").replace(", warmup_steps: 5", "");
    let found = figures(&plain).unwrap();
    assert!(found["frac_variance_explained"].is_f64() && found.get("frac_recovered").is_none(), "{found}");
    assert_eq!(figures(&format!("{plain}metrics: []\n")), Some(serde_json::json!({})));
    let model = "{type: language_model, model: 'embedded:austen', submodule: gpt_neox.layers.1, ctx_len: 16, n_ctxs: 32, \
                 out_batch_size: 64, text: {type: embedded, name: austen}}";
    let found = figures(&plain.replace(SOURCE, &format!("source: {model}\n"))).unwrap();
    assert!(found["frac_variance_explained"].is_f64() && found["frac_recovered"].is_f64(), "{found}");
    // The saved config lists them.
    let merged: Value = serde_yaml::from_str(&desk.read("run/config.yaml")).unwrap();
    assert_eq!(merged["metrics"][0]["type"], Value::from("loss_recovered"));
}

#[test]
fn an_sae_can_have_its_own_seed() {
    let desk = desk();
    let source = SOURCE.replace("batch_size", "shuffle: false, batch_size");
    desk.write("mine.yaml", &format!("steps: 8\n{source}{SAES}  sweep: {{seed: [42, 1], dictionary.k: [4, 8]}}\n"));
    desk.ok(&["train", "mine.yaml", "--output-dir", "sweep"]);
    let weights = |sae: &str| std::fs::read(desk.path(&format!("{sae}/ae.safetensors"))).unwrap();
    for seed in ["42", "1"] {
        desk.write("one.yaml", &format!("steps: 8\nseed: {seed}\n{source}{SAES}"));
        desk.ok(&["train", "one.yaml", "--output-dir", seed]);
        let own = format!("sweep/top_k-seed={seed}-k=4");
        assert!(weights(&own) == weights(&format!("{seed}/top_k")), "{own}");
        assert_eq!(desk.json(&format!("{own}/config.json"))["trainer"]["seed"].to_string(), seed);
    }
    assert!(weights("42/top_k") != weights("1/top_k"));
}

#[test]
fn variables_in_effect_are_reported_and_unknown_ones_give_a_warning() {
    let desk = desk();
    desk.write("mine.yaml", &format!("steps: 4\n{SOURCE}{SAES}").replace(", warmup_steps: 5", ""));
    let said = |variables: &[(&str, &str)], args: &[&str]| {
        let config = config::load(&sources(&desk, args, variables)).unwrap();
        config.written.notes().join("\n")
    };
    // As the program prints it; variables of its tools are ignored.
    let acting = [("DICTLEARN_SEED", "7"), ("DICTLEARN_SOURCE__BATCH_SIZE", "32")];
    let tools =
        ["CACHE", "TEST_RUNS", "SOAK_MINUTES", "FUZZ_READER", "BENCH_X"].map(|name| format!("DICTLEARN_{name}"));
    let mut command = desk.program();
    command.args(["train", "mine.yaml", "--dry-run"]).envs(acting).envs(tools.iter().map(|name| (name, "[")));
    let run = crate::common::Run::of(command.output().unwrap());
    assert_eq!(run.code, 0, "{}", run.stderr);
    let text: Vec<&str> = run.stderr.lines().filter(|line| line.contains("DICTLEARN")).collect();
    assert_eq!(text, ["from the environment: DICTLEARN_SEED=7, DICTLEARN_SOURCE__BATCH_SIZE=32"]);
    assert_eq!(said(&acting, &[]), text[0]);
    let merged: Value = serde_yaml::from_str(&run.stdout).unwrap();
    assert_eq!((&merged["seed"], &merged["source"]["batch_size"]), (&7.into(), &32.into()));
    // An overridden variable is not reported.
    assert_eq!(said(&[("DICTLEARN_SEED", "7")], &["--set", "seed=3"]), "");
    for (name, text) in [
        ("DICTLEARN_DEBUG", "warning: DICTLEARN_DEBUG matches no config key and is ignored"),
        (
            "DICTLEARN_SETPS",
            "warning: DICTLEARN_SETPS matches no config key and is ignored; did you mean DICTLEARN_STEPS?",
        ),
        ("DICTLEARN_PROFILES", "warning: DICTLEARN_PROFILES matches no config key and is ignored"),
        (
            "DICTLEARN_SOURCE__BATCH_SIZ",
            "warning: DICTLEARN_SOURCE__BATCH_SIZ matches no config key and is ignored; did you mean \
             DICTLEARN_SOURCE__BATCH_SIZE?",
        ),
        (
            "DICTLEARN_SAES__0__TRAINER__LRR",
            "warning: DICTLEARN_SAES__0__TRAINER__LRR matches no config key and is ignored; did you mean \
             DICTLEARN_SAES__0__TRAINER__LR?",
        ),
    ] {
        assert_eq!(said(&[(name, "1")], &[]), text);
    }
}

#[test]
fn weights_are_saved_at_chosen_steps() {
    let desk = desk();
    let config = |keys: &str| {
        format!(
            "steps: 40\ncheckpoint_every: null\n{keys}{}{SAES}",
            SOURCE.replace("batch_size", "shuffle: false, batch_size")
        )
    };
    let kept = |keys: &str| -> Vec<u64> {
        desk.write("mine.yaml", &config(keys));
        let _ = std::fs::remove_dir_all(desk.path("run"));
        desk.ok(&["train", "mine.yaml", "--output-dir", "run"]);
        let step =
            |file: String| file.strip_prefix("run/top_k/checkpoints/ae_")?.strip_suffix(".safetensors")?.parse().ok();
        let mut steps: Vec<u64> = desk.files().into_iter().filter_map(step).collect();
        steps.sort_unstable();
        steps
    };
    assert_eq!(kept("save_steps: [0, 12, 1e1, 40]\nsave_every: 15\n"), [0, 10, 12, 15, 30, 40]);
    let weights = |file: &str| std::fs::read(desk.path(file)).unwrap();
    let last = weights("run/top_k/checkpoints/ae_40.safetensors");
    let at_12 = weights("run/top_k/checkpoints/ae_12.safetensors");
    assert!(last == weights("run/top_k/ae.safetensors"));
    desk.ok(&["train", "mine.yaml", "--output-dir", "stopped", "--set", "stop_after=12"]);
    assert!(at_12 == weights("stopped/top_k/ae.safetensors"));
    // The weights of step 0 are those that training starts from.
    std::fs::copy(desk.path("run/top_k/checkpoints/ae_0.safetensors"), desk.path("init.safetensors")).unwrap();
    desk.ok(&["train", "mine.yaml", "--output-dir", "init", "--set", "saes[0].init_from=init.safetensors"]);
    assert!(last == weights("init/top_k/ae.safetensors"));
    // 0%, 0.1%, 1% and 10% of the run; of 40 steps the first three are step 0.
    assert_eq!(kept("save_steps: {log: 4}\n"), [0, 4]);
    assert_eq!(kept("save_steps: {log: 1}\n"), [0]);
}

#[test]
fn a_dry_run_writes_nothing() {
    let desk = desk();
    desk.write("mine.yaml", &format!("steps: 8\noutput_dir: one\n{SOURCE}{SAES}"));
    let before = desk.files();
    let said = desk.ok(&["train", "mine.yaml", "--dry-run"]);
    assert_eq!(desk.files(), before);
    // The plan lists defaults, shapes and memory.
    assert!(said.contains("auxk_alpha: 0.03125") && said.contains("encoder.weight [64, 32]"), "{said}");
    // It names the kind of gradients: modifiers need autograd.
    assert!(said.contains("of weights, analytic gradients"), "{said}");
    desk.write(
        "mine.yaml",
        &format!("steps: 8\noutput_dir: one\n{SOURCE}{SAES}  modifiers: [{{type: ghost_grads, threshold: 2}}]\n"),
    );
    let said = desk.ok(&["train", "mine.yaml", "--dry-run"]);
    assert!(said.contains("of weights, gradients by autograd"), "{said}");
}
