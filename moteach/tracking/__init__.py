"""Where the numbers of a run go. JSONL and parquet are the source of truth; the rest are views."""
