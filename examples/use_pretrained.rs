//! A published SAE in a program: `cargo run --release --example use_pretrained -- sae_lens gpt2-small-res-jb:blocks.8.hook_resid_pre`
//!
//! Instead of a release, a folder or `owner/name/path` on the Hub will do; what is in the Hub's cache needs no network.

use anyhow::Context;
use dictlearn as _; // Links the plugins in.
use dictlearn_core::formats;
use dictlearn_core::machine::device;
use tch::{Kind, Tensor, kind};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [format, place] = &arguments[..] else { anyhow::bail!("usage: use_pretrained FORMAT PLACE") };
    let sae = formats::load(format, place, device::best()).with_context(|| format!("cannot load {place}"))?;
    let x = Tensor::randn([4, sae.dims().input], kind::FLOAT_CPU).to_device(sae.device()); // Activations [N, d].
    let features = sae.encode(&x); // [N, F]
    let x_hat = sae.reconstruction(&features, &x); // [N, d_out]; `decode` where nothing stands before the SAE
    println!("{}, {:?}", sae.class(), sae.dims());
    println!(
        "active features: {:?}",
        Vec::<i64>::try_from(features.not_equal(0.0).sum_dim_intlist(1, false, Kind::Int64))?
    );
    println!("squared error: {:.4}", (x_hat - x).square().mean(Kind::Float).double_value(&[]));
    Ok(())
}
