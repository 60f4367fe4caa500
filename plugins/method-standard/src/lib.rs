//! ReLU autoencoder with an L1 penalty (Bricken et al. 2023).
