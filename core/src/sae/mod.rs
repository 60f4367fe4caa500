//! Dictionaries: encode activations as features, decode them, and save and load their weights.

mod adapted;
mod affine;
mod code;
mod dictionary;
mod init;
pub mod saved;
mod selection;
pub mod two_layer;
mod weight;

pub use adapted::*;
pub use affine::*;
pub use code::*;
pub use dictionary::*;
pub use init::*;
pub use selection::*;
pub use weight::*;
