//! SAEs published as one .pt file with a state dict, and nothing beside it: model, layer and sizes are in names.
//!
//! ```text
//! f = σ((x [− b_dec]) W_enc + b_enc)          x̂ = f W_dec + b_dec          σ: ReLU, or the k largest of ReLU
//! ```
//!
//! | format | tensors | b_dec is subtracted |
//! | --- | --- | --- |
//! | `qwen_scope` | W_enc [F, d], W_dec [d, F], b_enc, b_dec | no |
//! | `connor_rob_hook_z` | W_enc [d, F], W_dec [F, d], b_enc, b_dec; `NAME_cfg.json` | yes |
//! | `goodfire` | encoder_linear.weight [F, d], decoder_linear.weight [d, F], and their biases | no |
//! | `deepseek_r1` | encoder.weight [F, d], decoder.weight [d, F], and their biases | no |
//!
//! They are named as in sae_lens. No code in the files is run.

use std::collections::BTreeMap;

use dictlearn_core::files::torch_file;
use dictlearn_core::formats::{
    AffineSae, Format, ModelSite, Place, Published, Request, SaeActivation, agrees, nothing_left, take_float,
};
use dictlearn_core::prelude::*;
use dictlearn_core::sae::saved;

/// Qwen Scope: `layer{n}.sae.pt` in a repository `SAE-Res-{model}-W{width}K-L0_{k}`, whose name gives the model, the
/// number of features and k. A whole repository is imported layer by layer.
#[component(format "qwen_scope", summary = "layer{n}.sae.pt of Qwen Scope: TopK SAEs on Qwen 3 and 3.5",
    paper = "Qwen team 2026, Qwen Scope, https://huggingface.co/collections/Qwen/qwen-scope",
    example = "dictlearn import qwen_scope Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer14.sae.pt")]
pub struct QwenScope {}

impl Format for QwenScope {
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        files(request, &[".sae.pt"])
    }

    fn read(&self, place: &Place) -> Result<Published> {
        let mut tensors = state_dict(place)?;
        let words = place.words();
        let Some((model, width, k)) = qwen_names(&words) else {
            bail!(InputError::new(format!("no folder of {words} names the model, the width and k")).help(
                "keep the repository's name, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50: the files do not hold k"
            ));
        };
        let affine = AffineSae {
            w_enc: take_float::<2>(&mut tensors, "W_enc")?.tr().contiguous(),
            b_enc: take_float::<1>(&mut tensors, "b_enc")?,
            w_dec: take_float::<2>(&mut tensors, "W_dec")?.tr().contiguous(),
            b_dec: take_float::<1>(&mut tensors, "b_dec")?,
            w_skip: None,
            subtract_b_dec: false,
            transcodes: false,
            activation: SaeActivation::TopK(k),
        };
        nothing_left(&tensors)?;
        let (_, features, _) = affine.check()?;
        agrees("the number of features in the repository's name", width, features)?;
        let site = number(file_name(&words), "layer").map(|layer| ModelSite {
            model: format!("Qwen/{model}"),
            submodule: format!("blocks.{layer}.hook_resid_post"),
            prepend_bos: Some(true),
            ctx_len: Some(1024),
            ..ModelSite::default()
        });
        published(affine, site)
    }
}

/// SAEs on the outputs of GPT-2's attention heads, concatenated, by Connor Kissane and Robert Krzyzanowski:
/// `NAME.pt`, and `NAME_cfg.json` beside it.
#[component(format "connor_rob_hook_z", summary = "NAME.pt and NAME_cfg.json: attention SAEs on GPT-2 small",
    paper = "Kissane et al. 2024, Interpreting Attention Layer Outputs with Sparse Autoencoders, https://arxiv.org/abs/2406.17759",
    example = "dictlearn import sae_lens gpt2-small-hook-z-kk:blocks.5.hook_z")]
pub struct ConnorRobHookZ {}

impl Format for ConnorRobHookZ {
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        files(request, &[".pt"])
    }

    fn read(&self, place: &Place) -> Result<Published> {
        let words = place.words();
        let cfg = format!("{}_cfg.json", file_name(&words).trim_end_matches(".pt"));
        let Some(folder) = place.above() else { bail!(InputError::new(format!("{place} is not a .pt file"))) };
        let said = folder.json(&cfg)?;
        let mut tensors = state_dict(place)?;
        let affine = AffineSae {
            w_enc: take_float::<2>(&mut tensors, "W_enc")?,
            b_enc: take_float::<1>(&mut tensors, "b_enc")?,
            w_dec: take_float::<2>(&mut tensors, "W_dec")?,
            b_dec: take_float::<1>(&mut tensors, "b_dec")?,
            w_skip: None,
            subtract_b_dec: true,
            transcodes: false,
            activation: SaeActivation::Relu,
        };
        nothing_left(&tensors)?;
        let (d, features, _) = affine.check()?;
        for (key, found) in [("act_size", d), ("dict_size", features)] {
            match said.get(key) {
                None | Some(Value::Null) => {}
                Some(value) => match value.as_i64() {
                    Some(said) => agrees(&format!("{cfg}: `{key}`"), said, found)?,
                    None => bail!(InputError::new(format!("{cfg}: `{key}` is {value}, but must be a whole number"))),
                },
            }
        }
        let site = said.get("act_name").and_then(Value::as_str).map(|hook| ModelSite {
            model: "gpt2".to_owned(),
            submodule: hook.to_owned(),
            prepend_bos: Some(true),
            ctx_len: Some(128),
            dataset: Some("Skylion007/openwebtext".to_owned()),
            ..ModelSite::default()
        });
        published(affine, site)
    }
}

/// Goodfire's SAEs: one .pt or .pth file in a repository `{model}-SAE-l{layer}`.
#[component(format "goodfire", summary = "Goodfire's .pt files: SAEs on Llama 3.1 8B and 3.3 70B",
    paper = "Goodfire 2025, Llama SAEs, https://www.goodfire.ai/blog/sae-open-source-announcement",
    example = "dictlearn import goodfire Goodfire/Llama-3.1-8B-Instruct-SAE-l19")]
pub struct Goodfire {}

impl Format for Goodfire {
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        files(request, &[".pt", ".pth"])
    }

    fn read(&self, place: &Place) -> Result<Published> {
        let affine = linear_layers(place, "encoder_linear", "decoder_linear")?;
        // Llama-3.1-8B-Instruct-SAE-l19.pth
        let words = place.words();
        let site = file_name(&words).split_once("-SAE-l").and_then(|(model, rest)| {
            let layer: u64 = digits(rest).parse().ok()?;
            Some(ModelSite {
                model: format!("meta-llama/{model}"),
                submodule: format!("blocks.{layer}.hook_resid_post"),
                prepend_bos: Some(true),
                dataset: Some("lmsys/lmsys-chat-1m".to_owned()),
                ..ModelSite::default()
            })
        });
        published(affine, site)
    }
}

/// An SAE on DeepSeek-R1-Distill-Llama-8B: one .pt file whose name ends in `-l{layer}`.
#[component(format "deepseek_r1", summary = "qresearch's .pt file: an SAE on DeepSeek-R1-Distill-Llama-8B",
    paper = "qresearch 2025, DeepSeek-R1 SAE, https://huggingface.co/qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
    example = "dictlearn import deepseek_r1 qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19")]
pub struct DeepSeekR1 {}

impl Format for DeepSeekR1 {
    fn find(&self, request: &Request) -> Result<Vec<Place>> {
        files(request, &[".pt"])
    }

    fn read(&self, place: &Place) -> Result<Published> {
        let affine = linear_layers(place, "encoder", "decoder")?;
        let words = place.words();
        let site = number(file_name(&words), "l").map(|layer| ModelSite {
            model: "deepseek-ai/DeepSeek-R1-Distill-Llama-8B".to_owned(),
            submodule: format!("blocks.{layer}.hook_resid_post"),
            prepend_bos: Some(true),
            ctx_len: Some(1024),
            dataset: Some("lmsys/lmsys-chat-1m".to_owned()),
            ..ModelSite::default()
        });
        published(affine, site)
    }
}

/// Returns a request's file, or every file of its folder that ends in one of `ends`.
fn files(request: &Request, ends: &[&str]) -> Result<Vec<Place>> {
    let place = Place::parse(request.named()?)?;
    let fits = |name: &str| ends.iter().any(|end| name.ends_with(end));
    if fits(&place.words()) {
        return Ok(vec![place]);
    }
    let found: Vec<Place> = place.files()?.iter().filter(|file| fits(file)).map(|file| place.below(file)).collect();
    if found.is_empty() {
        bail!(
            InputError::new(format!("{place} holds no file *{}", ends.join(" or *")))
                .help("name the file, or the folder or repository that holds it")
        );
    }
    Ok(found)
}

/// Reads the tensors of the .pt file at a place.
fn state_dict(place: &Place) -> Result<BTreeMap<String, Tensor>> {
    let file = place.need("")?;
    Ok(saved::state_dict(&torch_file::read(&file)?, &file.display().to_string())?.0)
}

/// Reads two linear layers with ReLU between them.
fn linear_layers(place: &Place, encoder: &str, decoder: &str) -> Result<AffineSae> {
    let mut tensors = state_dict(place)?;
    let affine = AffineSae {
        w_enc: take_float::<2>(&mut tensors, &format!("{encoder}.weight"))?.tr().contiguous(),
        b_enc: take_float::<1>(&mut tensors, &format!("{encoder}.bias"))?,
        w_dec: take_float::<2>(&mut tensors, &format!("{decoder}.weight"))?.tr().contiguous(),
        b_dec: take_float::<1>(&mut tensors, &format!("{decoder}.bias"))?,
        w_skip: None,
        subtract_b_dec: false,
        transcodes: false,
        activation: SaeActivation::Relu,
    };
    nothing_left(&tensors)?;
    affine.check()?;
    Ok(affine)
}

fn published(affine: AffineSae, site: Option<ModelSite>) -> Result<Published> {
    let notes = match site {
        Some(_) => Vec::new(),
        None => vec![
            "no name gives the model and layer: `eval` and `encode --text` will need `source.model` and \
             `source.submodule`"
                .to_owned(),
        ],
    };
    let (class, tensors) = affine.into_class()?;
    Ok(Published { class: class.to_owned(), tensors, site, notes, ..Published::default() })
}

/// Returns the model, the number of features and k of a repository `SAE-Res-{model}-W{width}K-L0_{k}` in a path.
fn qwen_names(words: &str) -> Option<(&str, i64, i64)> {
    let start = words.rfind("SAE-Res-")? + "SAE-Res-".len();
    let name = words[start..].split('/').next()?;
    let (rest, k) = name.rsplit_once("-L0_")?;
    let (model, width) = rest.rsplit_once("-W")?;
    let width: i64 = width.strip_suffix('K')?.parse().ok()?;
    Some((model, width.checked_mul(1024)?, digits(k).parse().ok()?))
}

fn file_name(words: &str) -> &str {
    words.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

/// Returns the digits that a text starts with.
fn digits(text: &str) -> &str {
    &text[..text.bytes().take_while(u8::is_ascii_digit).count()]
}

/// Returns the number after the first occurrence of a word that digits follow.
fn number(text: &str, word: &str) -> Option<u64> {
    text.match_indices(word).find_map(|(at, _)| digits(&text[at + word.len()..]).parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_width_and_k_are_read_from_the_repository() {
        for (words, found) in [
            ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt", Some(("Qwen3-1.7B-Base", 32768, 50))),
            (
                "/x/models--Qwen--SAE-Res-Qwen3.5-27B-W80K-L0_100/snapshots/c/layer3.sae.pt",
                Some(("Qwen3.5-27B", 81920, 100)),
            ),
            ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K/layer0.sae.pt", None),
            ("Qwen/SAE-Res-Qwen3-8B-W99999999999999999K-L0_50", None),
            ("layer0.sae.pt", None),
        ] {
            assert_eq!(qwen_names(words), found, "{words}");
        }
    }

    #[test]
    fn layers_are_the_first_digits_after_the_word() {
        assert_eq!(number("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "l"), Some(19));
        assert_eq!(number("layer31.sae.pt", "layer"), Some(31));
        assert_eq!(number("layer.pt", "layer"), None);
    }
}
