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
    fn decoder(self) -> Result<DecoderConfig> {
        let mut decoder = self.common.decoder()?;
        decoder.attentions().for_each(|attention| attention.input_bias = true);
        self.window.apply(&mut decoder)?;
        Ok(decoder)
    }
}
