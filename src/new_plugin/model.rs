//! `example_name`: a family of language models that is Llama's architecture, to be changed into yours.
//!
//! A model is of this family if its config.json says `"model_type": "example_name"`. Say here what differs from Llama:
//! which norms stand where, how projections are named, what attention sees (`dictlearn_core::lm::decoder`).

use dictlearn_core::lm::config::{Usual, read};
use dictlearn_core::lm::{Decoder, DecoderConfig, ModelFamily};
use dictlearn_core::prelude::*;

/// The `model_type` of its config.json.
const MODEL_TYPE: &str = "example_name";

/// The fields of a config.json that change what the model computes.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub struct ExampleNameConfig {
    #[serde(flatten)]
    usual: Usual,
}

register! {
    model ExampleNameConfig, MODEL_TYPE,
    summary: "Llama by another name",
    paper: "",
    example: "",
}

inventory::submit! {
    ModelFamily {
        model_type: MODEL_TYPE,
        load: |config, weights, cx| {
            Ok(Box::new(Decoder::open(decoder(config)?, weights, cx)?))
        },
    }
}

fn decoder(config: &Value) -> Result<DecoderConfig> {
    let ExampleNameConfig { usual } = read(config)?;
    usual.decoder()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dictlearn_core::lm::ModelCx;

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
        config.insert("model_type".to_owned(), MODEL_TYPE.into());
        let cx = ModelCx { device: Device::Cpu, precision: Precision::Float32 };
        let random = |_: &str, shape: &[i64]| Ok(Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.1);
        let model = Decoder::with(decoder(&config.into()).unwrap(), &cx, random).unwrap();
        let model: &dyn LanguageModel = &model;
        let ids = Tensor::randint(100, [3, 8], (Kind::Int64, Device::Cpu));
        let tokens = Tokens { mask: ids.ones_like().to_kind(Kind::Bool), ids };
        let logits = model.forward(&tokens, &mut Hooks::none()).unwrap_or_else(|_| panic!("the pass stopped"));
        assert_eq!(logits.size(), [3, 8, 100]);
        // Compare with the outputs of the Python model here: save them with safetensors and read them back.
    }
}
