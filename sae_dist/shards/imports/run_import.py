"""Imports activations: creates the store of a source and writes every unit that is missing."""

import logging

import numpy as np
import torch

from sae_dist import config
from sae_dist.progress import logged
from sae_dist.shards import writer
from sae_dist.shards.format import DType, StoreMeta
from sae_dist.shards.imports.config import ImportConfig
from sae_dist.shards.imports.outliers import NormBound, norm_bound
from sae_dist.shards.imports.sources import Source
from sae_dist.shards.imports.unit_plan import ImportPlan, row_numbers
from sae_dist.shards.reader import Store
from sae_dist.storage import Storage

logger = logging.getLogger(__name__)
STORED: dict[torch.dtype, DType] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def import_store(storage: Storage, settings: ImportConfig) -> Store:
    """Imports the rows at `settings.path` and returns their store; run it again to resume.

    UserError when the source was changed meanwhile.
    """
    source = Source(settings.path, settings.key)
    plan = ImportPlan(
        source.rows, unit_rows=settings.unit_rows, heldout_fraction=settings.heldout_fraction, seed=settings.seed
    )
    meta = _meta(source, plan, settings)
    kept = norm_bound(source, settings)
    store = writer.create(storage, meta)
    todo = [unit for unit in range(plan.units) if store.commit(unit) is None]
    left_out = sum(
        _write_unit(store, unit, source, plan.ranges(unit), kept, settings)
        for unit in logged(todo, "imported", len(todo))
    )
    if left_out:
        logger.warning(
            "%d rows are longer than max_norm_ratio=%g times the median norm and are left out (null keeps all)",
            left_out, settings.max_norm_ratio,
        )  # fmt: skip
    return store


def _write_unit(
    store: Store, unit: int, source: Source, ranges: list[tuple[int, int]], kept: NormBound, settings: ImportConfig
) -> int:
    """Writes and commits the unit; returns how many of its rows were left out as too long."""
    x, doc = source.read(ranges), row_numbers(ranges)
    keeps = kept.keeps(x)
    too_long = int((~keeps).sum())
    if too_long:
        x, doc = x[keeps], doc[keeps.numpy()]
    zeros = np.zeros(len(doc), np.uint32)
    source.check_unchanged()
    writer.write_unit(
        store, unit, {settings.hook: x}, doc=doc, pos=zeros, token=zeros, max_nonfinite=settings.max_nonfinite,
        left_out=too_long,
    )  # fmt: skip
    return too_long


def _meta(source: Source, plan: ImportPlan, settings: ImportConfig) -> StoreMeta:
    values = dict(
        model=settings.model,
        hooks={settings.hook: source.width},
        n_units=plan.units,
        unit_rows=plan.unit_rows,
        heldout_units=plan.heldout_units,
        slice_rows=settings.slice_rows or min(8192, -(-plan.unit_rows // 8)),
        dtype=STORED.get(source.dtype, "float32") if settings.dtype == "auto" else settings.dtype,
        text_fingerprint=source.fingerprint(),
        seed=settings.seed,
        extra={
            "imported_rows": str(source.rows),
            "imported_from": ", ".join(file.name for file in source.files[:8]),
            "heldout_fraction": f"{settings.heldout_fraction}",
            "max_norm_ratio": f"{settings.max_norm_ratio}",
        },
    )
    return config.load(StoreMeta, values)
