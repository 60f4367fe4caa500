//! Maps TransformerLens's model names to repositories on the Hub.

/// Owners of the repositories, by prefix of the model's name.
const OWNERS: [(&str, &str); 8] = [
    ("pythia-", "EleutherAI"),
    ("gpt-neo", "EleutherAI"),
    ("gemma-", "google"),
    ("opt-", "facebook"),
    ("bloom-", "bigscience"),
    ("OLMo-", "allenai"),
    ("phi-", "microsoft"),
    ("Llama-", "meta-llama"),
];

/// Names from which the repository cannot be derived.
const NAMES: [(&str, &str); 14] = [
    ("gpt2-small", "gpt2"),
    ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
    ("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.1"),
    ("llama-7b", "huggyllama/llama-7b"),
    ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
    ("llama3-8b", "meta-llama/Meta-Llama-3-8B"),
    ("llama3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
    ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
    ("llama3.1-8b", "meta-llama/Llama-3.1-8B"),
    ("phi-3", "microsoft/Phi-3-mini-4k-instruct"),
    ("deepseek-r1-distill-llama-8b", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ("tiny-stories-1L-21M", "roneneldan/TinyStories-1Layer-21M"),
    ("tiny-stories-2L-33M", "roneneldan/TinyStories-2Layers-33M"),
];

/// Returns the repository of a model with this name in TransformerLens; a repository's own name is returned unchanged.
pub fn hugging_face(name: &str) -> String {
    if name.contains('/') {
        return name.to_owned();
    }
    if let Some((_, repo)) = NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)) {
        return (*repo).to_owned();
    }
    if let Some(size) = name.strip_prefix("tiny-stories-") {
        return format!("roneneldan/TinyStories-{}", size.replace("instruct-", "Instruct-"));
    }
    if let Some(rest) = name.strip_prefix("qwen") {
        // qwen2.5-7b-instruct is Qwen/Qwen2.5-7B-Instruct.
        let part = |part: &str| match part {
            "instruct" => "Instruct".to_owned(),
            "chat" => "Chat".to_owned(),
            "base" => "Base".to_owned(),
            size => size.to_uppercase(),
        };
        return format!("Qwen/Qwen{}", rest.split('-').map(part).collect::<Vec<_>>().join("-"));
    }
    match OWNERS.iter().find(|(start, _)| name.starts_with(start)) {
        Some((_, owner)) => format!("{owner}/{name}"),
        None => name.to_owned(),
    }
}

/// The family (`model_type` in config.json) of models whose name starts so, in lower case and without the owner; the
/// longest start first.
const FAMILIES: [(&str, &str); 26] = [
    ("deepseek-r1-distill-llama", "llama"),
    ("deepseek-r1-distill-qwen", "qwen2"),
    ("gemma-2-", "gemma2"),
    ("gemma-3-1b", "gemma3_text"),
    ("gemma-3-270m", "gemma3_text"),
    ("gemma-3-", "gemma3"),
    ("gemma-4-", "gemma4"),
    ("gemma-", "gemma"),
    ("gpt-neo-", "gpt_neo"),
    ("gpt-oss-", "gpt_oss"),
    ("gpt2", "gpt2"),
    ("llama-", "llama"),
    ("meta-llama-", "llama"),
    ("mistral-7b", "mistral"),
    ("olmo-2", "olmo2"),
    ("olmo-3", "olmo3"),
    ("phi-3", "phi3"),
    ("pythia-", "gpt_neox"),
    ("qwen1.5", "qwen2"),
    ("qwen2", "qwen2"),
    ("qwen3-30b-a3b", "qwen3_moe"),
    ("qwen3-235b-a22b", "qwen3_moe"),
    ("qwen3-", "qwen3"),
    ("qwen3.5-35b-a3b", "qwen3_5_moe"),
    ("qwen3.5-", "qwen3_5"),
    ("tinystories-", "gpt_neo"),
];

/// Returns the family of a model with this name in TransformerLens or on the Hub, if it is known.
pub fn family(name: &str) -> Option<&'static str> {
    let repo = hugging_face(name).to_lowercase();
    let name = repo.rsplit('/').next().unwrap_or_default();
    FAMILIES.iter().find(|(start, _)| name.starts_with(start)).map(|(_, family)| *family)
}

/// Whether a model has layer norms: TransformerLens centres only their writes to the residual stream.
pub fn has_layer_norm(model: &str) -> bool {
    let model = model.to_lowercase();
    ["gpt2", "gpt-neo", "pythia", "tinystories", "tiny-stories", "opt-", "bloom", "gelu", "solu", "gpt-j"]
        .iter()
        .any(|family| model.contains(family))
}

/// Whether a site has a TransformerLens name.
pub fn is_transformer_lens(submodule: &str) -> bool {
    submodule.starts_with("blocks.") || submodule.contains("hook_")
}

/// TransformerLens's name of a module's input or output, if the module's path gives it; covers the names used by the
/// supported families.
pub fn transformer_lens(submodule: &str, io: &str) -> Option<String> {
    if is_transformer_lens(submodule) {
        return Some(submodule.to_owned());
    }
    let parts: Vec<&str> = submodule.split('.').collect();
    let Some(at) = parts.iter().position(|part| part.parse::<u64>().is_ok()) else {
        let embeds = ["embed_in", "wte", "embed_tokens"].contains(parts.last()?) && io == "out";
        return embeds.then(|| "hook_embed".to_owned());
    };
    // A norm after attention or MLP has this name in Gemma-like and OLMo-like families; elsewhere the name differs.
    let hook = match (parts[at + 1..].join(".").as_str(), io) {
        ("", "in") => "hook_resid_pre",
        ("", _) => "hook_resid_post",
        ("mlp" | "post_feedforward_layernorm", "out") => "hook_mlp_out",
        ("attn" | "attention" | "self_attn" | "attn.attention", "out") => "hook_attn_out",
        ("self_attn.o_proj" | "attn.c_proj" | "attention.dense" | "attn.attention.out_proj", "in") => "attn.hook_z",
        ("mlp.down_proj" | "mlp.c_proj" | "mlp.dense_4h_to_h", "in") => "mlp.hook_post",
        _ => return None,
    };
    Some(format!("blocks.{}.{hook}", parts[at]))
}

#[cfg(test)]
mod tests {
    use super::{family, hugging_face, transformer_lens};

    #[test]
    fn families_are_known_by_name() {
        for (name, known) in [
            ("gpt2-small", Some("gpt2")),
            ("gemma-2b-it", Some("gemma")),
            ("gemma-2-9b", Some("gemma2")),
            ("google/gemma-3-270m-it", Some("gemma3_text")),
            ("google/gemma-3-12b-pt", Some("gemma3")),
            ("meta-llama/Meta-Llama-3-8B-Instruct", Some("llama")),
            ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", Some("llama")),
            ("qwen3-0.6b", Some("qwen3")),
            ("Qwen/Qwen3-30B-A3B-Base", Some("qwen3_moe")),
            ("Qwen/Qwen3.5-27B", Some("qwen3_5")),
            ("Qwen/Qwen3.5-35B-A3B-Base", Some("qwen3_5_moe")),
            ("someone/else", None),
        ] {
            assert_eq!(family(name), known, "{name}");
        }
    }

    #[test]
    fn transformer_lens_names_map_to_repositories() {
        for (name, repo) in [
            ("gpt2-small", "gpt2"),
            ("gpt2-xl", "gpt2-xl"),
            ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
            ("gemma-2-2b", "google/gemma-2-2b"),
            ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
            ("tiny-stories-instruct-33M", "roneneldan/TinyStories-Instruct-33M"),
            ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
            ("", ""),
        ] {
            assert_eq!(hugging_face(name), repo);
        }
    }

    #[test]
    fn module_paths_map_to_transformer_lens_names() {
        for (path, io, name) in [
            ("gpt_neox.layers.3", "out", Some("blocks.3.hook_resid_post")),
            ("transformer.h.0", "in", Some("blocks.0.hook_resid_pre")),
            ("model.layers.11.self_attn.o_proj", "in", Some("blocks.11.attn.hook_z")),
            ("blocks.2.hook_mlp_out", "out", Some("blocks.2.hook_mlp_out")),
            ("transformer.wte", "out", Some("hook_embed")),
            ("model.layers.1.mlp.gate_proj", "out", None),
        ] {
            assert_eq!(transformer_lens(path, io).as_deref(), name);
        }
    }
}
