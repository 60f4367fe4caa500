//! Metrics and loggers.

mod logger;
mod metric;

pub use logger::*;
pub use metric::*;
