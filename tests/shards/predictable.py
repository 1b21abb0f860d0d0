"""A model whose activations are known, f(document, position, layer): any row read anywhere can be recomputed."""

import numpy as np
import torch

from sae_dist.shards import permutation, stores, writer
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.reader import Store

WIDTH = 16
LAYERS = {"resid_post.1": 1, "resid_post.2": 2}


def activation(doc: np.ndarray, pos: np.ndarray, layer: int, width: int = WIDTH) -> torch.Tensor:
    """Integers in [-127, 127] with a 127 in every row: bfloat16 and int8 (then of scale 1) hold them exactly."""
    word = (doc.astype(np.uint64) << np.uint64(24)) ^ pos.astype(np.uint64) ^ (np.uint64(layer) << np.uint64(56))
    column = permutation.mix64(np.arange(width, dtype=np.uint64))
    bits = permutation.mix64(word[:, None] ^ column[None, :])
    values = (bits % np.uint64(255)).astype(np.float32) - 127
    values[:, 0] = 127
    return torch.from_numpy(values)


def meta(**changes: object) -> StoreMeta:
    settings = dict(
        model="predictable",
        hooks=dict.fromkeys(LAYERS, WIDTH),
        n_units=6,
        heldout_units=1,
        unit_rows=96,
        slice_rows=20,
        seed=3,
    )
    return StoreMeta(**(settings | changes))


def rows_of(unit: int, n: int) -> dict[str, np.ndarray]:
    """Documents of 12 tokens; no two units share one."""
    index = np.arange(n)
    return {"doc": 1000 * unit + index // 12, "pos": index % 12, "token": index % 7}


def write(store: Store, unit: int, n: int | None = None) -> writer.WrittenUnit:
    rows = rows_of(unit, store.meta.unit_rows if n is None else n)
    x = {hook: activation(rows["doc"], rows["pos"], LAYERS[hook], width) for hook, width in store.meta.hooks.items()}
    return writer.write_unit_once(store, unit, x, **rows)


def filled(storage, **changes: object) -> Store:
    store = writer.create(storage, meta(**changes))
    for unit in range(store.meta.n_units):
        write(store, unit, store.meta.unit_rows - 7 * unit)  # units of different sizes: the hard case of the order
    return stores.open(storage)


def is_true(hook: str, x: torch.Tensor, doc: np.ndarray, pos: np.ndarray) -> bool:
    return torch.equal(x.float(), activation(doc, pos, LAYERS[hook], x.shape[1]))
