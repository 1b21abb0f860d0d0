"""The block shape of the encoder product on each processor: chosen here, compiled and read for spills by a test."""

from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A program multiplies `rows` inputs by `latents` rows of W_enc, `depth` dimensions at a time."""

    rows: int
    latents: int
    depth: int
    warps: int
    stages: int
    fragments: int = 1  # blocks of 16 rows side by side in the result: one a warp where a warp has all columns
    bulk: bool = False  # the copy engine brings the operands (Hopper's and later), where their shapes allow it
    resident: int = 0  # programs a processor, each for many tiles; 0: a program for every tile


TILES = {  # by target; the registers and the shared memory of each are in kernels/README.md
    "sm_80": Tile(rows=128, latents=128, depth=32, warps=8, stages=4),
    "sm_90": Tile(rows=128, latents=256, depth=64, warps=8, stages=3, fragments=8, bulk=True, resident=1),
    "sm_100": Tile(rows=128, latents=128, depth=64, warps=8, stages=4, bulk=True),
    "gfx942": Tile(rows=128, latents=128, depth=64, warps=8, stages=2),
}
UNEVEN = Tile(rows=128, latents=128, depth=32, warps=8, stages=3)  # d_model no multiple of the depth: masks
SINGLE = Tile(rows=64, latents=64, depth=32, warps=4, stages=2)  # fp32 operands
INTERPRETED = Tile(rows=32, latents=32, depth=32, warps=2, stages=1, fragments=2)
GROUP_ROWS = 16  # row blocks that share a sweep over the latents: their inputs stay in the L2 cache
RESIDENT_UP_TO = 2048  # d_model: with longer sums the epilogue is not worth hiding (H200: 768 is, 4,096 is not)
LANES = 4  # threads that share a row of a matrix unit's result, each with two columns of eight (NVIDIA's)


def tile_for(x: torch.Tensor, *, theta: bool = False) -> Tile:
    """The default tile for operands [rows, d_model] like x, on the device that holds it; `theta`: with thresholds."""
    if x.device.type != "cuda":
        return INTERPRETED
    if x.dtype == torch.float32:
        return SINGLE
    target = target_of(x.device)
    tile = TILES[target]
    if x.shape[1] % tile.depth:
        tile = UNEVEN
    elif x.shape[1] > RESIDENT_UP_TO:
        tile = tile._replace(resident=0)
    return with_thresholds(tile, target) if theta else tile


def with_thresholds(tile: Tile, target: str) -> Tile:
    """The tile where columns have thresholds: on Blackwell half as wide, since a thread has half a row's columns."""
    return tile._replace(latents=tile.latents // 2) if target == "sm_100" else tile


def target_of(device: torch.device) -> str:
    """The key in `TILES` of a device; processors without one of their own take the smallest."""
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; three where there is none, so that interpreted programs take several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
