"""What a run reports while it works: metrics.jsonl has all of it; trackers follow that file and cannot hurt the run."""
