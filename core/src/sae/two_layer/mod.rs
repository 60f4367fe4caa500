//! Dictionaries of two affine maps with an elementwise activation or a selection between them: tiles of pre-activations
//! and lists of entries. The analytic step built on them is in [`crate::train`].

mod activation;
mod block;
mod map;
mod operand;
mod pattern;
pub(crate) mod select;

pub use activation::*;
pub use block::*;
pub(crate) use operand::*;
