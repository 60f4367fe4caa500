//! Trains an SAE on activations of the bundled language model, without YAML: `cargo run --release --example train_in_code`

use dictlearn::plugins::method_top_k::{TopKConfig, TopKDictionaryConfig};
use dictlearn::{Batches, Result, Sae, Trainer};

const STEPS: u64 = 200;

fn main() -> Result<()> {
    let dir = std::env::args().nth(1).unwrap_or_else(|| "runs/train_in_code".to_owned());
    // Any loop over tensors [B, d] will do; this source runs a language model.
    let source = "{type: language_model, model: embedded:austen, submodule: gpt_neox.layers.2, \
                  text: {type: embedded, name: austen}, n_ctxs: 500, out_batch_size: 1024}";
    let batches = Batches::from_yaml(source)?;
    let width = batches.sites()[0].activation_dim;

    let dictionary = TopKDictionaryConfig { k: 32, dict_size: None, expansion_factor: Some(4.0) };
    let trainer = TopKConfig { lr: Some(2e-3), warmup_steps: 20, ..Default::default() };
    let mut trainer = Trainer::builder(dictionary, trainer).steps(STEPS).build(width)?;
    for (step, batch) in (1..=STEPS).zip(batches) {
        let x = &batch?.sites[0].x;
        if step % 50 == 0 {
            let stats = trainer.step_with_stats(x)?;
            println!("step {step}: loss {:.4}, {:.1}% explained", stats.loss(), 100.0 * stats.explained());
        } else {
            trainer.step(x)?;
        }
    }
    trainer.save(&dir)?;
    println!("{:?} in {dir}", Sae::load(&dir)?);
    Ok(())
}
