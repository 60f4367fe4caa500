//! Text from .txt and .jsonl files.
