//! Where a family keeps its parts: Hugging Face's module paths, and TransformerLens's names for the same places.

use crate::model::{HookPoint, Io};

/// Module paths of a family, with `{}` for the number of a layer; those below a layer are relative to it.
#[derive(Debug, Clone)]
pub struct Names {
    /// The list of layers: `gpt_neox.layers`.
    pub layers: &'static str,
    /// Token embedding, a full path.
    pub embed: &'static str,
    /// The last norm, a full path.
    pub final_norm: &'static str,
    /// Attention, in a layer.
    pub attention: &'static str,
    /// The projection of the heads' outputs, in a layer: its input is every head's output side by side.
    pub attention_out: &'static str,
    /// MLP, in a layer.
    pub mlp: &'static str,
    /// The MLP's first projection, in a layer.
    pub mlp_in: &'static str,
    /// The MLP's last projection, in a layer.
    pub mlp_out: &'static str,
    /// The norm before attention, in a layer.
    pub norm1: &'static str,
    /// The norm before the MLP, in a layer.
    pub norm2: &'static str,
    /// Whether attention is added to the residual stream before the MLP reads it.
    pub sequential: bool,
}

/// TransformerLens's names within a layer.
const HOOKS: [&str; 11] = [
    "hook_resid_pre",
    "ln1.hook_normalized",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    "ln2.hook_normalized",
    "mlp.hook_pre",
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
        let rest = module.strip_prefix(self.layers)?.strip_prefix('.')?;
        rest.split('.').next()?.parse().ok()
    }

    /// The TransformerLens names that this family has a point for, layer by layer.
    pub fn transformer_lens_names(&self, n_layers: usize) -> Vec<String> {
        let in_layers = (0..n_layers).flat_map(|layer| HOOKS.iter().map(move |hook| format!("blocks.{layer}.{hook}")));
        let all =
            std::iter::once("hook_embed".to_owned()).chain(in_layers).chain(["ln_final.hook_normalized".to_owned()]);
        all.filter(|name| self.transformer_lens(name).is_some()).collect()
    }

    /// The point that a TransformerLens name means: `blocks.1.hook_resid_post` is the output of layer 1.
    pub fn transformer_lens(&self, name: &str) -> Option<HookPoint> {
        let point = |module: String, io| Some(HookPoint { module, io });
        match name {
            "hook_embed" => return point(self.embed.to_owned(), Io::Out),
            "ln_final.hook_normalized" => return point(self.final_norm.to_owned(), Io::Out),
            _ => {}
        }
        let (index, hook) = name.strip_prefix("blocks.")?.split_once('.')?;
        let layer = self.layer(index.parse().ok()?);
        let inside = |module: &str| format!("{layer}.{module}");
        match hook {
            "hook_resid_pre" => point(layer, Io::In),
            "hook_resid_post" => point(layer, Io::Out),
            // Only where attention is added before the MLP reads is there a stream in the middle.
            "hook_resid_mid" if self.sequential => point(inside(self.norm2), Io::In),
            "hook_attn_out" => point(inside(self.attention), Io::Out),
            "hook_mlp_in" if self.sequential => point(inside(self.norm2), Io::In),
            "hook_mlp_out" => point(inside(self.mlp), Io::Out),
            "attn.hook_z" => point(inside(self.attention_out), Io::In),
            "mlp.hook_pre" => point(inside(self.mlp_in), Io::Out),
            "mlp.hook_post" => point(inside(self.mlp_out), Io::In),
            "ln1.hook_normalized" => point(inside(self.norm1), Io::Out),
            "ln2.hook_normalized" => point(inside(self.norm2), Io::Out),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: Names = Names {
        layers: "m.h",
        embed: "m.wte",
        final_norm: "m.ln_f",
        attention: "attn",
        attention_out: "attn.c_proj",
        mlp: "mlp",
        mlp_in: "mlp.c_fc",
        mlp_out: "mlp.c_proj",
        norm1: "ln_1",
        norm2: "ln_2",
        sequential: true,
    };

    #[test]
    fn transformer_lens_names() {
        let point = |name| NAMES.transformer_lens(name).map(|point| point.to_string());
        assert_eq!(point("blocks.3.hook_resid_post").unwrap(), "m.h.3.out");
        assert_eq!(point("blocks.10.attn.hook_z").unwrap(), "m.h.10.attn.c_proj.in");
        assert_eq!(point("blocks.0.hook_resid_mid").unwrap(), "m.h.0.ln_2.in");
        assert_eq!(point("hook_embed").unwrap(), "m.wte.out");
        assert_eq!(point("m.h.3"), None);
        assert_eq!(point("blocks.x.hook_resid_post"), None);
        // All of them in two layers, and the two outside.
        assert_eq!(NAMES.transformer_lens_names(2).len(), 2 * HOOKS.len() + 2);
    }

    #[test]
    fn layer_of_a_module() {
        assert_eq!(NAMES.layer_of("m.h.12.mlp.c_fc"), Some(12));
        assert_eq!(NAMES.layer_of("m.h.7"), Some(7));
        assert_eq!(NAMES.layer_of("m.wte"), None);
    }
}
