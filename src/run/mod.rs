//! A run: one stream of activations, every SAE of the config training on it.
//!
//! | | |
//! | --- | --- |
//! | `start` | starts or resumes a run in its directory (`output_dir`) |
//! | `build` | builds a run from a config; `memory` and `plan` report what it needs |
//! | `train_loop` | the loop over batches, and the end of a run |
//! | `batches` | input: the stream, checked and divided by norms |
//! | `trainees` | the SAEs: their steps, and the handling of non-finite ones (`skips`) |
//! | `outputs` | output: log, weights, checkpoints (`checkpoint`, written in the background by `saver`), progress |

mod batches;
mod build;
pub mod checkpoint;
pub mod compare;
pub mod evaluate;
pub mod harvest;
mod memory;
mod output_dir;
mod outputs;
mod plan;
mod saver;
mod skips;
mod start;
mod train_loop;
mod trainees;

pub use plan::plan;
pub use start::train;
pub use train_loop::Ending;
pub use trainees::stopped_error;
