//! The bundled language model and its text: a small GPT-NeoX trained by `examples/train_tiny_lm` on five novels by Jane
//! Austen, with *Persuasion* held out. `model/README.md` reports the measured losses.

use dictlearn_core::data::text::EmbeddedText;
use dictlearn_core::lm::EmbeddedModel;

const NAME: &str = "austen";

inventory::submit! {
    EmbeddedModel {
        name: NAME,
        files: &[
            ("config.json", include_bytes!("../model/config.json")),
            ("model.safetensors", include_bytes!("../model/model.safetensors")),
            ("tokenizer.json", include_bytes!("../model/tokenizer.json")),
            ("tokenizer_config.json", include_bytes!("../model/tokenizer_config.json")),
        ],
    }
}

inventory::submit! {
    EmbeddedText { name: NAME, split: "train", text: include_str!("../text/train.txt") }
}

inventory::submit! {
    EmbeddedText { name: NAME, split: "held_out", text: include_str!("../text/held_out.txt") }
}
