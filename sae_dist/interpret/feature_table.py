"""Latents as rows of a table (docs/features.md is its specification)."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from sae_dist.interpret.collect import Collected
from sae_dist.interpret.contexts import Contexts, Intervals, Shading
from sae_dist.interpret.logit_effect import LogitEffects
from sae_dist.interpret.records import ContextText

CONTEXT = pa.struct(
    [
        ("interval", pa.int16()), ("value", pa.float32()), ("doc", pa.uint64()), ("pos", pa.int32()),
        ("category", pa.int16()), ("at", pa.int16()), ("tokens", pa.list_(pa.int32())),
        ("active", pa.list_(pa.int16())), ("activation", pa.list_(pa.float32())),
    ]
)  # fmt: skip
SCHEMA = pa.schema(
    [
        ("latent", pa.int32()), ("firings", pa.int64()), ("density", pa.float64()), ("mean", pa.float64()),
        ("std", pa.float64()), ("max", pa.float32()), ("histogram_end", pa.float64()),
        ("histogram", pa.list_(pa.int64())), ("interval_edges", pa.list_(pa.float32())),
        ("interval_firings", pa.list_(pa.int64())), ("category_firings", pa.list_(pa.int64())),
        ("category_share", pa.list_(pa.float64())), ("fires_on", pa.list_(pa.int32())),
        ("promoted", pa.list_(pa.int32())), ("promoted_by", pa.list_(pa.float32())),
        ("suppressed", pa.list_(pa.int32())), ("suppressed_by", pa.list_(pa.float32())),
        ("contexts", pa.list_(CONTEXT)),
    ]
)  # fmt: skip


def table(
    first: int,
    *,
    rows: int,
    squares: torch.Tensor,
    category_firings: torch.Tensor,
    category_share: torch.Tensor,
    collected: Collected,
    intervals: Intervals,
    contexts: Contexts,
    shading: Shading,
    text: ContextText,
    fires_on: Sequence[Sequence[int]],
    effects: LogitEffects,
) -> pa.Table:
    """The rows of latents from `first` on; `collected` and the rest number them from 0.

    rows: of the whole stream. squares [n]: the sum of squared activations. category_firings, category_share
    [n, n_categories]: of all categories of the stream.
    """
    fired = collected.firings.clamp(min=1)
    mean = collected.total / fired
    end = torch.where(collected.firings > 0, collected.exponent.double().exp2(), 0.0)
    columns = {
        "latent": np.arange(first, first + len(fired), dtype=np.int32),
        "firings": collected.firings.numpy(),
        "density": (collected.firings / max(rows, 1)).double().numpy(),
        "mean": mean.numpy(),
        "std": (squares / fired - mean**2).clamp(min=0).sqrt().numpy(),
        "max": collected.maximum.numpy(),
        "histogram_end": end.numpy(),
        "histogram": _rows(collected.histogram),
        "interval_edges": _rows(intervals.edges),
        "interval_firings": _rows(intervals.firings),
        "category_firings": _rows(category_firings),
        "category_share": _rows(category_share),
        "fires_on": pa.array(fires_on, pa.list_(pa.int32())),
        "promoted": _rows(effects.promoted.int()),
        "promoted_by": _rows(effects.promoted_by),
        "suppressed": _rows(effects.suppressed.int()),
        "suppressed_by": _rows(effects.suppressed_by),
        "contexts": _contexts(contexts, shading, text, len(fired)),
    }
    return pa.table([pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names], schema=SCHEMA)


def _rows(values: torch.Tensor) -> pa.ListArray:
    """A matrix as a list a row."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, values.contiguous().flatten().numpy())


def _lists(start: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(start.astype(np.int32), pa.array(values, kind))


def _contexts(contexts: Contexts, shading: Shading, text: ContextText, n_latents: int) -> pa.ListArray:
    """The contexts of every latent; neighbours that are not among the tokens shown are left out."""
    owner = np.repeat(np.arange(len(text.at)), shading.start.diff().numpy())
    at = shading.offset.numpy() + text.at[owner]
    inside = (at >= 0) & (at < np.diff(text.start)[owner])
    start = np.searchsorted(owner[inside], np.arange(len(text.at) + 1))
    fields = [
        contexts.interval.numpy(), contexts.value.numpy(), contexts.doc.numpy().view(np.uint64), contexts.pos.numpy(),
        text.category, text.at, _lists(text.start, text.tokens, pa.int32()), _lists(start, at[inside], pa.int16()),
        _lists(start, shading.value.numpy()[inside], pa.float32()),
    ]  # fmt: skip
    arrays = [each if isinstance(each, pa.Array) else pa.array(each) for each in fields]
    whole = pa.StructArray.from_arrays(
        [array.cast(kind.type) for array, kind in zip(arrays, CONTEXT, strict=True)], fields=list(CONTEXT)
    )
    first = np.searchsorted(contexts.slot.numpy(), np.arange(n_latents + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(first, whole)
