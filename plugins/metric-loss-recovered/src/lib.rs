//! How much of the language model's loss survives the reconstruction.
