//! Files on disk, read safely and written atomically.
//!
//! [`open`] opens every file and recognises Git LFS pointers. Lengths that a file claims are checked against its size
//! before anything is allocated.

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
