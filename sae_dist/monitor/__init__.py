"""What a run says while it works: metrics.jsonl is the truth, trackers follow it and cannot hurt."""
