//! Where a family keeps its parts: Hugging Face's module paths, and TransformerLens's names for the same places.

use super::hook_point::{HookPoint, Io};

/// Module paths of a family; those below a layer are relative to it.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// The list of layers: `gpt_neox.layers`.
    pub layers: String,
    /// Token embedding, a full path.
    pub embed: String,
    /// Learned position embedding, a full path, where there is one.
    pub positions: Option<String>,
    /// The last norm, a full path.
    pub final_norm: String,
    /// The projection of the heads' outputs, in a layer: its input is every head's output side by side.
    pub attention_out: String,
    /// The module whose output attention adds to the residual stream: attention, or a norm after it.
    pub attention_added: String,
    /// The MLP's first projection, in a layer; of a gated MLP the one that is activated. `None` where it is one with
    /// another.
    pub mlp_in: Option<String>,
    /// What a gated MLP's activations are multiplied with.
    pub mlp_up: Option<String>,
    /// The MLP's last projection, in a layer.
    pub mlp_out: String,
    /// The module whose output the MLP adds to the residual stream: the MLP, or a norm after it.
    pub mlp_added: String,
    /// The norm of attention's input, where there is one.
    pub norm1: Option<String>,
    /// The norm of the MLP's input, where there is one.
    pub norm2: Option<String>,
    /// The module that reads the residual stream between attention and MLP; `None` where both read the layer's input.
    pub middle: Option<String>,
}

/// TransformerLens's names within a layer.
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
    /// The path of a layer.
    pub fn layer(&self, index: usize) -> String {
        format!("{}.{index}", self.layers)
    }

    /// The number of the layer that a module is or lies in.
    pub fn layer_of(&self, module: &str) -> Option<usize> {
        let rest = module.strip_prefix(self.layers.as_str())?.strip_prefix('.')?;
        rest.split('.').next()?.parse().ok()
    }

    /// The TransformerLens names that this family has a point for, layer by layer.
    pub fn transformer_lens_names(&self, n_layers: usize) -> Vec<String> {
        let in_layers = (0..n_layers).flat_map(|layer| HOOKS.iter().map(move |hook| format!("blocks.{layer}.{hook}")));
        let outside = ["hook_embed", "hook_pos_embed", "ln_final.hook_normalized"].map(str::to_owned);
        let all = outside.into_iter().chain(in_layers);
        all.filter(|name| self.transformer_lens(name).is_some()).collect()
    }

    /// The point that a TransformerLens name means: `blocks.1.hook_resid_post` is the output of layer 1.
    pub fn transformer_lens(&self, name: &str) -> Option<HookPoint> {
        let point = |module: String, io| Some(HookPoint { module, io });
        match name {
            "hook_embed" => return point(self.embed.clone(), Io::Out),
            "hook_pos_embed" => return point(self.positions.clone()?, Io::Out),
            "ln_final.hook_normalized" => return point(self.final_norm.clone(), Io::Normed),
            _ => {}
        }
        let (index, hook) = name.strip_prefix("blocks.")?.split_once('.')?;
        let layer = self.layer(index.parse().ok()?);
        let inside = |module: &str| format!("{layer}.{module}");
        let of = |module: &Option<String>, io| point(inside(module.as_ref()?), io);
        match hook {
            "hook_resid_pre" => point(layer, Io::In),
            "hook_resid_post" => point(layer, Io::Out),
            // Only where attention is added before the MLP reads is there a stream in the middle.
            "hook_resid_mid" | "hook_mlp_in" => of(&self.middle, Io::In),
            "hook_attn_out" => point(inside(&self.attention_added), Io::Out),
            "hook_mlp_out" => point(inside(&self.mlp_added), Io::Out),
            "attn.hook_z" => point(inside(&self.attention_out), Io::In),
            "mlp.hook_pre" => of(&self.mlp_in, Io::Out),
            "mlp.hook_pre_linear" => of(&self.mlp_up, Io::Out),
            "mlp.hook_post" => point(inside(&self.mlp_out), Io::In),
            // As its release 3 has it, before the norm's weights.
            "ln1.hook_normalized" => of(&self.norm1, Io::Normed),
            "ln2.hook_normalized" => of(&self.norm2, Io::Normed),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        let some = |name: &str| Some(name.to_owned());
        Names {
            layers: "m.h".to_owned(),
            embed: "m.wte".to_owned(),
            positions: some("m.wpe"),
            final_norm: "m.ln_f".to_owned(),
            attention_out: "attn.c_proj".to_owned(),
            attention_added: "attn".to_owned(),
            mlp_in: some("mlp.c_fc"),
            mlp_up: None,
            mlp_out: "mlp.c_proj".to_owned(),
            mlp_added: "mlp".to_owned(),
            norm1: some("ln_1"),
            norm2: some("ln_2"),
            middle: some("ln_2"),
        }
    }

    #[test]
    fn transformer_lens_names() {
        let point = |name| names().transformer_lens(name).map(|point| point.to_string());
        assert_eq!(point("blocks.3.hook_resid_post").unwrap(), "m.h.3.out");
        assert_eq!(point("blocks.10.attn.hook_z").unwrap(), "m.h.10.attn.c_proj.in");
        assert_eq!(point("blocks.0.hook_resid_mid").unwrap(), "m.h.0.ln_2.in");
        assert_eq!(point("hook_embed").unwrap(), "m.wte.out");
        assert_eq!(point("m.h.3"), None);
        assert_eq!(point("blocks.x.hook_resid_post"), None);
        assert_eq!(point("blocks.0.mlp.hook_pre_linear"), None, "the MLP is not gated");
        // All the others in two layers, and three outside.
        assert_eq!(names().transformer_lens_names(2).len(), 2 * (HOOKS.len() - 1) + 3);
    }

    #[test]
    fn layer_of_a_module() {
        assert_eq!(names().layer_of("m.h.12.mlp.c_fc"), Some(12));
        assert_eq!(names().layer_of("m.h.7"), Some(7));
        assert_eq!(names().layer_of("m.wte"), None);
    }
}
