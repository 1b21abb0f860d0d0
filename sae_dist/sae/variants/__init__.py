"""The kinds of dictionary, a file each: a frozen configuration and elementwise mathematics on (row, latent) pairs.

`interface.py` says what a kind defines; `sae.config.SAEConfig` is the union of them. No other code names a kind.
"""
