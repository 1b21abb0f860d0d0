"""Metrics by name. One that cannot be measured is null, and `not_measured` has the reason."""

import math
from collections.abc import Mapping
from typing import Any

Metrics = dict[str, Any]

RECONSTRUCTION = ("tokens", "fvu", "l0", "dead_fraction", "cosine", "density_quantiles")
LOSS = (
    "ce_tokens", "ce_clean", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated",
    "loss_recovered", "loss_recovered_mean",
)  # fmt: skip


def measured(found: Metrics, why: Mapping[str, str]) -> Metrics:
    """`found` with null in place of values that are not finite, and a reason for each."""
    missing = {
        name
        for name, value in found.items()
        if value is None or (isinstance(value, float) and not math.isfinite(value))
    }
    reasons = {name: why.get(name, "it is not finite") for name in found if name in missing}
    return {name: None if name in missing else value for name, value in found.items()} | {"not_measured": reasons}


def unmeasured(names: tuple[str, ...], why: str) -> Metrics:
    """All of them null, for one reason."""
    return measured(dict.fromkeys(names), dict.fromkeys(names, why))


def merged(*parts: Metrics) -> Metrics:
    """Merges metrics; later parts win. Keeps the reasons of those that are null."""
    all_ = {name: value for part in parts for name, value in part.items()}
    reasons = {
        name: why for part in parts for name, why in part.get("not_measured", {}).items() if all_.get(name) is None
    }
    return all_ | {"not_measured": reasons}


UNMEASURED = merged(unmeasured(RECONSTRUCTION, "not judged yet"), unmeasured(LOSS, "there is no language model to run"))
