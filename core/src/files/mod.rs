//! Bytes on disk, read safely and written whole or not at all.
//!
//! Every file is opened by [`open`], which recognises a Git LFS pointer, and lengths that a file claims are compared with its own
//! size before anything is allocated.

mod disk;
mod node;
pub mod numpy;
mod path;
pub mod state;
pub mod tensors;
pub mod torch_file;
pub mod yaml;

pub use disk::*;
pub use node::*;
pub use path::*;
