"""Ray: processes and failures, no mathematics."""
