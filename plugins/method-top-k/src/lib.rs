//! TopK autoencoder (Gao et al. 2024).
