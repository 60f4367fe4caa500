//! A run: one stream of activations, every SAE of the config training on it.
//!
//! | | |
//! | --- | --- |
//! | `start` | whether a run starts anew or goes on, and in which directory (`output_dir`) |
//! | `build` | from a config to what trains; `memory` and `plan` say what that takes |
//! | `train_loop` | the loop: what happens to a batch, and the end of a run |
//! | `batches` | what comes in: the stream, checked and divided by norms |
//! | `trainees` | who learns: each SAE's step, and what becomes of one that is not finite (`skips`) |
//! | `outputs` | what goes out: log, weights, checkpoints (`checkpoint`, written beside training by `saver`), progress |

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
