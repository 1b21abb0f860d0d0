"""Where the rows of a batch in the making go: a tensor for each of its sides, of which every hook point has columns."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae_dist.shards import quantize
from sae_dist.shards.format import StoreMeta
from sae_dist.shards.hooks import width

AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # rows are moved as integers: any dtype, no rounding


class Room(NamedTuple):
    """Of one hook point: its rows as they are stored, and their scales where the store is quantised."""

    hook: str
    bits: Shaped[Tensor, "batch width"]
    scale: Float[Tensor, " _"]


class Side(NamedTuple):
    """The room of all hook points of x, or of the target."""

    rooms: tuple[Room, ...]
    whole: Shaped[Tensor, "batch width"] | None  # that the rooms are columns of; None: quantised rows lie by themselves

    def filled(self, meta: StoreMeta) -> Shaped[Tensor, "batch width"]:
        """What the rooms hold, side by side, once they are full."""
        if self.whole is not None:
            return self.whole
        decoded = [quantize.decode(room.bits, room.scale, meta.dtype) for room in self.rooms]
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded, 1)


def side(meta: StoreMeta, hooks: Sequence[str], n: int, buffer: Callable[[int, int], Tensor]) -> Side:
    """Room for `n` rows of these hook points; `buffer(rows, width)` gives memory in the dtype of a batch."""
    moved = AS_INTEGERS[meta.element.stored.itemsize]
    if meta.element.scaled:
        rooms = (Room(hook, torch.empty(n, meta.hooks[hook], dtype=moved), torch.empty(n)) for hook in hooks)
        return Side(tuple(rooms), None)
    whole, nothing = buffer(n, width(meta, hooks)), torch.empty(0)
    columns = whole.view(moved).split([meta.hooks[hook] for hook in hooks], 1)
    return Side(tuple(Room(hook, part, nothing) for hook, part in zip(hooks, columns, strict=True)), whole)


class Move(NamedTuple):
    """Some rows of a slice, and where they go."""

    source: Shaped[Tensor, "slice width"]
    rows: Int[Tensor, " rows"]
    out: Shaped[Tensor, "rows width"]


def move(moves: Sequence[Move]) -> None:
    """Makes the moves, one after the other."""
    for source, rows, out in moves:
        torch.index_select(source, 0, rows, out=out)
