"""The kinds of dictionary, a file each: a frozen configuration and elementwise mathematics on (row, latent) pairs.

`interface.py` says what a kind defines, `keys.py` has the keys that several have; `sae.config.SAEConfig` is the union
of all kinds. No other code names one.
"""
