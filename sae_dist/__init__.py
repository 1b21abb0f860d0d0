"""sae_dist: distributed training of sparse autoencoders on language-model activations.

In Python: load, language_model, attach, Store, features, labels, compare, train, run, sweep (docs/python.md).
Importing the package loads none of them.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_dist.api.compare import compare
    from sae_dist.api.jobs import run, sweep, train
    from sae_dist.api.language_model import language_model
    from sae_dist.api.load import load
    from sae_dist.api.store import Store
    from sae_dist.interpret.read_features import features
    from sae_dist.interpret.read_labels import labels
    from sae_dist.steer.attach import attach

__version__ = "0.1.0"
__all__ = ["Store", "attach", "compare", "features", "labels", "language_model", "load", "run", "sweep", "train"]

_HOMES = {
    "load": "api.load",
    "language_model": "api.language_model",
    "compare": "api.compare",
    "run": "api.jobs",
    "Store": "api.store",
    "attach": "steer.attach",
    "features": "interpret.read_features",
    "labels": "interpret.read_labels",
}


class _Callable(ModuleType):
    """A package of ours that is a function of the interface too: sae_dist.train(...), sae_dist.train.loop."""

    def __call__(self, *arguments: Any, **keys: Any) -> Any:
        jobs = importlib.import_module(f"{__name__}.api.jobs")
        return getattr(jobs, self.__name__.rpartition(".")[2])(*arguments, **keys)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        if name in ("train", "sweep") and isinstance(value, ModuleType):  # set by whatever imports the package first
            value.__class__ = _Callable
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in ("train", "sweep"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
