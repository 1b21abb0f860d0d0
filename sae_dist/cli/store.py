"""List, check, clean, import and copy activation stores.

sae-dist store ls      store=S            what it holds
sae-dist store stats   store=S            norms, variance and outliers of every hook point
sae-dist store verify  store=S            read every byte against its checksum; withdraw=true has bad units made again
sae-dist store gc      store=S            objects that no commit names; delete=true deletes them
sae-dist store import  path=X store=S     a store of activations made elsewhere
sae-dist store copy    store=S to=T       between folders and s3://, resumable and verified
sae-dist store join    store=S 'parts={base: A, chat: B}'   one store over several of the same tokens
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, assert_never

from pydantic import Field
from rich.console import Console
from rich.table import Table

from sae_dist import storage
from sae_dist.config import UserError, frozen, load
from sae_dist.exit_codes import BAD_INPUT
from sae_dist.service.display import quantity
from sae_dist.shards import copy as copying
from sae_dist.shards import gc, imports, stores, summary, verify
from sae_dist.shards.imports import ImportConfig
from sae_dist.shards.join import join
from sae_dist.shards.joined import JoinedStore
from sae_dist.shards.reader import Store

POSITIONAL = ("action", "store")
HOUR_S = 3600.0
IMPORT_KEYS = [field.name for field in dataclasses.fields(ImportConfig)]  # type: ignore[arg-type]


@frozen
class StoreJob:
    """One action on one store; keys of other actions are ignored."""

    action: Literal["ls", "stats", "verify", "gc", "import", "copy", "join"]
    store: str
    to: str | None = None
    withdraw: bool = False
    delete: bool = False
    age_hours: Annotated[float, Field(ge=0)] = 48.0
    parts: dict[str, str] | None = None

    def needed_to(self) -> str:
        """Where a copy goes."""
        if self.to is None:
            raise UserError(f"to is missing; sae-dist store {self.action} needs to=...")
        return self.to


def main(values: Mapping[str, Any]) -> int:
    job = load(StoreJob, {key: value for key, value in values.items() if key not in IMPORT_KEYS})
    match job.action:
        case "import":
            given = {key: values[key] for key in IMPORT_KEYS if key != "path" or values[key] is not None}
            _ls(imports.import_store(storage.open(job.store), load(ImportConfig, given)))
        case "copy":
            target = storage.open(job.needed_to())
            done = copying.copy(_with_own_rows(job), target)
            print(f"{target.uri}: {done.units} units, {_size(done.bytes)} copied, {done.skipped} were there")
        case "ls":
            _ls(_open(job))
        case "stats":
            _stats(_open(job))
        case "verify":
            return _verify(job)
        case "gc":
            _gc(job)
        case "join":
            parts = {name: stores.open(storage.open(uri)) for name, uri in (job.parts or {}).items()}
            _ls(join(storage.open(job.store), parts))
        case _:
            assert_never(job.action)
    return 0


def _open(job: StoreJob) -> Store:
    return stores.open(storage.open(job.store))


def _with_own_rows(job: StoreJob) -> Store:
    """The store; UserError where it is a join, which holds nothing to copy, verify or collect."""
    store = _open(job)
    if isinstance(store, JoinedStore):
        places = ", ".join(part.storage.uri for part in store.parts.values())
        raise UserError(
            f"store={job.store} is a join and holds no rows; {job.action} the stores that it joins: {places}"
        )
    return store


def _ls(store: Store) -> None:
    found = summary.summarize(store)
    hooks = ", ".join(f"{hook} [{width}]" for hook, width in found.hooks.items())
    print(f"{found.uri}  {found.digest[:12]}")
    print(f"  model {found.model}, hook points {hooks}, {found.dtype}")
    units = f"{len(found.units)} of {found.n_units} units ({found.heldout_units} held out)"
    dropped = sum(unit.dropped for unit in found.units)
    left_out = f" ({dropped:,} more are left out: not finite, or far longer than the others)" if dropped else ""
    print(f"  {units}, {found.rows:,} rows{left_out}, {_size(found.bytes)}")
    for hook, error in found.relative_error.items():
        if error:
            print(f"  {hook}: storing cost a relative squared error of {error:.2g}")
    for consumer in found.consumers:
        print(f"  read by {consumer.consumer}: {consumer.taken} units, {consumer.saved} past its checkpoint")


def _stats(store: Store) -> None:
    table = Table()
    for column in ("hook point", "rows", "mean norm", "norm of the mean", "variance", "max |x|", "NaN or Inf"):
        table.add_column(column, justify="left" if column == "hook point" else "right")
    for hook, found in summary.statistics(store).items():
        mean_norm = float((found.mean**2).sum() ** 0.5)
        row = (found.n, found.norm_mean, mean_norm, found.total_variance, found.max_abs, found.nonfinite)
        table.add_row(hook, *(quantity(value) for value in row))
    Console().print(table)


def _verify(job: StoreJob) -> int:
    store = _with_own_rows(job)
    found = verify.verify(store)
    print(f"{store.storage.uri}: {found.units} units, {_size(found.bytes)} read")
    for bad in found.bad:
        print(f"  unit {bad.unit}: {bad.problem} ({bad.key})")
    if found.missing:
        print(f"  {len(found.missing)} units are not harvested yet, the first is {found.missing[0]}")
    if not found.harvest_again:
        print("  every byte is what was committed")
        return 0
    again = ", ".join(map(str, found.harvest_again))
    if job.withdraw:
        verify.withdraw(store, found.harvest_again)
        print(f"  withdrawn: {again}; the command that harvested the store makes them again")
    else:
        print(f"  to have units {again} made again: sae-dist store verify store={job.store} withdraw=true")
    return BAD_INPUT


def _gc(job: StoreJob) -> None:
    store = _with_own_rows(job)
    found = gc.collect(store, age_s=job.age_hours * HOUR_S, delete=job.delete)
    for orphan in found.orphans:
        print(f"  {orphan.key}  {_size(orphan.size)}")
    print(
        f"{store.storage.uri}: {len(found.orphans)} objects, {_size(found.bytes)}, "
        f"{'deleted' if found.deleted else 'to delete with delete=true'}; {found.young} too young to tell"
    )


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024 or unit == "TiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.4g} {unit}"
