"""Joins shards and sae: batches into a dictionary."""
