"""The kinds of dictionary, a file each: a frozen configuration and elementwise mathematics on (row, latent) pairs.

`interface.py` says what a kind gives; `sae.config.SAEConfig` is the union of them. Nothing else knows one by name.
"""
