//! Activations from .safetensors, .npy and .npz files.
