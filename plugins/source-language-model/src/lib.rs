//! Activations of a language model, through the reference's buffer.
