//! Qwen 2 (Yang et al. 2024, <https://arxiv.org/abs/2407.10671>) and 2.5: Llama with biases on queries, keys and
//! values.

use dictlearn_core::lm::config::{CommonFields, UpperWindow};
use dictlearn_core::lm::{DecoderConfig, DecoderFamily};
use dictlearn_core::prelude::*;

/// Fields of a Qwen 2 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "qwen2", summary = "Qwen 1.5 to 2.5, and distillations built on them",
    paper = "Yang et al. 2024, Qwen2, https://arxiv.org/abs/2407.10671", example = UpperWindow::EXAMPLE)]
pub struct Qwen2Config {
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    window: UpperWindow,
}

impl DecoderFamily for Qwen2Config {
    const DEFAULTS: &'static str = r#"{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 32768}"#;

    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        decoder.attentions().for_each(|attention| attention.input_bias = true);
        self.window.apply(&mut decoder)?;
        Ok(decoder)
    }
}
