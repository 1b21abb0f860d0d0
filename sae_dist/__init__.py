"""sae_dist: distributed training of sparse autoencoders on language-model activations."""

import importlib
from typing import Any

__version__ = "0.1.0"
_LAZY = {"attach": "sae_dist.steer.attach"}  # where it is; loaded when asked for, since torch takes seconds


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
