"""`sae_dist.compare`: the command of this name as a function."""

from os import PathLike
from pathlib import Path
from typing import Any

from sae_dist.comparison.compare import Comparison
from sae_dist.comparison.config import CompareConfig
from sae_dist.config import load
from sae_dist.sae.module import DictionaryModule
from sae_dist.service.compare_job import compare_dictionaries, found_at


def compare(
    *dictionaries: str | PathLike[str] | DictionaryModule, out: str | PathLike[str] | None = None, **keys: Any
) -> Comparison:
    """What dictionaries share: `figures`, and tables: `matches`, `splits`, `inputs`, `partners` (docs/compare.md).

    Each is a place that `sae_dist.load` takes, what it has loaded, "neurons" or "neurons:HOOK". Keys are those of
    `sae-dist compare`: store=, tokens=, match=, level=, ... With `out`, the page and its data are written there.
    UserError for what you can cure.
    """
    config = load(CompareConfig, {key: str(value) if key == "store" else value for key, value in keys.items()})
    named = [
        (f"dictionary {number}", each.dictionary) if isinstance(each, DictionaryModule) else found_at(str(each))
        for number, each in enumerate(dictionaries, 1)
    ]
    return compare_dictionaries(named, config, out=None if out is None else Path(out))
