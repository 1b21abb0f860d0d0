"""Joins text, model and shards: activations of a language model into a store."""
