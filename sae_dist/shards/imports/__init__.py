"""Stores from activations made elsewhere: npy, safetensors, Parquet or torch files become units, a few rows at a time.

Every row keeps where it came from: `doc` is its number in the source, `pos` and `token` are 0.
"""

from sae_dist.shards.imports.config import ImportConfig
from sae_dist.shards.imports.run_import import import_store

__all__ = ["ImportConfig", "import_store"]
