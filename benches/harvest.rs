//! Measures the speed of harvesting: `cargo bench --bench harvest -- MODEL SUBMODULE PRECISION`.
//!
//! MODEL is a folder or a Hub name, PRECISION is float32 or bfloat16. Each pass of the source runs 64 contexts of 128
//! tokens of the embedded novels. After one warm-up pass, ten passes are timed; the output is their best and median
//! speed in activations per second. `benches/harvest.py` measures the same in Python.

use std::time::Instant;

use anyhow::{Result, bail};
use dictlearn_core::data::SourceCx;
use dictlearn_core::data::TaggedSource;
use dictlearn_core::machine::device::Precision;
use serde_json::json;

// Links the plugins.
use dictlearn as _;
use dictlearn_process as _;

const PASSES: usize = 10;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let [model, submodule, precision] = &args[..] else { bail!("usage: harvest MODEL SUBMODULE PRECISION") };
    let precision = match precision.as_str() {
        "float32" => Precision::Float32,
        "bfloat16" => Precision::BFloat16,
        other => bail!("unknown precision {other}: use float32 or bfloat16"),
    };
    let config: Box<dyn TaggedSource> = serde_json::from_value(json!({
        "type": "language_model",
        "model": model,
        "submodule": submodule,
        "text": {"type": "embedded", "name": "austen"},
        "pack": true,
        "ctx_len": 128,
        "refresh_batch_size": 64,
        "out_batch_size": 64 * 128,
        "shuffle": false,
    }))?;
    let mut source = config.build(&SourceCx { precision, ..SourceCx::default() })?;
    let mut speeds = Vec::new();
    for pass in 0..=PASSES {
        let start = Instant::now();
        let Some(batch) = source.next_batch()? else { bail!("the text is too short") };
        let rows = batch.sites[0].x.size()[0];
        if pass > 0 {
            speeds.push(rows as f64 / start.elapsed().as_secs_f64());
        }
    }
    speeds.sort_by(f64::total_cmp);
    println!("{precision}: best {:.0}, median {:.0} activations per second", speeds[PASSES - 1], speeds[PASSES / 2]);
    Ok(())
}
