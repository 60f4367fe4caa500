//! Gemma 4, text only (<https://huggingface.co/docs/transformers/model_doc/gemma4>): Gemma 3 with wider heads in full
//! layers, which are rotated in part, with inputs of single layers, experts beside the MLP, a learned factor on a layer's
//! output, and last layers that use the keys and values of earlier ones. Norms scale by their weight, not by 1 + weight;
//! values are normalised, and scores are not scaled.

use dictlearn_core::lm::config::{CommonFields, LayerInputs, PerLayerFields, causal};
use dictlearn_core::lm::{
    BesideConfig, DecoderConfig, DecoderFamily, ExpertLayout, ExpertsConfig, RouterScales, activation,
};
use dictlearn_core::prelude::*;

/// Fields of a Gemma 4 config.json that affect the computation, with Hugging Face's defaults.
#[component(model "gemma4_text", summary = "Gemma 4, text only",
    paper = "Gemma 4 in transformers, https://huggingface.co/docs/transformers/model_doc/gemma4",
    example = "{num_hidden_layers: 4, layer_types: [sliding_attention, full_attention, sliding_attention, full_attention], \
        num_kv_shared_layers: 2, use_double_wide_mlp: true, head_dim: 8, global_head_dim: 16, num_key_value_heads: 2, \
        num_global_key_value_heads: 1, attention_k_eq_v: true, hidden_size_per_layer_input: 8, \
        vocab_size_per_layer_input: 90, enable_moe_block: true, num_experts: 4, top_k_experts: 2, \
        moe_intermediate_size: 16}")]
pub struct Gemma4Config {
    #[serde(flatten)]
    common: CommonFields,
    #[serde(flatten)]
    inputs: LayerInputs,
    /// Width of a head in full-attention layers, unless `per_layer_config` is given.
    global_head_dim: i64,
    /// Number of key/value heads in full-attention layers whose values are their keys, unless `per_layer_config` is given.
    num_global_key_value_heads: Option<i64>,
    /// `head_dim` and `num_key_value_heads` of layers, by index, where they differ from the fields of the same name.
    per_layer_config: Option<PerLayerFields>,
    /// Whether values are the projected keys in full-attention layers.
    attention_k_eq_v: bool,
    /// Whether MLPs are twice as wide in layers that use the keys and values of others.
    use_double_wide_mlp: bool,
    /// Whether there are experts beside the MLP.
    enable_moe_block: bool,
    /// Number of experts.
    num_experts: Option<i64>,
    /// Number of experts per token.
    top_k_experts: Option<i64>,
    /// Width of an expert.
    moe_intermediate_size: Option<i64>,
    /// Must not be `all`: only causal models are supported. `vision` concerns images only.
    use_bidirectional_attention: Option<String>,
}

impl Gemma4Config {
    /// Returns width of a head and number of key/value heads of each layer.
    fn heads(&self, sliding: &[bool]) -> Result<Vec<[i64; 2]>> {
        let kv_heads = self.common.num_key_value_heads.unwrap_or(self.common.num_attention_heads);
        let all = [self.common.head_dim()?, kv_heads];
        if let Some(layers) = &self.per_layer_config {
            return layers.of_layers(["head_dim", "num_key_value_heads"], all, sliding.len());
        }
        let global = self.num_global_key_value_heads.filter(|_| self.attention_k_eq_v).unwrap_or(kv_heads);
        let full = [self.global_head_dim, global];
        Ok(sliding.iter().map(|sliding| if *sliding { all } else { full }).collect())
    }

    fn experts(&self) -> Result<ExpertsConfig> {
        let (Some(count), Some(per_token), Some(width)) =
            (self.num_experts, self.top_k_experts, self.moe_intermediate_size)
        else {
            bail!(
                InputError::new("config.json: `enable_moe_block` is true")
                    .help("`num_experts`, `top_k_experts` and `moe_intermediate_size` must be numbers then")
            )
        };
        Ok(ExpertsConfig {
            router: "router.proj",
            router_scales: Some(RouterScales { eps: self.common.rms_norm_eps.unwrap_or(1e-6) }),
            layout: ExpertLayout::Stacked,
            ..ExpertsConfig::new("", (count, per_token), width, activation(&self.inputs.hidden_activation)?)
        })
    }
}

impl DecoderFamily for Gemma4Config {
    const DEFAULTS: &'static str = r#"{
        "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512,
        "max_position_embeddings": 131072, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "tie_word_embeddings": true, "attention_bias": false, "sliding_window": 512, "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256, "attention_k_eq_v": false,
        "use_double_wide_mlp": false, "enable_moe_block": false,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}
        }
    }"#;

    fn decoder(self) -> Result<DecoderConfig> {
        causal(self.use_bidirectional_attention.as_deref() == Some("all"))?;
        let mut sliding = self.inputs.sliding(self.common.num_hidden_layers, 6)?;
        // As in transformers, the last layer is full whatever the config says.
        sliding.iter_mut().last().into_iter().for_each(|last| *last = false);
        let heads = self.heads(&sliding)?;
        // Layers of one type share a rotary embedding. A type without layers needs none.
        let width = |kind: bool| sliding.iter().position(|sliding| *sliding == kind).map_or(2, |layer| heads[layer][0]);
        let widths = [false, true].map(width);
        if let Some(layer) = (0..heads.len()).find(|layer| heads[*layer][0] != widths[usize::from(sliding[*layer])]) {
            bail!(InputError::new(format!(
                "config.json: `per_layer_config` gives layer {layer} other heads than earlier layers of its type"
            )));
        }
        let longest = self.common.max_position_embeddings;
        let rotary = self.common.rope.full_and_sliding((widths[0], 1e6), (widths[1], 1e4), longest)?;
        let mut decoder = self.common.decoder_with(rotary)?;
        self.inputs.apply(&mut decoder, &sliding)?;
        for (attention, (heads, sliding)) in decoder.attentions().zip(heads.iter().zip(&sliding)) {
            [attention.head_dim, attention.kv_heads] = *heads;
            attention.values_are_keys = self.attention_k_eq_v && !sliding;
        }
        let experts = self.enable_moe_block.then(|| self.experts()).transpose()?;
        let first_shared = sliding.len().saturating_sub(self.inputs.num_kv_shared_layers);
        for mlp in decoder.mlps().skip(first_shared).filter(|_| self.use_double_wide_mlp) {
            mlp.width = mlp.width.saturating_mul(2);
        }
        for layer in &mut decoder.layers {
            layer.scalar = Some("layer_scalar");
            layer.beside = experts.clone().map(|experts| BesideConfig {
                experts,
                after_mlp: "post_feedforward_layernorm_1",
                before_experts: "pre_feedforward_layernorm_2",
                after_experts: "post_feedforward_layernorm_2",
            });
        }
        Ok(decoder)
    }
}
