"""The global batch on every rank of a mesh: each rank reads its lanes, and all get all rows in the order of one reader.

Before each batch there is a roll call: whether every rank has its rows and none was asked to stop, so that all ranks
take a step or none does. A rank receives the batch's rows in the store's dtype, and 8 bytes a row for their places.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from sae_dist.config import UserError
from sae_dist.shards import quantize
from sae_dist.shards.hooks import Hooks, width
from sae_dist.shards.loader import Batch, Loader
from sae_dist.shards.order import OrderConfig
from sae_dist.shards.permutation import MASK
from sae_dist.shards.reader import Store
from sae_dist.train.parallel.collectives import all_gather, gather_rows
from sae_dist.train.parallel.mesh import Mesh


class GlobalBatch(NamedTuple):
    """A global batch; the same on every rank."""

    x: Shaped[Tensor, "batch width"]  # in the store's dtype, on the mesh's device; on CPUs only until the next batch
    target: Shaped[Tensor, "batch target_width"]  # what to reconstruct: x, or other hooks
    epoch: int
    order_hash: int  # of all rows so far
    units_done: int
    docs: Callable[[], Int64[Tensor, " batch"]]  # document numbers, in any order; all ranks call it together


class MeshLoader:
    """Global batches from `start_step` on; use it in a `with`. `options` go to the Loader."""

    def __init__(
        self,
        mesh: Mesh,
        store: Store,
        hooks: Hooks,
        *,
        order: OrderConfig,
        start_step: int,
        order_hash: int,
        **options: Any,
    ) -> None:
        self._mesh, rank, readers = mesh, mesh.world.rank, min(mesh.world.size, order.lanes)
        if options.get("live") and mesh.world.size > readers:  # ranks without lanes cannot wait for rows as readers can
            raise UserError(
                f"order.lanes={order.lanes} are fewer than the {mesh.world.size} ranks of a live=true training; raise "
                "order.lanes, or use fewer ranks"
            )
        dtype = quantize.batch_dtype(store.meta.dtype)
        self._nothing = [
            torch.empty(0, width(store.meta, names), dtype=dtype, device=mesh.device) for names in hooks.sides
        ]
        self._step = start_step
        self._loader = None  # of more ranks than lanes, the last have nothing to read
        if rank < readers:
            self._loader = Loader(
                store, hooks=hooks, order=order, start_step=start_step, order_hash=order_hash if rank == 0 else 0,
                rank=rank, world=readers, pinned=mesh.device.type == "cuda", reuse_buffers=mesh.device.type == "cpu",
                **options,
            )  # fmt: skip

    def next(self, *, stop: bool = False) -> GlobalBatch | None:
        """The next batch; None on all ranks once one of them, or its loader, was asked to stop."""
        if stop and self._mesh.world.group is None:
            return None
        mine = None if stop or self._loader is None else next(self._loader, None)
        going = not stop and (mine is not None or self._loader is None)
        if self._mesh.world.group is None:
            return None if mine is None else _alone(mine, self._mesh)
        fed = self._together(mine, going)
        self._step += 1
        return fed

    def starved_s(self) -> float:
        """Seconds that this rank has waited for its rows."""
        return 0.0 if self._loader is None else self._loader.waits().starved_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._loader is not None:
            self._loader.close()

    def _together(self, mine: Batch | None, going: bool) -> GlobalBatch | None:
        mesh = self._mesh
        rows, epoch, units_done, hashed = (
            (0, 0, 0, 0) if mine is None else (len(mine.x), mine.epoch, mine.units_done, mine.order_hash)
        )
        said = torch.tensor([going, self._step, rows, epoch, units_done, _signed(hashed)], dtype=torch.int64)
        everybody = all_gather(mesh, mesh.control, said, name="roll_call").tolist()
        if not all(going for going, *_ in everybody):
            return None
        assert {step for _, step, *_ in everybody} == {self._step}, f"ranks at steps {[e[1] for e in everybody]}"
        sizes = [rows for _, _, rows, *_ in everybody]
        sides = self._nothing if mine is None else _sent(mine, mesh.device)
        place = torch.empty(0, dtype=torch.int64) if mine is None else torch.from_numpy(mine.place)
        gathered = [gather_rows(mesh, mesh.world, side, sizes, name="batch") for side in sides]
        place = gather_rows(mesh, mesh.world, _sent_one(place, mesh.device), sizes, name="batch")
        ordered = [torch.empty_like(side).index_copy_(0, place, side) for side in gathered]
        doc = torch.empty(0, dtype=torch.int64) if mine is None else torch.from_numpy(mine.doc.view("int64"))
        return GlobalBatch(
            x=ordered[0],
            target=ordered[-1],
            epoch=max(epoch for *_, epoch, _, _ in everybody),
            order_hash=sum(hashed for *_, hashed in everybody) & MASK,
            units_done=max(done for *_, done, _ in everybody),
            docs=lambda: gather_rows(mesh, mesh.control, doc, sizes, name="docs"),
        )


def _alone(batch: Batch, mesh: Mesh) -> GlobalBatch:
    sides = _sent(batch, mesh.device)
    return GlobalBatch(
        sides[0], sides[-1], batch.epoch, batch.order_hash, batch.units_done,
        lambda: torch.from_numpy(batch.doc.view("int64")),
    )  # fmt: skip


def _sent(batch: Batch, device: torch.device) -> list[Tensor]:
    """x, and the target where it is another tensor."""
    sides = [batch.x] if batch.target is batch.x else [batch.x, batch.target]
    return [_sent_one(side, device) for side in sides]


def _sent_one(tensor: Tensor, device: torch.device) -> Tensor:
    """On its way to a GPU from page-locked memory: nobody waits for the copy, nor for what the GPU does before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _signed(word: int) -> int:
    """64 bits as a tensor can hold them."""
    return word - (1 << 64) if word >> 63 else word
