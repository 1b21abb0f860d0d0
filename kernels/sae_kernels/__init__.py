"""Sparse encoder and decoder operations; `reference` is the specification of every one."""
