"""What a run says while it works: metrics.jsonl is the truth, trackers are mirrors that cannot hurt."""
