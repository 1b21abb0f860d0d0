"""Latents of feature data as the JSON values that the pages read: those of records.py, from rows of Parquet."""

import base64
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from sae_dist.interpret.records import CATEGORIES, rounded, token_dtype

LEAST_END = 2.0**-126  # of the histogram of a latent that never fired


def latent_record(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The record of a row of feature data, and the tokens that it numbers: tokens are places among these.

    The nearest decoder directions are not in feature data: `similar` is null.
    """
    contexts = row["contexts"]
    shown = list(chain.from_iterable(one["tokens"] for one in contexts))
    used = np.unique(np.array([*shown, *row["promoted"], *row["suppressed"]], np.int64))
    places = {token: place for place, token in enumerate(used.tolist())}
    share = np.array(row["category_share"])
    order = np.argsort(-share, kind="stable")[:CATEGORIES].tolist()
    text = np.array([places[token] for token in shown], token_dtype(used))
    record = {
        "id": row["latent"],
        "contexts": [_context(one) for one in contexts],
        "text": base64.b64encode(text.tobytes()).decode(),
        "intervals": [brief(row["interval_edges"]), row["interval_firings"]],
        "histogram": [row["histogram_end"] or LEAST_END, row["histogram"]],
        "promoted": [[places[token] for token in row["promoted"]], brief(row["promoted_by"])],
        "suppressed": [[places[token] for token in row["suppressed"]], brief(row["suppressed_by"])],
        "similar": None,
        "categories": [[c, round(float(share[c]), 4), row["category_firings"][c]] for c in order if share[c] > 0],
    }
    return record, used.tolist()


def _context(one: Mapping[str, Any]) -> list[Any]:
    active = [x for pair in zip(one["active"], brief(one["activation"]), strict=True) for x in pair]
    return [one["interval"], *brief([one["value"]]), one["category"], len(one["tokens"]), one["at"], active]


def brief(values: Sequence[float]) -> list[float]:
    """Numbers with few digits, as all pages show them."""
    return rounded(torch.tensor(values, dtype=torch.float64)).tolist()
