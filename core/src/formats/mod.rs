//! Imports published SAEs and exports ours in the formats of other libraries.

mod affine;
mod format;
mod import;
mod place;
mod published;
mod site;

pub use affine::*;
pub use format::*;
pub use import::*;
pub use place::*;
pub use published::*;
pub use site::*;
