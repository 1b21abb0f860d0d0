"""Metrics of a dictionary: reconstruction, sparsity, loss recovered."""
