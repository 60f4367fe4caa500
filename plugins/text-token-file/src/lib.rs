//! Token ids from a .safetensors file, instead of text.
