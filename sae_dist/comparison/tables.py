"""A comparison as tables, a row a latent."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sae_dist.comparison.config import Measure
from sae_dist.comparison.correlation import NONE
from sae_dist.comparison.matching import Matches, Nearest
from sae_dist.comparison.splitting import KINDS, Splits

MATCHES = pa.schema(
    [
        ("dictionary", pa.string()), ("latent", pa.int32()), ("firings", pa.int64()), ("other", pa.string()),
        ("match", pa.int32()), ("r", pa.float32()), ("cosine", pa.float32()), ("second", pa.int32()),
        ("second_r", pa.float32()), ("nearest", pa.int32()), ("nearest_cosine", pa.float32()),
        ("nearest_r", pa.float32()), ("second_nearest", pa.int32()), ("second_nearest_cosine", pa.float32()),
        ("novel", pa.bool_()), ("fvu_change_alone", pa.float64()),
    ]
)  # fmt: skip
SPLITS = pa.schema(
    [
        ("smaller", pa.string()), ("larger", pa.string()), ("latent", pa.int32()), ("kind", pa.string()),
        ("children", pa.list_(pa.int32())), ("similarity", pa.list_(pa.float32())),
    ]
)  # fmt: skip
PARTNERS = pa.schema(
    [
        ("dictionary", pa.string()), ("latent", pa.int32()), ("firings", pa.int64()),
        ("partners", pa.list_(pa.int32())), ("r", pa.list_(pa.float32())), ("jaccard", pa.list_(pa.float32())),
        ("cosine", pa.list_(pa.float32())),
    ]
)  # fmt: skip
INPUTS = pa.schema(
    [
        ("earlier", pa.string()), ("later", pa.string()), ("latent", pa.int32()), ("firings", pa.int64()),
        ("rise", pa.float32()), ("carried", pa.float32()), ("by_latents", pa.float32()),
        ("raised_by", pa.list_(pa.int32())), ("supply", pa.list_(pa.float32())), ("weight", pa.list_(pa.float32())),
        ("lowered_by", pa.list_(pa.int32())), ("lowered_supply", pa.list_(pa.float32())),
        ("lowered_weight", pa.list_(pa.float32())), ("heaviest", pa.int32()), ("heaviest_weight", pa.float32()),
        ("together", pa.bool_()),
    ]
)  # fmt: skip


def of_matches(
    names: tuple[str, str], found: Matches, firings: tuple[Tensor, Tensor], *, larger: int, splits: Splits,
    alone: Tensor | None,
) -> pa.Table:  # fmt: skip
    """Latents of both dictionaries. `larger` is which of them is; `alone` is of its latents."""
    parts = []
    for at, own in enumerate(found):
        novel, change = None, None
        if at == larger:
            fires = firings[at] > 0
            novel = pa.array((splits.parent < 0).numpy(), mask=~fires.numpy())
            change = None if alone is None else pa.array(alone.numpy(), mask=~fires.numpy())
        parts.append(_nearest(names[at], names[1 - at], own, firings[at], novel, change))
    return pa.concat_tables(parts)


def _nearest(
    name: str, other: str, own: dict[Measure, Nearest], firings: Tensor, novel: pa.Array | None, change: pa.Array | None
) -> pa.Table:
    n, by_r, by_cosine = len(firings), own["correlation"], own.get("cosine")
    columns = {
        "dictionary": pa.array([name] * n), "latent": np.arange(n, dtype=np.int32), "firings": firings.numpy(),
        "other": pa.array([other] * n), "match": _latents(by_r, 0), "r": _values(by_r.value[:, 0]),
        "cosine": _values(by_r.others[:, 0, 0]), "second": _latents(by_r, 1), "second_r": _values(by_r.value[:, 1]),
        "novel": novel, "fvu_change_alone": change,
    }  # fmt: skip
    if by_cosine is not None:
        columns |= {
            "nearest": _latents(by_cosine, 0), "nearest_cosine": _values(by_cosine.value[:, 0]),
            "nearest_r": _values(by_cosine.others[:, 0, 0]), "second_nearest": _latents(by_cosine, 1),
            "second_nearest_cosine": _values(by_cosine.value[:, 1]),
        }  # fmt: skip
    return _table(columns, MATCHES, n)


def of_splits(smaller: str, larger: str, found: Splits) -> pa.Table:
    """Latents of the smaller dictionary, each with those of the larger that belong to it."""
    n = len(found.kind)
    columns = {
        "smaller": pa.array([smaller] * n), "larger": pa.array([larger] * n), "latent": np.arange(n, dtype=np.int32),
        "kind": pa.array([KINDS[kind] for kind in found.kind.tolist()]),
        "children": _lists(found.start, found.order.int()),
        "similarity": _lists(found.start, found.value[found.order]),
    }  # fmt: skip
    return _table(columns, SPLITS, n)


def of_partners(name: str, found: Nearest, firings: Tensor) -> pa.Table:
    """Latents of one dictionary, each with those that it fires with most."""
    n, there = len(firings), found.latent >= 0
    start = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0))
    columns = {
        "dictionary": pa.array([name] * n), "latent": np.arange(n, dtype=np.int32), "firings": firings.numpy(),
        "partners": _lists(start, found.latent[there].int()), "r": _lists(start, found.value[there]),
        "jaccard": _lists(start, found.others[..., 0][there]), "cosine": _lists(start, found.others[..., 1][there]),
    }  # fmt: skip
    return _table(columns, PARTNERS, n)


def of_inputs(
    names: tuple[str, str], found: Mapping[str, Tensor], supplied: Mapping[str, Tensor], firings: Tensor
) -> pa.Table:
    """Latents of the later dictionary, each with those of the earlier that feed it (virtual_weights.py)."""
    n, silent = len(firings), (firings == 0).numpy()
    columns: dict[str, pa.Array | np.ndarray | None] = {
        "earlier": pa.array([names[0]] * n), "later": pa.array([names[1]] * n),
        "latent": np.arange(n, dtype=np.int32), "firings": firings.numpy(),
    }  # fmt: skip
    columns |= {name: pa.array(each.numpy(), mask=silent) for name, each in supplied.items()}
    for name, each in found.items():
        if each.dim() == 1:
            columns[name] = pa.array(each.numpy(), mask=silent)
    for latents, *figures in (("raised_by", "supply", "weight"), ("lowered_by", "lowered_supply", "lowered_weight")):
        there = found[latents] >= 0
        start = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0))
        columns |= {name: _lists(start, found[name][there]) for name in (latents, *figures)}
    return _table(columns, INPUTS, n)


def _table(columns: dict[str, pa.Array | np.ndarray | None], schema: pa.Schema, n: int) -> pa.Table:
    """Columns that are None or missing hold nulls."""
    arrays = []
    for field in schema:
        column = columns.get(field.name)
        array = pa.nulls(n) if column is None else pa.array(column)
        arrays.append(array.cast(field.type))
    return pa.table(arrays, schema=schema)


def _latents(found: Nearest, at: int) -> pa.Array:
    latents = found.latent[:, at].int().numpy()
    return pa.array(latents, mask=latents < 0)


def _values(values: Tensor) -> pa.Array:
    """Null where there is none."""
    return pa.array(values.numpy(), mask=((values == NONE) | values.isnan()).numpy())


def _lists(start: Tensor, values: Tensor) -> pa.ListArray:
    return pa.ListArray.from_arrays(start.int().numpy(), values.contiguous().numpy())


def together(parts: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *parts]).combine_chunks()
