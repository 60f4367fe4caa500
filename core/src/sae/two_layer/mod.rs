//! Two affine maps with something between them that looks at one number at a time: the weights, what lies between, tiles of
//! pre-activations and lists of entries. The step that is made of them is in [`crate::train`].

mod activation;
mod block;
mod map;
mod operand;
mod pattern;
pub(crate) mod select;

pub use activation::*;
pub use block::*;
pub(crate) use operand::*;
