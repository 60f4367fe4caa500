//! Hook points of a language model, and the tokens that it runs on.

use std::fmt;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// A batch of contexts: B rows of L positions.
#[derive(Debug)]
pub struct Tokens {
    /// Token ids, [B, L], int64.
    pub ids: Tensor,
    /// True at text positions, false at padding, [B, L], bool. Padding may be on either side.
    pub mask: Tensor,
}

impl Tokens {
    /// Returns (B, L).
    pub fn size(&self) -> (i64, i64) {
        self.ids.size2().expect("token ids have two dimensions")
    }

    /// Returns the position of each token among the text of its row, from 0, [B, L], int64. Padding before the text has
    /// -1.
    pub fn text_positions(&self) -> Tensor {
        self.mask.cumsum(1, Kind::Int64) - 1
    }

    /// Returns the text positions except each row's first, [B, L], bool.
    pub fn without_first(&self) -> Tensor {
        let first = self.mask.cumsum(1, Kind::Int64).eq(1).logical_and(&self.mask);
        self.mask.logical_and(&first.logical_not())
    }
}

/// Side of a module that a hook point refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Io {
    /// The input.
    In,
    /// The output.
    Out,
    /// The value inside a norm: normalised, before scale and shift.
    Normed,
}

/// A value inside a model that can be read or replaced.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HookPoint {
    /// Module path in the Hugging Face model: `gpt_neox.layers.1.mlp`.
    pub module: String,
    /// Input, output, or the normalised value inside a norm.
    pub io: Io,
}

impl fmt::Display for HookPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let io = match self.io {
            Io::In => "in",
            Io::Out => "out",
            Io::Normed => "normed",
        };
        write!(f, "{}.{io}", self.module)
    }
}
