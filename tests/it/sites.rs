//! Several sites from one pass: submodules, attention heads, and the SAEs that train on them.

use std::fs;
use std::path::Path;

use dictlearn as _;
use dictlearn_core::data::manifest::TOKENS;
use dictlearn_core::files::tensors::TensorFile;
use dictlearn_core::files::{from_yaml, tensors};
use dictlearn_core::lm::cross_entropy;
use dictlearn_core::prelude::*;
use dictlearn_core::report::TaggedMetric;
use dictlearn_core::sae::TaggedDictionary;
use serde_json::json;

use crate::common::{Desk, drain, fixture};

fn source(yaml: &str) -> Box<dyn ActivationSource> {
    let config: Box<dyn TaggedSource> = from_yaml(yaml).unwrap();
    config.build(&SourceCx { seed: 1, ..SourceCx::default() }).unwrap()
}

/// A source over the fixture's tokens, in order.
fn in_order(submodule: &str, more: &str) -> String {
    let folder = fixture("models/gpt_neox");
    format!(
        "{{type: language_model, model: {folder:?}, submodule: {submodule}, out_batch_size: 7, refresh_batch_size: 2, \
         text: {{type: token_file, path: {:?}}}, shuffle: false{more}}}",
        folder.join("io.safetensors")
    )
}

/// A run on the bundled model; `source` and `saes` are YAML.
fn config(out: &str, source: &str, saes: &str) -> String {
    format!(
        "steps: 12\noutput_dir: {out}\nprecision: float32\nnormalize_activations: true\nlog_every: 1\n\
         source: {{type: language_model, model: 'embedded:austen', pack: true, ctx_len: 32, n_ctxs: 24, \
         refresh_batch_size: 8, out_batch_size: 96, text: {{type: embedded, name: austen}}, {source}}}\n\
         eval_source: {{text: {{split: held_out}}}}\nsaes: [{saes}]\n\
         metrics: [{{type: reconstruction, n_batches: 2}}, {{type: loss_recovered, n_batches: 1, batch_size: 4}}]\n"
    )
}

const TOP_K: &str = "{name: a, trainer: {type: top_k, warmup_steps: 2}, dictionary: {dict_size: 64, k: 4}}";
const STANDARD: &str = "{name: b, trainer: {type: standard, warmup_steps: 2, sparsity_warmup_steps: 4, \
                        resample_steps: 5}, dictionary: {dict_size: 64}}";

#[test]
fn sites_of_one_run_train_independently() {
    let desk = Desk::new();
    let sites = ["gpt_neox.layers.1", "gpt_neox.layers.2.mlp"];
    let both = format!("submodule: [{}, {}]", sites[0], sites[1]);
    desk.write("both.yaml", &config("both", &both, &format!("{TOP_K}, {STANDARD}")));
    let table = desk.ok(&["train", "both.yaml"]);
    for site in sites {
        desk.write("one.yaml", &config(site, &format!("submodule: {site}"), &format!("{TOP_K}, {STANDARD}")));
        desk.ok(&["train", "one.yaml"]);
        for sae in ["a", "b"] {
            let (together, alone) = (format!("both/{sae}-{site}"), format!("{site}/{sae}"));
            assert!(table.contains(&format!("| {sae}-{site} ")), "{table}");
            let read = |dir: &str, file: &str| fs::read(desk.path(&format!("{dir}/{file}"))).unwrap();
            assert!(read(&together, "ae.safetensors") == read(&alone, "ae.safetensors"), "{together}");
            assert_eq!(desk.json(&format!("{together}/eval.json")), desk.json(&format!("{alone}/eval.json")));
            let (mut together_config, alone_config) =
                (desk.json(&format!("{together}/config.json")), desk.json(&format!("{alone}/config.json")));
            assert_eq!(together_config["buffer"]["site"], site);
            assert_eq!(together_config["trainer"]["wandb_name"], format!("{sae}-{site}"));
            assert_eq!(together_config["trainer"]["submodule_name"], site);
            // Apart from the name, the config is that of a run with one site.
            together_config["trainer"]["wandb_name"] = sae.into();
            together_config["buffer"].as_object_mut().unwrap().remove("site");
            assert_eq!(together_config, alone_config);
        }
    }
    let mut rows = desk.log("both/metrics.jsonl");
    assert_eq!(rows.len(), 4 * 12);
    rows.retain(|row| row["sae"] == format!("b-{}", sites[1]));
    rows.iter_mut().for_each(|row| row["sae"] = "b".into());
    let mut alone = desk.log(&format!("{}/metrics.jsonl", sites[1]));
    alone.retain(|row| row["sae"] == "b");
    assert_eq!(rows, alone);
    // `eval` finds an SAE's own site in the run's config.
    let sae = format!("both/a-{}", sites[1]);
    let again: Value = serde_json::from_str(&desk.ok(&["eval", &sae, "--json"])).unwrap();
    assert_eq!(again, desk.json(&format!("{sae}/eval.json")));
    // A source with one site needs no matching name.
    let path = desk.path(&sae);
    desk.ok(&["eval", path.to_str().unwrap(), "--config", "one.yaml"]);
    let other = desk.refused(&["eval", &sae, "--set", "eval_source.submodule=[gpt_neox.layers.0, gpt_neox.layers.3]"]);
    assert!(other.contains("was trained at gpt_neox.layers.2.mlp") && other.contains("sites: gpt_neox"), "{other}");
}

#[test]
fn a_run_with_several_sites_resumes_bit_for_bit() {
    let desk = Desk::new();
    let source = "submodule: [gpt_neox.layers.1, gpt_neox.layers.2.mlp], io: in_to_out";
    let text = config("whole", source, &format!("{TOP_K}, {STANDARD}"));
    desk.write("config.yaml", &text);
    desk.ok(&["train", "config.yaml"]);
    desk.ok(&["train", "config.yaml", "--output-dir", "parts", "--set", "stop_after=7"]);
    desk.ok(&["train", "config.yaml", "--output-dir", "parts", "--resume"]);
    for sae in ["a-gpt_neox.layers.1", "b-gpt_neox.layers.2.mlp"] {
        let read = |run: &str| fs::read(desk.path(&format!("{run}/{sae}/ae.safetensors"))).unwrap();
        assert!(read("whole") == read("parts"), "{sae}");
    }
    assert_eq!(desk.read("whole/metrics.jsonl"), desk.read("parts/metrics.jsonl"));
}

#[test]
fn an_sae_can_choose_its_sites() {
    let desk = Desk::new();
    let source = "submodule: [gpt_neox.layers.0, gpt_neox.layers.1, gpt_neox.layers.2.mlp]";
    let saes = |site: &str| TOP_K.replace("name: a", &format!("name: a, site: {site}"));
    let folders = |site: &str| {
        desk.write("config.yaml", &config("run", source, &saes(site)));
        let said = desk.ok(&["train", "config.yaml", "--dry-run"]);
        let mut names: Vec<String> = said
            .lines()
            .filter_map(|line| line.strip_prefix("# ")?.split_once(": AutoEncoderTopK"))
            .map(|(name, _)| name.to_owned())
            .collect();
        names.sort();
        names
    };
    // With one site the name stays as it is.
    assert_eq!(folders("gpt_neox.layers.1"), ["a"]);
    assert_eq!(folders("'*.mlp'"), ["a"]);
    assert_eq!(folders("'*layers.?'"), ["a-gpt_neox.layers.0", "a-gpt_neox.layers.1"]);
    assert_eq!(folders("null").len(), 3);
    let refused = |saes: &str| {
        desk.write("config.yaml", &config("run", source, saes));
        desk.refused(&["train", "config.yaml"])
    };
    let said = refused(&saes("gpt_neox.layer.1"));
    assert!(said.contains("the source has no site `gpt_neox.layer.1`") && said.contains("(saes[0].site)"), "{said}");
    assert!(said.contains("did you mean `gpt_neox.layers.1`?") && said.contains("config.yaml:8:"), "{said}");
    // Names made from sites may collide with others.
    let named = TOP_K.replace("name: a", "name: a-gpt_neox.layers.1, site: gpt_neox.layers.0");
    let said = refused(&format!("{TOP_K}, {named}"));
    assert!(said.contains("two SAEs are named `a-gpt_neox.layers.1`") && said.contains("(saes[1].name)"), "{said}");
    let said = refused(&TOP_K.replace("name: a", &format!("name: {}", "a".repeat(195))));
    assert!(said.contains("cannot be named"), "{said}");
    assert!(!desk.path("run").exists());
    // An `eval_source` must have the trained sites.
    let text = config("run", source, TOP_K)
        .replace("eval_source: {", "eval_source: {submodule: [gpt_neox.layers.0, gpt_neox.layers.3], ");
    desk.write("config.yaml", &text);
    let said = desk.refused(&["train", "config.yaml"]);
    assert!(said.contains("`eval_source` has no site `gpt_neox.layers.1`") && !desk.path("run").exists(), "{said}");
}

#[test]
fn invalid_submodules_are_refused() {
    let desk = Desk::new();
    for (source, said) in [
        ("submodule: []", &["`submodule` is an empty list", "(source.submodule)"][..]),
        ("submodule: [gpt_neox.layers.1, gpt_neox.layers.1]", &["listed twice", "(source.submodule[1])"]),
        (
            "submodule: [gpt_neox.layers.1, blocks.1.hook_resid_post]",
            &["`blocks.1.hook_resid_post` is the same hook point as `gpt_neox.layers.1`"],
        ),
        ("submodule: blocks.1.hook_resid_post, io: in", &["names an output", "(source.submodule)"]),
        ("submodule: [gpt_neox.layers.1, gpt_neox.layer.2]", &["no module `gpt_neox.layer.2`", "config.yaml:6:"]),
        ("submodule: {a: b}", &["it must be text or a list"]),
        ("submodule: [1.5, [a]]", &["source.submodule"]),
        (
            "submodule: gpt_neox.layers.1, heads: separate",
            &[
                "is not the output of attention heads",
                "(source.heads)",
                "`blocks.1.attn.hook_z`, or `io: in` of `gpt_neox.layers.1.attention.dense`",
            ],
        ),
        (
            "submodule: gpt_neox.layers.1.attention.dense, io: in_to_out, heads: separate",
            &["is not the output of attention heads"],
        ),
        ("submodule: blocks.1.attn.hook_z, heads: apart", &["it must be one of joined, separate"]),
    ] {
        desk.write("config.yaml", &config("run", source, TOP_K));
        let found = desk.refused(&["train", "config.yaml"]);
        assert!(said.iter().all(|part| found.contains(part)), "{source}: {found}");
    }
}

#[test]
fn separate_heads_concatenate_to_the_joined_site() {
    for submodule in ["blocks.1.attn.hook_z", "gpt_neox.layers.1.attention.dense"] {
        let mut joined = source(&in_order(submodule, ", io: in"));
        let mut separate = source(&in_order(submodule, ", io: in, heads: separate"));
        let names: Vec<String> = separate.sites().into_iter().map(|site| site.name).collect();
        let heads = separate.language_model().unwrap().model().n_heads();
        assert!(heads > 1);
        assert_eq!(names, (0..heads).map(|head| format!("{submodule}.head{head}")).collect::<Vec<_>>());
        assert_eq!(separate.sites()[1].activation_dim * heads, joined.sites()[0].activation_dim);
        assert_eq!(separate.sites()[1].settings["head"], json!(1));
        let ((joined, tokens), (separate, same)) = (drain(&mut *joined), drain(&mut *separate));
        assert_eq!(Tensor::cat(&separate, 1), joined[0]);
        assert_eq!(tokens, same);
    }
}

fn number(figures: &Figures, name: &str) -> f64 {
    figures[name].as_f64().unwrap()
}

#[test]
fn replacing_a_head_leaves_the_other_heads_unchanged() {
    let mut separate = source(&in_order("blocks.1.attn.hook_z", ", heads: separate"));
    let width = separate.sites()[0].activation_dim;
    let identity: Box<dyn TaggedDictionary> = from_yaml("{type: identity}").unwrap();
    let cx = DictionaryCx {
        activation_dim: width,
        output_dim: width,
        parts: &[],
        device: Device::Cpu,
        precision: Precision::Float32,
    };
    let identity = identity.build(&cx).unwrap();
    let subjects: Vec<Subject> = [2, 0, 2].map(|site| Subject { dictionary: &*identity, site }).into();
    let metric: Box<dyn TaggedMetric> = from_yaml("{type: loss_recovered, n_batches: 1, batch_size: 3}").unwrap();
    let found = metric.build().unwrap().evaluate(&subjects, &mut *separate).unwrap().unwrap();
    assert_eq!(found[0], found[2]);
    assert_ne!(found[0]["loss_zero"], found[1]["loss_zero"]);
    for (figures, head) in found.iter().zip([2, 0]) {
        assert!((number(figures, "loss_reconstructed") - number(figures, "loss_original")).abs() < 1e-6);
        assert!((number(figures, "frac_recovered") - 1.0).abs() < 1e-3);
        // The loss with that head set to zero by a hook.
        separate.rewind().unwrap();
        let source = separate.language_model().unwrap();
        let tokens = source.next_tokens(3).unwrap().unwrap();
        let without = |value: &Tensor| {
            let value = value.copy();
            let _ = value.narrow(-1, head * width, width).zero_();
            value
        };
        let point = HookPoint { module: "gpt_neox.layers.1.attention.dense".to_owned(), io: Io::In };
        let logits = source.model().forward(&tokens, &mut Hooks::replace(&point, without)).unwrap();
        assert!((number(figures, "loss_zero") - cross_entropy(&logits, &tokens).0).abs() < 1e-6);
    }
}

#[test]
fn each_head_trains_its_own_sae() {
    let desk = Desk::new();
    let chosen = TOP_K.replace("name: a", "name: a, site: '*.head[13]'").replace("{dict_size: 64", "{dict_size: 32");
    desk.write("config.yaml", &config("run", "submodule: blocks.2.attn.hook_z, heads: separate", &chosen));
    let table = desk.ok(&["train", "config.yaml"]);
    assert!(table.contains("CE diff"), "{table}");
    for head in [1, 3] {
        let dir = format!("run/a-blocks.2.attn.hook_z.head{head}");
        let (config, eval) = (desk.json(&format!("{dir}/config.json")), desk.json(&format!("{dir}/eval.json")));
        assert_eq!(config["trainer"]["submodule_name"], "blocks.2.attn.hook_z");
        assert_eq!((&config["buffer"]["head"], &config["trainer"]["layer"]), (&json!(head), &json!(2)));
        assert_eq!(config["buffer"]["d_submodule"], config["trainer"]["activation_dim"]);
        let again: Value = serde_json::from_str(&desk.ok(&["eval", &dir, "--json"])).unwrap();
        assert_eq!(again, eval);
    }
}

/// Writes tokens padded on the left, on the right and not at all. Returns ids and mask.
fn ragged(path: &Path) -> (Tensor, Tensor) {
    let ids = Tensor::from_slice2(&[[0_i64, 0, 5, 6, 7], [8, 9, 10, 0, 0], [11, 12, 13, 14, 15]]);
    let mask = Tensor::from_slice2(&[[0_i64, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]);
    tensors::write(path, &[("input_ids", ids.shallow_clone()), ("attention_mask", mask.shallow_clone())]).unwrap();
    (ids, mask)
}

#[test]
fn every_activation_is_labelled_with_its_token() {
    let desk = Desk::new();
    let (ids, mask) = ragged(&desk.path("tokens.safetensors"));
    let yaml = |more: &str| {
        in_order("[gpt_neox.layers.0, gpt_neox.layers.2.mlp]", more)
            .replace(fixture("models/gpt_neox/io.safetensors").to_str().unwrap(), "TOKENS")
            .replace("TOKENS", desk.path("tokens.safetensors").to_str().unwrap())
    };
    let at = |tokens: &Tensor| ids.index(&[Some(tokens.select(1, 1)), Some(tokens.select(1, 2))]);
    let (sites, tokens) = drain(&mut *source(&yaml("")));
    assert_eq!(tokens.size(), [11, 3]);
    assert_eq!(tokens.select(1, 0), at(&tokens));
    assert_eq!(tokens.narrow(1, 1, 2), mask.nonzero());
    // Also when shuffled, in two passes over the text.
    let mut shuffled = source(
        &yaml(", ctx_len: 5, n_ctxs: 3")
            .replace("shuffle: false", "shuffle: true")
            .replace("out_batch_size: 7", "out_batch_size: 1"),
    );
    for _ in 0..2 {
        let (mixed, mixed_tokens) = drain(&mut *shuffled);
        assert_ne!(mixed_tokens, tokens);
        assert_eq!(mixed_tokens.select(1, 0), at(&mixed_tokens));
        let row = mixed_tokens.select(1, 1) * 5 + mixed_tokens.select(1, 2);
        let row_in_order = tokens.select(1, 1) * 5 + tokens.select(1, 2);
        let (sorted, order) = row.sort(0, false);
        assert_eq!(sorted, row_in_order);
        assert_eq!(mixed.len(), sites.len());
        for (mixed, in_order) in mixed.iter().zip(&sites) {
            let apart = (mixed.index_select(0, &order) - in_order).abs().max().double_value(&[]);
            assert!(apart < 1e-5, "{apart}");
        }
        shuffled.rewind().unwrap();
    }
    // Also on disk.
    desk.write("config.yaml", &format!("precision: float32\nsource: {}\n", yaml(", remove_bos: true")));
    desk.ok(&["activations", "config.yaml", "--out", "out"]);
    let shard = TensorFile::open(&desk.path("out/activations-00000.safetensors")).unwrap();
    let columns = TOKENS.map(|name| shard.tensor(name).unwrap().to_kind(Kind::Int64));
    let written = Tensor::stack(&columns, 1);
    assert_eq!(written.size(), [8, 3]);
    assert_eq!(written.select(1, 0), at(&written));
    assert_eq!(shard.shape("gpt_neox.layers.2.mlp/activations").unwrap(), [8, 32]);
}

#[test]
fn a_token_skipped_at_one_site_is_skipped_at_all() {
    let sites = "[gpt_neox.layers.0, gpt_neox.layers.2]";
    let whole = |more: &str| in_order(sites, more).replace("refresh_batch_size: 2", "refresh_batch_size: 3");
    let (all, tokens) = drain(&mut *source(&whole("")));
    let kept = |site: &Tensor| {
        let norms = site.norm_scalaropt_dim(2.0, [-1], false);
        norms.le_tensor(&(norms.median() * 1.03))
    };
    let expected = kept(&all[0]).logical_and(&kept(&all[1])).nonzero().reshape([-1]);
    assert!(expected.size()[0] < kept(&all[0]).sum(Kind::Int64).int64_value(&[]), "each site must skip some tokens");
    let (found, found_tokens) = drain(&mut *source(&whole(", max_activation_norm_multiple: 1.03")));
    assert_eq!(found_tokens, tokens.index_select(0, &expected));
    assert_eq!((found.len(), all.len()), (2, 2));
    for (found, all) in found.iter().zip(&all) {
        assert_eq!(*found, all.index_select(0, &expected));
    }
}
