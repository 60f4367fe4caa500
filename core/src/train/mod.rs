//! Training: trainers, modifiers, losses, gradients and one optimiser step.

pub mod analytic;
mod config;
mod constraint;
mod firing;
mod gradients;
mod modifier;
mod objective;
mod optim;
mod resample;
mod saved_config;
mod schedule;
mod terms;
pub mod top_k;
mod trainer;
mod training;
mod watch;

pub use config::*;
pub use constraint::*;
pub use firing::*;
pub use gradients::*;
pub use modifier::*;
pub use objective::*;
pub use optim::*;
pub use resample::*;
pub use saved_config::*;
pub use schedule::*;
pub use terms::*;
pub use trainer::*;
pub use training::*;
pub use watch::*;
