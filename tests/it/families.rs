//! Every family of language models against recorded results of transformers: sites, logits and loss. Also what all
//! families share: hooks, prefixes, names and lazy reading.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use dictlearn as _;
use dictlearn_core::files::tensors;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::files::torch_file;
use dictlearn_core::files::torch_file::StateDictFile;
use dictlearn_core::lm::Visit;
use dictlearn_core::lm::{ModelCx, open_model, random_model};
use dictlearn_core::prelude::*;
use serde_json::json;

use crate::common::{fixture, folders, read_json};

fn cases() -> Vec<String> {
    let folders = folders(&fixture("models")).into_iter();
    let cases: Vec<String> = folders.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert!(cases.len() >= 14, "{cases:?}");
    cases
}

pub fn load(dir: &Path, precision: Precision) -> Result<Box<dyn LanguageModel>> {
    Ok(open_model(&dir.to_string_lossy(), Device::Cpu, precision)?.0)
}

pub fn open(case: &str) -> (Box<dyn LanguageModel>, Tokens, BTreeMap<String, Tensor>) {
    let dir = fixture("models").join(case);
    let model = load(&dir, Precision::Float32).unwrap();
    let mut io = TensorFile::open(&dir.join("io.safetensors")).unwrap().tensors().unwrap();
    let ids = io.remove("input_ids").unwrap();
    let mask = io.remove("attention_mask").unwrap().to_kind(Kind::Bool);
    (model, Tokens { ids, mask }, io)
}

/// A copy of a model's folder with changed config and weights.
pub fn changed(
    case: &str,
    config: impl Fn(&mut Value),
    weights: impl Fn(&mut Vec<(String, Tensor)>),
) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = fixture("models").join(case);
    let mut json: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    config(&mut json);
    fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    let mut tensors: Vec<_> =
        TensorFile::open(&from.join("model.safetensors")).unwrap().tensors().unwrap().into_iter().collect();
    weights(&mut tensors);
    tensors::write(&dir.path().join("model.safetensors"), &tensors).unwrap();
    dir
}

/// The output of each layer, and the logits.
pub fn computed(model: &dyn LanguageModel, tokens: &Tokens) -> Vec<Tensor> {
    let outputs = (0..model.n_layers())
        .map(|layer| model.value_at(tokens, &HookPoint { module: model.names().layer(layer), io: Io::Out }));
    outputs.chain([model.forward(tokens, &mut Hooks::none()).unwrap()]).collect()
}

/// The message with which a folder's model is refused.
pub fn refusal(dir: &Path) -> String {
    let error = load(dir, Precision::Float32).err().unwrap_or_else(|| panic!("{} was loaded", dir.display()));
    assert!(error.chain().any(|cause| cause.is::<InputError>()), "{error:#}");
    let error = InputError::take(error).unwrap();
    error.to_string()
}

/// Relative difference at the text positions.
pub fn difference(found: &Tensor, expected: &Tensor, mask: &Tensor) -> f64 {
    let mask = mask.unsqueeze(-1).to_kind(Kind::Float);
    let difference = ((found - expected) * &mask).norm() / (expected * &mask).norm();
    difference.double_value(&[])
}

#[test]
fn sites_logits_and_loss_match_transformers() {
    for case in &cases() {
        let (model, tokens, io) = open(case);
        // Its layers amplify rounding errors: transformers' own numbers are up to 1e-5 from the same model in float64.
        let most = if case == "qwen3_next" { 1e-4 } else { 1e-5 };
        let mut compared = 0;
        for (name, expected) in io.iter().filter(|(name, _)| !["logits", "loss"].contains(&name.as_str())) {
            let (module, side) = name.rsplit_once('.').unwrap();
            let io = if side == "in" { Io::In } else { Io::Out };
            let (point, width) = model.hook_point(module, io).unwrap();
            assert_eq!(Some(&width), expected.size().last(), "{case} {name}");
            let difference = difference(&model.value_at(&tokens, &point), expected, &tokens.mask);
            assert!(difference < most, "{case} {name}: {difference}");
            compared += 1;
        }
        // Input and output of each layer and its attention, and two or more values of its MLP.
        assert!(compared >= model.n_layers() * 6 && compared % model.n_layers() == 0, "{case}: {compared} sites");
        let logits = model.forward(&tokens, &mut Hooks::none()).unwrap();
        let difference = difference(&logits, &io["logits"], &tokens.mask);
        assert!(difference < 1e-5, "{case} logits: {difference}");
        let loss = dictlearn_core::lm::cross_entropy(&logits, &tokens).0;
        let expected = io["loss"].double_value(&[0]);
        assert!((loss / expected - 1.0).abs() < 1e-5, "{case} loss: {loss}, expected {expected}");
    }
}

#[test]
fn a_transformers_5_config_gives_the_same_numbers() {
    let newer = |case: &str| fixture("models").join(case).join("config.transformers5.json");
    for case in cases().iter().filter(|case| newer(case).exists()) {
        let (model, tokens, _) = open(case);
        let newer = read_json(&newer(case));
        assert!(newer["transformers_version"].as_str().unwrap().starts_with("5."), "{case}");
        let dir = changed(case, |config| *config = newer.clone(), |_| {});
        let same = load(dir.path(), Precision::Float32).unwrap();
        assert_eq!(computed(&*same, &tokens), computed(&*model, &tokens), "{case}");
    }
}

/// A config's rotary settings in the form of `rope_parameters`, and the config without them.
fn without_rope(config: &Value) -> Option<(Map<String, Value>, Value)> {
    let mut rest = config.clone();
    let theta = ["rope_theta", "rotary_emb_base"].into_iter().find_map(|key| rest.as_object_mut()?.remove(key))?;
    let mut rope = match rest.as_object_mut()?.remove("rope_scaling") {
        Some(Value::Object(scaling)) => scaling,
        _ => Map::from_iter([("rope_type".to_owned(), "default".into())]),
    };
    rope.insert("rope_theta".to_owned(), theta);
    if let Some(part) = rest.as_object_mut()?.remove("rotary_pct") {
        rope.insert("partial_rotary_factor".to_owned(), part);
    }
    Some((rope, rest))
}

#[test]
fn every_spelling_of_rotary_parameters_gives_the_same_model() {
    let mut tried = 0;
    for case in &cases() {
        let (model, tokens, _) = open(case);
        let expected = computed(&*model, &tokens);
        let config = read_json(&fixture("models").join(case).join("config.json"));
        let Some((rope, rest)) = without_rope(&config) else { continue };
        let with = |keys: &[(&str, Value)]| {
            let mut config = rest.clone();
            keys.iter().for_each(|(key, value)| config[*key] = value.clone());
            let dir = changed(case, |it| *it = config.clone(), |_| {});
            computed(&*load(dir.path(), Precision::Float32).unwrap(), &tokens)
        };
        let mut plain = rope.clone();
        let theta = plain.remove("rope_theta").unwrap();
        let mut spellings = vec![
            ("flat", vec![("rope_parameters", rope.clone().into())]),
            ("all in rope_scaling", vec![("rope_scaling", rope.clone().into())]),
            ("base outside", vec![("rope_scaling", plain.clone().into()), ("rope_theta", theta.clone())]),
            ("both keys", vec![("rope_scaling", rope.clone().into()), ("rope_parameters", json!({"rope_theta": 3.0}))]),
            ("dtype", vec![("rope_parameters", rope.clone().into()), ("torch_dtype", "float32".into())]),
            ("an empty map", vec![("rope_parameters", rope.clone().into()), ("rope_scaling", json!({}))]),
            // The first releases of transformers 5 wrote values without meaning beside the nested ones.
            (
                "nested, and more",
                vec![(
                    "rope_parameters",
                    json!({"full_attention": rope, "sliding_attention": null, "rope_theta": 3.0, "rope_type": "default"}),
                )],
            ),
        ];
        if !["gemma3", "olmo3"].iter().any(|own| case.starts_with(own)) {
            spellings.push(("nested", vec![("rope_parameters", json!({"full_attention": rope}))]));
            spellings.push((
                "nested twice",
                vec![("rope_parameters", json!({"full_attention": rope, "sliding_attention": rope}))],
            ));
        }
        if rope.get("rope_type") == Some(&"default".into()) {
            let mut bare = rope.clone();
            bare.remove("rope_type");
            spellings.push(("no type", vec![("rope_parameters", bare.into())]));
        }
        for (spelling, keys) in spellings {
            assert_eq!(with(&keys), expected, "{case}: {spelling}");
            tried += 1;
        }
        // The base matters, unless nothing or a single pair is rotated: its frequency is 1 for any base.
        let mut other = rope.clone();
        other["rope_theta"] = 7.0.into();
        let number = |key: &str| config[key].as_f64().or_else(|| rope.get(key)?.as_f64());
        let head =
            number("head_dim").or_else(|| Some(number("hidden_size")? / number("num_attention_heads")?)).unwrap();
        let part = number("partial_rotary_factor").or(number("rotary_pct")).unwrap_or(1.0);
        let any_base = head * part == 2.0 || config["alibi"] == true;
        assert_eq!(with(&[("rope_parameters", other.into())]) == expected, any_base, "{case}");
    }
    assert!(tried > 100, "{tried}");
}

#[test]
fn sliding_layers_have_their_own_rotary_base() {
    let (model, tokens, _) = open("gemma3_text");
    let expected = computed(&*model, &tokens);
    let config = read_json(&fixture("models/gemma3_text/config.transformers5.json"));
    let with = |rope: Value| {
        let mut config = config.clone();
        config["rope_parameters"] = rope;
        let dir = changed("gemma3_text", |it| *it = config.clone(), |_| {});
        computed(&*load(dir.path(), Precision::Float32).unwrap(), &tokens)
    };
    // Absent values take the default, which differs between layer types.
    assert_eq!(with(json!({"full_attention": {}, "sliding_attention": {}})), expected);
    assert_eq!(with(json!({"full_attention": null})), expected);
    let other = with(json!({"sliding_attention": {"rope_theta": 1e6}}));
    assert_ne!(other[0], expected[0], "the first layer slides");
    let full = with(json!({"full_attention": {"rope_type": "linear", "factor": 8.0}}));
    assert_eq!(full[0], expected[0]);
    assert_ne!(full[1], expected[1], "the second does not");
}

#[test]
fn fields_equal_to_the_default_may_be_absent() {
    for (case, field, value) in [
        ("phi3", "rms_norm_eps", json!(1e-5)),
        ("olmo2", "rms_norm_eps", json!(1e-5)),
        ("llama", "rms_norm_eps", json!(1e-6)),
        ("glm4", "partial_rotary_factor", json!(0.5)),
        ("phi", "hidden_act", json!("gelu_new")),
        ("smollm3", "no_rope_layers", json!([1, 1, 1, 0])),
        ("stablelm", "partial_rotary_factor", json!(0.25)),
        ("starcoder2", "num_key_value_heads", json!(2)),
    ] {
        let (_, tokens, _) = open(case);
        let [given, absent] = [Some(value), None].map(|value| {
            let change = |config: &mut Value| {
                config.as_object_mut().unwrap().remove(field);
                value.iter().for_each(|value| config[field] = value.clone());
            };
            let dir = changed(case, change, |_| {});
            computed(&*load(dir.path(), Precision::Float32).unwrap(), &tokens)
        });
        assert_eq!(given, absent, "{case}: {field}");
    }
}

#[test]
fn names_of_sizes_from_other_families_are_read() {
    for (case, names) in [
        ("bloom", [("hidden_size", "n_embed"), ("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers")]),
        ("gptj", [("n_embd", "hidden_size"), ("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers")]),
    ] {
        let (model, tokens, _) = open(case);
        let renamed = |config: &mut Value| {
            for (own, other) in names {
                config[other] = config.as_object_mut().unwrap().remove(own).unwrap();
            }
        };
        let dir = changed(case, renamed, |_| {});
        let same = load(dir.path(), Precision::Float32).unwrap();
        assert_eq!(computed(&*same, &tokens), computed(&*model, &tokens), "{case}");
    }
}

/// A copy of a tied model's folder with changed weights and the given `tie_word_embeddings`.
fn tied(tie: bool, weights: impl Fn(&mut Vec<(String, Tensor)>)) -> tempfile::TempDir {
    changed("llama3", |config| config["tie_word_embeddings"] = tie.into(), weights)
}

#[test]
fn the_weights_decide_whether_the_head_is_tied() {
    const EMBEDDING: &str = "model.embed_tokens.weight";
    let (model, tokens, _) = open("llama3");
    let expected = computed(&*model, &tokens);
    let of = |dir: &tempfile::TempDir| {
        let model = load(dir.path(), Precision::Float32).unwrap();
        let names: Vec<String> = model.parameters().into_iter().map(|(name, _)| name).collect();
        (computed(&*model, &tokens), names.contains(&"lm_head.weight".to_owned()))
    };
    let embedding =
        |tensors: &[(String, Tensor)]| tensors.iter().find(|(name, _)| name == EMBEDDING).unwrap().1.shallow_clone();
    let own = |tensors: &mut Vec<(String, Tensor)>| {
        let head = embedding(tensors).flip([0]);
        tensors.push(("lm_head.weight".to_owned(), head));
    };
    // A separate head is used, whatever the config says.
    let (untied, _) = of(&tied(false, own));
    assert_ne!(untied.last(), expected.last());
    assert_eq!(of(&tied(true, own)), (untied, true));
    // A head equal to the embedding is tied, also with another dtype.
    for kind in [Kind::Float, Kind::Double] {
        let twice = tied(true, |tensors| {
            let head = embedding(tensors).to_kind(kind);
            tensors.push(("lm_head.weight".to_owned(), head));
        });
        assert_eq!(of(&twice), (expected.iter().map(Tensor::shallow_clone).collect(), false), "{kind:?}");
    }
    // A tied model of which only the head was saved.
    let head = tied(true, |tensors| {
        tensors
            .iter_mut()
            .filter(|(name, _)| name == EMBEDDING)
            .for_each(|(name, _)| *name = "lm_head.weight".to_owned());
    });
    assert_eq!(of(&head), (expected, false));
    let neither = tied(true, |tensors| tensors.retain(|(name, _)| name != EMBEDDING));
    let said = refusal(neither.path());
    assert!(said.contains(EMBEDDING) && said.contains("lm_head.weight") && said.contains("neither"), "{said}");
    let said = refusal(tied(false, |_| {}).path());
    assert!(said.contains("no tensor `lm_head.weight`") && said.contains("tie_word_embeddings"), "{said}");
}

/// A folder with a model's config and the given files.
fn folder(case: &str, files: &[(&str, &Path)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixture("models").join(case).join("config.json"), dir.path().join("config.json")).unwrap();
    for (name, from) in files {
        fs::copy(from, dir.path().join(name)).unwrap();
    }
    dir
}

#[test]
fn weights_are_read_from_pytorch_model_bin() {
    let (model, tokens, _) = open("gpt_neo");
    let expected = computed(&*model, &tokens);
    // As TinyStories is published: head and embedding share a storage, and masks are among the weights.
    let bin = fixture("models_bin/gpt_neo/pytorch_model.bin");
    let whole = folder("gpt_neo", &[("pytorch_model.bin", &bin)]);
    let model = load(whole.path(), Precision::Float32).unwrap();
    assert_eq!(computed(&*model, &tokens), expected);
    assert!(
        model.parameters().iter().all(|(name, _)| name != "lm_head.weight"),
        "head and embedding must be one tensor"
    );

    let file = StateDictFile::open(&bin).unwrap();
    let shard = |part: usize| -> Vec<(String, Tensor)> {
        let names = file.names().into_iter().enumerate().filter(|(index, _)| index % 2 == part);
        names.map(|(_, name)| (name.clone(), file.tensor(&name).unwrap())).collect()
    };
    let sharded = folder("gpt_neo", &[]);
    let (mut map, names) = (Map::new(), ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]);
    for (part, name) in names.into_iter().enumerate() {
        let shard = shard(part);
        shard.iter().for_each(|(tensor, _)| drop(map.insert(tensor.clone(), name.into())));
        let named: Vec<(&str, Tensor)> = shard.iter().map(|(name, tensor)| (&**name, tensor.shallow_clone())).collect();
        torch_file::write(&sharded.path().join(name), &named).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    fs::write(sharded.path().join("pytorch_model.bin.index.json"), index).unwrap();
    assert_eq!(computed(&*load(sharded.path(), Precision::Float32).unwrap(), &tokens), expected);

    fs::remove_file(sharded.path().join(names[1])).unwrap();
    let said = refusal(sharded.path());
    assert!(said.contains(names[1]) && said.contains("pytorch_model.bin.index.json"), "{said}");
    // Safetensors take precedence, as in transformers.
    let both = folder(
        "gpt_neo",
        &[
            ("pytorch_model.bin", &fixture("torch_file/hostile.pt")),
            ("model.safetensors", &fixture("models/gpt_neo/model.safetensors")),
        ],
    );
    assert_eq!(computed(&*load(both.path(), Precision::Float32).unwrap(), &tokens), expected);
}

#[test]
fn a_pytorch_model_bin_without_a_state_dict_is_refused() {
    let bin = fs::read(fixture("models_bin/gpt_neo/pytorch_model.bin")).unwrap();
    let dir = folder("gpt_neo", &[]);
    let with = |bytes: &[u8]| {
        fs::write(dir.path().join("pytorch_model.bin"), bytes).unwrap();
        refusal(dir.path())
    };
    let hostile = with(&fs::read(fixture("torch_file/hostile.pt")).unwrap());
    assert!(hostile.contains("posix.system") && hostile.contains("none of its code was run"), "{hostile}");
    assert!(with(&bin[..bin.len() - 100]).contains("not a complete zip archive"));
    assert!(with(&fs::read(fixture("torch_file/legacy.pt")).unwrap()).contains("PyTorch before 1.6"));
    assert!(with(b"").contains("not a torch.save file"));
    // A corrupted value is found before the first pass.
    let mut damaged = bin.clone();
    damaged[bin.len() / 2] ^= 1;
    assert!(with(&damaged).contains("checksum"));
    fs::remove_file(dir.path().join("pytorch_model.bin")).unwrap();
    let said = refusal(dir.path());
    assert!(said.contains("has no weights") && said.contains("pytorch_model.bin"), "{said}");
}

#[test]
fn an_adapter_without_its_base_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("adapter_config.json"), "{\"base_model_name_or_path\": \"owner/base\"}").unwrap();
    let said = refusal(dir.path());
    assert!(said.contains("adapter of owner/base") && said.contains("merge_and_unload"), "{said}");
}

#[test]
fn infinity_and_nan_in_config_json_are_read() {
    let (model, tokens, _) = open("llama");
    let dir = changed("llama", |_| {}, |_| {});
    let path = dir.path().join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config.replacen('{', "{\"time_step_limit\": [0.0, Infinity], \"x\": NaN, ", 1)).unwrap();
    assert_eq!(computed(&*load(dir.path(), Precision::Float32).unwrap(), &tokens), computed(&*model, &tokens));
    // A field that the model needs must be valid.
    fs::write(&path, config.replacen("\"hidden_size\":32", "\"hidden_size\":Infinity", 1)).unwrap();
    let said = refusal(dir.path());
    assert!(said.contains("hidden_size"), "{said}");
}

#[test]
fn wrapper_prefixes_are_stripped_from_weight_names() {
    for case in ["llama", "gpt2", "gpt_neox"] {
        let (model, tokens, _) = open(case);
        let expected = computed(&*model, &tokens);
        for wrapper in ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."] {
            let wrapped = changed(
                case,
                |_| {},
                |tensors| tensors.iter_mut().for_each(|(name, _)| *name = format!("{wrapper}{name}")),
            );
            let wrapped = load(wrapped.path(), Precision::Float32).unwrap();
            assert_eq!(computed(&*wrapped, &tokens), expected, "{case} {wrapper}");
        }
        // Layers that were compiled one by one, or whose activations are checkpointed.
        let inner = changed(
            case,
            |_| {},
            |tensors| {
                for (name, _) in tensors.iter_mut() {
                    *name = name.replace(".0.", ".0._orig_mod.").replace(".1.", ".1._checkpoint_wrapped_module.");
                }
            },
        );
        assert_eq!(computed(&*load(inner.path(), Precision::Float32).unwrap(), &tokens), expected, "{case}");
    }
    let twice = changed(
        "llama",
        |_| {},
        |tensors| {
            let again: Vec<_> =
                tensors.iter().map(|(name, tensor)| (format!("module.{name}"), tensor.shallow_clone())).collect();
            tensors.extend(again);
        },
    );
    let said = refusal(twice.path());
    assert!(said.contains("under two names") && said.contains("`module."), "{said}");
}

#[test]
fn padding_on_either_side_changes_no_text_position() {
    // Rotary attention depends only on distances, so left padding changes nothing.
    let (model, _, _) = open("gpt_neox");
    let row = [5_i64, 17, 40, 3, 99];
    let tokens = |ids: &[i64], mask: &[i64]| Tokens {
        ids: Tensor::from_slice(ids).unsqueeze(0),
        mask: Tensor::from_slice(mask).to_kind(Kind::Bool).unsqueeze(0),
    };
    let (point, _) = model.hook_point("gpt_neox.layers.2", Io::Out).unwrap();
    let alone = model.value_at(&tokens(&row, &[1; 5]), &point);
    let right = [&row[..], &[0, 0]].concat();
    let right = model.value_at(&tokens(&right, &[1, 1, 1, 1, 1, 0, 0]), &point).narrow(1, 0, 5);
    let left = [&[0, 0], &row[..]].concat();
    let left = model.value_at(&tokens(&left, &[0, 0, 1, 1, 1, 1, 1]), &point).narrow(1, 2, 5);
    for padded in [right, left] {
        assert!((padded - &alone).abs().max().double_value(&[]) < 1e-5);
    }
}

#[test]
fn a_pass_stops_after_the_last_hook() {
    let (model, tokens, _) = open("gpt_neox");
    let (point, _) = model.hook_point("gpt_neox.layers.0.mlp", Io::Out).unwrap();
    let mut hooks = Hooks::read(std::slice::from_ref(&point), true);
    assert!(model.forward(&tokens, &mut hooks).is_err(), "the pass continued after the hook");
    assert!(hooks.take(&point).is_some());
    let mut hooks = Hooks::read(&[point], false);
    assert!(model.forward(&tokens, &mut hooks).is_ok());
}

#[test]
fn continuing_from_a_hook_point_matches_the_whole_pass() {
    for case in &cases() {
        let (model, tokens, _) = open(case);
        let whole = model.forward(&tokens, &mut Hooks::none()).unwrap();
        let names = model.names();
        let attention = format!("{}.{}", names.layer(1), names.of_layer[1].attention_added);
        let mut modules = vec![names.embed.clone(), attention];
        modules.extend(names.final_norm.iter().chain(&names.positions).cloned());
        for module in modules {
            let (point, _) = model.hook_point(&module, Io::Out).unwrap();
            let prefix = model.before(&tokens, &point);
            assert_eq!(prefix.forward(&mut Hooks::none()).unwrap(), whole, "{case} {module}");
            let zero = |x: &Tensor| x.zeros_like();
            let replaced = prefix.forward(&mut Hooks::replace(&point, zero)).unwrap();
            assert_ne!(replaced, whole, "{case} {module}");
            assert_eq!(replaced, model.forward(&tokens, &mut Hooks::replace(&point, zero)).unwrap(), "{case} {module}");
        }
    }
}

#[test]
fn transformer_lens_names_map_to_hook_points() {
    let (model, _, _) = open("gpt_neox_sequential");
    for (name, module, io) in [
        ("blocks.1.hook_resid_post", "gpt_neox.layers.1", Io::Out),
        ("blocks.1.hook_resid_pre", "gpt_neox.layers.1", Io::In),
        ("blocks.1.hook_mlp_out", "gpt_neox.layers.1.mlp", Io::Out),
        ("blocks.1.hook_attn_out", "gpt_neox.layers.1.attention", Io::Out),
        ("blocks.1.attn.hook_z", "gpt_neox.layers.1.attention.dense", Io::In),
        ("blocks.1.hook_resid_mid", "gpt_neox.layers.1.post_attention_layernorm", Io::In),
    ] {
        let (point, _) = model.hook_point(name, Io::Out).unwrap();
        assert_eq!(point, HookPoint { module: module.to_owned(), io }, "{name}");
    }
    // A parallel residual has no value between attention and MLP.
    let (model, _, _) = open("gpt_neox");
    assert!(model.hook_point("blocks.1.hook_resid_mid", Io::Out).is_err());
}

#[test]
fn every_module_can_be_hooked() {
    for case in &cases() {
        let (model, tokens, _) = open(case);
        let modules = model.modules();
        assert!(modules.len() > 8 * model.n_layers(), "{case}: {modules:?}");
        for Visit { module, output, .. } in modules {
            let (point, width) = model.hook_point(&module, Io::Out).unwrap();
            assert_eq!(width, output);
            assert_eq!(model.value_at(&tokens, &point).size().last(), Some(&output), "{case} {module}");
        }
        for name in model.names().transformer_lens_names(model.n_layers()) {
            let (point, width) = model.hook_point(&name, Io::Out).unwrap();
            assert_eq!(model.value_at(&tokens, &point).size().last(), Some(&width), "{case} {name}");
        }
    }
    let (model, ..) = open("gpt_neox");
    let wrong = model.hook_point("gpt_neox.layer.1.mlp", Io::Out).unwrap_err().to_string();
    assert!(wrong.contains("did you mean `gpt_neox.layers.1.mlp`"), "{wrong}");
}

#[test]
fn half_precision_and_sharded_weights_are_read() {
    for (kind, most) in [(Kind::BFloat16, 2e-2), (Kind::Half, 2e-3)] {
        let (model, tokens, _) = open("llama");
        let exact = model.forward(&tokens, &mut Hooks::none()).unwrap();
        let half = changed(
            "llama",
            |_| {},
            |tensors| tensors.iter_mut().for_each(|(_, tensor)| *tensor = tensor.to_kind(kind)),
        );
        let rounded = load(half.path(), Precision::Float32).unwrap();
        let logits = rounded.forward(&tokens, &mut Hooks::none()).unwrap();
        let apart = difference(&logits, &exact, &tokens.mask);
        assert!(apart > 0.0 && apart < most, "{kind:?}: {apart}");
        // The same weights in two shards are the same model.
        let file = TensorFile::open(&half.path().join("model.safetensors")).unwrap();
        let (mut map, mut shards) = (Map::new(), [Vec::new(), Vec::new()]);
        for (index, name) in file.names().into_iter().enumerate() {
            map.insert(name.clone(), format!("part-{}.safetensors", index % 2).into());
            shards[index % 2].push((name.clone(), file.tensor(&name).unwrap()));
        }
        for (index, shard) in shards.iter().enumerate() {
            tensors::write(&half.path().join(format!("part-{index}.safetensors")), shard).unwrap();
        }
        drop(file);
        fs::remove_file(half.path().join("model.safetensors")).unwrap();
        let index = json!({"metadata": {}, "weight_map": map});
        fs::write(half.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let sharded = load(half.path(), Precision::Float32).unwrap();
        assert_eq!(sharded.forward(&tokens, &mut Hooks::none()).unwrap(), logits, "{kind:?}");
    }
}

#[test]
fn bfloat16_logits_stay_close() {
    for case in &cases() {
        let (_, tokens, io) = open(case);
        let model = load(&fixture("models").join(case), Precision::BFloat16).unwrap();
        let logits = model.forward(&tokens, &mut Hooks::none()).unwrap();
        assert_eq!(logits.kind(), Kind::Float);
        let apart = difference(&logits, &io["logits"], &tokens.mask);
        // Rounding chooses other experts for some tokens (Gemma 4: transformers in bfloat16 is 0.11 apart), and gated
        // DeltaNets amplify rounding errors (qwen3_next: 0.26 here, 0.17 in transformers).
        let most = match case.as_str() {
            case if case.starts_with("gemma4_moe") => 0.11,
            case if case.starts_with("qwen3_next") || case.starts_with("qwen3_5") => 0.3,
            _ => 5e-2,
        };
        assert!(apart > 1e-6 && apart < most, "{case}: {apart}");
    }
}

#[test]
fn weight_names_without_their_prefix_are_found() {
    // As in the published GPT-2 files, which also have masks among the weights.
    let (model, tokens, _) = open("gpt2");
    let bare = changed(
        "gpt2",
        |_| {},
        |tensors| {
            for (name, _) in tensors.iter_mut() {
                *name = name.trim_start_matches("transformer.").to_owned();
            }
            tensors.push(("h.0.attn.bias".to_owned(), Tensor::ones([1, 1, 4, 4], (Kind::Uint8, Device::Cpu))));
        },
    );
    let bare = load(bare.path(), Precision::Float32).unwrap();
    let whole = |model: &dyn LanguageModel| model.forward(&tokens, &mut Hooks::none()).unwrap();
    assert_eq!(whole(&*bare), whole(&*model));
}

#[test]
fn layers_past_the_hook_are_not_read() {
    let (_, tokens, _) = open("llama");
    let dir = changed("llama", |_| {}, |_| {});
    let model = load(dir.path(), Precision::Float32).unwrap();
    let (point, _) = model.hook_point("model.layers.0", Io::Out).unwrap();
    let value = model.value_at(&tokens, &point);
    // The file is overwritten with zeros: layers already read keep their weights, later layers get the zeros.
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
    bytes[header..].fill(0);
    std::io::Write::write_all(&mut fs::OpenOptions::new().write(true).open(&path).unwrap(), &bytes).unwrap();
    assert_eq!(model.value_at(&tokens, &point), value);
    let (last, _) = model.hook_point("model.layers.2", Io::Out).unwrap();
    assert_eq!(model.value_at(&tokens, &last), value, "layers of zeros must change nothing");
}

#[test]
fn unsupported_fields_are_refused_by_name() {
    let refused = |case: &str, change: &dyn Fn(&mut Value)| {
        let dir = changed(case, change, |_| {});
        refusal(dir.path())
    };
    for (case, key, value, expected) in [
        ("llama", "rope_scaling", json!({"rope_type": "yarm", "factor": 2.0}), "did you mean `yarn`?"),
        ("llama", "rope_parameters", json!({"rope_type": "lama3", "factor": 2.0}), "did you mean `llama3`?"),
        ("llama", "rope_parameters", json!({"factor": 2.0}), "has `factor` but no `rope_type`"),
        ("llama", "rope_parameters", json!({"full_atention": {}}), "did you mean `full_attention`?"),
        (
            "llama",
            "rope_parameters",
            json!({"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 2e4}}),
            "differs between layer types",
        ),
        ("llama", "rope_parameters", json!([1e4]), "`rope_parameters` is [10000.0], not a map"),
        ("llama", "rope_scaling", json!({"type": "linear"}), "has no number `factor`"),
        ("llama", "rope_scaling", json!({"type": "yarn", "factor": 2.0, "beta_fsat": 8}), "did you mean `beta_fast`?"),
        (
            "llama",
            "rope_scaling",
            json!({"type": "yarn", "factor": 2.0, "beta_slow": 0}),
            "`rope_scaling.beta_slow` is 0",
        ),
        ("llama", "rotary_pct", 0.25.into(), "`rotary_pct` is 0.25"),
        ("mistral", "sliding_window", 0.into(), "`sliding_window` is 0"),
        ("gemma2", "query_pre_attn_scalar", 0.into(), "factor on attention scores is inf"),
        ("gemma2", "attn_logit_softcapping", 0.0.into(), "`attn_logit_softcapping` is 0"),
        ("llama", "rms_norm_eps", (-1.0).into(), "epsilon of norms is -1"),
        ("llama", "rope_scaling", json!({"type": "linear", "factor": "two"}), "`rope_scaling.factor` is \"two\""),
        ("llama", "rope_scaling", json!({"type": "linear", "factor": 0.0}), "not positive"),
        ("llama", "attn_logit_softcapping", 30.0.into(), "attn_logit_softcapping"),
        ("llama", "quantization_config", json!({"bits": 4}), "quantization_config"),
        ("llama", "hidden_act", "xielu".into(), "xielu"),
        ("llama", "num_key_value_heads", 3.into(), "4 heads cannot share 3"),
        ("gpt_neox", "sliding_window", 4.into(), "sliding_window"),
        ("gpt2", "num_key_value_heads", 2.into(), "num_key_value_heads"),
        ("gpt_neo", "attention_layers", json!(["global"]), "for 1 layers"),
        ("qwen3", "layer_types", json!(["full_attention", "linear_attention", "x"]), "linear_attention"),
        ("qwen3_next", "layer_types", json!(["full_attention", "sliding_attention", "", ""]), "sliding_attention"),
        ("qwen3_next", "linear_num_value_heads", 3.into(), "cannot share 2 key heads"),
        ("qwen3_5", "linear_conv_kernel_dim", 0.into(), "is 0"),
        ("qwen3_5", "num_experts", 4.into(), "num_experts"),
        ("gemma3_text", "use_bidirectional_attention", true.into(), "use_bidirectional_attention"),
        ("mistral", "rope_theta", (-1.0).into(), "not positive"),
        ("phi3", "num_hidden_layers", 2.into(), "does not describe: `model.layers.2."),
        ("phi3", "num_hidden_layers", 4.into(), "no tensor `model.layers.3."),
        ("olmo2", "intermediate_size", 64.into(), "shape [72, 32], but config.json says [64, 32]"),
        ("gemma", "hidden_size", 0.into(), "is 0"),
        ("smollm3", "no_rope_layers", json!([1, 0]), "`no_rope_layers` has 2 entries for 4 layers"),
        ("smollm3", "no_rope_layers", json!([1, "x", 1, 0]), "`no_rope_layers` is [1,\"x\",1,0], expected array"),
        ("gptj", "rotary_dim", 7.into(), "`rotary_dim` is 7; it must be even"),
        ("gptj", "rotary_dim", 10.into(), "a head's width, 8"),
        ("bloom", "slow_but_exact", true.into(), "slow_but_exact"),
        ("falcon_new", "parallel_attn", false.into(), "`new_decoder_architecture` is true, but `parallel_attn`"),
        ("opt", "word_embed_proj_dim", 16.into(), "shape [120, 32], but config.json says [120, 16]"),
        ("gemma2", "vocab_size", "many".into(), "`vocab_size` is \"many\", expected integer"),
    ] {
        let message = refused(case, &|config| config[key] = value.clone());
        assert!(message.contains(expected), "{case} {key}: {message}");
    }
    let quantised = changed(
        "llama",
        |_| {},
        |tensors| tensors.iter_mut().for_each(|(_, tensor)| *tensor = tensor.to_kind(Kind::Int8)),
    );
    let message = format!("{:#}", load(quantised.path(), Precision::Float32).err().unwrap());
    assert!(message.contains("quantised"), "{message}");
}

/// SmolLM2-135M-Instruct against transformers 4.57 in float32: the greedy continuation, and the loss on a page of
/// Persuasion. Run `SMOLLM2=DIR cargo test --test it smollm2 -- --ignored`; the folder has the model in float32 or
/// bfloat16.
#[test]
#[ignore = "needs SmolLM2-135M-Instruct in the folder that SMOLLM2 names"]
fn smollm2_matches_transformers() {
    let dir = std::env::var("SMOLLM2").expect("SMOLLM2 names the model's folder");
    let expected: Value = serde_json::from_slice(&fs::read(fixture("smollm2.json")).unwrap()).unwrap();
    let ids =
        |name: &str| -> Vec<i64> { expected[name].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect() };
    let tokens = |ids: &[i64]| Tokens {
        ids: Tensor::from_slice(ids).unsqueeze(0),
        mask: Tensor::ones([1, ids.len() as i64], (Kind::Bool, Device::Cpu)),
    };
    for (precision, most) in [(Precision::Float32, 1e-4), (Precision::BFloat16, 1e-2)] {
        let model = load(Path::new(&dir), precision).unwrap();
        let page = tokens(&ids("page"));
        let logits = tch::no_grad(|| model.forward(&page, &mut Hooks::none())).unwrap();
        let loss = dictlearn_core::lm::cross_entropy(&logits, &page).0;
        let apart = (loss / expected["loss"].as_f64().unwrap() - 1.0).abs();
        println!("{precision:?}: loss {loss}, {apart:e} from Python's");
        assert!(apart < most, "{precision:?}: {loss}, {apart}");
        if precision == Precision::Float32 {
            let mut said = ids("prompt");
            while said.len() < ids("greedy").len() {
                let logits = tch::no_grad(|| model.forward(&tokens(&said), &mut Hooks::none())).unwrap();
                said.push(logits.get(0).get(-1).argmax(-1, false).int64_value(&[]));
            }
            assert_eq!(said, ids("greedy"));
        }
    }
}

/// TransformerLens's `hook_normalized` is the value inside a norm: normalised but not yet scaled by its weights.
#[test]
fn hook_normalized_is_the_value_inside_the_norm() {
    let mut tried = 0;
    for case in &cases() {
        let (model, tokens, _) = open(case);
        let whole = model.forward(&tokens, &mut Hooks::none()).unwrap();
        for name in ["blocks.1.ln1.hook_normalized", "blocks.1.ln2.hook_normalized", "ln_final.hook_normalized"] {
            let Ok((point, width)) = model.hook_point(name, Io::Out) else { continue };
            assert_eq!(point.io, Io::Normed);
            let value = model.value_at(&tokens, &point);
            assert_eq!(value.size().last(), Some(&width));
            let mean_square = value.square().mean_dim([-1].as_slice(), false, Kind::Float);
            let off = ((mean_square - 1.0).abs() * tokens.mask.to_kind(Kind::Float)).max().double_value(&[]);
            assert!(off < 0.05, "{case}: {name} has a mean square {off} away from 1");
            // Replacing it changes the rest of the pass.
            let mut moved = Hooks::replace(&point, |value| value + 1.0);
            let changed = model.forward(&tokens, &mut moved).unwrap();
            assert!(difference(&changed, &whole, &tokens.mask) > 1e-3, "{case}: {name}");
            let mut same = Hooks::replace(&point, Tensor::shallow_clone);
            let same = model.forward(&tokens, &mut same).unwrap();
            assert!(difference(&same, &whole, &tokens.mask) < 1e-5, "{case}: {name}");
            tried += 1;
        }
    }
    assert!(tried > 30, "{tried}");
}

/// The library's default config of each family, by release (`PretrainedConfig().to_dict()`), without what follows from the
/// number of layers.
fn library_defaults() -> Map<String, Value> {
    read_json(&fixture("model_defaults.json")).as_object().unwrap().clone()
}

fn drawn(config: Value) -> Result<Box<dyn LanguageModel>> {
    random_model(&config, &ModelCx::new(Device::Cpu, Precision::Float32))
}

/// A config with only the sizes of the whole library default, to see whether the family knows the rest.
#[test]
fn the_library_s_defaults_may_be_left_out() {
    // Of several cases of a family, the first.
    let sizes: BTreeMap<String, Value> = cases().iter().rev().map(|case| config_of(case)).collect();
    let mut compared = 0;
    for (family, releases) in library_defaults() {
        let Some(small) = sizes.get(&family) else { continue };
        // Release 5 has another default for OLMo 3's rotary base; this is the one here.
        let older = |release: &str| family == "olmo3" && release.starts_with("4.");
        for (release, whole) in releases.as_object().unwrap().iter().filter(|(release, _)| !older(release)) {
            let whole = whole.as_object().unwrap();
            // As large as the default: the same modules of the same widths.
            let bare = drawn(json!({"model_type": family})).unwrap_or_else(|error| panic!("{family}: {error:#}"));
            let full = drawn(whole.clone().into()).unwrap_or_else(|error| panic!("{family} {release}: {error:#}"));
            let shape =
                |model: &dyn LanguageModel| (model.modules(), model.memory(), model.max_positions(), model.n_heads());
            assert_eq!(shape(&*bare), shape(&*full), "{family} {release}");

            // Small, to compare what it computes.
            let is_size = |name: &str| whole[name].as_i64().is_some_and(|size| size > 2) && small.get(name).is_some();
            let mut some = json!({"model_type": family});
            let mut all = Value::Object(whole.clone());
            for name in whole.keys().filter(|name| is_size(name)) {
                // As many layers as the patterns of layer types need.
                let layers = ["num_hidden_layers", "num_layers", "n_layer"].contains(&name.as_str());
                let size = if layers { 10.into() } else { small[name].clone() };
                some[name] = size.clone();
                all[name] = size;
            }
            let (some, all) = (drawn(some), drawn(all));
            let [some, all] =
                [some, all].map(|model| model.unwrap_or_else(|error| panic!("{family} {release}: {error:#}")));
            let ids = Tensor::arange(24, (Kind::Int64, Device::Cpu)).view([2, 12]);
            let tokens = Tokens { mask: ids.ones_like().to_kind(Kind::Bool), ids };
            assert_eq!(computed(&*some, &tokens), computed(&*all, &tokens), "{family} {release}");
            compared += 1;
        }
    }
    assert!(compared >= 24, "{compared}");
}

/// The family and config of a case.
fn config_of(case: &str) -> (String, Value) {
    let config = read_json(&fixture("models").join(case).join("config.json"));
    (config["model_type"].as_str().unwrap().to_owned(), config)
}
