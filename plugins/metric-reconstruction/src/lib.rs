//! How well a dictionary reconstructs activations.
