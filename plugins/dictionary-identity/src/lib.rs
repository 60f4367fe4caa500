//! The identity dictionary, a baseline.
