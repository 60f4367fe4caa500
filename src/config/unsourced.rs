//! Checking an SAE's config before its source is built.

use anyhow::Result;
use dictlearn_core::error::{InputError, Mistakes, Under};
use dictlearn_core::interrupt;
use dictlearn_core::machine::device::Precision;
use dictlearn_core::train::{RunLength, SaeConfig, Training, TrainingCx};
use tch::Device;

/// Widths of placeholder activations, on which SAEs are checked if the source could not be built. Far apart, so that a
/// small `expansion_factor` does not round to no features at both.
const MADE_UP: [i64; 2] = [8, 256];

/// Adapts one SAE's defaults, and adds its mistakes that do not depend on the source. `says` tells if a key is written.
pub fn check_adapted(
    sae: &mut SaeConfig,
    entry: usize,
    (steps, seed): (u64, u64),
    says: &dyn Fn(&str) -> bool,
    mistakes: &mut Mistakes,
) -> Result<()> {
    let says = |field: &str| says(&trainer_field(entry, field));
    sae.trainer.adapt_defaults(&mut RunLength::new(steps, None, &says, None));
    check_without_source(sae, entry, (steps, seed), mistakes)
}

/// Adds one SAE's mistakes that do not depend on the source.
pub fn check_without_source(
    sae: &SaeConfig,
    entry: usize,
    (steps, seed): (u64, u64),
    mistakes: &mut Mistakes,
) -> Result<()> {
    let found = |width: i64| -> Result<Vec<InputError>> {
        interrupt::check()?;
        let cx = TrainingCx {
            widths: (width, width),
            parts: Vec::new(),
            steps,
            seed: sae.seed.unwrap_or(seed),
            device: Device::Cpu,
            precision: Precision::Float32,
        };
        let built = Training::new(sae, &cx).map(drop).under(format_args!("saes[{entry}]"));
        // Other errors may come from the missing source.
        let errors = built.err().and_then(|error| InputError::take(error).ok());
        Ok(errors.map_or_else(Vec::new, InputError::each))
    };
    let [narrow, wide] = MADE_UP;
    let first = found(narrow)?;
    let second = if first.is_empty() { Vec::new() } else { found(wide)? };
    let same = |one: &InputError, other: &InputError| one.message() == other.message() && one.key() == other.key();
    let both = first.into_iter().filter(|one| second.iter().any(|other| same(one, other)));
    both.for_each(|one| mistakes.add(one));
    Ok(())
}

/// Returns the key of a field of an SAE's trainer: `saes[0].trainer.lr`.
pub fn trainer_field(entry: usize, field: &str) -> String {
    format!("saes[{entry}].trainer.{field}")
}
