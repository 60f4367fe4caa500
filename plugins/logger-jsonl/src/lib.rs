//! metrics.jsonl: one JSON object per logged step.
