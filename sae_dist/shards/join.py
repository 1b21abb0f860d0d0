"""Joins stores of the same tokens, once their rows have been compared."""

from collections.abc import Mapping

from sae_dist import config
from sae_dist.config import UserError
from sae_dist.progress import logged
from sae_dist.shards import format, records, writer
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.joined import PARTS, PREFIX, JoinedStore, digests
from sae_dist.shards.reader import Store
from sae_dist.storage import Storage

LAYOUT = ("n_units", "unit_rows", "heldout_units", "slice_rows", "dtype")


def join(storage: Storage, parts: Mapping[str, Store]) -> Store:
    """Joins finished stores under `storage`: each is a part by its name there. Repeat it when parts have moved.

    UserError where rows do not correspond: by their number, or by the tokens of the last slice of a unit.
    """
    _check_names(parts)
    meta = _meta(parts)
    if storage.exists("store.json") and records.read(storage, "store.json", storage.uri).get("name") != meta.digest:
        raise UserError(f"store={storage.uri} holds something else; choose another place for the join")
    for name, part in parts.items():
        there = part.committed()
        if missing := [unit for unit in range(meta.n_units) if unit not in there]:
            raise UserError(
                f"parts.{name}={part.storage.uri} lacks {len(missing)} of its {meta.n_units} units (unit {missing[0]} "
                "first); join stores once they are harvested"
            )
    _compare(JoinedStore(storage, meta, parts))
    # where the parts are comes first: a store.json that names parts is never without
    storage.write(PARTS, records.seal({"uris": {name: part.storage.uri for name, part in parts.items()}}))
    return writer.create(storage, meta)


def _compare(store: JoinedStore) -> None:
    """CorruptData or UserError where units differ in their rows; of each unit the last slice is read.

    Rows lie in an order that depends on their number in the unit: where a row is left out, most others have moved.
    """
    hooks = [f"{name}.{next(iter(part.meta.hooks))}" for name, part in store.parts.items()]
    for unit, commit in logged(store.committed().items(), "compared", store.meta.n_units):
        if slices := commit.shards[hooks[0]].slices:
            store.read_slices(hooks, unit, len(slices) - 1)


def _check_names(parts: Mapping[str, Store]) -> None:
    if len(parts) < 2:
        raise UserError(
            f"parts names {len(parts)} stores; join two or more: 'parts={{base: stores/a, chat: stores/b}}'"
        )
    for name, part in parts.items():
        format.checked_name(name, "parts")
        if "." in name:
            raise UserError(f"parts.{name}: a part's name has no dot, since hook points are called PART.HOOK")
        if digests(part.meta):
            raise UserError(f"parts.{name}={part.storage.uri} is a join itself; name the stores that it joins")


def _meta(parts: Mapping[str, Store]) -> StoreMeta:
    """What a join of `parts` holds; UserError where their layouts differ, so that rows cannot correspond."""
    metas = {name: part.meta for name, part in parts.items()}
    (first, one), *others = metas.items()
    for name, meta in others:
        for key in LAYOUT:
            here, there = getattr(one, key), getattr(meta, key)
            if here != there:
                raise UserError(
                    f"parts.{first} has {key}={here} and parts.{name} has {key}={there}; rows correspond only where "
                    "both were harvested from the same text with the same harvest.* settings"
                )

    def common(key: str) -> str:
        values = {getattr(meta, key) for meta in metas.values()}
        return values.pop() if len(values) == 1 else ""

    return StoreMeta(
        model=" + ".join(f"{name}: {meta.model}" for name, meta in metas.items()),
        model_fingerprint=config.digest({name: meta.model_fingerprint for name, meta in metas.items()})[:32],
        hooks={f"{name}.{hook}": width for name, meta in metas.items() for hook, width in meta.hooks.items()},
        n_units=one.n_units, unit_rows=one.unit_rows, heldout_units=one.heldout_units, slice_rows=one.slice_rows,
        dtype=one.dtype, tokenizer=common("tokenizer"), text_fingerprint=common("text_fingerprint"),
        context=one.context, seed=one.seed, row_policy=one.row_policy,
        extra={f"{PREFIX}{name}": meta.digest for name, meta in metas.items()},
    )  # fmt: skip
