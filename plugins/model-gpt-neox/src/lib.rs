//! GPT-NeoX language models (Pythia).
