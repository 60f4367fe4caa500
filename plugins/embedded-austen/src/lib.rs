//! The bundled language model and its text: Jane Austen.
