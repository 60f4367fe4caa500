//! Module paths of a family as in Hugging Face, and the TransformerLens names of the same hook points.

use super::hook_point::{HookPoint, Io};

/// Module paths of a model.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// List of layers: `gpt_neox.layers`.
    pub layers: String,
    /// Token embedding (full path).
    pub embed: String,
    /// Learned position embedding (full path), if there is one.
    pub positions: Option<String>,
    /// Final norm (full path), if there is one.
    pub final_norm: Option<String>,
    /// Modules of each layer.
    pub of_layer: Vec<LayerNames>,
    /// Other names of modules, and the names that the model uses: [("mlp", "block_sparse_moe")].
    pub aliases: Vec<(&'static str, &'static str)>,
}

/// Module paths in a layer.
#[derive(Debug, Clone, Default)]
pub struct LayerNames {
    /// Output projection of softmax attention, if there is one. Its input is the concatenated outputs of the heads.
    pub attention_out: Option<String>,
    /// Module whose output is added to the residual stream: attention, or a norm after it.
    pub attention_added: String,
    /// First projection of the MLP; in a gated MLP, the gate. `None` where gate and up are one projection.
    pub mlp_in: Option<String>,
    /// Up projection of a gated MLP, multiplied with the activated gate.
    pub mlp_up: Option<String>,
    /// Last projection of the MLP; `None` in a mixture of experts.
    pub mlp_out: Option<String>,
    /// Module whose output is added to the residual stream: the MLP, or a norm after it.
    pub mlp_added: String,
    /// Norm before attention, if there is one.
    pub norm1: Option<String>,
    /// Norm before the MLP, if there is one.
    pub norm2: Option<String>,
    /// Module that reads the residual stream between attention and MLP; `None` if both read the layer's input.
    pub middle: Option<String>,
}

/// Names of modules around the layers, in any library.
const OUTER: [&str; 6] = ["model", "language_model", "text_model", "transformer", "gpt_neox", "decoder"];

/// TransformerLens names within a layer.
const HOOKS: [&str; 12] = [
    "hook_resid_pre",
    "ln1.hook_normalized",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
];

impl Names {
    /// Returns the path of a layer.
    pub fn layer(&self, index: usize) -> String {
        format!("{}.{index}", self.layers)
    }

    /// Returns the index of the layer that is or contains a module.
    pub fn layer_of(&self, module: &str) -> Option<usize> {
        let rest = module.strip_prefix(self.layers.as_str())?.strip_prefix('.')?;
        rest.split('.').next()?.parse().ok()
    }

    /// Returns a module path without the models around the layers, by the names that this model uses.
    pub(super) fn without_outer(&self, module: &str) -> String {
        let own = |part| match self.aliases.iter().find(|(other, _)| *other == part) {
            Some((_, own)) => *own,
            None => part,
        };
        let parts: Vec<&str> = module.split('.').skip_while(|part| OUTER.contains(part)).map(own).collect();
        parts.join(".")
    }

    /// Returns the TransformerLens names that this family supports, layer by layer.
    pub fn transformer_lens_names(&self, n_layers: usize) -> Vec<String> {
        let in_layers = (0..n_layers).flat_map(|layer| HOOKS.iter().map(move |hook| format!("blocks.{layer}.{hook}")));
        let outside = ["hook_embed", "hook_pos_embed", "ln_final.hook_normalized"].map(str::to_owned);
        let all = outside.into_iter().chain(in_layers);
        all.filter(|name| self.transformer_lens(name).is_some()).collect()
    }

    /// Resolves a TransformerLens name: `blocks.1.hook_resid_post` is the output of layer 1.
    pub fn transformer_lens(&self, name: &str) -> Option<HookPoint> {
        let point = |module: String, io| Some(HookPoint { module, io });
        match name {
            "hook_embed" => return point(self.embed.clone(), Io::Out),
            "hook_pos_embed" => return point(self.positions.clone()?, Io::Out),
            "ln_final.hook_normalized" => return point(self.final_norm.clone()?, Io::Normed),
            _ => {}
        }
        let (index, hook) = name.strip_prefix("blocks.")?.split_once('.')?;
        let index = index.parse().ok()?;
        let (layer, own) = (self.layer(index), self.of_layer.get(index)?);
        let inside = |module: &str| format!("{layer}.{module}");
        let of = |module: &Option<String>, io| point(inside(module.as_ref()?), io);
        match hook {
            "hook_resid_pre" => point(layer, Io::In),
            "hook_resid_post" => point(layer, Io::Out),
            // Parallel layers have no residual stream between attention and MLP.
            "hook_resid_mid" | "hook_mlp_in" => of(&own.middle, Io::In),
            "hook_attn_out" => point(inside(&own.attention_added), Io::Out),
            "hook_mlp_out" => point(inside(&own.mlp_added), Io::Out),
            "attn.hook_z" => of(&own.attention_out, Io::In),
            "mlp.hook_pre" => of(&own.mlp_in, Io::Out),
            "mlp.hook_pre_linear" => of(&own.mlp_up, Io::Out),
            "mlp.hook_post" => of(&own.mlp_out, Io::In),
            // As in TransformerLens 3: before the norm's weights.
            "ln1.hook_normalized" => of(&own.norm1, Io::Normed),
            "ln2.hook_normalized" => of(&own.norm2, Io::Normed),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        let some = |name: &str| Some(name.to_owned());
        let layer = LayerNames {
            attention_out: some("attn.c_proj"),
            attention_added: "attn".to_owned(),
            mlp_in: some("mlp.c_fc"),
            mlp_up: None,
            mlp_out: some("mlp.c_proj"),
            mlp_added: "mlp".to_owned(),
            norm1: some("ln_1"),
            norm2: some("ln_2"),
            middle: some("ln_2"),
        };
        Names {
            layers: "m.h".to_owned(),
            embed: "m.wte".to_owned(),
            positions: some("m.wpe"),
            final_norm: some("m.ln_f"),
            of_layer: vec![layer; 12],
            aliases: Vec::new(),
        }
    }

    #[test]
    fn transformer_lens_names_map_to_hook_points() {
        let point = |name| names().transformer_lens(name).map(|point| point.to_string());
        assert_eq!(point("blocks.3.hook_resid_post").unwrap(), "m.h.3.out");
        assert_eq!(point("blocks.10.attn.hook_z").unwrap(), "m.h.10.attn.c_proj.in");
        assert_eq!(point("blocks.0.hook_resid_mid").unwrap(), "m.h.0.ln_2.in");
        assert_eq!(point("hook_embed").unwrap(), "m.wte.out");
        assert_eq!(point("m.h.3"), None);
        assert_eq!(point("blocks.x.hook_resid_post"), None);
        assert_eq!(point("blocks.12.hook_resid_post"), None, "there are 12 layers");
        assert_eq!(point("blocks.0.mlp.hook_pre_linear"), None, "the MLP is not gated");
        // Two layers of all names but `mlp.hook_pre_linear`, and three outside the layers.
        assert_eq!(names().transformer_lens_names(2).len(), 2 * (HOOKS.len() - 1) + 3);
    }

    #[test]
    fn layer_of_returns_the_index_in_a_module_path() {
        assert_eq!(names().layer_of("m.h.12.mlp.c_fc"), Some(12));
        assert_eq!(names().layer_of("m.h.7"), Some(7));
        assert_eq!(names().layer_of("m.wte"), None);
    }
}
