//! Uses a published SAE: `cargo run --release --example use_pretrained -- sae_lens:gpt2-small-res-jb:blocks.8.hook_resid_pre`

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let place = std::env::args().nth(1).ok_or("usage: use_pretrained FORMAT:NAME | FOLDER")?;
    let sae = dictlearn::Sae::load(place)?;
    let x = tch::Tensor::randn([4, sae.dims().input], tch::kind::FLOAT_CPU); // activations [N, d]
    let features = sae.encode(&x)?; // [N, F]
    let error = (sae.reconstruct(&x)?.to_device(tch::Device::Cpu) - x).square().mean(tch::Kind::Float);
    println!("{sae:?}");
    println!("active features: {:.1}", features.not_equal(0.0).sum(tch::Kind::Float).double_value(&[]) / 4.0);
    println!("squared error: {:.4}", error.double_value(&[]));
    Ok(())
}
