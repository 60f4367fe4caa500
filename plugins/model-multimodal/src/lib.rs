//! The text models of multimodal models: the config's `text_config` goes to the family that implements the text model,
//! and tensors of other towers (vision, audio, projectors) are never read. Module paths are those of the whole model:
//! `model.language_model.layers.3`.

use dictlearn_core::lm::{ModelConfig, ModelCx, Weights, text_model};
use dictlearn_core::prelude::*;

/// Tensors of models with a vision tower and a projector.
const VISION: &[&str] = &["vision_tower", "multi_modal_projector", "image_newline"];

/// Tensors of Qwen's vision models.
const VISUAL: &[&str] = &["visual"];

/// Tensors of Gemma models that see and hear.
const GEMMA: &[&str] = &["vision_tower", "audio_tower", "embed_vision", "embed_audio"];

/// Tensors of Idefics 3 and SmolVLM.
const IDEFICS: &[&str] = &["vision_model", "connector"];

/// Defines families of multimodal models: what they are and the paper, the family of the text model, its path, the towers
/// beside it, and fields for a small example.
macro_rules! multimodal {
    ($($config:ident = $name:literal, $summary:literal, $paper:literal: $text:literal at $root:literal without $towers:ident $(, $example:literal)?;)*) => {$(
        #[doc = concat!("Config of ", $summary, ".")]
        #[component(model $name, summary = $summary, paper = $paper $(, example = $example)?)]
        pub struct $config {
            /// Fields of the whole model; those of the text model are in `text_config`, or among them.
            #[serde(flatten)]
            config: Map<String, Value>,
        }

        impl ModelConfig for $config {
            fn load(self, weights: Weights, cx: &ModelCx) -> Result<Box<dyn LanguageModel>> {
                text_model(&self.config, ($root, $towers), $text, weights, cx)
            }
        }
    )*};
}

multimodal! {
    Gemma3 = "gemma3", "text model of Gemma 3 4B, 12B and 27B", "Gemma team 2025, Gemma 3, https://arxiv.org/abs/2503.19786":
        "gemma3_text" at "model.language_model" without VISION;
    Gemma3n = "gemma3n", "text model of Gemma 3n", "Gemma team 2025, Gemma 3n, https://ai.google.dev/gemma/docs/gemma-3n":
        "gemma3n_text" at "model.language_model" without GEMMA, "{num_kv_shared_layers: 0}";
    Gemma4 = "gemma4", "text model of Gemma 4", "Gemma team 2026, Gemma 4, https://ai.google.dev/gemma/docs":
        "gemma4_text" at "model.language_model" without GEMMA;
    Mistral3 = "mistral3", "text model of Mistral Small 3.1 and later",
        "Mistral AI 2025, Mistral Small 3.1, https://mistral.ai/news/mistral-small-3-1":
        "mistral" at "model.language_model" without VISION;
    Llava = "llava", "text model of LLaVA 1.5 and Pixtral", "Liu et al. 2023, LLaVA, https://arxiv.org/abs/2304.08485":
        "llama" at "model.language_model" without VISION;
    LlavaNext = "llava_next", "text model of LLaVA 1.6", "Liu et al. 2023, LLaVA 1.5, https://arxiv.org/abs/2310.03744":
        "llama" at "model.language_model" without VISION;
    LlavaOneVision = "llava_onevision", "text model of LLaVA OneVision",
        "Li et al. 2024, LLaVA-OneVision, https://arxiv.org/abs/2408.03326":
        "qwen2" at "model.language_model" without VISION;
    InternVl = "internvl", "text model of InternVL 3", "Zhu et al. 2025, InternVL3, https://arxiv.org/abs/2504.10479":
        "qwen2" at "model.language_model" without VISION;
    SmolVlm = "smolvlm", "text model of SmolVLM", "Marafioti et al. 2025, SmolVLM, https://arxiv.org/abs/2504.05299":
        "llama" at "model.text_model" without IDEFICS;
    Idefics3 = "idefics3", "text model of Idefics 3 and the first SmolVLM",
        "Laurencon et al. 2024, Building and better understanding vision-language models, https://arxiv.org/abs/2408.12637":
        "llama" at "model.text_model" without IDEFICS;
    Qwen2Vl = "qwen2_vl", "text model of Qwen 2 VL", "Wang et al. 2024, Qwen2-VL, https://arxiv.org/abs/2409.12191":
        "qwen2" at "model.language_model" without VISUAL;
    Qwen25Vl = "qwen2_5_vl", "text model of Qwen 2.5 VL", "Bai et al. 2025, Qwen2.5-VL, https://arxiv.org/abs/2502.13923":
        "qwen2" at "model.language_model" without VISUAL;
    Qwen3Vl = "qwen3_vl", "text model of Qwen 3 VL", "Bai et al. 2025, Qwen3-VL, https://arxiv.org/abs/2511.21631":
        "qwen3" at "model.language_model" without VISUAL;
    Qwen35 = "qwen3_5", "text model of Qwen 3.5", "Qwen team 2026, Qwen3.5, https://github.com/QwenLM/Qwen3.5":
        "qwen3_5_text" at "model.language_model" without VISUAL;
    Qwen35Moe = "qwen3_5_moe", "text model of Qwen 3.5 mixtures of experts",
        "Qwen team 2026, Qwen3.5, https://github.com/QwenLM/Qwen3.5":
        "qwen3_5_moe_text" at "model.language_model" without VISUAL;
}
