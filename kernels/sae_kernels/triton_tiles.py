"""The block shape of the encoder product on each processor: chosen here, compiled and read for spills by a test."""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A program multiplies `rows` inputs by `latents` rows of W_enc, `depth` dimensions at a time."""

    rows: int
    latents: int
    depth: int
    parts: int  # the epilogue handles latents / parts columns at a time, so that its registers are free again
    warps: int
    stages: int


TILES = {  # by target; the registers and the shared memory of each are in kernels/README.md
    "sm_80": Tile(rows=128, latents=128, depth=32, parts=4, warps=8, stages=4),
    "sm_90": Tile(rows=128, latents=256, depth=64, parts=8, warps=8, stages=4),
    "sm_100": Tile(rows=128, latents=256, depth=64, parts=8, warps=8, stages=4),
    "gfx942": Tile(rows=128, latents=128, depth=64, parts=4, warps=8, stages=2),
}
UNEVEN = Tile(rows=128, latents=128, depth=32, parts=4, warps=8, stages=3)  # d_model no multiple of the depth: masks
SINGLE = Tile(rows=64, latents=64, depth=32, parts=1, warps=4, stages=2)  # fp32 operands
INTERPRETED = Tile(rows=16, latents=32, depth=32, parts=2, warps=4, stages=1)
GROUP_ROWS = 16  # row blocks that share a sweep over the latents: their inputs stay in the L2 cache


def tile_for(x: torch.Tensor) -> Tile:
    """The default tile for operands [rows, d_model] like x, on the device that holds it."""
    if x.device.type != "cuda":
        return INTERPRETED
    if x.dtype == torch.float32:
        return SINGLE
    tile = TILES[target_of(x.device)]
    return tile if x.shape[1] % tile.depth == 0 else UNEVEN


def target_of(device: torch.device) -> str:
    """The key in `TILES` of a device; processors without one of their own take the smallest."""
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
