//! Dictionaries: encoding activations as features, decoding them, and what is saved of them.

mod adapted;
mod autoencoder;
mod code;
mod dictionary;
mod init;
pub mod saved;
mod selection;
pub mod two_layer;

pub use adapted::*;
pub use autoencoder::*;
pub use code::*;
pub use dictionary::*;
pub use init::*;
pub use selection::*;
