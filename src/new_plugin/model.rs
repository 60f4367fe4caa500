//! `example_name`: a family of language models with Llama's architecture. Change it into your own.
//!
//! A model belongs to this family if its config.json has `"model_type": "example_name"`. Define here what differs from
//! Llama: where norms are, how projections are named, which positions attention covers (`dictlearn_core::lm::decoder`).

use dictlearn_core::lm::{DecoderConfig, DecoderFamily};
use dictlearn_core::lm::config::CommonFields;
use dictlearn_core::prelude::*;

/// The fields of a config.json that change what the model computes.
#[component(model "example_name", summary = "Llama under another name")]
pub struct ExampleNameConfig {
    #[serde(flatten)]
    common: CommonFields,
}

impl DecoderFamily for ExampleNameConfig {
    fn decoder(self) -> Result<DecoderConfig> {
        self.common.decoder()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dictlearn_core::lm::config::read;
    use dictlearn_core::lm::{Decoder, ModelCx};

    #[test]
    fn it_predicts_tokens() {
        let config = [
            ("vocab_size", 100),
            ("hidden_size", 16),
            ("intermediate_size", 32),
            ("num_hidden_layers", 2),
            ("num_attention_heads", 4),
            ("num_key_value_heads", 2),
            ("max_position_embeddings", 64),
        ];
        let mut config: Map<String, Value> =
            config.into_iter().map(|(name, number)| (name.to_owned(), number.into())).collect();
        config.insert("model_type".to_owned(), ExampleNameConfig::NAME.into());
        let cx = ModelCx::new(Device::Cpu, Precision::Float32);
        let random = |_: &str, shape: &[i64]| Ok(Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.1);
        let config: ExampleNameConfig = read(&config.into()).unwrap();
        let model = Decoder::with(config.decoder().unwrap(), &cx, random).unwrap();
        let model: &dyn LanguageModel = &model;
        let ids = Tensor::randint(100, [3, 8], (Kind::Int64, Device::Cpu));
        let tokens = Tokens { mask: ids.ones_like().to_kind(Kind::Bool), ids };
        let logits = model.forward(&tokens, &mut Hooks::none()).unwrap_or_else(|_| panic!("the pass stopped"));
        assert_eq!(logits.size(), [3, 8, 100]);
        // Compare with the outputs of the Python model here: save them with safetensors and read them back.
    }
}
